"""Model folders that are damaged, or made for something else."""

import logging
import re
import shutil
from pathlib import Path

import pytest
import tomli_w
from conftest import TINY_AMOUNTS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertJapaneseTokenizer

from crosslm.config import IntakeConfig, SLMSpec
from crosslm.errors import ModelError
from crosslm.federation.intake import Intake
from crosslm.models import sources
from crosslm.models.pretrained import untrained_state
from crosslm.models.slm import SLM
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


@pytest.fixture
def in_python(models, tmp_path):
    """A classifier whose tokenizer is code, as of Japanese BERT."""
    folder = tmp_path / "in_python"
    shutil.copytree(models / "bert", folder)
    words = AutoTokenizer.from_pretrained(models / "bert").get_vocab()
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)))
    BertJapaneseTokenizer(str(folder / "vocab.txt"), word_tokenizer_type="basic").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["doctor", "run"])
def test_a_tokenizer_that_cannot_travel_is_told_before_anybody_trains(shell, settings, in_python, tmp_path, command):
    settings["slm"]["models"] = [{"model": str(in_python)}]
    path = tmp_path / "in_python.toml"
    path.write_text(tomli_w.dumps(settings))
    code, out, err = shell(command, path, *(["--output", tmp_path / "run"] if command == "run" else []))
    assert code == 2
    said = " ".join((out + err).split())
    assert f"SLM '{in_python}': its tokenizer (BertJapaneseTokenizer) has no tokenizer.json" in said, said
    assert not (tmp_path / "run" / "config.toml").exists()
    with pytest.raises(ModelError, match="choose a model with a fast tokenizer"):
        SLM.load(str(in_python), ("bad", "good"), 32, 0)


@pytest.mark.parametrize("command", ["doctor", "run"])
def test_a_model_that_is_larger_than_an_upload_may_be_is_told_before_anybody_trains(
    shell, settings, models, tmp_path, command
):
    settings["intake"] = {"max_bytes": 1000}
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(settings))
    code, out, err = shell(command, path, *(["--output", tmp_path / "run"] if command == "run" else []))
    assert code == 2
    said = " ".join((out + err).split())
    assert "bytes as an upload, and at most 1000 are allowed; raise intake.max_bytes" in said, said
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_what_would_be_sent_is_known_without_the_weights(models, kind, pooling):
    if pooling and kind != "bert":
        return
    labels, spec = ("bad", "good"), SLMSpec(model=kind, num_hidden_layers=1, pooling=pooling)
    found = untrained_state(str(models / kind), spec, labels, 32)
    state = SLM.load(str(models / kind), labels, 32, 0, 1, pooling=pooling).to_state()
    assert found.architecture == state.architecture
    assert (found.tokenizer, found.labels, found.max_length) == (state.tokenizer, state.labels, state.max_length)
    shapes = [{name: (each.shape, each.dtype) for name, each in of.weights.items()} for of in (found, state)]
    assert shapes[0] == shapes[1]
    Intake(labels, IntakeConfig()).untrained(found, kind)


def test_a_tokenizer_that_would_be_refused_is_told_before(models, tmp_path):
    shutil.copytree(models / "bert", tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    tokenizer.add_tokens(["new"])  # and the model has no row for it
    tokenizer.save_pretrained(tmp_path / "more")
    found = untrained_state(str(tmp_path / "more"), SLMSpec(model="more"), ("bad", "good"), 32)
    with pytest.raises(ModelError, match=r"client north: SLM cannot be uploaded: its tokenizer's .* has the id"):
        Intake(("bad", "good"), IntakeConfig()).untrained(found, "client north: SLM")


def test_the_side_on_which_texts_are_cut_travels(models, tmp_path):
    shutil.copytree(models / "bert", tmp_path / "left")
    tokenizer = AutoTokenizer.from_pretrained(models / "bert", truncation_side="left")
    tokenizer.save_pretrained(tmp_path / "left")
    slm = SLM.load(str(tmp_path / "left"), ("bad", "good"), 8, 0)
    back = SLM.from_state(slm.to_state(), ("bad", "good"))  # before any text was read
    text = ["a good film and a bad room and a sad song and a walk"]
    assert back.encode(text) == slm.encode(text) != SLM.load(str(models / "bert"), ("bad", "good"), 8, 0).encode(text)


def test_an_encoder_of_parts_without_a_config_json_is_used(shell, settings, models, tmp_path):
    folder = tmp_path / "static"
    words = StaticEmbedding(Tokenizer.from_file(str(models / "bert" / "tokenizer.json")), embedding_dim=16)
    SentenceTransformer(modules=[words], device="cpu").save(str(folder))
    assert not (folder / "config.json").exists()
    settings["selection"]["encoder"] = str(folder)
    path = tmp_path / "static.toml"
    path.write_text(tomli_w.dumps(settings))
    code, out, err = shell("doctor", path)
    assert code == 0, out + err
    code, _, err = shell("run", path, *AMOUNTS, "--output", tmp_path / "run")
    assert code == 0, err
    with pytest.raises(ModelError, match=r"slm\.models = .*: no such model folder \(a config\.json must be in it\)"):
        sources.check_model(str(folder), "slm.models")
    with pytest.raises(ModelError, match=r"a config\.json or modules\.json must be in it\); give a folder"):
        sources.check_model(str(tmp_path / "none"), "selection.encoder")


def test_a_relative_path_is_told_with_where_it_was_looked_for(tmp_path, monkeypatch):
    """As of a run's configuration, which is used from another folder than the run was started in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    looked_for = f"must be in it), looked for as {tmp_path}/here/../models/gemma3, since relative paths are from where"
    with pytest.raises(ModelError, match=re.escape(looked_for)):
        sources.check_model("../models/gemma3", "llm.model")
