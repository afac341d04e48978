"""
Losses with a mean over the optimizer step: KTO and BCO, trained in two passes over the pairs of a step.

Reads and writes as train_dpo.py, whose flags it has; --loss is kto or bco. metrics.jsonl gains
mean_log_ratio: the mean of log(pi(y|x) / pi_ref(y|x)) over the chosen and rejected responses of the step.

    python recipes/train_kto.py --loss kto --model out/models/policy --pairs out/on50.pairs.jsonl \\
        --out out/kto --batch-size 8

A loss sees the pairs of a packed row, not those of the step: with a mean over its batch in it, losses and
gradients would change with --micro-tokens and with the number of GPUs. So `run_step`, which train_dpo.main
calls for every step, first runs the step's pairs without gradient; their mean is then a constant of the pass
with gradient. That takes a third more time. Held-out pairs are measured with the mean of the step before.

For another statistic of the step, change run_step and the loss. Nothing may be carried on from step to step,
as a running mean would be: a checkpoint has the weights and the optimizer only.
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_dpo  # noqa: E402, I001  sets the environment before torch is imported
import torch  # noqa: E402
from train_dpo import F, forward_backward, loss  # noqa: E402

STEP = SimpleNamespace(mean=0.0)  # mean log-ratio of the step that is trained; run_step sets it


@loss()
def kto(batch, *, beta=None):
    """1 - sigma(beta (r_w - z)) and 1 - sigma(beta (z - r_l)), their mean; r are log-ratios.

    KTO (Ethayarajh et al., 2024, arXiv 2402.01306, section 4) with both weights 1. There z = max(0, mean of
    log-ratios of responses to other prompts of the micro-batch), an estimate of KL(pi || pi_ref). Here it is
    of the step's responses to their own prompts, which need no pass of the reference model. Where pi_ref
    sampled them, their mean is about -KL(pi_ref || pi), and z is 0.
    """
    z = max(0.0, STEP.mean)
    chosen, rejected = torch.sigmoid(beta * (batch.chosen - z)), torch.sigmoid(beta * (z - batch.rejected))
    return 1 - (chosen + rejected) / 2


@loss()
def bco(batch, *, beta=None):
    """-log sigma(beta r_w - d) - log sigma(d - beta r_l), d = beta times the step's mean log-ratio.

    BCO (Jung et al., 2024, arXiv 2404.04656) with the reward shift d of the step, not a running mean.
    """
    shift = beta * STEP.mean
    return -F.logsigmoid(beta * batch.chosen - shift) - F.logsigmoid(shift - beta * batch.rejected)


def parse_args(argv=None):
    parser = train_dpo.make_parser(__doc__)
    parser.set_defaults(loss="kto")
    args = train_dpo.parse_args(argv, parser)
    if args.loss not in ("kto", "bco"):
        parser.error(f"--loss {args.loss} is for train_dpo.py; here are kto and bco")
    return args


def run_step(policy, pairs, args, step):
    """forward_backward with the mean of the step's log-ratios, which is no part of the gradient."""
    with torch.no_grad():
        rows = forward_backward(policy, pairs, args, step, train=False)  # of all processes, on every one
    rewards = [row[side] for row in rows for side in ("chosen_reward", "rejected_reward")]
    STEP.mean = math.fsum(rewards) / len(rewards) / args.beta  # fsum: the same in any order of the rows
    rows = forward_backward(policy, pairs, args, step)
    return [row | {"mean_log_ratio": STEP.mean} for row in rows]


if __name__ == "__main__":
    try:
        train_dpo.main(parse_args(), run_step)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume from the last checkpoint")
