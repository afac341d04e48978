"""
S3's answers for evaluation (Appendix B.4): generate.py with beam search that samples, by transformers.

Reads and writes as generate.py, whose flags it has, with one response per prompt. S3 gives three beams and
sampling, and no temperature: it is 1 here, without top-p and top-k. Beams draw from torch's own generator,
which is seeded for every batch of 16: equal commands give equal rows, another --batch-size gives others.

    python recipes/sample_beams.py --beams 3 --model out/dpo --prompts alpaca.jsonl --out answers.jsonl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import generate
from common import note, stable_hash
from loading import load_model

PRESET = {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 2048}


def parse_args(argv=None):
    generate.PRESETS["beams"] = PRESET
    parser = generate.make_parser(__doc__)
    parser.set_defaults(preset="beams", backend="hf")
    parser.add_argument("--beams", type=int, default=3, help="default %(default)s")
    args = generate.parse_args(argv, parser)
    if args.beams < 2 or args.n > 1:
        parser.error(f"--beams must be at least 2 and --n is 1, found {args.beams} and {args.n}")
    if args.greedy or args.backend != "hf":
        parser.error("--greedy and --backend vllm cannot be combined with beams that sample")
    args.beam_batch = args.batch_size or 16  # draws together, so a resumed run must have the same
    return args


def beam_sampler(args, tokens, longest):
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = load_model(AutoModelForCausalLM, args.model, args.revision, args.dtype)
    model.generation_config = GenerationConfig(pad_token_id=tokens.pad_id)  # not the model's own
    equal = generate.reads_padding(model, tokens, args.dtype)
    if equal:
        note(f"{args.model}: {generate.PADDING}; only prompts of one length share a batch")
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_tokens,
        do_sample=True,
        num_beams=args.beams,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        eos_token_id=tokens.stop_ids,
        pad_token_id=tokens.pad_id,
    )

    @torch.inference_mode()
    def sample(requests):
        for batch in generate.batches(requests, args.beam_batch, equal):
            ids, mask = generate.pad_left([request.ids for request in batch], tokens.pad_id, model.device)
            check = generate.check_logits(args.model, ids.shape[1])
            names = [request.prompt_id for request in batch]
            torch.manual_seed(stable_hash(args.seed, "beams", *names) % 2**63)
            output = model.generate(input_ids=ids, attention_mask=mask, logits_processor=[check])
            yield from zip(batch, output[:, ids.shape[1] :].tolist(), strict=True)

    return sample


if __name__ == "__main__":
    args = parse_args()
    try:
        generate.main(args, beam_sampler)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
