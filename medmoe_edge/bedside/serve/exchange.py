"""One request, from its first byte to its last: bounded, and over when the client leaves."""

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmoe_edge.bedside.serve.errors import Refusal
from medmoe_edge.bedside.serve.settings import Limits

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
