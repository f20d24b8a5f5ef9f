"""The outermost layer: who may ask, how much and for how long, and what the log tells of it.

One request, from its first byte to its last: bounded, and over when the client leaves.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import time
import traceback
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmoe_edge.bedside.serve.errors import Refusal, refusal
from medmoe_edge.bedside.serve.settings import Limits, Settings
from medmoe_edge.bedside.serve.work import Metrics, RequestSlots

SENDING = 30.0  # seconds that a client may take to fetch its answer


async def bounded(app: ASGIApp, limits: Limits, scope: Scope, receive: Receive, send: Send) -> None:
    """Let the app answer a request, within limits; raises `Refusal` for one beyond them.

    If the client leaves, the app is cancelled; `at_end(request)` is then called, as at every end.
    """
    end = asyncio.timeout(limits.upload_seconds + limits.seconds + SENDING)
    body = _Body(receive, limits, Headers(scope=scope), end)
    try:
        with contextlib.ExitStack() as ending:
            scope.setdefault("state", {})["at_end"] = ending
            async with end:
                await app(scope, body.receive, send)
    except TimeoutError:
        if not body.client_left:
            what = "The request took too long."
            raise Refusal(504, "timeout", what, "Ask less at once, or try again later.") from None
    finally:
        if body.watch is not None:
            body.watch.cancel()


def at_end(request: Request) -> contextlib.ExitStack:
    """Takes what is to be called once nobody waits for the answer to a request any more."""
    ending = request.state.at_end
    assert isinstance(ending, contextlib.ExitStack)
    return ending


class _Body:
    """A request's body as it comes in; after its end, whether the client is still there."""

    def __init__(
        self, receive: Receive, limits: Limits, headers: Headers, end: asyncio.Timeout
    ) -> None:
        self._receive, self._limits, self._end = receive, limits, end
        self._deadline = asyncio.get_running_loop().time() + limits.upload_seconds
        self._bytes = 0
        self.watch: asyncio.Task[None] | None = None
        self.client_left = False
        length = headers.get("content-length", "0")
        self._check(int(length[:20]) if length.isdecimal() else 0)

    async def receive(self) -> Message:
        """The next message of the body; raises `Refusal` where it is too much or too late."""
        if self.watch is not None:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(
                *(408, "slow_upload", "The upload took too long."),
                f"Send it within {self._limits.upload_seconds:.0f} s.",
            ) from None
        self._bytes += len(message.get("body", b""))
        self._check(self._bytes)
        if not message.get("more_body", False):
            self.watch = asyncio.create_task(self._watch())
        return message

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        with contextlib.suppress(RuntimeError):  # it may just have ended by itself
            self._end.reschedule(0)  # now

    def _check(self, size: int) -> None:
        most = self._limits.upload_bytes
        if size > most:
            what = f"The request has more than {most:,} bytes."
            raise Refusal(413, "too_large", what, "Send one picture, not a whole series.")


LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
PROTECTED = ("/v1/", "/metrics")
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
        except Exception as error:
            refused = refusal(error)
            if refused.code == "unexpected":  # its text might quote what was sent
                log.error("Unexpected error (%s in %s).", type(error).__name__, _where(error))
            if status == 499:
                await refused.response()(scope, receive, tell)
        finally:
            seconds = time.perf_counter() - started
            route = _route(scope)
            method = scope["method"] if scope["method"] in METHODS else "(other)"
            self._metrics.saw_request(route, status, seconds)
            log.info("%s %s %d %.0f ms", method, route, status, seconds * 1000)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        self._check_site(headers)
        if path.startswith(PROTECTED):
            self._check_token(headers)
        if scope["method"] == "POST":
            with self._slots.take():
                await bounded(self._app, self._settings.limits, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_site(self, headers: Headers) -> None:
        """Refuse what a page of another site sends.

        On this machine alone there is no token, so that a page could ask in the name of its reader,
        and read the answer once its own name has been made to lead here (DNS rebinding).
        """
        host = headers.get("host", "")
        if self._settings.is_local and _name(host) not in LOCAL_HOSTS:
            what = "This is not the host that was asked for."
            raise Refusal(421, "wrong_host", what, "Ask localhost.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            what = "Pages of other sites may not ask."
            raise Refusal(403, "wrong_origin", what, "Use the page of this service itself.")

    def _check_token(self, headers: Headers) -> None:
        token = self._settings.token
        if token is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), token.encode())
        if not same or kind.lower() != "bearer":
            what = "The token is missing or wrong."
            hint = "Send it as: Authorization: Bearer TOKEN"
            raise Refusal(401, "wrong_token", what, hint, {"WWW-Authenticate": "Bearer"})


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _route(scope: Scope) -> str:
    """The template of the route that was taken; of a file of the page its folder."""
    return str(getattr(scope.get("route"), "path", scope.get("root_path") or "(unknown)"))


def _where(error: Exception) -> str:
    """The file and line that raised it."""
    (*_, last) = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(last.filename)}:{last.lineno}"
