"""`crosslm reproduce` on tiny models: whole, stopped and gone on with."""

import gzip
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from conftest import PATIENCE
from moments import BOTH, THREE, Dying, Failing, Recording, Sleeping

from crosslm.client import Client
from crosslm.config import PRESETS
from crosslm.data.split import load_split
from crosslm.errors import ConfigError, DataError, ModelError, RunError
from crosslm.experiment import run_local
from crosslm.reproduce import benchmarks, driver, jobs, report, work
from crosslm.reproduce.driver import reproduce
from crosslm.reproduce.jobs import Work, side_by_side
from crosslm.reproduce.plan import TABLES, choose, plan
from crosslm.reproduce.scale import Scale, load_scale
from crosslm.reproduce.store import Store, differences
from crosslm.reproduce.tables import ALL_ROWS
from crosslm.reproduce.work import settings_of
from crosslm.runs.rundir import METHODS
from crosslm.support.progress import Silent

ROOT = Path(__file__).parents[1]
LABELS = {
    "sst2": ("negative", "positive"),
    "imdb": ("negative", "positive"),
    "cola": ("unacceptable", "acceptable"),
    "boolq": ("no", "yes"),
    "mrpc": ("not_equivalent", "equivalent"),
    "rte": ("not_entailment", "entailment"),
}
FIT = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "patience": 0}
HEADLINE = {
    "slm_gain_vs_standalone",
    "slm_gain_vs_data_free_kd",
    "slm_gain_vs_data_free_kd_of_paper",
    "nlu_gain",
    "nlg_judge_gain",
    "generalization_min_change",
    "generalization_mean_change",
    "ptb_growth_percent",
    "skew_share_of_ceiling",
}


@pytest.fixture
def data(data_folder, tmp_path):
    """DATA with a folder for each dataset, all of the same few texts."""
    root = tmp_path / "DATA"
    for name, (bad, good) in LABELS.items():
        (root / name).mkdir(parents=True)
        pair = name in ("boolq", "mrpc", "rte")
        for split, source in (
            ("train", "train"),
            ("train_sentences", "train"),
            ("test", "test"),
            ("validation", "test"),
        ):
            lines = ["text_a,text_b,label" if pair else "text,label"]
            for row in (data_folder / f"{source}.csv").read_text().splitlines()[1:]:
                text, _, label = row.rpartition(",")
                lines.append(f"{text},{text if pair else ''}".rstrip(",") + f",{good if label == 'good' else bad}")
            (root / name / f"{split}.csv").write_text("\n".join(lines) + "\n")
    (root / "ptb").mkdir()
    for split in ("test", "valid"):
        (root / "ptb" / f"ptb.{split}.txt").write_text("a good day and a bad day. " * 20)
    return root


@pytest.fixture(autouse=True)
def words_that_the_tiny_tokenizer_has(monkeypatch):
    for name, benchmark in benchmarks.BENCHMARKS.items():
        verbalizer = dict(zip(benchmark.verbalizer, ("good", "bad"), strict=True))
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, replace(benchmark, verbalizer=verbalizer))


@pytest.fixture
def scale(settings):
    """The smallest amounts, with tiny models."""
    fit = FIT
    run = {
        "device": "cpu",
        "data": {"num_clients": 2, "alpha": 100.0, "judge_rows": 10, "test_rows": 16, "rows_per_client": 10},
        "slm": {**settings["slm"], "private": fit, "synthetic": fit},
        "llm": {**settings["llm"], "vocabulary_texts": [], "samples": 4},
        "synthesis": settings["synthesis"],
        "selection": {**settings["selection"], "pool": 6},
        "evaluation": {
            "nlu_rows": 8,
            "nlg_samples": 4,
            "perplexity_text": "../ptb/ptb.{split}.txt",
            "perplexity_tokens": 100,
            "judge": fit,
        },
    }
    return {
        "tasks": ["sst2"],
        "seeds": 1,
        "run": run,
        "finetuning": {"train_rows": 4, "test_rows": 6, "epochs": 1, "batch_size": 4, "max_tokens": 20},
        "skew": {"tasks": ["sst2"], "alpha": [100.0, 1.0]},
        "clients": {"tasks": ["sst2"], "num_clients": [2, 3]},
        "rows": {"tasks": ["sst2"], "rows_per_client": [5, 10]},
        "ablation": {"tasks": ["sst2"], "seeds": 1, "paper": {"no Eq. 8": {"llm": {"gamma_kl": 0.0}}}},
    }


def chosen(scale, data, *tables, tasks=(), presets=(), seeds=None, split="test"):
    return choose(Scale.model_validate(scale), tables, tasks, presets, seeds, split, data)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def test_every_paper_table_end_to_end(scale, data, tmp_path, monkeypatch, command):
    (tmp_path / "scale.toml").write_text(tomli_w.dumps(scale))
    output = tmp_path / "out"
    options = ["--data-dir", data, "--scale", tmp_path / "scale.toml", "--output", output, "--cache-dir", tmp_path]
    code, out, err = command("reproduce", "4", "5", "6", "7", "8", *options)
    assert (code, err) == (0, ""), out
    cells = files(output / "test" / "cells")
    assert set(cells) == {
        "sst2/ceiling/base/seed-0/ceiling.json",
        *(f"sst2/{preset}/base/seed-0/{stage}.json" for preset in PRESETS for stage in ("run", *benchmarks.BENCHMARKS)),
        *(f"original/original/base/seed-0/{name}.json" for name in benchmarks.BENCHMARKS),
    }
    cell = json.loads((output / "test/cells/sst2/paper/base/seed-0/run.json").read_text())
    assert {"commit", "machine", "date", "seconds", "versions", "settings", "figures"} <= set(cell)
    assert str(data) not in json.dumps(cell)  # cells are passed on, and say nothing of the folders of a machine
    assert not {"dir", "device"} & {*cell["settings"]["config"], *cell["settings"]["config"]["data"]}
    run = cell["figures"]
    # what is kept of each row gives the accuracies of the run's own summary
    for method in ("standalone", "data_free_kd", "crosslm"):
        for client in ("client-0", "client-1"):
            correct = run["correct"][f"slm/{method}/{client}"]
            assert len(correct) == 16
            assert correct.count("1") / 16 == pytest.approx(run["slm"][method][client])
    assert run["correct"]["nlu/after"].count("1") / 8 == pytest.approx(run["llm"]["nlu_accuracy"]["after"])
    # preset recommended alone does not need the run for Standalone: a cell of its own has the same
    choice = chosen(scale, data, "4", presets=["recommended"])
    (alone,) = [cell for cell in plan(choice) if cell.stage == "standalone"]
    assert work.do(alone, choice, Store(output, "test"), tmp_path, None) == {
        "correct": {client: run["correct"][f"slm/standalone/{client}"] for client in ("client-0", "client-1")}
    }
    judge = run["correct"]["nlg/before/judge"]
    assert judge.count("1") / len(judge) == pytest.approx(run["llm"]["nlg_judge_accuracy"]["before"])
    assert len(run["arrivals"]) == 2
    assert {"reward/pool", "judge/drafts", "judge/pool", "echo/pool", "length/pool", "self_similarity/pool"} <= set(
        run["arrivals"][0]
    )
    assert run["reward_hacking"]["arrivals"] is not None

    tables = json.loads((output / "test/tables.json").read_text())["tables"]
    assert list(tables) == ["4", "gains", "5", "6", "7", "8"]
    shown = {row["name"]: row["cells"][0] for row in tables["4"]["rows"]}
    assert shown["Standalone"] == {"value": 0.706, "unit": "share"}  # the paper's
    assert shown["preset paper: CrossLM"]["value"] == pytest.approx(run["slm"]["crosslm"]["mean"])
    assert shown[ALL_ROWS]["value"] == pytest.approx(run["slm"]["standalone"]["mean"])
    ours = shown["preset paper: CrossLM"]
    if "low" in ours:  # not where all rows are alike
        assert ours["low"] <= ours["value"] <= ours["high"]
    majority = {row["name"]: row["cells"][0] for row in tables["7"]["rows"]}["the most frequent label always"]
    assert 0.5 <= majority["value"] <= 1
    text = (output / "test/tables.md").read_text()
    for words in (
        "Table 4",
        "Table 7",
        "Table 8",
        "*in the paper: GPT2-Large, CrossLM*",
        "What differs from the paper",
    ):
        assert words in text

    headline = json.loads((output / "test/headline.json").read_text())
    for preset in PRESETS:
        assert {name for name in HEADLINE if name in headline[preset]} == HEADLINE - {"skew_share_of_ceiling"}
        assert headline[preset]["missing"] == ["skew_share_of_ceiling"]
        assert set(headline[preset]["seeds"]) == HEADLINE - {"skew_share_of_ceiling"}
        # of perplexity no rows are drawn, and there is one seed
        assert set(headline[preset]["intervals"]) == set(headline[preset]["seeds"]) - {
            "ptb_growth_percent",
            "generalization_min_change",
        }
    svg = (output / "test/plots/sst2.svg").read_text()
    assert svg.startswith("<?xml")
    assert "label-word echo" in svg
    # of a run Table 7's LLM is kept, and no classifier or checkpoint
    for run_folder in (output / "test/runs").glob("*/*/*/*/"):
        kept = {path.name for path in run_folder.iterdir()}
        assert "llm" in kept
        assert not kept & {"slm", "slm-previous", "uploads", "quarantine", "checkpoints"}

    # once more: nothing is done again
    monkeypatch.setattr(jobs, "do", lambda *_: pytest.fail("done again"))
    code, out, _ = command("reproduce", "4", "5", "6", "7", "8", *options)
    assert code == 0
    assert "15 cells: 15 there, 0 to do" in out
    assert files(output / "test" / "cells") == cells


def fake_run(calls):
    """A run of a moment that leaves what a real one does."""

    def run(config, folder, cache, display=None, resume=False, llm_cache=None):
        calls.append(folder)
        (folder / "llm").mkdir(parents=True)
        (folder / "slm").mkdir()
        (folder / "config.toml").write_text(config.dump())
        better = config.preset == "recommended"
        predicted = {
            "slm/standalone/client-0": [0, 0, 0, 0],
            "slm/data_free_kd/client-0": [0, 0, 1, 0],
            "slm/crosslm/client-0": [0, 0, 1, 1] if better else [0, 0, 1, 0],
            "nlu/before": [1, 1, 1, 1],
            "nlu/after": [0, 0, 1, 1],
            "nlg/before/slm/client-0": [0, 1, 0, 1],
            "nlg/after/slm/client-0": [0, 0, 1, 1],
            "nlg/before/judge": [0, 1, 0, 1],
            "nlg/after/judge": [0, 0, 1, 1],
        }
        for name, rows in predicted.items():
            path = folder / "predictions" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"gold": [0, 0, 1, 1], "predicted": rows}))
        step = {"event": "step", "time": 1, "step": 1, "reward/pool": 0.5, "judge/pool": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
        llm = {"perplexity": {"before": 100.0, "after": 101.0}, "distinct_2": {"before": 0.8, "after": 0.7}}
        flag = {"arrivals": [1] if better else [], "whole_run": False}
        slm = {method: {} for method in METHODS}
        summary = {"slm": slm, "clients": {}, "llm": llm, "seconds": {"total": 1.0}, "reward_hacking": flag}
        if llm_cache:
            summary["llm_cache"] = {"found": 0, "made": str(llm_cache)}
        (folder / "summary.json").write_text(json.dumps(summary))

    return run


BENCHMARKED = {"correct": "1100", "matthews": 0.5, "majority": 0.75, "test_rows": 4}


@pytest.fixture
def quick(monkeypatch):
    """Cells of a moment; gives the run folders that were asked for."""
    calls = []
    monkeypatch.setattr(work, "run_local", fake_run(calls))
    monkeypatch.setattr(work, "ceiling", lambda *_: {"correct": {"client-0": "1111"}, "rows": 4})
    monkeypatch.setattr(work, "standalone", lambda *_: {"correct": {"client-0": "1100"}})
    monkeypatch.setattr(work, "benchmark", lambda cell, *_: dict(BENCHMARKED))
    monkeypatch.setattr(report, "can_plot", lambda: False)
    return calls


def contents(output):
    """All kept cells without times."""
    found = {}
    for path in (output / "test" / "cells").rglob("*.json"):
        cell = json.loads(path.read_text())
        found[path.relative_to(output).as_posix()] = (cell["figures"], cell["settings"])
    return found


def headline_of(output):
    """The headline figures without where they are from, which has the hours."""
    return {
        name: value
        for name, value in json.loads((output / "test/headline.json").read_text()).items()
        if name != "origin"
    }


class Stopped(BaseException):
    """As a signal would."""


def test_stopped_anywhere_it_goes_on(scale, data, tmp_path, monkeypatch, quick):
    choice = chosen(scale, data, "4", "7")
    reproduce(choice, tmp_path / "whole", tmp_path)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 1 + 2 + 4 + 8
    real = {"run": work.run_local, "write": Store.write, "tables": driver.write_report}

    def half_a_run(config, folder, *_):
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(config.dump())

    def half_a_file(store, name, text):
        (store.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (store.folder / f"{name}.partial").write_text(text[: len(text) // 2])

    def nothing(*_):
        pass

    # where, what is left there, and at which calls
    for target, left, when in (
        ("run", half_a_run, {1, 3}),
        ("write", nothing, {1, 5, 9}),
        ("write", half_a_file, {2, 6, 17}),
        ("tables", nothing, {1}),
    ):
        calls = []

        def stopping(*arguments, target=target, left=left, when=when, calls=calls, **how):
            if target == "write" and "cells/" not in arguments[1]:
                return real[target](*arguments)
            calls.append(target)
            if len(calls) in when:
                left(*arguments)
                raise Stopped
            return real[target](*arguments, **how)

        quick.clear()
        output = tmp_path / f"{target}-{left.__name__}"
        with monkeypatch.context() as patched:
            owner, name = {"run": (work, "run_local"), "write": (Store, "write"), "tables": (driver, "write_report")}[
                target
            ]
            patched.setattr(owner, name, stopping)
            for _ in when:
                with pytest.raises(Stopped):
                    reproduce(choice, output, tmp_path)
            reproduce(choice, output, tmp_path)
        assert contents(output) == whole
        assert len(quick) == len(set(quick)) == 2  # no run that had ended was made again
        assert headline_of(output) == headline_of(tmp_path / "whole")


def test_a_killed_process_goes_on(scale, data, tmp_path):
    """SIGKILL in the midst of a run of tiny models; the same call ends as one that was never stopped."""
    path = tmp_path / "scale.toml"
    path.write_text(tomli_w.dumps(scale))
    arguments = ["4", "--presets", "paper", "--data-dir", data, "--scale", path, "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "crosslm.cli.main", "reproduce", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    run = tmp_path / "out/test/runs/sst2/paper/base/seed-0"
    deadline = time.monotonic() + PATIENCE
    while (
        not (run / "checkpoints/arrival-0000.json").exists() and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = tmp_path / "out/test/cells/sst2/ceiling/base/seed-0/ceiling.json"
    assert first.is_file()
    assert not (run / "summary.json").exists()

    choice = chosen(scale, data, "4", presets=["paper"])
    before = first.stat().st_mtime_ns
    reproduce(choice, tmp_path / "out", tmp_path)
    assert first.stat().st_mtime_ns == before
    sessions = [json.loads(line)["event"] for line in (run / "sessions.jsonl").read_text().splitlines()]
    assert sessions == ["start", "resume"]  # what had been done was not done again
    reproduce(choice, tmp_path / "whole", tmp_path)

    def figures(output):
        return {
            name: {key: value for key, value in found.items() if key != "run_seconds"}
            for name, (found, _) in contents(output).items()
        }

    assert figures(tmp_path / "out") == figures(tmp_path / "whole")


def test_several_cells_at_a_time_are_what_one_at_a_time_makes(scale, data, tmp_path, capfd):
    choice = chosen(scale, data, "4", presets=["paper"])
    reproduce(choice, tmp_path / "one", tmp_path)
    (tmp_path / "scale.toml").write_text(tomli_w.dumps(scale))
    where = ["--data-dir", data, "--scale", tmp_path / "scale.toml", "--output", tmp_path / "two"]
    arguments = ["reproduce", "4", "--presets", "paper", "--jobs", "2", *where, "--cache-dir", tmp_path]
    capfd.readouterr()
    assert subprocess.call([sys.executable, "-m", "crosslm.cli.main", *map(str, arguments)]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "part 2 of 2 has ended: sst2/" in shown.out
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name: settings for name, (_, settings) in one.items()} == {
        name: settings for name, (_, settings) in two.items()
    }
    assert len(one) == 2
    for name, (figures, _) in one.items():
        assert two[name][0]["correct"] == figures["correct"]
    assert not (tmp_path / "two/test/runs/sst2/paper/base/seed-0/checkpoints").exists()


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def soon(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def imported_once(monkeypatch):
    """Processes that come of one which has imported everything; two other tests have them as they are."""
    monkeypatch.setattr(jobs, "PROCESSES", multiprocessing.get_context("forkserver"))
    multiprocessing.set_forkserver_preload([jobs.__name__])


def lines_of(cells, work, jobs=2):
    return sorted(line for lines in side_by_side(cells, work, Silent(), jobs) for line in lines)


@pytest.mark.usefixtures("imported_once")
def test_what_begins_with_a_runs_llm_comes_after_it_in_the_same_process(tmp_path):
    work = Recording(None, tmp_path, None, commit="of whoever started it")
    assert lines_of([*THREE[:2], BOTH[1], THREE[2]], work) == []
    done = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    assert [stage for method, stage, _, _ in done if method == "paper"] == ["run", "cola", "rte"]
    assert len({pid for _, _, pid, _ in done}) == 2
    assert {own for *_, own in done} == {"True"}  # a process names the commit that it has loaded


@pytest.mark.usefixtures("imported_once")
def test_a_process_that_dies_takes_no_other_cell_with_it(tmp_path):
    died = "its process ended with code 9; what it printed says why; if memory was short, try fewer --jobs"
    assert lines_of([*THREE, BOTH[1]], Dying(None, tmp_path, None)) == [
        "sst2/ceiling/base/seed-0/ceiling: as usual",
        "sst2/paper/base/seed-0/cola: as usual",
        "sst2/paper/base/seed-0/rte: as usual",
        f"sst2/paper/base/seed-0/run: {died}",
    ]


@pytest.mark.usefixtures("imported_once")
def test_what_no_cell_can_be_done_with_ends_all(tmp_path):
    with pytest.raises(RunError, match="choose another --output"):
        lines_of(BOTH, Failing(None, tmp_path, None), jobs=1)
    assert (tmp_path / "begun").read_text() == "paper\n"


@pytest.mark.usefixtures("imported_once")
def test_what_ends_the_command_ends_its_processes(tmp_path):
    doing = side_by_side(BOTH, Sleeping(None, tmp_path, None), Silent(), 2)
    assert next(doing) == []
    assert soon((tmp_path / "pid").exists)
    doing.close()
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_a_command_that_is_killed_leaves_no_process_behind(tmp_path):
    code = "import sys, moments; moments.sleep_side_by_side(sys.argv[1])"
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": search})
    assert soon(lambda: (tmp_path / "pid").exists() or process.poll() is not None)
    process.kill()
    process.wait()
    assert soon(lambda: has_ended(int((tmp_path / "pid").read_text())))


def test_a_cell_made_with_other_settings_is_refused_and_a_new_field_is_not(scale, data, tmp_path, quick):
    reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)
    made = len(quick)
    path = tmp_path / "out/test/cells/sst2/paper/base/seed-0/run.json"
    cell = json.loads(path.read_text())
    del cell["settings"]["config"]["selection"]["score"]  # as if the field had not been there yet
    path.write_text(json.dumps(cell))
    reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)
    assert len(quick) == made
    scale["run"]["llm"]["samples"] = 5
    with pytest.raises(RunError, match=r"seed-0/run.json: was made with other settings \(llm.samples\); take another"):
        reproduce(chosen(scale, data, "4", "7"), tmp_path / "out", tmp_path)
    # what does not need them has been done all the same: the original LLM's benchmarks
    assert len(quick) == made
    done = {path.parts[-5] for path in (tmp_path / "out").rglob("rte.json")}
    assert done == {"original"}
    # its cell deleted, the run is made again, though its folder is there and whole
    for preset in PRESETS:
        (tmp_path / f"out/test/cells/sst2/{preset}/base/seed-0/run.json").unlink()
    reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)
    assert len(quick) == made + 2
    # the ceiling does not depend on the LLM or on step 5, and the original LLM not on how it is enhanced
    scale["run"]["llm"] |= {"samples": 6, "learning_rate": 0.1}
    scale["run"]["slm"]["synthetic"] = {"epochs": 2}
    choice, store = chosen(scale, data, "4", "7"), Store(tmp_path / "out", "test")
    cells = [cell for cell in plan(choice) if cell.stage == "ceiling" or cell.method == "original"]
    assert len(cells) == 5
    assert all(driver.is_done(cell, choice, store) for cell in cells)
    scale["run"]["llm"]["lora_rank"] = 3
    scale["run"]["slm"]["max_length"] = 7
    choice = chosen(scale, data, "4", "7")
    for cell in cells:
        with pytest.raises(RunError, match="was made with other settings"):
            driver.is_done(cell, choice, store)


@pytest.mark.parametrize("table", ["4", "skew", "clients", "rows", "ablation"])
def test_each_table_has_a_standalone_to_compare_with(scale, data, table):
    scale["ablation"] |= {"recommended": {"no Eq. 8": {"llm": {"gamma_kl": 0.0}}}}
    alone, both = (chosen(scale, data, table, presets=presets) for presets in (["recommended"], []))
    standalone = {cell.variation.name for cell in plan(alone) if cell.stage == "standalone"}
    runs = {cell.variation.name for cell in plan(alone) if cell.stage == "run"}
    assert standalone == ({"base"} if table == "ablation" else runs)
    assert not [cell for cell in plan(both) if cell.stage == "standalone"]


def test_standalone_does_not_depend_on_how_what_comes_back_is_tried(scale, data):
    settings = []
    for acceptance in ({"balanced": False}, {"balanced": True, "margin": 0.1}, {"enabled": False}):
        scale["run"]["acceptance"] = {"enabled": True, **acceptance}
        choice = chosen(scale, data, "4", presets=["recommended"])
        cell = next(cell for cell in plan(choice) if cell.stage == "standalone")
        settings.append(settings_of(cell, choice))
    assert differences(cell, settings[0], settings[1]) == []
    assert differences(cell, settings[0], settings[2]) == ["acceptance.enabled"]  # which holds rows out


def test_of_a_run_with_another_step_5_the_llm_counts_and_the_slms_do_not(scale, data, tmp_path, quick, monkeypatch):
    output, said = tmp_path / "out", []
    monkeypatch.setattr(Silent, "note", lambda _, message: said.append(message))
    reproduce(chosen(scale, data, "4", "5"), output, tmp_path)
    scale["run"]["slm"]["interpolation"] = 0.25
    reproduce(chosen(scale, data, "4", "5"), output, tmp_path, render_only=True)
    assert (
        "warning: sst2/paper/base/seed-0/run was made with another step 5: what came back to its clients is in no table"
        in said
    )
    text = (output / "test/tables.md").read_text()
    assert "| preset recommended: gain, points | +50.0 " in text
    assert "preset recommended: CrossLM" not in text
    assert "whose runs had another step 5 too" in text
    headline = headline_of(output)["recommended"]
    assert headline["nlu_gain"] == 50.0
    assert "slm_gain_vs_data_free_kd" in headline["missing"]
    rows = {
        row["name"]: row["cells"]
        for row in json.loads((output / "test/tables.json").read_text())["tables"]["4"]["rows"]
    }
    assert rows[ALL_ROWS][0]["value"] == 0.5  # step 1 does not depend on it either
    with pytest.raises(RunError, match=r"run.json: was made with other settings \(slm.interpolation\)"):
        reproduce(chosen(scale, data, "4"), output, tmp_path)
    with pytest.raises(RunError, match=r"2 of 14 cells failed"):  # the runs; Table 7 begins with their LLMs
        reproduce(chosen(scale, data, "7"), output, tmp_path)
    assert len(list(output.rglob("rte.json"))) == 3
    scale["run"]["llm"]["samples"] = 5
    reproduce(chosen(scale, data, "4", "5"), output, tmp_path, render_only=True)
    assert "preset recommended: gain, points" not in (output / "test/tables.md").read_text()


def test_of_a_run_whose_llm_was_interpolated_otherwise_the_slms_count_and_the_llm_does_not(
    scale, data, tmp_path, quick, monkeypatch
):
    output, said = tmp_path / "out", []
    monkeypatch.setattr(Silent, "note", lambda _, message: said.append(message))
    reproduce(chosen(scale, data, "4", "5", "6", "7", "8"), output, tmp_path)
    before = headline_of(output)["recommended"]
    scale["run"]["llm"]["interpolation"] = 0.25
    reproduce(chosen(scale, data, "4", "5", "6", "7", "8"), output, tmp_path, render_only=True)
    warning = "sst2/recommended/base/seed-0/run interpolated its LLM otherwise in the end: that LLM is in no table"
    assert f"warning: {warning}" in said
    after = headline_of(output)["recommended"]
    of_slms = {name for name in before if name.startswith("slm_")}
    of_llms = {"nlu_gain", "nlg_judge_gain", "ptb_growth_percent", "generalization_mean_change"}
    assert of_slms
    assert {name: after[name] for name in of_slms} == {name: before[name] for name in of_slms}
    assert of_llms <= {*before}
    assert of_llms <= {*after["missing"]}
    assert "preset recommended, after" not in (output / "test/tables.md").read_text()
    with pytest.raises(RunError, match=r"run.json: was made with other settings \(llm.interpolation\)"):
        reproduce(chosen(scale, data, "4"), output, tmp_path)


def test_the_llm_of_a_one_shot_run_does_not_depend_on_what_goes_back(scale, data, tmp_path):
    """So Table 7's cells stay where step 5 has changed; with a second participation they do not."""
    adapters, settings = {}, {}
    for participations in (1, 2):
        scale["run"]["federation"] = {"participations": participations, "closing": True}
        scale["run"]["slm"] |= {"soft_labels": True, "interpolation": 0.5}
        scale["run"]["selection"] |= {"fraction": 1.0}
        scale["run"]["gate"] = {"teach_refused": True}
        scale["run"]["acceptance"] = {"balanced": True}
        for changed in (False, True):
            if changed:
                scale["run"]["slm"] |= {"synthetic": {**FIT, "epochs": 3}, "soft_labels": False, "interpolation": 1.0}
                scale["run"]["gate"] = {"teach_refused": False}
                scale["run"]["acceptance"] = {"balanced": False}
                scale["run"]["federation"] = {"participations": participations, "closing": False}
                scale["run"]["selection"] |= {"fraction": 0.5, "score": "reward"}
            choice = chosen(scale, data, "7", presets=["recommended"])
            (run,) = [cell for cell in plan(choice) if cell.stage == "run"]
            folder = tmp_path / f"{participations}-{changed}"
            run_local(choice.cell_config(run), folder, tmp_path)
            adapters[participations, changed] = (folder / "llm/adapter_model.safetensors").read_bytes()
            settings[participations, changed] = settings_of(replace(run, stage="rte"), choice)
    rte = replace(run, stage="rte")
    assert adapters[1, False] == adapters[1, True]
    assert differences(rte, settings[1, False], settings[1, True]) == []
    assert adapters[2, False] != adapters[2, True]
    assert "slm.soft_labels" in differences(rte, settings[2, False], settings[2, True])


def test_cells_that_differ_in_step_5_alone_have_their_llm_in_common(scale, data, tmp_path):
    choice = chosen(scale, data, "ablation", presets=["recommended"])
    made, shared = {}, Work(choice, tmp_path / "out", tmp_path, tmp_path / "llm")
    for cell in plan(choice):
        if cell.variation.name in ("base", "slm.soft-labels-false", "llm.gamma-kl-0.05") and cell.stage == "run":
            assert shared.do(cell, Silent()) == []
            path = tmp_path / f"out/test/cells/{cell.path}.json"
            made[cell.variation.name] = json.loads(path.read_text())["figures"]["llm_cache"]["made"]
    assert made["base"] > made["llm.gamma-kl-0.05"] > 0 == made["slm.soft-labels-false"]


def test_the_command_passes_the_llms_cache_on(scale, data, tmp_path, quick, command):
    (tmp_path / "scale.toml").write_text(tomli_w.dumps(scale))
    options = [
        "--data-dir",
        data,
        "--scale",
        tmp_path / "scale.toml",
        "--output",
        tmp_path / "out",
        "--cache-dir",
        tmp_path,
    ]
    code, out, _ = command("reproduce", "5", *options, "--llm-cache", tmp_path / "llm")
    assert code == 0, out
    cells = list((tmp_path / "out/test/cells").rglob("run.json"))
    assert cells
    for cell in cells:
        assert json.loads(cell.read_text())["figures"]["llm_cache"]["made"] == str(tmp_path / "llm")


def test_a_run_of_another_configuration_is_not_gone_on_with(scale, data, tmp_path):
    choice = chosen(scale, data, "4", presets=["paper"])
    cell = next(cell for cell in plan(choice) if cell.stage == "run")
    store, config = Store(tmp_path / "out", "test"), choice.cell_config(cell)
    folder = store.run_folder(cell)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text(config.dump())
    assert (store.ready_run_folder(cell, config, {}) / "checkpoints").is_dir()  # one that was begun by an older version
    assert (store.ready_run_folder(cell, config, {"train.csv": "1"}) / "checkpoints").is_dir()
    assert (store.ready_run_folder(cell, config, {"train.csv": "1"}) / "checkpoints").is_dir()
    other = config.model_copy(update={"device": "cuda"})  # no other settings, but no other half of the same run
    assert not store.ready_run_folder(cell, other, {"train.csv": "1"}).exists()
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text(config.dump())
    store.ready_run_folder(cell, config, {})  # the data are away once: what is known of them stays known
    assert not store.ready_run_folder(cell, config, {"train.csv": "2"}).exists()  # of other rows


def test_a_cell_made_of_other_data_is_refused_wherever_the_same_data_are(scale, data, tmp_path, quick):
    reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)
    made, elsewhere = len(quick), tmp_path / "elsewhere"
    shutil.copytree(data, elsewhere)
    packed = elsewhere / "sst2" / "train_sentences.csv"
    with gzip.open(packed.with_name(f"{packed.name}.gz"), "wb") as file:
        file.write(packed.read_bytes())
    packed.unlink()
    reproduce(chosen(scale, elsewhere, "4"), tmp_path / "out", tmp_path)
    assert len(quick) == made
    kept = tmp_path / "out/test/cells/sst2/paper/base/seed-0/run.json"
    cell = json.loads(kept.read_text())
    digests = cell["settings"].pop("files")
    assert set(digests) == {"train_sentences.csv", "test.csv", "../ptb/ptb.test.txt"}
    with packed.open("w") as file:
        file.write((data / "sst2" / "train_sentences.csv").read_text().replace("good", "kind"))
    with pytest.raises(
        RunError, match=r"3 of 3 cells failed(.|\n)*other settings \(the contents of train_sentences.csv\)"
    ):
        reproduce(chosen(scale, elsewhere, "4"), tmp_path / "out", tmp_path)
    kept.write_text(json.dumps(cell))  # one that was kept before contents were: not known to be of others
    choice, store = chosen(scale, elsewhere, "4"), Store(tmp_path / "out", "test")
    (run,) = [cell for cell in plan(choice) if (cell.stage, cell.method) == ("run", "paper")]
    assert driver.is_done(run, choice, store)


def test_a_benchmark_of_other_rows_is_refused(scale, data, tmp_path):
    choice = chosen(scale, data, "7")
    cell = next(cell for cell in plan(choice) if cell.stage == "rte")
    before = settings_of(cell, choice)
    assert differences(cell, before, settings_of(cell, choice)) == []
    path = data / "rte" / "test.csv"
    rows = path.read_bytes()
    path.unlink()
    packed = path.with_name("test.csv.gz")
    packed.write_bytes(gzip.compress(rows))
    assert settings_of(cell, choice)["files"] == before["files"]
    packed.write_bytes(gzip.compress(rows + rows.splitlines()[-1] + b"\n"))
    assert differences(cell, before, settings_of(cell, choice)) == ["the contents of rte/test.csv"]


def test_where_the_fresh_adapter_is_counts_for_the_original_llm_too(scale, data):
    choice = chosen(scale, data, "7")
    cell = next(cell for cell in plan(choice) if cell.method == "original")
    before = settings_of(cell, choice)
    now = json.loads(json.dumps(before))
    now["config"]["llm"]["adapted_layers"] = 0.5
    assert differences(cell, before, now) == ["llm.adapted_layers"]


def test_a_benchmark_of_an_llm_that_learned_from_other_rows_is_refused(scale, data):
    choice = chosen(scale, data, "7")
    (cell, original) = (
        next(cell for cell in plan(choice) if cell.stage == "rte" and cell.method == method)
        for method in ("recommended", "original")
    )
    before = [settings_of(each, choice) for each in (cell, original)]
    path = data / "sst2" / "train_sentences.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    changed = ["the contents of train_sentences.csv"]
    assert differences(cell, before[0], settings_of(cell, choice)) == changed
    assert differences(original, before[1], settings_of(original, choice)) == []


def test_a_file_that_is_cut_off_is_the_cells_error_and_not_the_ends_of_all(scale, data):
    choice = chosen(scale, data, "4")
    cell = next(cell for cell in plan(choice) if cell.stage == "run")
    plain = data / "sst2" / "train_sentences.csv"
    whole = gzip.compress(plain.read_bytes())
    plain.unlink()
    for cut in (whole[:-9], whole[:40], b"no gzip"):
        plain.with_name(f"{plain.name}.gz").write_bytes(cut)
        assert "train_sentences.csv" not in settings_of(cell, choice)["files"]


def test_a_damaged_cell_is_named_at_the_end(scale, data, tmp_path, quick):
    choice = chosen(scale, data, "4")
    reproduce(choice, tmp_path / "out", tmp_path)
    (tmp_path / "out/test/cells/sst2/paper/base/seed-0/run.json").write_text("{")
    (tmp_path / "out/test/cells/sst2/recommended/base/seed-0/run.json").unlink()
    with pytest.raises(RunError, match=r"1 of 3 cells failed:\n.*paper/base/seed-0/run.json: damaged, delete it"):
        reproduce(choice, tmp_path / "out", tmp_path)
    assert (tmp_path / "out/test/cells/sst2/recommended/base/seed-0/run.json").is_file()


def test_the_settings_are_those_at_the_beginning_of_a_cell(scale, data, tmp_path, monkeypatch, quick):
    choice = chosen(scale, data, "4", presets=["paper"])
    good = work.run_local

    def run(*arguments, **how):
        choice.scale.run["llm"]["samples"] = 99  # as if a file had been changed while it ran
        good(*arguments, **how)

    monkeypatch.setattr(work, "run_local", run)
    reproduce(choice, tmp_path / "out", tmp_path)
    kept = json.loads((tmp_path / "out/test/cells/sst2/paper/base/seed-0/run.json").read_text())
    assert kept["settings"]["config"]["llm"]["samples"] == 4


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError("the LLM's update is not finite"), "the LLM's update is not"),
        (torch.OutOfMemoryError("no room"), "OutOfMemoryError: no room"),
    ],
)
def test_a_cell_that_fails_does_not_stop_the_others(scale, data, tmp_path, monkeypatch, quick, error, said):
    good = work.run_local

    def run(config, folder, *rest, **how):
        if config.preset == "paper":
            raise error
        good(config, folder, *rest, **how)

    monkeypatch.setattr(work, "run_local", run)
    with pytest.raises(RunError, match=f"1 of 3 cells failed:\nsst2/paper/base/seed-0/run: {said}"):
        reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)
    assert len(contents(tmp_path / "out")) == 2
    monkeypatch.setattr(work, "run_local", good)
    reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)
    assert len(contents(tmp_path / "out")) == 3


def test_a_run_whose_uploads_were_all_refused_is_no_hole_in_the_mean(scale, data, tmp_path):
    scale["run"]["gate"] = {"enabled": True, "min_texts": 1, "max_share": 0.01}
    choice = chosen(scale, data, "4", "7", presets=["paper"])
    reproduce(choice, tmp_path / "out", tmp_path)
    of_run, of_original = (
        json.loads((tmp_path / f"out/test/cells/{place}/base/seed-0/rte.json").read_text())["figures"]
        for place in ("sst2/paper", "original/original")
    )
    assert of_run == of_original  # its LLM is the original
    run = json.loads((tmp_path / "out/test/cells/sst2/paper/base/seed-0/run.json").read_text())["figures"]
    assert not any(name.startswith("slm/crosslm") for name in run["correct"])
    assert run["llm"]["perplexity"]["before"] == run["llm"]["perplexity"]["after"] > 0
    report = json.loads((tmp_path / "out/test/tables.json").read_text())
    shown = {row["name"]: row["cells"][0] for row in report["tables"]["4"]["rows"] if row["by"] == "ours"}
    assert shown["preset paper: CrossLM"]["value"] == shown[ALL_ROWS]["value"]
    assert shown["preset paper: CrossLM - Standalone, points"]["value"] == 0
    assert "sst2/paper/base/seed-0: every upload was refused" in report["tables"]["4"]["notes"][-2]
    assert report["headline"]["paper"]["nlu_gain"] == report["headline"]["paper"]["ptb_growth_percent"] == 0
    assert "nlg_judge_gain" in report["headline"]["paper"]["missing"]


def test_a_run_in_which_a_client_failed_otherwise_is_a_failure(scale, data, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no memory")

    monkeypatch.setattr(Client, "train", broken)
    with pytest.raises(RunError, match="no client could be served"):
        reproduce(chosen(scale, data, "4", presets=["paper"]), tmp_path / "out", tmp_path)


def test_two_at_once_are_refused(scale, data, tmp_path, quick):
    with Store(tmp_path / "out", "test").locked():
        with pytest.raises(RunError, match="another crosslm reproduce is at work here; choose another --output"):
            reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)
        reproduce(chosen(scale, data, "4", split="validation"), tmp_path / "out", tmp_path)
    reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)


def test_the_tables_are_of_everything_that_is_there(scale, data, tmp_path, quick, command):
    reproduce(chosen(scale, data, "skew", presets=["recommended"]), tmp_path / "out", tmp_path)
    reproduce(chosen(scale, data, "4", "7", seeds=2), tmp_path / "out", tmp_path)
    text = (tmp_path / "out/test/tables.md").read_text()
    assert "### Label skew" in text
    assert "| SST-2, preset recommended, 1 | 0.500 " in text  # Standalone's cell, for which preset paper need not run
    assert "SST-2, preset paper, 1 " not in text  # has not been run
    assert "sst2/recommended/base/seed-0 (arrival 1)" in text
    assert "Label skew: Dirichlet with alpha 100.0" in text
    assert "compared on 400 test rows of SST-2" in text
    # 4 test rows, half of them right by CrossLM alone: a binomial of 4 draws
    assert "| preset recommended: CrossLM - Standalone, points | +50.0 [+0.0, +100.0] |" in text
    headline = headline_of(tmp_path / "out")
    assert {name for name in HEADLINE if name in headline["recommended"]} == HEADLINE
    assert headline["recommended"]["skew_share_of_ceiling"] == 1.0
    assert headline["recommended"]["slm_gain_vs_standalone"] == 50.0
    assert headline["recommended"]["slm_gain_vs_data_free_kd"] == 25.0
    assert headline["paper"]["slm_gain_vs_data_free_kd"] == 0.0
    assert headline["recommended"]["nlu_gain"] == headline["recommended"]["nlg_judge_gain"] == 50.0
    assert headline["recommended"]["generalization_min_change"] == 0.0
    assert headline["recommended"]["generalization_mean_change"] == 0.0
    assert "| the most frequent label always | 0.750 |" in text
    assert "`generalization_mean_change` is their mean" in text
    assert headline["recommended"]["ptb_growth_percent"] == pytest.approx(1.0)
    assert headline["recommended"]["seeds"]["nlu_gain"] == 2
    assert headline["recommended"]["seeds"]["skew_share_of_ceiling"] == 1
    (tmp_path / "scale.toml").write_text(tomli_w.dumps(scale))
    # docs/results.md takes what is kept of it
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    results.collect(tmp_path / "out/test", tmp_path / "results", tmp_path / "plots")
    kept = json.loads((tmp_path / "results/reproduce.json").read_text())
    section = "\n".join(results.reproduction_section(kept, ["sst2"]))
    assert text.removeprefix("# Results\n\n").rstrip() in section
    assert "![sst2](plots/sst2.svg)" in section
    assert (tmp_path / "results/headline.json").read_text() == (tmp_path / "out/test/headline.json").read_text()
    (tmp_path / "out/test/tables.md").unlink()
    options = ["--scale", tmp_path / "scale.toml", "--output", tmp_path / "out", "--data-dir", data]
    code, out, _ = command("reproduce", "--render", *options)
    assert code == 0
    assert "to do" not in out
    assert (tmp_path / "out/test/tables.md").read_text() == text


def test_wrong_input_is_found_before_anything_is_run(scale, data, tmp_path, quick, command):
    for arguments, message in (
        (["9"], "no table '9'; there are: 4, 5, 6, 7, 8, skew, clients, rows, ablation"),
        (["4", "--tasks", "sst2", "imdb"], "'imdb' is no table but a task: name tasks with commas, --tasks sst2,imdb"),
        (["4", "--tasks", "sst3"], "no task 'sst3'; there are: sst2, imdb, ag_news, yahoo_answers\n"),
        (["4", "--tasks", "demo"], "no task 'demo'; there are: sst2, imdb, ag_news, yahoo_answers\n"),
        (["4", "--presets", "best"], "no preset 'best'; there are: paper, recommended"),
        (["4", "--split", "train"], "no split 'train'; there are: test, validation"),
        (["4", "--scale", tmp_path / "no.toml"], "no.toml: cannot be read as a TOML file"),
        (["4", "--render", "--output", tmp_path / "mistyped"], "no such folder, so there are no cells to render"),
    ):
        code, _, err = command("reproduce", *arguments)
        assert code == 2
        assert message in err
    (data / "rte" / "test.csv").unlink()
    with pytest.raises(DataError, match=r"rte/test.csv: no such file"):
        reproduce(chosen(scale, data, "4", "7"), tmp_path / "out", tmp_path)
    (data / "ptb" / "ptb.test.txt").unlink()
    with pytest.raises(DataError, match=r"ptb.test.txt: no such file"):
        reproduce(chosen(scale, data, "4"), tmp_path / "out", tmp_path)
    assert not quick
    (tmp_path / "bad.toml").write_text(tomli_w.dumps(scale | {"seeds": 0}))
    with pytest.raises(ConfigError, match=r"seeds: Input should be greater than 0"):
        load_scale(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text(tomli_w.dumps(scale | {"skew": {"tasks": ["sst2"], "alpha": []}}))
    with pytest.raises(ConfigError, match=r"skew.alpha: Tuple should have at least 1 item"):
        load_scale(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text(tomli_w.dumps(scale | {"skew": {"tasks": ["nope"], "alpha": [0.1]}}))
    with pytest.raises(ConfigError, match=r"no task 'nope'; there are: sst2"):
        chosen(load_scale(tmp_path / "bad.toml").model_dump(exclude_none=True), data, "4")


def test_ctrl_c_says_how_to_go_on(scale, data, tmp_path, quick, monkeypatch, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "run_local", interrupted)
    (tmp_path / "scale.toml").write_text(tomli_w.dumps(scale))
    options = ["--scale", tmp_path / "scale.toml", "--output", tmp_path / "out", "--data-dir", data]
    code, out, _ = command("reproduce", "4", *options)
    assert code == 130
    assert "stopped; the same command goes on" in out


def test_the_plan_of_the_packaged_scale():
    choice = choose(load_scale(), [], [], [], None, "test", Path("DATA"))
    cells = plan(choice)
    assert len(cells) == len(set(cells))
    # Tables 4, 5, 6 and 8 are of the same runs
    runs = {cell.path for cell in plan(replace(choice, tables=("4",))) if cell.stage == "run"}
    assert len(runs) == 4 * 2 * 3
    for table in ("5", "6", "8"):
        assert {cell.path for cell in plan(replace(choice, tables=(table,)))} == runs
    seven = {cell.path for cell in plan(replace(choice, tables=("7",)))}
    assert runs < seven
    assert len(seven - runs) == 4 * (1 + 8) * 3
    # what a table varies to the value of the base is the base
    names = {cell.variation.name for cell in cells if cell.task == "sst2" and cell.stage == "run"}
    assert {"base", "alpha-0.1", "alpha-0.5", "clients-2", "clients-8", "rows-50", "rows-1000"} <= names
    assert not {"alpha-5", "clients-4", "rows-200"} & names
    # every field of recommended is put back by itself
    for section, fields in PRESETS["recommended"].items():
        for name in fields:
            assert any(found.startswith(f"{section}.{name}".replace("_", "-")) for found in names), name
    assert {"no-eq.-5", "no-eq.-7", "no-eq.-8", "by-reward-alone", "by-diversity-alone"} <= names
    assert set(TABLES) == set(choice.tables)
    config = choice.cell_config(next(cell for cell in cells if cell.variation.name == "reward.baseline-none"))
    assert (config.preset, config.reward.baseline, config.reward.correct_prior) == ("recommended", "none", True)
    validation = replace(choice, split="validation").config("sst2", "paper", 1, {})
    assert validation.data.test == "validation.csv"
    assert validation.evaluation.perplexity_text == "../ptb/ptb.valid.txt"
    assert validation.seed == 1


def test_the_small_scale_has_less_of_everything_and_all_tasks():
    small, large = (choose(load_scale(path), [], [], [], None, "test", Path("DATA")) for path in (Path("small"), None))
    assert small.scale.tasks == large.scale.tasks
    for task in small.tasks:
        less, more = (choice.config(task, "recommended", 0, {}) for choice in (small, large))
        assert less.data.test_rows < more.data.test_rows
        assert (less.selection.pool, less.llm.samples) == (256, 64) < (more.selection.pool, more.llm.samples)
        assert less.gate.min_texts < less.selection.pool  # the gate has enough to probe with
    assert len(plan(small)) < len(plan(large))


DATA = os.environ.get("CROSSLM_DATA", "")


@pytest.mark.skipif(not DATA, reason="CROSSLM_DATA does not name the folder of the datasets")
def test_the_scale_fits_the_real_data():
    for split in ("test", "validation"):
        choice = choose(load_scale(), [], [], [], 1, split, Path(DATA))
        for cell in plan(choice):
            if cell.stage == "run" and cell.method == "paper":
                config = choice.cell_config(cell)
                found = load_split(config)
                assert {len(rows) for rows in found.private.values()} == {config.data.rows_per_client}
                assert len(found.private) == config.data.num_clients
                assert len(found.test) <= config.data.test_rows
                assert len(found.judge) == config.data.judge_rows
                assert set(found.test.labels) == set(range(len(config.task.labels)))
        for name, benchmark in benchmarks.BENCHMARKS.items():
            parts = benchmarks.load_benchmark(benchmark, Path(DATA) / name, f"{split}.csv")
            assert {len(part) for part in parts} == {len(parts[0])}
            assert set(parts[0].labels) == {0, 1}
