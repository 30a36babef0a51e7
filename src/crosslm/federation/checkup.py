"""``crosslm doctor KIT``: what would stop a server or a silo between machines, found before it starts."""

import datetime
import errno
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from crosslm.config import Config
from crosslm.data.texts import is_there, load_examples
from crosslm.errors import CrosslmError, DataError, FederationError
from crosslm.federation.flower.processes import program
from crosslm.federation.flower.questions import ask, greet
from crosslm.federation.intake import Intake
from crosslm.federation.keys import exposed
from crosslm.federation.kits import (
    SERVER_FILE,
    ServerSettings,
    SiloSettings,
    read_server,
    read_silo,
    server_config,
    silo_names,
)
from crosslm.federation.silo import DTYPES
from crosslm.federation.silo_state import SiloState
from crosslm.models.sources import check_model, model_folder
from crosslm.preflight import doctor, machine
from crosslm.preflight.machine import Finding
from crosslm.preflight.rows import LOOKED_AT, budget, count_rows, reading
from crosslm.runs.preparation import (
    check_slm,
    check_upload,
    client_specs,
    describe_spec,
    measured_text,
    public_texts,
)
from crosslm.runs.rundir import LOCK
from crosslm.support.commands import command
from crosslm.support.files import is_held

FEW_DAYS = 30
AGAIN = f"where the kits were made, give {command('provision', 'FEDERATION.toml', '--output', 'KITS', '--renew')}"
"""What makes new certificates; it says what is to be brought here."""
News = Callable[[str], None]


def examine_kit(kit: Path, cache: Path, on_news: News = lambda _: None) -> Iterator[Finding]:
    """Look at the machine, and at what a kit needs of it: settings, certificates, ports, data, models.

    Nothing is started. A silo greets its server by TLS, and asks it whether it knows its key; nothing else is sent.

    Args:
        kit: of the server or of a silo.
        cache: where converted models are kept.
        on_news: told before something takes long.
    """
    yield machine.python()
    missing = list(machine.packages("federation"))
    yield from missing
    yield machine.disk(kit, "kit")
    if any(finding.level == "error" for finding in missing):
        return
    try:
        if (kit / SERVER_FILE).is_file():
            yield from _server(kit, read_server(kit), cache, on_news)
        else:
            yield from _silo(kit, read_silo(kit), cache, on_news)
    except CrosslmError as error:
        yield from (Finding("error", "kit", line) for line in str(error).splitlines())


def _server(kit: Path, settings: ServerSettings, cache: Path, on_news: News) -> Iterator[Finding]:
    config = server_config(kit)
    labels = ", ".join(config.task.labels)
    yield Finding("ok", "kit", f"server of {settings.experiment} at {settings.address}, labels {labels}")
    yield _program("flower-superlink")
    yield from _authority(kit)
    yield from _server_certificate(kit, settings)
    yield from _secret(kit / "server.key")
    yield _listens(kit, settings.bind, int(settings.address.rpartition(":")[2]), "change address in server.toml")
    yield _listens(kit, "127.0.0.1", settings.superlink_port, "choose another superlink_port in server.toml")
    silos = silo_names(kit)
    if silos:
        yield Finding("ok", "silos", f"{', '.join(silos)} are known by their keys")
    else:
        yield Finding("error", "silos", f"{kit / 'silos'} has no public key of a silo: make the kits again")
    yield machine.device(config.device)
    yield from doctor.trackers(config)
    texts: list[str] = []
    yield _test_rows(kit, texts)
    yield from _texts(config)
    named, folders = {"llm.model": config.llm.model, "selection.encoder": config.selection.encoder}, dict[str, str]()
    yield from doctor.find_models(named, folders, cache, on_news)
    if config.llm.model in folders:
        yield from doctor.language_model(config, folders[config.llm.model], texts, cache)
    if set(folders) == set(named.values()):
        encoder = folders[config.selection.encoder]
        slms = [_here(spec.model, cache, encoder) for spec in client_specs(config, silos).values()]
        yield doctor.memory(config, folders[config.llm.model], slms, encoder)


def _here(model: str, cache: Path, otherwise: str) -> str:
    """A silo's model, if this machine has it too: classifiers come with their uploads."""
    try:
        check_model(model, "slm")
        return model_folder(model, cache)
    except CrosslmError:
        return otherwise


def _silo(kit: Path, settings: SiloSettings, cache: Path, on_news: News) -> Iterator[Finding]:
    yield Finding("ok", "kit", f"silo {settings.id} of {settings.experiment}, labels {', '.join(settings.labels)}")
    yield _program("flower-supernode")
    yield from _authority(kit)
    yield from _secret(kit / "silo.key")
    silo = SiloState(kit)
    yield _answers(silo)
    yield _listens(kit, "127.0.0.1", settings.runtime_port, "choose another runtime_port in silo.toml")
    yield machine.device(settings.device)
    left_out: list[str] = []
    texts: list[str] = []
    try:
        private = silo.private(left_out.append)
        texts = private.texts
        yield count_rows("data", settings.data.train, private, settings.labels)
        agreed, who = settings.max_participations, f"silo {settings.id}"
        yield from budget(len(private), settings.fit, settings.privacy, agreed, who)
        yield from (Finding("warning", "data", line) for line in left_out)
    except CrosslmError as error:
        yield Finding("error", "data", str(error))
    yield from _test_rows_of(silo)
    yield from doctor.private(settings.privacy)
    if not settings.privacy.epsilon:
        message = (
            "none, so that what the weights tell of single rows has no bound; docs/privacy.md has what that comes to"
        )
        yield Finding("ok", "privacy.epsilon", message)
    named, folders = {"slm.model": settings.slm.model}, dict[str, str]()
    if settings.privacy.checks_leaks:
        named["encoder"] = settings.encoder
    yield from doctor.find_models(named, folders, cache, on_news)
    if settings.slm.model in folders:
        folder = folders[settings.slm.model]
        found = _classifier(settings, folder)
        yield found
        if found.level == "ok":
            yield from reading(f"silo {settings.id}", folder, settings.max_length, texts)


def _program(name: str) -> Finding:
    try:
        return Finding("ok", "flower", program(name))
    except FederationError as error:
        return Finding("error", "flower", str(error))


def _classifier(settings: SiloSettings, folder: str) -> Finding:
    try:
        check_slm(folder, settings.slm, settings.privacy, "slm")
        intake, dtype = Intake(settings.labels, settings.intake), DTYPES[settings.wire_dtype]
        check_upload(folder, settings.slm, settings.max_length, intake, "slm", dtype)
    except CrosslmError as error:
        return Finding("error", "slm", str(error))
    return Finding("ok", "slm", f"trains {describe_spec(settings.slm)}")


def _test_rows(kit: Path, texts: list[str]) -> Finding:
    """Test rows are wanted on the server, and not needed; ``texts`` gets some of theirs, if they are there."""
    config = server_config(kit)
    name = str(config.data.test)
    if not is_there(name, config.data):
        what = "no accuracy will be known here, and the training is the same; put rows there that the server may see"
        return Finding("warning", "data.test", f"{kit / name} is not there: {what}")
    try:
        loaded = load_examples(name, config.data, config.task.labels)
    except DataError as error:
        return Finding("error", "data.test", str(error))
    texts += loaded.examples.texts[:LOOKED_AT]
    return count_rows("data.test", loaded.source, loaded.examples, config.task.labels, test=True)


def _texts(config: Config) -> Iterator[Finding]:
    """Other texts that the server reads when it starts, and cannot start without once they are named."""
    yield from doctor.vocabulary_texts(config)
    for subject, read in (("gate.public_texts", public_texts), ("evaluation.perplexity_text", measured_text)):
        try:
            read(config)
        except DataError as error:
            yield Finding("error", subject, str(error))


def _test_rows_of(silo: SiloState) -> Iterator[Finding]:
    """A silo's test rows, of which nobody else is told, are not needed either."""
    name, left_out = silo.settings.data.test, list[str]()
    if name is None:
        message = "none named: what this silo gains will be known of the few rows alone that are held out to decide by"
        yield Finding("ok", "data.test", message)
        return
    try:
        rows = silo.test(left_out.append)
    except CrosslmError as error:
        yield Finding("error", "data.test", str(error))
        return
    if rows is None:
        what = "no accuracy will be known here, and the training is the same; put labelled rows there"
        yield Finding("warning", "data.test", f"{name} is not there, or has no rows: {what}")
    else:
        yield count_rows("data.test", name, rows, silo.settings.labels, test=True)
    yield from (Finding("warning", "data.test", line) for line in left_out)


def _authority(kit: Path) -> Iterator[Finding]:
    """The certificate by which both sides know the federation."""
    from cryptography import x509

    path = kit / "ca.crt"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        yield Finding("error", "ca.crt", f"{path}: {error}; copy it from another kit of this federation")
        return
    yield _dates("ca.crt", certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def _server_certificate(kit: Path, settings: ServerSettings) -> Iterator[Finding]:
    """Whether silos will accept the server: by date, signature, key and name."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate((kit / "server.crt").read_bytes())
        key = load_pem_private_key((kit / "server.key").read_bytes(), None)
        authority = x509.load_pem_x509_certificate((kit / "ca.crt").read_bytes())
    except (OSError, ValueError) as error:
        yield Finding("error", "server.crt", f"{kit}: {error}; take server.crt, server.key and ca.crt of one kit")
        return
    yield _dates("server.crt", certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    if certificate.public_key() != key.public_key():
        yield Finding("error", "server.crt", "does not belong to server.key: take both from the same kit")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        yield Finding("error", "server.crt", "was not signed by the authority in ca.crt: take both from the same kit")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
    host = settings.address.rpartition(":")[0]
    if host not in known:
        message = f"is for {', '.join(sorted(known))}, and silos connect to {host}: they refuse it"
        yield Finding("error", "server.crt", f"{message}; {AGAIN} --address {settings.address}")


def _dates(subject: str, begin: datetime.datetime, end: datetime.datetime) -> Finding:
    """Whether a certificate is valid now, and for some time."""
    now = datetime.datetime.now(datetime.UTC)
    if now < begin:
        return Finding("error", subject, f"is valid from {begin:%Y-%m-%d %H:%M} UTC on; look at this machine's clock")
    if now > end:
        return Finding("error", subject, f"has expired on {end:%Y-%m-%d}; {AGAIN}")
    days = (end - now).days
    if days < FEW_DAYS:
        message = f"expires in {days} days, on {end:%Y-%m-%d}; if the run takes longer, {AGAIN}"
        return Finding("warning", subject, message)
    return Finding("ok", subject, f"valid until {end:%Y-%m-%d}")


def _secret(path: Path) -> Iterator[Finding]:
    """A private key that others on this machine can read is a secret no more."""
    if not path.is_file():
        yield Finding("error", path.name, f"{path}: no such file; bring it here again from where the kit was made")
    elif doubt := exposed(path):
        yield Finding("warning", path.name, doubt)


def _listens(kit: Path, host: str, port: int, otherwise: str) -> Finding:
    """Whether a port is free, or what this kit started has it."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return Finding("error", "port", f"{host}:{port}: {error.strerror}; {otherwise}")
        else:
            return Finding("ok", "port", f"{host}:{port} is free")
    if not (kit / SERVER_FILE).is_file() and is_held(kit / LOCK):  # a SuperNode does not answer in TLS
        return Finding("ok", "port", f"{host}:{port} is in use, and this kit is at work")
    try:
        greet(f"localhost:{port}", kit / "ca.crt")
    except (FederationError, OSError):
        return Finding("error", "port", f"{host}:{port} is in use by another program; end it, or {otherwise}")
    return Finding("ok", "port", f"{host}:{port} is in use by a server of this federation, which runs already")


def _answers(silo: SiloState) -> Finding:
    """Whether a silo reaches its server, and is known there."""
    server = silo.settings.server
    try:
        greet(server, silo.kit / "ca.crt")
        said = ask(silo)
    except FederationError as error:
        return Finding("error", "server", str(error))
    except OSError as error:
        what = "is crosslm server running, and may this machine connect to it? crosslm client waits until it answers"
        return Finding("warning", "server", f"{server} does not answer ({error}); {what}")
    if said and said.clock:
        return Finding("error", "server", f"{server}: {said.clock}")
    return Finding("ok", "server", f"{server} answers with a certificate of this federation")
