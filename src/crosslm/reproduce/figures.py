"""From kept cells to means with intervals: which figures of a seed are drawn together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from crosslm.reproduce import plan
from crosslm.reproduce.bootstrap import Array, Group, Means, bootstrap
from crosslm.reproduce.plan import BASE, CEILING, ORIGINAL, RUN, RUNS_LLM, Cell
from crosslm.support.seeding import seed_for

OWN_STANDALONE, DATA_FREE_KD, CROSSLM, RETURNED = range(4)
BEFORE, AFTER = range(2)
BASELINE, ENHANCED = range(2)
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

    def llms(self, task: str, preset: str, variation: str = BASE) -> Seeds:
        """Figures of the runs by seed, also of those whose step 5 was another.

        What these have of the SLMs that came back does not hold.
        """
        return self._kept.get((task, preset, variation, RUNS_LLM), {}) | self.runs(task, preset, variation)

    def has_other_llms(self, task: str, preset: str, variation: str = BASE) -> bool:
        """Whether :meth:`llms` has more than :meth:`runs`."""
        return len(self.llms(task, preset, variation)) > len(self.runs(task, preset, variation))

    def slm(self, task: str, preset: str, variation: str = BASE) -> Means | None:
        """Columns Standalone of the run itself, Data-free KD, CrossLM, and what came back: means of all clients.

        CrossLM is what a client ends up with (:func:`outcomes`).
        """
        return self._of("slm", task, preset, variation, lambda run: clients_group(list(outcomes(run).values())))

    def gain(self, task: str, preset: str, variation: str = BASE, baseline: str | None = None) -> Means | None:
        """Columns Standalone and CrossLM of the same clients, Standalone being that on all rows.

        Under ``recommended`` a client holds rows out to try what comes back, so that its own Standalone has learned
        from fewer; both presets are compared with the one that has learned from all.

        Args:
            task: a task.
            preset: of CrossLM.
            variation: of CrossLM.
            baseline: the variation of Standalone, if it is another one.
        """
        baseline = variation if baseline is None else baseline
        of_all_rows = self._standalone_of_paper if preset == "paper" else self._standalone
        alone, ours = of_all_rows(task, baseline), self.runs(task, preset, variation)
        pairs = {seed: {"standalone": alone[seed], "crosslm": run} for seed, run in ours.items() if seed in alone}

        def groups(pair: dict[str, Any]) -> list[Group] | None:
            before, after = pair["standalone"], outcomes(pair["crosslm"])
            both = [who for who in after if who in before]
            return clients_group([(before[who], after[who][CROSSLM]) for who in both])

        return self._bootstrap(("gain", task, preset, variation, baseline), pairs, groups)

    def gain_over_data_free_kd_of_paper(self, task: str, preset: str) -> Means | None:
        """Columns Data-free KD of preset ``paper`` and CrossLM of a preset: the same seeds' clients.

        Preset ``paper`` teaches by the labels that the untrained LLM's texts were written for, as the paper does. The
        run's own Data-free KD under ``recommended`` has the judges of that run beside them.
        """
        rivals = self.runs(task, "paper")
        pairs = {
            seed: {"paper": outcomes(rivals[seed]), "run": outcomes(run)}
            for seed, run in self.runs(task, preset).items()
            if seed in rivals
        }

        def groups(pair: dict[str, Any]) -> list[Group] | None:
            rival, ours = pair["paper"], pair["run"]
            return clients_group([(rival[who][DATA_FREE_KD], ours[who][CROSSLM]) for who in ours if who in rival])

        return self._bootstrap(("gain over data-free kd of paper", task, preset), pairs, groups)

    def standalone(self, task: str) -> Means | None:
        """One column: the SLMs on all private rows, before anything came back."""

        def groups(alone: dict[str, Any]) -> list[Group] | None:
            return clients_group([[digits] for digits in alone.values()])

        return self._bootstrap(("standalone", task), self._standalone(task, BASE), groups)

    def ceiling(self, task: str, preset: str, variation: str = BASE) -> Means | None:
        """Columns CrossLM and the ceiling of the same clients, of the seeds that have both."""
        ceilings = self._kept.get((task, CEILING, variation, CEILING), {})
        pairs = {
            seed: {"run": run, "ceiling": ceilings[seed]["correct"]}
            for seed, run in self.runs(task, preset, variation).items()
            if seed in ceilings
        }

        def groups(pair: dict[str, Any]) -> list[Group] | None:
            ours = outcomes(pair["run"])
            return clients_group([(ours[who][CROSSLM], pair["ceiling"][who]) for who in ours])

        return self._bootstrap(("ceiling", task, preset, variation), pairs, groups)

    def seeds_of_classifiers(self, tasks: Sequence[str]) -> list[str]:
        """For each task which seeds there are of Standalone on all rows, of the presets and of the ceiling."""
        found = []
        for task in tasks:
            kinds: dict[str, Seeds] = {
                "Standalone": self._standalone(task, BASE),
                **{preset: self.runs(task, preset) for preset in plan.PRESET_NAMES},
                "ceiling": self._kept.get((task, CEILING, BASE, CEILING), {}),
            }
            said = [f"{name} {' '.join(map(str, sorted(seeds)))}" for name, seeds in kinds.items() if seeds]
            found += [f"{task} ({'; '.join(said)})"] if said else []
        return found

    def trained_elsewhere(self, task: str) -> list[int]:
        """Seeds of which the run of preset ``paper`` has other SLMs on all rows than the rest: of another machine."""
        shown, own = self._standalone(task, BASE), self._standalone_of_paper(task, BASE)
        return sorted(
            seed
            for seed, clients in own.items()
            if any(shown[seed].get(who, digits) != digits for who, digits in clients.items())
        )

    def clients(self, task: str, preset: str) -> list[dict[str, Any]]:
        """Each client of each seed: ``seed``, and shares right of ``standalone``, ``ceiling`` and each ``outcome``."""
        ceilings = self._kept.get((task, CEILING, BASE, CEILING), {})
        alone = (self._standalone_of_paper if preset == "paper" else self._standalone)(task, BASE)  # as in gain
        return [
            {
                "seed": seed,
                "standalone": float(rows(alone[seed][who]).mean()),
                "ceiling": float(rows(ceilings[seed]["correct"][who]).mean()),
                "outcome": [float(rows(digits).mean()) for digits in found],
            }
            for seed, run in sorted(self.runs(task, preset).items())
            if seed in ceilings and seed in alone
            for who, found in outcomes(run).items()
            if who in alone[seed]
        ]

    def ceiling_alone(self, task: str) -> Means | None:
        """One column: the ceiling, of all seeds that have one."""

        def groups(ceiling: dict[str, Any]) -> list[Group] | None:
            return clients_group([[digits] for digits in ceiling["correct"].values()])

        return self._bootstrap(("ceiling alone", task), self._kept.get((task, CEILING, BASE, CEILING), {}), groups)

    def nlu(self, task: str, preset: str, variation: str = BASE) -> Means | None:
        """Columns before and after: accuracy of the LLM by Eq. 1, on the same rows."""

        def groups(run: dict[str, Any]) -> list[Group] | None:
            moments = [run["correct"].get(f"nlu/{moment}") for moment in ("before", "after")]
            return None if None in moments else [np.stack([rows(text) for text in moments])]

        return self._of_llm("nlu", task, preset, variation, groups)

    def nlg(self, task: str, preset: str, judge: bool, variation: str = BASE) -> Means | None:
        """Columns before and after: agreement with the labels of what the LLM writes, by the SLMs or the judge.

        The texts before and after are different ones, so they are drawn independently. Of the SLMs, those of clients
        whose upload was refused or had no say are left out: they are no measure of anything.
        """

        def groups(run: dict[str, Any]) -> list[Group] | None:
            correct = run["correct"]
            if judge:
                texts = [correct.get(f"nlg/{moment}/judge") for moment in ("before", "after")]
                return None if None in texts else [rows(text)[None] for text in texts]
            before, after = (
                clients_group([[text] for name, text in correct.items() if name.startswith(f"nlg/{moment}/slm/")])
                for moment in ("before", "after")
            )
            return None if before is None or after is None else [*before, *after]

        return self._of_llm(f"nlg {judge}", task, preset, variation, groups)

    def judge(self, task: str, preset: str) -> Means | None:
        """One column: how often the judge itself is right, on the task's test text; only seeds are drawn."""

        def groups(run: dict[str, Any]) -> list[Group] | None:
            found = run.get("judge_accuracy")
            return None if found is None else [np.array([[found]], dtype=float)]

        return self._of_llm("judge", task, preset, BASE, groups)

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
        # the same rows after every task: drawn alike, for what is made of several tasks' changes
        return self._bootstrap(
            ("benchmark", name, task, preset),
            pairs,
            lambda pair: [np.stack([rows(text) for text in pair["both"]])],
            drawn_as=("benchmark", name),
        )

    def matthews(self, name: str, task: str = ORIGINAL, preset: str = ORIGINAL) -> Means | None:
        """Matthews correlation on a benchmark; only seeds are drawn."""
        seeds = self._kept.get((task, preset, BASE, name), {})
        return self._bootstrap(
            ("matthews", name, task, preset), seeds, lambda figures: [np.array([[figures["matthews"]]])]
        )

    def majority(self, name: str) -> Means | None:
        """The share of a benchmark's test rows that have the most frequent label; they are the same for every seed."""
        seeds = self._kept.get((ORIGINAL, ORIGINAL, BASE, name), {})
        return self._bootstrap(("majority", name), seeds, lambda figures: [np.array([[figures["majority"]]])])

    # -- inside ------------------------------------------------------------------------------

    def _standalone(self, task: str, variation: str) -> Seeds:
        """By seed the clients' digits with all their rows: of a cell of its own, or of the run of preset ``paper``."""
        alone = self._standalone_of_paper(task, variation)
        for seed, figures in self._kept.get((task, plan.STANDALONE, variation, plan.STANDALONE), {}).items():
            alone[seed] = alone.get(seed, {}) | figures["correct"]
        return alone

    def _standalone_of_paper(self, task: str, variation: str) -> Seeds:
        """By seed what the SLMs of preset ``paper`` had right when they came."""
        return {
            seed: {who: digits[OWN_STANDALONE] for who, digits in outcomes(run).items()}
            for seed, run in self.llms(task, "paper", variation).items()
        }

    def _single(self, name: str, task: str, preset: str, variation: str) -> Means | None:
        def groups(run: dict[str, Any]) -> list[Group] | None:
            values = [run["llm"][name][moment] for moment in ("before", "after")]
            return None if None in values else [np.array([[value] for value in values], dtype=float)]

        return self._of_llm(name, task, preset, variation, groups)

    def _of(
        self, what: str, task: str, preset: str, variation: str, groups: Callable[[Any], list[Group] | None]
    ) -> Means | None:
        return self._bootstrap((what, task, preset, variation), self.runs(task, preset, variation), groups)

    def _of_llm(
        self, what: str, task: str, preset: str, variation: str, groups: Callable[[Any], list[Group] | None]
    ) -> Means | None:
        return self._bootstrap((what, task, preset, variation), self.llms(task, preset, variation), groups)

    def _bootstrap(
        self,
        key: tuple[str, ...],
        seeds: Seeds,
        groups: Callable[[Any], list[Group] | None],
        drawn_as: tuple[str, ...] | None = None,
    ) -> Means | None:
        if key not in self._means:
            found = [found for _, figures in sorted(seeds.items()) if (found := groups(figures)) is not None]
            self._means[key] = bootstrap(found, seed_for(0, *(drawn_as or key))) if found else None
        return self._means[key]


def rows(digits: str) -> Array:
    """A digit a row as numbers."""
    return np.array([digit == "1" for digit in digits], dtype=float)


def outcomes(run: Mapping[str, Any]) -> dict[str, tuple[str, str, str, str]]:
    """For each client a digit for each test row under its Standalone, Data-free KD, CrossLM, and what came back.

    CrossLM is what the client ends up with. Where its upload was refused that is its Standalone SLM, and nothing came
    back; where it did not accept what came back (``acceptance``), too. A client has one participation.
    """
    correct, found = run["correct"], {}
    for name, own in correct.items():
        if name.startswith("slm/standalone/"):
            who = name.removeprefix("slm/standalone/")
            returned = correct.get(f"slm/crosslm/{who}", own)
            taken = own if has_declined(run, who) else returned
            found[who] = (own, correct.get(f"slm/data_free_kd/{who}", own), taken, returned)
    return found


def is_refused(run: Mapping[str, Any], client: str) -> bool:
    """Whether nothing came back to a client."""
    return f"slm/crosslm/{client}" not in run["correct"]


def has_declined(run: Mapping[str, Any], client: str) -> bool:
    """Whether a client kept the SLM that it had: what came back was worse on its held-out rows, or failed there."""
    about = (run.get("clients") or {}).get(client) or {}
    decision = about.get("decision")
    return decision is not None and not decision["accepted"]


def clients_group(clients: Sequence[Sequence[str]]) -> list[Group] | None:
    """Each client has a text of digits for each column: the mean over clients, ``(columns, rows)``; None of none."""
    if not clients:
        return None
    return [np.mean([[rows(text) for text in columns] for columns in clients], axis=0)]
