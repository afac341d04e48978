"""
DPO-Mix-P's sampling, with which S1 compares SimpleMix: generate.py from a mixture of two models' logits.

Reads and writes as generate.py, whose flags it has, by transformers. Next-token logits are A x those of
--model plus B x those of --reference, renormalised token by token; that is not the mixture of whole
responses. The first response of a pair is sampled with 1.5 -0.5 and the second with 0.5 0.5, by two runs: as
in the paper's code, one response per prompt at temperature 0.7, without top-p. The weights are part of the
random draw: otherwise the two runs would share their random numbers and begin alike.

    python recipes/sample_mixture.py --model out/dpo --reference out/sft --weights 1.5 -0.5 \\
        --prompts prompts.jsonl --out better.jsonl
    python recipes/sample_mixture.py --model out/dpo --reference out/sft --weights 0.5 0.5 \\
        --prompts prompts.jsonl --out worse.jsonl
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F

import generate
from common import fail, stable_hash
from loading import context_length, fingerprint, load_model, load_tokenizer

PRESET = {"n": 1, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_tokens": 2048}


def parse_args(argv=None):
    generate.PRESETS["mixture"] = PRESET
    parser = generate.make_parser(__doc__)
    parser.set_defaults(preset="mixture", backend="hf")
    parser.add_argument("--reference", required=True, metavar="MODEL", help="folder or hub id")
    parser.add_argument("--weights", required=True, nargs=2, type=float, metavar=("A", "B"))
    args = generate.parse_args(argv, parser)
    if not all(map(math.isfinite, args.weights)):
        parser.error(f"--weights must be finite, found {args.weights}")
    if args.greedy or args.backend != "hf":
        parser.error("--greedy and --backend vllm cannot be combined with a mixture")
    args.seed = stable_hash(args.seed, "mixture", *args.weights)
    return args


def mix_logits(policy, reference, weights, vocabulary):
    """weights[0] * policy + weights[1] * reference, float32 (B, min(V, V')), of raw logits (B, V), (B, V').

    Rows after the vocabulary only pad the embeddings. They are masked after mixing, since a negative weight
    would make +inf of a masked logit of the reference.
    """
    width = min(policy.shape[-1], reference.shape[-1])
    mixed = weights[0] * policy[:, :width].float() + weights[1] * reference[:, :width].float()
    mixed[:, vocabulary:] = -torch.inf
    return mixed


def mixer(reference, mask, weights, vocabulary):
    """A logits processor that runs the reference along with the policy, with its own cache.

    mask (B, T): 1 where the prompts, padded on the left, have a token.
    """
    cache, n_done = None, 0

    def mix_in(input_ids, logits):
        nonlocal cache, n_done
        attended = F.pad(mask, (0, input_ids.shape[1] - mask.shape[1]), value=1)
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        output = reference(
            input_ids=input_ids[:, n_done:],
            attention_mask=attended,
            position_ids=positions[:, n_done:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if getattr(output, "past_key_values", None) is None:
            kind = reference.config.model_type
            fail(f"{reference.name_or_path}: {kind} models keep no past_key_values, which a mixture needs")
        cache, n_done = output.past_key_values, input_ids.shape[1]
        return mix_logits(logits, output.logits[:, -1], weights, vocabulary)

    return mix_in


def mixture_sampler(args, tokens, longest):
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer, config = load_tokenizer(args.reference, None)
    if fingerprint(tokenizer) != tokens.chat.fingerprint:
        fail(f"{args.reference}: its tokenizer differs from that of {args.model}")
    context = context_length(config)
    if context < tokens.context:
        fail(f"{args.reference}: its context of {context} is shorter than that of {args.model}")
    reference = load_model(AutoModelForCausalLM, args.reference, None, args.dtype)
    reference.generation_config = GenerationConfig(pad_token_id=tokens.pad_id)  # not the model's own
    if args.batch_size != 1 and generate.reads_padding(reference, tokens, args.dtype):
        fail(f"{args.reference}: {generate.PADDING}; use --batch-size 1")
    vocabulary = max(tokens.chat.tokenizer.get_vocab().values()) + 1

    def processors(mask):
        check = generate.check_logits(args.reference, mask.shape[1])  # the policy's own logits were checked
        return [mixer(reference, mask, args.weights, vocabulary), check]

    return generate.hf_sampler(args, tokens, longest, processors)


if __name__ == "__main__":
    args = parse_args()
    try:
        generate.main(args, mixture_sampler, other_models=[(args.reference, None)])
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
