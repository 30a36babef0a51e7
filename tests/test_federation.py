"""A federation's parts, each alone: kits, spool, silo, gateway, and the exchange over a grid in memory."""

import asyncio
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import zipfile
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
from conftest import PATIENCE
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from of_federations import answer, before, change, echo, free_ports, from_kit, turn, wait_until
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from crosslm.config import AcceptanceConfig, Config, FederationConfig, PrivacyConfig, SLMSpec, merged
from crosslm.errors import (
    ConfigError,
    DataError,
    FederationError,
    KeptFileError,
    LeakError,
    PassingError,
    RunError,
    UploadError,
)
from crosslm.federation import hashed_files, intake, keys, silo_state
from crosslm.federation.flower import carrier, gateway, processes, questions, server_processes, silo_processes
from crosslm.federation.flower import exchange as exchange_module
from crosslm.federation.flower.carrier import LONGEST_WAIT
from crosslm.federation.flower.exchange import FlowerExchange
from crosslm.federation.flower.payload import joined, split
from crosslm.federation.flower.replies import answer_in
from crosslm.federation.flower.silo_processes import run_silo
from crosslm.federation.kit_texts import server_readme, silo_readme
from crosslm.federation.kit_toml import in_kit
from crosslm.federation.kits import (
    SERVER_FILE,
    SILO_FILE,
    SiloData,
    SiloSettings,
    dump,
    read_server,
    read_silo,
    server_config,
    silo_names,
)
from crosslm.federation.messages import decode_upload, encode
from crosslm.federation.provision import provision
from crosslm.federation.silo import Silo
from crosslm.federation.spool import MOST_TRIES, OVER, WORK, Spool
from crosslm.models.slm import SLM
from crosslm.runs import rundir
from crosslm.runs.rundir import RunDir
from crosslm.sections.section import Section
from crosslm.support.files import PART, parts_of, write_whole

# Flower writes these where a message is made; a plain process has to say what run it is in
from flwr.app import ConfigRecord, Error, Message, RecordDict  # isort: skip
from flwr.common.constant import ErrorCode  # isort: skip


# -- kits ------------------------------------------------------------------------------------


def test_kits_hold_what_each_party_needs_and_no_secret_of_another(kits):
    authority = x509.load_pem_x509_certificate((kits / "authority" / "ca.crt").read_bytes())
    certificate = x509.load_pem_x509_certificate((kits / "server" / "server.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert silo_names(kits / "server") == ["silo-0", "silo-1"]
    secrets = {}
    for silo in ("silo-0", "silo-1"):
        kit = kits / "silos" / silo
        key = serialization.load_ssh_private_key((kit / "silo.key").read_bytes(), None)
        assert isinstance(key.curve, ec.SECP384R1)
        public = serialization.load_ssh_public_key((kits / "server" / "silos" / f"{silo}.pub").read_bytes())
        assert public.public_numbers() == key.public_key().public_numbers()
        secrets[kit / "silo.key"] = (kit / "silo.key").read_bytes()
        assert (kit / "ca.crt").read_bytes() == (kits / "authority" / "ca.crt").read_bytes()
    for path in (kits / "server" / "server.key", kits / "authority" / "ca.key"):
        secrets[path] = path.read_bytes()
    for path in (path for path in kits.rglob("*") if path.is_file()):
        held = [owner for owner, secret in secrets.items() if secret in path.read_bytes()]
        assert held in ([], [path]), f"{path} holds the secret of {held}"
        if held:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def keys_of(section, table=""):
    """Each key of a settings file, with its table."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from keys_of(value, name)
        else:
            yield table, name, field


def with_comments_taken_in(text):
    """What a file says when each of its comments that is a key with a value is none any more."""
    return re.sub(r"^# (?=\w+ = (?!WHOLE NUMBER|NUMBER|\"\.{3}\"|\"mean\")|\[)", "", text, flags=re.M)


@pytest.mark.parametrize(
    ("kit", "name", "read"), [("server", SERVER_FILE, read_server), ("silos/silo-1", SILO_FILE, read_silo)]
)
def test_a_settings_file_has_every_key_that_may_be_set_below_what_it_means(kits, kit, name, read):
    settings, text = read(kits / kit), (kits / kit / name).read_text()
    tables = dict(zip(*[iter(["", *re.split(r"^\[(\w+)\]\n", text, flags=re.M)])] * 2, strict=True))
    for table, key, field in keys_of(settings):
        assert field.description, f"{table}.{key} has no docstring"
        found = re.search(rf"^((?:# .*\n)+)(?:# )?(?:{key} = |\[{table}\.{key}\])", tables[table], flags=re.M)
        assert found, f"{table}.{key}"
        said = found[1].replace("# ", "").replace("\n", " ").strip()
        assert said == in_kit(field.description).replace("``", "").replace("\n", " "), f"{table}.{key}"
    assert type(settings).model_validate(tomllib.loads(with_comments_taken_in(text))) == settings
    assert "slm.private" not in text


def test_a_key_that_is_a_comment_in_a_kit_can_be_set(kits):
    file = kits / "silos" / "silo-0" / SILO_FILE
    text = file.read_text()
    assert read_silo(file.parent).privacy == PrivacyConfig()
    for line, value in (("# hide_counts = false", "hide_counts = true"), ('# test = "..."', 'test = "more.csv"')):
        assert line in text
        text = text.replace(line, value)
    text = text.replace("# max_shared_words = WHOLE NUMBER", "max_shared_words = 8")
    file.write_text(text.replace("# [data.label_names]\n", '[data.label_names]\nminus = "bad"\n'))
    settings = read_silo(file.parent)
    assert settings.privacy == PrivacyConfig(hide_counts=True, max_shared_words=8)
    assert (settings.data.test, settings.data.label_names) == ("more.csv", {"minus": "bad"})


def test_a_configuration_that_has_changed_since_is_told_and_not_taken(kits, federated):
    news, config = [], Config.model_validate(federated)
    provision(config, "localhost:9400", kits, news.append)
    assert news == []  # the kits' own
    before = (kits / "server" / "config.toml").read_bytes()
    changed = config.model_copy(update={"llm": config.llm.model_copy(update={"samples": 99})})
    assert provision(changed, "localhost:9400", kits, news.append) == []
    (said,) = news
    assert said.endswith("config.toml stays as it is, and has another llm: change it there too")
    assert (kits / "server" / "config.toml").read_bytes() == before


def test_a_strict_client_trusts_the_kits_server(kits):
    """As Python 3.13 and newer are by themselves."""
    kit = kits / "server"
    server, client = (ssl.SSLContext(kind) for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    server.load_cert_chain(kit / "server.crt", kit / "server.key")
    client.load_verify_locations(kits / "silos" / "silo-0" / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks, answers = client.wrap_bio(back, there, server_hostname="localhost"), server.wrap_bio(there, back, True)
    for side in (asks, answers, asks, answers):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert asks.getpeercert()["subjectAltName"][0] == ("DNS", "localhost")


def test_the_server_kit_has_the_run_and_the_silo_kit_its_own_settings(kits, federated):
    config = server_config(kits / "server")
    assert config.task == Config.model_validate(federated).task
    assert config.data.dir == str((kits / "server").absolute())  # and no folder of the machine that made the kits
    settings = read_silo(kits / "silos" / "silo-1")
    assert settings.experiment == read_server(kits / "server").experiment
    assert settings.slm.model == federated["clients"][1]["model"]
    assert settings.data.train == "silo-1.csv"
    assert settings.labels == ("bad", "good")
    assert (kits / "silos" / "silo-1" / "start.sh").stat().st_mode & stat.S_IXUSR
    assert "crosslm client ." in (kits / "silos" / "silo-1" / "start.sh").read_text()
    assert "def " not in (kits / "server" / "app" / "pyproject.toml").read_text()


def test_a_silos_kit_has_all_that_the_configuration_sets_for_it(federated, tmp_path):
    federated |= {
        "seed": 5,
        "acceptance": {"margin": 0.5},
        "privacy": {"hide_counts": True, "max_shared_words": 6},
        "intake": {"max_rms": 7.0},
        "federation": {"participations": 3, "closing": True},
    }
    federated["slm"] |= {"max_length": 17, "freeze_embeddings": True, "private": {"epochs": 5}}
    names = {"text_column": "t", "label_column": "l", "label_names": {"minus": "bad"}, "skip_labels": ("none",)}
    federated["data"] |= names
    federated["clients"][1]["test"] = "own.csv"
    config = Config.model_validate(federated)
    silo = read_silo(provision(config, "localhost:9400", tmp_path / "kits")[2])
    assert silo == SiloSettings(
        id="silo-1",
        experiment=read_server(tmp_path / "kits" / "server").experiment,
        server="localhost:9400",
        labels=config.task.labels,
        seed=5,
        device="cpu",
        runtime_port=9095,
        max_participations=3,
        closing=True,
        data=SiloData(train="silo-1.csv", test="own.csv", **names),
        slm=SLMSpec(model=federated["clients"][1]["model"]),
        max_length=17,
        freeze_embeddings=True,
        fit=config.slm.private,
        acceptance=config.acceptance,
        intake=config.intake,
        privacy=config.privacy,
        encoder=config.selection.encoder,
    )
    usual = [name for name, field in SiloSettings.model_fields.items() if getattr(silo, name) == field.default]
    assert usual == ["wire_dtype"]  # of what has its usual value nobody would see that it is not handed over


def test_provision_takes_what_is_set_beside_the_configuration(shell, federated, tmp_path):
    file, kits = tmp_path / "run.toml", tmp_path / "kits"
    file.write_text(tomli_w.dumps(federated))
    code, _, err = shell("provision", file, "--address", "localhost:9400", "--output", kits, "--set", "seed=9")
    assert (code, err) == (0, "")
    assert {read_silo(kit).seed for kit in (kits / "silos").iterdir()} == {9}


@pytest.mark.parametrize(
    ("codes", "ends", "called"),
    [((1, 137, 0), 0, 3), ((2, 0), 2, 1), ((1, 130, 0), 130, 2)],
    ids=["died twice", "a wrong setting", "from the keyboard"],
)
@pytest.mark.parametrize("kit", ["server", "silos/silo-1"])
def test_start_sh_starts_again_what_dies_and_nothing_else(kits, tmp_path, kit, codes, ends, called):
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    ways = " ".join(map(str, codes))
    words = f'echo "$PWD $*" >> {log}; set -- {ways}; shift $(($(wc -l < {log}) - 1)); exit $1'
    for name, script in (("crosslm", words), ("sleep", "exit 0")):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    found = subprocess.run([kits / kit / "start.sh"], env=environment, cwd=tmp_path, timeout=60, check=False)
    assert found.returncode == ends
    command = "server" if kit == "server" else "client"
    assert log.read_text().splitlines() == [f"{(kits / kit).resolve()} {command} ."] * called


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_start_sh_ends_what_it_has_started(kits, tmp_path, number):
    log, program = tmp_path / "log", tmp_path / "crosslm"
    waits = "trap 'sleep 0.2; echo ended; exit 143' TERM; echo started; while true; do sleep 0.05; done"
    program.write_text(f"#!/bin/sh\nexec > {log}\n{waits}\n")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    heed = partial(signal.signal, number, signal.SIG_DFL)  # where tests run in the background, Ctrl-C is ignored
    with ExitStack() as stack:
        command = [kits / "server" / "start.sh"]
        started = stack.enter_context(
            subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=heed)
        )
        stack.callback(started.kill)
        wait_until(lambda: log.exists() and "started" in log.read_text())
        started.send_signal(number)
        assert started.wait(PATIENCE) == 128 + number
    assert log.read_text() == "started\nended\n"  # it has waited for that


def test_a_second_sigterm_leaves_the_clean_up_alone():
    program = (
        "import os, signal, time\n"
        "from crosslm.federation.flower.processes import end_on_sigterm\n"
        "end_on_sigterm()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
        "finally:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.1)\n    print('cleaned up')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (found.returncode, found.stdout) == (143, "cleaned up\n"), found.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("kit", ["server", "silos/silo-1"])
def test_systemd_takes_the_units(kits, kit):
    (unit,) = (kits / kit).glob("*.service")
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert not [line for line in found.stderr.splitlines() if unit.name in line], found.stderr  # others may be named
    assert found.returncode == 0, found.stderr


def test_a_silo_reads_labels_under_the_names_that_its_file_has(federated, tmp_path, data_folder):
    federated["data"]["label_names"] = {"minus": "bad"}
    provision(Config.model_validate(federated), "localhost:9400", tmp_path / "kits")
    kit = tmp_path / "kits" / "silos" / "silo-0"
    rows = (data_folder / "silo-0.csv").read_text()
    counts = rows.count(",bad\n"), rows.count(",good\n")
    (kit / "silo-0.csv").write_text(rows.replace(",bad\n", ",minus\n"))
    assert Silo(kit, tmp_path / "cache").private().class_counts(2) == list(counts)


def test_a_silos_own_columns_and_encoding_go_into_its_kit(federated, tmp_path):
    federated["clients"][0] |= {"text_column": "Meldung", "label_column": "Sparte", "encoding": "cp1252"}
    federated["data"]["encoding"] = "latin-1"
    provision(Config.model_validate(federated), "localhost:9400", tmp_path / "kits")
    kits = [tmp_path / "kits" / "silos" / f"silo-{number}" for number in (0, 1)]
    own, other = (read_silo(kit).data for kit in kits)
    assert (own.text_column, own.label_column, own.encoding) == ("Meldung", "Sparte", "cp1252")
    assert (other.text_column, other.label_column, other.encoding) == ("text", "label", "latin-1")
    (kits[0] / "silo-0.csv").write_bytes("Meldung,Sparte\nHügel – fein,good\nTür,bad\n".encode("cp1252"))
    assert Silo(kits[0], tmp_path / "cache").private().texts == ["Hügel – fein", "Tür"]


def test_a_silo_is_added_without_touching_the_others(kits, federated):
    before = {path: path.read_bytes() for path in kits.rglob("*") if path.is_file()}
    federated["clients"].append({"id": "late", "train": "silo-0.csv"})
    made = provision(Config.model_validate(federated), "localhost:9400", kits)
    assert made == [kits / "silos" / "late"]
    assert silo_names(kits / "server") == ["late", "silo-0", "silo-1"]
    assert all(path.read_bytes() == data for path, data in before.items())
    assert read_silo(made[0]).runtime_port not in {
        read_silo(kits / "silos" / name).runtime_port for name in ("silo-0", "silo-1")
    }


def test_a_silo_whose_kit_was_brought_away_keeps_its_key(kits, federated, shell, tmp_path):
    gone, key = kits / "silos" / "silo-0", kits / "server" / "silos" / "silo-0.pub"
    gone.rename(tmp_path / "elsewhere")
    before, news = key.read_bytes(), []
    federated["clients"].append({"id": "late", "train": "silo-0.csv"})
    config = Config.model_validate(federated)
    assert provision(config, "localhost:9400", kits, news.append) == [kits / "silos" / "late"]
    assert key.read_bytes() == before
    assert news == [
        f"silo silo-0: the server knows its key already, and its kit is not here; for a new one remove {key}"
    ]
    key.unlink()
    assert provision(config, "localhost:9400", kits) == [gone]
    assert key.read_bytes() != before


def test_a_kit_that_could_not_be_made_leaves_no_key_behind(kits, federated, monkeypatch):
    federated["clients"].append({"id": "late", "train": "silo-0.csv"})
    config = Config.model_validate(federated)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("crosslm.support.files.rename", full)
        with pytest.raises(OSError, match="No space"):
            provision(config, "localhost:9400", kits)
    assert silo_names(kits / "server") == ["silo-0", "silo-1"]
    assert provision(config, "localhost:9400", kits) == [kits / "silos" / "late"]


def test_provisioning_says_what_is_wrong(federated, settings, kits):
    config = Config.model_validate(federated)
    with pytest.raises(FederationError, match=r"\[\[clients\]\]"):
        provision(Config.model_validate(settings), "localhost:9400", kits / "new")
    wrong = ("localhost", "localhost:port", ":9400", "localhost:0", "a b:9400", "server/x:9400", "localhost:009400")
    for address in (*wrong, "münchen.example:9400", "localhost:²", "localhost:94\n"):
        with pytest.raises(FederationError, match="HOST:PORT"):
            provision(config, address, kits / "new")
    with pytest.raises(FederationError, match="holds the kits of"):
        provision(config, "elsewhere:9400", kits)
    assert not (kits / "new").exists()
    for key, value in (("task.labels", [*config.task.labels, "so-so"]), ("federation.participations", 3)):
        section, field = key.split(".")
        changed = config.model_copy(update={section: getattr(config, section).model_copy(update={field: value})})
        with pytest.raises(FederationError, match=rf"{key} is .*which a silo's kit must fit; put it back in the conf"):
            provision(changed, "localhost:9400", kits)


def test_settings_that_are_wrong_are_named(kits):
    kit = kits / "silos" / "silo-0"
    (kit / SILO_FILE).write_text((kit / SILO_FILE).read_text(), encoding="utf-8-sig")
    assert read_silo(kit).id == "silo-0"
    with pytest.raises(FederationError, match=r"is the kit of a silo; start it with: crosslm client"):
        read_server(kit)
    with pytest.raises(FederationError, match=r"no server\.toml"):
        read_server(kits / "silos")
    (kit / SILO_FILE).write_text((kit / SILO_FILE).read_text().replace("wire_dtype", "wire_dtipe"))
    with pytest.raises(FederationError, match="unknown key wire_dtipe; did you mean 'wire_dtype'"):
        read_silo(kit)
    change(kits / "silos" / "silo-1", wire_dtype="float15")
    with pytest.raises(FederationError, match=r"wire_dtype: .*did you mean 'float16'.*found 'float15'"):
        read_silo(kits / "silos" / "silo-1")
    (kit / SILO_FILE).write_text((kit / SILO_FILE).read_text().replace("wire_dtipe", "wire_dtype"))
    change(kit, data=read_silo(kit).data.model_copy(update={"text_column": "label"}))
    with pytest.raises(FederationError, match=r"silo\.toml: data: text_column and label_column must be two columns"):
        read_silo(kit)
    (kit / SILO_FILE).write_text("id = ")
    with pytest.raises(FederationError, match="TOML"):
        read_silo(kit)


def test_a_silo_without_rows_or_with_one_label_is_told_before_it_connects(kits, shell, monkeypatch):
    monkeypatch.setattr("crosslm.federation.flower.silo_processes.run_silo", lambda *_: None)
    kit = kits / "silos" / "silo-0"
    (kit / "silo-0.csv").write_text("text,label\n")
    for arguments in (("client", kit), ("client", kit, "--dry-run")):
        code, _, err = shell(*arguments)
        assert code == 2
        assert "silo.toml: data.train = 'silo-0.csv' has no usable rows; put some there" in err
    (kit / "silo-0.csv").write_text("text,label\na good day,good\nmore good,good\n")
    code, out, err = shell("client", kit)
    assert (code, err) == (0, "")
    assert "warning: silo silo-0: all 2 rows are 'good'; its classifier can learn nothing else" in out


def test_a_hub_dataset_is_not_taken_for_a_file_that_is_missing(kits, monkeypatch):
    asked = []

    def rows(name, data):
        asked.append(name)
        return name, [(1, {"text": "a good day", "label": "good"}), (2, {"text": "a bad day", "label": "bad"})]

    monkeypatch.setattr("crosslm.data.texts.hub_rows", rows)
    kit = kits / "silos" / "silo-0"
    change(
        kit, data=read_silo(kit).data.model_copy(update={"train": "hf:some/texts:train", "test": "hf:some/texts:test"})
    )
    silo = Silo(kit, kit / "cache")
    assert len(silo.private()) == len(silo.test()) == 2
    readmes = [silo_readme("a", "b", "c:1", ["hf:some/texts:train"], False), server_readme("b", "c:1", ["hf:x:test"])]
    assert all("[federation,datasets]" in readme for readme in readmes)
    assert asked == ["hf:some/texts:train", "hf:some/texts:test"]


# -- spool -----------------------------------------------------------------------------------


def test_an_upload_counts_once_however_often_it_comes(tmp_path):
    spool = Spool(tmp_path / "spool")
    assert spool.put("a", 0, [b"one", b"two"])
    assert not spool.put("a", 0, [b"onetwo"])
    with pytest.raises(FederationError, match="silo a: round 0 was received before with other contents"):
        spool.put("a", 0, [b"other"])
    assert [arrival.bytes for arrival in spool.arrivals()] == [6]
    assert spool.upload(spool.arrivals()[0]) == b"onetwo"
    assert not list((tmp_path / "spool").glob("*.part*"))


def test_a_spool_is_for_its_owner_alone(tmp_path):
    before = os.umask(0o022)  # Flower's own commands set none
    try:
        Spool(tmp_path / "spool").close()
    finally:
        os.umask(before)
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700


def test_uploads_are_served_in_order_of_arrival_and_none_is_lost_by_a_restart(tmp_path):
    spool = Spool(tmp_path / "spool")
    for silo in ("slow", "fast"):
        spool.put(silo, 0, [silo.encode()])
    assert spool.next().silo == "slow"
    spool.close()  # the server dies while it works on it
    spool = Spool(tmp_path / "spool")
    assert spool.next().silo == "slow"
    spool.serve("slow", 0, b"enhanced")
    assert spool.next().silo == "fast"
    spool.refuse("fast", 0, "no good")
    assert spool.next() is None
    assert [(arrival.state, arrival.note) for arrival in spool.arrivals()] == [("served", ""), ("refused", "no good")]
    assert b"".join(spool.download(spool.arrivals()[0])) == b"enhanced"
    spool.delivered("slow", 0)
    assert spool.of("slow")[0].state == "delivered"
    assert spool.of("slow")[0].since >= spool.of("slow")[0].received_at


def test_a_file_is_written_whole_or_not_at_all_by_everybody(tmp_path, monkeypatch):
    """Run folder, spool and silo share one writer; one that is cut off leaves what was there."""

    def cut():
        yield b"half"
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "new" / "file", [b"one ", b"whole"])
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "new" / "file", cut())
    assert (tmp_path / "new" / "file").read_bytes() == b"one whole"
    for module in (rundir, hashed_files, silo_state):
        assert module.write_whole is write_whole
    spool = Spool(tmp_path / "spool")
    with pytest.raises(RunError, match="No space"):
        spool.put("a", 0, cut())
    assert spool.arrivals() == []
    assert spool.put("a", 0, [b"whole"])
    assert spool.upload(spool.arrivals()[0]) == b"whole"
    run = RunDir(tmp_path / "run")
    run.write("a.txt", "first")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crosslm.support.files.os.fsync", full)
    with pytest.raises(RunError, match=r"a\.txt: cannot be written: No space"):
        run.write("a.txt", "second")
    assert (run.path / "a.txt").read_text() == "first"


def test_a_file_that_changed_on_disk_is_not_used(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.put("a", 0, [b"whole"])
    spool.upload_file("a", 0).write_bytes(b"half")
    with pytest.raises(FederationError, match="has changed since it was written"):
        spool.upload(spool.arrivals()[0])
    spool.upload_file("a", 0).unlink()
    with pytest.raises(FederationError, match="cannot be read"):
        spool.upload(spool.arrivals()[0])


def test_a_download_that_changed_on_disk_is_not_sent(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.put("a", 0, [b"whole"])
    spool.serve("a", 0, b"enhanced")
    assert b"".join(spool.download(spool.arrivals()[0])) == b"enhanced"
    spool.download_file("a", 0).write_bytes(b"enhancer")
    with pytest.raises(FederationError, match="has changed since it was written"):
        list(spool.download(spool.arrivals()[0]))


def test_the_journal_is_written_so_that_a_machine_that_dies_loses_nothing(tmp_path):
    spool = Spool(tmp_path / "spool")
    asked = spool._journal._database.execute
    assert asked("PRAGMA journal_mode").fetchone() == ("wal",)
    assert asked("PRAGMA synchronous").fetchone() == (2,)  # FULL
    spool.close()


def test_only_one_process_serves_from_a_spool(tmp_path):
    first = Spool(tmp_path / "spool")
    first.hold()
    code = (
        "import sys; from pathlib import Path; from crosslm.federation.spool import Spool\n"
        "try: Spool(Path(sys.argv[1])).hold(seconds=0)\nexcept Exception as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "spool"], capture_output=True, text=True, check=False)
    assert "another process serves from it" in done.stderr
    first.close()


# -- silo ------------------------------------------------------------------------------------


def test_a_silo_trains_once_uploads_and_installs_what_comes_back(silo, federated, models):
    experiment = silo.settings.experiment
    upload, download = answer(silo, Config.model_validate(federated), models)
    assert silo.upload(experiment, 0) == silo.state / "upload-0000.safetensors"
    assert len(silo.receipts()) == 1  # the second request trained nothing
    assert silo.install(experiment, 0, [encode(download)]) == {"round": 0.0, "accepted": 1.0}
    assert silo.installed == 1
    assert silo.install(experiment, 0, [encode(download)]) == {
        "round": 0.0,
        "accepted": 1.0,
    }  # a confirmation that was lost
    weights = silo.slm().model.state_dict()
    assert all(weight.equal(download.slm.weights[name]) for name, weight in weights.items())
    assert (silo.state / "slm" / "model.safetensors").exists()
    assert upload.client_id == "silo-0"


def test_a_download_goes_to_the_disk_as_it_comes(silo, federated, models):
    _, download = answer(silo, Config.model_validate(federated), models)
    data = encode(download)
    half, written = len(data) // 2, []

    def coming(end):
        yield data[:half]
        written.append((silo.state / "incoming.safetensors.partial").stat().st_size)
        yield from end()

    def is_cut_off():
        raise OSError("the line is dead")

    with pytest.raises(OSError, match="the line is dead"):
        silo.install(silo.settings.experiment, 0, coming(is_cut_off))
    assert silo.installed == 0  # nothing is decided
    assert not list(silo.state.glob("incoming*"))
    silo.install(silo.settings.experiment, 0, coming(lambda: [data[half:]]))
    assert min(written) > half - 2**13  # the rest is in the file's own buffer
    assert (silo.state / "download-0000.safetensors").read_bytes() == data
    assert not list(silo.state.glob("incoming*"))


def test_a_download_that_is_too_large_completes_the_round_without_it(silo, federated, models):
    _, download = answer(silo, Config.model_validate(federated), models)

    def coming():
        yield encode(download)
        raise UploadError("the message has more than 9 bytes")

    with pytest.raises(UploadError, match="more than 9 bytes"):
        silo.install(silo.settings.experiment, 0, coming())
    assert silo.installed == 1
    assert "more than 9 bytes" in silo.decision(0)["refused"]
    assert not list(silo.state.glob("*incoming*"))


def test_the_second_round_starts_from_the_enhanced_slm(silo, federated, models):
    change(silo.kit, max_participations=2)
    silo = Silo(silo.kit, silo.cache)
    _, download = answer(silo, Config.model_validate(federated), models)
    silo.install(silo.settings.experiment, 0, [encode(download)])
    again = decode_upload(silo.upload(silo.settings.experiment, 1).read_bytes())
    assert again.client_round == 1
    assert silo.client().rounds == 1
    with pytest.raises(FederationError, match=r"agrees to 2 uploads \(max_participations\)"):
        silo.upload(silo.settings.experiment, 2)


def test_a_silo_decides_what_it_answers(silo):
    with pytest.raises(FederationError, match="takes part in 'tiny-"):
        silo.upload("another", 0)
    with pytest.raises(FederationError, match="agrees to 1 uploads"):
        silo.upload(silo.settings.experiment, 1)
    for ask in (silo.upload, partial(silo.install, parts=[]), partial(silo.not_used, reason="")):
        with pytest.raises(FederationError, match="was asked about round -1; the first must be 0"):
            ask(silo.settings.experiment, -1)
    assert not list(silo.state.glob("upload-*"))
    with pytest.raises(KeptFileError, match="never uploaded"):
        silo.install(silo.settings.experiment, 0, [])
    (silo.kit / "silo-0.csv").unlink()
    with pytest.raises(DataError, match=r"silo-0\.csv"):
        silo.upload(silo.settings.experiment, 0)
    assert not (silo.state / "receipts").exists()


HEAD = "classifier.weight"
ANOTHER_MODEL = "has another architecture, tokenizer, label order or maximum length"


def words_exchanged(tokenizer):
    """A tokenizer that reads one word where another is written."""
    whole = json.loads(tokenizer["tokenizer.json"])
    words = whole["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    return tokenizer | {"tokenizer.json": json.dumps(whole)}


@pytest.mark.parametrize(
    ("part", "change_of", "why"),
    [
        ("weights", lambda weights: weights | {HEAD: weights[HEAD][:, :8].clone()}, rf"{HEAD}' has the shape \[2, 8\]"),
        ("weights", lambda weights: weights | {HEAD: weights[HEAD] * float("nan")}, f"{HEAD} is not finite"),
        ("labels", lambda labels: labels[::-1], "its id2label is .*, which is not its labels"),
        ("max_length", lambda length: length - 1, ANOTHER_MODEL),
        ("architecture", lambda architecture: architecture | {"hidden_act": "relu"}, ANOTHER_MODEL),
        ("tokenizer", words_exchanged, ANOTHER_MODEL),
        ("client_id", lambda _: "silo-1", "it says that it is of client 'silo-1'"),
        ("client_round", lambda _: 1, "asked to install round 0, got the download of round 1"),
    ],
    ids=[
        "other tensors",
        "not finite",
        "other labels",
        "another length",
        "another architecture",
        "another tokenizer",
        "another silo",
        "another round",
    ],
)
def test_what_comes_back_is_checked(silo, part, change_of, why):
    upload = decode_upload(silo.upload(silo.settings.experiment, 0).read_bytes())
    learned = {name: value * 2 if value.is_floating_point() else value for name, value in upload.slm.weights.items()}
    download = dataclasses.replace(echo(upload), slm=dataclasses.replace(upload.slm, weights=learned))
    if hasattr(download, part):
        wrong = dataclasses.replace(download, **{part: change_of(getattr(download, part))})
    else:
        slm = dataclasses.replace(download.slm, **{part: change_of(getattr(download.slm, part))})
        wrong = dataclasses.replace(download, slm=slm)
    with pytest.raises((FederationError, UploadError), match=f"silo-0: .*{why}"):
        silo.install(silo.settings.experiment, 0, [encode(wrong)])
    assert silo.installed == 1  # the round is complete, with the SLM that was trained here
    kept = silo.slm().model.state_dict()
    assert all(weight.equal(upload.slm.weights[name]) for name, weight in kept.items())
    assert not silo.decision(0)["accepted"]


def test_counts_go_out_in_the_order_of_the_outputs_and_come_back_in_the_silos_own(silo, federated, models, tmp_path):
    labels = silo.settings.labels
    SLM.load(str(models / "bert"), tuple(reversed(labels)), 32, 0).save(str(tmp_path / "reversed"))
    settings = read_silo(silo.kit)
    spec = settings.slm.model_copy(update={"model": str(tmp_path / "reversed")})
    (silo.kit / SILO_FILE).write_text(dump(settings.model_copy(update={"slm": spec})))
    rows = (silo.kit / silo.settings.data.train).read_text().splitlines()
    (silo.kit / silo.settings.data.train).write_text("\n".join(rows[:20]) + "\n")  # the labels are not equally many
    silo = Silo(silo.kit, tmp_path)
    counts = tuple(silo.private().class_counts(2))
    assert counts[0] != counts[1]
    upload, download = answer(silo, Config.model_validate(federated), models)
    assert upload.slm.labels == tuple(reversed(labels))
    assert upload.class_counts == counts[::-1]
    silo.install(silo.settings.experiment, 0, [encode(download)])
    assert Silo(silo.kit, tmp_path).client().told_counts == counts


@pytest.mark.parametrize("private", [False, True])
def test_the_dry_run_names_all_that_the_upload_then_holds(silo, private):
    if private:
        change(silo.kit, privacy=PrivacyConfig(epsilon=8.0), acceptance=AcceptanceConfig())
        silo = Silo(silo.kit, silo.cache)
    promised = json.loads(json.dumps(silo.would_send()))
    data = silo.upload(silo.settings.experiment, 0).read_bytes()
    (receipt,) = silo.receipts()
    assert receipt["tensors"] == promised["tensors"]
    assert receipt["fields"].keys() == promised["fields"].keys()
    assert sorted(receipt["fields"]["metrics"]) == sorted(promised["metrics_after_training"])
    same = ("client_id", "class_counts", "labels", "architecture", "tokenizer", "max_length", "client_round")
    for name in same:
        assert receipt["fields"][name] == promised["fields"][name]
    assert receipt["bytes_sent"] == len(data)
    if private:
        assert receipt["fields"]["class_counts"] == [0, 0]
        assert receipt["fields"]["metrics"]["dp/epsilon"] <= 8.0
    # and the bytes hold no more than that: tensors, and a header of these fields
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) - {"__metadata__"} == set(receipt["tensors"])
    fields = json.loads(header["__metadata__"]["crosslm"])
    assert set(header["__metadata__"]) == {"crosslm"}
    assert set(fields) == {"version", "kind", "client_id", "client_round", "class_counts", "metrics", "slm"}
    assert set(fields["slm"]) == {"architecture", "tokenizer", "labels", "max_length"}
    for sentence in silo.private().texts:
        assert sentence.encode() not in data


def test_counts_are_hidden_without_a_bound_too(silo):
    """A kit says of privacy what was set, and nothing that only looks as if it were in force."""
    assert tomllib.loads((silo.kit / SILO_FILE).read_text())["privacy"] == {}
    assert sum(silo.would_send()["fields"]["class_counts"]) == len(silo.private())
    change(silo.kit, privacy=PrivacyConfig(hide_counts=True), fit=silo.settings.fit.model_copy(update={"patience": 3}))
    assert tomllib.loads((silo.kit / SILO_FILE).read_text())["privacy"] == {"hide_counts": True}
    hides = Silo(silo.kit, silo.cache)
    assert hides.would_send()["fields"]["class_counts"] == [0, 0]
    assert "holdout_accuracy" not in hides.would_send()["metrics_after_training"]
    upload = decode_upload(hides.upload(hides.settings.experiment, 0).read_bytes())
    assert upload.class_counts == (0, 0)
    assert {"loss", "holdout_loss"} <= set(upload.metrics)
    assert set(upload.metrics) == set(hides.would_send()["metrics_after_training"])  # no share of rows
    (receipt,) = hides.receipts()
    assert receipt["fields"]["class_counts"] == [0, 0]


def test_half_precision_halves_the_bytes_and_says_what_it_does(kits, silo):
    change(kits / "silos" / "silo-0", wire_dtype="float16")
    half = Silo(silo.kit, silo.cache)
    data = half.upload(half.settings.experiment, 0).read_bytes()
    (receipt,) = half.receipts()
    assert receipt["tensor_bytes"] == silo.would_send()["tensor_bytes"] / 2
    assert set(receipt["accuracy_on_private_rows"]) == {"float32", "float16"}
    upload = decode_upload(data)
    floats = [weight for weight in upload.slm.weights.values() if weight.is_floating_point()]
    assert {str(weight.dtype) for weight in floats} == {"torch.float16"}


# -- gateway ---------------------------------------------------------------------------------


def test_the_gateway_passes_on_what_silos_ask_and_nothing_else(monkeypatch, tmp_path, kits):
    import httpx

    seen = []

    async def superlink(request):
        seen.append((request.url.path, await request.body(), request.headers.get("x-signed")))
        return PlainTextResponse("inner answer", headers={"x-kept": "yes"}, status_code=202)

    inner = Starlette(routes=[Route("/{path:path}", superlink, methods=["GET", "POST"])])
    _, asking = before(httpx.ASGITransport(inner), kits / "server", monkeypatch)

    async def ask():
        async with asking() as client:
            passed = await client.post("/v1/fleet/pull-messages", content=b"body", headers={"x-signed": "s"})
            refused = [
                (await client.post(path, content=b"x")).status_code
                for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/x", "/", "/v1/fleetx")
            ]
            sly = (await client.post("/v1/fleet/../control/start-run", content=b"x")).status_code
            encoded = [
                (await client.post(f"/v1/fleet/{path}", content=b"x")).status_code
                for path in ("%2e%2e/control/start-run", "%252e%252e/control/start-run", "%00", "pull-messages/")
            ]
            return passed, refused, sly, encoded

    passed, refused, sly, encoded = asyncio.run(ask())
    assert (passed.status_code, passed.text, passed.headers["x-kept"]) == (202, "inner answer", "yes")
    assert seen == [("/v1/fleet/pull-messages", b"body", "s")]
    assert refused == [404] * 5
    assert (sly, encoded) == (404, [404] * 4)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ({"src_node_id": 7, "dst_node_id": 1, "reply_to_message_id": "asked"}, 202),
        ({"src_node_id": 8, "dst_node_id": 1, "reply_to_message_id": "asked"}, 403),  # in another silo's name
        ({"src_node_id": 1, "dst_node_id": 1}, 403),  # as if the server had said it to itself
        ({"src_node_id": 1, "dst_node_id": 8}, 403),  # and to another silo
        ({"src_node_id": 7, "dst_node_id": 8, "reply_to_message_id": "asked"}, 403),
        (None, 403),
    ],
)
def test_a_silo_speaks_for_itself_alone(monkeypatch, kits, head, status):
    import httpx
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import Message as Pushed
    from flwr.proto.message_pb2 import Metadata
    from flwr.proto.node_pb2 import Node as Pushing

    seen = []

    async def superlink(request):
        seen.append(await request.body())
        return PlainTextResponse("", status_code=202)

    inner = Starlette(routes=[Route("/{path:path}", superlink, methods=["POST"])])
    _, asking = before(httpx.ASGITransport(inner), kits / "server", monkeypatch)
    own = Pushed(metadata=Metadata(src_node_id=7, dst_node_id=1, reply_to_message_id="asked"))
    messages = [] if head is None else [own, Pushed(metadata=Metadata(**head))]
    body = PushMessagesRequest(node=Pushing(node_id=7), messages_list=messages).SerializeToString()

    async def ask(content):
        async with asking() as client:
            return (await client.post("/v1/fleet/push-messages", content=content)).status_code

    assert asyncio.run(ask(body)) == status
    assert seen == ([body] if status == 202 else [])
    assert asyncio.run(ask(b"no message at all")) == 403


def test_what_answers_nothing_is_nobodys_answer(exchange, monkeypatch):
    """Flower gives out with a reply what was sent to the server by itself."""
    grid = exchange.grid = exchange.carrier.grid
    turn(exchange)
    real, stray = grid.pull_messages, Message(RecordDict({"reply": ConfigRecord({"status": "ok"})}), 1, "train.upload")
    monkeypatch.setattr(grid, "pull_messages", lambda ids: [stray, *real(ids)])
    turn(exchange)
    assert [(arrival.silo, arrival.state) for arrival in exchange.spool.arrivals()] == [
        ("silo-0", "received"),
        ("silo-1", "received"),
    ]
    monkeypatch.setattr(grid, "pull_messages", lambda ids: [stray])
    line = exchange.carrier.lines["silo-0"]
    line.open_message, line.kind = "asked", "install"
    assert not exchange.carrier.move(line, exchange.carrier.online())
    assert line.open_message == "asked"


def test_the_gateway_knows_the_keys_that_are_in_the_kit_now(kits):
    import httpx

    outer, server = gateway.gateway("https://127.0.0.1:9091", kits / "server"), kits / "server" / "silos"
    own = keys.fingerprint(kits / "silos" / "silo-0" / "silo.key")
    assert own == keys.fingerprint(server / "silo-0.pub") != keys.fingerprint(server / "silo-1.pub")
    (server / "broken.pub").write_text("nothing")

    async def ask(*asked):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="https://server") as client:
            answers = [await client.get(f"/v1/crosslm/silos/{each}") for each in asked]
            return [(answer.status_code, answer.text) for answer in answers]

    no = (403, "")
    assert asyncio.run(ask(own, own[:-1], "%2e%2e")) == [(200, "0 silo-0"), no, no]
    assert asyncio.run(ask(""))[0][0] == 404
    # and how many rounds of this silo are complete
    spool = Spool(kits / "server" / "spool")
    for silo in ("silo-0", "silo-1"):
        spool.put(silo, 0, [b"an upload"])
    spool.delivered("silo-1", 0)
    assert asyncio.run(ask(own)) == [(200, "0 silo-0")]
    spool.delivered("silo-0", 0)
    assert asyncio.run(ask(own)) == [(200, "1 silo-0")]
    assert (spool.fact("told/silo-0"), spool.fact("told/silo-1")) == ("1", None)
    spool.close()
    (server / "silo-0.pub").unlink()
    assert asyncio.run(ask(own)) == [no]
    with pytest.raises(FederationError, match=r"broken.pub: is not a key as crosslm provision makes them"):
        keys.fingerprint(server / "broken.pub")
    with pytest.raises(FederationError, match=r"gone.pub: cannot be read"):
        keys.fingerprint(server / "gone.pub")


@pytest.mark.parametrize("unreadable", ["a key", "the folder"])
def test_a_gateway_that_cannot_read_its_keys_says_no_to_nobody(kits, unreadable):
    """A silo that is told that it is not known ends for good."""
    import httpx

    outer, server = gateway.gateway("https://127.0.0.1:9091", kits / "server"), kits / "server" / "silos"
    own = keys.fingerprint(kits / "silos" / "silo-0" / "silo.key")
    if unreadable == "a key":
        (server / "silo-0.pub").unlink()
        (server / "silo-0.pub").mkdir()  # as root every file could be read
    else:
        server.rename(server.with_name("away"))

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="https://server") as client:
            return await client.get(f"/v1/crosslm/silos/{own}")

    answer = asyncio.run(ask())
    assert answer.status_code == 503
    assert "the silos' keys cannot be read now" in answer.text


@pytest.mark.parametrize("status", [200, 404, 503, 403, None])
def test_a_silo_takes_only_a_clear_no_of_its_server(silo, monkeypatch, status):
    def answer(url, _):
        assert url.endswith(keys.fingerprint(silo.kit / "silo.key"))
        if status is None:
            raise urllib.error.URLError("nobody there")
        if status != 200:
            raise urllib.error.HTTPError(url, status, "", {}, io.BytesIO())
        found = io.BytesIO(b"3 silo-0")
        found.headers = {}
        return found

    monkeypatch.setattr(questions, "opened", answer)
    with nullcontext() if status != 403 else pytest.raises(FederationError, match="the server does not know the key"):
        assert questions.rounds_complete(silo) == (3 if status == 200 else None)


NOON = "Fri, 27 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("date", "ahead", "said"),
    [
        (NOON, 0.0, ""),
        (NOON, 5.9, ""),  # the date is in whole seconds, so that this may be 5
        (NOON, 7.0, "7 s ahead of the server's, 5 s may be"),
        (NOON, -300.0, ""),
        (NOON, -400.0, "400 s behind the server's, 305 s may be"),
        (None, 400.0, ""),
        ("no date", 400.0, ""),
    ],
)
def test_clocks_that_flower_takes_for_too_far_apart(date, ahead, said):
    now = 1795780800.0 + ahead  # noon, in seconds since 1970
    told = questions.clocks_apart(date, now, now)
    assert said in told
    assert bool(said) == bool(told)


@pytest.mark.parametrize("error", ["ConnectError", "RemoteProtocolError", "ReadError", "ReadTimeout"])
def test_a_superlink_that_is_away_or_dies_in_a_request_is_told_as_503(monkeypatch, kits, error):
    """Which SuperNodes take for a reason to try again."""
    import httpx

    def away(request):
        raise getattr(httpx, error)("gone")

    _, asking = before(httpx.MockTransport(away), kits / "server", monkeypatch)

    async def ask():
        async with asking() as client:
            return await client.post("/v1/fleet/pull-messages", content=b"body")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.text) == (503, "the SuperLink is not running\n")


def test_a_silo_that_is_gone_before_it_has_sent_is_no_error_of_the_gateway(monkeypatch, kits):
    import httpx

    sent = []
    outer, _ = before(httpx.MockTransport(lambda _: httpx.Response(200)), kits / "server", monkeypatch)
    scope = {"type": "http", "method": "POST", "path": "/v1/fleet/push-object", "headers": [], "query_string": b""}
    scope["raw_path"] = scope["path"].encode()

    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(outer(scope, gone, send))
    assert sent[0]["status"] == 499


def behind_a_gateway(kit, ask):
    """What ``ask`` gives, called with the port of a gateway before a server that answers; real sockets, no TLS."""
    import uvicorn

    async def superlink(request):
        await request.body()
        return PlainTextResponse("inner answer")

    def serving(app):
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
        return server, listening, listening.getsockname()[1]

    async def asked():
        inner, inner_socket, port = serving(Starlette(routes=[Route("/{path:path}", superlink, methods=["POST"])]))
        outer, outer_socket, open_port = serving(gateway.gateway(f"http://127.0.0.1:{port}", kit))
        tasks = [asyncio.create_task(each.serve([at])) for each, at in ((inner, inner_socket), (outer, outer_socket))]
        while not (inner.started and outer.started):
            await asyncio.wait(tasks, timeout=0.05, return_when=asyncio.FIRST_EXCEPTION)
            assert not any(task.done() for task in tasks)
        found = await ask(open_port)
        inner.should_exit = outer.should_exit = True
        await asyncio.gather(*tasks)
        return found

    return asyncio.run(asked())


async def half_a_request(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: server\r\nContent-Length: 10\r\n\r\nhalf")
    return reader, writer


def test_many_silos_that_stop_in_the_midst_of_a_request_shut_nobody_out(monkeypatch, kits):
    """More than the connections that httpx has by default."""
    import httpx

    async def ask(port):
        lines = [await half_a_request(port) for _ in range(110)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            answer = await client.post("/v1/fleet/pull-messages", content=b"body", timeout=PATIENCE)
        assert not any(reader.at_eof() for reader, _ in lines)  # it did not wait for one to be given up
        for _, writer in lines:
            writer.close()
        return answer.text

    monkeypatch.setattr(gateway, "PART_TIME", 2 * PATIENCE)
    assert behind_a_gateway(kits / "server", ask) == "inner answer"


def test_a_silo_that_stops_in_the_midst_of_a_request_is_given_up(monkeypatch, kits):
    async def ask(port):
        reader, writer = await half_a_request(port)
        told = await reader.readline()
        writer.close()
        return told

    monkeypatch.setattr(gateway, "PART_TIME", 0.1)
    assert b" 408 " in behind_a_gateway(kits / "server", ask)


# -- the exchange over a grid ----------------------------------------------------------------


def test_uploads_come_and_downloads_go(exchange, kits, tmp_path):
    turn(exchange, 2)
    for expected in ("silo-0", "silo-1"):
        assert not exchange.finished()
        upload = exchange.receive()
        assert upload.client_id == expected
        exchange.send(echo(upload))
    assert exchange.finished()
    turn(exchange, 2)
    assert [arrival.state for arrival in exchange.spool.arrivals()] == ["delivered"] * 2
    assert [Silo(kits / "silos" / name, tmp_path).installed for name in ("silo-0", "silo-1")] == [1, 1]
    kinds = ["train.upload", "train.upload", "train.install", "train.install"]
    assert [kind for _, kind, _ in exchange.grid.pushed] == kinds
    turn(exchange, 2)
    assert len(exchange.grid.pushed) == 4  # nothing more is asked
    assert exchange.grid.ttls == {exchange.config.reply_minutes * 60}  # Flower forgets it when it is asked again


def test_status_says_of_a_silo_what_it_did_last_and_when_it_is_asked_again(exchange, monkeypatch):
    now, grid = [1000.0], exchange.grid
    monkeypatch.setattr("crosslm.federation.flower.carrier.time.monotonic", lambda: now[0])
    line, carries = exchange.carrier.lines["silo-0"], exchange.carrier

    def said():
        return exchange.spool.fact("silo/silo-0").partition(" ")[2]

    genuine = grid.handlers["silo-0"]
    grid.handlers["silo-0"] = lambda message: Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
    turn(exchange, 2)
    assert said().endswith("gone; asked again in 2 s")
    grid.online.remove("silo-0")
    carries._note_away(line, carries.online())
    assert said().endswith("gone; asked again in 2 s")
    now[0] += 3
    for _ in range(2):
        carries._note_away(line, carries.online())
        assert said().endswith("gone; asked again when it is connected")
    grid.online.append("silo-0")
    grid.handlers["silo-0"] = genuine
    turn(exchange, 2)
    exchange.spool.serve("silo-0", 0, b"no download")
    grid.handlers["silo-0"] = lambda message: Message(
        RecordDict({"reply": ConfigRecord({"status": "ok"})}), reply_to=message
    )
    turn(exchange)
    assert said() == "install of round 0 asked for"
    carries.move(line, carries.online())
    assert said() == "install of round 0 answered"


def test_a_silo_that_is_away_delays_nobody(exchange):
    exchange.grid.online = ["silo-1"]
    turn(exchange, 2)
    upload = exchange.receive()
    assert upload.client_id == "silo-1"
    exchange.send(echo(upload))
    turn(exchange, 2)
    assert [arrival.state for arrival in exchange.spool.arrivals()] == ["delivered"]
    assert not exchange.finished()
    exchange.grid.online = ["silo-0", "silo-1"]  # a late joiner
    turn(exchange, 2)
    assert exchange.receive().client_id == "silo-0"


def test_an_error_and_a_lost_message_are_asked_again_with_longer_waits(exchange, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("crosslm.federation.flower.exchange.time.monotonic", lambda: now[0])
    good = exchange.grid.handlers["silo-0"]
    exchange.grid.online = ["silo-0"]
    replies = [lambda message: Message(Error(5, "Node Unavailable"), reply_to=message), lambda message: None, good]
    exchange.grid.handlers["silo-0"] = lambda message: replies.pop(0)(message)
    line = exchange.carrier.lines["silo-0"]
    turn(exchange, 2)
    assert line.not_before == now[0] + 2
    turn(exchange)
    assert len(exchange.grid.pushed) == 1  # not yet
    now[0] += 3
    turn(exchange, 2)
    now[0] += exchange.config.reply_minutes * 60 + 1  # nothing ever comes back
    turn(exchange)
    assert line.not_before == now[0] + 4
    assert "no answer in time" in line.note
    now[0] += 5
    turn(exchange, 2)
    assert exchange.spool.of("silo-0")[0].state == "received"
    assert line.attempts == 0


def test_a_silo_whose_install_fails_each_time_is_not_waited_for_for_ever(exchange, kits, monkeypatch):
    """With more rounds to come: its private file may be gone, and it is offered what is its own on and on."""
    now, told = [1000.0], []
    monkeypatch.setattr("crosslm.federation.flower.exchange.time.monotonic", lambda: now[0])
    exchange.on_failure = lambda *given: told.append(given)
    change(kits / "silos" / "silo-0", max_participations=2)
    exchange.config = exchange.carrier.config = FederationConfig(participations=2)
    exchange.grid.online = ["silo-0"]
    del exchange.carrier.lines["silo-1"]
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "an error at the silo, see its own log")
    exchange.grid.handlers["silo-0"] = lambda message: Message(error, reply_to=message)
    for _ in range(5):
        assert not exchange.finished()
        turn(exchange, 2)
        now[0] += 100
    exchange._look_at_carrier()
    assert told == [
        ("silo-0", "round 0: failed install: an error at the silo, see its own log; 5 times; it is asked again")
    ]
    assert not exchange.finished()
    now[0] += exchange.config.repair_minutes * 60
    assert exchange.finished()
    assert exchange._owed() == ["silo-0"]  # offered on, until federation.delivery_hours are over


def test_a_server_that_can_read_no_key_goes_on_when_it_can(exchange):
    """The folder may be away for a while; what was ended stays so."""
    spool, (silos, exchange.silos) = exchange.spool, (exchange.silos, [])
    lines, found = dict(exchange.carrier.lines), []
    exchange.names = lambda: found
    exchange.carrier.lines.clear()
    assert not exchange.finished()
    assert spool.fact("ended") is None
    found += silos
    assert not exchange.finished()
    assert list(exchange.carrier.lines) == list(lines)


def test_a_silo_that_fails_each_time_is_asked_on_and_not_waited_for_for_ever(exchange, monkeypatch):
    now, told = [1000.0], []
    monkeypatch.setattr("crosslm.federation.flower.exchange.time.monotonic", lambda: now[0])
    exchange.on_failure = lambda *given: told.append(given)
    errors = [Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "an error at the silo, see its own log")] * 7
    errors.insert(2, Error(ErrorCode.NODE_UNAVAILABLE, "away"))  # that is no failure of its
    exchange.grid.online = ["silo-0"]
    trains = exchange.grid.handlers["silo-0"]
    exchange.grid.handlers["silo-0"] = lambda message: (
        Message(errors.pop(0), reply_to=message) if errors else trains(message)
    )
    del exchange.carrier.lines["silo-1"]
    for left in range(7, -1, -1):
        turn(exchange, 2)
        assert not exchange.finished()
        now[0] += 100
        assert len(errors) == left
        assert bool(told) == (left < 3)  # said once, when it has failed five times
    assert told == [
        ("silo-0", "round 0: failed upload: an error at the silo, see its own log; 5 times; it is asked again")
    ]
    now[0] += exchange.config.repair_minutes * 60
    assert exchange.carrier.is_over()  # nobody waits any more, and it is asked all the same
    turn(exchange, 2)
    assert exchange.receive().client_id == "silo-0"


def test_what_a_silo_is_owed_is_offered_however_often_it_fails_there(exchange, monkeypatch):
    """A GPU that is busy today is free tomorrow."""
    now = [time.monotonic()]
    monkeypatch.setattr("crosslm.federation.flower.exchange.time.monotonic", lambda: now[0])
    exchange.grid.online, line = ["silo-0"], exchange.carrier.lines["silo-0"]
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    takes = exchange.grid.handlers["silo-0"]
    failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "an error at the silo, see its own log")
    exchange.grid.handlers["silo-0"] = lambda message: Message(failure, reply_to=message)
    for _ in range(10):
        turn(exchange, 2)
        assert line.not_before >= now[0] + LONGEST_WAIT  # not five times within half a minute
        now[0] = line.not_before + 1
    assert (line.over, exchange.spool.not_delivered(["silo-0"])) == (False, ["silo-0"])
    exchange.grid.handlers["silo-0"] = takes
    turn(exchange, 2)
    assert exchange.spool.not_delivered(["silo-0"]) == []


def test_the_processes_of_a_kit_look_for_models_where_its_command_does(tmp_path, monkeypatch):
    monkeypatch.delenv("CROSSLM_CACHE", raising=False)
    assert "CROSSLM_CACHE" not in processes.settings_of(tmp_path)
    monkeypatch.setenv("CROSSLM_CACHE", str(tmp_path / "models"))
    assert processes.settings_of(tmp_path)["CROSSLM_CACHE"] == str(tmp_path / "models")


def test_what_is_on_this_machine_is_not_asked_of_a_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intern.example")
    own = processes.settings_of(tmp_path)
    assert own["no_proxy"] == own["NO_PROXY"] == "intern.example,127.0.0.1,localhost"
    monkeypatch.delenv("NO_PROXY")
    assert processes.settings_of(tmp_path)["no_proxy"] == "127.0.0.1,localhost"


def test_a_silo_that_refuses_may_be_mended_and_the_server_learns_no_more(exchange, kits, monkeypatch, caplog):
    now, told, rows = [1000.0], [], kits / "silos" / "silo-0" / "silo-0.csv"
    monkeypatch.setattr("crosslm.federation.flower.exchange.time.monotonic", lambda: now[0])
    exchange.on_failure = lambda *given: told.append(given)
    rows.rename(rows.with_suffix(".away"))
    turn(exchange, 4)
    assert exchange.grid.pushed.count(("silo-0", "train.upload", 0)) == 1
    line = exchange.carrier.lines["silo-0"]
    assert line.note == "refused upload: DataError, see the silo's own log; asked again in 2 s"
    exchange.send(echo(exchange.receive()))  # the other is served meanwhile
    assert not exchange.finished()
    now[0] += 3
    turn(exchange, 2)
    assert told == [("silo-0", "round 0: refused upload: DataError, see the silo's own log; it is asked again")]
    now[0] += 5
    rows.with_suffix(".away").rename(rows)
    turn(exchange, 2)
    assert exchange.receive().client_id == "silo-0"
    assert line.fails_since is None


def test_a_silo_that_does_not_hear_of_its_refusal_is_not_told_for_ever(exchange, kits):
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    exchange.receive()
    exchange.refuse("silo-0", 0, UploadError("no"))
    change(kits / "silos" / "silo-0", experiment="another")  # it refuses whatever it is asked
    assert [arrival.silo for arrival in exchange.carrier.untold()] == ["silo-0"]
    turn(exchange, 2)
    assert exchange.grid.pushed[-1] == ("silo-0", "train.not_used", 0)
    assert exchange.carrier.untold() == []


def test_the_run_ends_without_a_silo_that_is_not_mended(exchange, kits, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("crosslm.federation.flower.exchange.time.monotonic", lambda: now[0])
    (kits / "silos" / "silo-0" / "silo-0.csv").unlink()
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    now[0] += exchange.config.repair_minutes * 60 - 1
    turn(exchange, 2)
    assert not exchange.finished()
    now[0] += 2
    line = exchange.carrier.lines["silo-0"]
    line.open_message, line.kind = "another", "upload"  # it may have been mended, and trains now
    assert not exchange.finished()
    line.open_message = None
    assert exchange.finished()


def test_a_silo_that_agrees_to_no_more_is_not_asked_again(exchange, kits):
    exchange.config = exchange.carrier.config = exchange.config.model_copy(update={"participations": 2})
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    turn(exchange, 6)
    assert exchange.carrier.lines["silo-0"].note == "refused upload: DeclinedError, see the silo's own log"
    assert exchange.grid.pushed.count(("silo-0", "train.upload", 1)) == 1
    del exchange.carrier.lines["silo-1"]
    assert exchange.finished()


@pytest.mark.parametrize("agreed", [1, 2])
def test_a_silo_that_agreed_to_fewer_uploads_and_left_is_not_waited_for(exchange, kits, tmp_path, agreed):
    exchange.config = exchange.carrier.config = exchange.config.model_copy(update={"participations": 3})
    change(kits / "silos" / "silo-0", max_participations=agreed, closing=False)
    exchange.grid.online = ["silo-0"]
    del exchange.carrier.lines["silo-1"]
    for number in range(agreed):
        assert not exchange.finished()
        turn(exchange, 2)
        assert exchange.receive().client_round == number
        exchange.spool.serve("silo-0", number, b"no download")
        turn(exchange, 2)
    exchange.grid.online = []  # it has all that it agreed to, before the server asked for more
    turn(exchange, 2)
    assert exchange.finished()
    again = FlowerExchange(exchange.grid, exchange.spool, "any", ["silo-0"], exchange.config, exchange.intake)
    again.carrier.has_ended = False
    assert again.finished()  # a server that is started again knows it too


@pytest.mark.parametrize("said", [None, 0, -1, True, 1.0, "1", [1]])
def test_a_number_of_uploads_that_is_none_changes_nothing(flower_run, said):
    fields = {"status": "ok"} | ({} if said is None else {"max_participations": said})
    content = RecordDict({"reply": ConfigRecord(fields)})
    assert answer_in(Message(content, 1, "train.install", ttl=60), "install").agreed is None


def test_a_silo_whose_key_comes_into_the_kit_later_is_asked_too(exchange, monkeypatch):
    handlers = exchange.grid.handlers
    late = handlers.pop("silo-1")
    names = ["silo-0"]
    exchange.silos, exchange.names = ["silo-0"], lambda: names
    del exchange.carrier.lines["silo-1"]
    exchange.spool.admit(["silo-0"])
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    names.append("silo-1")
    handlers["silo-1"] = late
    assert not exchange.finished()
    turn(exchange, 2)
    assert exchange.receive().client_id == "silo-1"
    assert exchange.silos == names
    assert exchange.spool.is_admitted("silo-1")


def test_a_download_that_the_disk_has_lost_is_one_silos_trouble(exchange, monkeypatch):
    now, told = [1000.0], []
    monkeypatch.setattr("crosslm.federation.flower.exchange.time.monotonic", lambda: now[0])
    exchange.on_failure = lambda *given: told.append(given)
    turn(exchange, 2)
    for _ in range(2):
        exchange.send(echo(exchange.receive()))
    file = exchange.spool.download_file("silo-0", 0)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    turn(exchange, 3)
    assert [arrival.state for arrival in exchange.spool.arrivals()] == ["served", "delivered"]
    exchange.finished()
    ((who, why),) = told
    assert (who, "has changed since it was written" in why, "put it back from a backup" in why) == (
        "silo-0",
        True,
        True,
    )
    file.write_bytes(whole)
    now[0] += LONGEST_WAIT + 1
    turn(exchange, 2)
    assert [arrival.state for arrival in exchange.spool.arrivals()] == ["delivered", "delivered"]


def test_an_upload_for_whose_checks_there_is_no_room_has_its_turn_again(exchange, monkeypatch):
    waited, told, decode = [], [], intake.decode_upload
    monkeypatch.setattr("crosslm.federation.flower.exchange.time.sleep", waited.append)
    exchange.on_failure = lambda *given: told.append(given)
    shortages = [
        MemoryError(),
        OSError(5, "Input/output error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ]

    def decoded(data):
        if shortages:
            raise shortages.pop(0)
        return decode(data)

    monkeypatch.setattr(intake, "decode_upload", decoded)
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    assert [exchange.receive() for _ in range(3)] == [None] * 3
    assert len(waited) == len(told) == 3
    assert "a check could not be made: MemoryError: ; see to it that this machine has room; tried again" in told[0][1]
    assert exchange.receive().client_id == "silo-0"


def test_another_silos_key_does_not_make_another_silo(exchange, kits, monkeypatch):
    """What comes over silo-1's key must be silo-1's, whatever it says."""
    exchange.grid.handlers["silo-1"] = from_kit(kits / "silos" / "silo-0", monkeypatch)
    exchange.grid.online = ["silo-1"]
    turn(exchange, 2)
    assert exchange.receive() is None
    (arrival,) = exchange.spool.arrivals()
    assert (arrival.silo, arrival.state) == ("silo-1", "refused")
    assert "it says that it is of client 'silo-0'" in arrival.note


def test_what_is_no_upload_is_refused_and_the_next_one_served(exchange):
    good = exchange.grid.handlers["silo-0"]

    def broken(message):
        reply = good(message)
        reply.content["message"] = split([b"not safetensors"])
        return reply

    exchange.grid.handlers["silo-0"] = broken
    turn(exchange, 2)
    assert exchange.receive() is None
    assert exchange.receive().client_id == "silo-1"
    assert "header claims" in exchange.spool.of("silo-0")[0].note
    with pytest.raises(UploadError):
        decode_upload(b"not safetensors")


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_an_upload_that_the_spool_has_lost_is_asked_for_again(exchange, what, caplog):
    """Its silo has kept it; to refuse it would be for good."""
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    file = exchange.spool.upload_file("silo-0", 0)
    whole = file.read_bytes()
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1])
    assert exchange.receive() is None
    assert "silo silo-0 is asked for its upload again" in caplog.text
    assert not exchange.spool.arrivals()
    turn(exchange, 2)
    assert exchange.grid.pushed.count(("silo-0", "train.upload", 0)) == 2
    assert exchange.receive().client_id == "silo-0"
    assert file.read_bytes() == whole
    (arrival,) = exchange.spool.arrivals()
    assert arrival.state == "processing"


def test_an_upload_that_is_lost_again_and_again_or_too_late_is_refused(exchange):
    told = []
    exchange.on_failure = lambda silo, why: told.append((silo, why))
    exchange.grid.online = ["silo-0"]
    for _ in range(MOST_TRIES + 1):
        turn(exchange, 2)
        exchange.spool.upload_file("silo-0", 0).unlink()
        assert exchange.receive() is None
    (arrival,) = exchange.spool.arrivals()
    assert (arrival.state, len(told)) == ("refused", MOST_TRIES)
    assert "the silo is asked for it again" in told[0][1]
    assert exchange.carrier._told_of(arrival) == "the server has lost it on its disk"
    exchange.grid.online = ["silo-1"]
    turn(exchange, 2)
    exchange.config = exchange.carrier.config = exchange.config.model_copy(update={"deadline_minutes": 1e-9})
    exchange.spool.upload_file("silo-1", 0).unlink()
    assert exchange.receive() is None
    assert [arrival.state for arrival in exchange.spool.arrivals()] == ["refused", "refused"]


def test_versions_must_fit(exchange, monkeypatch):
    monkeypatch.setattr("crosslm.federation.messages.VERSION", 99)
    request = exchange.carrier.request(0)
    monkeypatch.setattr("crosslm.federation.messages.VERSION", 1)
    reply = exchange.grid.handlers["silo-0"](Message(request, 100, "train.upload", ttl=60))
    assert reply.content["reply"]["status"] == "refused"


def test_who_has_no_say_is_served_and_not_counted(tmp_path):
    spool = Spool(tmp_path)
    for silo in ("a", "b"):
        spool.put(silo, 0, [silo.encode()])
        spool.serve(silo, 0, b"enhanced")
    assert spool.counted() == 2
    spool.no_say("a", 0)
    assert spool.counted() == 1
    spool.delivered("a", 0)
    assert spool.counted() == 1
    spool.close()


def test_a_run_ends_by_arrivals(exchange, monkeypatch):
    monkeypatch.setattr(exchange_module, "TELL_REFUSED", 0.0)
    turn(exchange, 2)
    exchange.config = exchange.carrier.config = FederationConfig(arrivals=1)
    assert not exchange.finished()
    exchange.send(echo(exchange.receive()))
    assert exchange.finished()
    # what came too late is refused, and its silo told; a server that is started again asks for nothing more
    assert exchange.drain(0) == ["silo-0"]
    (late,) = [arrival for arrival in exchange.spool.arrivals() if arrival.state == "refused"]
    assert (late.silo, late.note) == ("silo-1", "it came when the run had ended; send it to the next run")
    again = FlowerExchange(
        exchange.grid, exchange.spool, exchange.experiment, exchange.silos, FederationConfig(), exchange.intake
    )
    turn(again, 2)
    assert ("silo-1", "train.not_used", 0) in again.grid.pushed
    assert [kind for _, kind, _ in again.grid.pushed].count("train.upload") == 2
    assert again.finished()


def test_a_run_ends_by_time(exchange, kits, monkeypatch):
    for name in ("silo-0", "silo-1"):  # else it would be over when each has sent one
        change(kits / "silos" / name, max_participations=2)
    turn(exchange, 2)
    exchange.config = exchange.carrier.config = FederationConfig(deadline_minutes=1, participations=2)
    for _ in range(2):
        exchange.send(echo(exchange.receive()))
    started = float(exchange.spool.fact("started"))
    for seconds, is_over in ((59, False), (61, True)):
        monkeypatch.setattr("crosslm.federation.flower.exchange.time.time", lambda now=started + seconds: now)
        assert exchange.finished() == is_over


def test_an_upload_that_comes_while_the_end_is_looked_for_is_served(exchange, monkeypatch):
    turn(exchange, 2)
    for _ in range(2):
        exchange.send(echo(exchange.receive()))

    def is_over():
        exchange.spool.put("silo-0", 1, [b"the last one"])
        return True

    monkeypatch.setattr(exchange.carrier, "is_over", is_over)
    assert not exchange.finished()


def test_an_upload_with_which_the_server_ends_again_and_again_is_refused(exchange):
    turn(exchange, 2)
    for _ in range(MOST_TRIES):
        assert exchange.receive().client_id == "silo-0"  # and the application ends
    assert exchange.receive() is None
    assert (
        "the server ended or had no room 5 times while it worked on its upload of round 0"
        in exchange.spool.of("silo-0")[0].note
    )
    assert exchange.receive().client_id == "silo-1"


def test_a_restarted_server_goes_on_where_the_journal_says(exchange, kits, tmp_path):
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    exchange.receive()  # and now it dies
    exchange.spool.close()
    again = FlowerExchange(
        exchange.grid,
        Spool(tmp_path / "spool"),
        exchange.experiment,
        exchange.silos,
        exchange.config,
        exchange.intake,
    )
    assert again.receive().client_id == "silo-1"
    turn(again, 2)
    assert ("silo-0", "train.install", 0) in again.grid.pushed
    assert again.grid.pushed.count(("silo-0", "train.upload", 0)) == 1


def test_each_thread_wakes_the_other(exchange, monkeypatch):
    """Nothing waits for the next look, which is far away here."""
    for module in (carrier, exchange_module):
        monkeypatch.setattr(module, "POLL", PATIENCE)
    started = time.monotonic()
    exchange.start()
    served = []
    while not exchange.finished():
        if (upload := exchange.receive()) is not None:
            served.append(upload.client_id)
            exchange.send(echo(upload))
    assert exchange.drain(PATIENCE) == []
    assert not exchange.carrier.thread.is_alive()
    assert sorted(served) == ["silo-0", "silo-1"]
    assert time.monotonic() - started < PATIENCE


def test_an_answer_whose_parts_do_not_come_delays_no_other_silo(exchange, monkeypatch):
    """Flower gives an answer out when its envelope is there, and who pulls it waits for its parts."""
    pull, come = exchange.grid.pull_messages, threading.Event()

    def pulled(ids):
        replies = pull(ids)
        if ids == stuck:
            come.wait(60)
        return replies

    stuck = ["1"]
    monkeypatch.setattr(exchange.grid, "pull_messages", pulled)
    exchange.grid.online = ["silo-0"]
    exchange.start()
    wait_until(lambda: exchange.grid.pushed)
    exchange.grid.online = ["silo-0", "silo-1"]
    wait_until(lambda: exchange.spool.of("silo-1"))
    upload = exchange.receive()
    assert upload.client_id == "silo-1"
    exchange.send(echo(upload))
    wait_until(lambda: exchange.spool.of("silo-1")[0].state == "delivered")
    assert exchange.spool.of("silo-0") == []
    assert [name for name, _, _ in exchange.grid.pushed].count("silo-0") == 1  # it is asked nothing meanwhile
    come.set()
    wait_until(lambda: exchange.spool.of("silo-0"))
    exchange.send(echo(exchange.receive()))
    assert exchange.drain(PATIENCE) == []


def test_a_failure_of_the_carrying_thread_is_not_silent(exchange):
    exchange.grid.get_nodes = None
    exchange.start()
    exchange.carrier.thread.join(PATIENCE)
    with pytest.raises(TypeError):
        exchange.finished()


def test_bytes_survive_as_arrays(tmp_path):
    data = np.random.default_rng(0).bytes(PART + 17)
    (tmp_path / "file").write_bytes(data)
    arrays = split(parts_of(tmp_path / "file"))
    assert len(arrays) == 2
    assert b"".join(joined(arrays, len(data))) == data
    assert len(arrays) == 0
    assert isinstance(ConfigRecord({"round": 1})["round"], int)


def test_a_silo_stays_until_the_server_knows_of_its_last_round(silo, monkeypatch):
    """It may have been killed, or the server may have been away, when the answer was on its way."""
    notes, known = [], iter([None] * 60)
    change(silo.kit, closing=False, runtime_port=free_ports(1)[0])
    silo = Silo(silo.kit, silo.cache)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(silo_processes, "wait_for_server", lambda *_: True)
    monkeypatch.setattr(silo_processes, "rounds_complete", lambda _: next(known))
    monkeypatch.setattr(silo_processes, "supernode_command", lambda _: command)
    monkeypatch.setattr(silo_processes, "tasks_command", lambda _: command)
    monkeypatch.setattr(silo_processes, "CONFIRM_TIME", 1.0)
    write_whole(silo.state / "installed.json", [b'{"rounds": 1}'])
    began = time.time()
    with pytest.raises(PassingError, match=r"has not said that it knows of the last one.*start crosslm client again"):
        run_silo(silo, notes.append)  # exit code 75: who watches it starts it again
    assert time.time() - began > 1.0  # the server did not say that it had the answer
    assert not silo.confirmed
    with monkeypatch.context() as away:  # and is not there at all when the silo is started again
        away.setattr(silo_processes, "wait_for_server", lambda *given: given[-1] != silo_processes.CONFIRM_TIME)
        with pytest.raises(PassingError, match="has not said that it knows of the last one"):
            run_silo(silo, notes.append)
        away.setattr(silo_processes, "GIVE_UP", 0.0)
        run_silo(silo, notes.append)
        assert "it has been a day" in notes[-1]
    monkeypatch.setattr(silo_processes, "CONFIRM_TIME", 300.0)
    known = iter([0, None, 0, 1])
    run_silo(silo, notes.append)
    assert silo.confirmed
    assert list(known) == []
    run_silo(silo, notes.append)  # and when it is started again, it does not connect
    assert notes[-1] == "silo silo-0: all 1 rounds that it agreed to are complete"
    change(silo.kit, max_participations=2)
    assert not Silo(silo.kit, silo.cache).confirmed


def test_a_server_waits_until_its_silos_have_heard_but_not_for_ever(kits, monkeypatch):
    server = server_processes.ServerProcesses(kits / "server", lambda _: None)
    for silo in ("silo-0", "silo-1"):
        server.spool.put(silo, 0, [b"an upload"])
    server.spool.delivered("silo-0", 0)
    monkeypatch.setattr(server_processes, "TELL_TIME", 1.0)
    began = time.time()
    server._wait_until_told()
    assert time.time() - began >= 1.0
    server.spool.note("told/silo-0", "1")
    monkeypatch.setattr(server_processes, "TELL_TIME", 300.0)
    monkeypatch.setattr(server_processes, "TELL_TIME", 1.0)
    began = time.time()
    server._wait_until_told()
    assert time.time() - began >= 1.0  # silo-1 has not heard
    monkeypatch.setattr(server_processes, "TELL_TIME", 300.0)
    server.spool.note("told/silo-1", "0 over")  # it may have refused to train, and hears that nothing more comes
    server._wait_until_told()
    server.spool.put("gone", 0, [b"an upload"])
    server.spool.delivered("gone", 0)
    server._wait_until_told()  # nor has one whose key is not in the kit any more
    config = kits / "server" / "config.toml"
    config.write_text(config.read_text().replace("participations = 1", "participations = 2"))
    server.spool.agrees("silo-0", 1)
    server._wait_until_told()  # silo-0 has left with the one round that it agreed to
    server.spool.close()


@pytest.mark.parametrize("dies", [True, False])
def test_a_superlink_that_dies_while_it_is_told_of_keys_is_started_again(kits, monkeypatch, dies):
    """Only a command that fails though the SuperLink runs ends the server."""

    def fails(*_):
        if dies:
            server.superlink.process.kill()
            server.superlink.process.wait()
        raise FederationError("flwr supernode register failed")

    code = [sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"]
    notes = []
    monkeypatch.setattr(server_processes, "superlink_command", lambda _: code)
    monkeypatch.setattr(server_processes, "wait_for_port", lambda *_: None)
    monkeypatch.setattr(server_processes, "flwr", fails)
    monkeypatch.setattr(server_processes, "RESTART", 0.0)
    server = server_processes.ServerProcesses(kits / "server", notes.append)
    try:
        if not dies:
            with pytest.raises(FederationError, match="register failed"):
                server._keep_up()
            return
        server._keep_up()
        assert notes == []
        server._keep_up()
        assert "the SuperLink ended and is started again" in notes[0]
    finally:
        server.superlink.stop()
        server.spool.close()


def test_a_superlink_that_dies_at_its_start_is_started_again_but_not_for_ever(kits, monkeypatch):
    code = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(server_processes, "superlink_command", lambda _: code)
    monkeypatch.setattr(server_processes, "RESTART", 0.0)
    server = server_processes.ServerProcesses(kits / "server", lambda _: None)
    try:
        for _ in range(server_processes.STARTS - 1):
            server._keep_up()
        with pytest.raises(FederationError, match="superlink ended at its start"):
            server._keep_up()
    finally:
        server.superlink.stop()
        server.spool.close()


def test_the_settings_of_dp_that_docs_deploy_shows_are_a_kits(kits):
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
    shown = next(
        tables for tables in map(tomllib.loads, re.findall(r"```toml\n(.*?)```", page, re.S)) if "fit" in tables
    )
    file = kits / "silos" / "silo-0" / SILO_FILE
    written = tomllib.loads(file.read_text())
    assert shown.keys() <= written.keys()
    file.write_text(tomli_w.dumps(merged(written, shown)))
    settings = read_silo(file.parent)
    assert (settings.privacy.epsilon, settings.fit.batch_size, settings.slm.pooling) == (8.0, 200, "mean")


def test_status_of_a_server_that_never_ran_makes_nothing(kits, shell):
    """Whoever looks may be another user than the one who will run it."""
    code, out, _ = shell("status", kits / "server")
    assert (code, "not started" in out) == (0, True)
    assert not (kits / "server" / "spool").exists()


def test_a_key_that_others_can_read_is_told_at_the_start(kits, shell, monkeypatch):
    monkeypatch.setattr("crosslm.federation.flower.silo_processes.run_silo", lambda *_: None)
    kit = kits / "silos" / "silo-0"
    assert "chmod" not in shell("client", kit)[1]
    for mode in (0o640, 0o604):
        (kit / "silo.key").chmod(mode)
        assert f"warning: {kit / 'silo.key'} can be read by others" in shell("client", kit)[1].replace("\n", "")


@pytest.mark.parametrize("kit", ["server", "silos/silo-0"])
def test_what_a_kits_command_and_its_processes_write_is_for_its_owner_alone(kits, shell, monkeypatch, kit):
    seen = []

    def run(*_):
        seen.append(os.umask(0o022))
        return []

    monkeypatch.setattr("crosslm.federation.flower.silo_processes.run_silo", run)
    monkeypatch.setattr("crosslm.federation.flower.server_processes.ServerProcesses.run", run)
    before = os.umask(0o022)
    try:
        shell("server" if kit == "server" else "client", kits / kit)
    finally:
        os.umask(before)
    assert seen == [0o077]


@pytest.mark.parametrize(("number", "code"), [(errno.EAGAIN, 75), (errno.ENOMEM, 75), (errno.EACCES, 2)])
def test_what_a_machine_is_short_of_is_no_reason_not_to_be_started_again(kits, shell, monkeypatch, number, code):
    def short(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("crosslm.federation.flower.silo_processes.run_silo", short)
    assert shell("client", kits / "silos" / "silo-0")[0] == code


def test_a_clock_that_is_not_set_yet_is_told_from_a_wrong_kit(monkeypatch):
    error = ssl.SSLCertVerificationError("certificate verify failed")
    error.verify_code, error.verify_message = 9, "certificate is not yet valid"

    def early(*_, **__):
        raise error

    monkeypatch.setattr(questions.ssl, "create_default_context", lambda **_: SimpleNamespace(wrap_socket=early))
    monkeypatch.setattr(questions, "connected", lambda _: nullcontext())
    with pytest.raises(
        PassingError, match=r"is not valid yet by this machine's clock, which says 20\d\d.*set it right"
    ):
        questions.greet("localhost:9400", Path("ca.crt"))
    error.verify_code = 20
    with pytest.raises(FederationError, match="was not signed by the authority") as told:
        questions.greet("localhost:9400", Path("ca.crt"))
    assert not isinstance(told.value, PassingError)


def test_status_of_a_server_shows_what_a_silo_said_as_it_is(kits, shell):
    spool = Spool(kits / "server" / "spool")
    spool.put("silo-0", 0, [b"an upload"])
    spool.note("silo/silo-1", f"{time.time()} failed there: [/] or set [gate] otherwise\x1b[2J")
    spool.works_on("silo-0, round 0")
    spool.close()
    code, out, err = shell("status", kits / "server")
    assert (code, err) == (0, "")
    assert re.search(r"at work on: silo-0, round 0, for \d s", out)
    spool = Spool(kits / "server" / "spool")
    spool.note(WORK, "silo-0, round 0")  # of a server of an earlier version
    spool.close()
    assert "at work on" not in shell("status", kits / "server")[1]
    assert "[/]" in out
    assert "[gate]" in "".join(out.split())
    assert "\x1b[2J" not in out


def test_status_of_a_server_shows_what_came_of_a_silo_that_was_shut_out(kits, shell):
    spool = Spool(kits / "server" / "spool")
    spool.put("gone", 0, [b"an upload"])
    spool.close()
    code, out, _ = shell("status", kits / "server")
    assert code == 0
    assert [line for line in out.splitlines() if line.split()[:1] == ["gone"] and "shut out" in line]


def test_it_is_not_over_for_a_silo_whose_upload_has_no_answer_yet(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.put("late", 0, [b"an upload"])
    spool.note(OVER, "1")
    assert not spool.is_over_for("late")
    spool.delivered("late", 0)
    assert spool.is_over_for("late")
    spool.close()


def test_the_silos_budget_holds_over_processes(silo, federated, models):
    """Each request may meet a new process; what was spent before is counted."""
    noisy = PrivacyConfig(epsilon=8.0, class_counts="noisy")
    change(silo.kit, privacy=noisy, acceptance=AcceptanceConfig(), max_participations=2)
    silo = Silo(silo.kit, silo.cache)
    first, download = answer(silo, Config.model_validate(federated), models)
    silo.install(silo.settings.experiment, 0, [encode(download)])
    second = decode_upload(Silo(silo.kit, silo.cache).upload(silo.settings.experiment, 1).read_bytes())
    assert second.class_counts == first.class_counts  # told again, not drawn again
    assert first.metrics["dp/epsilon"] < second.metrics["dp/epsilon"] <= 8.0
    assert second.metrics["dp/noise_multiplier"] == first.metrics["dp/noise_multiplier"]
    receipts = Silo(silo.kit, silo.cache).receipts()
    assert [receipt["fields"]["metrics"] for receipt in receipts] == [first.metrics, second.metrics]


def test_a_raised_number_of_uploads_does_not_raise_the_silos_bound(silo, federated, models):
    """The budget was planned for one upload; a second one is not priced as if both had its noise."""
    change(silo.kit, privacy=PrivacyConfig(epsilon=8.0), acceptance=AcceptanceConfig())
    silo = Silo(silo.kit, silo.cache)
    _, download = answer(silo, Config.model_validate(federated), models)
    silo.install(silo.settings.experiment, 0, [encode(download)])
    change(silo.kit, max_participations=2)
    with pytest.raises(
        ConfigError, match=r"privacy\.epsilon = 8\.0 is spent: the 1 upload\(s\) so far cost (7\.99|8\.00) of"
    ):
        Silo(silo.kit, silo.cache).upload(silo.settings.experiment, 1)
    change(silo.kit, privacy=PrivacyConfig(epsilon=12.0))
    second = decode_upload(Silo(silo.kit, silo.cache).upload(silo.settings.experiment, 1).read_bytes())
    assert 11.9 < second.metrics["dp/epsilon"] <= 12


def test_a_leak_stops_the_return_at_the_silo(silo, federated, models):
    federated["privacy"] = {"max_shared_words": 2}
    change(silo.kit, privacy=PrivacyConfig(max_shared_words=2), encoder=str(models / "encoder"))
    silo = Silo(silo.kit, silo.cache)
    _, download = answer(silo, Config.model_validate(federated), models)
    near = dataclasses.replace(download, texts=(silo.private().texts[0],))
    with pytest.raises(LeakError, match=r"privacy\.max_shared_words"):
        silo.install(silo.settings.experiment, 0, [encode(near)])
    assert not silo.decision(0)["accepted"]


def test_flower_builds_the_app_and_there_is_no_code_in_it(kits, tmp_path, monkeypatch):
    app = kits / "server" / "app"
    environment = processes.environment(kits / "server")
    assert environment["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"  # a bar would be in the logs
    done = subprocess.run(
        [processes.program("flwr"), "build", "--app", str(app)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (fab,) = [*tmp_path.glob("*.fab"), *app.glob("*.fab")]
    names = zipfile.ZipFile(fab).namelist()
    assert not [name for name in names if name.endswith(".py")]
    assert "pyproject.toml" in names


def test_a_superlink_is_started_for_this_machine_alone_and_with_all_locks(kits):
    kit = kits / "server"
    program, *given = server_processes.superlink_command(kit)
    assert Path(program).name == "flower-superlink"
    assert flags(given) == {
        "--ssl-certfile": str(kit / "server.crt"),
        "--ssl-keyfile": str(kit / "server.key"),
        "--ssl-ca-certfile": str(kit / "ca.crt"),
        "--enable-supernode-auth": None,
        "--host": "127.0.0.1",
        "--port": "9091",
        "--disable-runtime-dependency-installation": None,
    }


def test_a_supernode_is_started_without_a_program_for_apps_and_with_its_key(kits):
    kit = kits / "silos" / "silo-0"
    program, *given = silo_processes.supernode_command(kit)
    assert Path(program).name == "flower-supernode"
    assert flags(given) == {
        "--root-certificates": str(kit / "ca.crt"),
        "--superlink": "localhost:9400",
        "--host": "127.0.0.1",
        "--port": str(read_silo(kit).runtime_port),
        "--auth-supernode-private-key": str(kit / "silo.key"),
        "--isolation": "process",
    }


def flags(given):
    """The flags of a command line, all of them, with their values."""
    found, last = {}, None
    for word in given:
        if word.startswith("--"):
            last = word
            found[last] = None
        else:
            found[last] = word
    return found


@pytest.mark.parametrize(
    "module",
    [
        "client_app",
        "server_app",
        "exchange",
        "payload",
        "processes",
        "server_processes",
        "silo_processes",
        "answer",
        "tasks",
    ],
)
def test_flower_is_told_to_be_quiet_before_it_is_imported(module):
    """Though the user asks for the opposite; and who only starts processes loads neither it nor PyTorch."""
    code = (
        "import importlib.abc, os, sys\n"
        "class Look(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'flwr':\n"
        "            told = [os.environ[name] for name in ('FLWR_TELEMETRY_ENABLED', 'FLWR_DISABLE_UPDATE_CHECK')]\n"
        "            print('at import', *told, flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Look())\n"
        f"import crosslm.federation.flower.{module}\n"
        "print('not imported', *({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    loud = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1", "FLWR_DISABLE_UPDATE_CHECK": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=loud, capture_output=True, text=True, check=True)
    expected = ["not imported"] if module.endswith("processes") else ["at import 0 1"]
    assert done.stdout.splitlines() == expected


def test_a_silo_with_all_its_rounds_does_not_wait_for_ever(monkeypatch):
    notes, away = [], [OSError("refused"), OSError("refused")]

    def greet(*_):
        if away:
            raise away.pop()

    monkeypatch.setattr(questions, "greet", greet)
    monkeypatch.setattr(questions, "RESTART", 0.0)
    assert not questions.wait_for_server("localhost:9400", Path("ca.crt"), notes.append, -1.0)
    assert questions.wait_for_server("localhost:9400", Path("ca.crt"), notes.append)
    assert len(notes) == 1


def test_a_silo_leaves_rows_of_other_labels_out_too(silo, kits, federated):
    change(silo.kit, data=silo.settings.data.model_copy(update={"skip_labels": ("gone", "")}))
    rows, told = len(silo.private()), []
    with (silo.kit / "silo-0.csv").open("a") as file:
        file.write("x,gone\ny,\n")
    assert len(Silo(silo.kit, silo.cache).private(told.append)) == rows
    assert len(told) == 2
    config = Config.model_validate(merged(federated, {"data": {"skip_labels": ["gone"]}}))
    made = provision(config, "localhost:9400", kits / "again")
    assert read_silo(made[1]).data.skip_labels == ("gone",)
