"""Making start-up kits: an authority, a certificate for the server, a key pair for each silo.

Run once, by whoever sets the federation up. The private key of the authority stays in the folder
``authority`` of the output and belongs to no kit; with it, silos are added later by running the same
again.
"""

import os
import re
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from crosslm.config import ClientConfig, Config
from crosslm.errors import FederationError
from crosslm.federation.certificates import authority_certificate, new_key, pem, server_certificate
from crosslm.federation.kit_texts import FLOWER_APP, server_readme, silo_readme, start_script, systemd_unit
from crosslm.federation.kits import (
    SERVER_FILE,
    SILO_FILE,
    ServerSettings,
    SiloData,
    SiloSettings,
    dump,
    read_server,
    server_config,
)
from crosslm.runs.preparation import client_specs
from crosslm.support.files import PARTIAL, partial_of, replace_folder

ADDRESS = re.compile(r"[A-Za-z0-9_.-]+:[0-9]{1,5}")
FIRST_RUNTIME_PORT = 9094


def provision(
    config: Config, address: str, output: Path, on_news: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Make the kits, or those of silos that are new.

    Args:
        config: the run, with a ``[[clients]]`` table for each silo.
        address: HOST:PORT that silos will connect to.
        output: folder for the kits.
        on_news: told of silos that the server knows and whose kits are elsewhere, which keep their keys, and of what
            the server's kit, which is not made again, has otherwise.

    Returns:
        The kits that were made.

    Raises:
        FederationError: there are no clients, the address is wrong, or the output belongs to another federation or
            lacks a part of this one.
    """
    if not config.clients:
        raise FederationError(f"{config.name}: name each silo in a [[clients]] table; data.train is for one machine")
    check_address(address)
    server, made = output / "server", []
    if (server / SERVER_FILE).exists():
        settings = read_server(server)
        if not settings.experiment.startswith(config.name + "-") or settings.address != address:
            raise FederationError(
                f"{output}: holds the kits of {settings.experiment} at {settings.address}; choose another --output, or "
                "--renew that federation with its new --address"
            )
        _check_fits(config, server)
        if others := _others(config, server):
            on_news(
                f"{server / 'config.toml'} stays as it is, and has another {', '.join(others)}: change it there too"
            )
    else:
        settings = ServerSettings(experiment=f"{config.name}-{secrets.token_hex(4)}", address=address)
        _check_beginning(output)
        if not (output / "authority").exists():
            _whole(output / "authority", _authority)
        _whole(server, lambda kit: _server_kit(kit, settings, config, output / "authority"))
        made.append(server)
    for place, client in enumerate(config.clients):
        kit, key = output / "silos" / client.id, server / "silos" / f"{client.id}.pub"
        if kit.exists():
            continue
        if key.exists() and not partial_of(kit).exists():  # else that kit was cut off
            known = "the server knows its key already, and its kit is not here"
            on_news(f"silo {client.id}: {known}; for a new one remove {key}")
            continue
        own = _silo_settings(config, client, settings, place)
        try:
            _whole(kit, partial(_silo_kit, settings=own, server=server))
        except BaseException:
            if not kit.exists():
                key.unlink(missing_ok=True)
            raise
        made.append(kit)
    return made


def check_address(address: str) -> None:
    """Find out that silos can connect to an address.

    Raises:
        FederationError: it is not HOST:PORT.
    """
    if not ADDRESS.fullmatch(address) or not 0 < int(address.rpartition(":")[2]) < 65536:
        raise FederationError(f"address {address!r}: must be HOST:PORT, the place that silos connect to, in ASCII")


def _check_fits(config: Config, server: Path) -> None:
    """Find out that kits of new silos would fit the server's, which is not made again."""
    theirs = server_config(server)
    for key, here, there in (
        ("task.labels", config.task.labels, theirs.task.labels),
        ("federation.participations", config.federation.participations, theirs.federation.participations),
        ("federation.closing", config.federation.closing, theirs.federation.closing),
    ):
        if here != there:
            raise FederationError(
                f"{config.name}: {key} is {here}, and {there} in {server / 'config.toml'}, which a silo's kit must "
                "fit; put it back in the configuration, or choose another --output for a new federation"
            )


def _others(config: Config, server: Path) -> list[str]:
    """The sections of a configuration that the server's has otherwise, but for its silos."""
    here, theirs = (given.model_dump(mode="json", exclude={"clients"}) for given in (config, server_config(server)))
    here["data"]["dir"] = theirs["data"]["dir"]
    return [name for name in here if here[name] != theirs[name]]


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
    key = new_key()
    write_secret(folder / "ca.key", pem(key))
    _file(folder / "ca.crt", pem(authority_certificate(key)))


def _server_kit(kit: Path, settings: ServerSettings, config: Config, authority: Path) -> None:
    ca_key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    ca = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = new_key()
    _file(kit / "ca.crt", (authority / "ca.crt").read_bytes())
    _file(kit / "server.crt", pem(server_certificate(settings.address, key.public_key(), ca_key, ca.subject)))
    write_secret(kit / "server.key", pem(key))
    _text(kit / SERVER_FILE, dump(settings))
    here = config.data.model_copy(update={"dir": "."})  # what the server may see is put into its kit
    _text(kit / "config.toml", config.model_copy(update={"data": here}).dump())
    _text(kit / "app" / "pyproject.toml", FLOWER_APP)
    needs = [config.llm.model, config.selection.encoder, str(config.data.test)]
    _text(kit / "README.md", server_readme(settings.experiment, settings.address, needs))
    _start_files(kit, "server", "crosslm-server", "server")
    (kit / "silos").mkdir(exist_ok=True)


def _silo_kit(kit: Path, settings: SiloSettings, server: Path) -> None:
    key = new_key()
    openssh = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _file(kit / "ca.crt", (server / "ca.crt").read_bytes())
    write_secret(kit / "silo.key", private)
    _text(kit / SILO_FILE, dump(settings))
    needs = [settings.slm.model, settings.data.train, settings.data.test or ""]
    needs += [settings.encoder] if settings.privacy.checks_leaks else []
    readme = silo_readme(settings.id, settings.experiment, settings.server, needs, bool(settings.privacy.epsilon))
    _text(kit / "README.md", readme)
    _start_files(kit, "client", "crosslm-silo", settings.id)
    # before the kit has its name: one that is there is known to the server, until its operator takes the key away
    _file(server / "silos" / f"{settings.id}.pub", public + b"\n")


def _silo_settings(config: Config, client: ClientConfig, server: ServerSettings, place: int) -> SiloSettings:
    spec, data = client_specs(config, [client.id])[client.id], config.data_of(client)
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
            text_column=data.text_column,
            label_column=data.label_column,
            encoding=data.encoding,
            label_names=data.label_names,
            skip_labels=data.skip_labels,
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


def _start_files(kit: Path, command: str, name: str, folder: str) -> None:
    _text(kit / "start.sh", start_script(command))
    (kit / "start.sh").chmod(0o755)
    _text(kit / f"{name}.service", systemd_unit(name, command, folder))


def _text(path: Path, text: str) -> None:
    _file(path, text.encode("utf-8"))


def _file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that its owner alone can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
