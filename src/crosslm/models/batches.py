"""Which rows a classifier learns from, and in which batches."""

import torch

WINDOW = 8  # batches whose rows are sorted by length together


def hold_out(rows: int, share: float, generator: torch.Generator, canaries: int = 0) -> tuple[list[int], list[int]]:
    """The places of the rows that are trained on, and of those that are held out.

    Args:
        rows: how many there are.
        share: of them that is held out; one at least is trained on.
        generator: draws both.
        canaries: the last so many rows are planted to be learned, and never held out.
    """
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    held = [place for place in order if place < rows - canaries][: min(round(share * rows), rows - 1)]
    out = set(held)
    return [place for place in order if place not in out], held


def batches(rows: list[list[int]], size: int, generator: torch.Generator) -> list[list[int]]:
    """Every row once, in random batches; rows of like length meet, so that little is padding."""
    order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
    drawn: list[list[int]] = []
    for start in range(0, len(order), WINDOW * size):
        window = sorted(order[start : start + WINDOW * size], key=lambda row: len(rows[row]))
        drawn += [window[first : first + size] for first in range(0, len(window), size)]
    return [drawn[place] for place in torch.randperm(len(drawn), generator=generator).tolist()]
