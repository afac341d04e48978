"""
A reward model in vLLM's engine: the rewards of score.py, for models that tensor parallelism has to split.

Reads   --responses FILE ...  as score.py
Writes  --out FILE            as score.py, with the same "scores" ("rm") and "labeler"

The model needs a chat template. Up to 8 rewards of a local model of at most 4 GB are first compared with
those of transformers: a wrong activation or a wrong pooled token would show. If they differ, nothing is
written. A larger model is not loaded twice: compare its first rows with those of score.py --limit 8.

    python scorers/rm_vllm.py --model Skywork/Skywork-Reward-Llama-3.1-8B-v0.2 --tensor-parallel 4 \\
        --responses out/on.jsonl --out out/scored.jsonl

Resumes and prints as score.py does.
"""

import gc
import importlib.util
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import score  # noqa: E402
from common import fail, note  # noqa: E402
from loading import load_model  # noqa: E402

CHECKED_BYTES = 4e9  # weights up to here are also loaded by transformers, to compare the rewards
LONGEST = 32768  # the longest input unless --max-length says more: vLLM reserves memory for it


def parse_args(argv=None):
    parser = score.make_parser(__doc__)
    score.add_model_flags(parser)
    score.add_length_flag(parser)
    flag = parser.add_argument
    flag("--name", help='key in "scores" and prefix of "labeler" (default rm)')
    flag("--tensor-parallel", type=score.positive, default=1, metavar="GPUS", help="for one model")
    args = parser.parse_args(argv)
    args.backend = "vllm"  # for the record: score.py does not resume these rows
    args.batch_tokens = 8192  # of the comparison with transformers
    return args


def start_engine(args, max_length):
    """vLLM's engine with the reward head. It logs on standard error and reports no usage."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # CUDA does not survive a fork
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    options = {}
    if not torch.cuda.is_available():
        # in this process, which starts faster; 4 GiB, not all memory; every core, where one is left idle
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")
        options["enforce_eager"] = True
    from vllm import LLM

    return LLM(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        runner="pooling",
        convert="classify",
        max_model_len=max_length,
        tensor_parallel_size=args.tensor_parallel,
        **options,
    )


class RewardModel(score.RewardModel):
    """Rewards by vLLM; the checks of the model and of lengths, and the rows, are those of score.py."""

    def __init__(self, args, rows):
        super().__init__(args, rows)
        if not importlib.util.find_spec("vllm"):
            fail("this scorer needs the package vllm; install it, or use score.py")
        if not self.chat:
            fail(f"{args.model}: no chat template, which this scorer needs; use score.py for pairs of texts")
        if not args.max_length:
            self.max_length = min(self.max_length, LONGEST)
        self.first_rows = list(rows.values())[:8]

    def load(self):
        from transformers import AutoModelForSequenceClassification as auto_class

        args = self.args
        size = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
        if 0 < size <= CHECKED_BYTES:
            self.load_compared()
            return
        # vLLM would not notice a weight that is missing in the files; on "meta" no weights are read
        load_model(auto_class, args.model, args.revision, args.dtype, device_map="meta")
        note("vLLM's rewards are not compared with transformers'; to compare, use score.py --limit 8")
        self.engine = start_engine(args, self.max_length)

    def load_compared(self):
        """The engine; the run ends if its rewards of the first responses are not those of transformers."""
        counts = self.counts.copy()
        sequences = []
        for row in self.first_rows:
            for response in row["responses"][:1]:
                with suppress(ValueError):  # it has no reward
                    sequences.append(self.encode(row, response)[0])
        sequences = [ids for ids in sequences if len(ids) <= self.max_length]
        super().load()
        expected = super().rewards(sequences, [None] * len(sequences), lambda n: None)
        del self.model
        gc.collect()
        torch.cuda.empty_cache()
        self.engine = start_engine(self.args, self.max_length)
        given = self.rewards(sequences, None, lambda n: None)
        for theirs, ours in zip(expected, given, strict=True):
            if math.isfinite(theirs) and not abs(ours - theirs) <= 0.1 + 0.03 * abs(theirs):  # bfloat16
                reason = f"vLLM's reward {ours} differs from transformers' {theirs}"
                fail(f"{self.args.model}: {reason}; use score.py")
        self.counts = counts

    def rewards(self, sequences, types, update):
        from vllm import PoolingParams

        params = PoolingParams(use_activation=False)  # vLLM's default for one label is a sigmoid
        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        outputs = self.engine.encode(prompts, pooling_task="classify", use_tqdm=False, pooling_params=params)
        self.counts["tokens_scored"] += sum(map(len, sequences))
        update(len(sequences))
        return [float(output.outputs.data[0]) for output in outputs]


if __name__ == "__main__":
    try:
        score.main(parse_args(), RewardModel)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
