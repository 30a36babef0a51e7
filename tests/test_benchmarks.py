"""Benchmarks: of privacy, cells that are not mixed and a verdict from figures; of speed, what was kept stays kept."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from crosslm.config import Config
from crosslm.experiment import run_local

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(accuracy, auc, calibrated, epsilon, **changes):
    one = {"auc_interval": [0.4, 0.6], "tpr": 0.01, "tpr_interval": [0.0, 0.02]}
    private = None if epsilon is None else {"trained_layers": 0, "center": True, "clip": 1.0}
    settings = {"model": "m", "pooling": "mean", "test_rows": 100, "reference": "alike", "privacy": private}
    settings["fit"] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.1}
    return {
        "epsilon": epsilon,
        "accuracy": accuracy,
        "attacks": {"loss": one | {"auc": auc}, "calibrated": one | {"auc": calibrated}},
        "exposure": [1.0, 2.0],
        "settings": settings,
        "commit": "c" * 40,
        "machine": "a machine",
        "date": "2026-11-25",
    } | changes


@pytest.mark.parametrize(
    ("accuracy", "auc", "ends"),
    [
        (0.78, 0.54, "a mean AUC of 0.540 (met) and DP costs 2.0 points (met): the goal is met."),
        (0.76, 0.54, "a mean AUC of 0.540 (met) and DP costs 4.0 points (missed): the goal is not met."),
        (0.78, 0.56, "a mean AUC of 0.560 (missed) and DP costs 2.0 points (met): the goal is not met."),
    ],
)
def test_the_verdict_is_computed(monkeypatch, accuracy, auc, ends):
    table = loaded("privacy_table", monkeypatch)
    cells = {"200/none/0": cell(0.79, 0.8, 0.7, None), "200/none/1": cell(0.81, 0.8, 0.7, None)}
    cells |= {
        f"200/8/{seed}": cell(accuracy + moved, 0.51, auc + moved, 7.99) for seed, moved in ((0, 0.01), (1, -0.01))
    }
    assert f"With 200 rows the better attack (calibrated) has {ends}" in table.privacy_table(cells)
    assert "| 200 | no DP | 2 | 0.800 (0.790 to 0.810) |" in table.privacy_table(cells)
    assert "With DP: the head alone, centred, 2 epochs, batches of 8" in table.privacy_table(cells)
    only = {key: value for key, value in cells.items() if "none" in key}
    assert "that has not been measured." in table.verdict(only, 200)


def test_cells_that_were_measured_otherwise_are_not_mixed(monkeypatch):
    table, privacy = loaded("privacy_table", monkeypatch), loaded("privacy", monkeypatch)
    cells = {"200/none/0": cell(0.79, 0.8, 0.7, None), "200/8/0": cell(0.7, 0.5, 0.5, 7.99)}
    settings = {"none": cells["200/none/0"]["settings"], "8": cells["200/8/0"]["settings"]}
    other = cell(0.7, 0.5, 0.5, 7.99, commit="d" * 40)
    for odd in (other, cell(0.7, 0.5, 0.5, 7.99, settings=settings["8"] | {"pooling": None})):
        mixed = cells | {"200/8/1": odd}
        with pytest.raises(SystemExit, match="200 rows were measured at several commits or with several settings"):
            table.privacy_table(mixed)
        assert privacy.still_good(mixed | {"1000/8/1": odd}, 200, "c" * 40, settings) == cells | {"1000/8/1": odd}
    assert table.privacy_table(cells | {"1000/8/0": other})  # of another number of rows: it has its own line


def test_kept_figures_are_not_overwritten_by_fewer(monkeypatch, tmp_path, capsys):
    measure = loaded("measure", monkeypatch)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    options = argparse.Namespace(origin={"commit": "c"}, quick=False, device="cpu", json=None, keep=True)
    measure.finish("update", {"ratio": 1.0, "ratio_vs_trl": 2.0}, options)
    with pytest.raises(SystemExit, match=r"performance-update.json was not written: this run has no ratio_vs_trl"):
        measure.finish("update", {"ratio": 3.0}, options)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] == 3.0
    assert json.loads((tmp_path / "performance-update.json").read_text())["ratio"] == 1.0
    measure.finish("update", {"ratio": 3.0, "ratio_vs_trl": 4.0, "more": 5.0}, options)
    assert json.loads((tmp_path / "performance-update.json").read_text())["more"] == 5.0


def test_which_texts_step_5_learns_from_is_measured_and_gone_on_with(settings, tmp_path, monkeypatch):
    study = loaded("step_5_texts", monkeypatch)
    settings |= {"preset": "recommended", "acceptance": {"enabled": False}}
    settings["reward"] = {"teachers": 2}
    run_local(Config.model_validate(settings), tmp_path / "run", tmp_path)
    kept, learned, learn = [], [], study.Study._learned

    def counted(self, upload, parts, training):
        learned.append((upload.client_id, training.epochs))
        if len(learned) == 6:
            raise KeyboardInterrupt
        return learn(self, upload, parts, training)

    monkeypatch.setattr(study, "keep", lambda name, figures: kept.append((name, figures)))
    monkeypatch.setattr(study.Study, "_learned", counted)
    trainings = ["--training", "1,1e-3,8", "--training", "2,1e-3,4"]
    monkeypatch.setattr(sys, "argv", ["step_5_texts.py", str(tmp_path / "run"), "--pool", "12", *trainings])
    with pytest.raises(KeyboardInterrupt):
        study.main()
    assert not kept
    study.main()
    assert len(learned) == 6 + 16 - 5  # two clients, four kinds of texts, two trainings; five were done
    ((name, figures),) = kept
    assert name == "step-5-texts-tiny"
    assert {"commit", "machine", "seed", "agreement"} <= set(figures)
    for row in figures["clients"].values():
        assert len(row) == 9
        assert all(0 <= value <= 1 for value in row.values())
    results = loaded("results", monkeypatch)
    assert "half of each, judged by the trained; 2 epochs in batches of 4, 0.001" in "\n".join(
        results.texts_section([figures])
    )
