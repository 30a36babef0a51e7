"""Measure the LLM that a cell of `crosslm reproduce` ends with again, interpolated as the preset now says.

    python benchmarks/measure_llm_again.py OUTPUT/test RESULT    # OUTPUT of `crosslm reproduce`, whose runs are there

`llm.interpolation` is the last thing that happens to the LLM of a run: no classifier and no text before it depends on
it. So a run that was made with share 1 need not be made again. For each cell in OUTPUT/test/cells of preset
recommended, whose run (its adapter, as trained) is in OUTPUT/test/runs:

- the judge and the clients' SLMs are trained once more as the run trained them, and the clients' must find on the test
  rows what the cell says that they found, or the share of rows is told;
- the adapter is interpolated; the LLM classifies, writes, and reads the treebank, as at the end of a run;
- RESULT/cells gets the cell with these figures and `measured_again` (commit, machine, date, share), RESULT/runs the
  adapter, which Table 7 begins with. Copy both over those of OUTPUT/test before anything else is done there.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from crosslm import evaluate
from crosslm.client import Client
from crosslm.config import PRESETS, Config, merged
from crosslm.config_file import load
from crosslm.models.llm import LLM
from crosslm.models.sources import cache_folder, model_folder, resolve_device
from crosslm.reproduce.work import digits, read_correct
from crosslm.runs.loaded import load_client
from crosslm.runs.measures import LLMMeter
from crosslm.runs.preparation import Prepared, prepare
from crosslm.runs.rundir import RunDir
from crosslm.support.progress import Progress
from crosslm.support.provenance import commit, machine
from crosslm.support.quiet import quiet_libraries
from crosslm.task import Task

SHARE = PRESETS["recommended"]["llm"]["interpolation"]


def main() -> None:
    """Measure all that are there and have not been measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    origin = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}  # read now: the code that is loaded
    for path in sorted((arguments.output / "cells").glob("*/recommended/*/seed-*/run.json")):
        name = path.parent.relative_to(arguments.output / "cells")
        run, target = arguments.output / "runs" / name, arguments.result / "cells" / name / "run.json"
        if not (run / "llm").is_dir() or target.exists():
            continue
        cell = json.loads(path.read_text())
        if cell["settings"]["config"]["llm"].get("interpolation", 1.0) != 1:
            continue  # its adapter is not as trained
        print(name, flush=True)
        kept = _measured(cell, run, arguments.result / "runs" / name, origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(kept, ensure_ascii=False) + "\n")
        print({which: found["after"] for which, found in kept["figures"]["llm"].items()}, flush=True)


def _measured(cell: dict[str, Any], folder: Path, result: Path, origin: dict[str, str]) -> dict[str, Any]:
    """The cell with the figures of the interpolated LLM, which is saved in ``result``."""
    if read_correct(folder / "predictions") != cell["figures"]["correct"]:
        sys.exit(f"{folder}: is not the run of the cell: its predictions are others")
    config = load(folder / "config.toml")
    config = config.model_copy(update={"device": resolve_device(config.device)})
    shutil.rmtree(result, ignore_errors=True)
    run = RunDir.create(result, load(folder / "config.toml", over={"llm": {"interpolation": SHARE}}))
    prepared = prepare(config, cache_folder(), print)
    progress, task = Progress(), Task.from_config(config.task)
    judge_folder = model_folder(config.slm.models[0].model, cache_folder(), print)
    judge = evaluate.train_judge(evaluate.load_judge(judge_folder, config), config, prepared.split.judge, progress)
    clients, same = _clients(config, prepared, progress, cell["figures"]["correct"])
    llm = LLM.load_trained(prepared.llm_folder, str(folder / "llm"), config.llm, config.device)
    rows = evaluate.nlu_rows(config, prepared.split.test)
    meter = LLMMeter(run, config, task, progress, rows, prepared.perplexity_text)
    with llm.interpolated(SHARE):
        run.save_llm(llm)
        reading = meter.reading(llm, "after")
        final = meter.texts(llm, "enhanced LLM", config.evaluation.nlg_samples, "final")
    judged = {name.rsplit("/", 1)[1] for name in cell["figures"]["correct"] if name.startswith("nlg/after/slm/")}
    slms = [(client.id, client.slm) for client in clients if client.id in judged]
    found = reading | meter.writing({"after": final}, slms, judge)["after"]
    figures = json.loads(json.dumps(cell["figures"]))
    figures["correct"] |= read_correct(result / "predictions")
    for name, value in found.items():
        figures["llm"][name]["after"] = value
    again = origin | {"machine": machine(config.device), "interpolation": SHARE, "same_predictions_of_slms": same}
    settings = merged(cell["settings"], {"config": {"llm": {"interpolation": SHARE}}})
    return cell | {"settings": settings, "figures": figures, "measured_again": again}


def _clients(
    config: Config, prepared: Prepared, progress: Progress, correct: dict[str, str]
) -> tuple[list[Client], float]:
    """The clients after step 1, and on which share of their test rows they are right or wrong as the cell says."""
    clients, same, count = [], 0, 0
    for name, spec in prepared.specs.items():
        folder = model_folder(spec.model, cache_folder(), print)
        client = load_client(name, spec, folder, prepared.split.private[name], config, None, progress)
        client.train()
        test = prepared.split.tests[name]
        found = digits(test.labels, client.slm.predict_proba(test.texts).argmax(dim=1).tolist())
        same += sum(now == then for now, then in zip(found, correct[f"slm/standalone/{name}"], strict=True))
        count += len(found)
        clients.append(client)
    return clients, same / count


if __name__ == "__main__":
    main()
