"""What a run made opens in the tools that people have, and says what it is."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from crosslm.config_file import load
from crosslm.errors import ConfigError, RunError
from crosslm.runs import cards, export
from crosslm.runs.finished import Run


@pytest.fixture(scope="module")
def finished(workplace):
    return Run.open(workplace / "runs" / "tickets-1", workplace / "cache")


@pytest.fixture(scope="module")
def dest(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tickets"
    export.export_run(finished, folder, merged_llm=True)
    return folder


def test_everything_is_there(dest):
    assert sorted(str(path.relative_to(dest)) for path in dest.glob("**/README.md")) == [
        "llm-merged/README.md", "llm/README.md", "slm/north/README.md", "slm/south/README.md", "synthetic/README.md",
    ]  # fmt: skip
    assert [path.name for path in dest.parent.iterdir()] == ["tickets"]
    assert dest.stat().st_mode & 0o777 == 0o700


def test_the_classifier_opens_with_its_label_names(dest):
    classify = pipeline("text-classification", model=str(dest / "slm" / "north"), device="cpu")
    assert classify("a good film.")[0]["label"] in ("routine", "urgent")


def test_the_classifiers_card_states_data_preset_and_accuracy(dest, finished):
    card = ModelCard.load(dest / "slm" / "north" / "README.md")
    summary = finished.summary
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.eval_results[0].metric_value == pytest.approx(summary["slm"]["crosslm"]["north"], abs=1e-4)
    for words in (
        "| private training rows | routine 12, urgent 12 |",
        "| preset | recommended |",
        f"| private text only | {summary['slm']['standalone']['north']:.3f} |",
        f"| CrossLM (this model) | {summary['slm']['crosslm']['north']:.3f} |",
        f"On {summary['test_rows']['north']} test rows",
        f"{summary['clients']['north']['bytes_up']:,} bytes",
        "without differential privacy",
        "| base model | bert (a local folder) |",
    ):
        assert words in card.text, words
    learned = [event for event in events(finished) if event["event"] in ("step", "closing") and "selected" in event]
    chosen = [event for event in learned if event["client"] == "north" and event.get("accepted", True)][-1]
    assert f"| synthetic texts chosen for its last update | {chosen['selected']:.0f} |" in card.text


def events(finished):
    return [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]


def test_the_llms_card_states_measures_before_and_after(dest, finished):
    card = ModelCard.load(dest / "llm" / "README.md")
    measure = finished.summary["llm"]["nlu_accuracy"]
    assert card.data.library_name == "peft"
    assert f"| classifies test text right | {measure['before']:.3f} | {measure['after']:.3f} |" in card.text
    assert "LoRA of rank 16" in card.text
    assert '| urgent | `A request that cannot wait. The request reads: "` |' in card.text
    assert ModelCard.load(dest / "llm-merged" / "README.md").data.library_name == "transformers"


def test_the_merged_model_is_the_enhanced_one(dest, finished):
    merged = AutoModelForCausalLM.from_pretrained(dest / "llm-merged")
    tokenizer = AutoTokenizer.from_pretrained(dest / "llm-merged")
    llm = finished.llm()
    ids = torch.tensor([tokenizer.encode("a good film")])
    with torch.no_grad():
        after, expected = merged(ids).logits, llm.model(ids).logits
        with llm.model.disable_adapter():
            before = llm.model(ids).logits
    assert torch.allclose(after, expected, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-4)


def test_the_synthetic_text_opens_as_a_data_set(dest, finished, tmp_path):
    kept = load_dataset(str(dest / "synthetic"), split="train", cache_dir=str(tmp_path))  # the default part
    everything = load_dataset(str(dest / "synthetic"), "all", split="train", cache_dir=str(tmp_path))
    rows = finished.synthetic()
    assert len(everything) == len(rows)
    assert len(kept) == sum(bool(row.get("kept")) for row in rows)
    assert all(kept["kept"])
    names = everything.features["label"].names
    assert names == ["routine", "urgent"]
    for ours, theirs in zip(rows, everything, strict=True):
        assert names[theirs["label"]] == ours["label"]
        for column in ("text", "prompt", "source", "step", "client", "kept", "rank", "seed"):
            assert theirs[column] == ours.get(column), column
        for column in ("reward", "diversity", "score"):
            assert theirs[column] == (pytest.approx(ours[column], abs=1e-6) if column in ours else None)
    card = DatasetCard.load(dest / "synthetic" / "README.md")
    assert card.data.task_categories == ["text-classification"]
    assert f"| `all` | {len(rows)} |" in card.text
    for column in everything.column_names:
        assert f"`{column}`" in card.text, column


def test_no_folder_of_this_machine_is_given_away(dest, models):
    for path in dest.glob("**/*"):
        if path.is_file():
            assert str(models).encode() not in path.read_bytes(), path


def test_a_trimmed_tokenizer_stays_at_home(finished, tmp_path):
    llm = finished.config.llm.model_copy(update={"vocabulary_texts": ("words.txt",)})
    config = finished.config.model_copy(update={"llm": llm})
    trimmed = Run(finished.path, config, finished.summary, tmp_path)
    export.export_run(trimmed, tmp_path / "out", parts=["llm"])
    assert sorted(path.name for path in (tmp_path / "out" / "llm").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert "its own tokenizer" not in cards.llm_card(finished.config, finished.summary)
    assert "that model's own tokenizer" in cards.llm_card(config, finished.summary)
    assert "was trimmed" in cards.llm_card(config, finished.summary, merged=True)


def test_nothing_beside_the_new_folder_is_touched(shell, workplace, tmp_path, monkeypatch):
    run, cache = workplace / "runs" / "tickets-1", ("--part", "slm", "--cache-dir", workplace / "cache")
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    code, _, err = shell("export", run, ".", *cache)
    assert code == 2
    assert "error: .: is the folder that you are in; name a new one" in err
    monkeypatch.chdir(tmp_path)
    code, out, _ = shell("export", run, "out", *cache)
    assert code == 0
    assert out.startswith("out/slm/north: model\n")
    with monkeypatch.context() as patch:
        patch.setattr(export, "_copied", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.export_run(Run.open(run, workplace / "cache"), "other", parts=["slm"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    assert mine.read_text() == "mine"


def test_a_hub_id_and_a_package_are_named_as_they_are():
    config = load("paper_sst2")
    assert cards.shown(config.llm.model) == "openai-community/gpt2-large"
    package = load("sst2").llm.model
    assert cards.shown(package) == package
    assert cards.shown("/home/me/models/mine") == "mine (a local folder)"


def test_the_command_exports_what_is_asked_for_and_writes_over_nothing(shell, workplace, tmp_path):
    run, cache = workplace / "runs" / "tickets-1", ("--cache-dir", workplace / "cache")
    code, out, err = shell("export", run, tmp_path / "out", "--part", "synthetic", *cache)
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'out' / 'synthetic'}: dataset\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["synthetic"]
    code, _, err = shell("export", run, tmp_path / "out", *cache)
    assert code == 2
    assert "holds something already and nothing is written over" in err
    code, _, err = shell("export", run, tmp_path / "new", "--part", "data", *cache)
    assert code == 2
    assert "there is no part 'data' to export; the parts are: slm, llm, synthetic" in err
    assert not (tmp_path / "new").exists()


class Hub:
    """Stands for the hub: keeps what it is told, and a repository that is there as it is."""

    def __init__(self, refuses=None, private=None):
        self.calls = []
        self.refuses = refuses
        self.private = dict(private or {})

    def create_repo(self, name, repo_type, private, exist_ok):
        self.calls.append(("create", name, repo_type, private, exist_ok))
        self.private.setdefault(name, private)

    def repo_info(self, repo_id, repo_type):
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(self, repo_id, folder_path, repo_type):
        if repo_id == self.refuses:
            raise ConnectionError("no route")
        assert (Path(folder_path) / "README.md").is_file()
        self.calls.append(("upload", repo_id, repo_type))


def test_nothing_is_pushed_unless_asked_and_then_privately(shell, workplace, tmp_path, monkeypatch):
    run, hub = workplace / "runs" / "tickets-1", Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert shell("export", run, tmp_path / "one")[0] == 0
    assert hub.calls == []
    code, out, _ = shell("export", run, tmp_path / "two", "--push", "acme/tickets")
    assert code == 0
    names = [("slm-north", "model"), ("slm-south", "model"), ("llm", "model"), ("synthetic", "dataset")]
    assert hub.calls == [
        *(("create", f"acme/tickets-{name}", kind, True, True) for name, kind in names),
        *(("upload", f"acme/tickets-{name}", kind) for name, kind in names),
    ]
    assert "to acme/tickets-llm (private)" in out
    code, out, _ = shell("export", run, tmp_path / "three", "--part", "slm", "--push", "acme/open", "--public")
    assert ("create", "acme/open-slm-north", "model", False, True) in hub.calls
    assert "to acme/open-slm-north (public)" in out
    _, out, _ = shell("export", run, tmp_path / "four", "--part", "slm", "--push", "acme/tickets", "--public")
    assert "to acme/tickets-slm-north (private)" in out  # as it was


@pytest.mark.parametrize("said", [False, None])
def test_a_repository_that_is_there_and_not_private_gets_nothing_unless_that_is_asked_for(dest, monkeypatch, said):
    hub, news = Hub(private={"acme/tickets-b": said}), []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    exported = [export.Exported(dest / "slm" / "north", "a"), export.Exported(dest / "slm" / "south", "b")]
    with pytest.raises(
        RunError, match=r"acme/tickets-b: is there already and not private; nothing was .* add --public"
    ):
        export.push(exported, "acme/tickets")
    assert not [call for call in hub.calls if call[0] == "upload"]
    export.push(exported, "acme/tickets", public=True, on_news=news.append)
    assert [line[line.index("(") :] for line in news] == ["(private)", "(public)"]


def test_a_push_that_fails_says_what_is_done_and_what_to_do(finished, dest, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(refuses="acme/tickets-b"))
    exported = [export.Exported(dest / "slm" / "north", "a"), export.Exported(dest / "slm" / "south", "b")]
    with pytest.raises(RunError, match=r"acme/tickets-b: the hub .*no route\nRun hf auth login .*: acme/tickets-a"):
        export.push(exported, "acme/tickets")
    for wrong in ("tickets", "acme/my tickets", "/tickets", "a/b/c"):
        with pytest.raises(ConfigError, match="must look like OWNER/NAME"):
            export.push(exported, wrong)


def test_a_hub_that_does_not_answer_is_told_in_words(finished, dest, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_none"))
    with pytest.raises(RunError, match=r"acme/tickets-a: the hub cannot be reached or refuses: .*refused"):
        export.push([export.Exported(dest / "slm" / "north", "a")], "acme/tickets")


def test_the_calls_to_the_hub_are_those_of_its_library():
    import inspect

    for name, given in (
        ("create_repo", {"repo_id", "repo_type", "private", "exist_ok"}),
        ("repo_info", {"repo_id", "repo_type"}),
        ("upload_folder", {"repo_id", "folder_path", "repo_type"}),
    ):
        assert given <= set(inspect.signature(getattr(HfApi, name)).parameters)


def test_without_the_datasets_library_the_rest_can_be_had(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(export.DataError, match=r"pip install 'crosslm\[datasets\]', or leave .* --part slm --part llm"):
        export.export_run(finished, tmp_path / "out", merged_llm=True)
    assert not list(tmp_path.glob("out*"))  # it was found before anything was copied
    export.export_run(finished, tmp_path / "out", parts=["slm"])


def test_cards_say_which_guarantee_holds(finished):
    open_run, card = finished.summary, cards.llm_card(finished.config, finished.summary)
    assert "no privacy guarantee" in card
    clients = list(open_run["clients"])
    bounded = {**open_run, "privacy": {client: {"epsilon": 3.2, "delta": 1e-5} for client in clients}}
    assert f"{clients[0]}: 3.20 at delta 1e-05" in cards.llm_card(finished.config, bounded)
    assert "3.20 at delta" in cards.slm_card(clients[0], 1, finished.config, bounded)
    half = {**open_run, "privacy": {clients[0]: {"epsilon": 3.2, "delta": 1e-5}}}
    assert "without differential privacy for all of them: no" in cards.dataset_card(finished.config, {"all": 1}, half)
    returned = cards.slm_card(clients[0], 1, finished.config, half)  # the others' rows chose what it was taught
    assert "without differential privacy for all of them: no" in returned
    assert "3.20 at delta" in cards.slm_card(clients[0], 1, finished.config, half, own=True)
    assert "without differential privacy: no" in cards.slm_card(clients[0], 1, finished.config, open_run)


def test_a_card_has_no_words_of_an_error_from_a_client(finished):
    """They may tell of private rows, and a card is made to be given away."""
    client, summary = next(iter(finished.summary["clients"])), copy.deepcopy(finished.summary)
    told = "LeakError: 3 of 40 synthetic texts share more than 8 words in a row with a private text"
    summary["clients"][client]["decision"] = {"accepted": False, "refused": told}
    card = cards.slm_card(client, 1, finished.config, summary, own=True)
    assert "was refused there (LeakError)" in card
    assert "private text, at most" not in card
    assert "words in a row" not in card


def test_a_card_says_that_the_counts_of_rows_are_hidden(finished):
    client, summary = next(iter(finished.summary["clients"])), copy.deepcopy(finished.summary)
    assert "| private training rows | routine 12, urgent 12 |" in cards.slm_card(client, 1, finished.config, summary)
    summary["clients"][client]["rows"] = {"routine": 0, "urgent": 0}
    assert "| private training rows | hidden |" in cards.slm_card(client, 1, finished.config, summary)
