"""``crosslm provision --renew``: a new certificate for the server of a federation that there is.

The server's key stays: it need not leave the server, no half of a pair can be brought without the other, and a new one
would shut nobody out, since silos look at no list of what is revoked. So does the authority's; what it says of itself
is made anew where it would end before what it signs. Silos' keys, spools and states are not looked at.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

from crosslm.config import Config
from crosslm.errors import FederationError
from crosslm.federation.certificates import authority_certificate, new_key, pem, server_certificate
from crosslm.federation.kits import SERVER_FILE, SILO_FILE, read_server, read_silo, silo_names
from crosslm.federation.provision import check_address, write_secret
from crosslm.support.files import PARTIAL, missing, replace_folder, write_whole

RENEWED = "renewed"
"""Folder for what the server's kit gets where that kit is elsewhere."""
T = TypeVar("T")


def renew(config: Config, address: str | None, output: Path) -> list[str]:
    """Make a new certificate for the server, and put it and all that belongs to it into the kits that are here.

    The authority's is written last: until it is there, the same command does all of it again.

    Args:
        config: the run's, as for provisioning.
        address: HOST:PORT that silos will connect to, where it is another one.
        output: the folder that provisioning has made, with ``authority`` in it; kits may be elsewhere.

    Returns:
        What was made, and what is to be brought to whom.

    Raises:
        FederationError: a part of the federation is missing here or belongs to another one, or the address is wrong;
            nothing is written.
    """
    authority, server, silos = output / "authority", output / "server", _silo_kits(output)
    key, old = _authority(authority)
    is_here = (server / SERVER_FILE).is_file()
    if not (at := address or (read_server(server).address if is_here else None)):
        raise FederationError(f"{server}: has no {SERVER_FILE} with the address; put that back, or give --address")
    check_address(at)
    kits = [server, *silos] if is_here else silos
    _check_federation(config, kits, old)
    own = None if is_here else new_key()
    public = own.public_key() if own else _certified_key(server / "server.crt", old)
    made = server_certificate(at, public, key, old.subject)
    ca = old if old.not_valid_after_utc >= made.not_valid_after_utc else authority_certificate(key, old.subject)
    files = [file for kit in kits for file in _of_kit(kit, address, pem(ca))]
    if own:
        _write_renewed(output / RENEWED, made, own, ca)
    else:
        files.insert(0, (server / "server.crt", pem(made)))
    for path, data in (*files, (authority / "ca.crt", pem(ca))):
        if not path.is_file() or path.read_bytes() != data:
            write_whole(path, [data])
    names = silo_names(server) if is_here else [client.id for client in config.clients]
    brought = authority / "ca.crt" if ca is not old else None
    return [
        f"the server's new certificate is for {at.rpartition(':')[0]}, until {_day(made)}",
        _of_authority(authority / "ca.crt", old, ca),
        _for_server(server if is_here else output / RENEWED, address, brought),
        *_for_silos(sorted({*names, *(kit.name for kit in silos)}), silos, address, brought),
    ]


def _silo_kits(output: Path) -> list[Path]:
    """The silos' kits that are here."""
    kits = (path.parent for path in (output / "silos").glob(f"*/{SILO_FILE}"))
    return sorted(kit for kit in kits if not kit.name.endswith(PARTIAL))


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The key and the certificate of a federation's authority, which belong together."""
    if not folder.is_dir():
        raise FederationError(
            f"{missing(folder)}; --output must be the folder that crosslm provision made, with the authority's key"
        )
    certificate = _read(folder / "ca.crt", x509.load_pem_x509_certificate)
    key = _read(folder / "ca.key", lambda data: serialization.load_pem_private_key(data, None))
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise FederationError(f"{folder / 'ca.key'}: does not belong to ca.crt beside it; put both back of one copy")
    return key, certificate


def _read(path: Path, load: Callable[[bytes], T]) -> T:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise FederationError(
            f"{path}: cannot be read: {error.strerror}; put it back from another copy of the kits"
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FederationError(
            f"{path}: is not as crosslm provision made it: {error}; put it back from another copy of the kits"
        ) from error


def _check_federation(config: Config, kits: list[Path], authority: x509.Certificate) -> None:
    """Find out that the kits that are here are of one federation, which is this configuration's and authority's."""
    found = [(kit, (read_server if (kit / SERVER_FILE).is_file() else read_silo)(kit).experiment) for kit in kits]
    for kit, experiment in found:
        if experiment != found[0][1] or experiment.rpartition("-")[0] != config.name:
            raise FederationError(
                f"{kit}: is of {experiment}, and one federation of {config.name} is to be renewed; give the "
                "configuration that it was made from, or choose another --output"
            )
        path = kit / "ca.crt"
        if _read(path, x509.load_pem_x509_certificate).public_key() != authority.public_key():
            raise FederationError(
                f"{path}: is of another authority than the one beside the kits; put the folder authority back that "
                "they were made with"
            )


def _certified_key(path: Path, authority: x509.Certificate) -> CertificatePublicKeyTypes:
    """The server's public key, by the certificate that it has."""
    certificate = _read(path, x509.load_pem_x509_certificate)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise FederationError(
            f"{path}: was not signed by the authority of ca.crt beside it; put it back from the server's own kit"
        ) from error
    return certificate.public_key()


def _of_kit(kit: Path, address: str | None, ca: bytes) -> Iterator[tuple[Path, bytes]]:
    """What a kit gets: the authority's certificate, and the address where there is another one."""
    if address:
        name, key = (SERVER_FILE, "address") if (kit / SERVER_FILE).is_file() else (SILO_FILE, "server")
        text = (kit / name).read_bytes().decode("utf-8-sig")
        former, readme = tomllib.loads(text)[key], kit / "README.md"
        if readme.is_file():
            yield readme, readme.read_bytes().replace(former.encode(), address.encode())
        yield kit / name, _changed(kit / name, text, key, address).encode()
    yield kit / "ca.crt", ca


def _changed(path: Path, text: str, key: str, value: str) -> str:
    """A settings file with another value of one key, and its owner's words as they are."""
    changed = re.sub(rf"""^{key} *= *(["'])[^"'\n]*\1""", f'{key} = "{value}"', text, count=1, flags=re.MULTILINE)
    if tomllib.loads(changed) != tomllib.loads(text) | {key: value}:
        raise FederationError(
            f'{path}: {key} stands there in a way that is not made here; set {key} = "{value}" by hand, and give the '
            "same command again"
        )
    return changed


def _write_renewed(
    folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, ca: x509.Certificate
) -> None:
    def write(unfinished: Path) -> None:
        unfinished.mkdir()
        write_secret(unfinished / "server.key", pem(key))
        write_whole(unfinished / "server.crt", [pem(certificate)])
        write_whole(unfinished / "ca.crt", [pem(ca)])

    replace_folder(folder, write)


def _of_authority(path: Path, old: x509.Certificate, ca: x509.Certificate) -> str:
    if ca is old:
        return f"{path} stays, until {_day(ca)}; a silo where crosslm doctor has an earlier day for ca.crt needs it"
    return f"{path} is new, until {_day(ca)}; with the former one a silo takes the server up to {_day(old)}"


def _for_server(folder: Path, address: str | None, ca: Path | None) -> str:
    setting = f', and set address = "{address}" in its server.toml' if address else ""
    if folder.name == RENEWED:
        return (
            f"server: its kit is not here: put the files of {folder} into it by a way that nobody else can read, "
            f"since server.key is secret{setting}. Then start crosslm server again"
        )
    return (
        f"server: {folder} is renewed; if another copy of it runs, put server.crt{' and ca.crt' if ca else ''} of it "
        f"into that one{setting}. Then start crosslm server again"
    )


def _for_silos(names: list[str], here: list[Path], address: str | None, ca: Path | None) -> Iterator[str]:
    """A line for each silo; ``ca``: the authority's certificate, if it is new."""
    parts = [f"put {ca} into its kit"] if ca else []
    parts += [f'set server = "{address}" in its silo.toml'] if address else []
    if not parts:
        yield "silos: need nothing; those at work connect again by themselves, and one that has ended is started again"
        return
    kits = {kit.name: kit for kit in here}
    for name in names:
        begin = f"{kits[name]} is renewed; if another copy of it runs, " if name in kits else ""
        yield f"silo {name}: {begin}{' and '.join(parts)}. Then start crosslm client again"


def _day(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"
