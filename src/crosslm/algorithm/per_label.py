"""How well each label is found, from the counts of what was predicted for rows of each."""

from collections.abc import Sequence

Counts = Sequence[Sequence[int]]
"""``[label][predicted label]``: rows of a label for which a label was predicted."""


def recalls(counts: Counts) -> list[float | None]:
    """The share of each label's rows that are predicted to have it; None for a label without rows."""
    return [row[label] / sum(row) if sum(row) else None for label, row in enumerate(counts)]


def macro_f1(counts: Counts) -> float | None:
    """The mean over labels of ``F1 = 2 * right / (rows + predictions)``, each label counting alike.

    Over the labels that have rows or are predicted; None where there is neither.
    """
    predicted = [sum(column) for column in zip(*counts, strict=True)]
    f1 = [
        2 * row[label] / (sum(row) + predicted[label])
        for label, row in enumerate(counts)
        if sum(row) + predicted[label]
    ]
    return sum(f1) / len(f1) if f1 else None
