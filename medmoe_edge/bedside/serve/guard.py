"""The outermost layer: who may ask, how much and for how long, and what the log tells of it.

One request, from its first byte to its last: bounded, and over when the client leaves.
"""

import asyncio
import contextlib
import hmac
import logging
import math
import os
import time
import traceback
from collections import deque
from collections.abc import Collection
from typing import Self
from urllib.parse import urlsplit

from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmoe_edge.bedside.serve.errors import Refusal, refusal, too_long
from medmoe_edge.bedside.serve.settings import Limits, Settings
from medmoe_edge.bedside.serve.work import Metrics, RequestSlots

SENDING = 30.0  # seconds that a client may take to fetch its answer


async def bounded(app: ASGIApp, limits: Limits, scope: Scope, body: "Body", send: Send) -> None:
    """Let the app answer a request whose body is here, within limits.

    If the client leaves, the app is cancelled; `at_end(request)` is then called, as at every end.
    Raises `Refusal` where it takes too long.
    """
    end = asyncio.timeout(limits.seconds + SENDING)
    watch = asyncio.create_task(body.watch(end))
    try:
        with contextlib.ExitStack() as ending:
            scope["state"]["at_end"] = ending
            async with end:
                await app(scope, body.receive, send)
    except TimeoutError:
        if not body.client_left:
            raise too_long("The request took too long.") from None
    finally:
        watch.cancel()


def at_end(request: Request) -> contextlib.ExitStack:
    """Takes what is to be called once nobody waits for the answer to a request any more."""
    ending = request.state.at_end
    assert isinstance(ending, contextlib.ExitStack)
    return ending


def client_of(request: Request) -> str:
    """Who asks: the name of the token, if there is one, and the address."""
    return str(request.state.client)


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Uploads:
    """The bytes of all bodies in memory, at most so many. For one event loop.

    A body that does not come takes next to nothing: whoever stalls is in nobody's way.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def hold(self, size: int) -> None:
        """So many bytes more; raises `Refusal` where there is no room for them."""
        if self.held + size > self.most:
            raise Refusal(
                *(429, "busy", "The service is busy."), "Try again in 1 s.", {"Retry-After": "1"}
            )
        self.held += size


class Body:
    """A request's body, read whole before the request takes anybody's place."""

    def __init__(
        self, receive: Receive, limits: Limits, headers: Headers, uploads: Uploads
    ) -> None:
        self._receive, self._limits, self._uploads = receive, limits, uploads
        self._parts: deque[bytes] = deque()
        self._bytes = 0
        self.client_left = False
        length = headers.get("content-length", "0")
        self._check(int(length[:20]) if length.isdecimal() else 0)

    async def __aenter__(self) -> Self:
        """Read it; raises `Refusal` where it is too much or too late, and `ClientLeft`."""
        try:
            async with asyncio.timeout(self._limits.upload_seconds):
                while await self._read_part():
                    pass
        except BaseException as error:
            await self.__aexit__()
            if not isinstance(error, TimeoutError):
                raise
            raise Refusal(
                *(408, "slow_upload", "The upload took too long."),
                f"Send it within {self._limits.upload_seconds:.0f} s.",
            ) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        """Forget it."""
        self._uploads.held -= self._bytes
        self._bytes = 0
        self._parts.clear()

    async def receive(self) -> Message:
        """The body for the app, and afterwards whether the client is still there."""
        if not self._parts:
            return await self._receive()
        part = self._parts.popleft()
        return {"type": "http.request", "body": part, "more_body": bool(self._parts)}

    async def watch(self, end: asyncio.Timeout) -> None:
        """Bring the end forward to now when the client leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        with contextlib.suppress(RuntimeError):  # it may just have ended by itself
            end.reschedule(0)

    async def _read_part(self) -> bool:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        self._check(self._bytes + len(part))
        self._uploads.hold(len(part))
        self._bytes += len(part)
        self._parts.append(part)
        return bool(message.get("more_body", False))

    def _check(self, size: int) -> None:
        most = self._limits.upload_bytes
        if size > most:
            what = f"The request has more than {most:,} bytes."
            raise Refusal(413, "too_large", what, "Send one picture, not a whole series.")


class Logins:
    """Wrong tokens by address: after too many within a minute none is looked at for a while."""

    most, seconds, addresses = 10, 60.0, 4096

    def __init__(self) -> None:
        self._failed: dict[str, deque[float]] = {}

    def check(self, address: str) -> None:
        """Raise `Refusal` for an address with too many wrong tokens."""
        failed, now = self._failed.get(address, deque()), time.monotonic()
        while failed and now - failed[0] > self.seconds:
            failed.popleft()
        if len(failed) >= self.most:
            wait = math.ceil(self.seconds - (now - failed[0]))
            raise Refusal(
                *(429, "too_many_logins", "There were too many wrong tokens from this address."),
                *(f"Try again in {wait} s.", {"Retry-After": str(wait)}),
            )

    def failed(self, address: str) -> None:
        """A token was wrong."""
        self._failed.setdefault(address, deque()).append(time.monotonic())
        while len(self._failed) > self.addresses:  # the oldest are forgotten
            del self._failed[next(iter(self._failed))]
        log.warning("A request from %s had no token, or a wrong one.", address)


LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
PROTECTED = ("/v1/", "/api/", "/metrics")
METHODS = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"}
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

log = logging.getLogger(__name__)


class Guard:
    """Refuses, bounds and logs requests on their way to the app.

    Nothing that a client sends reaches the log: of a request it has the method, the template of the
    route, the status and the milliseconds.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, slots: RequestSlots, metrics: Metrics
    ) -> None:
        self._app, self._settings = app, settings
        self._slots, self._metrics = slots, metrics
        self._uploads = Uploads(slots.count * settings.limits.upload_bytes)
        self._logins = Logins()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # until told otherwise, the client has left

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        try:
            await self._admitted(scope, receive, tell)
        except ClientLeft:
            pass
        except Exception as error:
            refused = refusal(error)
            if status == 499:
                await refused.response()(scope, receive, tell)
            if refused.code == "unexpected":  # its text might quote what was sent
                log.error("Unexpected error (%s in %s).", type(error).__name__, _where(error))
        finally:
            seconds = time.perf_counter() - started
            route = _route(scope)
            method = scope["method"] if scope["method"] in METHODS else "(other)"
            self._metrics.saw_request(route, status, seconds)
            log.info("%s %s %d %.0f ms", method, route, status, seconds * 1000)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        settings = self._settings
        if settings.proxy is None:  # which may rename hosts; there is a token then
            check_site(headers, is_local=settings.is_local, origins=settings.cors_origins)
        client = scope["client"][0] if scope.get("client") else "unknown"
        if path.startswith(PROTECTED):
            client = self._check_token(headers, client)
        scope.setdefault("state", {})["client"] = client
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if scope["query_string"] and path.startswith(PROTECTED):
            raise Refusal(
                *(400, "unsupported_parameter", "What follows a ? in the address is not read."),
                "Send it in the body; see /openapi.json.",
            )
        check_encoding(headers)
        limits = self._settings.limits
        self._slots.check(client)  # before anything is sent for nothing
        async with Body(receive, limits, headers, self._uploads) as body:
            with self._slots.take(client):
                await bounded(self._app, limits, scope, body, send)

    def _check_token(self, headers: Headers, address: str) -> str:
        """The client's name; raises `Refusal` where the token is not one of ours."""
        if not self._settings.tokens:
            return address
        self._logins.check(address)
        kind, _, given = headers.get("authorization", "").partition(" ")
        names = [
            name
            for name, token in self._settings.tokens.items()
            if hmac.compare_digest(given.strip().encode(), token.encode())
        ]
        if not names or kind.lower() != "bearer":
            self._logins.failed(address)
            what = "The token is missing or wrong."
            hint = "Send it as: Authorization: Bearer TOKEN"
            raise Refusal(401, "wrong_token", what, hint, {"WWW-Authenticate": "Bearer"})
        return f"{names[0]}@{address}"


def check_site(headers: Headers, *, is_local: bool, origins: Collection[str] = ()) -> None:
    """Refuse what a page of another site sends, unless it is of the given `origins`.

    With `is_local` the service listens on this machine alone. There it needs no token, so that a
    page could ask in the name of its reader, and read the answer once its own name has been made
    to lead here (DNS rebinding). Raises `Refusal`.
    """
    host = headers.get("host", "")
    if is_local and _name(host) not in LOCAL_HOSTS:
        what = "This is not the host that was asked for."
        raise Refusal(421, "wrong_host", what, "Ask localhost.")
    origin = headers.get("origin")
    if origin is not None and origin not in origins and origin.partition("://")[2] != host:
        what = "Pages of other sites may not ask."
        raise Refusal(403, "wrong_origin", what, "Use the page of this service itself.")


def check_encoding(headers: Headers) -> None:
    """Refuse a body that would first have to be unpacked, to whatever size. Raises `Refusal`."""
    if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        what = "A body with a Content-Encoding, such as gzip, is not taken."
        hint = "Send it as it is, without that header."
        raise Refusal(415, "unsupported_encoding", what, hint, {"Accept-Encoding": "identity"})


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _route(scope: Scope) -> str:
    """The template of the route that the path leads to; of a file of the page its folder."""
    path = getattr(scope.get("route"), "path", scope.get("root_path"))
    if not path:  # it was refused before it was routed
        routes = iter_route_contexts(scope["app"].routes)
        found = (each.path for each in routes if each.matches(scope)[0] is not Match.NONE)
        path = next(found, "(unknown)")
    return str(path)


def _where(error: Exception) -> str:
    """The file and line that raised it."""
    (*_, last) = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(last.filename)}:{last.lineno}"
