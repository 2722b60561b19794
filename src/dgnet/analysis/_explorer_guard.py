"""What stands in front of the explorer's page: which requests it refuses, and what it prints if one fails.

Any web page that the user opens can send requests to a server on the user's machine. It can also give its own name the address
127.0.0.1 (DNS rebinding) and then read the answers. Both show in a request: in its `Origin` and in its `Host`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from dgnet.errors import UsageError, reason

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
"""An ASGI application."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_address(host: str) -> bool:
    """Whether `host` is an IP address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only."""
    return ipaddress.ip_address(host).is_loopback if is_address(host) else host == "localhost"


class HostGuard:
    """An ASGI application that passes on to `app` only requests that are meant for the server on `host`.

    The name in `Host` must be `host`, one of `allowed`, or a name of this machine. A server on all addresses ("0.0.0.0", "::")
    also answers to every IP address, since rebinding needs a name. The port is not compared: it may be forwarded. `Origin`, if
    there is one, must be the server itself. Web sockets are refused: the page has none.

    If `app` fails, one line is printed on stderr.
    """

    def __init__(self, app: App, host: str, allowed: Iterable[str] = ()) -> None:
        self.app = app
        self.has_all_addresses = is_address(host) and ipaddress.ip_address(host).is_unspecified
        own = LOOPBACK_NAMES if self.has_all_addresses or is_loopback(host) else frozenset()
        machine = set() if is_loopback(host) else {socket.gethostname(), f"{socket.gethostname()}.local"}
        self.names = {name.lower().strip("[]").rstrip(".") for name in (host, *allowed, *own, *machine)}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self.refuse(scope.get("headers", ()))
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: status 403
        elif refusal is not None:
            await _answer(send, *refusal)
        else:
            await self._pass_on(scope, receive, send)

    def refuse(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """The status and the line with which a request is refused, None for one that is answered."""
        values: dict[str, list[str]] = {"host": [], "origin": []}
        for key, value in headers:
            values.get(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        host = values["host"][0] if len(values["host"]) == 1 else ""
        found = _HOST.fullmatch(host)
        name = found[1].lower().strip("[]").rstrip(".") if found else ""
        if name not in self.names and not (self.has_all_addresses and is_address(name)):
            return 421, f"this page does not answer to the host {host!r}; allow a name with: dgnet explore --allowed-host NAME"
        for origin in values["origin"]:
            if origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
                return 403, f"this page answers only requests of its own, and this one comes from {origin!r}"
        return None

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        has_started = False

        async def watch(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:  # of the page's framework, which may raise anything
            print(f"dgnet: a request of the page failed: {reason(error)}", file=sys.stderr)
            if not has_started:
                await _answer(send, 500, "the request failed")


async def _answer(send: Send, status: int, line: str) -> None:
    body = f"{line}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`. Raises UsageError if there can be none."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there the option would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        raise UsageError(f"cannot listen on --host {host} --port {port}: {reason(error)}; choose others") from None
