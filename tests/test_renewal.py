"""``crosslm provision --renew``: a new certificate for the server of a federation that there is."""

import datetime
import shutil
import socket
import ssl
import stat
import threading
from contextlib import suppress

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from crosslm.config import Config
from crosslm.errors import FederationError
from crosslm.federation import certificates, renewal
from crosslm.federation.flower import questions
from crosslm.federation.kits import SERVER_FILE, SILO_FILE, read_server, read_silo
from crosslm.federation.provision import provision
from crosslm.federation.renewal import renew
from crosslm.federation.spool import Spool

OLD, NEW = "old.example.org:9400", "new.example.org:9500"
SILOS = ("silo-0", "silo-1")
SETTINGS = {f"silos/{silo}/{name}" for silo in SILOS for name in (SILO_FILE, "README.md")} | {
    f"server/{SERVER_FILE}",
    "server/README.md",
}
AUTHORITIES = {f"{kit}/ca.crt" for kit in ("authority", "server", *(f"silos/{silo}" for silo in SILOS))}


class Killed(BaseException):
    """As a process that is killed: nothing is cleaned up."""


@pytest.fixture
def config(federated):
    return Config.model_validate(federated)


@pytest.fixture
def at_work(config, tmp_path):
    """Kits of a federation that has begun: an upload in the spool, a receipt and a count of what DP has spent."""
    return begun(config, tmp_path / "kits")


@pytest.fixture
def of_before(config, tmp_path, monkeypatch):
    """The same, whose authority's certificate ends after a year."""
    with monkeypatch.context() as patched:
        patched.setattr(certificates, "AUTHORITY_DAYS", 365)
        return begun(config, tmp_path / "kits")


def begun(config, folder):
    provision(config, OLD, folder)
    spool = Spool(folder / "server" / "spool")
    spool.put("silo-0", 0, [b"an upload"])
    spool.close()
    for name in ("receipts/upload-0000.json", "private.json"):
        path = folder / "silos" / "silo-0" / "state" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(folder, before):
    """Files that are others than they were, or are new, or are gone."""
    now = contents(folder)
    return {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def days_left(path):
    left = certificate(path).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return round(left / datetime.timedelta(days=1))


def refusal(server, ca, host):
    """Why a silo refuses a server by TLS, by this certificate of the authority and under this name; None if not.

    As strict as Python 3.13 and newer are by themselves.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    asks = ssl.create_default_context(cafile=str(ca))
    asks.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN

    def answer():
        link, _ = listening.accept()
        with link, suppress(ssl.SSLError, OSError), context.wrap_socket(link, server_side=True) as inner:
            inner.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=10) as link,
                asks.wrap_socket(link, server_hostname=host),
            ):
                return None
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        finally:
            thread.join(10)


def test_a_new_certificate_needs_nothing_of_the_silos(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(certificates, "VALID_DAYS", 10)
        kits = begun(config, tmp_path / "kits")
    before, former = contents(kits), certificate(kits / "server" / "server.crt")
    told = renew(config, None, kits)
    assert changed(kits, before) == {"server/server.crt"}
    made = certificate(kits / "server" / "server.crt")
    assert made.public_key() == former.public_key()
    assert made.serial_number != former.serial_number
    assert days_left(kits / "server" / "server.crt") == certificates.VALID_DAYS
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["old.example.org", "localhost"]
    assert refusal(kits / "server", kits / "silos" / "silo-0" / "ca.crt", "old.example.org") is None
    until, ca = (f"{each.not_valid_after_utc:%Y-%m-%d}" for each in (made, certificate(kits / "authority" / "ca.crt")))
    assert told == [
        f"the server's new certificate is for old.example.org, until {until}",
        f"{kits / 'authority' / 'ca.crt'} stays, until {ca}; a silo where crosslm doctor has an earlier day for ca.crt "
        "needs it",
        f"server: {kits / 'server'} is renewed; if another copy of it runs, put server.crt of it into that one. Then "
        "start crosslm server again",
        "silos: need nothing; those at work connect again by themselves, and one that has ended is started again",
    ]


def test_an_authority_that_would_end_first_is_renewed_with_its_key(of_before, config, tmp_path):
    old, running = tmp_path / "old.crt", tmp_path / "running"
    shutil.copy(of_before / "authority" / "ca.crt", old)
    shutil.copytree(of_before / "server", running)
    before = contents(of_before)
    told = renew(config, None, of_before)
    assert changed(of_before, before) == {"server/server.crt", *AUTHORITIES}
    new = of_before / "authority" / "ca.crt"
    assert len({(of_before / name).read_bytes() for name in AUTHORITIES}) == 1
    assert certificate(new).public_key() == certificate(old).public_key()
    assert certificate(new).subject == certificate(old).subject
    assert (days_left(old), days_left(new)) == (365, certificates.AUTHORITY_DAYS)
    for server in (running, of_before / "server"):  # in whatever order they are brought
        for ca in (old, new):
            assert refusal(server, ca, "old.example.org") is None
    end = certificate(old).not_valid_after_utc
    assert f"with the former one a silo takes the server up to {end:%Y-%m-%d}" in told[1]
    assert "put server.crt and ca.crt of it into that one" in told[2]
    assert told[3:] == [
        f"silo {silo}: {of_before / 'silos' / silo} is renewed; if another copy of it runs, put {new} into its kit. "
        "Then start crosslm client again"
        for silo in SILOS
    ]


def test_certificates_that_have_ended_are_renewed_and_the_old_authority_counts_no_more(config, tmp_path, monkeypatch):
    old = tmp_path / "old.crt"
    with monkeypatch.context() as patched:
        patched.setattr(certificates, "VALID_DAYS", 0)
        patched.setattr(certificates, "AUTHORITY_DAYS", 0)
        kits = begun(config, tmp_path / "kits")
    shutil.copy(kits / "authority" / "ca.crt", old)
    assert refusal(kits / "server", old, "old.example.org") == "certificate has expired"
    renew(config, None, kits)
    assert refusal(kits / "server", old, "old.example.org") == "certificate has expired"
    assert refusal(kits / "server", kits / "silos" / "silo-1" / "ca.crt", "old.example.org") is None


def test_a_server_under_another_name_and_port(at_work, config, federated):
    silo = at_work / "silos" / "silo-0" / SILO_FILE
    silo.write_bytes(b"# ours\r\n" + silo.read_bytes().replace(b"seed = 0", b"seed = 7  # as ever"))
    before, was, server = contents(at_work), read_silo(silo.parent), read_server(at_work / "server")
    told = renew(config, NEW, at_work)
    assert changed(at_work, before) == {"server/server.crt", *SETTINGS}
    assert read_silo(silo.parent) == was.model_copy(update={"server": NEW})
    assert read_server(at_work / "server") == server.model_copy(update={"address": NEW})
    assert silo.read_bytes() == before[f"silos/silo-0/{SILO_FILE}"].replace(OLD.encode(), NEW.encode())
    assert all(OLD.encode() not in (at_work / name).read_bytes() for name in SETTINGS)
    ca = at_work / "silos" / "silo-0" / "ca.crt"
    for host, why in (("new.example.org", None), ("localhost", None), ("old.example.org", "Hostname mismatch")):
        found = refusal(at_work / "server", ca, host)
        assert found == why or (why and found.startswith(why)), host
    assert 'into that one, and set address = "new.example.org:9500" in its server.toml. Then start' in told[2]
    assert told[3:] == [
        f"silo {name}: {at_work / 'silos' / name} is renewed; if another copy of it runs, set server = "
        '"new.example.org:9500" in its silo.toml. Then start crosslm client again'
        for name in SILOS
    ]
    federated["clients"].append({"id": "late", "train": "silo-0.csv"})
    added = Config.model_validate(federated)
    with pytest.raises(FederationError, match=r"at new.example.org:9500; choose another --output, or --renew that"):
        provision(added, OLD, at_work)
    assert provision(added, NEW, at_work) == [at_work / "silos" / "late"]


def test_it_can_be_given_again(of_before, config):
    renew(config, NEW, of_before)
    before = contents(of_before)
    assert "stays" in renew(config, None, of_before)[1]
    assert changed(of_before, before) == {"server/server.crt"}
    assert refusal(of_before / "server", of_before / "silos" / "silo-0" / "ca.crt", "new.example.org") is None


def test_kits_that_are_elsewhere_are_told_what_to_get(of_before, config, tmp_path):
    running, silo = tmp_path / "running", tmp_path / "silo-0"
    (of_before / "server").rename(running)
    (of_before / "silos" / "silo-0").rename(silo)
    before, secret = contents(of_before), (running / "server.key").read_bytes()
    with pytest.raises(FederationError, match=r"server: has no server.toml with the address; put that back, or give"):
        renew(config, None, of_before)
    assert changed(of_before, before) == set()
    for _ in range(2):
        told = renew(config, NEW, of_before)
        renewed = of_before / "renewed"
        assert stat.S_IMODE((renewed / "server.key").stat().st_mode) == 0o600
        assert secret != (renewed / "server.key").read_bytes()
        key = load_pem_private_key((renewed / "server.key").read_bytes(), None)
        assert certificate(renewed / "server.crt").public_key() == key.public_key()
        for ca in (silo / "ca.crt", of_before / "silos" / "silo-1" / "ca.crt", renewed / "ca.crt"):
            assert refusal(renewed, ca, "new.example.org") is None
    assert changed(of_before, before) == {
        *(f"renewed/{name}" for name in ("server.crt", "server.key", "ca.crt")),
        *(name for name in {*AUTHORITIES, *SETTINGS} if name.startswith(("authority", "silos/silo-1"))),
    }
    assert f"server: its kit is not here: put the files of {renewed} into it by a way that nobody else can" in told[2]
    assert 'since server.key is secret, and set address = "new.example.org:9500" in its server.toml' in told[2]
    shutil.rmtree(renewed)
    (of_before / "server").mkdir()
    shutil.copy(running / SERVER_FILE, of_before / "server")
    for name in ("server.crt", "ca.crt"):  # without its key
        shutil.copy(running / name, of_before / "server")
    shutil.copytree(running / "silos", of_before / "server" / "silos")
    renew(config, NEW, of_before)
    shutil.copy(of_before / "server" / "server.crt", running)
    assert refusal(running, silo / "ca.crt", "new.example.org") is None
    assert not renewed.exists()


def test_the_lines_for_silos_whose_kits_are_elsewhere(of_before, config):
    shutil.rmtree(of_before / "silos" / "silo-0")
    ca = of_before / "authority" / "ca.crt"
    assert renew(config, NEW, of_before)[3] == (
        f'silo silo-0: put {ca} into its kit and set server = "new.example.org:9500" in its silo.toml. Then start '
        "crosslm client again"
    )


@pytest.mark.parametrize("moved", [False, True], ids=["kits here", "server elsewhere"])
def test_a_command_that_was_cut_off_is_completed_by_the_same_command(of_before, config, tmp_path, monkeypatch, moved):
    if moved:
        shutil.rmtree(of_before / "server")
    whole, write, left = tmp_path / "whole", renewal.write_whole, 0
    shutil.copytree(of_before, whole)
    begin, before = contents(whole), renew(config, NEW, whole)

    def cut(path, parts):
        nonlocal left
        left -= 1
        if left < 0:
            path.with_name(path.name + ".partial").write_bytes(b"half")
            raise Killed
        write(path, parts)

    monkeypatch.setattr(renewal, "write_whole", cut)
    for writes in range(30):
        left, kits = writes, tmp_path / f"cut-{writes}"
        shutil.copytree(of_before, kits)
        try:
            renew(config, NEW, kits)
        except Killed:
            left = 1000
            told = renew(config, NEW, kits)
        else:
            break
        assert [line.replace(str(kits), str(whole)) for line in told] == before, f"after {writes} files"
        assert changed(kits, begin) == changed(whole, begin)
        assert len({path.read_bytes() for path in kits.rglob("ca.crt")}) == 1
        server = kits / ("renewed" if moved else "server")
        assert refusal(server, kits / "silos" / "silo-1" / "ca.crt", "new.example.org") is None
    assert writes == (9 if moved else 11)


def other(kits, config):
    folder = kits.parent / "other"
    provision(config, OLD, folder)
    return folder


def take(kits, others, *names):
    for name in names:
        shutil.copy(others / name, kits / name)


BAD = {
    "no authority": (
        lambda kits, _: shutil.rmtree(kits / "authority"),
        r"authority: is not there; --output must be the folder that crosslm provision made",
    ),
    "no key": (
        lambda kits, _: (kits / "authority/ca.key").unlink(),
        r"ca\.key: cannot be read: No such .*put it back",
    ),
    "no certificate": (lambda kits, _: (kits / "authority/ca.crt").unlink(), r"authority/ca\.crt: cannot be read: No"),
    "no key in it": (
        lambda kits, _: (kits / "authority/ca.key").write_text("none"),
        r"ca\.key: is not as crosslm provision made it: .*put it back from another copy",
    ),
    "no certificate in it": (
        lambda kits, _: (kits / "authority/ca.crt").write_text("none"),
        r"authority/ca\.crt: is not as crosslm provision made it",
    ),
    "another key": (
        lambda kits, config: take(kits, other(kits, config), "authority/ca.key"),
        r"ca\.key: does not belong to ca\.crt beside it; put both back",
    ),
    "another authority": (
        lambda kits, config: take(kits, other(kits, config), "authority/ca.key", "authority/ca.crt"),
        r"server/ca\.crt: is of another authority than the one beside the kits; put the folder authority back",
    ),
    "another server's certificate": (
        lambda kits, config: take(kits, other(kits, config), "server/server.crt"),
        r"server\.crt: was not signed by the authority of ca\.crt beside it; put it back",
    ),
    "no server's certificate": (
        lambda kits, _: (kits / "server/server.crt").unlink(),
        r"server/server\.crt: cannot be read: No such",
    ),
    "another silo": (
        lambda kits, config: take(kits, other(kits, config), "silos/silo-1/silo.toml"),
        r"silos/silo-1: is of tiny-\w+, and one federation of tiny is to be renewed; give the conf.*another --output",
    ),
    "another silo's authority": (
        lambda kits, config: take(kits, other(kits, config), "silos/silo-1/ca.crt"),
        r"silos/silo-1/ca\.crt: is of another authority than the one beside the kits",
    ),
    "a silo's settings that cannot be read": (
        lambda kits, _: (kits / "silos/silo-1/silo.toml").write_text("id = 3"),
        r"silo-1/silo\.toml",
    ),
    "a silo's settings that cannot be changed": (
        lambda kits, _: (kits / "silos/silo-1/silo.toml").write_text(
            (kits / "silos/silo-1/silo.toml").read_text().replace("\nserver =", '\n"server" =')
        ),
        r'silo\.toml: server stands there .*set server = "new\.example\.org:9500" by hand, and give the same command',
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named_and_nothing_is_written(at_work, config, what):
    damage, message = BAD[what]
    damage(at_work, config)
    before = contents(at_work)
    with pytest.raises(FederationError, match=message):
        renew(config, NEW, at_work)
    assert changed(at_work, before) == set()


@pytest.mark.parametrize("address", ["localhost", "a b:9400", ":9400", "localhost:0", "münchen.example:9400"])
def test_an_address_that_is_none_is_named(at_work, config, address):
    before = contents(at_work)
    with pytest.raises(FederationError, match="must be HOST:PORT"):
        renew(config, address, at_work)
    assert changed(at_work, before) == set()


def test_another_federations_folder_is_told(at_work, config):
    before = contents(at_work)
    with pytest.raises(FederationError, match=r"server: is of tiny-\w+, and one federation of others is to be renewed"):
        renew(config.model_copy(update={"name": "others"}), None, at_work)
    assert changed(at_work, before) == set()


def test_the_command(at_work, federated, shell, tmp_path):
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(federated))
    before = contents(at_work)
    code, out, err = shell("provision", file, "--output", at_work)
    assert (code, out) == (2, "")
    assert "--address HOST:PORT must be given" in err
    code, out, err = shell("provision", file, "--output", at_work, "--renew")
    assert (code, err) == (0, "")
    assert "the server's new certificate is for old.example.org, until 20" in out
    assert changed(at_work, before) == {"server/server.crt"}
    assert shell("provision", file, "--output", at_work, "--renew", "--address", NEW)[0] == 0
    assert read_server(at_work / "server").address == NEW


def test_a_silo_whose_certificates_have_ended_is_told_of_the_command(config, tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "VALID_DAYS", 0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"localhost:{listening.getsockname()[1]}"
        provision(config, address, tmp_path / "kits")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "kits/server/server.crt", tmp_path / "kits/server/server.key")

        def answer():
            link, _ = listening.accept()
            with link, suppress(OSError):
                context.wrap_socket(link, server_side=True).close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(FederationError, match=r"has expired \(certificate has expired\); .*provision --renew"):
            questions.greet(address, tmp_path / "kits/silos/silo-0/ca.crt")
        thread.join(10)
