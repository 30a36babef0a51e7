"""Which rows a classifier learns from, and in which batches."""

import torch

from crosslm.config import FitConfig

WINDOW = 8  # batches whose rows are sorted by length together


def hold_out(rows: int, config: FitConfig, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """The places of the rows that are trained on, and of those that tell when to stop: none without patience."""
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    held = round(config.holdout_fraction * rows) if config.patience else 0
    return order[held:], order[:held]


def batches(rows: list[list[int]], size: int, generator: torch.Generator) -> list[list[int]]:
    """Every row once, in random batches; rows of like length meet, so that little is padding."""
    order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
    drawn: list[list[int]] = []
    for start in range(0, len(order), WINDOW * size):
        window = sorted(order[start : start + WINDOW * size], key=lambda row: len(rows[row]))
        drawn += [window[first : first + size] for first in range(0, len(window), size)]
    return [drawn[place] for place in torch.randperm(len(drawn), generator=generator).tolist()]
