"""What classifiers reach without CrossLM: by hand, of a configuration and of a silo's kit."""

import statistics

import pytest
import torch
from of_federations import change

from crosslm.cli.baseline import advice
from crosslm.config import AcceptanceConfig, Config, PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.data.split import load_split
from crosslm.errors import ConfigError, DataError
from crosslm.federation.kits import SILO_FILE
from crosslm.federation.self_audit import baseline_of_silo
from crosslm.reproduce.work import ceiling, standalone
from crosslm.runs.baseline import baselines, logistic_regression, most_frequent, together
from crosslm.support.progress import Progress


class Places:
    """An encoder by which a text's vector is its number, and 1 beside it."""

    def encode(self, texts):
        return torch.tensor([[float(text), 1.0] for text in texts])


def share_right(digits):
    return digits.count("1") / len(digits)


def test_a_logistic_regression_by_hand():
    # rows at -2 and -1 are of label 0, those at 1 and 2 of label 1: by symmetry the border is at 0
    fitted = logistic_regression(Examples(["-2", "-1", "1", "2"], [0, 0, 1, 1]), Places())
    assert fitted(Examples(["-0.5", "0.5", "3", "-3"], [0, 1, 1, 0])) == 1.0
    assert fitted(Examples(["-0.5", "0.5", "3", "-3"], [0, 0, 1, 1])) == 0.5
    # of three rows and one, far apart on no side, most say label 0 everywhere; where labels count alike it is even
    few = Examples(["-1", "-1", "-1", "1"], [0, 0, 0, 1])
    near = Examples(["0.2"], [1])
    assert (logistic_regression(few, Places())(near), logistic_regression(few, Places(), True)(near)) == (0.0, 1.0)
    only = logistic_regression(Examples(["-2", "2"], [1, 1]), Places())  # nothing to regress
    assert only(Examples(["-2", "2", "3"], [0, 1, 1])) == pytest.approx(2 / 3)


def test_the_most_frequent_label_by_hand():
    assert most_frequent(Examples(["a", "b", "c"], [1, 0, 1])) == 1
    assert most_frequent(Examples(["a", "b"], [2, 1])) == 1  # of equals the first


def test_each_client_alone_and_all_together(settings, tmp_path):
    config, cache = Config.model_validate(settings), tmp_path / "cache"
    found, split = baselines(config, cache), load_split(config)
    alone, of_all = standalone(config, cache, Progress())["correct"], ceiling(config, cache, Progress())["correct"]
    assert list(found) == ["client-0", "client-1", "mean"]
    for client in ("client-0", "client-1"):
        row, private, test = found[client], split.private[client], split.tests[client]
        assert (row["rows"], row["test_rows"]) == (len(private), len(test))
        assert row["standalone"] == pytest.approx(share_right(alone[client]))  # what a run measures and
        assert row["slm_together"] == pytest.approx(share_right(of_all[client]))  # what the tables' ceiling is
        assert row["most_frequent"] == test.labels.count(most_frequent(private)) / len(test)
        assert 0 <= row["logistic"] <= 1
    assert found["client-0"]["logistic_together"] == found["client-1"]["logistic_together"]  # of the same test rows
    for key, mean in found["mean"].items():
        assert mean == statistics.fmean(found[client][key] for client in ("client-0", "client-1"))
    pooled = together(split.private)
    assert len(pooled) == sum(map(len, split.private.values()))
    assert sorted(pooled.texts) == sorted(text for rows in split.private.values() for text in rows.texts)


def test_the_command_has_a_table_and_says_what_there_is_to_gain(config_file, command, tmp_path):
    code, out, err = command("baseline", config_file, "--cache-dir", tmp_path / "cache")
    assert (code, err) == (0, "")
    assert "Accuracy on test text, without CrossLM" in out
    for name in ("client-0", "client-1", " mean ┃", "private rows", "Standalone: the", "one classifier, all"):
        assert name in out
    assert "One classifier on all rows together reaches " in out
    assert not (tmp_path / "runs").exists()


def test_one_client_has_nobody_to_be_together_with(settings, tmp_path):
    settings["data"] |= {"num_clients": 1}
    found = baselines(Config.model_validate(settings), tmp_path / "cache")
    assert "slm_together" not in found["client-0"]
    assert found["mean"]["standalone"] == found["client-0"]["standalone"]


@pytest.mark.parametrize(
    ("logistic", "more", "said"),
    [
        ((0.8, 0.6), {}, ["does better than the classifiers, by 10.0 points"]),
        ((0.6, 0.75), {}, ["by 5.0 points"]),
        ((0.6, 0.7), {}, []),
        ((0.6, 0.6), {"slm_together": 0.75}, ["reaches +5.0 points more"]),
        ((0.6, 0.6), {"slm_together": 0.69}, ["reaches -1.0 points more"]),
    ],
)
def test_what_the_figures_say(logistic, more, said):
    mean = {"logistic": logistic[0], "logistic_balanced": logistic[1], "standalone": 0.7} | more
    lines = advice({"north": mean, "mean": mean})
    assert len(lines) == len(said)
    assert all(words in line for words, line in zip(said, lines, strict=True))


def test_a_silo_finds_out_before_it_takes_part(silo, data_folder, command, monkeypatch, tmp_path):
    kit = silo.kit
    with pytest.raises(DataError, match=r"silo silo-0: has no rows to measure on: name a file as data\.test in silo"):
        baseline_of_silo(kit, tmp_path / "cache")
    test = str(data_folder / "test.csv")
    change(kit, data=silo.settings.data.model_copy(update={"test": test}))
    before = sorted(path for path in kit.rglob("*") if path.is_file())
    monkeypatch.setenv("CROSSLM_CACHE", str(tmp_path / "cache"))
    code, out, err = command("baseline", kit)
    assert (code, err) == (0, "")
    assert "silo-0" in out
    assert "mean ┃" not in out  # of one
    assert sorted(path for path in kit.rglob("*") if path.is_file()) == before
    change(kit, privacy=PrivacyConfig(epsilon=8.0), acceptance=AcceptanceConfig(enabled=False))
    found = baseline_of_silo(kit, tmp_path / "cache")["silo-0"]
    assert found["rows"] == len(silo.private())
    assert sorted(path for path in kit.rglob("*") if path.is_file()) == before  # no budget is spent
    code, _, err = command("baseline", kit, "--set", "seed=1")
    assert code == 2
    assert "--set and --data-dir are not for a kit; change its files" in err
    assert (kit / SILO_FILE).is_file()
    for folder in (kit.parent.parent, kit.parent.parent / "server"):
        code, _, err = command("baseline", folder)
        assert code == 2
        assert f"{folder}: is not a silo's kit; give one, which has a silo.toml, or a configuration" in err


def test_dp_without_opacus_is_said_before_anything_is_trained(settings, monkeypatch, tmp_path):
    monkeypatch.setattr("crosslm.runs.baseline.require_opacus", lambda: (_ for _ in ()).throw(ConfigError("opacus")))
    settings["privacy"] = {"epsilon": 8.0}
    with pytest.raises(ConfigError, match="opacus"):
        baselines(Config.model_validate(settings), tmp_path / "cache")
