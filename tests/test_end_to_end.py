"""A whole run on tiny models: every artefact, every figure, and the commands that read them."""

import json
import tomllib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
from conftest import TASK
from markupsafe import escape
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from crosslm import experiment
from crosslm import server as server_module
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.errors import CollapseError
from crosslm.experiment import run_local
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.records import Upload
from crosslm.runs import reevaluate
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.journal import RunJournal
from crosslm.runs.naming import last_seeds, last_unfinished, next_free
from crosslm.runs.rundir import RunDir
from crosslm.support.progress import Progress
from crosslm.synthesis import synthesize


def numbers(summary):
    """What must be equal in two runs: all but times and sizes of memory."""
    return {name: value for name, value in summary.items() if name not in ("seconds", "peak_memory_bytes")}


def test_a_run_leaves_everything_that_is_promised(command, config_file, settings, models, tmp_path):
    folder = tmp_path / "run"
    code, out, err = command("run", config_file, "--output", folder)
    assert (code, err) == (0, "")
    assert "client client-0: 25 rows (bad " in out
    for words in ("Standalone", "Data-free KD", "CrossLM", "client-0", "client-1", "mean", "perplexity", "update LLM"):
        assert words in out

    summary = json.loads((folder / "summary.json").read_text())
    assert {"task", "preset", "seed", "versions", "seconds", "slm", "llm", "tokens_generated"} <= set(summary)
    for method in ("standalone", "data_free_kd", "crosslm"):
        values = summary["slm"][method]
        assert set(values) == {"client-0", "client-1", "mean"}
        assert values["mean"] == pytest.approx((values["client-0"] + values["client-1"]) / 2)
        assert all(0 <= value <= 1 for value in values.values())
    for measure in ("nlu_accuracy", "nlg_accuracy", "nlg_judge_accuracy", "perplexity"):
        assert set(summary["llm"][measure]) == {"before", "after"}
    assert (summary["device"], summary["slm_dtype"]) == ("cpu", {"private": "float32", "synthetic": "float32"})
    assert summary["llm"]["perplexity"]["before"] != summary["llm"]["perplexity"]["after"]
    assert {"generate", "update LLM", "select", "train judge", "total"} <= set(summary["seconds"])
    assert summary["tokens_generated"] > 0

    page = (Path(__file__).parents[1] / "docs" / "run_folder.md").read_text()
    unnamed = [path.name for path in folder.iterdir() if f"`{path.name}" not in page]
    assert unnamed == [".lock"]

    config = load(folder / "config.toml")
    assert config == load(config_file)

    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert [kinds.count(kind) for kind in ("upload", "update", "step", "llm")] == [2, 4, 2, 2]
    upload = next(event for event in events if event["event"] == "upload")
    assert sum(upload["class_counts"]) == 25
    assert upload["bytes"] == sum(tensor["bytes"] for tensor in upload["tensors"].values())

    pool = [json.loads(line) for line in (folder / "synthetic" / "step-0001-pool.jsonl").read_text().splitlines()]
    assert len(pool) == 12
    assert sorted(row["rank"] for row in pool) == list(range(1, 13))
    assert {"text", "label", "prompt", "seed", "reward", "diversity", "score", "rank", "kept", "completion_ids"} <= set(
        pool[0]
    )
    for row in pool:
        product = row["reward"] * row["diversity"]  # and with selection.llm_posterior at most that
        assert min(product, 0) - 1e-6 <= row["score"] <= max(product, 0) + 1e-6
        assert row["label"] in TASK["labels"]
        assert not row["kept"] or row["rank"] <= 6

    classify = pipeline("text-classification", model=str(folder / "slm" / "client-0"), device="cpu")
    assert classify("a good film.")[0]["label"] in TASK["labels"]
    types = {
        AutoModelForSequenceClassification.from_pretrained(folder / "slm" / c).config.model_type
        for c in ("client-0", "client-1")
    }
    assert types <= {"bert", "distilbert"}
    original = AutoModelForCausalLM.from_pretrained(models / "gpt2")
    adapter = PeftModel.from_pretrained(original, folder / "llm")
    assert any(parameter.abs().max() > 0 for name, parameter in adapter.named_parameters() if "lora_B" in name)

    # the commands that read a run
    code, out, _ = command("report", folder)
    assert code == 0
    assert f"{summary['slm']['crosslm']['mean']:.3f}" in out
    html = (folder / "report.html").read_text()
    assert all(words in html for words in (escape(pool[0]["text"]), "paired bootstrap", "<svg", "client-1, upload 1"))
    for method, clients in summary["confusion"].items():
        for client, ((a, b), (c, d)) in clients.items():
            assert (a + d) / (a + b + c + d) == pytest.approx(summary["slm"][method][client])
            assert a + b + c + d == summary["test_rows"][client]
    code, out, _ = command("evaluate", folder)
    assert code == 0
    again = dict(line.split() for line in out.splitlines() if line.startswith(("slm/", "llm/")))
    assert float(again["slm/accuracy/client-0"]) == pytest.approx(summary["slm"]["crosslm"]["client-0"], abs=1e-4)
    assert float(again["llm/nlu_accuracy"]) == pytest.approx(summary["llm"]["nlu_accuracy"]["after"], abs=1e-4)
    assert "llm/nlg_accuracy" not in again  # which in the summary is by other classifiers
    assert 0 <= float(again["llm/nlg_accuracy_returned"]) <= 1
    assert float(again["llm/perplexity"]) == pytest.approx(summary["llm"]["perplexity"]["after"], rel=1e-3)

    # its configuration is enough to repeat it
    repeated = run_local(config, tmp_path / "again", tmp_path)
    assert numbers(repeated) == numbers(summary)

    # and nothing is written over
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, _, err = command("run", config_file, "--output", folder)
    assert code == 2
    assert "holds another run already and nothing is written over; choose another --output" in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("family", "adapter", "preset"), [("gemma3", "lora", "paper"), ("llama", "full", "recommended")]
)
def test_other_families_presets_and_full_fine_tuning(settings, models, tmp_path, family, adapter, preset):
    settings["llm"] |= {"model": str(models / family), "adapter": adapter}
    settings |= {"preset": preset, "federation": {"participations": 2}}
    config = Config.model_validate(settings)
    summary = run_local(config, tmp_path / "run", tmp_path)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [(event["client_id"], event["client_round"]) for event in events if event["event"] == "upload"]
    assert sorted(rounds) == [("client-0", 0), ("client-0", 1), ("client-1", 0), ("client-1", 1)]
    assert summary["preset"] == preset
    measures = reevaluate.evaluate_run(reevaluate.RunDir(tmp_path / "run"), tmp_path)
    assert measures["llm/nlu_accuracy"] == pytest.approx(summary["llm"]["nlu_accuracy"]["after"])


def test_a_client_that_fails_is_an_event_of_the_run(config, tmp_path, monkeypatch):
    train = experiment.Client.train

    def fails(client):
        if client.id == "client-1":
            raise MemoryError("silo out of memory")
        return train(client)

    monkeypatch.setattr(experiment.Client, "train", fails)
    summary = run_local(config, tmp_path / "run", tmp_path)
    assert set(summary["slm"]["crosslm"]) == {"client-0", "mean"}
    assert "MemoryError: silo out of memory" in (tmp_path / "run" / "metrics.jsonl").read_text()


def broken(tables, change):
    change(tables)
    return tomli_w.dumps(tables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["llm"].update(model="/no/such/model"), "llm.model = '/no/such/model': no such model folder"),
        (
            lambda t: t["llm"].update(model="package:nothing"),
            "package:nothing is not a package that crosslm has a checksum for",
        ),
        (
            lambda t: t["llm"].update(model="nobody/no-such-model"),
            "llm.model = 'nobody/no-such-model': no such folder here, and not on the hub",
        ),
        (lambda t: t["slm"].update(models=[{"model": "./none"}]), "slm.models = './none': no such model folder"),
        (lambda t: t["selection"].update(encoder="./none"), "selection.encoder = './none': no such model folder"),
        (lambda t: t["data"].update(train="none.csv"), "none.csv: no such file"),
        (lambda t: t["data"].update(text_column="body"), "no column 'body'; its columns are: text, label"),
        (lambda t: t["data"].update(train="odd.csv"), "odd.csv: row 2 has the label 'fair'"),
        (lambda t: t["data"].update(train="zero.csv"), "zero.csv: is empty; it must begin with the names of its"),
        (lambda t: t["data"].update(train="header.csv"), "header.csv"),
        (
            lambda t: t["synthesis"].update(max_new_tokens=200),
            "are more than the 128 that llm.model reads; at most 1",
        ),
        (lambda t: t["evaluation"].update(perplexity_text="none.txt"), "none.txt: no such file"),
        (lambda t: t["evaluation"].update(perplexity_text="empty.txt"), "empty.txt: has no text"),
        (
            lambda t: t["evaluation"].update(perplexity_text="latin.txt"),
            "latin.txt: line 2 is not UTF-8; write the file",
        ),
        (lambda t: t["slm"]["models"][0].update(num_hidden_layers=9), "has 2 hidden layers; num_hidden_layers = 9"),
        (
            lambda t: t["slm"]["models"][0].update(
                model=t["slm"]["models"][0]["model"].replace("bert", "distilbert"), pooling="mean"
            ),
            ": pooling = 'mean' needs a model of the type bert, not distilbert",
        ),
        (
            lambda t: (
                t["slm"]["models"][0].update(model=t["slm"]["models"][0]["model"].replace("bert", "gpt2")),
                t.update(privacy={"epsilon": 8.0, "center": True}),
            ),
            ": privacy.center needs a head with a bias",
        ),
        (lambda t: t.update(device="cuda:99"), "device 'cuda:99' cannot be used"),
        (
            lambda t: t.update(device="gpu"),
            "device: must be auto, cpu, cuda, mps or xpu, or one of several, like cuda:1",
        ),
        (
            lambda t: t["llm"].update(model=t["llm"]["model"].replace("gpt2", "bert")),
            "bert' is an encoder (bert), which writes no text; choose",
        ),
        (
            lambda t: t["slm"]["models"][0].update(num_hidden_layers=30),
            "client client-0: SLM",
        ),
        (lambda t: t["evaluation"].update(perplexity_text="none.txt"), "or name another file in evaluation.perplexity"),
        (lambda t: t["data"].update(judge="none.csv"), "or name another file in data.judge"),
        (lambda t: t["data"].update(train="none.csv"), "or name another file in data.train"),
        (lambda t: t["data"].update(test="none.csv"), "or name another file in data.test"),
        (lambda t: t["llm"].update(vocabulary_texts=["none.txt"]), "or name another file in llm.vocabulary_texts"),
        (lambda t: t["gate"].update(public_texts="none.csv"), "or name another file in gate.public_texts"),
        (
            lambda t: (t["data"].pop("train"), t.update(clients=[{"id": "a", "train": "none.csv"}])),
            "or name another file in clients.a.train",
        ),
        (lambda t: t["llm"].update(sample=3), "unknown key llm.sample; did you mean 'samples'?"),
        (lambda t: t["task"]["verbalizer"].pop("good"), "verbalizer is missing for the label(s) ['good']"),
    ],
)
def test_bad_input_ends_with_code_2_before_anything_is_written_or_loaded(
    command, settings, tmp_path, monkeypatch, change, message
):
    def loaded(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LLM, "load", loaded)
    monkeypatch.setattr(SLM, "load", loaded)
    path = tmp_path / "bad.toml"
    (tmp_path / "data" / "empty.txt").write_text(" ")
    for name, rows in {"zero": "", "header": "text,label\n", "odd": "text,label\na film.,good\na film.,fair\n"}.items():
        (tmp_path / "data" / f"{name}.csv").write_text(rows)
    (tmp_path / "data" / "latin.txt").write_bytes("one\ncaf\xe9\n".encode("latin-1"))
    settings["slm"]["models"] = settings["slm"]["models"][:1]
    path.write_text(broken(settings, change))
    code, out, err = command("run", path, "--output", tmp_path / "run")
    assert code == 2, out
    assert message in err
    assert not (tmp_path / "run").exists()


def test_data_are_looked_for_where_data_dir_says(command, config_file, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    code, _, err = command("run", config_file, "--data-dir", elsewhere, "--output", tmp_path / "run")
    assert code == 2
    assert f"{elsewhere / 'test.csv'}: no such file" in err


def test_labels_that_the_next_word_cannot_tell_apart_end_with_code_2(command, settings, tmp_path):
    settings["task"]["verbalizer"] = {"bad": "good day", "good": "good"}
    path = tmp_path / "bad.toml"
    path.write_text(tomli_w.dumps(settings))
    code, _, err = command("run", path, "--output", tmp_path / "run")
    assert code == 2
    assert "start with the same token" in err
    assert not (tmp_path / "run").exists()


def test_a_silo_of_one_class_is_warned_of_and_goes_on(command, settings, data_folder, tmp_path):
    (data_folder / "one.csv").write_text("text,label\n" + "a good film.,good\n" * 12)
    settings["data"].pop("train")
    settings["clients"] = [{"id": "a", "train": "one.csv"}, {"id": "b", "train": "train.csv"}]
    path = tmp_path / "one.toml"
    path.write_text(tomli_w.dumps(settings))
    code, out, err = command("run", path, "--output", tmp_path / "run")
    assert code == 0, err
    assert "warning: client a: all 12 rows are 'good'" in out


@pytest.mark.parametrize("name", ["report", "evaluate"])
def test_a_folder_that_is_no_run_ends_with_code_2(command, tmp_path, name):
    folder = tmp_path / "my run"
    folder.mkdir()
    code, _, err = command(name, folder)
    assert code == 2
    assert "not a run folder" in err
    (folder / "config.toml").write_text("")
    code, _, err = command(name, folder)
    assert code == 2
    again = f"crosslm run '{folder}/config.toml' --output '{folder}' --resume"
    assert f"the run is not complete (it has no summary.json); go on with it: {again}" in err
    with RunDir(folder).locked():
        assert f"it is at work: crosslm watch '{folder}'" in command(name, folder)[2]
        (folder / "config.toml").unlink()
        assert "its run has not begun yet, models are being loaded; try again" in command(name, folder)[2]


@pytest.mark.parametrize("name", ["run", "demo", "evaluate", "report", "audit"])
def test_help_is_complete(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    options = {
        "run": ("--set", "--output", "--data-dir", "--cache-dir"),
        "demo": ("--quick", "--set", "--output", "--cache-dir"),
    }
    for option in (*options.get(name, ()), "--help"):
        assert option in out


def test_without_an_output_the_next_free_folder_is_taken(command, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-1").mkdir(parents=True)
    code, out, err = command("run", config_file, "--set", "llm.samples=4", "--set", "selection.pool=6")
    assert code == 0, err
    assert tomllib.loads((tmp_path / "runs" / "tiny-2" / "config.toml").read_text())["llm"]["samples"] == 4
    assert "runs/tiny-2" in out


def test_the_newest_run_is_the_one_with_the_highest_number_whichever_below_it_were_deleted(tmp_path):
    for name in ("tiny-2", "tiny-10", "tiny-3", "tiny-3-11", "tiny-x", "tiny-012", "other-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("")
    (tmp_path / "tiny-11").mkdir()
    (tmp_path / "tiny-11" / ".lock").write_text("")  # of a run that could not begin
    assert next_free(tmp_path, "tiny") == tmp_path / "tiny-11"
    assert last_unfinished(tmp_path, "tiny") == tmp_path / "tiny-10"
    assert last_seeds(tmp_path, "tiny") is None
    (tmp_path / "tiny-10" / "summary.json").write_text("")
    assert last_unfinished(tmp_path, "tiny") is None
    (tmp_path / "tiny-12" / "seed-0").mkdir(parents=True)
    (tmp_path / "tiny-12" / "seed-0" / "config.toml").write_text("")
    assert last_seeds(tmp_path, "tiny") == tmp_path / "tiny-12"
    for folder in (tmp_path / "none", tmp_path / "tiny-x"):
        assert next_free(folder, "tiny") == folder / "tiny-1"
        assert last_unfinished(folder, "tiny") is None


def test_an_upload_that_cannot_be_used_is_an_event_of_the_run(config, tmp_path, monkeypatch):
    train = experiment.Client.train

    def damaged(client):
        upload = train(client)
        if client.id == "client-1":
            for weight in upload.slm.weights.values():
                if weight.is_floating_point():
                    weight.fill_(float("nan"))
        return upload

    monkeypatch.setattr(experiment.Client, "train", damaged)
    summary = run_local(config, tmp_path / "run", tmp_path)
    assert set(summary["slm"]["crosslm"]) == {"client-0", "mean"}
    assert "client client-1: its weight" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_counts_in_a_clients_own_order_of_labels_are_the_tasks_in_the_run(models, config, task, tmp_path):
    slm = SLM.load(str(models / "bert"), tuple(reversed(task.labels)), 32, 0)
    journal = RunJournal(config, None, RunDir(tmp_path), None, SimpleNamespace(task=task), Progress())
    journal.accuracy["standalone"]["north"] = 0.5  # it has come before, and is not measured
    journal.uploaded(Upload("north", 1, (3, 7), {}, slm.to_state()))
    (event,) = RunDir(tmp_path).events()
    assert event["class_counts"] == [7, 3]


def test_an_llm_that_breaks_on_a_clients_rewards_is_an_event_of_the_run(config, tmp_path, monkeypatch):
    """The client is not served, the LLM stays as the one before left it, and the run goes on to its end."""
    calls = []

    def breaks_at_the_second_arrivals_pool(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise CollapseError("6 of 6 texts could not be written")
        return synthesize(*arguments)

    monkeypatch.setattr(server_module, "synthesize", breaks_at_the_second_arrivals_pool)
    summary = run_local(config, tmp_path / "run", tmp_path / "cache")
    run = RunDir.open(tmp_path / "run")
    first, second = [event["client_id"] for event in run.events() if event["event"] == "upload"]
    (failure,) = [event for event in run.events() if event["event"] == "failure"]
    assert failure["client"] == second
    assert failure["error"].startswith(f"BrokenLLMError: client {second}: with its rewards the LLM broke")
    assert set(summary["slm"]["crosslm"]) == {first, "mean"}
    kept = Checkpoints(run)
    assert kept.read(1)["adapter"] == kept.read(2)["adapter"] != kept.read(0)["adapter"]
    assert "LLM broke" in kept.read(2)["cause"]["reason"]


def test_without_judge_and_text_the_measures_are_there_and_empty(settings, tmp_path):
    settings["data"]["judge_rows"] = 0
    settings["evaluation"].pop("perplexity_text")
    summary = run_local(Config.model_validate(settings), tmp_path / "run", tmp_path)
    for name in ("nlg_judge_accuracy", "perplexity"):
        assert summary["llm"][name] == {"before": None, "after": None}


def test_a_damaged_run_ends_with_code_2(command, config_file, tmp_path):
    folder = tmp_path / "run"
    assert command("run", config_file, "--output", folder)[0] == 0
    (folder / "llm" / "adapter_config.json").unlink()
    code, _, err = command("evaluate", folder)
    assert code == 2
    assert "the adapter cannot be loaded" in err
    (folder / "summary.json").write_text("{")
    code, _, err = command("report", folder)
    assert code == 2
    assert "summary.json: damaged" in err


def test_a_folder_that_cannot_be_written_ends_with_code_2(command, config_file, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command("run", config_file, "--output", tmp_path / "file" / "run")
    assert code == 2
    assert "cannot be written" in err


class Count:
    """A display that adds up what each stage says it has done."""

    def __init__(self):
        self.stages = []

    @contextmanager
    def stage(self, title, total, unit):
        done = []
        yield done.append
        self.stages.append((title, total, sum(done), len(done)))

    def note(self, message):
        pass


@pytest.mark.parametrize("refused", [False, True])
def test_every_stage_tells_all_that_it_does(settings, tmp_path, refused):
    many = {"reward": {"teachers": 4}, "slm": settings["slm"] | {"soft_labels": True, "llm_judges": True}}
    # of so few texts the gate has no opinion; with a bound that nobody meets it refuses all
    gate = {
        "gate": {"enabled": True, "min_texts": 2, "margin": 0.49, "confidence": 0.51} if refused else {"min_texts": 999}
    }
    count = Count()
    run_local(Config.model_validate(settings | many | gate), tmp_path / "run", tmp_path / "cache", count)
    assert [stage for stage in count.stages if stage[1] != stage[2]] == []
    told = {title.split(":")[0] for title, *_ in count.stages}
    assert {"gate", "select", "generate", "evaluate"} <= told
    assert ("reward" in told) != refused
    several = [times for title, total, _, times in count.stages if title.startswith("select") and total > 20]
    assert min(several) > 1
