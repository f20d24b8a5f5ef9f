"""One thread that does all work of the models, a bounded number of requests, and their way back."""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

from medmoe_edge.bedside.serve.errors import Refusal, too_long

T = TypeVar("T")
SLOWEST = 60  # seconds after which anyone may try again


class Places:
    """As many requests as may be under way: one is answered, the others wait. For one event loop.

    Who takes a place may send an upload, so that memory is bounded too.
    """

    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0
        self._held = 1.0  # seconds, a moving average

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Hold one of them; raises `Refusal` where all are taken."""
        if self.taken >= self.count:
            wait = min(max(1, math.ceil(self._held / self.count)), SLOWEST)
            raise Refusal(
                *(429, "busy", "The service is busy."),
                *(f"Try again in {wait} s.", {"Retry-After": str(wait)}),
            )
        self.taken += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.taken -= 1
            self._held += 0.2 * (time.monotonic() - started - self._held)


class _End:
    """After this, a job yields nothing more; `error` is why it ended early."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class Job(Generic[T]):
    """Work that is done in turn; iterate over what it yields, where it was asked for.

    It stops before its next item once it is cancelled or `seconds` are over.
    """

    def __init__(self, work: Callable[[], Generator[T, None, None]], seconds: float) -> None:
        self._work: Callable[[], Generator[T, None, None]] | None = work
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[T | _End] = asyncio.Queue()
        self._deadline = self._loop.time() + seconds

    def __aiter__(self) -> "Job[T]":
        return self

    async def __anext__(self) -> T:
        try:
            async with asyncio.timeout_at(self._deadline):
                item = await self._arrived.get()
        except TimeoutError:
            self.cancel()
            raise too_long() from None
        if not isinstance(item, _End):
            return item
        if item.error is not None:
            raise item.error
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Stop, or never begin; what waits in the queue then no longer holds an upload."""
        self._cancelled.set()
        self._work = None

    def do(self) -> None:
        """The work itself, on the worker's thread."""
        work, end = self._work, _End()
        try:
            if work is not None:
                with contextlib.closing(work()) as items:
                    for item in items:
                        if self._cancelled.is_set():
                            break
                        self._tell(item)
        except Exception as error:  # whatever it is, the one who waits is told
            end = _End(error)
        self._tell(end)

    def _tell(self, item: T | _End) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who would listen
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)


class Worker:
    """The thread that alone touches the models, which are not thread-safe."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to work."""
        self._thread = threading.Thread(target=self._run, name="medmoe-edge worker", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Finish what was asked for, at most this long."""
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        """Whether what is asked for will be done."""
        return self._thread is not None and self._thread.is_alive()

    def do(
        self,
        work: Callable[[], Generator[T, None, None]],
        at_end: contextlib.ExitStack,
        seconds: float,
    ) -> Job[T]:
        """Queue a job for a request; at the request's end it is cancelled."""
        job = Job(work, seconds)
        at_end.callback(job.cancel)
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.do()
            del job  # and with it the upload


async def started(items: AsyncIterator[T]) -> AsyncIterator[T]:
    """The same items once the first is there: what fails before that is raised here and now."""
    first = await anext(items)

    async def all_of_them() -> AsyncIterator[T]:
        yield first
        async for item in items:
            yield item

    return all_of_them()
