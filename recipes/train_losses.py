"""
More losses for train_dpo.py, each a function: IPO, SimPO, and four variants of DPO and SLiC-HF.

Reads and writes as train_dpo.py, whose flags it has; --loss takes the names below too. To add one, write a
function of a Batch (see there) with @loss(): its keyword parameters become flags.

    python recipes/train_losses.py --loss simpo --model out/models/policy --pairs out/on50.pairs.jsonl \\
        --out out/simpo --batch-size 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_dpo  # noqa: E402
from train_dpo import F, loss, number  # noqa: E402


@loss()
def ipo(batch, *, beta=None):
    """(h - 1 / (2 beta))^2: IPO (Azar et al., 2023, arXiv 2310.12036, eq. 17)."""
    return (batch.chosen - batch.rejected - 1 / (2 * beta)) ** 2


@loss(reference=False, per_token=True)
def simpo(batch, *, beta=2.0, simpo_gamma: number(float, allow_0=True) = 1.0):
    """-log sigma(beta (mean log pi(y_w) - mean log pi(y_l)) - gamma), means over tokens.

    SimPO (Meng et al., 2024, arXiv 2405.14734, eq. 6).
    """
    return -F.logsigmoid(beta * (batch.chosen - batch.rejected) - simpo_gamma)


@loss()
def dpo_smoothed(batch, *, beta=None, label_smoothing: number(float, allow_0=True, below=0.5) = 0.1):
    """-(1 - e) log sigma(beta h) - e log sigma(-beta h): a label is wrong with probability e.

    Conservative DPO (Mitchell, 2023, "A note on DPO with noisy preferences").
    """
    z = beta * (batch.chosen - batch.rejected)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


@loss(per_token=True)
def dpo_normalized(batch, *, beta=5.0):
    """-log sigma(beta h) with log-ratios per token: length-normalised DPO (Tulu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(beta * (batch.chosen - batch.rejected))


@loss()
def dpo_nll(batch, *, beta=None, nll_weight: number(float, allow_0=True) = 1.0):
    """-log sigma(beta h) - w mean log pi(y_w): DPO with the likelihood of the chosen response, per token.

    RPO (Pang et al., 2024, "Iterative Reasoning Preference Optimization", arXiv 2404.19733, eq. 1).
    """
    nll = -batch.logps[:, 0] / batch.tokens[:, 0]
    return -F.logsigmoid(beta * (batch.chosen - batch.rejected)) + nll_weight * nll


@loss(reference=False, per_token=True)
def slic_mean(batch, *, slic_delta=1.0, slic_lambda: number(float, allow_0=True) = 0.1):
    """max(0, delta - mean log pi(y_w) + mean log pi(y_l)) - lambda mean log pi(y_w): train_dpo.py's slic
    with means over tokens in place of sums."""
    return train_dpo.slic(batch, slic_delta=slic_delta, slic_lambda=slic_lambda)


if __name__ == "__main__":
    try:
        train_dpo.main(train_dpo.parse_args(parser=train_dpo.make_parser(__doc__)))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume from the last checkpoint")
