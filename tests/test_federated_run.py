"""What a run between machines leaves is read by the commands about finished runs, and equals a run in one process."""

import dataclasses
import io
import json
import random
import shutil
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BAD, GOOD, TASK, sentences
from made_run import write_run
from of_federations import MemoryGrid
from rich.console import Console
from test_tracking import Keeps

from crosslm import experiment
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.errors import ConfigError, FederationError, ModelError, QuarantineError, RunError, UploadError
from crosslm.experiment import run_local
from crosslm.federation.deployment import Deployment
from crosslm.federation.exchange import close, serve
from crosslm.federation.flower import server_app
from crosslm.federation.flower.exchange import FlowerExchange
from crosslm.federation.flower.payload import split
from crosslm.federation.flower.server_processes import ServerProcesses
from crosslm.federation.intake import Intake
from crosslm.federation.kits import ServerSettings, dump
from crosslm.federation.messages import decode_upload, encode
from crosslm.federation.provision import provision
from crosslm.federation.spool import ENDED, MOST_TRIES, Spool
from crosslm.federation.summary import _with_mean
from crosslm.html_report.collect import RunView
from crosslm.html_report.findings import findings
from crosslm.html_report.page import render
from crosslm.models.slm import SLM
from crosslm.runs import tracking
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.finished import Run
from crosslm.runs.preparation import measured_on
from crosslm.runs.rundir import RunDir
from crosslm.runs.snapshot import slm_bytes
from crosslm.runs.tracking import figures_of
from crosslm.runs.watch import watch

# Flower, after our package has told it to be quiet
from flwr.app import ConfigRecord, Message, RecordDict  # isort: skip

SILOS = ("silo-0", "silo-1")
AT_THE_SILO = "measured at the silo, not known here"


@pytest.fixture(scope="module")
def tables(models, tmp_path_factory):
    """The configuration of a tiny run with two clients and a gate that probes with public texts too."""
    folder = tmp_path_factory.mktemp("data")
    rows = [f'"{text}",{label}' for label, words in (("good", GOOD), ("bad", BAD)) for text in sentences(words)]
    random.Random(0).shuffle(rows)  # in order, every fourth has words of its own, which the others never see
    parts = {"silo-0": rows[::4], "silo-1": rows[1::4], "test": rows[2::4], "public": rows[3::4]}
    for name, part in parts.items():
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(part) + "\n")
    (folder / "plain.txt").write_text("a good day and a bad day. " * 20)
    fit = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "patience": 0}
    learned = fit | {"epochs": 20, "learning_rate": 3e-3}
    return {
        "name": "tiny",
        "device": "cpu",
        "task": TASK,
        "data": {"dir": str(folder), "test": "test.csv", "judge_rows": 0},
        "clients": [
            {"id": name, "train": f"{name}.csv", "model": str(models / model)}
            for name, model in zip(SILOS, ("bert", "distilbert"), strict=True)
        ],
        "slm": {"models": [{"model": str(models / "bert")}], "max_length": 32, "private": learned, "synthetic": fit}
        | {"weigh_judges": True},
        "llm": {"model": str(models / "gpt2"), "samples": 4, "batch_size": 4, "learning_rate": 1e-3, "lora_rank": 4},
        "synthesis": {"max_new_tokens": 12, "max_attempts": 100},
        "selection": {"pool": 8, "fraction": 0.5, "encoder": str(models / "encoder")},
        # what a model this small writes has no label: the silos are let in by the public texts, which outnumber it
        "gate": {"enabled": True, "min_texts": 1, "texts": 2, "confidence": 0.999, "max_share": 1.0}
        | {"public_texts": "public.csv"},
        "acceptance": {"enabled": False},
        "federation": {"closing": True},
        "evaluation": {"nlu_rows": 6, "nlg_samples": 10, "perplexity_text": "plain.txt", "perplexity_tokens": 100},
        "tracking": [],
    }


@pytest.fixture(scope="module")
def local(tables, tmp_path_factory):
    """A run in one process: its folder, and each upload as it came."""
    uploads, folder = [], tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        told = experiment.RunJournal.uploaded
        patch.setattr(experiment.RunJournal, "uploaded", lambda self, u: (uploads.append(encode(u)), told(self, u))[1])
        run_local(Config.model_validate(tables), folder / "run", folder / "cache")
    assert len(uploads) == 2
    return folder / "run", uploads


def federation(kit, tables, uploads, silos=SILOS, data=None):
    """The server's part of a federation over these uploads, in a kit; gives the deployment."""
    kit.mkdir(parents=True)
    (kit / "server.toml").write_text("")
    changes = {"data": tables["data"] | {"dir": str(data)}} if data else {}
    config = Config.model_validate(
        tables | changes | {"federation": {"arrivals": len(uploads) or None, "deadline_minutes": 5.0, "closing": True}}
    )
    spool = Spool(kit / "spool")
    exchange = FlowerExchange(
        None, spool, "tiny-1", list(silos), config.federation, Intake(TASK["labels"], config.intake)
    )
    with Deployment.open(kit / "run", config, kit / "cache", exchange.refuse, spool) as deployment:
        for upload in uploads:
            spool.put(decode_upload(upload).client_id, 0, [upload])
        if uploads:
            serve(exchange, deployment.server, deployment, exchange.finished)
            close(exchange, deployment.server, deployment, exchange.finished)
        yield deployment
        deployment.complete(exchange.silos)
    spool.close()


@pytest.fixture(scope="module")
def seeing(tables, local, tmp_path_factory):
    """The run folder of a federation over the same uploads, whose server has test rows."""
    kit = tmp_path_factory.mktemp("seeing") / "kit"
    for deployment in federation(kit, tables, local[1]):
        for silo in SILOS:
            deployment.spool.delivered(silo, 0)
            deployment.spool.closed(silo, "delivered")
    return kit / "run"


@pytest.fixture(scope="module")
def blind(tables, local, tmp_path_factory):
    """One whose server has no test rows, with an upload that is none, a silo that never sends, and one that is gone."""
    kit = tmp_path_factory.mktemp("blind") / "kit"
    empty = kit.parent / "empty"
    empty.mkdir()
    shutil.copy(Path(tables["data"]["dir"]) / "public.csv", empty)
    for deployment in federation(kit, tables, local[1], (*SILOS, "late", "odd"), empty):
        deployment.spool.put("odd", 0, [b"no upload"])
        deployment.spool.refuse("odd", 0, "client odd: its header claims too much")
        deployment.spool.note("silo/late", "1 no answer in time; asked again in 60 s")
        deployment.spool.delivered(SILOS[0], 0)
        deployment.spool.closed(SILOS[0], "delivered")
    return kit / "run"


def events(folder, kind):
    return [
        {name: value for name, value in event.items() if name not in ("time", "slm/data_free_kd", "round")}
        for event in RunDir(folder).events()
        if event["event"] == kind
    ]


def text_of(page):
    import re

    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_the_same_arrivals_give_the_same_figures_as_in_one_process(local, seeing):
    """The gate's too: both probe with the first texts that the original LLM wrote."""
    (gate, *_), steps = events(local[0], "gate"), events(local[0], "step")
    assert {"texts", "auc"} <= set(gate)
    assert len(steps) == 2
    for kind in ("gate", "update", "step", "test", "llm"):
        expected = [event for event in events(local[0], kind) if event.get("method") != "data_free_kd"]
        assert events(seeing, kind) == expected, kind
    for name in ("base", "final", "step-0001-pool", "step-0002-drafts-0"):
        path = f"synthetic/{name}.jsonl"
        assert (seeing / path).read_bytes() == (local[0] / path).read_bytes()
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (local[0], seeing))
    assert set(one) - {"inputs"} < set(two)  # no server has read all text
    same = (
        "task",
        "preset",
        "seed",
        "llm",
        "tokens_generated",
        "texts_removed",
        "nlu_rows",
        "test_rows",
        "judge_accuracy",
    )
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    for method in ("standalone", "crosslm"):
        assert one["slm"][method] == pytest.approx(two["slm"][method])
        assert one["confusion"][method] == two["confusion"][method]
    assert set(two["slm"]["data_free_kd"].values()) == {None}
    assert {name: facts["rows"] for name, facts in one["clients"].items()} == {
        name: facts["rows"] for name, facts in two["clients"].items()
    }
    assert all(facts["bytes_up"] > 0 and facts["bytes_down"] > 0 for facts in two["clients"].values())


def test_without_test_rows_nothing_is_made_up(blind, local):
    summary = RunDir.open(blind).summary()
    assert set(summary["slm"]) == {"standalone", "data_free_kd", "crosslm"}
    assert {value for method in summary["slm"].values() for value in method.values()} == {None}
    assert summary["llm"]["nlu_accuracy"] == summary["llm"]["perplexity"] == {"before": None, "after": None}
    with_rows = RunDir.open(local[0]).summary()
    for name in ("nlg_accuracy", "distinct_2"):  # that needs no text of anybody
        assert summary["llm"][name] == with_rows["llm"][name]
    assert summary["not_delivered"] == ["silo-1"]
    assert summary["not_uploaded"] == {"late": "no answer in time; asked again in 60 s"}
    assert [arrival["state"] for arrival in summary["arrivals"]].count("refused") == 1


def test_a_mean_is_that_of_all_who_were_served_or_none():
    assert _with_mean(["a", "b"], {"a": 0.5, "b": 1.0, "c": 0.0}) == {"a": 0.5, "b": 1.0, "mean": 0.75}
    assert _with_mean(["a", "b"], {"a": 0.5}) == {"a": 0.5, "b": None, "mean": None}


def test_the_report_says_what_is_known_and_what_is_not(blind, shell):
    code, out, err = shell("report", blind)
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    for words in (
        f"Accuracy of the silos' SLMs: {AT_THE_SILO}",
        "late never uploaded (no answer in time; asked again in 60 s).",
        "silo-1 has not taken its enhanced SLM.",
        "Uploads in the order of their arrival (UTC)",
        "no silo says that it trained with DP-SGD",
    ):
        assert words in said, words
    assert max(map(len, out.replace(str(blind), "").splitlines())) <= 80
    page = (blind / "report.html").read_text()
    text = text_of(page)
    for words in (
        f"Accuracy of the silos' SLMs: {AT_THE_SILO}".replace("'", "&#39;"),
        "Who uploaded when, in UTC",
        "What the gate found of each upload",
        "refused: client odd: its header claims too much",
        "Each silo keeps a receipt of every upload.",
        "a classifier of the type bert",
    ):
        assert words in text, words
    assert "earlier version" not in text
    view = RunView.read(RunDir.open(blind))
    assert [finding.title for finding in findings(view) if finding.level == "failure"] == [
        "the upload of odd, round 0, was refused"
    ]
    assert len(view.samples) == 16  # receipts of both pools
    arrival = view.arrivals[0]
    assert {"reward/drafts", "reward/pool", "diversity/pool"} <= set(arrival.measures)
    assert arrival.mean("kl_loss") is not None


def test_with_test_rows_the_report_has_them(seeing, shell):
    code, out, _ = shell("report", seeing)
    assert code == 0
    assert "SLM accuracy on test text" in out
    assert "Accuracies are of the server's test rows" in " ".join(out.split())
    view = RunView.read(RunDir.open(seeing))
    assert set(view.gains) == {*SILOS, "mean"}
    page = text_of((seeing / "report.html").read_text())
    assert "Data-free KD was not run" in page
    assert "Mean accuracy of the SLMs" in page


def test_a_run_between_machines_beside_one_in_one_process(blind, local, tmp_path):
    page = render([RunView.read(RunDir.open(folder)) for folder in (local[0], blind)])
    assert AT_THE_SILO in page
    other = render([RunView.read(RunDir.open(folder)) for folder in (blind, write_run(tmp_path / "made"))])
    assert "Who uploaded when" in other


def test_watch_tells_the_steps_without_accuracies(blind, seeing):
    for folder, moved in ((blind, ", reward"), (seeing, " -> ")):
        console = Console(file=io.StringIO(), width=200)
        assert watch(RunDir.open(folder), console)
        lines = console.file.getvalue().splitlines()
        assert lines[0] == "started; silos come when they are ready"
        (first,) = [line for line in lines if line.startswith("step 1: ")]
        assert moved in first
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    assert watch(RunDir.open(blind), console)
    assert "│          – │       – │" in console.file.getvalue()


def test_the_command_watch_ends_with_the_report(blind, shell):
    code, out, _ = shell("watch", blind)
    assert code == 0
    assert AT_THE_SILO in " ".join(out.split())


def test_its_llm_writes_and_its_classifiers_classify(blind, shell):
    code, out, err = shell("generate", blind, "-n", 2, "--label", "good")
    assert code == 0, err
    assert [json.loads(line)["label"] for line in out.splitlines()] == ["good", "good"]
    code, out, err = shell("predict", blind, "--client", "silo-1", stdin="a good day\n")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("a good day,")


def test_everything_is_exported_with_cards(blind, shell, tmp_path):
    code, out, err = shell("export", blind, tmp_path / "out", "--merged-llm")
    assert (code, err) == (0, "")
    names = [line.rsplit(": ", 1)[0].removeprefix(f"{tmp_path / 'out'}/") for line in out.splitlines()]
    assert names == ["slm/silo-0", "slm/silo-1", "llm", "llm-merged", "synthetic"]
    card = (tmp_path / "out" / "slm" / "silo-0" / "README.md").read_text()
    assert "Measured at the silo, not known to the server that wrote this card." in card
    assert "of the type bert; its name is known at the silo" in card
    assert "model-index" not in card
    for name in ("llm", "synthetic"):
        assert "no privacy guarantee" in (tmp_path / "out" / name / "README.md").read_text()
    assert {row["source"] for row in Run.open(blind).synthetic()} == {"base", "drafts", "pool", "closing", "final"}


def test_evaluate_measures_what_the_files_allow(blind, seeing, shell):
    code, out, err = shell("evaluate", blind)
    assert code == 0, err
    assert "llm/nlg_accuracy" in out
    assert "test.csv: not here; accuracies on test rows are left out" in " ".join(out.split())
    assert "slm/accuracy" not in out
    code, out, err = shell("evaluate", seeing)
    assert code == 0, err
    expected = RunDir.open(seeing).summary()
    found = dict(line.split() for line in out.splitlines() if line.startswith(("slm/", "llm/")))
    assert float(found["slm/accuracy/silo-0"]) == pytest.approx(expected["slm"]["crosslm"]["silo-0"], abs=1e-4)
    assert float(found["llm/nlu_accuracy"]) == pytest.approx(expected["llm"]["nlu_accuracy"]["after"], abs=1e-4)


@pytest.mark.parametrize(
    "command", [("audit",), ("rollback", "--client", "silo-0"), ("run", "config.toml", "--resume", "--output")]
)
def test_what_needs_private_rows_is_refused_in_words(blind, shell, command):
    name, *options = command
    options = [str(blind / option) if option == "config.toml" else option for option in options]
    given = [name, *options, blind] if name == "run" else [name, blind, *options]
    code, _, err = shell(*given)
    assert code == 2
    assert "is of a run between machines and cannot be" in err
    assert "at the silos" in err


def test_a_kit_and_a_run_that_goes_on_are_told_from_a_finished_run(blind, tmp_path, shell):
    with pytest.raises(RunError, match=r"is a server's kit; its run folder is .*kit/run: give that"):
        RunDir.open(blind.parent)
    folder = tmp_path / "kit" / "run"
    folder.mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl"):
        shutil.copy(blind / name, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')  # it is being written
    with pytest.raises(RunError, match=r"not complete .*crosslm server .*kit, and see with crosslm status"):
        RunDir.open(folder).summary()
    code, out, _ = shell("status", folder)
    assert code == 0
    assert "crosslm run" not in out
    assert f"crosslm status {folder.parent}" in out.replace("\n", "")


def test_a_server_keeps_as_much_as_docs_deploy_says(seeing):
    """Of two silos with one upload each and a last return: U of ``How large`` is each one's own."""
    spool = Spool(seeing.parent / "spool")
    uploads = [arrival.bytes for arrival in spool.arrivals()]
    spool.close()
    kept = sum(path.stat().st_size for path in (seeing.parent / "spool").glob("*.safetensors"))
    assert kept == pytest.approx(sum(uploads) * (2 * 1 + 1), rel=0.05)
    checkpoints = Checkpoints(RunDir(seeing))
    records = [checkpoints.read(number) for number in checkpoints.numbers()]
    assert len(records) == 2 * 1 + 1
    adapters = [len(checkpoints.get(record["adapter"])) for record in records]
    assert len(set(adapters)) == 1
    assert (seeing / "llm" / "adapter_model.safetensors").stat().st_size == pytest.approx(adapters[0], rel=0.25)
    for record, size in zip(records[1:], uploads, strict=True):
        assert len(checkpoints.get(record["state"]["optimizer"])) == pytest.approx(2 * adapters[0], rel=0.25)  # headers
        assert len(checkpoints.get(record["state"]["download"])) == pytest.approx(size, rel=0.05)
    classifiers = [path.stat().st_size for path in (seeing / "slm").glob("*/model.safetensors")]
    assert len(classifiers) == len(uploads)
    assert sum(classifiers) < sum(uploads)  # which have a tokenizer and fields beside the weights


def test_when_a_run_is_over_nothing_needs_the_uploads_the_downloads_or_the_checkpoints(blind, tmp_path, shell):
    """As docs/privacy.md says of what may be deleted."""
    kit = tmp_path / "kit"
    shutil.copytree(blind.parent, kit)
    (kit / "server.toml").write_text(dump(ServerSettings(experiment="tiny-1", address="localhost:9400")))
    spool = Spool(kit / "spool")
    spool.note("finished", "")
    spool.close()
    gone = list((kit / "spool").glob("*.safetensors"))
    assert len(gone) == 3 + 2 + 2  # uploads, one of which is none; what two silos got, and what they got in the end
    for path in gone:
        path.unlink()
    shutil.rmtree(kit / "run" / "checkpoints")
    _, out, _ = shell("status", kit)
    assert out.startswith("tiny-1 at localhost:9400: complete")
    assert next(line.split()[:3] for line in out.splitlines() if "silo-0" in line) == ["silo-0", "0", "delivered"]
    assert "complete, 0 arrivals done" in shell("status", kit / "run")[1]
    for command in (("report",), ("evaluate",), ("generate", "-n", 1), ("predict", "--client", "silo-1")):
        code, _, err = shell(command[0], kit / "run", *command[1:], stdin="a good day\n")
        assert code == 0, err
    code, _, err = shell("export", kit / "run", tmp_path / "out")
    assert (code, err) == (0, "")
    for name in ("server.crt", "server.key", "ca.crt"):
        (kit / name).write_text("")
    assert ServerProcesses(kit, print).spool.fact("finished") == ""  # by which crosslm server asks nobody again


def test_a_quarantined_upload_is_an_event_with_its_figures(tables, local, tmp_path):
    upload = decode_upload(local[1][0])
    for deployment in federation(tmp_path / "kit", tables, []):
        deployment.spool.put(upload.client_id, 0, [local[1][0]])
        deployment.refused(upload, QuarantineError("client silo-0: quarantined: no good", {"auc": 0.4, "texts": 8.0}))
    (gate,) = events(tmp_path / "kit" / "run", "gate")
    assert (gate["passed"], gate["auc"]) == (False, 0.4)
    view = RunView.read(RunDir.open(tmp_path / "kit" / "run"))
    failures = [finding for finding in findings(view) if finding.level == "failure"]
    assert len(failures) == 1  # by the event, and not again by the spool's journal
    assert "quarantined" in failures[0].title
    page = text_of(render([view]))
    assert "quarantined" in page
    assert "No silo was served." in page
    assert Run.open(tmp_path / "kit" / "run").clients == ()


def test_an_upload_that_fails_on_a_test_row_is_refused_in_every_round(tables, local, tmp_path, monkeypatch):
    upload, spared = decode_upload(local[1][0]), []
    real = SLM.predict_proba

    def breaks(slm, texts, *_):
        if spared and list(texts) == spared[0].test.texts:
            raise IndexError("index out of range")
        return real(slm, texts)

    monkeypatch.setattr(SLM, "predict_proba", breaks)
    for deployment in federation(tmp_path / "kit", tables, []):
        spool = deployment.spool
        for number in (0, 1):
            spool.put(upload.client_id, number, [encode(dataclasses.replace(upload, client_round=number))])
        spool.next()
        spared.append(deployment)
        with pytest.raises(UploadError, match="cannot classify: IndexError"):
            deployment.uploaded(upload)
        spared.clear()
        deployment.uploaded(upload)
        download, record = deployment.server.step(upload)
        deployment.served(upload, download, record)
        spool.serve(upload.client_id, 0, encode(download))
        spool.next()
        spared.append(deployment)
        with pytest.raises(UploadError, match="cannot classify: IndexError"):
            deployment.uploaded(dataclasses.replace(upload, client_round=1))
        spared.clear()


def test_who_has_no_say_is_served_and_is_no_measure_of_the_llm(tables, local, tmp_path):
    upload = dataclasses.replace(decode_upload(local[1][0]), class_counts=(0, 10))
    for deployment in federation(tmp_path / "kit", tables, []):
        spool, before = deployment.spool, deployment.server.llm.fingerprint()
        spool.put(upload.client_id, 0, [encode(upload)])
        spool.next()
        deployment.uploaded(upload)
        download, record = deployment.server.step(upload)
        deployment.served(upload, download, record)
        spool.serve(upload.client_id, 0, encode(download))
        assert (spool.counted(), spool.of(upload.client_id)[0].state) == (0, "served")
        assert deployment.server.llm.fingerprint() == before
        assert not list(deployment._first_uploads())
        last = deployment.checkpoints.last()
        assert (last["cause"]["outcome"], last["state"]["taught"]) == ("taught", 1)
    (gate,), (step,) = (events(tmp_path / "kit" / "run", name) for name in ("gate", "step"))
    assert (gate["passed"], gate["step"], step["no_say"]) == (False, 1, 1.0)
    assert "all its rows are" in gate["reason"]
    assert json.loads((tmp_path / "kit" / "run" / "summary.json").read_text())["no_say"] == [upload.client_id]


def test_who_is_refused_first_and_served_later_is_measured_as_it_was_when_it_was_served(tables, local, tmp_path):
    """As in one process: Standalone, and who judges the LLM in the end, are of the upload that was served first."""
    good = dataclasses.replace(decode_upload(local[1][0]), client_round=1)
    turned = {name: -weight if "classifier" in name else weight for name, weight in good.slm.weights.items()}
    bad = dataclasses.replace(good, client_round=0, slm=dataclasses.replace(good.slm, weights=turned))
    for deployment in federation(tmp_path / "kit", tables, []):
        spool = deployment.spool
        deployment._refuse = lambda silo, number, error, spool=spool: spool.refuse(silo, number, str(error))
        for upload in (bad, good):
            spool.put(upload.client_id, upload.client_round, [encode(upload)])
            spool.next()
            deployment.uploaded(upload)
            if upload is bad:
                deployment.refused(upload, QuarantineError("quarantined: no good", {"auc": 0.4}))
        download, record = deployment.server.step(good)
        deployment.served(good, download, record)
        spool.serve(good.client_id, 1, encode(download))
        ((silo, judge),) = deployment._first_uploads()
        assert (silo, slm_bytes(judge.to_state())) == (good.client_id, slm_bytes(good.slm))
    run = RunDir.open(tmp_path / "kit" / "run")
    refused, served = (right.count("1") / len(right) for right in standalone_of(run))
    assert run.summary()["slm"]["standalone"][good.client_id] == served != refused


def standalone_of(run):
    """Which test rows the uploads got right before the LLM helped them."""
    return [event["right"] for event in run.events() if event.get("method") == "standalone"]


def test_verbalizers_that_cannot_be_told_apart_are_found_before_anybody_is_asked(tables, tmp_path):
    alike = {**tables, "task": {**TASK, "verbalizer": {"good": "day good", "bad": "day bad"}}}
    with pytest.raises(ConfigError, match="start with the same token"):
        next(iter(federation(tmp_path / "kit", alike, [])))
    assert not (tmp_path / "kit" / "run" / "checkpoints").exists()


def test_what_was_refused_is_still_known_after_a_restart(tables, local, tmp_path):
    """The figures of a quarantined upload too, which the spool's journal has not; and nothing is done again."""
    kit, (first, second) = tmp_path / "kit", map(decode_upload, local[1])
    server = federation(kit, tables, [])
    before = next(server)
    spool, again = before.spool, []
    for upload, data in zip((first, second), local[1], strict=True):
        spool.put(upload.client_id, 0, [data])
        spool.next()
        before._refuse = lambda *_: None  # it is killed before the journal is told
        before.refused(upload, QuarantineError("quarantined: no good", {"auc": 0.4}))
    before.failed("silo-2", "round 0: failed upload: its reply has no message")
    RunDir(kit / "run").event("note", message="cut off")
    config = before.config
    deployment = Deployment.open(kit / "run", config, kit / "cache", lambda *given: again.append(given), spool)
    assert [(gate["client"], gate["auc"]) for gate in events(kit / "run", "gate")] == [
        (first.client_id, 0.4),
        (second.client_id, 0.4),
    ]
    assert [event["client"] for event in events(kit / "run", "failure")] == ["silo-2"]
    assert not [event for event in events(kit / "run", "note") if event["message"] == "cut off"]
    assert [(silo, number) for silo, number, _ in again] == [(first.client_id, 0)]  # the second was not yet begun
    assert [error.told for *_, error in again] == [
        "the gate has quarantined it"
    ]  # its silo hears no figures now either
    assert deployment.server.steps == 0
    server.close()


def test_a_mistake_that_stopped_the_first_start_can_be_mended(tables, tmp_path):
    kit, config = tmp_path / "kit", Config.model_validate(tables | {"federation": {"closing": False}})
    wrong = config.model_copy(update={"task": config.task.model_copy(update={"verbalizer": {"bad": "a", "good": "a"}})})
    (kit / "spool").mkdir(parents=True)
    spool = Spool(kit / "spool")
    with pytest.raises(ConfigError, match="verbalizer"):
        Deployment.open(kit / "run", wrong, kit / "cache", lambda *_: None, spool)
    Deployment.open(kit / "run", config, kit / "cache", lambda *_: None, spool)
    assert load(kit / "run" / "config.toml").task == config.task
    spool.close()


@pytest.fixture
def server(tables, local, tmp_path):
    """Spool, exchange and what opens the run of a server that has the uploads and has done nothing yet."""
    kit, config = tmp_path / "kit", Config.model_validate(tables)
    kit.mkdir()
    spool = Spool(kit / "spool")
    for upload in local[1]:
        spool.put(decode_upload(upload).client_id, 0, [upload])
    intake = Intake(TASK["labels"], config.intake)
    exchange = FlowerExchange(None, spool, "tiny-1", list(SILOS), config.federation, intake)
    yield spool, exchange, lambda: Deployment.open(kit / "run", config, kit / "cache", exchange.refuse, spool)
    spool.close()


def test_what_was_trained_when_the_server_died_is_sent_and_not_trained_again(server, monkeypatch):
    spool, exchange, opened = server
    trained = []

    def dies(download, closing=False):
        trained.append(encode(download))
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, opened() as deployment:
        patched.setattr(exchange, "send", dies)
        with pytest.raises(RuntimeError, match="killed"):
            serve(exchange, deployment.server, deployment, exchange.finished)
    assert [arrival.state for arrival in spool.arrivals()] == ["processing", "received"]
    with opened() as deployment:
        first, second = spool.arrivals()
        assert (first.state, second.state) == ("served", "received")
        assert b"".join(spool.download(first)) == trained[0]
        serve(exchange, deployment.server, deployment, lambda: deployment.server.steps == 2)
        assert [event["client"] for event in events(deployment.run.path, "step")] == [first.silo, second.silo]
    assert [arrival.state for arrival in spool.arrivals()] == ["served", "served"]


def test_an_earlier_run_folder_has_what_it_lacks_served_again(server, tmp_path):
    spool, exchange, opened = server
    with opened() as deployment:
        serve(exchange, deployment.server, deployment, lambda: deployment.server.steps == 1)
        path = deployment.run.path
        shutil.copytree(path, tmp_path / "earlier")
        serve(exchange, deployment.server, deployment, lambda: deployment.server.steps == 2)
    first, second = spool.arrivals()
    spool.delivered(second.silo, 0)
    spool.no_say(second.silo, 0)  # as the gate found it then
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "earlier", path)
    with opened() as deployment:
        assert [arrival.state for arrival in spool.arrivals()] == ["served", "received"]
        assert spool.complete(second.silo) == 1  # it has what it got
        assert not spool.has_no_say(second.silo, 0)
        spool.delivered(second.silo, 0)  # a yes that was on its way
        assert [arrival.state for arrival in spool.waiting()] == ["received"]
        (warning,) = events(path, "warning")
        assert f"without the uploads of {second.silo} (round 0): they are served again" in warning["message"]
        serve(exchange, deployment.server, deployment, lambda: deployment.server.steps == 2)
    assert [event["client"] for event in events(path, "step")] == [first.silo, second.silo]
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "earlier", path)
    spool.note(ENDED, "1")
    with pytest.raises(
        FederationError, match=rf"does not have the last uploads that were served: {second.silo} \(roun"
    ):
        opened()
    assert [arrival.state for arrival in spool.arrivals()] == ["served", "served"]
    spool.note(ENDED, "")
    spool._journal.write("DELETE FROM facts WHERE name = ?", ENDED)
    shutil.rmtree(path)  # and with no run folder at all
    with opened():
        assert [arrival.state for arrival in spool.arrivals()] == ["received", "received"]


def test_a_checkpoint_of_which_only_the_adapter_is_kept_is_none_to_go_on_from(server, monkeypatch):
    _, exchange, opened = server
    with opened() as deployment:
        serve(exchange, deployment.server, deployment, lambda: deployment.server.steps == 1)
    last = Checkpoints.last
    monkeypatch.setattr(Checkpoints, "last", lambda self: last(self) | {"state": None})
    with pytest.raises(RunError, match=r"only the adapter is kept \(checkpoint.keep\); put the checkpoints"):
        opened()


def test_a_silo_at_whose_last_step_the_server_dies_each_time_is_left_out(server):
    spool, exchange, opened = server
    with opened() as deployment:
        serve(exchange, deployment.server, deployment, lambda: deployment.server.steps == 2)
        first, second = (arrival.silo for arrival in spool.arrivals())
        for _ in range(MOST_TRIES):
            next(iter(deployment.last_served())).read()
        assert spool.work()[0] == f"{first}, in the end"
        close(exchange, deployment.server, deployment, exchange.finished)
        assert [event["client"] for event in events(deployment.run.path, "closing")] == [second]
        assert any("5 times" in event["message"] for event in events(deployment.run.path, "warning"))


def test_a_server_that_is_started_again_counts_on(tables, local, tmp_path):
    kit, uploads = tmp_path / "kit", local[1]
    server = federation(kit, tables, uploads)
    before = next(server)
    before.spool.works_on("")
    config, exchange_refuse = before.config, before._refuse
    for section, changes in (
        ("llm", {"learning_rate": 0.5}),
        ("task", {"query": "{text} So it is"}),
        ("federation", {"closing_texts": 30}),  # the original LLM has written as many as were asked for then
    ):
        table = getattr(config, section).model_copy(update=changes)
        other = config.model_copy(update={section: table})
        with pytest.raises(RunError, match=rf"another configuration \(different: {section}\.{next(iter(changes))}\)"):
            Deployment.open(kit / "run", other, kit / "cache", exchange_refuse, before.spool)
    moved = config.model_copy(update={"llm": config.llm.model_copy(update={"model": f"{config.llm.model}/."})})
    Deployment.open(kit / "run", moved, kit / "cache", exchange_refuse, before.spool)
    assert load(kit / "run" / "config.toml").llm.model == moved.llm.model
    longer = config.federation.model_copy(update={"deadline_minutes": 7.0})
    config = config.model_copy(update={"federation": longer})
    unnamed = kit / "run" / "checkpoints" / "blobs" / "of-a-server-that-was-killed"
    unnamed.write_bytes(b"")
    again = Deployment.open(kit / "run", config, kit / "cache", exchange_refuse, before.spool)
    assert not unnamed.exists()
    assert load(kit / "run" / "config.toml").federation.deadline_minutes == 7.0
    assert again.server.gate.fixed == before.server.gate.fixed
    assert again.server.probe == before.server.probe
    assert before.server.probe.samples
    assert (again.tokens_generated, again.removed, again.before) == (
        before.tokens_generated,
        before.removed,
        before.before,
    )
    again.complete(SILOS)
    assert RunDir.open(kit / "run").summary()["not_delivered"] == [
        event["client"] for event in events(kit / "run", "step")
    ]
    for silo in SILOS:
        before.spool.delivered(silo, 0)
        before.spool.closed(silo, "delivered")
    again.summarise(SILOS)
    assert RunDir.open(kit / "run").summary()["not_delivered"] == []
    expected = RunDir.open(local[0]).summary()
    found = RunDir.open(kit / "run").summary()
    for name in ("tokens_generated", "texts_removed", "llm"):
        assert found[name] == expected[name]
    saved = "llm/adapter_model.safetensors"  # interpolated once, though both processes completed the run
    assert (kit / "run" / saved).read_bytes() == (local[0] / saved).read_bytes()
    server.close()


def test_of_a_silo_that_was_shut_out_nothing_is_used_and_nothing_is_owed_to_it(
    tables, local, tmp_path, monkeypatch, caplog
):
    kit, (first, second) = tmp_path / "kit", map(decode_upload, local[1])
    server = federation(kit, tables, local[1][:1])
    before = next(server)
    spool, config, intake = before.spool, before.config, Intake(TASK["labels"], before.config.intake)
    spool.put(second.client_id, 0, [local[1][1]])  # came before the server was stopped

    def started(*silos):
        exchange = FlowerExchange(None, spool, "tiny-1", list(silos), config.federation, intake)
        return exchange, Deployment.open(kit / "run", config, kit / "cache", exchange.refuse, spool)

    exchange, deployment = started(first.client_id, second.client_id, "late")
    assert list(deployment.server.teachers.members) == [first.client_id]
    assert exchange._owed() == [first.client_id]
    assert list(deployment.server.gate.references) == [first.client_id]
    assert [silo for silo, _ in deployment._first_uploads()] == [first.client_id]
    exchange, deployment = started("late")
    assert not deployment.server.teachers.members
    assert not deployment.server.gate.references
    assert not list(deployment._first_uploads())
    assert exchange._owed() == []
    caplog.clear()
    monkeypatch.setattr(exchange.carrier, "thread", SimpleNamespace(start=lambda: None))
    exchange.start()
    assert f"put silos/{second.client_id}.pub back there" in caplog.text
    assert exchange.receive() is None
    exchange._refuse_late()
    assert spool.of(second.client_id)[0].state == "received"
    exchange, deployment = started(first.client_id, "late")  # whose key was put back
    assert list(deployment.server.teachers.members) == [first.client_id]
    assert exchange._owed() == [first.client_id]
    exchange, deployment = started(first.client_id, second.client_id, "late")
    assert exchange.receive().client_id == second.client_id  # its turn comes when its key is back
    download, record = deployment.server.step(second)
    deployment.served(second, download, record)
    spool.serve(second.client_id, 0, encode(download))
    assert {served.read().client_id for served in deployment.last_served()} == {first.client_id, second.client_id}
    spool.admit([second.client_id])
    assert [served.read().client_id for served in deployment.last_served()] == [second.client_id]
    ((silo, _),) = deployment._first_uploads()
    assert silo == second.client_id
    spool.upload_file(second.client_id, 0).unlink()  # a measure less, and not the end of the run
    assert not list(deployment._first_uploads())
    assert f"{second.client_id} is left out of what SLMs say" in deployment.run.events()[-1]["message"]
    server.close()


def test_what_is_written_of_a_classifier_is_gone_before_its_message_is_made(tables, local, tmp_path, monkeypatch):
    """Each is as large as the classifier, and more than one at a time is what a server's memory goes to."""
    written, alive, save = [], [], RunDir.save_slm

    def saved(run, who, slm, folder="slm"):
        written.append(weakref.ref(slm))
        save(run, who, slm, folder)

    def encoded(message):
        alive.append(sum(slm() is not None for slm in written))
        return encode(message)

    monkeypatch.setattr(RunDir, "save_slm", saved)
    monkeypatch.setattr("crosslm.federation.deployment.encode", encoded)
    for _ in federation(tmp_path / "kit", tables, local[1]):
        pass
    assert len(written) == 2 * len(SILOS)  # at once, and in the end
    assert alive == [0] * len(SILOS)


def silo_with(upload):
    """A silo in the grid that has trained: answers with this upload, and takes what comes back."""

    def answered(message):
        content = RecordDict({"reply": ConfigRecord({"status": "ok", "round": 0})})
        if message.metadata.message_type == "train.upload":
            content["message"] = split([upload])
        return Message(content, reply_to=message)

    return answered


@pytest.mark.usefixtures("flower_run")
def test_a_server_that_dies_in_the_closing_step_keeps_what_was_learned_before(
    tables, local, seeing, tmp_path, monkeypatch
):
    turns, all_closed = iter([False, True]), sys.modules[__name__].close

    def dies(exchange, server, journal, between):
        def second():
            if next(turns):
                raise SystemExit
            return between()

        all_closed(exchange, server, journal, second)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[__name__], "close", dies)
        with pytest.raises(SystemExit):
            next(iter(federation(tmp_path / "kit", tables, local[1])))
    spool = Spool(tmp_path / "kit" / "spool")
    assert sum(spool.closing_of(silo) is not None for silo in SILOS) == 1
    config = load(tmp_path / "kit" / "run" / "config.toml")
    intake = Intake(TASK["labels"], config.intake)
    exchange = FlowerExchange(None, spool, "tiny-1", list(SILOS), config.federation, intake)
    with Deployment.open(tmp_path / "kit/run", config, tmp_path / "kit/cache", exchange.refuse, spool) as deployment:
        close(exchange, deployment.server, deployment, exchange.finished)
    spool.close()
    texts = "synthetic/closing-pool.jsonl"
    assert (tmp_path / "kit/run" / texts).read_bytes() == (seeing / texts).read_bytes()


@pytest.mark.usefixtures("flower_run")
def test_downloads_go_out_though_the_llm_cannot_be_measured_and_a_restart_completes_the_run(
    tables, local, tmp_path, monkeypatch
):
    """The whole server application over a grid in memory."""
    monkeypatch.setenv("CROSSLM_CACHE", str(tmp_path / "cache"))

    def fails(self, silos):
        raise ModelError("the LLM could not write")

    drained, drain = [], FlowerExchange.drain
    monkeypatch.setattr(FlowerExchange, "drain", lambda *given: (drained.append(given[1]), drain(*given))[1])
    config = Config.model_validate(tables | {"federation": {"delivery_hours": 0.05}})
    provision(config, "localhost:9400", tmp_path / "kits")
    kit = tmp_path / "kits" / "server"
    shutil.copy(Path(tables["data"]["dir"]) / "public.csv", kit)
    grid = MemoryGrid({decode_upload(upload).client_id: silo_with(upload) for upload in local[1]})
    spool, work, works_on = Spool(kit / "spool"), [], Spool.works_on
    monkeypatch.setattr(Spool, "works_on", lambda self, what: (work.append(what), works_on(self, what))[1])
    with monkeypatch.context() as patch:
        patch.setattr(Deployment, "complete", fails)
        with pytest.raises(ModelError, match="could not write"):
            server_app.serve_kit(kit, grid, spool)
        assert {arrival.state for arrival in spool.arrivals()} == {"delivered"}
    server_app.serve_kit(kit, grid, spool)
    assert spool.fact("finished") == ""
    assert drained == [180.0, 180.0]
    summary = RunDir.open(kit / "run").summary()
    assert set(summary["clients"]) == set(SILOS)
    assert (summary["not_delivered"], summary["not_uploaded"]) == ([], {})
    assert (summary["device"], summary["slm_dtype"]) == ("cpu", {"synthetic": "float32"})
    first, second = (decode_upload(upload).client_id for upload in local[1])
    told = [what for what in work if what]  # what crosslm status says the server is at work on
    assert (told[0], told[-1]) == (
        "loading models, and what comes before the first step",
        "measuring the LLM in the end",
    )
    assert {f"{first}, round 0", f"{second}, round 0", f"{first}, in the end", f"{second}, in the end"} <= set(told)
    assert spool.work() is None
    assert AT_THE_SILO in render([RunView.read(RunDir.open(kit / "run"))])
    spool.close()


def tracker_of(run, *unknown):
    """What a tracker gets of the events of a run, without figures in whose names one of these is."""
    updates, logged = 0, []
    for event in RunDir(run).events():
        updates += event["event"] == "update"
        figures, axis, place = figures_of(event, updates)
        if kept := {name: value for name, value in figures.items() if not any(each in name for each in unknown)}:
            logged.append((kept, axis, place))
    return logged


@pytest.mark.usefixtures("flower_run")
@pytest.mark.parametrize("rows", [True, False], ids=["test rows", "none"])
def test_trackers_get_what_they_get_of_a_run_in_one_process(tables, local, tmp_path, monkeypatch, rows):
    """Names, places and figures; without test rows all but the accuracies that nobody can know."""
    made = []
    monkeypatch.setenv("CROSSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tracking, "wanted", lambda _: ("mine",))
    monkeypatch.setitem(tracking.TRACKERS, "mine", lambda *given: made.append(Keeps(*given)) or made[0])
    provision(Config.model_validate(tables), "localhost:9400", tmp_path / "kits")
    kit = tmp_path / "kits" / "server"
    for name in ("public.csv", *(("test.csv", "plain.txt") if rows else ())):
        shutil.copy(Path(tables["data"]["dir"]) / name, kit)
    spool = Spool(kit / "spool")
    silos = {decode_upload(upload).client_id: silo_with(upload) for upload in local[1]}
    for name, upload in zip(silos, local[1], strict=True):
        spool.put(name, 0, [upload])  # in the order in which they came there
    server_app.serve_kit(kit, MemoryGrid(silos), spool)
    spool.close()
    (tracker,) = made
    assert tracker.closed
    expected = tracker_of(local[0], "data_free_kd")
    if rows:
        assert tracker.logged == expected
        return
    places = [(axis, place) for _, axis, place in tracker_of(local[0], "slm/")]
    assert [(axis, place) for _, axis, place in tracker.logged] == places
    unknown = {name for figures, _, _ in expected for name in figures} - {
        name for figures, _, _ in tracker.logged for name in figures
    }
    accuracies = {f"slm/accuracy/{silo}" for silo in SILOS} | {"slm/accuracy", "slm/standalone"}
    assert unknown == accuracies | {"llm/nlu_accuracy", "llm/perplexity"}


@pytest.mark.usefixtures("flower_run")
def test_a_tracker_that_is_not_installed_ends_the_server_before_models_load(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_installed", lambda name: False)
    provision(Config.model_validate(tables | {"tracking": ["mlflow"]}), "localhost:9400", tmp_path / "kits")
    kit = tmp_path / "kits" / "server"
    spool = Spool(kit / "spool")
    with pytest.raises(ConfigError, match="tracking names 'mlflow', which is not installed"):
        server_app.serve_kit(kit, MemoryGrid({}), spool)
    assert not (kit / "run").exists()
    spool.close()


def test_counts_in_a_silos_own_order_of_labels_are_the_tasks(tables, local, tmp_path):
    upload = decode_upload(local[1][0])
    turned = type(upload.slm)(**{**vars(upload.slm), "labels": tuple(reversed(upload.slm.labels))})
    other = type(upload)(upload.client_id, 0, (3, 7), {}, turned)
    for deployment in federation(tmp_path / "kit", tables, []):
        deployment.uploaded(other)
    (event,) = events(tmp_path / "kit" / "run", "upload")
    assert event["class_counts"] == [7, 3]
    assert RunDir.open(tmp_path / "kit" / "run").summary()["clients"]["silo-0"]["rows"] == {"bad": 7, "good": 3}


def test_a_test_file_that_is_there_must_be_right(tables, tmp_path):
    from crosslm.errors import DataError

    config = Config.model_validate(tables | {"data": tables["data"] | {"dir": str(tmp_path)}})
    assert measured_on(config) == (None, None)
    (tmp_path / "test.csv").write_text("text,label\nx,ugly\n")
    with pytest.raises(DataError, match="the label 'ugly'"):
        measured_on(config)
