"""What a silo sends, keeps and says over its rounds: answers, rounds without a return, half precision, status."""

import dataclasses
import json
import os
import re
import shutil
from functools import partial

import pytest
import torch
from of_federations import answer, change, free_ports, from_kit, turn

from crosslm.cli.federation import _bytes
from crosslm.client import Client
from crosslm.config import AcceptanceConfig, Config, IntakeConfig, PrivacyConfig
from crosslm.errors import (
    BrokenLLMError,
    DataError,
    FederationError,
    KeptFileError,
    LeakError,
    ModelError,
    QuarantineError,
)
from crosslm.federation import intake
from crosslm.federation.flower import client_app, silo_processes
from crosslm.federation.flower.answer import answer_to
from crosslm.federation.flower.exchange import FlowerExchange
from crosslm.federation.flower.payload import split
from crosslm.federation.leaving import refused
from crosslm.federation.messages import decode_download, decode_upload, encode
from crosslm.federation.silo import Silo
from crosslm.federation.silo_news import doing, outcome
from crosslm.federation.spool import Spool
from crosslm.models.slm import SLM
from crosslm.support.files import ASIDE

from flwr.app import ConfigRecord, Context, Message, RecordDict  # isort: skip


def ask(silo, kind, monkeypatch, number=0, message=None, **fields):
    """The answer of the silo's real application."""
    request = {"experiment": silo.settings.experiment, "round": number, "version": 1, "crosslm": "any", **fields}
    content = {"request": ConfigRecord(request)} | ({"message": message} if message else {})
    handler = from_kit(silo.kit, monkeypatch)
    return handler(Message(RecordDict(content), 1, f"train.{kind}", ttl=60)).content


def keys(content):
    """Every field of a message, those of metrics by their full name."""
    return [*content["reply"], *(f"metrics.{name}" for name in content.get("metrics", {}))]


def test_the_dry_run_lists_every_field_of_every_answer(silo, federated, models, flower_run, monkeypatch, shell):
    promised = silo.would_send()
    sent = {"beside the upload": ask(silo, "upload", monkeypatch)}
    assert set(sent["beside the upload"]) == {"reply", "message"}
    _, download = answer(silo, Config.model_validate(federated), models)
    parts = split([encode(download)])
    sent["when an SLM came back, and once more in the end"] = ask(silo, "install", monkeypatch, message=parts)
    assert set(sent["when an SLM came back, and once more in the end"]) == {"reply", "metrics"}
    sent["when this silo refuses"] = ask(silo, "upload", monkeypatch, number=5)
    fresh = Silo(silo.kit.with_name("silo-1"), silo.cache)
    fresh.upload(fresh.settings.experiment, 0)
    sent["when the server did not use the upload"] = ask(fresh, "not_used", monkeypatch, reason="none")
    lines = {occasion: sorted(keys(content)) for occasion, content in sent.items()}
    with monkeypatch.context() as broken:  # a mistake of ours
        broken.setattr(client_app.Silo, "upload", lambda *_: 1 / 0)
        broken.setattr("crosslm.federation.flower.answer.check_bundle", lambda _: None)
        request = {"experiment": silo.settings.experiment, "round": 0, "version": 1, "crosslm": "any"}
        message = Message(RecordDict({"request": ConfigRecord(request)}), 1, "train.upload", ttl=60)
        error = answer_to(message, Context(1, 1, {}, RecordDict(), {}), b"").error
    lines["when something went wrong here"] = sorted(f"error.{name.strip('_')}" for name in vars(error))
    assert lines == {occasion: sorted(names) for occasion, names in promised["answers"].items()}
    assert {"version", "kind", "client_id", "client_round", "class_counts", "metrics"} <= promised["fields"].keys()
    kept = {path.stem: json.loads(path.read_text()) for path in (silo.state / "receipts").iterdir()}
    assert kept["upload-0000"]["answer"] == dict(sent["beside the upload"]["reply"])
    assert kept["install-0000"]["answer"] == dict(sent["when an SLM came back, and once more in the end"]["reply"])
    assert kept["install-0000"]["metrics"] == dict(sent["when an SLM came back, and once more in the end"]["metrics"])
    assert len(silo.receipts()) == 1
    code, out, _ = shell("client", str(silo.kit), "--dry-run")
    assert code == 0
    for line in (
        "field   version  1",
        'field   kind  "upload"',
        "answer  when an SLM came back, and once more in the end: status, round, crosslm, max_participations, "
        "metrics.round, metrics.accepted",
        "answer  when this silo refuses: status, reason, crosslm",
        "metrics.accepted is 0 if what came back is worse on held-out private rows",
        "carrier Flower adds of its own",
    ):
        assert line in out


def test_the_dry_run_says_what_a_person_reads_first_and_then_every_tensor(silo, shell):
    names = {"good": "Gebäude", "bad": "schön\u200b"}
    data = silo.settings.data.model_copy(update={"label_names": names})
    change(silo.kit, labels=("Gebäude", "schön\u200b"), data=data)
    promised = Silo(silo.kit, silo.cache).would_send()
    code, out, _ = shell("client", silo.kit, "--dry-run")
    assert code == 0
    lines = out.splitlines()
    total = f"{len(promised['tensors'])} tensors of {promised['tensor_bytes']} bytes"
    assert lines[0].startswith("silo silo-0 would send to localhost:9400: these fields, and " + total)
    assert 'field   labels  ["Gebäude", "schön\\u200b"]' in lines  # what is not shown is not hidden
    assert 'field   architecture.model_type  "bert"' in lines
    assert "field   architecture.label2id.schön\\u200b  1" in lines
    kinds = [line.split()[0] for line in lines]
    tensors = [place for place, kind in enumerate(kinds) if kind == "tensor"]
    assert {lines[place].split()[1] for place in tensors} == set(promised["tensors"])
    assert kinds.index("question") < tensors[0]
    assert tensors == list(range(tensors[0], tensors[0] + len(promised["tensors"])))
    assert lines[-1] == "Nothing was sent."


@pytest.mark.parametrize(("size", "words"), [(256, "256 bytes"), (97_953_800, "97953800 bytes (98.0 MB)")])
def test_sizes_are_in_megabytes_too(size, words):
    assert _bytes(size) == words


def test_the_classifier_in_use_is_whole_whenever_the_silo_dies(silo, federated, models, monkeypatch):
    """What came is on the disk before its folder, and the folder before the decision."""
    change(silo.kit, max_participations=2)
    silo, experiment, used = Silo(silo.kit, silo.cache), silo.settings.experiment, silo.state / "slm"
    _, download = answer(silo, Config.model_validate(federated), models)

    def dies(*_):
        raise OSError(28, "No space left on device")

    for name, left in (("save", set()), ("_complete", {"slm"})):
        with monkeypatch.context() as patch:
            patch.setattr(SLM if name == "save" else Silo, name, dies)
            with pytest.raises(OSError, match="No space"):
                silo.install(experiment, 0, [encode(download)])
        assert silo.installed == 0
        assert (silo.state / "download-0000.safetensors").is_file()
        assert {path.name for path in silo.state.glob("slm*")} == left
    silo.install(experiment, 0, [encode(download)])
    before = (used / "model.safetensors").read_bytes()
    silo.upload(experiment, 1)
    with monkeypatch.context() as patch:
        patch.setattr(SLM, "save", lambda slm, folder: (os.makedirs(folder), dies()))
        with pytest.raises(OSError, match="No space"):
            silo.not_used(experiment, 1, "none")
    assert (used / "model.safetensors").read_bytes() == before
    assert [path.name for path in silo.state.glob("slm*")] == ["slm"]
    silo.not_used(experiment, 1, "none")
    assert (used / "model.safetensors").read_bytes() != before


def test_nothing_is_there_to_send_without_its_receipt(silo, monkeypatch):
    def dies(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Silo, "_receipt", dies)
    with pytest.raises(OSError, match="No space"):
        silo.upload(silo.settings.experiment, 0)
    assert not list(silo.state.glob("upload-*"))


def test_what_a_silo_keeps_is_for_its_owner_alone_whoever_starts_it(silo):
    before = os.umask(0o022)  # Flower's own commands set none
    try:
        silo.upload(silo.settings.experiment, 0)
    finally:
        os.umask(before)
    assert silo.state.stat().st_mode & 0o777 == 0o700


def test_a_silo_has_no_copy_of_its_rows_and_needs_what_it_keeps_no_longer_than_the_run(silo, federated, models, shell):
    """As docs/privacy.md says of what may be deleted."""
    _, download = answer(silo, Config.model_validate(federated), models)
    silo.install(silo.settings.experiment, 0, [encode(download)])
    silo.nothing_more()
    silo.confirm()
    written = [path for path in silo.kit.rglob("*") if path.is_file() and path.name != silo.settings.data.train]
    assert {"upload-0000.safetensors", "download-0000.safetensors", "model.safetensors"} <= {
        path.name for path in written
    }
    for sentence in silo.private().texts:
        assert not [path for path in written if sentence.encode() in path.read_bytes()]
    for path in silo.state.glob("*.safetensors"):
        path.unlink()
    (silo.kit / silo.settings.data.train).unlink()
    assert "round 0: complete: the enhanced classifier is installed" in shell("status", silo.kit)[1]
    said = []
    silo_processes.run_silo(Silo(silo.kit, silo.cache), said.append)
    assert said == ["silo silo-0: all 1 rounds that it agreed to are complete"]
    assert SLM.load_trained(str(silo.state / "slm")).predict_proba(["a good day"]).shape == (1, 2)
    code, _, err = shell("predict", silo.kit, stdin="a good day\n")
    assert (code, "download-0000.safetensors cannot be read" in err) == (2, True)


@pytest.mark.parametrize(("dtype", "more"), [("float32", 0), ("float16", 1)])
def test_a_silo_keeps_as_much_as_docs_deploy_says(silo, federated, models, dtype, more):
    change(silo.kit, wire_dtype=dtype)
    silo = Silo(silo.kit, silo.cache)
    _, download = answer(silo, Config.model_validate(federated), models)
    silo.install(silo.settings.experiment, 0, [encode(download)])
    sizes = {path.name: path.stat().st_size for path in silo.state.glob("*.safetensors")}
    assert len(sizes) == 2 + more
    assert sizes["download-0000.safetensors"] == pytest.approx(sizes["upload-0000.safetensors"], rel=0.05)
    weights = (silo.state / "slm" / "model.safetensors").stat().st_size
    assert sizes.get("trained-0000.safetensors", weights) >= weights
    assert silo.would_send()["tensor_bytes"] == pytest.approx(weights / (1 + more), rel=0.1)


def test_a_silo_that_starts_again_has_its_classifier_back(silo, monkeypatch):
    """One that was killed between moving the old folder aside and naming the new one."""
    change(silo.kit, runtime_port=free_ports(1)[0])
    silo = Silo(silo.kit, silo.cache)
    aside = silo.state / f"slm{ASIDE}"
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"old")

    def gone(*_):
        raise FederationError("the server is gone")

    monkeypatch.setattr(silo_processes, "wait_for_server", gone)
    with pytest.raises(FederationError):
        silo_processes.run_silo(silo, print)
    assert (silo.state / "slm" / "model.safetensors").read_bytes() == b"old"


def test_a_silo_whose_classifier_had_no_say_is_told(silo, federated, models):
    _, download = answer(silo, Config.model_validate(federated), models)
    silo.install(silo.settings.experiment, 0, [encode(dataclasses.replace(download, metrics={"no_say": 1.0}))])
    assert silo.decision(0)["no_say"]
    assert "the gate did not let the classifier that was sent judge" in outcome(silo.decision(0))


def test_a_round_whose_return_is_refused_is_complete(silo, federated, models):
    """Nothing more comes for it: crosslm client ends, or goes on with the SLM that it has."""
    federated["privacy"] = {"max_shared_words": 2}
    privacy = PrivacyConfig(max_shared_words=2)
    change(silo.kit, privacy=privacy, encoder=str(models / "encoder"), max_participations=2)
    silo = Silo(silo.kit, silo.cache)
    upload, download = answer(silo, Config.model_validate(federated), models)
    near = dataclasses.replace(download, texts=(silo.private().texts[0],))
    with pytest.raises(LeakError):
        silo.install(silo.settings.experiment, 0, [encode(near)])
    assert silo.installed == 1
    assert silo.private().texts[0] not in json.dumps(silo.decision(0))
    assert "what came back was refused (LeakError: " in outcome(silo.decision(0))
    receipt = json.loads((silo.state / "receipts" / "install-0000.json").read_text())
    assert receipt["answer"] == refused(LeakError())  # of what was found no more than the kind is told
    weights = silo.slm().model.state_dict()
    assert all(weight.equal(upload.slm.weights[name]) for name, weight in weights.items())
    assert (silo.state / "slm" / "model.safetensors").exists()
    with pytest.raises(FederationError, match="round 0 is complete without an SLM: LeakError"):
        silo.install(silo.settings.experiment, 0, [encode(download)])  # the answer was lost
    assert decode_upload(silo.upload(silo.settings.experiment, 1).read_bytes()).client_round == 1


def test_a_download_that_was_refused_does_not_end_the_silos_part(exchange, kits, tmp_path, monkeypatch):
    for name in ("silo-0", "silo-1"):
        change(kits / "silos" / name, max_participations=2)
    exchange.config = exchange.carrier.config = exchange.config.model_copy(update={"participations": 2})
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    upload = exchange.receive()
    exchange.spool.serve("silo-0", 0, b"no download")
    turn(exchange, 2)
    (arrival,) = exchange.spool.arrivals()
    assert (arrival.state, arrival.note) == (
        "delivered",
        "the silo did not take it: UploadError, see the silo's own log",
    )
    assert Silo(kits / "silos" / "silo-0", tmp_path).installed == 1
    turn(exchange, 2)
    assert exchange.grid.pushed[-1] == ("silo-0", "train.upload", 1)
    assert exchange.receive().client_round == upload.client_round + 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (QuarantineError("0.51 by 40 texts", {"auc": 0.5}), "the gate has quarantined it"),
        (BrokenLLMError("silo-0: loss nan"), "the LLM could not learn from it"),
    ],
)
def test_a_refused_silo_is_told_without_figures_and_comes_again_as_in_one_process(
    exchange,
    kits,
    tmp_path,
    error,
    told,
):
    for name in ("silo-0", "silo-1"):
        change(kits / "silos" / name, max_participations=2)
    exchange.config = exchange.carrier.config = exchange.config.model_copy(update={"participations": 2})
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    exchange.receive()
    exchange.refuse("silo-0", 0, error)
    assert exchange.spool.complete("silo-0") == 0
    assert not exchange.finished()
    turn(exchange, 2)
    assert exchange.grid.pushed[-1] == ("silo-0", "train.not_used", 0)
    assert exchange.spool.complete("silo-0") == 1
    silo = Silo(kits / "silos" / "silo-0", tmp_path)
    assert silo.installed == 1
    assert silo.decision(0)["not_used"] == told
    turn(exchange, 2)
    again = exchange.receive()
    assert again.client_round == 1

    silo = Silo(kits / "silos" / "silo-1", tmp_path)  # the same steps, by the client of one process
    silo.upload(silo.settings.experiment, 0)
    silo.not_used(silo.settings.experiment, 0, "because\x1b[31m")
    assert silo.decision(0)["not_used"] == "because [31m"
    settings, private = silo.settings, silo.private()
    fresh = Silo(kits / "silos" / "silo-1", tmp_path)
    fresh.state = tmp_path / "no state"
    of_step_1 = (settings.id, private, fresh.slm(), settings.fit, settings.seed)
    local = Client(*of_step_1, acceptance=settings.acceptance)
    local.train()
    expected, found = local.train(), decode_upload(silo.upload(settings.experiment, 1).read_bytes())
    assert all(weight.equal(found.slm.weights[name]) for name, weight in expected.slm.weights.items())


def test_the_last_refusal_is_told_before_the_server_goes(exchange, monkeypatch):
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    exchange.receive()
    exchange.refuse("silo-0", 0, ValueError("no good"))
    exchange.start()
    assert exchange.drain(0.0) == []
    assert exchange.spool.complete("silo-0") == 1


def test_a_silo_that_is_added_is_asked_once_the_server_was_started_again(exchange, tmp_path):
    exchange.grid.handlers["late"] = lambda message: None
    exchange.grid.online.append("late")
    turn(exchange, 2)
    exchange.receive()
    assert {name for name, _, _ in exchange.grid.pushed} == {"silo-0", "silo-1"}
    exchange.spool.close()
    spool, silos = Spool(tmp_path / "spool"), [*exchange.silos, "late"]
    again = FlowerExchange(exchange.grid, spool, exchange.experiment, silos, exchange.config, exchange.intake)
    assert again.receive().client_id == "silo-0"  # goes on where it was
    turn(again, 2)
    assert [name for name, _, _ in exchange.grid.pushed] == ["silo-0", "silo-1", "late"]
    spool.close()


@pytest.mark.parametrize("name", ["upload-0000.json", "download-0000.safetensors", "closing.safetensors"])
def test_a_kept_file_that_changed_on_the_disk_is_named_and_decides_nothing(silo, federated, models, name):
    """The privacy budget that is spent is read from what the uploads told."""
    change(silo.kit, max_participations=2, closing=True)
    silo, experiment = Silo(silo.kit, silo.cache), silo.settings.experiment
    _, download = answer(silo, Config.model_validate(federated), models)
    silo.install(experiment, 0, [encode(download)])
    if name == "closing.safetensors":
        silo.close(experiment, 0, [encode(download)])
    path = silo.state / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=rf"silo silo-0: .*{name} has changed since .*put {name}.* back"):
        silo.upload(experiment, 1)
    path.unlink()
    with pytest.raises(ModelError, match=rf"{name} cannot be read"):
        silo.upload(experiment, 1)
    path.write_bytes(whole)
    silo.upload(experiment, 1)
    path = silo.state / "upload-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="upload-0001"):  # it is not sent once more as it is now
        silo.upload(experiment, 1)
    with pytest.raises(ModelError, match="upload-0001"):
        silo.install(experiment, 1, [encode(dataclasses.replace(download, client_round=1))])
    assert silo.installed == 1


def test_a_complete_round_is_not_trained_again_whoever_asks(silo, federated, models):
    """Its files may be gone to make room; under differential privacy another upload would be one release more."""
    change(silo.kit, max_participations=2)
    silo, experiment = Silo(silo.kit, silo.cache), silo.settings.experiment
    _, download = answer(silo, Config.model_validate(federated), models)
    silo.install(experiment, 0, [encode(download)])
    sent, told = silo.state / "upload-0000.safetensors", (silo.state / "upload-0000.json").read_bytes()
    assert silo.upload(experiment, 0) == sent
    sent.unlink()
    with pytest.raises(FederationError, match="round 0 is complete and what was sent in it is not kept any more"):
        silo.upload(experiment, 0)
    assert not sent.exists()
    assert (silo.state / "upload-0000.json").read_bytes() == told


def test_under_dp_an_upload_that_was_lost_is_not_trained_again(silo):
    """It may have left: another with fresh noise is one release more, which no bound counts."""
    privacy = PrivacyConfig(epsilon=8.0, trained_layers=0, delta=1e-3)
    change(silo.kit, privacy=privacy, acceptance=AcceptanceConfig(), max_participations=1)
    silo = Silo(silo.kit, silo.cache)
    sent = silo.upload(silo.settings.experiment, 0)
    released, told = sent.read_bytes(), silo.state / "upload-0000.json"
    sent.unlink()
    with pytest.raises(KeptFileError, match=r"upload-0000.safetensors, which round 0 was trained for .* put .* back"):
        silo.upload(silo.settings.experiment, 0)
    assert not sent.exists()
    sent.write_bytes(released)
    told.unlink()  # as where it was cut off between the two
    assert silo.upload(silo.settings.experiment, 0).read_bytes() == released
    assert json.loads(told.read_text())["metrics"]["dp/epsilon"] <= 8


def test_no_memory_for_the_checks_of_what_comes_back_decides_nothing(silo, federated, models, flower_run, monkeypatch):
    _, download = answer(silo, Config.model_validate(federated), models)
    experiment, decode = silo.settings.experiment, intake.decode_download
    monkeypatch.setattr(intake, "decode_download", lambda _: bytearray(2**60))
    request = {"experiment": experiment, "round": 0, "version": 1, "crosslm": "any"}
    content = RecordDict({"request": ConfigRecord(request), "message": split([encode(download)])})
    with pytest.raises(client_app.AskAgainError, match="ShortageError"):
        from_kit(silo.kit, monkeypatch)(Message(content, 1, "train.install", ttl=60))
    assert silo.installed == 0
    assert "a check could not be made: MemoryError" in silo.doing()["why"]
    monkeypatch.setattr(intake, "decode_download", decode)
    assert silo.install(experiment, 0, [encode(download)])["round"] == 0.0


def test_the_weights_of_earlier_uploads_are_not_read_again(silo, federated, models, monkeypatch):
    """They are hundreds of megabytes each, and a round would take longer than the one before."""
    change(silo.kit, max_participations=3, acceptance=AcceptanceConfig())
    silo, read = Silo(silo.kit, silo.cache), []
    _, download = answer(silo, Config.model_validate(federated), models)
    silo.install(silo.settings.experiment, 0, [encode(download)])
    kept = Silo._kept
    monkeypatch.setattr(Silo, "_kept", lambda self, path: (read.append(path.name), kept(self, path))[1])
    for number in (1, 2):
        read.clear()
        silo.upload(silo.settings.experiment, number)
        assert [name for name in read if name.endswith("safetensors")] == [f"download-{number - 1:04}.safetensors"]
        read.clear()
        silo.install(silo.settings.experiment, number, [encode(dataclasses.replace(download, client_round=number))])
        assert [name for name in read if name.endswith("safetensors")] == [f"upload-{number:04}.safetensors"]


def test_a_kit_of_a_version_that_kept_it_in_the_upload_alone_goes_on(silo, federated, models):
    change(silo.kit, max_participations=2)
    silo = Silo(silo.kit, silo.cache)
    upload, download = answer(silo, Config.model_validate(federated), models)
    told = silo._told(0)
    for path in silo.state.glob("upload-0000.json*"):
        path.unlink()
    assert silo._told(0) == told
    assert told["metrics"] == dict(upload.metrics)
    silo.install(silo.settings.experiment, 0, [encode(download)])


def test_a_changed_file_is_no_answer_to_the_server(silo, federated, models, flower_run, monkeypatch):
    """It asks again: a refusal would be for good, and the file may be put back."""
    ask(silo, "upload", monkeypatch)
    path = silo.state / "upload-0000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    for kind, fields in (("upload", {}), ("not_used", {"reason": "none"})):
        with pytest.raises(Exception, match=r"^KeptFileError$"):
            ask(silo, kind, monkeypatch, **fields)
    assert Silo(silo.kit, silo.cache).installed == 0
    path.write_bytes(whole)
    assert ask(silo, "upload", monkeypatch)["reply"]["status"] == "ok"


def test_a_state_folder_that_is_away_is_no_answer_to_the_server_either(silo, federated, models):
    """The server has counted the round: what it sends must find the silo that it was made for, or be sent again."""
    _, download = answer(silo, Config.model_validate(federated), models)
    experiment, aside = silo.settings.experiment, silo.kit / "aside"
    silo.state.rename(aside)
    asked = [partial(silo.install, parts=[encode(download)]), partial(silo.not_used, reason="none")]
    for ask_it in asked:
        with pytest.raises(KeptFileError, match="never uploaded; give it back the folder state"):
            ask_it(experiment, 0)
    assert silo.installed == 0
    shutil.rmtree(silo.state, ignore_errors=True)
    aside.rename(silo.state)
    assert silo.install(experiment, 0, [encode(download)])["accepted"] == 1.0


def test_test_rows_that_cannot_be_read_hold_nothing_back(silo, federated, models, shell):
    change(silo.kit, data=silo.settings.data.model_copy(update={"test": "other.csv"}))
    silo = Silo(silo.kit, silo.cache)
    _, download = answer(silo, Config.model_validate(federated), models)
    (silo.kit / "other.csv").write_text("text,label\nday,grand\n")
    assert silo.install(silo.settings.experiment, 0, [encode(download)])["accepted"] == 1.0
    assert "the enhanced classifier is installed" in outcome(silo.decision(0))
    assert "not tested: " in outcome(silo.decision(0))


def test_what_was_trained_for_another_precision_and_cut_off_counts_no_more(silo, monkeypatch):
    change(silo.kit, wire_dtype="float16")
    silo = Silo(silo.kit, silo.cache)
    with monkeypatch.context() as patch:
        patch.setattr(Silo, "_sent", lambda silo, number: silo.kit / "silo.key" / "no folder")
        with pytest.raises(OSError, match=r"silo\.key"):
            silo.upload(silo.settings.experiment, 0)
    stale = silo.state / "trained-0000.safetensors"
    assert stale.exists()
    change(silo.kit, wire_dtype="float32", seed=7)
    silo = Silo(silo.kit, silo.cache)
    sent = decode_upload(silo.upload(silo.settings.experiment, 0).read_bytes())
    assert not stale.exists()
    assert all(weight.equal(sent.slm.weights[name]) for name, weight in silo._uploaded(0).slm.weights.items())


def test_embeddings_that_are_frozen_stay_so_in_the_rounds_to_come(silo):
    change(silo.kit, max_participations=2, freeze_embeddings=True)
    silo, experiment = Silo(silo.kit, silo.cache), silo.settings.experiment
    first = decode_upload(silo.upload(experiment, 0).read_bytes()).slm.weights
    silo.not_used(experiment, 0, "none")
    second = decode_upload(silo.upload(experiment, 1).read_bytes()).slm.weights
    (table,) = [name for name in first if name.endswith("word_embeddings.weight")]
    assert {name for name, weight in second.items() if weight.equal(first[name])} >= {table}
    assert not second["classifier.weight"].equal(first["classifier.weight"])


def test_half_precision_goes_both_ways_and_is_not_kept_at_the_silo(silo, federated, models):
    change(silo.kit, wire_dtype="float16")
    silo = Silo(silo.kit, silo.cache)
    upload, download = answer(silo, Config.model_validate(federated), models)
    for state in (upload.slm, download.slm):
        assert {weight.dtype for weight in state.weights.values() if weight.is_floating_point()} == {torch.float16}
    assert len(encode(download)) < 0.7 * len(
        encode(dataclasses.replace(download, slm=upload.slm.in_dtype(torch.float32)))
    )
    assert decode_download(encode(download)).slm.weights.keys() == upload.slm.weights.keys()
    trained = silo._uploaded(0).slm.weights
    assert all(weight.dtype == torch.float32 for weight in trained.values() if weight.is_floating_point())
    assert any(not weight.equal(upload.slm.weights[name].float()) for name, weight in trained.items())
    silo.not_used(silo.settings.experiment, 0, "none")
    kept = silo.slm().model.state_dict()
    assert all(weight.equal(trained[name]) for name, weight in kept.items())
    (receipt,) = silo.receipts()
    exact, rounded = receipt["accuracy_on_private_rows"].values()
    assert abs(exact - rounded) <= 1 / len(silo.private())  # at most one row changes sides


def test_a_silo_that_took_half_precision_installs_it(silo, federated, models):
    change(silo.kit, wire_dtype="float16")
    silo = Silo(silo.kit, silo.cache)
    _, download = answer(silo, Config.model_validate(federated), models)
    assert silo.install(silo.settings.experiment, 0, [encode(download)])["accepted"] == 1.0
    weights = silo.slm().model.state_dict()
    assert all(weight.equal(download.slm.weights[name].to(weight.dtype)) for name, weight in weights.items())


def test_what_is_amiss_at_the_silo_itself_decides_nothing(silo, federated, models, flower_run, monkeypatch):
    silo.upload(silo.settings.experiment, 0)
    _, download = answer(silo, Config.model_validate(federated), models)
    rows = silo.kit / "silo-0.csv"
    private = rows.read_bytes()
    rows.unlink()
    with pytest.raises(Exception, match=r"^DataError$"):  # of whatever kind Flower makes of it; no name of a file
        ask(silo, "install", monkeypatch, message=split([encode(download)]))
    assert Silo(silo.kit, silo.cache).installed == 0
    rows.write_bytes(private)
    assert "metrics" in ask(silo, "install", monkeypatch, message=split([encode(download)]))
    assert Silo(silo.kit, silo.cache).installed == 1


def test_a_silo_says_what_it_does_and_why_it_refused(silo, federated, models, flower_run, monkeypatch, shell):
    def said():
        code, out, _ = shell("status", str(silo.kit))
        assert code == 0
        return out

    assert "nothing has left this silo" in said()
    seen = []
    train = Client.train
    monkeypatch.setattr(Client, "train", lambda self: seen.append(said()) or train(self))
    _, download = answer(silo, Config.model_validate(federated), models)
    assert "training for round 0 since " in seen[0]
    assert "nothing has left" not in seen[0].replace("nothing of this round has left yet", "")
    assert "waiting since " in said()
    assert "round 0: trained; nothing has come back yet" in said()
    ask(silo, "upload", monkeypatch, number=7)
    assert "refused a request 0 s ago: silo silo-0: agrees to 1 uploads (max_participations)" in said()
    silo.install(silo.settings.experiment, 0, [encode(download)])
    assert "round 0: complete: the enhanced classifier is installed" in said()
    (silo.kit / "silo-0.csv").unlink()
    (silo.state / "now.json").unlink()
    with pytest.raises(DataError):
        Silo(silo.kit, silo.cache).private()
    assert "round 0: complete" in said()


def test_a_silo_measures_on_its_own_test_rows_and_tells_nobody(silo, federated, models, shell):
    """What the classifier is worth is known where its user is: before and after, and by a prediction."""
    (silo.kit / "other.csv").write_text('text,label\n"good day",good\n"bad day",bad\n"good good",good\n')
    change(silo.kit, data=silo.settings.data.model_copy(update={"test": "other.csv"}))
    silo = Silo(silo.kit, silo.cache)
    code, _, err = shell("predict", str(silo.kit), str(silo.kit / "other.csv"))
    assert (code, "has no classifier yet" in err) == (2, True)
    _, download = answer(silo, Config.model_validate(federated), models)
    code, out, err = shell("predict", str(silo.kit), str(silo.kit / "other.csv"))
    before = float(re.search(r"accuracy (\S+) \[\S+ \S+\] on 3 rows", err)[1])
    told = silo.install(silo.settings.experiment, 0, [encode(download)])
    assert set(told) == {"round", "accepted"}
    figures = silo.decision(0)["test"]
    assert (figures["rows"], round(figures["before"], 3)) == (3, before)
    returned = silo.slm()
    assert figures["after"] == returned.accuracy(silo.test())
    assert f"{figures['before']:.3f} before, {figures['after']:.3f} with it, on 3 test rows" in shell(
        "status", str(silo.kit)
    )[1].replace("\n", " ")
    receipts = " ".join(path.read_text() for path in (silo.state / "receipts").iterdir())
    assert '"test"' not in receipts
    code, out, err = shell("predict", str(silo.kit), str(silo.kit / "other.csv"))
    assert f"accuracy {figures['after']:.3f} [" in err
    code, _, err = shell("predict", str(silo.kit), str(silo.kit / "other.csv"), "--own")
    assert (code, "--own is for run folders" in err) == (2, True)
    assert out.splitlines()[0].startswith("text,label,predicted")


def test_test_rows_that_are_not_there_are_not_measured_and_wrong_ones_stop_the_start(silo, shell):
    change(silo.kit, data=silo.settings.data.model_copy(update={"test": "other.csv"}))
    assert Silo(silo.kit, silo.cache).test() is None
    (silo.kit / "other.csv").write_text("text,label\nday,grand\n")
    code, _, err = shell("client", str(silo.kit))
    assert (code, "other.csv: row 1 has the label 'grand'" in err) == (2, True)


def test_a_training_that_was_killed_is_not_said_to_go_on():
    now = {"now": "training", "round": 0, "why": "", "since": 0.0, "pid": os.getpid()}
    assert "was stopped in it" not in doing(now, "3 min")
    assert "was stopped in it; the server asks again" in doing(now | {"pid": 2**22 + 1}, "3 min")


def test_what_came_of_a_round_is_told_apart():
    figures = {"rows": 20, "before": 0.8, "after": 0.5}
    told = [
        outcome(decision)
        for decision in (
            {"accepted": True, **figures},
            {"accepted": False, **figures},
            {"accepted": False, "rows": 0, "refused": "UploadError: cut"},
            {"accepted": False, "rows": 0, "not_used": "the gate has quarantined it"},
            {"accepted": True, **figures, "no_say": True},
        )
    ]
    assert len(set(told)) == 5
    assert told[4] == told[0] + "; the gate did not let the classifier that was sent judge what it was taught"
    assert "0.800 before, 0.500 with it" in told[1]
    assert "UploadError: cut" in told[2]
    assert "the gate has quarantined it" in told[3]


def test_the_servers_status_says_since_when_a_silo_is_asked(kits, shell, monkeypatch):
    spool = Spool(kits / "server" / "spool")
    spool.note("silo/silo-0", "1000 upload of round 0 asked for")
    spool.close()
    monkeypatch.setattr("crosslm.cli.federation.time.time", lambda: 1000 + 200)
    code, out, _ = shell("status", str(kits / "server"))
    assert code == 0
    (line,) = [line for line in out.splitlines() if "silo-0" in line]
    assert "3 min" in line


@pytest.mark.parametrize("private", [False, True])
def test_a_silo_attacks_what_it_would_upload_before_it_does(silo, shell, private):
    """An SLM that has learned its rows by heart is told from them; nothing is kept, and no budget is spent."""
    fit = silo.settings.fit.model_copy(update={"epochs": 30, "learning_rate": 5e-3, "patience": 0})
    dp = PrivacyConfig(epsilon=8.0) if private else PrivacyConfig()
    data = silo.settings.data.model_copy(update={"test": "own.csv"})
    change(silo.kit, fit=fit, privacy=dp, acceptance=AcceptanceConfig(), data=data)
    code, _, err = shell("audit", silo.kit)
    assert (code, "an audit needs rows that nothing was trained on: name a file in silo.toml" in err) == (2, True)
    labels = silo.settings.labels
    rows = [f"row {number} of the kind {labels[number % 2]},{labels[number % 2]}" for number in range(60)]
    (silo.kit / "silo-0.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (silo.kit / "own.csv").write_text("text,label\n" + "\n".join(rows[:30]) + "\n")
    code, _, err = shell("audit", silo.kit)
    assert (code, "silo silo-0: an audit needs 20 private rows and 40 held-out ones" in err) == (2, True)
    other = [row.replace("row", "a", 1) for row in rows]
    (silo.kit / "own.csv").write_text("text,label\n" + "\n".join([*rows[:5], *other]) + "\n")
    code, out, err = shell("audit", silo.kit)
    assert code == 0, err
    assert "60 + 60" in out  # copies of private rows are no others
    assert "which is which" in out
    assert re.search(r"│ (7\.9\d|8\.00) " if private else r"│ none ", out)
    assert "nothing was kept, and nothing was sent" in out
    assert not (silo.kit / "state").exists()


def test_a_model_whose_uploads_would_be_refused_is_not_trained(silo, monkeypatch):
    """Whether or not crosslm doctor was asked; half the bytes may be few enough."""
    change(silo.kit, intake=IntakeConfig(max_bytes=1000))
    silo = Silo(silo.kit, silo.cache)
    monkeypatch.setattr(Client, "train", lambda _: pytest.fail("it trained"))
    message = r"silo silo-0: SLM .* has (\d+) bytes .* at most 1000 .*intake\.max_bytes"
    with pytest.raises(ModelError, match=message) as told:
        silo.upload(silo.settings.experiment, 0)
    size = int(re.search(message, str(told.value))[1])
    monkeypatch.undo()
    change(silo.kit, intake=IntakeConfig(max_bytes=size - 1000), wire_dtype="float16")
    assert Silo(silo.kit, silo.cache).upload(silo.settings.experiment, 0).stat().st_size < size - 1000
