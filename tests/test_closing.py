"""Step 5 once more when no more uploads come (``federation.closing``): by the method, in one process, and at a silo."""

import dataclasses
import json
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from of_federations import answer, change, echo, free_ports, turn
from of_uploads import ShutTo, server_of

from crosslm import baselines, experiment
from crosslm import server as server_module
from crosslm.algorithm.rewards import label_rewards
from crosslm.algorithm.soft_labels import opinion_pool, without_preference
from crosslm.baselines import data_free_kd
from crosslm.classification import class_probabilities
from crosslm.client import Client, Decision
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.errors import FederationError, KeptFileError, LeakError, RunError, UploadError
from crosslm.experiment import run_local
from crosslm.federation.exchange import Served, close
from crosslm.federation.flower import gateway, questions, server_processes, silo_processes
from crosslm.federation.flower.exchange import FlowerExchange
from crosslm.federation.flower.silo_processes import run_silo
from crosslm.federation.local import arrival_order
from crosslm.federation.messages import decode_upload, encode
from crosslm.federation.silo import Silo
from crosslm.federation.silo_news import closing_outcome
from crosslm.federation.spool import OVER, Spool
from crosslm.gate import Gate
from crosslm.runs import journal
from crosslm.runs.rundir import RunDir
from crosslm.server import Server, receive_slm
from crosslm.support.files import write_whole
from crosslm.support.progress import Progress
from crosslm.synthesis import synthesize
from crosslm.teachers import Teachers

SILOS = ("silo-0", "silo-1")


def differs(one, other):
    return any(not torch.equal(value, other[name]) for name, value in one.items())


def test_in_the_end_who_came_first_is_taught_by_all_and_by_the_llm_as_it_is_then(models, config, task, uploads):
    server = server_of(models, config, task, soft_labels=True, llm_judges=True)
    original = synthesize(server.llm, task, config.synthesis, 12, 0)
    served = [server.step(upload) for upload in uploads]
    at_once, latest = [download for download, _ in served], served[-1][1].pool
    before, judges = server.llm.fingerprint(), list(server.teachers.members)
    closing = server.for_all(original, latest, ["", "", ""])
    assert closing.pool.samples == [*latest.samples[:6], *original.samples[:6]]
    assert closing.pool.tokens_generated == 0
    torch.testing.assert_close(closing.said.pool, class_probabilities(server.llm, task, closing.pool.texts))
    for upload, first in zip(uploads, at_once, strict=True):
        download, record = server.close(upload, "", closing)
        assert record.pool is closing.pool
        slm = receive_slm(upload, task, server.config)
        judged = server.teachers.probabilities(slm, upload, closing.pool.texts)
        rewards = torch.tensor([receipt.reward for receipt in record.receipts])
        torch.testing.assert_close(rewards, label_rewards(judged, closing.pool.labels))
        assert differs(download.slm.weights, upload.slm.weights)
        assert differs(download.slm.weights, first.slm.weights)
        assert (download.client_id, download.step) == (upload.client_id, 3)
    assert (server.llm.fingerprint(), list(server.teachers.members), server.steps) == (before, judges, 3)


@pytest.mark.parametrize(
    ("share", "texts", "of_original"),
    [
        (0.0, None, 0),
        (0.25, None, 1),
        (0.5, None, 3),
        (0.6, None, 4),
        (1.0, None, 7),
        (0.5, 13, 6),
        (0.25, 4, 1),
        (0.0, 10, 3),
    ],
)
def test_so_many_of_its_texts_are_the_original_llms(models, config, task, share, texts, of_original):
    section = config.federation.model_copy(update={"closing_original": share, "closing_texts": texts})
    selection = config.selection.model_copy(update={"pool": 7})
    config = config.model_copy(update={"federation": section, "selection": selection})
    server = server_of(models, config, task)
    original, latest = (synthesize(server.llm, task, config.synthesis, 7, seed) for seed in (0, 1))
    assert original.samples != latest.samples
    closing = server.for_all(original, latest, [""])
    of_latest = (texts or 7) - of_original
    assert closing.pool.samples == [*latest.samples[:of_latest], *original.samples[:of_original]]


def test_a_share_of_the_texts_is_no_text_less_for_a_products_last_digit(config):
    section = config.federation.model_copy(update={"closing_original": 0.29, "closing_texts": 100})
    selection = config.selection.model_copy(update={"pool": 100})
    config = config.model_copy(update={"federation": section, "selection": selection})
    assert 0.29 * 100 < 29  # in binary
    assert config.texts_in_the_end == (29, 71)


def test_judges_are_weighed_by_what_they_make_of_the_original_llms_texts(models, config, task, uploads, monkeypatch):
    learned, asked = [], []
    train = server_module.train_on_synthetic
    monkeypatch.setattr(
        server_module, "train_on_synthetic", lambda *given: learned.append((given[1], given[3])) or train(*given)
    )
    monkeypatch.setattr(server_module, "weigh_judges", lambda *given: asked.append(given) or 0.5)
    server = server_of(models, config, task, soft_labels=True, llm_judges=True, weigh_judges=True)
    original = synthesize(server.llm, task, config.synthesis, 12, 0)
    server.begin(original, Examples([], []))
    _, record = server.step(uploads[0])
    closing = server.for_all(original, record.pool, ["", "", ""])
    server.close(uploads[0], "", closing)
    slm = receive_slm(uploads[0], task, server.config)
    assert [pool for pool, _ in learned] == [record.pool, closing.pool]
    for pool, targets in learned:
        own = without_preference(class_probabilities(server.llm, task, pool.texts))
        judged = server.teachers.probabilities(slm, uploads[0], pool.texts)
        torch.testing.assert_close(targets, opinion_pool(judged, own, 0.5))
    for probe, judged, said in asked:
        assert probe.samples == original.samples
        torch.testing.assert_close(judged, server.teachers.probabilities(slm, uploads[0], original.texts))
        torch.testing.assert_close(said, class_probabilities(server.llm, task, original.texts))


def test_the_original_llm_judges_what_the_llm_learns(models, config, task, uploads, monkeypatch):
    asked = []
    monkeypatch.setattr(server_module, "weigh_judges", lambda *given: asked.append(given) or 0.5)
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"llm_judges": True})})
    server = server_of(models, config, task, llm_judges=False, weigh_judges=True)
    original = synthesize(server.llm, task, config.synthesis, 12, 0)
    said_of_probe = class_probabilities(server.llm, task, original.texts)
    server.begin(original, Examples([], []))
    records = [server.step(upload)[1] for upload in uploads[:2]]
    for upload, record in zip(uploads, records, strict=False):
        ((drafts, rewards),) = record.drafts
        judged = Teachers(server.config.reward).probabilities(receive_slm(upload, task, config), upload, drafts.texts)
        if upload is uploads[1]:
            judged = server.teachers.probabilities(receive_slm(upload, task, config), upload, drafts.texts)
        now = class_probabilities(server.llm, task, drafts.texts)
        with server.llm.interpolated(0.0):
            said = class_probabilities(server.llm, task, drafts.texts)
        assert not torch.allclose(now, said)
        expected = label_rewards(opinion_pool(judged, without_preference(said), 0.5), drafts.labels)
        torch.testing.assert_close(rewards, expected)
    assert all(probe.samples == original.samples for probe, _, _ in asked)
    of_rewards = [said for _, _, said in asked if said is not None]
    assert len(of_rewards) == 2
    for said in of_rewards:
        torch.testing.assert_close(said, said_of_probe)


def test_who_has_no_say_is_not_weighed_either(models, config, task, uploads, monkeypatch):
    asked = []
    monkeypatch.setattr(server_module, "weigh_judges", lambda *given: asked.append(given) or 1.0)
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"teach_refused": True})})
    server = server_of(models, config, task, soft_labels=True, llm_judges=True, weigh_judges=True)
    original = synthesize(server.llm, task, config.synthesis, 12, 0)
    server.begin(original, Examples([], []))
    server.gate = ShutTo("south")
    for upload in uploads[:2]:
        server.step(upload)
    slm = receive_slm(uploads[1], task, server.config)
    torch.testing.assert_close(asked[1][1], server.teachers.of_others(slm, uploads[1], original.texts))


def test_data_free_kd_has_its_judges_weighed_too(models, config, task, uploads, monkeypatch):
    learned, asked = [], []
    monkeypatch.setattr(baselines, "train_on_synthetic", lambda *given: learned.append(given[3]))
    monkeypatch.setattr(baselines, "weigh_judges", lambda *given: asked.append(given) or 0.5)
    server = server_of(models, config, task, soft_labels=True, llm_judges=True, weigh_judges=True)
    pool = synthesize(server.llm, task, config.synthesis, 12, 0)
    said = class_probabilities(server.llm, task, pool.texts)
    data_free_kd(uploads[0], pool, server.config, task, server.encoder, Progress(), server.teachers, said)
    judged = server.teachers.probabilities(receive_slm(uploads[0], task, config), uploads[0], pool.texts)
    ((probe, of_slms, of_llm),) = asked
    assert probe.samples == pool.samples
    torch.testing.assert_close((of_slms, of_llm), (judged, said))
    torch.testing.assert_close(learned[0], opinion_pool(judged, without_preference(said), 0.5))


def test_who_has_no_say_has_none_in_the_end_either(models, config, task, uploads):
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"teach_refused": True})})
    server = server_of(models, config, task)
    server.gate = ShutTo("south")
    original = synthesize(server.llm, task, config.synthesis, 12, 0)
    for upload in uploads:
        _, record = server.step(upload)
    closing = server.for_all(original, record.pool, ["", "quarantined", ""])
    assert closing.said is not None  # where nobody else judges, the LLM does
    download, record = server.close(uploads[1], "quarantined", closing)
    slm = receive_slm(uploads[1], task, server.config)
    others = server.teachers.of_others(slm, uploads[1], closing.pool.texts)
    rewards = torch.tensor([receipt.reward for receipt in record.receipts])
    torch.testing.assert_close(rewards, label_rewards(others, closing.pool.labels))
    assert download.metrics["no_say"] == 1.0


# -- in one process --------------------------------------------------------------------------


@pytest.fixture
def closed(settings):
    settings["federation"] = {"closing": True}
    return settings


def events(folder, kind):
    return [event for event in RunDir(folder).events() if event["event"] == kind]


def measured(folder, method):
    return [(event["client"], event["right"]) for event in events(folder, "test") if event["method"] == method]


def test_a_run_ends_with_it_and_measures_what_the_clients_then_have(closed, tmp_path):
    summary = run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    found = events(tmp_path / "run", "closing")
    assert sorted(event["client"] for event in found) == ["client-0", "client-1"]
    for event in found:
        assert event["accepted"]
        for name, method in (("slm/crosslm", "crosslm"), ("slm/data_free_kd", "data_free_kd")):
            assert event[name] == summary["slm"][method][event["client"]]
    for method, times in (("crosslm", 2), ("data_free_kd", 1)):  # the former when a client came, too
        who = ["client-0"] * times + ["client-1"] * times
        assert sorted(client for client, _ in measured(tmp_path / "run", method)) == who
    assert not any("slm/data_free_kd" in event for event in events(tmp_path / "run", "step"))
    texts = {
        name: [json.loads(line)["text"] for line in (tmp_path / f"run/synthetic/{name}.jsonl").read_text().splitlines()]
        for name in ("closing-pool", "step-0002-pool", "base")
    }
    half = closed["selection"]["pool"] // 2
    assert texts["closing-pool"] == texts["step-0002-pool"][:half] + texts["base"][:half]
    closed["federation"]["closing"] = False
    without = run_local(Config.model_validate(closed), tmp_path / "without", tmp_path)
    assert not events(tmp_path / "without", "closing")
    assert all("slm/data_free_kd" in event for event in events(tmp_path / "without", "step"))
    # the LLM learns and writes nothing in it
    assert (summary["llm"], summary["tokens_generated"]) == (without["llm"], without["tokens_generated"])
    last = events(tmp_path / "run", "step")[-1]["client"]
    assert next(right for client, right in measured(tmp_path / "run", "data_free_kd") if client == last) == next(
        right for client, right in measured(tmp_path / "without", "data_free_kd") if client == last
    )


@pytest.mark.parametrize("texts", [None, 24])
def test_data_free_kd_is_taught_by_all_in_the_end_too(closed, tmp_path, monkeypatch, texts):
    closed["reward"] = {"teachers": 4}
    closed["federation"]["closing_texts"] = texts
    judges, measured = [], journal.data_free_kd

    def data_free_kd(upload, pool, config, task, encoder, progress, teachers, said, may_judge):
        judges.append({upload.client_id, *teachers.members})
        assert len(pool.samples) == (texts or config.selection.pool)  # as many as CrossLM chooses from
        return measured(upload, pool, config, task, encoder, progress, teachers, said, may_judge)

    monkeypatch.setattr(journal, "data_free_kd", data_free_kd)
    run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    assert [len(those) for those in judges] == [2, 2]
    pool = [json.loads(line) for line in (tmp_path / "run/synthetic/closing-pool.jsonl").read_text().splitlines()]
    assert len(pool) == (texts or closed["selection"]["pool"])
    assert {row["kept"] for row in pool} == {True, False}  # half of them is chosen
    for row in pool:  # each client's own receipt of each text
        assert set(row["receipts"]) == {"client-0", "client-1"}
        for receipt in row["receipts"].values():
            assert set(receipt) == {"reward", "diversity", "score", "rank", "kept"}
    for client in ("client-0", "client-1"):
        ranks = sorted(row["receipts"][client]["rank"] for row in pool)
        assert ranks == list(range(1, len(pool) + 1))
        assert sum(row["receipts"][client]["kept"] for row in pool) == len(pool) // 2


@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_that_declines_it_keeps_and_is_measured_by_what_it_had(closed, tmp_path, monkeypatch, at_once):
    closed["acceptance"] = {"enabled": True}
    tried = []

    def decide(client, returned):
        tried.append(client.id)
        accepted = len(tried) <= 2 and at_once
        return Decision(accepted, 3, 0.9, 0.9 if accepted else 0.1)

    monkeypatch.setattr(Client, "_try", decide)
    summary = run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    assert len(tried) == 4
    assert [event["accepted"] for event in events(tmp_path / "run", "closing")] == [False, False]
    assert len(measured(tmp_path / "run", "crosslm")) == 2  # what came at once
    assert len(measured(tmp_path / "run", "data_free_kd")) == 2  # nobody is asked whether it is accepted
    assert {about["decision"]["accepted"] for about in summary["clients"].values()} == {at_once}


@pytest.mark.parametrize("in_the_end", [True, False])
def test_a_baseline_that_fails_shuts_nobody_out(closed, tmp_path, monkeypatch, in_the_end):
    closed["federation"]["closing"] = in_the_end
    calls, measure = [], journal.data_free_kd

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise UploadError("not finite")
        return measure(*arguments)

    monkeypatch.setattr(journal, "data_free_kd", fails)
    summary = run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    assert len(events(tmp_path / "run", "closing")) == 2 * in_the_end
    first = events(tmp_path / "run", "upload")[0]["client_id"]
    assert summary["slm"]["data_free_kd"][first] == summary["slm"]["standalone"][first]
    assert set(summary["slm"]["crosslm"]) == {"client-0", "client-1", "mean"}
    warnings = [event["message"] for event in events(tmp_path / "run", "warning")]
    assert any("Data-free KD failed, and counts with the SLM that came: not finite" in message for message in warnings)


@pytest.fixture
def leaks(monkeypatch):
    """Has one return be refused, by its place among all of them; gives who was asked to take one."""
    installed, install = [], Client.install

    def at(place):
        def leaking(client, download):
            installed.append(client.id)
            if len(installed) == place:
                raise LeakError("too near")
            return install(client, download)

        monkeypatch.setattr(Client, "install", leaking)
        return installed

    return at


def test_a_client_that_fails_in_it_keeps_what_it_had(closed, tmp_path, leaks):
    installed = leaks(3)
    summary = run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    (failure,) = events(tmp_path / "run", "failure")
    assert failure["client"] == installed[2]
    (event,) = events(tmp_path / "run", "closing")
    assert event["client"] == installed[3]
    for method in ("crosslm", "data_free_kd"):
        assert set(summary["slm"][method]) == {"client-0", "client-1", "mean"}
    assert [client for client, _ in measured(tmp_path / "run", "data_free_kd")] == [installed[3], installed[2]]
    assert not any("refused" in client["decision"] for client in summary["clients"].values())


def test_one_client_alone_has_it_at_once_and_its_baseline_in_the_end(closed, tmp_path):
    closed["data"]["num_clients"] = 1
    closed["federation"]["closing_texts"] = 24  # but CrossLM's only step 5 had as many as a pool
    summary = run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    closed["federation"]["closing"] = False
    at_once = run_local(Config.model_validate(closed), tmp_path / "at-once", tmp_path)
    assert summary["slm"] == at_once["slm"]
    assert not events(tmp_path / "run", "closing")
    assert len(measured(tmp_path / "run", "data_free_kd")) == 1


@pytest.mark.parametrize("may_decline", [True, False])
def test_who_takes_the_one_of_the_end_has_not_refused_it(closed, tmp_path, leaks, may_decline):
    closed["acceptance"] = {"enabled": may_decline, "margin": 0.99}
    installed = leaks(1)
    summary = run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    assert len(installed) == 4
    decisions = [client["decision"] for client in summary["clients"].values()]
    assert all(decision["accepted"] for decision in decisions) if may_decline else decisions == [None, None]


def test_who_comes_twice_is_taught_from_its_last_upload_and_leaves_data_free_kd_alone(closed, tmp_path, monkeypatch):
    """Its later uploads know of CrossLM's returns, which Data-free KD must not."""
    closed["federation"] = {"closing": True, "participations": 2}
    closed |= {"seed": 3, "reward": {"teachers": 4}}
    order = arrival_order(["client-0", "client-1"], 2, 3)
    first = order[0]
    assert order[:2] == [first, first]
    rounds, taught, judged, measure = [], Server.close, [], journal.data_free_kd

    def data_free_kd(upload, pool, config, task, encoder, progress, teachers, *others):
        judged.append({name: member.upload.client_round for name, member in teachers.members.items()})
        return measure(upload, pool, config, task, encoder, progress, teachers, *others)

    monkeypatch.setattr(journal, "data_free_kd", data_free_kd)

    def close_one(server, upload, refusal, closing):
        rounds.append(upload.client_round)
        return taught(server, upload, refusal, closing)

    monkeypatch.setattr(Server, "close", close_one)
    run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    assert rounds == [1, 1]
    assert judged == [{}, {first: 0}]  # though the first one has come twice by then
    assert len(measured(tmp_path / "run", "data_free_kd")) == 2
    assert len(measured(tmp_path / "run", "crosslm")) == 6


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text('{"text": "a"}\n')])
def test_texts_that_have_gone_meanwhile_are_named(closed, tmp_path, monkeypatch, damage):
    def damaged(exchange, server, journal, between):
        damage(tmp_path / "run/synthetic/step-0002-pool.jsonl")
        close(exchange, server, journal, between)

    monkeypatch.setattr(experiment, "close", damaged)
    with pytest.raises(RunError, match=r"step-0002-pool.jsonl: cannot be read: .*; put it back"):
        run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)


def test_of_one_client_alone_nothing_is_done_again(closed, tmp_path):
    closed["data"]["num_clients"] = 1
    run_local(Config.model_validate(closed), tmp_path / "run", tmp_path)
    assert not events(tmp_path / "run", "closing")
    assert not (tmp_path / "run" / "synthetic" / "closing-pool.jsonl").exists()


@pytest.mark.parametrize("baseline", [False, True])
def test_a_run_that_dies_in_it_ends_as_one_that_never_did(closed, tmp_path, monkeypatch, baseline):
    closed["slm"]["llm_judges"] = False  # the original LLM is asked in the end then, for the one without a say
    closed["gate"] = {"enabled": True, "teach_refused": True}
    monkeypatch.setattr(Gate, "lets_in", lambda gate, slm, upload, *_: upload.client_id != "client-1")
    monkeypatch.setattr(Gate, "judge", ShutTo("client-1").judge)
    config = Config.model_validate(closed)
    whole = run_local(config, tmp_path / "whole", tmp_path)

    def dies(exchange, server, journal, between):
        owner, name = (journal, "_data_free_kd") if baseline else (server, "close")
        setattr(owner, name, lambda *_: sys.exit("killed"))
        close(exchange, server, journal, between)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "close", dies)
        with pytest.raises(SystemExit):
            run_local(config, tmp_path / "run", tmp_path)
    again = run_local(config, tmp_path / "run", tmp_path, resume=True)
    assert again["slm"] == whole["slm"]
    assert len(events(tmp_path / "run", "closing")) == 2


def test_an_slm_that_fails_on_the_last_texts_is_left_out(models, config, task, uploads, monkeypatch):
    server = server_of(models, config, task)
    records = [server.step(upload)[1] for upload in uploads[:2]]
    done, fails = [], server.teachers.probabilities

    class Book:
        def last_served(self):
            return [Served(partial(uploads.__getitem__, place), "") for place in range(2)]

        def written(self):
            return records[0].pool, records[1].pool

        def not_closed(self, message):
            done.append(message)

        def closing(self, pool):
            done.append(len(pool.samples))

        def closed(self, upload, download, record):
            done.append(upload.client_id)

        def send(self, download, closing=False):
            done.append((download.client_id, closing))

    def judged(slm, upload, texts, *_):
        if upload.client_id == "north":
            raise UploadError("client north: cannot classify")
        return fails(slm, upload, texts)

    monkeypatch.setattr(server.teachers, "probabilities", judged)
    close(Book(), server, Book(), lambda: done.append("between"))
    without = "north has no step 5 in the end and goes on with what it got: client north: cannot classify"
    assert done == [config.selection.pool, "between", without, "between", "south", ("south", True)]


# -- between machines ------------------------------------------------------------------------


def served(exchange):
    """Both silos have what came at once."""
    turn(exchange, 2)
    for _ in SILOS:
        exchange.send(echo(exchange.receive()))
    assert exchange.finished()
    turn(exchange, 2)
    assert exchange.spool.not_delivered(SILOS) == []


def test_a_closing_download_goes_to_its_silo_and_is_answered(exchange, kits, tmp_path):
    for name in SILOS:
        change(kits / "silos" / name, closing=True)
    exchange.config = exchange.carrier.config = exchange.config.model_copy(update={"closing": True})
    served(exchange)
    silos = [Silo(kits / "silos" / name, tmp_path) for name in SILOS]
    assert [one.closed for one in silos] == [None, None]
    assert not any(one.complete == one.agreed for one in silos)
    upload = silos[0]._mine(0)
    weights = {name: value * 1.5 if value.is_floating_point() else value for name, value in upload.slm.weights.items()}
    exchange.send(dataclasses.replace(echo(upload), slm=dataclasses.replace(upload.slm, weights=weights)), closing=True)
    assert exchange.spool.not_delivered(SILOS) == ["silo-0"]
    assert exchange.spool.complete("silo-0") == 1
    exchange.spool.note(OVER, "1")
    assert [exchange.spool.is_over_for(name) for name in SILOS] == [False, True]
    turn(exchange, 2)
    assert exchange.grid.pushed[-1] == ("silo-0", "train.closing", 0)
    assert exchange.spool.not_delivered(SILOS) == []
    assert [exchange.spool.complete(name) for name in SILOS] == [2, 1]
    assert exchange.spool.is_over_for("silo-0")
    assert silos[0].closed["accepted"]
    assert silos[0].answered == 2
    assert not differs(silos[0].slm().model.state_dict(), weights)
    receipt = json.loads((silos[0].state / "receipts" / "close-0000.json").read_text())
    assert receipt["metrics"] == {"round": 0.0, "accepted": 1.0}
    again = silos[0].close(silos[0].settings.experiment, 0, b"whatever: the answer was lost")
    assert again == {"round": 0.0, "accepted": 1.0}
    pushed = len(exchange.grid.pushed)
    turn(exchange, 2)
    assert len(exchange.grid.pushed) == pushed  # nothing more is asked


def test_a_closing_download_that_is_refused_is_owed_no_more(exchange, kits, tmp_path):
    change(kits / "silos" / "silo-0", closing=True)
    served(exchange)
    for name in SILOS:
        exchange.spool.close_silo(name, 0, b"no download")
    turn(exchange, 2)
    assert exchange.spool.not_delivered(SILOS) == []
    one, other = (Silo(kits / "silos" / name, tmp_path) for name in SILOS)
    for name, kind in zip(SILOS, ("UploadError", "FederationError"), strict=True):  # the other's kit agrees to none
        assert exchange.spool.fact(f"closed/{name}") == f"the silo did not take it: {kind}, see the silo's own log"
    assert "the closing download was refused (UploadError: " in closing_outcome(one.closed)
    receipt = json.loads((one.state / "receipts" / "close-0000.json").read_text())
    assert receipt["answer"]["status"] == "refused"
    assert other.closed is None
    assert not differs(one.slm().model.state_dict(), one._mine(0).slm.weights)
    with pytest.raises(FederationError, match="the closing download was refused"):
        one.close(one.settings.experiment, 0, b"")
    with pytest.raises(FederationError, match="agrees to no closing download"):
        other.close(other.settings.experiment, 0, b"")


def test_after_the_end_nothing_is_asked_or_served_by_a_server_that_is_started_again_either(exchange, tmp_path):
    exchange.config = exchange.carrier.config = exchange.config.model_copy(
        update={"arrivals": 1, "participations": 2, "closing": True}
    )
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    assert exchange.finished()
    exchange.spool.close()
    spool, config = Spool(tmp_path / "spool"), exchange.config.model_copy(update={"arrivals": 2})
    again = FlowerExchange(exchange.grid, spool, exchange.experiment, exchange.silos, config, exchange.intake)
    again.grid.online = list(SILOS)
    turn(again, 4)  # before the models are loaded, and whatever the configuration says now
    assert [kind for _, kind, _ in again.grid.pushed] == ["train.upload", "train.install"]
    assert again.finished()
    spool.close()


def test_the_servers_status_says_who_was_closed(exchange, kits, shell):
    spool = Spool(kits / "server" / "spool")
    spool.put("silo-0", 0, [b"an upload"])
    spool.delivered("silo-0", 0)
    spool.close_silo("silo-0", 0, b"weights")
    _, out, _ = shell("status", str(kits / "server"))
    assert ["silo-0", "in the end", "served"] in [re.split(r"  +", line.strip())[:3] for line in out.splitlines()]
    spool.closed("silo-0", "the silo keeps the SLM it had: worse on its held-out rows")
    spool.close()
    _, out, _ = shell("status", str(kits / "server"))
    assert "worse on its held-out rows" in out


def test_who_has_ended_is_asked_for_no_more_uploads(exchange):
    exchange.config = exchange.carrier.config = exchange.config.model_copy(update={"arrivals": 1, "participations": 2})
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    assert exchange.finished()
    exchange.grid.online = list(SILOS)
    turn(exchange, 4)
    assert [kind for _, kind, _ in exchange.grid.pushed] == ["train.upload", "train.install"]


def test_a_silo_tries_it_against_what_it_has_and_only_after_its_round(silo, federated, models, monkeypatch):
    change(silo.kit, closing=True)
    silo, experiment = Silo(silo.kit, silo.cache), silo.settings.experiment
    _, download = answer(silo, Config.model_validate(federated), models)
    with pytest.raises(FederationError, match="a closing download of round 0, and 0 are complete"):
        silo.close(experiment, 0, [encode(download)])
    silo.state.rename(silo.kit / "aside")
    with pytest.raises(KeptFileError, match="give it back the folder state that it had then"):  # and is asked again
        silo.close(experiment, 0, [encode(download)])
    (silo.kit / "aside").rename(silo.state)
    silo.install(experiment, 0, [encode(download)])
    had = {name: value.clone() for name, value in silo.slm().model.state_dict().items()}
    tried = []

    def decide(client, returned):
        tried.append({name: value.clone() for name, value in client.slm.model.state_dict().items()})
        return Decision(False, 4, 0.75, 0.25)

    monkeypatch.setattr(Client, "_try", decide)
    other = {name: value * 2 if value.is_floating_point() else value for name, value in download.slm.weights.items()}
    worse = dataclasses.replace(download, slm=dataclasses.replace(download.slm, weights=other))
    assert silo.close(experiment, 0, [encode(worse)]) == {"round": 0.0, "accepted": 0.0}
    assert not differs(tried[0], had)
    assert not differs(silo.slm().model.state_dict(), had)
    assert "worse (0.750 before, 0.250 with it, on 4 held-out rows)" in closing_outcome(silo.closed)


def test_what_a_later_round_brings_takes_the_place_of_what_came_in_the_end(silo, monkeypatch):
    change(silo.kit, closing=True, max_participations=2)
    silo, experiment = Silo(silo.kit, silo.cache), silo.settings.experiment
    upload = decode_upload(silo.upload(experiment, 0).read_bytes())
    silo.not_used(experiment, 0, "none")
    monkeypatch.setattr(Client, "_try", lambda *_: Decision(True, 0))
    weights = {name: value * 2 if value.is_floating_point() else value for name, value in upload.slm.weights.items()}
    came = dataclasses.replace(echo(upload), slm=dataclasses.replace(upload.slm, weights=weights))
    silo.close(experiment, 0, [encode(came)])
    assert not differs(silo.slm().model.state_dict(), weights)
    later = decode_upload(silo.upload(experiment, 1).read_bytes()).slm.weights
    silo.not_used(experiment, 1, "none")
    assert not differs(silo.slm().model.state_dict(), later)


def staying(silo, monkeypatch, closing=True):
    """A silo that stays for what comes in the end, with processes that do nothing."""
    change(silo.kit, closing=closing, runtime_port=free_ports(1)[0])
    silo = Silo(silo.kit, silo.cache)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(silo_processes, "wait_for_server", lambda *_: True)
    monkeypatch.setattr(silo_processes, "ASK", 0.0)
    monkeypatch.setattr(silo_processes, "supernode_command", lambda _: command)
    monkeypatch.setattr(silo_processes, "tasks_command", lambda _: command)
    return silo


def test_a_silo_stays_for_it_or_until_the_server_says_that_there_is_none(silo, monkeypatch, shell):
    notes, asked = [], []
    silo = staying(silo, monkeypatch)

    def ask(_):
        asked.append(1)
        return questions.Answer(1, len(asked) > 3, "")

    monkeypatch.setattr(questions, "ask", ask)
    write_whole(silo.state / "installed.json", [b'{"rounds": 1}'])
    write_whole(silo.state / "decision-0000.json", [b'{"accepted": true, "rows": 0}'])
    _, out, _ = shell("status", str(silo.kit))
    assert "stays for what the server sends once more when no more uploads come" in out
    run_silo(silo, notes.append)
    assert len(asked) > 3
    assert silo.closed["none"]
    assert silo.confirmed
    assert any("the run is over; nothing more comes" in note for note in notes)
    _, out, _ = shell("status", str(silo.kit))
    assert "in the end: nothing more comes" in out


@pytest.mark.parametrize("closing", [True, False])
def test_a_run_that_ended_without_a_silo_says_so_and_why(silo, monkeypatch, shell, closing):
    """Its own files would else say that all is complete."""
    notes, asked = [], []
    silo = staying(silo, monkeypatch, closing)

    def ask(_):
        asked.append(1)
        if len(asked) == 2:  # a request meanwhile
            silo.now("refused", why="a.csv: no such file\x1b[2J; put it there")
        return questions.Answer(0, len(asked) > 3, "")

    monkeypatch.setattr(questions, "ask", ask)
    ended = (
        r"the run is over, and this silo took no part: nothing was installed here; its last request was refused here"
    )
    with pytest.raises(FederationError, match=ended):
        run_silo(silo, notes.append)
    assert "a request of the server was refused here: a.csv: no such file [2J; put it there; it asks again" in notes
    _, out, _ = shell("status", str(silo.kit))
    assert "complete" not in out
    assert "refused here: a.csv: no such file" in out
    with pytest.raises(FederationError, match=ended):  # however often it is started
        run_silo(silo, notes.append)


def test_an_upload_that_the_servers_disk_has_lost_is_no_end_of_the_others_closing():
    done = []

    class Book:
        def last_served(self):
            return [Served(lost, ""), Served(lambda: SimpleNamespace(client_id="south"), "")]

        def __getattr__(self, name):
            return lambda *given, **_: done.append((name, *map(str, given)))

        def written(self):
            return [], []

    def lost():
        raise FederationError("north-up: cannot be read; put it back from a backup")

    class Method:
        def for_all(self, *_):
            return SimpleNamespace(pool="pool")

        def close(self, upload, *_):
            return "download", "record"

    close(Book(), Method(), Book(), lambda: None)
    assert [name for name, *_ in done] == ["closing", "not_closed", "closed", "send"]
    assert "north-up: cannot be read" in done[1][1]


def test_a_server_stays_until_its_silos_know_that_all_is_over(kits, monkeypatch):
    config = kits / "server" / "config.toml"
    config.write_text(config.read_text().replace("closing = false", "closing = true"))
    server = server_processes.ServerProcesses(kits / "server", lambda _: None)
    server.spool.put("silo-0", 0, [b"an upload"])
    server.spool.delivered("silo-0", 0)
    server.spool.close_silo("silo-0", 0, b"weights")
    server.spool.closed("silo-0", "delivered")
    server.spool.note(OVER, "1")
    for name, told, heard in (
        ("silo-0", "1", False),
        ("silo-0", "2", True),  # it ends by itself
        ("silo-1", "0", False),
        ("silo-1", "0 over", True),
    ):
        server.spool.note(f"told/{name}", told)
        assert server._has_heard(name, stays=True) == heard, (name, told)
    assert gateway._complete(kits / "server", "silo-1") == (0, True)
    assert server.spool.fact("told/silo-1") == "0 over"
    monkeypatch.setattr(server_processes, "TELL_TIME", 300.0)
    server._wait_until_told()
    server.spool.close()


def test_the_spool_remembers_whom_it_owes_what(tmp_path):
    spool = Spool(tmp_path / "spool")
    assert (spool.closing_of("a"), spool.owes_closing("a")) == (None, False)
    spool.close_silo("a", 2, b"weights")
    spool.close()
    spool = Spool(tmp_path / "spool")
    number, digest = spool.closing_of("a")
    assert number == 2
    assert b"".join(spool.closing_download("a", digest)) == b"weights"
    assert spool.not_delivered(["a", "b"]) == ["a"]
    spool.closing_file("a").write_bytes(b"other")
    with pytest.raises(FederationError, match="has changed since it was written"):
        list(spool.closing_download("a", digest))
    spool.closed("a", "delivered")
    assert spool.not_delivered(["a", "b"]) == []
    spool.close()


def test_receipts_of_an_earlier_version_are_none(tmp_path):
    """A server that is brought to this version in its last step 5 goes on."""
    run = RunDir.create(tmp_path / "run", load("demo"))
    run.write("synthetic/closing-pool.jsonl", '{"text": "a", "kept": true}\n{"text": "b", "kept": false}\n')
    assert run.receipts_of("closing-pool") == {}
