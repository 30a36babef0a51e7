"""Making start-up kits: an authority, a certificate for the server, a key pair for each silo.

Run once, by whoever sets the federation up. The private key of the authority stays in the folder
``authority`` of the output and belongs to no kit; with it, silos are added later by running the same
again.
"""

import datetime
import ipaddress
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from crosslm import __version__
from crosslm.config import ClientConfig, Config
from crosslm.errors import FederationError
from crosslm.federation.kits import SERVER_FILE, SILO_FILE, ServerSettings, SiloData, SiloSettings, dump, read_server
from crosslm.models.sources import PREFIX
from crosslm.runs.preparation import client_specs
from crosslm.support.files import PARTIAL, replace_folder

VALID_DAYS = 825
WHEEL = f"crosslm-{__version__}-py3-none-any.whl"
"""What ``pip wheel`` makes of this version; a kit's README says to install it."""
FIRST_RUNTIME_PORT = 9094
FLOWER_APP = """\
# The app that Flower hands to the silos. It holds no code: each silo runs the crosslm that it installed itself.
[project]
name = "crosslm-federation"
version = "1.0.0"
description = "Names the applications inside the installed crosslm package"
license = { text = "Apache-2.0" }
dependencies = []

[tool.flwr.app]
publisher = "crosslm"

[tool.flwr.app.components]
serverapp = "crosslm.federation.flower.server_app:app"
clientapp = "crosslm.federation.flower.client_app:app"
"""
UNIT = """\
# systemd unit: copy to /etc/systemd/system, set WorkingDirectory to this kit and, if crosslm is in a virtual
# environment, ExecStart to the whole path of that crosslm; make a user crosslm that the kit belongs to, or name
# another one under User; then: systemctl enable --now {name}
[Unit]
Description=crosslm {what}
After=network-online.target
Wants=network-online.target

[Service]
User=crosslm
UMask=0077
WorkingDirectory=/srv/crosslm/{folder}
ExecStart=/usr/bin/env crosslm {command} .
# a run that is complete (0), a setting that is wrong (2) or Ctrl-C (130): starting again does not help
Restart=on-failure
RestartPreventExitStatus=2 130
RestartSec=5
NoNewPrivileges=true
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""
START = """\
#!/bin/sh
# Starts what is in this kit, and starts it again when it dies; ends it when it is told to end itself (Ctrl-C, kill,
# docker stop). Needs crosslm on the PATH: activate its virtual environment first.
cd "$(dirname "$0")" || exit 1
runs=
stop() {{
    trap '' HUP INT QUIT TERM
    [ -n "$runs" ] && [ -n "$!" ] && kill "$!" 2>/dev/null && wait "$!"
    exit "$1"
}}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 131' QUIT
trap 'stop 143' TERM
while true; do
    runs=yes
    crosslm {command} . &
    wait "$!"
    code=$?
    runs=
    [ $code -eq 0 ] && exit 0
    [ $code -eq 2 ] && exit 2 # a setting is wrong: starting again does not help
    [ $code -eq 130 ] && exit 130 # stopped from the keyboard
    sleep 5
done
"""
SERVER_README = """\
# crosslm server of {experiment}

1. `pip install '{wheel}[{extras}]'`, in the version of the silos: the wheel is made in crosslm's source folder by
   `pip wheel --no-deps .`, and carried here.
2. Check `config.toml` (the task, the LLM) and `server.toml` (where to listen). Files that `config.toml` names for the
   server (`data.test`, `llm.vocabulary_texts`, `gate.public_texts`) belong into this folder; without the file of
   `data.test` no accuracy is known here. Files of silos (`clients.train`) do not belong here.
3. `crosslm doctor .` looks for what would stop it.
4. `crosslm server .`, or `./start.sh`, or the systemd unit `crosslm-server.service`: each starts again what dies.
5. `crosslm status .` says who has uploaded, what is being trained, what waits, and since when.

Silos must reach {address}. Nothing else needs to be open: Flower's SuperLink, whose control interface
knows no accounts, listens on the loopback interface, and the gateway in front of it passes on only what
silos ask. `server.key` is this server's secret. Results come in `run/` (`crosslm report run`), uploads as they came in
`spool/`.
"""
SILO_README = """\
# crosslm silo {silo} of {experiment}

1. `pip install '{wheel}[{extras}]'`, in the version of the server: whoever sent this kit has the wheel, which is made
   in crosslm's source folder by `pip wheel --no-deps .`.
2. Put your labelled text where `silo.toml` says (`data`), or change that. The server cannot see or change `silo.toml`.
   `data.test` may name a file of other labelled rows: nothing is learned of them, and nobody is told;
   `crosslm status .` says how many of them the classifier gets right before and after.
3. `crosslm doctor .` looks for what would stop it; `crosslm client . --dry-run` prints every tensor and every field
   that would leave, and sends nothing.
4. `crosslm client .`, or `./start.sh`, or the systemd unit `crosslm-silo.service`: each starts again what dies.
5. `crosslm status .` says what was sent and what came back. The enhanced classifier is in `state/slm/`;
   `crosslm predict . FILE` classifies with it.

Only an outgoing connection to {address} is made. `silo.key` is this silo's secret: with it anybody is this
silo. After each upload, `state/receipts/` says what left.
"""


def provision(config: Config, address: str, output: Path) -> list[Path]:
    """Make the kits, or those of silos that are new.

    Args:
        config: the run, with a ``[[clients]]`` table for each silo.
        address: HOST:PORT that silos will connect to.
        output: folder for the kits.

    Returns:
        The kits that were made.

    Raises:
        FederationError: there are no clients, the address is wrong, or the output belongs to another federation or
            lacks a part of this one.
    """
    if not config.clients:
        raise FederationError(f"{config.name}: name each silo in a [[clients]] table; data.train is for one machine")
    host, _, port = address.partition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise FederationError(f"address {address!r}: must be HOST:PORT, the place that silos connect to")
    server, made = output / "server", []
    if (server / SERVER_FILE).exists():
        settings = read_server(server)
        if not settings.experiment.startswith(config.name + "-") or settings.address != address:
            raise FederationError(
                f"{output}: holds the kits of {settings.experiment} at {settings.address}; choose another --output"
            )
    else:
        settings = ServerSettings(experiment=f"{config.name}-{secrets.token_hex(4)}", address=address)
        _check_beginning(output)
        if not (output / "authority").exists():
            _whole(output / "authority", _authority)
        _whole(server, lambda kit: _server_kit(kit, settings, config, output / "authority"))
        made.append(server)
    for place, client in enumerate(config.clients):
        kit = output / "silos" / client.id
        if not kit.exists():
            own = _silo_settings(config, client, settings, place)
            _whole(kit, partial(_silo_kit, settings=own, server=server))
            made.append(kit)
    return made


def _check_beginning(output: Path) -> None:
    """Find out that a server's kit may be made here: silos that are there already belong to one that is not."""
    kits = sorted(path for path in (output / "silos").glob("*") if not path.name.endswith(PARTIAL))
    if kits:
        raise FederationError(
            f"{output}: holds the kit of {kits[0].name} and no server/{SERVER_FILE}; put the server's kit back there, "
            "and silos are added to it, or choose another --output"
        )
    if (output / "server").exists():
        raise FederationError(f"{output / 'server'}: has no {SERVER_FILE}; put it back, or remove that folder")
    authority = output / "authority"
    missing = [name for name in ("ca.key", "ca.crt") if not (authority / name).is_file()]
    if authority.exists() and missing:
        raise FederationError(
            f"{authority}: has no {missing[0]}, so that no server can be made with it; put that file back, or remove "
            "the folder if no kit has come of it yet"
        )


def _whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder under another name, and give it its own when it is complete: what was cut off is made again."""

    def write(unfinished: Path) -> None:
        unfinished.mkdir()
        make(unfinished)

    replace_folder(folder, write)


def _authority(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "crosslm federation authority")])
    certificate = (
        _certificate(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _secret(folder / "ca.key", _private(key))
    _file(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def _server_kit(kit: Path, settings: ServerSettings, config: Config, authority: Path) -> None:
    ca_key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    ca = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    host = settings.address.partition(":")[0]
    names = [_general_name(name) for name in dict.fromkeys((host, "localhost", "127.0.0.1"))]
    certificate = (
        _certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]), ca.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _file(kit / "ca.crt", (authority / "ca.crt").read_bytes())
    _file(kit / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))
    _secret(kit / "server.key", _private(key))
    _text(kit / SERVER_FILE, dump(settings))
    here = config.data.model_copy(update={"dir": "."})  # what the server may see is put into its kit
    _text(kit / "config.toml", config.model_copy(update={"data": here}).dump())
    _text(kit / "app" / "pyproject.toml", FLOWER_APP)
    _text(
        kit / "README.md",
        SERVER_README.format(
            experiment=settings.experiment,
            address=settings.address,
            wheel=WHEEL,
            extras=_extras(config.llm.model, config.selection.encoder),
        ),
    )
    _start_files(kit, "server", "crosslm-server", "server")
    (kit / "silos").mkdir(exist_ok=True)


def _silo_kit(kit: Path, settings: SiloSettings, server: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _file(kit / "ca.crt", (server / "ca.crt").read_bytes())
    _secret(kit / "silo.key", private)
    _text(kit / SILO_FILE, dump(settings))
    texts = {"silo": settings.id, "experiment": settings.experiment, "address": settings.server, "wheel": WHEEL}
    encoder = [settings.encoder] if settings.privacy.checks_leaks else []
    extras = _extras(settings.slm.model, *encoder) + (",privacy" if settings.privacy.epsilon else "")
    _text(kit / "README.md", SILO_README.format(**texts, extras=extras))
    _start_files(kit, "client", "crosslm-silo", settings.id)
    # before the kit has its name: one that is there is known to the server, until its operator takes the key away
    _file(server / "silos" / f"{settings.id}.pub", public + b"\n")


def _silo_settings(config: Config, client: ClientConfig, server: ServerSettings, place: int) -> SiloSettings:
    spec = client_specs(config, [client.id])[client.id]
    return SiloSettings(
        id=client.id,
        experiment=server.experiment,
        server=server.address,
        labels=config.task.labels,
        seed=config.seed,
        device=config.device,
        runtime_port=FIRST_RUNTIME_PORT + place,
        max_participations=config.federation.participations,
        closing=config.federation.closing,
        data=SiloData(
            train=client.train,
            test=client.test,
            text_column=config.data.text_column,
            label_column=config.data.label_column,
            label_names=config.data.label_names,
        ),
        slm=spec,
        max_length=config.slm.max_length,
        freeze_embeddings=config.slm.freeze_embeddings,
        fit=config.slm.private,
        acceptance=config.acceptance,
        intake=config.intake,
        privacy=config.privacy,
        encoder=config.selection.encoder,
    )


def _extras(*models: str) -> str:
    """What a party installs: the packages that hold models come with the demo's."""
    return "federation,demo" if any(model.startswith(PREFIX) for model in models) else "federation"


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    pkcs8 = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption())


def _start_files(kit: Path, command: str, name: str, folder: str) -> None:
    _text(kit / "start.sh", START.format(command=command))
    (kit / "start.sh").chmod(0o755)
    _text(kit / f"{name}.service", UNIT.format(name=name, what=f"{command} {folder}", folder=folder, command=command))


def _text(path: Path, text: str) -> None:
    _file(path, text.encode("utf-8"))


def _file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _secret(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
