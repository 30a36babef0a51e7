"""The way to a server: by the proxy that the environment names for it, as Flower's SuperNode goes.

``HTTPS_PROXY`` and ``ALL_PROXY`` name one, ``NO_PROXY`` the hosts for which there is none. This
machine has none either.
"""

import base64
import socket
import ssl
import urllib.request
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, unquote, urlsplit

THIS_MACHINE = ("127.0.0.1", "localhost")
TIME = 10.0  # seconds until an answer must have come


def proxy_for(address: str) -> SplitResult | None:
    """The proxy on the way to HOST:PORT; None where there is none."""
    if address.rpartition(":")[0] in THIS_MACHINE or urllib.request.proxy_bypass(address):
        return None
    named = urllib.request.getproxies()
    proxy = named.get("https") or named.get("all")
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None


def connected(address: str) -> socket.socket:
    """A connection to HOST:PORT, without TLS yet.

    Raises:
        OSError: there is none to be had; says so of a proxy.
    """
    host, _, port = address.rpartition(":")
    proxy = proxy_for(address)
    if proxy is None:
        return socket.create_connection((host, int(port)), timeout=TIME)
    try:
        tunnel = HTTPConnection(str(proxy.hostname), proxy.port or 80, timeout=TIME)
        tunnel.set_tunnel(host, int(port), _credentials(proxy))
        tunnel.connect()
    except (OSError, HTTPException, ValueError) as error:
        where = proxy.netloc.rpartition("@")[2]  # without its password
        raise OSError(f"by the proxy {where}: {error}; look at HTTPS_PROXY and NO_PROXY") from error
    return tunnel.sock


def opened(url: str, context: ssl.SSLContext) -> HTTPResponse:
    """The answer to a question by HTTPS.

    Raises:
        OSError: there is none, or it says no (``urllib.error.HTTPError``).
    """
    proxy = proxy_for(urlsplit(url).netloc)
    proxies = {"https": proxy.geturl()} if proxy else {}
    ways = urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
    try:
        answer: HTTPResponse = urllib.request.build_opener(*ways).open(url, timeout=TIME)
    except HTTPException as error:
        raise OSError(f"{url}: no answer in HTTP: {error}; look at HTTPS_PROXY and NO_PROXY") from error
    return answer


def _credentials(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    who = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(who.encode()).decode()}"}
