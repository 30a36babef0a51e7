"""What stands under a table: how to read it, and which clients did not get what the others got."""

from typing import Any

from crosslm.config import Preset
from crosslm.reproduce.figures import Figures, has_declined, is_refused, outcomes
from crosslm.reproduce.plan import Choice, tasks_of, variations

LLMS = ("5", "6", "8", "ablation")
OTHER_STEP_5 = "Seeds count here whose runs had another step 5 too: the LLM of a one-shot run does not depend on it."
WHOLE_LLMS = ("5", "6", "8")
CLASSIFIERS = ("4", "skew", "clients", "rows", "ablation")
ENDS_UP = (
    "CrossLM is the SLM that a client ends up with: the one that it had where the server refused its upload, and where "
    "the client did not accept what came back."
)
SAME_STANDALONE = (
    "Under preset recommended a client holds a tenth of its rows out, to try what comes back (`acceptance`), and its "
    "own Standalone has learned from fewer. Gains of both presets are against a Standalone that has learned from "
    "all, as under preset paper."
)
WHICH_DATA_FREE_KD = (
    "Data-free KD is that of the same preset. Under recommended it too has the judgement of all SLMs and of the "
    "untrained LLM, and so what the silos know; under paper it learns the labels that its texts were written for, as "
    "in the paper. The last of our rows is against that one."
)
SEEDS = "A difference or ratio is of the seeds that both have, and so not that of the means above it. Seeds: {}."
SLM_JUDGES = "By the SLMs: those of clients whose upload was refused or had no say are left out."

TRAINED_ELSEWHERE = (
    "The gain of preset paper is against the Standalone of its own run. Where another machine trained that, it is not "
    "the Standalone shown, which has cells of its own: seeds {}."
)

NOISY_LEAST = (
    "`generalization_min_change` is the least of the changes of all benchmarks and tasks: each is noisy, so that their "
    "least is below 0 where nothing has changed. `generalization_mean_change` is their mean."
)
MAJORITY = "A start that is no better than the most frequent label has learned nothing from fine-tuning."


def notes(key: str, figures: Figures, choice: Choice) -> list[str]:
    """The notes of a table, by its key."""
    said = {"6": [SLM_JUDGES], "7": [MAJORITY, NOISY_LEAST]}.get(key, [])
    if key in CLASSIFIERS:
        of_table_4 = [WHICH_DATA_FREE_KD, SEEDS.format(", ".join(figures.seeds_of_classifiers(choice.tasks)))]
        said = [ENDS_UP, SAME_STANDALONE, *(of_table_4 if key == "4" else ())]
        elsewhere = {task: figures.trained_elsewhere(task) for task in tasks_of(key, choice)}
        if seeds := [f"{task} {' '.join(map(str, found))}" for task, found in elsewhere.items() if found]:
            said.append(TRAINED_ELSEWHERE.format(", ".join(seeds)))
        said += kept_their_own(key, figures, choice)
    if key in WHOLE_LLMS:
        said = [*said, *dict.fromkeys(line for run in _runs(key, choice) for line in _of_llms(*run, figures))]
    others = key in LLMS and any(figures.has_other_llms(*run) for run in _runs(key, choice))
    return [*said, OTHER_STEP_5] if others else said


def kept_their_own(key: str, figures: Figures, choice: Choice) -> list[str]:
    """A line for each run of a table in which clients kept the SLM that they had."""
    return list(dict.fromkeys(line for run in _runs(key, choice) for line in _of_runs(*run, figures)))


def _runs(key: str, choice: Choice) -> list[tuple[str, Preset, str]]:
    """Task, preset and variation of each row of a table."""
    return [
        (task, preset, variation.name)
        for task in tasks_of(key, choice)
        for preset in choice.presets
        for variation in variations(key, choice, task, preset)
    ]


def _of_runs(task: str, preset: Preset, variation: str, figures: Figures) -> list[str]:
    return [
        f"{task}/{preset}/{variation}/seed-{seed}: {'; '.join(said)}."
        for seed, run in sorted(figures.runs(task, preset, variation).items())
        if (said := _said(run))
    ]


def _of_llms(task: str, preset: Preset, variation: str, figures: Figures) -> list[str]:
    """Of how few of its clients an LLM has learned, where some were refused."""
    lines = []
    for seed, run in sorted(figures.llms(task, preset, variation).items()):
        clients = outcomes(run)
        refused = sum(is_refused(run, who) for who in clients)
        if refused:
            learned = (
                f"the LLM has learned of {len(clients) - refused} of {len(clients)} clients, the others were refused"
            )
            lines.append(f"{task}/{preset}/{variation}/seed-{seed}: {learned}.")
    return lines


def _said(run: dict[str, Any]) -> list[str]:
    clients = outcomes(run)
    refused = [who for who in clients if is_refused(run, who)]
    declined = [who for who in clients if has_declined(run, who)]
    missing = [who for who in run.get("clients") or {} if who not in clients]
    said = [f"the upload of {', '.join(refused)} was refused"] if refused else []
    if taught := sorted({arrival["client"] for arrival in run.get("arrivals", ()) if arrival.get("no_say")}):
        said += [f"{', '.join(taught)} had no say and was taught"]
    if taught and len(taught) == len(clients):
        said = ["nobody had a say, all were taught, and the LLM stayed as it was"]
    if len(refused) == len(clients):
        said = ["every upload was refused, so that the LLM stayed as it was and nothing was written at the end"]
    said += [f"{', '.join(declined)} did not accept what came back"] if declined else []
    return [*said, *([f"{', '.join(missing)} failed and is in no figure"] if missing else [])]
