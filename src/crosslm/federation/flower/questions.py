"""What a silo asks its server outside of Flower: whether it is there, how many rounds it has, whether all is over."""

import ssl
import time
import urllib.error
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from crosslm.errors import FederationError, PassingError
from crosslm.federation.flower.processes import RESTART, Note
from crosslm.federation.flower.proxies import connected, opened
from crosslm.federation.keys import ASKED_AT, fingerprint
from crosslm.federation.kits import SILO_FILE
from crosslm.federation.silo_state import SiloState
from crosslm.support.plain import plain

NOT_YET_VALID = 9  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID


def wait_for_server(address: str, ca: Path, note: Note, seconds: float | None = None) -> bool:
    """Wait until the server answers with a certificate of the federation's authority; for so long, where that is given.

    Returns:
        Whether it has answered.

    Raises:
        FederationError: its certificate is another's, or is for another name.
    """
    told, end = False, None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            greet(address, ca)
        except OSError as error:
            if end is not None and time.monotonic() > end:
                return False
            if not told:
                note(f"{address} does not answer yet ({error}); trying until it does")
                told = True
            time.sleep(RESTART)
        else:
            return True


def greet(address: str, ca: Path) -> None:
    """Find out that a server with a certificate of the federation's authority answers at an address, and hang up.

    Raises:
        FederationError: its certificate is another's, or is for another name.
        PassingError: this machine's clock is before it.
        OSError: nobody answers, or not in TLS.
    """
    context = ssl.create_default_context(cafile=str(ca))
    try:
        with connected(address) as open_way:
            context.wrap_socket(open_way, server_hostname=address.rpartition(":")[0]).close()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == NOT_YET_VALID:
            raise PassingError(
                f"the certificate of {address} is not valid yet by this machine's clock, which says "
                f"{time.strftime('%Y-%m-%d %H:%M')}; set it right"
            ) from error
        raise FederationError(
            f"the certificate of {address} was not signed by the authority in {ca}, or is for another name, or a "
            f"certificate has expired ({error.verify_message}); is this kit of the same federation as the server's, "
            "with the ca.crt and the server that the last crosslm provision --renew has named?"
        ) from error


def rounds_complete(silo: SiloState) -> int | None:
    """Ask the server how many of this silo's rounds are complete. None where it does not answer, or not this.

    Raises:
        FederationError: as :func:`ask`.
    """
    answer = ask(silo)
    return None if answer is None else answer.complete


def is_over(silo: SiloState) -> bool:
    """Ask the server whether nothing more comes to this silo.

    Raises:
        FederationError: as :func:`ask`.
    """
    answer = ask(silo)
    return answer is not None and answer.is_over


@dataclass(frozen=True)
class Answer:
    """What a server says of a silo."""

    complete: int
    """Rounds that are complete."""
    is_over: bool
    """Whether nothing more comes."""
    clock: str
    """Why the two clocks are too far apart, in words; empty where they are not."""


def clocks_apart(server: str | None, before: float, after: float) -> str:
    """Why Flower refuses a silo for its clock, in words; empty where it does not, or where nothing is known.

    Flower lets in messages that are at most 5 seconds from the future or 305 old (``flwr.common.constant``, 1.41).

    Args:
        server: the ``Date`` of the server's answer, in whole seconds.
        before: this machine's time when the question was sent, in seconds since 1970.
        after: the same when the answer had come.
    """
    try:
        said = parsedate_to_datetime(server or "").timestamp()
    except ValueError:
        return ""
    if before - said - 1 > 5:
        return f"this machine's clock is {before - said:.0f} s ahead of the server's, 5 s may be; set it right"
    if said - after > 305:
        return f"this machine's clock is {said - after:.0f} s behind the server's, 305 s may be; set it right"
    return ""


def ask(silo: SiloState) -> Answer | None:
    """Ask the server about this silo. None where it does not answer, or not this.

    Raises:
        FederationError: the server does not know this silo's key, or knows it as another's, or there is no key.
    """
    server, key = silo.settings.server, silo.kit / "silo.key"
    context = ssl.create_default_context(cafile=str(silo.kit / "ca.crt"))
    address = f"https://{server}{ASKED_AT}{fingerprint(key)}"
    before = time.time()
    try:
        with opened(address, context) as answer:
            complete, known_as, *over = answer.read(100).decode().split(" ")
            number, date, known_as = int(complete), answer.headers.get("Date"), plain(known_as)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 403:
            raise FederationError(
                f"silo {silo.settings.id}: the server does not know the key {key}; is this kit of the "
                "same federation as the server's, and is its public key in the server's kit (silos/)?"
            ) from error
        return None
    except (OSError, ValueError):
        return None
    if known_as != silo.settings.id:
        raise FederationError(
            f"silo {silo.settings.id}: the server knows the key {key} as that of silo {known_as}; put the key of this "
            f"silo's own kit there, or the id of {silo.kit / SILO_FILE} back to {known_as} if it was changed"
        )
    return Answer(number, over == ["over"], clocks_apart(date, before, time.time()))
