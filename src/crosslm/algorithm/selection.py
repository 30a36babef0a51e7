"""Step 5: which synthetic texts train the SLM (CrossLM, section 4.2, Eq. 10)."""

import math
from itertools import product
from typing import Literal

import torch
from torch import Tensor

NonpositiveRewards = Literal["keep", "drop"]

EXACT_TEXTS = 200_000
"""Pools up to this size are compared pair by pair."""


def diversity(vectors: Tensor, block: int = 1024) -> Tensor:
    """Diversity of each text, Eq. 10: ``D_j = 1 - max_{k != j} cos(v_j, v_k)``.

    Exact. The similarities are computed in square blocks, each pair of texts once, so memory grows
    with the number of texts and not with its square.

    Args:
        vectors: ``(texts, dimensions)``, sentence vectors of any length but zero.
        block: texts on a side of a block.

    Returns:
        ``(texts,)``, in [0, 2]; 0 for an exact duplicate. A text without any other has 1 + 1 = 2.
    """
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    parts = unit.split(block)
    nearest = list(unit.new_full((len(unit),), -1.0).split(block))
    for row, part in enumerate(parts):
        for column in range(row, len(parts)):
            similarity = part @ parts[column].T
            if row == column:
                similarity.fill_diagonal_(-1.0)  # k != j
            else:
                nearest[column] = torch.maximum(nearest[column], similarity.amax(dim=0))
            nearest[row] = torch.maximum(nearest[row], similarity.amax(dim=1))
    return 1 - torch.cat(nearest).clamp(-1.0, 1.0)


def approximate_diversity(vectors: Tensor, probes: int = 32, seed: int = 0) -> Tensor:
    """Eq. 10 for pools too large for all pairs: the nearest text is looked for among likely ones only.

    The texts are put into ``sqrt(texts)`` cells by k-means on the sphere; each is compared with the
    texts of the ``probes`` cells whose centres are nearest to it (the inverted file of Sivic and
    Zisserman 2003). D is never smaller than the exact one, and equal wherever the nearest text was
    found; ``benchmarks/selection.py`` measures how often. Memory grows as the number of texts.

    Args:
        vectors: ``(texts, dimensions)``.
        probes: cells searched for each text; more find more and take longer.
        seed: of the first centres.

    Returns:
        ``(texts,)``, as :func:`diversity`.
    """
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    centres = _cell_centres(unit, max(1, math.isqrt(len(unit))), seed)
    probes = min(probes, len(centres))
    searched = torch.cat([(part @ centres.T).topk(probes, dim=1).indices.int() for part in unit.split(4096)])
    members = _grouped(searched[:, 0], len(centres))  # every text lives in its nearest cell
    seekers = _grouped(searched.flatten(), len(centres))
    nearest = unit.new_full((len(unit),), -1.0)
    for residents, places in zip(members, seekers, strict=True):
        if not len(residents):
            continue
        for asking, asked in product((places // probes).split(8192), residents.split(8192)):
            similarity = unit[asking] @ unit[asked].T
            similarity.masked_fill_(asking.unsqueeze(1) == asked.unsqueeze(0), -1.0)  # k != j
            nearest[asking] = torch.maximum(nearest[asking], similarity.amax(dim=1))
    return 1 - nearest.clamp(-1.0, 1.0)


def _cell_centres(unit: Tensor, cells: int, seed: int) -> Tensor:
    """k-means on the sphere, over a sample of 64 texts a cell."""
    order = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed)).to(unit.device)
    sample, centres = unit[order[: 64 * cells]], unit[order[:cells]]
    for _ in range(4):
        nearest = torch.cat([(part @ centres.T).argmax(dim=1) for part in sample.split(4096)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        lengths = sums.norm(dim=1, keepdim=True)
        centres = torch.where(lengths > 0, sums / lengths.clamp_min(1e-12), centres)
    return centres


def _grouped(cells: Tensor, count: int) -> tuple[Tensor, ...]:
    """For each cell the places that hold it."""
    order = torch.argsort(cells, stable=True)
    groups: tuple[Tensor, ...] = order.split(torch.bincount(cells, minlength=count).tolist())
    return groups


def quality_diversity_scores(rewards: Tensor, diversities: Tensor) -> Tensor:
    """Score of each text, section 4.2: ``score_j = r(x_j, y_j) * D_j``.

    Args:
        rewards: ``(texts,)``, Eq. 4.
        diversities: ``(texts,)``, Eq. 10.

    Returns:
        ``(texts,)``. Among negative rewards the product ranks near-duplicates first; see
        ``nonpositive_rewards`` in :func:`select_top`.
    """
    return rewards * diversities


def agreed_rewards(rewards: Tensor, posteriors: Tensor) -> Tensor:
    """What takes the place of r in the score with ``selection.llm_posterior`` (ours): ``r * p(y|x)`` where r > 0.

    The client's SLM and the LLM err on different texts; a text that both find to be of its label is more often
    of it than one that either finds so. A reward that is not positive stays: times a probability it would rank
    higher the surer the LLM is that the SLM is right.

    Args:
        rewards: ``(texts,)``, Eq. 4.
        posteriors: ``(texts,)``, the LLM's probability of the intended label, Eq. 1.

    Returns:
        ``(texts,)``, in [-1, 1].
    """
    return torch.where(rewards > 0, rewards * posteriors, rewards)


def select_top(
    scores: Tensor,
    fraction: float,
    rewards: Tensor | None = None,
    nonpositive_rewards: NonpositiveRewards = "keep",
    labels: Tensor | None = None,
) -> Tensor:
    """Indices of the best ``fraction`` of the texts by score, best first (alpha % in section 4.2).

    Args:
        scores: ``(texts,)``.
        fraction: alpha, in (0, 1].
        rewards: ``(texts,)``, needed for ``"drop"``.
        nonpositive_rewards: ``"keep"`` is the paper's; ``"drop"`` (ours) never takes a text with
            r <= 0, that is, one which the SLM holds more likely to be of another class.
        labels: ``(texts,)``, to take as many texts of each label (ours): with c labels the best
            ``ceil(fraction * texts / c)`` of each, or fewer of each if a label has fewer. Without
            it the labels are not looked at, as in the paper.

    Returns:
        ``(ceil(fraction * texts),)`` indices; fewer where ``"drop"`` leaves fewer. With ``labels`` at most c - 1 more;
        and fewer where a label has fewer texts than its share, since as many of each are taken. Ties go to the earlier
        text.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    if nonpositive_rewards == "drop":
        order = order[_rewards_of(order, rewards) > 0]
    if labels is None:
        return order[: _ceil(fraction * len(scores))]
    present = labels.unique()
    by_label = [order[labels[order] == label] for label in present]
    share = min(_ceil(fraction * len(scores) / len(present)), *(len(queue) for queue in by_label))
    kept = torch.cat([queue[:share] for queue in by_label])
    return kept[torch.argsort(scores[kept], descending=True, stable=True)]


def _ceil(number: float) -> int:
    # 0.1 * 30 is 3.0000000000000004 in floating point and must not be rounded up to 4
    return math.ceil(round(number, 9))


def _rewards_of(places: Tensor, rewards: Tensor | None) -> Tensor:
    if rewards is None:
        raise ValueError("nonpositive_rewards='drop' needs the rewards")
    return rewards[places]
