"""What an attacker learns of single rows from a model: membership inference and exposure. Pure functions.

A score is an attacker's belief that a row was trained on: higher is more likely a member.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-6


def auc(members: Tensor, others: Tensor) -> float:
    """Area under the ROC curve: ``P(member > other) + P(member = other) / 2``; 0.5 is a coin.

    Args:
        members: ``(m,)``, scores of rows that were trained on.
        others: ``(n,)``, scores of rows that were not.

    Raises:
        ValueError: one of them is empty.
    """
    _check(members, others)
    ordered = others.sort().values
    below = torch.searchsorted(ordered, members.contiguous(), side="left")
    not_above = torch.searchsorted(ordered, members.contiguous(), side="right")
    return float((below + not_above).double().mean() / (2 * len(others)))


def tpr_at_fpr(members: Tensor, others: Tensor, fpr: float = 0.01) -> float:
    """Share of members above the lowest threshold that at most ``fpr`` of the others are above.

    Source: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022.

    Args:
        members: ``(m,)``, scores.
        others: ``(n,)``, scores. With n < 1 / fpr no other may be above the threshold.
        fpr: false-positive rate.

    Raises:
        ValueError: one of them is empty.
    """
    _check(members, others)
    allowed = math.floor(fpr * len(others) + 1e-9)
    threshold = others.sort(descending=True).values[min(allowed, len(others) - 1)]
    return float((members > threshold).double().mean())


def bootstrap_interval(
    statistic: Callable[[Tensor, Tensor], float],
    members: Tensor,
    others: Tensor,
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic when members and others are drawn again with replacement (Efron 1979).

    Args:
        statistic: of members' and others' scores.
        members: ``(m,)``, scores.
        others: ``(n,)``, scores.
        seed: of the draws.
        resamples: how many.
        confidence: of the interval.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(
        [
            statistic(
                members[torch.randint(len(members), (len(members),), generator=generator)],
                others[torch.randint(len(others), (len(others),), generator=generator)],
            )
            for _ in range(resamples)
        ],
        dtype=torch.float64,
    )
    tail = (1 - confidence) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def confidence_logit(probabilities: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of the true label's probability: near a Gaussian, which LiRA needs."""
    p = probabilities.double().clamp(1e-9, 1 - 1e-9)
    return p.log() - (-p).log1p()


def lira_scores(target: Tensor, shadows: Tensor, inside: Tensor) -> Tensor:
    """Log-likelihood ratio of a row's confidence with it and without it in training (online LiRA).

    ``log N(phi; mu_in, s_in^2) - log N(phi; mu_out, s_out^2)``, with means of each row and, since few shadow
    models give no variance of a row, variances over all rows. Source: Carlini et al. 2022, Algorithm 1 and
    section VI.

    Args:
        target: ``(rows,)``, the attacked model's :func:`confidence_logit`.
        shadows: ``(shadows, rows)``, those of the shadow models.
        inside: ``(shadows, rows)``, whether the shadow model was trained on the row.

    Raises:
        ValueError: a row is inside all shadow models, or none.
    """
    into, out = inside.double(), (~inside).double()
    if not (into.sum(0).all() and out.sum(0).all()):
        raise ValueError("each row must be inside some shadow models and outside others")
    likelihoods = []
    for weights in (into, out):
        mean = (weights * shadows).sum(0) / weights.sum(0)
        freedom = (weights.sum(0) - 1).clamp_min(0).sum()
        squares = (weights * (shadows - mean) ** 2).sum()
        variance = (squares / freedom.clamp_min(1)).clamp_min(VARIANCE_FLOOR)
        likelihoods.append(-0.5 * ((target - mean) ** 2 / variance + variance.log()))
    return likelihoods[0] - likelihoods[1]


def exposure(loss: float, candidates: Tensor) -> float:
    """How far a planted secret stands out: ``log2(n + 1) - log2(rank)`` among n random secrets of its form.

    The rank is 1 for the least loss. A secret that was not learned has 1.44 bits in the mean; the most that can be
    measured is ``log2(n + 1)``. Source: Carlini et al., "The Secret Sharer", USENIX Security 2019.

    Args:
        loss: of the planted secret.
        candidates: ``(n,)``, losses of random secrets that were not planted. Ties count as better than the secret.
    """
    rank = 1 + int((candidates <= loss).sum())
    return math.log2(len(candidates) + 1) - math.log2(rank)


def _check(members: Tensor, others: Tensor) -> None:
    if not (len(members) and len(others)):
        raise ValueError("scores of members and of others are needed")
