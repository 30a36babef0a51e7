"""Model folders that are damaged, or made for something else."""

import logging
import shutil
from pathlib import Path

import pytest
import tomli_w
from conftest import TINY_AMOUNTS
from transformers import AutoModelForSequenceClassification

from crosslm.errors import ModelError
from crosslm.models import sources
from crosslm.runs.naming import next_free
from crosslm.runs.rundir import RunDir
from crosslm.support.quiet import quiet_libraries

AMOUNTS = [part for amount in TINY_AMOUNTS for part in ("--set", amount)]


def cut_short(folder, models, name):
    """A copy of a model whose weights end in the middle."""
    shutil.copytree(models / name, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:5000])
    return str(folder)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gpt2", lambda t, folder: t["llm"].update(model=folder), "llm.model '{}' cannot be loaded"),
        ("encoder", lambda t, folder: t["selection"].update(encoder=folder), "selection.encoder '{}' cannot be loaded"),
        (
            "bert",
            lambda t, folder: t["slm"].update(models=[{"model": folder}]),
            "SLM '{}' (slm.models, or a client's own) cannot be loaded as a sequence classifier",
        ),
    ],
)
def test_a_model_that_is_cut_short_is_named_and_leaves_nothing_in_the_way(
    shell, settings, models, tmp_path, monkeypatch, name, change, said
):
    monkeypatch.chdir(tmp_path)
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(tomli_w.dumps(settings))
    folder = cut_short(tmp_path / "cut", models, name)
    change(settings, folder)
    bad.write_text(tomli_w.dumps(settings))
    for output in ((), ("--output", "here")):
        code, out, err = shell("run", bad, *output)
        assert code == 2, out
        assert err.startswith(f"error: {said.format(folder)}"), err
        assert "Give a whole folder" in err
        assert "Traceback" not in err
    assert next_free(Path("runs"), "tiny") == Path("runs/tiny-1")
    RunDir.check_free(Path("here"))
    if name == "gpt2":  # once is enough: the folder is used by a run that can begin
        code, out, err = shell("run", good, *AMOUNTS)
        assert code == 0, err
        assert "runs/tiny-1" in out


def test_a_classifier_of_other_labels_gets_a_new_head_and_that_is_said(shell, settings, models, tmp_path, caplog):
    five = AutoModelForSequenceClassification.from_pretrained(models / "bert", num_labels=5)
    shutil.copytree(models / "bert", tmp_path / "five")
    five.save_pretrained(tmp_path / "five")
    settings["slm"]["models"] = [{"model": str(tmp_path / "five")}]
    path = tmp_path / "five.toml"
    path.write_text(tomli_w.dumps(settings))
    code, _, err = shell("run", path, *AMOUNTS, "--output", tmp_path / "run")
    assert code == 0, err
    said = [record.message for record in caplog.records if "gets a new head" in record.message]
    assert said == [f"SLM '{tmp_path / 'five'}' is a classifier of 5 labels and the task has 2: it gets a new head"]


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    class ConnectError(Exception):
        """As of the library that the hub's client uses: no OSError."""

    def refused(url):
        asked.append(url)
        raise ConnectError("Name or service not known")

    def downloads(*_):
        raise AssertionError("the slow way, with retries")

    monkeypatch.setattr(sources, "is_offline_mode", lambda: False)
    monkeypatch.setattr(sources, "get_hf_file_metadata", refused)
    monkeypatch.setattr(sources.AutoConfig, "from_pretrained", downloads)
    with pytest.raises(
        ModelError, match=r"llm.model = 'nobody/nothing': no such folder here, and not on the hub, or the hub cannot"
    ):
        sources.check_model("nobody/nothing", "llm.model")
    assert len(asked) == 1
    assert asked[0].endswith("nobody/nothing/resolve/main/config.json")


def test_the_hubs_retries_are_not_shown():
    quiet_libraries()
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


def test_an_encoder_that_cannot_pad_is_refused_before_anything_is_written(shell, workplace, models, tmp_path):
    """It can be loaded, and would end the run when the first texts have been written."""
    change = f"selection.encoder='{models / 'gpt2'}'"
    code, _, err = shell("run", workplace / "tickets.toml", "--set", change, "--output", tmp_path / "run")
    assert code == 2
    assert "cannot be loaded as a sentence transformer: ValueError: Asking to pad" in " ".join(err.split())
    assert not (tmp_path / "run" / "config.toml").exists()
