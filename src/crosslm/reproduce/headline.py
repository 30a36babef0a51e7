"""The figures of ``headline.json``: means over the tasks for each preset, with intervals and seeds."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crosslm.config import Preset
from crosslm.reproduce.benchmarks import BENCHMARKS
from crosslm.reproduce.bootstrap import Array, Means, average, estimate, worst
from crosslm.reproduce.figures import AFTER, BASELINE, BEFORE, CROSSLM, DATA_FREE_KD, ENHANCED, Figures
from crosslm.reproduce.plan import PRESET_NAMES, Choice, variations
from crosslm.reproduce.tables import Part, Statistic, change, growth, ratio

UNITS = {
    "slm_gain_vs_standalone": "points, mean of the tasks; Standalone on all private rows, as under preset paper",
    "slm_gain_vs_data_free_kd": "points, mean of the tasks; under preset recommended it has the same judges, "
    "and counts with what it made for each client, while CrossLM counts with what the client took",
    "slm_gain_vs_data_free_kd_of_paper": "points, mean of the tasks; Data-free KD of preset paper: without judges, on "
    "a quarter of the pool, not once more in the end",
    "nlu_gain": "points, mean of the tasks",
    "nlg_judge_gain": "points, mean of the tasks",
    "generalization_min_change": "points, the worst benchmark and task: the least of as many noisy differences, which "
    "is far below 0 even where nothing has changed, and so is its bootstrap: it has no interval",
    "generalization_mean_change": "points, mean of the benchmarks and tasks",
    "ptb_growth_percent": "percent, the worst task",
    "skew_share_of_ceiling": "share from 0 to 1, mean of the skew table's tasks at its smallest alpha; a ceiling is "
    "low there, where all rows together lack a label or are nearly all of one: see that table",
}
BESIDE = {
    "slm_gain_vs_standalone": {"paper": "+6.0", "goal": "+12"},
    "slm_gain_vs_data_free_kd": {"paper": "+1.6", "goal": "+4"},
    "nlu_gain": {"paper": "+18.3", "goal": "+25"},
    "nlg_judge_gain": {"paper": "+21.8, by the SLMs", "goal": "+25"},
    "generalization_min_change": {"goal": "at least -0.3"},
    "generalization_mean_change": {"paper": "+0.4"},
    "ptb_growth_percent": {"paper": "+1.0, the worst; +0.6 in the mean", "goal": "at most +0.5"},
    "skew_share_of_ceiling": {"goal": "0.95"},
}
"""What the paper's tables come to with GPT2-Large, means of its datasets, and what we aim at."""


OF_SEEDS = ("ptb_growth_percent",)
"""Of these no rows are drawn, seeds alone."""
NO_INTERVAL = ("generalization_min_change",)
"""The least of noisy figures is biased, and so are its replicates."""


def headline(figures: Figures, choice: Choice) -> dict[str, Any]:
    """For each preset every figure whose cells are all there; the others are named under ``missing``.

    ``seeds`` has the same keys, ``intervals`` those of which anything is known of how much they vary.
    """
    result: dict[str, Any] = {
        "units": UNITS,
        "beside": BESIDE,
        "tasks": list(choice.scale.tasks),
        "split": choice.split,
    }
    for preset in PRESET_NAMES:
        there = {name: estimate(part) for name, part in _parts(figures, choice, preset).items() if part is not None}
        estimates = {name: found for name, found in there.items() if math.isfinite(found.value)}
        result[preset] = {
            **{name: found.value for name, found in estimates.items()},
            "intervals": {
                name: [found.low, found.high]
                for name, found in estimates.items()
                if name not in NO_INTERVAL and (name not in OF_SEEDS or found.seeds > 1)
            },
            "seeds": {name: found.seeds for name, found in estimates.items()},
            "missing": [name for name in UNITS if name not in estimates],
        }
    return result


def _parts(figures: Figures, choice: Choice, preset: Preset) -> dict[str, Part]:
    tasks = choice.scale.tasks
    slm = [figures.slm(task, preset) for task in tasks]
    over_paper = [figures.gain_over_data_free_kd_of_paper(task, preset) for task in tasks]
    smallest = choice.scale.skew.alpha.index(min(choice.scale.skew.alpha))
    skewed = {task: variations("skew", choice, task, preset)[smallest].name for task in choice.scale.skew.tasks}
    changes = [figures.benchmark(name, task, preset) for name in BENCHMARKS for task in tasks]
    return {
        "slm_gain_vs_standalone": _mean([figures.gain(task, preset) for task in tasks], change(ENHANCED, BASELINE)),
        "slm_gain_vs_data_free_kd": _mean(slm, change(CROSSLM, DATA_FREE_KD)),
        "slm_gain_vs_data_free_kd_of_paper": _mean(over_paper, change(ENHANCED, BASELINE)),
        "nlu_gain": _mean([figures.nlu(task, preset) for task in tasks], change(AFTER, BEFORE)),
        "nlg_judge_gain": _mean([figures.nlg(task, preset, judge=True) for task in tasks], change(AFTER, BEFORE)),
        "generalization_min_change": _worst(changes, change(AFTER, BEFORE), np.min),
        "generalization_mean_change": _mean(changes, change(AFTER, BEFORE)),
        "ptb_growth_percent": _worst([figures.perplexity(task, preset) for task in tasks], growth, np.max),
        "skew_share_of_ceiling": _mean([figures.ceiling(task, preset, name) for task, name in skewed.items()], ratio),
    }


def _complete(parts: Sequence[Part], statistic: Statistic) -> list[Means] | None:
    there = [part.statistic(statistic) for part in parts if part is not None]
    return there if there and len(there) == len(parts) else None


def _mean(parts: Sequence[Part], statistic: Statistic) -> Part:
    there = _complete(parts, statistic)
    return None if there is None else average(there)


def _worst(parts: Sequence[Part], statistic: Statistic, of: Callable[..., Array]) -> Part:
    there = _complete(parts, statistic)
    return None if there is None else worst(there, of)
