"""The server's only open port: passes on what silos ask, and nothing that controls the federation.

Flower serves its Fleet interface (authenticated nodes) and its Control interface (no accounts: who
reaches it may start code on every node) on one port. The SuperLink therefore listens on the loopback
interface, and this gateway in front of it lets ``/v1/fleet/`` through and answers 404 to the rest. Flower
knows who asks by a signature, and believes what a pushed message says of its sender and receiver, so that one
silo could speak to the server for another, or to another silo for the server: only answers of the node that
pushes them are passed on. One question the gateway answers itself: which silo the server's kit knows by a key,
and how many of its rounds are complete.
"""

import asyncio
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from crosslm.errors import FederationError
from crosslm.federation.keys import ASKED_AT, fingerprint_of
from crosslm.federation.kits import SERVER_FILE, ServerSettings, read_server
from crosslm.federation.spool import TOLD, Spool

PASSED = re.compile(rb"/v1/fleet/[a-z-]+")
PUSHED = "/v1/fleet/push-messages"
"""Where messages come in; their contents follow, each by itself."""
MOST = 16 * 2**20
"""Bytes of one request: Flower cuts what it sends into objects of 5 MiB, and sends each in a request of its own."""
PART_TIME = 120.0
"""Seconds in which some part of a request must come."""
NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "proxy-authorization"}


def gateway(superlink: str, kit: Path) -> Starlette:
    """The application in front of a SuperLink.

    Args:
        superlink: its address, as ``https://127.0.0.1:PORT``.
        kit: the server's, with the certificate of the authority that signed the SuperLink's and with the silos' keys.
    """
    # Flower is loaded where it serves: who starts the processes does without
    from crosslm.federation.flower.replies import are_own_answers

    tls = ssl.create_default_context(cafile=str(kit / "ca.crt"))
    client = httpx.AsyncClient(
        base_url=superlink,
        verify=tls,
        timeout=httpx.Timeout(300, connect=10),
        limits=httpx.Limits(max_connections=None),  # or a hundred slow silos would shut all others out
        trust_env=False,  # a proxy is not asked for this machine
    )

    def known(request: Request) -> Response:
        try:
            silo = _known(kit).get(request.path_params["fingerprint"])
        except OSError as error:
            return PlainTextResponse(f"the silos' keys cannot be read now: {error.strerror}\n", status_code=503)
        if silo is None:
            return PlainTextResponse("", status_code=403)
        complete, over = _complete(kit, silo)
        return PlainTextResponse(f"{complete} {silo} over" if over else f"{complete} {silo}")

    async def passed(request: Request) -> Response:
        raw: bytes = request.scope["raw_path"]  # as it came: who decodes it once more may find another path in it
        if not PASSED.fullmatch(raw):
            return PlainTextResponse("this is not served here\n", status_code=404)
        if _claimed(request) > MOST:
            return _too_large()
        headers = [(name, value) for name, value in request.headers.raw if name.decode().lower() not in NOT_PASSED_ON]
        path, asked = raw.decode(), request.query_params
        body: AsyncIterator[bytes] | bytes = _counted(request)
        try:
            if path == PUSHED:
                body = b"".join([part async for part in _counted(request)])
                if not are_own_answers(body):
                    return PlainTextResponse("a silo sends its own answers only\n", status_code=403)
            inner = client.build_request(request.method, path, params=asked, headers=headers, content=body)
            answer = await client.send(inner, stream=True)
        except httpx.TransportError:  # a SuperNode tries again after a 503, and gives up after a 500
            return PlainTextResponse("the SuperLink is not running\n", status_code=503)
        except _TooLargeError:  # it had not said so
            return _too_large()
        except TimeoutError:
            return PlainTextResponse(f"nothing came for {PART_TIME:.0f} s\n", status_code=408)
        except ClientDisconnect:  # the silo is gone; nobody reads this
            return PlainTextResponse("", status_code=499)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in NOT_PASSED_ON}
        return StreamingResponse(_body(answer), status_code=answer.status_code, headers=kept)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()

    methods = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    routes = [Route(ASKED_AT + "{fingerprint}", known), Route("/{path:path}", passed, methods=methods)]
    return Starlette(routes=routes, lifespan=lifespan)


def _known(kit: Path) -> dict[str, str]:
    """Silos by the fingerprints of the keys that are in the server's kit now; a file that is none lets nobody in.

    Raises:
        OSError: one cannot be read, so that nobody can be told that it is not known.
    """
    found = {}
    for path in (kit / "silos").iterdir():  # glob passes over a folder that it may not read
        if path.suffix == ".pub":
            data = path.read_bytes()
            with suppress(FederationError):
                found[fingerprint_of(data, path)] = path.stem
    return found


def _complete(kit: Path, silo: str) -> tuple[int, bool]:
    """How many rounds of a silo are complete, and whether nothing more is sent to it.

    That it has been told so is noted, and the server waits for it.
    """
    spool = Spool(kit / "spool")
    try:
        complete = spool.complete(silo)
        over = spool.is_over_for(silo)
        name, told = f"{TOLD}{silo}", f"{complete}{' over' if over else ''}"
        if spool.fact(name) != told:  # a silo that stays asks every few seconds
            spool.note(name, told)
    finally:
        spool.close()
    return complete, over


class _TooLargeError(Exception):
    """A request has more bytes than are let through."""


def _claimed(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdigit() else 0


async def _counted(request: Request) -> AsyncIterator[bytes]:
    """The body of a request, part by part, as long as it is not too large and comes at all.

    Raises:
        TimeoutError: no part came for :data:`PART_TIME`; a silo may have lost its line without a word.
    """
    size, parts = 0, request.stream()
    while True:
        try:
            part = await asyncio.wait_for(anext(parts), PART_TIME)
        except StopAsyncIteration:
            return
        size += len(part)
        if size > MOST:
            raise _TooLargeError
        yield part


def _too_large() -> Response:
    return PlainTextResponse(f"at most {MOST} bytes in one request\n", status_code=413)


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


def listen(kit: Path, settings: ServerSettings) -> socket.socket:
    """A socket on the port of the kit's address, before anything else is started.

    Raises:
        FederationError: this machine does not let us have it.
    """
    port = int(settings.address.rpartition(":")[2])
    listening = socket.socket(socket.AF_INET6 if ":" in settings.bind else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the connections of an earlier server linger
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # those of a silo that is gone do not
    try:
        listening.bind((settings.bind, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise FederationError(
            f"{kit / SERVER_FILE}: cannot listen on {settings.bind}:{port} (bind, and the port of address): "
            f"{error.strerror}; end the program that has this port, or give crosslm provision --renew another --address"
        ) from error
    return listening


def serve(kit: Path, listening: socket.socket, superlink_port: int) -> None:
    """Answer with the kit's certificate until stopped."""
    app = gateway(f"https://127.0.0.1:{superlink_port}", kit)
    certificate, key = str(kit / "server.crt"), str(kit / "server.key")
    config = uvicorn.Config(app, ssl_certfile=certificate, ssl_keyfile=key, log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":  # where Flower's own commands are typed by hand
    own = read_server(Path(sys.argv[1]))
    serve(Path(sys.argv[1]), listen(Path(sys.argv[1]), own), own.superlink_port)
