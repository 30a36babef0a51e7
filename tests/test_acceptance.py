"""What a client takes back, what the run keeps of a quarantined upload, and an LLM that a refusal leaves as it was."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from conftest import BAD, GOOD, sentences, tiny_llm

from crosslm import experiment
from crosslm.client import Client, Decision
from crosslm.config import AcceptanceConfig, Config, FitConfig
from crosslm.data.examples import Examples
from crosslm.errors import RunError, StoppedError, UploadError
from crosslm.experiment import run_local
from crosslm.federation.local import LocalExchange
from crosslm.html_report.collect import RunView
from crosslm.html_report.findings import findings
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.slm import SLM
from crosslm.records import Download
from crosslm.runs import journal
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.report import about_no_say, declined
from crosslm.runs.rollback import roll_back
from crosslm.runs.rundir import RunDir
from crosslm.runs.watch import sentence
from crosslm.server import Server

ROWS = Examples(sentences(BAD, 20) + sentences(GOOD, 20), [0] * 20 + [1] * 20)
LABELS = ("bad", "good")


def client_of(models, fit=None, **acceptance):
    slm = SLM.load(str(models / "bert"), LABELS, 32, 0)
    fit = fit or FitConfig(epochs=8, batch_size=8, learning_rate=2e-3, holdout_fraction=0.25)
    return Client("north", ROWS, slm, fit, 0, acceptance=AcceptanceConfig(**({"enabled": True} | acceptance)))


def returned(upload, state):
    return Download(upload.client_id, upload.client_round, 1, {}, state)


@pytest.fixture(scope="module")
def worse(models):
    """A classifier that has learned the labels the wrong way round."""
    slm = SLM.load(str(models / "bert"), LABELS, 32, 1)
    flipped = Examples(ROWS.texts, [1 - label for label in ROWS.labels])
    slm.fit(flipped, FitConfig(epochs=8, batch_size=8, learning_rate=2e-3), 0)
    return slm.to_state()


def test_what_is_worse_on_held_out_rows_is_refused_and_the_old_one_kept(models, worse):
    client = client_of(models)
    upload = client.train()
    had = client.slm
    decision = client.install(returned(upload, worse))
    assert decision == Decision(False, 10, had.accuracy(holdout(client)), decision.after)
    assert decision.after < decision.before
    assert client.slm is had


def test_held_out_rows_of_one_label_decide_nothing(models, worse):
    """A classifier that says that label always cannot be beaten there."""
    slm = SLM.load(str(models / "bert"), LABELS, 32, 0)
    fit = FitConfig(epochs=2, batch_size=8, learning_rate=2e-3, holdout_fraction=0.25)
    client = Client("north", ROWS.take(range(20)), slm, fit, 0, acceptance=AcceptanceConfig(enabled=True))
    upload = client.train()
    assert client.install(returned(upload, worse)) == Decision(True, 0)
    assert client.previous is slm


def test_what_is_as_good_is_installed_and_the_old_one_kept_too(models):
    client = client_of(models)
    upload = client.train()
    had = client.slm
    decision = client.install(returned(upload, upload.slm))
    assert decision.accepted
    assert decision.before == decision.after
    assert client.previous is had
    assert client.slm is not had


@pytest.mark.parametrize(
    ("lost", "gained", "accepted"),
    # of 10 rows; the sign test by hand: 1/8, 1/16, 6/32, and 1/2
    [(3, 0, True), (4, 0, False), (4, 1, True), (1, 0, True), (0, 3, True)],
)
def test_few_rows_lost_by_chance_are_no_reason(models, monkeypatch, lost, gained, accepted):
    client = client_of(models)
    upload = client.train()
    rows, wrong = holdout(client), [range(lost, lost + gained), range(lost)]  # by the old one, by the new one

    def opinion(slm, texts, *_):
        return torch.eye(2)[
            [label ^ (place in wrong[slm is not client.slm]) for place, label in enumerate(rows.labels)]
        ]

    monkeypatch.setattr(SLM, "predict_proba", opinion)
    assert client._try(SLM.from_state(upload.slm, upload.slm.labels)).accepted is accepted
    client._acceptance = AcceptanceConfig(enabled=True, confidence=0.5, margin=0.0)
    assert client._try(SLM.from_state(upload.slm, upload.slm.labels)).accepted is (lost <= gained)


def holding_out(client, labels, monkeypatch):
    """Rows of these labels are what the client tries on."""
    monkeypatch.setattr(client, "_private", Examples(ROWS.texts[:1] * len(labels), labels))
    monkeypatch.setattr(client, "_split", lambda: ([], list(range(len(labels)))))


def test_balanced_each_label_counts_alike(models, monkeypatch):
    """By hand: of 8 + 2 rows the new one loses 4 of the many and gains both of the few: -4 + 2 rows, but -1/2 + 1."""
    client = client_of(models)
    upload = client.train()
    holding_out(client, [0] * 8 + [1] * 2, monkeypatch)

    def opinion(slm, texts, *_):
        return torch.eye(2)[[0] * 10 if slm is client.slm else [1] * 4 + [0] * 4 + [1] * 2]

    monkeypatch.setattr(SLM, "predict_proba", opinion)
    client._acceptance = AcceptanceConfig(enabled=True, margin=0.0, confidence=0.5)
    decision = client._try(SLM.from_state(upload.slm, upload.slm.labels))
    assert (decision.accepted, decision.before, decision.after) == (False, pytest.approx(0.8), pytest.approx(0.6))
    client._acceptance = AcceptanceConfig(enabled=True, margin=0.0, confidence=0.5, balanced=True)
    decision = client._try(SLM.from_state(upload.slm, upload.slm.labels))
    assert (decision.accepted, decision.before, decision.after) == (True, pytest.approx(0.5), pytest.approx(0.75))
    assert decision.balanced


def test_balanced_a_loss_of_the_few_is_refused(models, monkeypatch):
    """By hand: gains 4 of 8 and loses both of 2: 4 - 2 rows, but 4 * 0.625 - 2 * 2.5 = -2.5.

    With random signs both of 2.5 are lost in a quarter of the cases; in the half that loses one of them the sum is as
    low only where all four of 0.625 are lost, one in 16: p = 1/4 + 1/32 = 0.28.
    """
    client = client_of(models)
    upload = client.train()
    holding_out(client, [0] * 8 + [1] * 2, monkeypatch)

    def opinion(slm, texts, *_):
        return torch.eye(2)[[0] * 4 + [1] * 6 if slm is client.slm else [0] * 10]

    monkeypatch.setattr(SLM, "predict_proba", opinion)
    for balanced, confidence, accepted in ((False, 0.71, True), (True, 0.71, False), (True, 0.73, True)):
        client._acceptance = AcceptanceConfig(enabled=True, margin=0.0, confidence=confidence, balanced=balanced)
        assert client._try(SLM.from_state(upload.slm, upload.slm.labels)).accepted is accepted


@pytest.mark.parametrize(
    ("lost", "gained", "confidence"), [(2, 1, 0.5), (3, 2, 0.5), (6, 5, 0.5), (3, 0, 0.875), (4, 0, 0.9375)]
)
def test_a_probability_of_just_the_bound_is_sure_enough(models, monkeypatch, lost, gained, confidence):
    """Of 2 n + 1 tosses n + 1 or more are heads with 1/2, of 3 all with 1/8, of 4 with 1/16."""
    client = client_of(models)
    upload = client.train()
    holding_out(client, [0] * 20 + [1] * 20, monkeypatch)

    def opinion(slm, texts, *_):
        first, rest = ([1] * gained, [0] * lost) if slm is client.slm else ([0] * gained, [1] * lost)
        return torch.eye(2)[[*first, *rest, *[0] * (20 - lost - gained), *[1] * 20]]

    monkeypatch.setattr(SLM, "predict_proba", opinion)
    for sure, accepted in ((confidence, False), (confidence + 0.01, True)):
        client._acceptance = AcceptanceConfig(enabled=True, margin=0.0, confidence=sure)
        assert client._try(SLM.from_state(upload.slm, upload.slm.labels)).accepted is accepted


def test_a_loss_of_just_the_margin_is_accepted(models, monkeypatch):
    """4 of 40 rows are lost, none is gained: 0.1, whatever a computer makes of 4 / 40."""
    client = client_of(models)
    upload = client.train()
    holding_out(client, [0] * 20 + [1] * 20, monkeypatch)

    def opinion(slm, texts, *_):
        return torch.eye(2)[[0] * 20 + [1] * 20 if slm is client.slm else [0] * 24 + [1] * 16]

    monkeypatch.setattr(SLM, "predict_proba", opinion)
    for margin, accepted in ((0.1, True), (0.09, False)):
        for balanced in (False, True):
            client._acceptance = AcceptanceConfig(enabled=True, margin=margin, confidence=0.5, balanced=balanced)
            assert client._try(SLM.from_state(upload.slm, upload.slm.labels)).accepted is accepted


def test_the_margin_and_the_switch_are_fields(models, worse):
    for acceptance, rows in (({"margin": 0.99}, 10), ({"enabled": False}, 0)):
        client = client_of(models, **acceptance)
        decision = client.install(returned(client.train(), worse))
        assert decision.accepted
        assert decision.rows == rows


def holdout(client):
    return ROWS.take(client._split()[1])


@pytest.mark.parametrize("patience", [0, 2])
def test_the_held_out_rows_are_those_that_the_training_did_not_see(models, monkeypatch, patience):
    seen, tried, learned = [], [], []
    epoch, held, encode = SLM._epoch, SLM._holdout, SLM.encode

    def spied(slm, rows, labels, *arguments):
        seen.append(len(rows))
        return epoch(slm, rows, labels, *arguments)

    def spied_holdout(slm, examples, targets):
        tried.append(examples.texts)
        return held(slm, examples, targets)

    def spied_encode(slm, texts):
        learned.append(Counter(texts))
        return encode(slm, texts)

    monkeypatch.setattr(SLM, "_epoch", spied)
    monkeypatch.setattr(SLM, "_holdout", spied_holdout)
    monkeypatch.setattr(SLM, "encode", spied_encode)
    fit = FitConfig(epochs=2, batch_size=8, holdout_fraction=0.25, patience=patience)
    client = client_of(models, fit)
    upload = client.train()
    assert set(seen) == {30}
    assert sum(upload.class_counts) == 40
    if patience:
        assert tried[0] == holdout(client).texts
    first = holdout(client).texts
    client.train()  # and they are none of the training in a later round either
    assert set(seen) == {30}
    assert holdout(client).texts == first
    assert all(texts == first for texts in tried)
    of_training = [texts for texts in learned if texts.total() == 30]
    assert len(of_training) == 2
    assert of_training[0] == of_training[1] == Counter(ROWS.texts) - Counter(first)


def test_a_download_that_is_no_download_leaves_the_client_as_it_was(models, task, config, worse):
    client, failures = client_of(models), []
    intake = experiment.Intake(task.labels, config.intake)
    exchange = LocalExchange([client], 1, 0, lambda who, error: failures.append(str(error)), intake)
    upload = exchange.receive()
    had = client.slm
    broken = {name: torch.full_like(value, torch.nan) for name, value in worse.weights.items()}
    exchange.send(returned(upload, dataclasses.replace(worse, weights=broken)))
    assert client.slm is had
    assert len(failures) == 1
    assert failures[0].startswith("client north: what the server returned is refused: its weight")


def test_an_slm_that_fails_after_the_update_leaves_the_llm_as_it_was(models, config, task, monkeypatch):
    server = Server(config, task, tiny_llm(models, "gpt2"), SentenceEncoder(str(models / "encoder")))
    upload = client_of(models).train()
    server.step(upload)
    before, optimizer = server.llm.fingerprint(), server.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    predict, calls = SLM.predict_proba, []

    def fails(slm, texts, *_):
        calls.append(len(texts))
        if len(calls) == 2:  # the first is for the drafts, the second for the pool
            raise IndexError("index out of range in self")
        return predict(slm, texts)

    with monkeypatch.context() as patch:
        patch.setattr(SLM, "predict_proba", fails)
        with pytest.raises(UploadError, match="cannot classify: IndexError"):
            server.step(upload)
    assert server.llm.fingerprint() == before
    assert torch.equal(server.optimizer.state_dict()["state"][0]["exp_avg"], optimizer)
    assert server.steps == 1


@pytest.fixture
def flipping(settings, data_folder, monkeypatch):
    """Settings of a run in which the labels of the second client are the wrong way round, and the gate finds out."""
    rows = [f"{text},{label}" for label, words in (("good", GOOD), ("bad", BAD)) for text in sentences(words)]
    (data_folder / "public.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    settings["gate"] = {
        "enabled": True,
        "min_texts": 1,
        "texts": 2,
        "public_texts": "public.csv",
        "teach_refused": False,
    }
    settings["slm"]["private"] = {"epochs": 20, "batch_size": 4, "learning_rate": 2e-3, "patience": 0}
    train = experiment.Client.train

    def flips(client):
        if client.id == "client-1":
            client._private = Examples(client._private.texts, [1 - label for label in client._private.labels])
        return train(client)

    monkeypatch.setattr(experiment.Client, "train", flips)
    return settings


def events_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_that_is_refused_as_a_judge_is_taught(flipping, tmp_path):
    flipping["gate"]["teach_refused"] = True
    folder = tmp_path / "run"
    summary = run_local(Config.model_validate(flipping), folder, tmp_path)
    for method in ("standalone", "data_free_kd", "crosslm"):
        assert set(summary["slm"][method]) == {"client-0", "client-1", "mean"}
    events = events_of(folder)
    gates = {event["client"]: event for event in events if event["event"] == "gate"}
    steps = {event["client"]: event for event in events if event["event"] == "step"}
    assert (gates["client-0"]["passed"], gates["client-1"]["passed"]) == (True, False)
    assert gates["client-1"]["step"] == steps["client-1"]["step"]
    assert "quarantined: its AUC is" in gates["client-1"]["reason"]
    assert "reward/drafts" in steps["client-0"]
    assert "reward/drafts" not in steps["client-1"]
    assert {event["client"] for event in events if event["event"] == "update"} == {"client-0"}
    assert (folder / "quarantine" / "client-1-0.json").is_file()
    assert {path.stem for path in (folder / "predictions/nlg/after/slm").iterdir()} == {"client-0"}
    record = Checkpoints(RunDir.open(folder)).read(int(steps["client-1"]["step"]))
    assert record["cause"]["outcome"] == "taught"
    assert record["state"]["taught"] == 1
    assert sentence(gates["client-1"]).startswith("the upload of client client-1 is taught and has no say: ")
    titles = [finding.title for finding in findings(RunView.read(RunDir.open(folder)))]
    assert "client client-1 is taught and has no say" in titles
    with pytest.raises(RunError, match="'client-1' has not changed the LLM; those that have: client-0"):
        roll_back(RunDir.open(folder), "client-1", tmp_path / "back")


def test_a_run_that_stops_after_one_was_taught_ends_as_one_that_does_not(flipping, tmp_path):
    flipping["gate"]["teach_refused"] = True
    config, folders = Config.model_validate(flipping), (tmp_path / "whole", tmp_path / "stopped")
    whole = run_local(config, folders[0], tmp_path)

    def outcome():
        record = Checkpoints(RunDir(folders[1])).last()
        return record and record["cause"].get("outcome")

    with pytest.raises(StoppedError):
        run_local(config, folders[1], tmp_path, stop_requested=lambda: outcome() == "taught")
    assert outcome() == "taught"
    resumed = run_local(config, folders[1], tmp_path, resume=True)
    assert (whole["slm"], whole["llm"], whole["no_say"]) == (resumed["slm"], resumed["llm"], ["client-1"])
    for name in ("llm/adapter_model.safetensors", "slm/client-0/model.safetensors", "slm/client-1/model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert "learned from the opinions of 1 classifiers" in (folders[0] / "llm/README.md").read_text()
    said = {who: (folders[0] / f"slm/{who}/README.md").read_text() for who in ("client-0", "client-1")}
    assert "that this classifier itself had judged" in said["client-0"]
    assert "that others had judged" in said["client-1"]
    assert about_no_say(["client-1"], ["client-0", "client-1"]).endswith(": client-1.")
    assert "the LLM is as it was" in about_no_say(["client-1"], ["client-1"])


def test_data_free_kd_of_one_that_may_not_judge_has_no_say_either(flipping, tmp_path, monkeypatch):
    """As CrossLM's own step 5, so that the two compare; where nobody else judges the original LLM does."""
    found, asked, real, reads = {}, [], journal.data_free_kd, journal.class_probabilities

    def watched(upload, *given):
        *_, said, may_judge = given
        found[upload.client_id] = (may_judge, said is not None)
        return real(upload, *given)

    def read(llm, *given):
        asked.append([value for name, value in llm.model.named_parameters() if "lora_B" in name])
        assert not any(value.any() for value in asked[-1])  # as it was, though it has learned by then
        return reads(llm, *given)

    monkeypatch.setattr(journal, "data_free_kd", watched)
    monkeypatch.setattr(journal, "class_probabilities", read)
    flipping["slm"]["llm_judges"] = False
    for teaches, closing in ((True, True), (True, False), (False, True)):
        found.clear()
        flipping["gate"]["teach_refused"], flipping["federation"] = teaches, {"closing": closing}
        run_local(Config.model_validate(flipping), tmp_path / f"run-{teaches}-{closing}", tmp_path)
        assert found == {"client-0": (True, False), "client-1": (not teaches, teaches)}
    assert len(asked) == 2
    assert all(any(value.any() for value in weights) for weights in asked)  # after a while it was as trained again


def test_a_quarantined_upload_is_kept_with_its_figures_and_counts_nowhere(flipping, tmp_path):
    settings, folder = flipping, tmp_path / "run"
    summary = run_local(Config.model_validate(settings), folder, tmp_path)
    for method in ("standalone", "data_free_kd", "crosslm"):
        assert set(summary["slm"][method]) == {"client-0", "mean"}
    figures = json.loads((folder / "quarantine" / "client-1-0.json").read_text())
    assert figures["auc"] < 0.5
    assert "client client-1: quarantined: its AUC is" in figures["reason"]
    checked = Config.model_validate(settings)
    upload = experiment.Intake(checked.task.labels, checked.intake)
    kept = upload.upload(folder / "quarantine" / "client-1-0.safetensors", "client-1")
    assert kept.client_id == "client-1"
    events = events_of(folder)
    gates = {event["client"]: event["passed"] for event in events if event["event"] == "gate"}
    assert gates == {"client-0": True, "client-1": False}
    assert {event["client"] for event in events if event["event"] == "step"} == {"client-0"}
    (decision,) = (event for event in events if event["event"] == "acceptance")
    assert summary["clients"]["client-0"]["decision"]["accepted"] == decision["accepted"]
    assert summary["clients"]["client-1"]["decision"] is None


def test_hidden_counts_are_not_told_by_what_was_held_out_either(settings, tmp_path):
    """A tenth of the rows, and shares right of so many."""
    hides = settings | {"acceptance": {"enabled": True}, "privacy": {"hide_counts": True}}
    summary = run_local(Config.model_validate(hides), tmp_path / "run", tmp_path)
    told = [event for event in events_of(tmp_path / "run") if event["event"] == "acceptance"]
    assert len(told) >= 2
    assert all(set(event) == {"event", "time", "client", "accepted"} for event in told)
    assert [set(of["decision"]) for of in summary["clients"].values()] == [{"accepted"}] * 2
    why = declined({"clients": {"north": {"decision": {"accepted": False}}}})["north"]
    assert why.startswith("It was worse on held-out private rows than the classifier that north had: ")
