"""Several seeds of one configuration, as one result (``crosslm run --seeds``)."""

import io
import json
import shutil

import pytest
from made_run import write_run
from rich.console import Console

from crosslm.errors import RunError, StoppedError
from crosslm.html_report.collect import RunView
from crosslm.html_report.pooled import pooled, pooled_tables
from crosslm.runs.rundir import RunDir


def view_of(folder):
    return RunView.read(RunDir.open(folder))


def marks(client, right, method="crosslm", rows=0):
    return {"event": "test", "method": method, "client": client, "rows": rows, "right": right}


def test_means_and_intervals_by_hand(tmp_path):
    """Standalone is right on 60 of 100 rows, Data-free KD on 70, CrossLM of north on 80 and 100, of south on 80."""
    better = [marks("north", "1" * 100), {"event": "none"}]
    views = [view_of(write_run(tmp_path / "one")), view_of(write_run(tmp_path / "two", extra=better, seed=8))]
    found = pooled(views)
    assert found["seeds"] == [7, 8]
    assert list(found["slm"]) == ["north", "south", "mean"]
    assert found["slm"]["north"]["crosslm"][0] == pytest.approx(0.9)
    assert found["slm"]["mean"]["crosslm"][0] == pytest.approx(0.85)
    assert found["slm"]["mean"]["over standalone"][0] == pytest.approx(0.25)
    assert found["slm"]["mean"]["over data_free_kd"][0] == pytest.approx(0.15)
    value, low, high = found["slm"]["south"]["over standalone"]  # 20 of 100 rows gained in both seeds
    assert value == pytest.approx(0.2)
    assert low == pytest.approx(0.2 - 1.96 * 0.04, abs=0.02)
    assert high == pytest.approx(0.2 + 1.96 * 0.04, abs=0.02)
    _, low, high = found["slm"]["north"]["over standalone"]  # 0.2 and 0.4: seeds are drawn too
    assert low < 0.2 < 0.4 < high + 0.05
    assert found["llm"]["nlu_accuracy"] == [0.5, 0.8]
    assert "perplexity" not in found["llm"]
    console = Console(file=io.StringIO(), width=160)
    console.print(pooled_tables(found))
    told = console.file.getvalue()
    assert "mean of the seeds 7, 8" in told
    assert "│ north  │      0.600 │        0.700 │   0.900 │ +30.0 [" in told
    assert "classifies test text right (NLU, Eq. 1): 0.500 before, 0.800 after." in told


def test_clients_with_test_rows_of_their_own_count_alike(tmp_path):
    """North has 100 rows and south 50: the mean is that of the clients, as everywhere."""
    own = [marks("south", "1" * 25 + "0" * 25, method, rows=1) for method in ("standalone", "data_free_kd")]
    view = view_of(write_run(tmp_path / "one", extra=[*own, marks("south", "1" * 50, rows=1)]))
    found = pooled([view, view])["slm"]
    assert found["mean"]["standalone"][0] == pytest.approx((0.6 + 0.5) / 2)
    assert found["mean"]["over standalone"][0] == pytest.approx((0.2 + 0.5) / 2)


def test_clients_that_are_not_in_all_runs_are_left_out(tmp_path):
    views = [view_of(write_run(tmp_path / "one")), view_of(write_run(tmp_path / "two", (("north", 0.2, 0.9),)))]
    found = pooled(views)
    assert (list(found["slm"]), found["left_out"]) == (["north", "mean"], ["south"])
    console = Console(file=io.StringIO(), width=160)
    console.print(pooled_tables(found))
    assert "Left out, since not every run has served them: south." in console.file.getvalue()
    views[1] = view_of(write_run(tmp_path / "three", (("east", 0.2, 0.9),)))
    with pytest.raises(RunError, match="no client was served and measured in all of these runs; look at each"):
        pooled(views)


def test_the_command_does_each_seed_once_and_pools_them(shell, workplace, tmp_path, monkeypatch):
    done = []

    def run_local(config, output, cache, display, resume, stop, llm_cache):
        assert resume
        if not (output / "summary.json").is_file():
            done.append((config.seed, output.name))
            write_run(output, seed=config.seed)
        return json.loads((output / "summary.json").read_text())

    monkeypatch.setattr("crosslm.experiment.run_local", run_local)
    command = ("run", workplace / "tickets.toml", "--set", "seed=3", "--seeds", "2", "--output", tmp_path / "runs")
    code, out, err = shell(*command)
    assert code == 0, err
    assert done == [(3, "seed-3"), (4, "seed-4")]
    assert "mean of the seeds 3, 4" in out
    assert json.loads((tmp_path / "runs" / "seeds.json").read_text())["seeds"] == [3, 4]
    code, _, err = shell(*command)
    assert (code, "is not empty; choose another --output" in " ".join(err.split())) == (2, True)
    shutil.rmtree(tmp_path / "runs" / "seed-4")
    code, out, err = shell(*command, "--resume")
    assert code == 0, err
    assert done[2:] == [(4, "seed-4")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "tickets-1")
    (tmp_path / "runs").mkdir()
    (tmp_path / "tickets-1").rename(tmp_path / "runs" / "tickets-1")
    (tmp_path / "runs" / "tickets-1" / "seeds.json").unlink()
    (tmp_path / "runs" / "tickets-1" / "seed-4" / "summary.json").unlink()

    def stopped(*arguments, **named):
        raise StoppedError("stopped after arrival 1")

    with monkeypatch.context() as patch:
        patch.setattr("crosslm.experiment.run_local", stopped)
        code, _, err = shell(*command[:-2], "--resume")
    assert code == 130
    assert "all of them: the same command with --output runs/tickets-1 --resume" in " ".join(err.split())
    shutil.rmtree(tmp_path / "runs" / "tickets-1" / "seed-4")
    assert shell(*command[:-2], "--resume")[0] == 0  # finds them by itself
    assert done[3:] == [(4, "seed-4")]
    shutil.move(tmp_path / "runs" / "tickets-1", tmp_path / "all")
    (tmp_path / "runs").rmdir()
    (tmp_path / "all").rename(tmp_path / "runs")
    code, again, _ = shell("report", tmp_path / "runs")
    assert (code, "mean of the seeds 3, 4" in again) == (0, True)
    (tmp_path / "runs" / "seeds.json").write_text("{")
    code, _, err = shell("report", tmp_path / "runs")
    assert (code, "seeds.json: damaged" in err) == (2, True)
