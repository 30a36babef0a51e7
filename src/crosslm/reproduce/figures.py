"""From kept cells to means with intervals: which figures of a seed are drawn together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from crosslm.reproduce.bootstrap import Array, Group, Means, bootstrap
from crosslm.reproduce.plan import BASE, CEILING, ORIGINAL, RUN, Cell
from crosslm.seeding import seed_for

STANDALONE, DATA_FREE_KD, CROSSLM = range(3)
METHODS = ("standalone", "data_free_kd", "crosslm")
BEFORE, AFTER = range(2)
Seeds = dict[int, dict[str, Any]]


class Figures:
    """Figures by task, method and variation. Each is None where no seed has it."""

    def __init__(self, kept: Mapping[Cell, Mapping[str, Any]]) -> None:
        self._kept: dict[tuple[str, str, str, str], Seeds] = {}
        for cell, content in kept.items():
            key = (cell.task, cell.method, cell.variation.name, cell.stage)
            self._kept.setdefault(key, {})[cell.seed] = content["figures"]
        self._means: dict[tuple[str, ...], Means | None] = {}

    def runs(self, task: str, preset: str, variation: str = BASE) -> Seeds:
        """Figures of the runs by seed."""
        return self._kept.get((task, preset, variation, RUN), {})

    def slm(self, task: str, preset: str, variation: str = BASE) -> Means | None:
        """Columns Standalone, Data-free KD, CrossLM: mean accuracy of the clients' SLMs."""

        def groups(run: dict[str, Any]) -> list[Group] | None:
            return [clients_means(run["correct"], [f"slm/{method}/" for method in METHODS], METHODS[-1])]

        return self._of("slm", task, preset, variation, groups)

    def ceiling(self, task: str, preset: str, variation: str = BASE) -> Means | None:
        """Columns CrossLM and the ceiling, of the seeds that have both."""
        ceilings = self._kept.get((task, CEILING, variation, CEILING), {})
        pairs = {
            seed: {"correct": run["correct"], "ceiling": ceilings[seed]["correct"]}
            for seed, run in self.runs(task, preset, variation).items()
            if seed in ceilings
        }

        def groups(pair: dict[str, Any]) -> list[Group] | None:
            ours = clients_means(pair["correct"], ["slm/crosslm/"], "crosslm")[0]
            return [np.stack([ours, np.mean([rows(text) for text in pair["ceiling"].values()], axis=0)])]

        return self._bootstrap(("ceiling", task, preset, variation), pairs, groups)

    def nlu(self, task: str, preset: str, variation: str = BASE) -> Means | None:
        """Columns before and after: accuracy of the LLM by Eq. 1, on the same rows."""

        def groups(run: dict[str, Any]) -> list[Group] | None:
            return [np.stack([rows(run["correct"][f"nlu/{moment}"]) for moment in ("before", "after")])]

        return self._of("nlu", task, preset, variation, groups)

    def nlg(self, task: str, preset: str, judge: bool, variation: str = BASE) -> Means | None:
        """Columns before and after: agreement with the labels of what the LLM writes, by the SLMs or the judge.

        The texts before and after are different ones, so they are drawn independently.
        """

        def groups(run: dict[str, Any]) -> list[Group] | None:
            correct = run["correct"]
            if judge:
                texts = [correct.get(f"nlg/{moment}/judge") for moment in ("before", "after")]
                return None if None in texts else [rows(text)[None] for text in texts]
            return [clients_means(correct, [f"nlg/{moment}/slm/"], None) for moment in ("before", "after")]

        return self._of(f"nlg {judge}", task, preset, variation, groups)

    def perplexity(self, task: str, preset: str, variation: str = BASE) -> Means | None:
        """Columns before and after; one text, so that only seeds are drawn."""
        return self._single("perplexity", task, preset, variation)

    def distinct_2(self, task: str, preset: str, variation: str = BASE) -> Means | None:
        """Columns before and after: different word pairs among all that the LLM writes."""
        return self._single("distinct_2", task, preset, variation)

    def benchmark(self, name: str, task: str = ORIGINAL, preset: str = ORIGINAL) -> Means | None:
        """Columns original and enhanced on the same test rows; the original alone without a task."""
        original = self._kept.get((ORIGINAL, ORIGINAL, BASE, name), {})
        enhanced = self._kept.get((task, preset, BASE, name), {})
        pairs = {
            seed: {"both": [original[seed]["correct"], figures["correct"]]}
            for seed, figures in enhanced.items()
            if seed in original
        }
        return self._bootstrap(
            ("benchmark", name, task, preset), pairs, lambda pair: [np.stack([rows(text) for text in pair["both"]])]
        )

    def matthews(self, name: str, task: str = ORIGINAL, preset: str = ORIGINAL) -> Means | None:
        """Matthews correlation on a benchmark; only seeds are drawn."""
        seeds = self._kept.get((task, preset, BASE, name), {})
        return self._bootstrap(
            ("matthews", name, task, preset), seeds, lambda figures: [np.array([[figures["matthews"]]])]
        )

    # -- inside ------------------------------------------------------------------------------

    def _single(self, name: str, task: str, preset: str, variation: str) -> Means | None:
        def groups(run: dict[str, Any]) -> list[Group] | None:
            values = [run["llm"][name][moment] for moment in ("before", "after")]
            return None if None in values else [np.array([[value] for value in values], dtype=float)]

        return self._of(name, task, preset, variation, groups)

    def _of(
        self, what: str, task: str, preset: str, variation: str, groups: Callable[[Any], list[Group] | None]
    ) -> Means | None:
        return self._bootstrap((what, task, preset, variation), self.runs(task, preset, variation), groups)

    def _bootstrap(
        self, key: tuple[str, ...], seeds: Seeds, groups: Callable[[Any], list[Group] | None]
    ) -> Means | None:
        if key not in self._means:
            found = [found for _, figures in sorted(seeds.items()) if (found := groups(figures)) is not None]
            self._means[key] = bootstrap(found, seed_for(0, *key)) if found else None
        return self._means[key]


def rows(digits: str) -> Array:
    """A digit a row as numbers."""
    return np.array([digit == "1" for digit in digits], dtype=float)


def clients_means(correct: Mapping[str, str], prefixes: Sequence[str], required: str | None) -> Group:
    """For each prefix the mean over clients of each row's correctness, ``(prefixes, rows)``.

    With ``required`` only of the clients that have a figure under the method of that name: one that failed has none.
    """
    first = prefixes[0] if required is None else f"slm/{required}/"
    clients: Iterable[str] = [name.removeprefix(first) for name in correct if name.startswith(first)]
    return np.stack([np.mean([rows(correct[prefix + name]) for name in clients], axis=0) for prefix in prefixes])
