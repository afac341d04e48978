"""
Real tokenizers and chat templates out of installed packages, as model folders with tiny random weights.

Templates: the *.jinja of trl. Tokenizers: SentencePiece v1 and v3 and tekken of mistral_common, deepseek's
and Claude's of litellm, folders of REAL_TOKENIZERS (SmolLM2: data/get_models.py makes one). Packages are
looked for and never imported: pip install --no-deps --target DIR trl==1.16.0 litellm, and PYTHONPATH=DIR.
"""

import base64
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# what templates open and close turns with. [INST] is not: it is text for models that have no such token
MARKER = re.compile(
    r"<\|[^|<>{}' ]+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_[a-z]+>|</?s>|\[gMASK\]|<sop>|<image>"
)
TEXT_MARKER = re.compile(r"</?(?:think|tool_call|tool_response)>")  # tokens that are not special, as Qwen3's
TEKKEN_NAMES = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[TOOL_CALLS] <pad> [PREFIX] [MIDDLE] [SUFFIX]"
).split()
SPECIAL_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
DEEPSEEK_NAMES = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
CLAUDE_NAMES = {"bos_token": "<SOS>", "eos_token": "<EOT>"}


def package(name, *below):
    """A path inside of an installed package; None without it."""
    spec = find_spec(name)
    path = spec and spec.origin and Path(spec.origin).parent.joinpath(*below)
    return path if path and path.exists() else None


def read_templates():
    """{name: text} of trl's chat templates."""
    folder = package("trl", "chat_templates")
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))} if folder else {}


def sentencepiece(path, legacy):
    """A BPE model of SentencePiece: its merges in the order of their scores.

    legacy: a space opens the text and what follows every special token (Mistral-7B-v0.1), else the text alone
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in vocab and right in vocab]
        splits.sort(key=lambda split: (vocab[split[0]], vocab[split[1]]))
        merges += [(model.get_score(vocab[piece]), split) for split in splits]
    merges = [split for _, split in sorted(merges, key=lambda merge: -merge[0])]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    control = [p for i, p in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    inner.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(steps)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return inner


def tekken(path):
    """Byte-level BPE whose merges are in the order of their ids, after 1000 special tokens."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    content = json.loads(path.read_text())
    config = content["config"]
    count = config["default_num_special_tokens"]
    names = TEKKEN_NAMES + [f"<SPECIAL_{i}>" for i in range(len(TEKKEN_NAMES), count)]
    size = config["default_vocab_size"] - count
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in content["vocab"][:size]}
    converter = TikTokenConverter(vocab_file="", pattern=config["pattern"])
    converter.load_tiktoken_bpe = lambda _: ranks
    vocab, merges = converter.extract_vocab_merges_from_model("")
    vocab = {name: i for i, name in enumerate(names)} | {token: count + i for token, i in vocab.items()}
    inner = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence([split, bytes_only]), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return inner


def find_tokenizers():
    """{name: function that makes (inner tokenizer, names of special tokens)} of what is installed."""
    makers = {}
    mistral, litellm = (
        package("mistral_common", "data"),
        package("litellm", "litellm_core_utils", "tokenizers"),
    )
    if mistral and find_spec("sentencepiece"):
        first, third = mistral / "tokenizer.model.v1", mistral / "mistral_instruct_tokenizer_240323.model.v3"
        makers["mistral_v1"] = lambda: (sentencepiece(first, legacy=True), SPECIAL_NAMES)
        makers["mistral_v3"] = lambda: (sentencepiece(third, legacy=False), SPECIAL_NAMES)
    if mistral:
        makers["tekken"] = lambda: (tekken(mistral / "tekken_240911.json"), SPECIAL_NAMES)
    if litellm:
        makers["deepseek"] = lambda: (read_tokenizer(litellm / "deepseek_tokenizer.json"), DEEPSEEK_NAMES)
        makers["claude"] = lambda: (read_tokenizer(litellm / "anthropic_tokenizer.json"), CLAUDE_NAMES)
    for path in sorted(Path(os.environ.get("REAL_TOKENIZERS") or os.devnull).glob("*/tokenizer.json")):
        config = json.loads(path.with_name("tokenizer_config.json").read_text())
        names = {name: config[name] for name in SPECIAL_NAMES if config.get(name)}
        makers[path.parent.name] = lambda path=path, names=names: (read_tokenizer(path), names)
    return makers


def read_tokenizer(path):
    return Tokenizer.from_file(str(path))


def make_model(folder, inner, names, markers):
    """Save a random Llama with this tokenizer, to which the markers are added; returns the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    plain = [marker for marker in markers if TEXT_MARKER.fullmatch(marker)]
    special = [marker for marker in markers if marker not in plain]
    inner.add_tokens([AddedToken(marker, normalized=False) for marker in plain])
    inner.add_special_tokens([AddedToken(marker, normalized=False) for marker in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=inner.get_vocab_size(),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def with_template(folder, template, target):
    """A model folder `target` that is `folder` with another chat template."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    (target / "chat_template.jinja").write_text(template)
    return target
