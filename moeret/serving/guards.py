"""What stands before the service: who may ask, how large a request may be, how long it may take to arrive, and what is counted."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moeret.config import require

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/", "/page/", "/health", "/ready", "/docs", "/static-offline-docs/", "/openapi.json")
"""Paths, or with a slash at their end beginnings of paths, that need no key: they tell nothing of the index."""
_LOG = logging.getLogger("moeret.serve")
_ARRIVAL = 10.0
"""Seconds in which a request's head, and then its body, must have arrived."""
_DISCARDING, _DISCARDED = 2.0, 2**24
"""Seconds, and bytes, of a refused request's body that are read and thrown away before it is answered."""
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_POLICY = b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
_DOCS_POLICY = _POLICY + b"; img-src 'self' data:; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
"""The OpenAPI page has scripts of its own in it."""


class Refused(Exception):
    """A request that is not passed on: its status, what its sender is told, and whether more of it may come."""

    def __init__(self, status: int, detail: str, *, more: bool = True):
        super().__init__(detail)
        self.status, self.more = status, more


def check_key(key: str | None) -> None:
    """Raises ConfigError if the key cannot stand in a header."""
    if key is not None:
        good = key.isascii() and key.isprintable() and key.strip() == key != ""
        require(good, "the key must be printable ASCII, and not empty")


class Guard:
    """An ASGI application that passes on requests whose key is right and whose body is small and arrives in time."""

    def __init__(self, app: App, *, key: str | None, most_bytes: int, observe: Callable[[str, int, float], None]):
        self._app, self._key, self._most_bytes, self._observe = app, key, most_bytes, observe

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                policy = _DOCS_POLICY if scope["path"] == "/docs" else _POLICY
                own = (*_HEADERS, (b"content-security-policy", policy))
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replayed(body, receive), counted)
        except Refused as refused:
            if refused.more:
                await _discard(receive)
            await _answer(counted, refused)
        except Exception:  # it has been answered
            _LOG.exception("a request for %s failed", scope["path"])
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._observe(path, status, time.perf_counter() - began)
        return None

    def _check_key(self, scope: Message) -> None:
        path = scope["path"]
        if self._key is None or any(
            path == own or (own != "/" and own[-1] == "/" and path.startswith(own)) for own in OPEN
        ):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self._key.encode()):
            raise Refused(401, "this service wants a key: send the header Authorization: Bearer KEY")

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """The whole body."""
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = f"a request's body may have at most {self._most_bytes} bytes"
        if int(told) > self._most_bytes:  # the server has checked that it is a number
            raise Refused(413, too_large)
        parts, size = [], 0
        try:
            async with asyncio.timeout(_ARRIVAL):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the request was broken off", more=False)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._most_bytes:
                        raise Refused(413, too_large, more=bool(message.get("more_body")))
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, f"the request's body did not arrive within {_ARRIVAL:g} seconds") from None


async def _discard(receive: Receive) -> None:
    """Reads on for a while: a client that is still sending would not hear the answer."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDING):
            while size < _DISCARDED:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body that has been read, and then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps({"detail": str(refused)}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # what is left of the request is not read
        *([(b"www-authenticate", b"Bearer")] if refused.status == 401 else []),
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, but a connection on which no request's head arrives in time is closed; uvicorn would wait forever."""

    def connection_made(self, transport: Any) -> None:
        """As uvicorn's."""
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        super().connection_lost(exc)
        if self._late:
            self._late.cancel()

    def _watch(self) -> None:
        incomplete = self.conn.their_state is h11.IDLE
        if incomplete and self._late is None:
            self._late = self.loop.call_later(_ARRIVAL, self.transport.close)
        elif not incomplete and self._late:
            self._late.cancel()
            self._late = None
