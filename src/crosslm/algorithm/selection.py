"""Step 5: which synthetic texts train the SLM (CrossLM, section 4.2, Eq. 10)."""

import math
from typing import Literal

import torch
from torch import Tensor

NonpositiveRewards = Literal["keep", "drop"]


def diversity(vectors: Tensor, block: int = 1024) -> Tensor:
    """Diversity of each text, Eq. 10: ``D_j = 1 - max_{k != j} cos(v_j, v_k)``.

    Exact. The similarities are computed in blocks, so memory grows with ``block * texts`` and
    not with the square of the number of texts.

    Args:
        vectors: ``(texts, dimensions)``, sentence vectors of any length but zero.
        block: rows compared at a time.

    Returns:
        ``(texts,)``, in [0, 2]; 0 for an exact duplicate. A text without any other has 1 + 1 = 2.
    """
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    nearest = torch.full((len(unit),), -1.0, dtype=unit.dtype, device=unit.device)
    for start in range(0, len(unit), block):
        similarity = unit[start : start + block] @ unit.T
        rows = torch.arange(len(similarity), device=unit.device)
        similarity[rows, rows + start] = -1.0  # k != j
        nearest[start : start + block] = similarity.amax(dim=1)
    return 1 - nearest.clamp(-1.0, 1.0)


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
        ``(ceil(fraction * texts),)`` indices, fewer with ``"drop"``, by at most c - 1 more or fewer
        with ``labels``. Ties go to the earlier text.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    if labels is None:
        kept = order[: _ceil(fraction * len(scores))]
        return kept if nonpositive_rewards == "keep" else kept[_rewards_of(kept, rewards) > 0]
    if nonpositive_rewards == "drop":
        order = order[_rewards_of(order, rewards) > 0]
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
