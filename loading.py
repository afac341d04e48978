"""Tokenizers and models from a folder or the hub, what their configs do not say; day and part of a run."""

import json
import os
import re
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path

from common import fail, meta_path, note, stable_hash

SAMPLE = "It was  a café:\n\n\tin 2024, 100 km.\n\nI'll 中文| a  b|\nuser\n\nHi"  # |: a special token
ROUNDING = {"float32": 2e-4, "bfloat16": 0.3}  # of the log-probability of a token; of T tokens, times sqrt(T)


# ----- tokenizers
def load_tokenizer(name, revision=None):
    """(tokenizer, config) of a local model folder or of OWNER/NAME on the hub.

    transformers chooses a class by names in the configs, which may be wrong: tokenizer.json decides.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, logging
    from transformers.utils import cached_file

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not name:
        fail("--model is empty: expected a model folder, or OWNER/NAME on the hub")
    problem = "no such folder, and not available from the hub"
    if os.path.isdir(name):
        problem = "its tokenizer or config cannot be loaded"
        files = os.listdir(name)
        if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
            fail(f"{name}: not a model folder: config.json or *.safetensors is missing")
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        path = cached_file(name, "tokenizer.json", **options)
        for loader in AutoTokenizer, PreTrainedTokenizerFast:
            tokenizer = loader.from_pretrained(name, revision=revision)
            if not path or reads_as(tokenizer, path):
                return tokenizer, config
            note(f"{name}: transformers' {type(tokenizer).__name__} is not the tokenizer of tokenizer.json")
        raise ValueError("no class of transformers reads as tokenizer.json does")
    except Exception as error:  # damaged files raise many kinds, even a bare Exception
        reason = str(error).partition("\n")[0]
        fail(f"{name}: {problem}: {type(error).__name__}: {reason}")


def reads_as(tokenizer, path):
    """Whether SAMPLE has the ids that the tokenizer.json at `path` gives it, around special tokens too."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(path)
    backend.no_truncation()
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    text = SAMPLE.replace("|", special[-1] if special else "")
    ids = backend.encode(text, add_special_tokens=False).ids
    return tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def fingerprint(tokenizer):
    """Identifies a tokenizer: models that have the same share the ids of texts."""
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        fail(f"{tokenizer.name_or_path}: expected a tokenizer.json, found a {kind} without one")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return f"{stable_hash(backend.to_str()):016x}"


def special_tokens(tokenizer):
    """A pattern that finds a tokenizer's special tokens in a text, which a model would read as tokens."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, special)) or "(?!)")


# ----- runs
def run_date(out, overwrite):
    """The day that chat templates see: that of the run in --out, which may go on, or today."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # no record, a damaged one, or one without
        record = {} if overwrite else json.loads(Path(meta_path(out)).read_text())
        return str(date.fromisoformat(record["args"]["date"]))
    return str(date.today())


def shard_of(rows, block, shard):
    """The rows of shard "I/N": every N-th block of them, from the I-th, counted from 0."""
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        fail(f"--shard {shard}: expected I/N with 0 <= I < N")
    chosen = [row for i, row in enumerate(rows) if i // block % int(count) == int(index)]
    return chosen or fail(f"--shard {shard}: {len(rows)} rows are too few for {count} blocks of {block}")


# ----- models
def load_model(auto_class, name, revision, dtype, unused=None, **options):
    """A model in eval mode, on the GPUs if there are any. Only weights named like `unused` may be missing."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=revision)
    if getattr(config, "quantization_config", None):
        fail(f"{name}: its weights are quantised; use the model that they were made from")
    if torch.cuda.is_available():
        options.setdefault("device_map", "auto" if torch.cuda.device_count() > 1 else "cuda")
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options.setdefault("attn_implementation", "eager")  # Gemma-2: sdpa leaves the soft cap out
    options |= {"revision": revision, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = auto_class.from_pretrained(name, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        fail(f"{name}: {(str(error) or repr(error)).splitlines()[0]}")
    missing = sorted(key for key in info["missing_keys"] if not (unused and unused in key))
    if missing:
        fail(f"{name}: missing weights: {', '.join(missing[:3])}")
    head = model.get_output_embeddings()
    tied = head is not None and config.tie_word_embeddings
    if tied and head.weight is not model.get_input_embeddings().weight:
        if head.weight.is_meta:  # transformers ties what is equal, and reads neither of them there
            return load_model(auto_class, name, revision, dtype, unused, device_map="cpu")
        fail(f"{name}: its config ties head and embedding (tie_word_embeddings), but their weights differ")
    return model.eval()


def output_head(model):
    """(weight (V, d), bias, scale, cap): logits are cap tanh((weight (scale h) + bias) / cap) of states h."""
    head = model.get_output_embeddings()
    config = vars(model.config.get_text_config())
    scale = config.get("logit_scale") or config.get("lm_head_multiplier") or 1.0
    scale /= config.get("logits_scaling") or 1.0
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    cap = next((config[name] for name in caps if config.get(name)), None)
    return head.weight, getattr(head, "bias", None), scale, cap


def check_logps(model, ids, start, logps, dtype):
    """Refuse logps of the tokens from `start` of ids (T,) whose sum is not that of the model's own logits."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1].float()
    targets = ids[start:, None].to(logits.device)
    own_logps = logits.log_softmax(-1).gather(1, targets)
    exact, given = own_logps.double().sum().item(), logps.double().sum().item()
    if abs(given - exact) > ROUNDING[dtype] * len(logits) ** 0.5:  # NaN is for the caller
        problem = f"a text has log-probability {exact:.4f} by its own logits, {given:.4f} by its head"
        fail(f"{model.name_or_path}: {model.config.model_type} models are not supported: {problem}")
    return exact


def context_length(config):
    """Tokens that a model reads; of longrope so many that no factor depends on the rest of the batch."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    for part in rope, *rope.values():  # some have parameters for each type of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limit = min(limit, part["original_max_position_embeddings"])
    return limit
