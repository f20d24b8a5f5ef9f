"""The one thread that does all work of the models: its bounded queue, its jobs, its figures.

Every answer is audited: that a question was accepted before its first word is told, and what came
of it before the last. What Prometheus may know of the service are counts and seconds, nothing of
any question or image.
"""

import asyncio
import contextlib
import hashlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.errors import Refusal, too_long
from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.features import Classification, Location
from medmoe_edge.engine.answer import Answer, Choices
from medmoe_edge.engine.loading import Proven
from medmoe_edge.errors import DataError, ResourceError
from medmoe_edge.image.loading import png_of
from medmoe_edge.image.pixels import Image, Pixels
from medmoe_edge.image.worker import read_apart

T = TypeVar("T")
SLOWEST = 60  # seconds after which anyone may try again
REFUSED = 1024  # clients that are remembered


class RequestSlots:
    """As many requests as may be under way: one is answered, the others wait. For one event loop.

    One slot more is kept for a client that holds none, so that nobody can take them all. Who is
    refused is told when a slot will be free for it, behind those who were refused before.
    """

    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0
        self._held = 1.0  # seconds, a moving average
        self._clients: Counter[str] = Counter()
        self._refused: dict[str, float] = {}  # until when each is waited for, the first one first

    def check(self, client: str) -> None:
        """Raise `Refusal` where all that this client may have are taken."""
        if self.taken >= self.count + (client not in self._clients):
            wait = self._wait(client)
            raise Refusal(
                *(429, "busy", "The service is busy."),
                *(f"Try again in {wait} s.", {"Retry-After": str(wait)}),
            )

    def _wait(self, client: str) -> int:
        """Seconds until a slot is free for it: one is about every `_held / count`."""
        now, known = time.monotonic(), self._refused
        self._refused = {each: until for each, until in known.items() if until > now}
        if len(self._refused) < REFUSED:
            self._refused.setdefault(client, 0.0)
        ahead = next((at for at, each in enumerate(self._refused) if each == client), REFUSED)
        wait = min(max(1, math.ceil(self._held / self.count * (ahead + 1))), SLOWEST)
        if client in self._refused:
            self._refused[client] = now + 2 * wait  # then it has given up
        return wait

    @contextlib.contextmanager
    def take(self, client: str) -> Iterator[None]:
        """Hold one of them; raises `Refusal` as `check` does."""
        self.check(client)
        self._refused.pop(client, None)
        self.taken += 1
        self._clients[client] += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.taken -= 1
            self._clients[client] -= 1
            self._clients += Counter()  # forgets who holds none
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
    """The thread that alone touches the models, which are not thread-safe.

    Clients take turns: of each the first job that waits, then of the next.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, deque[Job[Any]]] = {}  # by client, whose turn is next first
        self._changed = threading.Condition()
        self._ending = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to work."""
        self._thread = threading.Thread(target=self._run, name="medmoe-edge worker", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Finish what was asked for, at most this long."""
        with self._changed:
            self._ending = True
            self._changed.notify()
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
        client: str,
        seconds: float,
    ) -> Job[T]:
        """Queue a job for a client's request; at the request's end it is cancelled."""
        job = Job(work, seconds)
        at_end.callback(job.cancel)
        with self._changed:
            self._jobs.setdefault(client, deque()).append(job)
            self._changed.notify()
        return job

    def _next(self) -> Job[Any] | None:
        """The next client's first job; None where all is done and the end has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ending)
            if not self._jobs:
                return None
            client = next(iter(self._jobs))
            jobs = self._jobs.pop(client)
            job = jobs.popleft()
            if jobs:
                self._jobs[client] = jobs  # behind the others
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
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


SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The figures of one service."""

    def __init__(self, slots: RequestSlots) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        counter = partial(prometheus_client.Counter, registry=registry)
        histogram = partial(Histogram, buckets=SECONDS, registry=registry)
        self._requests = counter(
            "medmoe_requests", "Requests by route and status.", ["route", "status"]
        )
        self._request_seconds = histogram(
            "medmoe_request_seconds", "From request to response.", ["route"]
        )
        self._first_token = histogram(
            "medmoe_first_token_seconds", "From image to first token, without the queue."
        )
        self._answers = counter("medmoe_answers", "Questions answered.", ["prefix_reused"])
        self._tokens = counter("medmoe_answer_tokens", "Tokens of all answers.")
        about = "Being sent, waiting or answered."
        taken = Gauge("medmoe_requests_under_way", about, registry=registry)
        taken.set_function(lambda: slots.taken)

    def saw_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request; `route` is its template, never what the client sent."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def saw_answer(self, answer: Answer) -> None:
        """Count an answer."""
        times = answer.timings
        self._answers.labels(str(times.prefix_reused).lower()).inc()
        self._tokens.inc(times.tokens)
        self._first_token.observe(times.first_token)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


PICTURES = 2  # that lie decoded in memory: of the request that is answered, and of the next


class Asked(Protocol):
    """What the service needs of `medmoe_edge.engine.engine.Engine`."""

    name: str
    sha256: str
    verification: str
    proven: Proven | None

    def prompt_tokens(self, question: str) -> int: ...

    def seen(self, image: Image) -> Pixels: ...

    def ask_stream(
        self,
        image: Image,
        questions: Sequence[str],
        *,
        max_new_tokens: int,
        choices: Choices | None,
        alternatives: int | None,
    ) -> Iterator[str | Answer]: ...


@dataclass(frozen=True)
class Upload:
    """What came in: the picture, and of the file its digest; `who` is the client (`client_of`).

    `seconds` are left for the answer.
    """

    image: Image
    sha256: str
    who: str
    seconds: float


class Work:
    """The models and what is done with them, on the worker's thread; the checks come before it."""

    def __init__(
        self,
        engine: Asked,
        modality: ModalityEngine | None,
        limits: Limits,
        metrics: Metrics,
        audit: AuditLog | None,
    ) -> None:
        self.engine, self.modality = engine, modality
        self.limits, self._metrics, self._audit = limits, metrics, audit
        self._reading = asyncio.Semaphore(PICTURES)

    def check_ask(self, questions: int, max_new_tokens: int) -> None:
        """Raise `Refusal` for more than one request may ask."""
        limits = self.limits
        if questions > limits.questions:
            what = f"At most {limits.questions} questions are answered at once."
            raise Refusal(400, "too_many_questions", what, "Send the others afterwards.")
        if max_new_tokens > limits.new_tokens:
            what = f"Answers have at most {limits.new_tokens} new tokens."
            raise Refusal(400, "too_many_tokens", what, "Allow fewer.")

    def check_modality(self) -> None:
        """Raise `Refusal` where there is no model that classifies and locates."""
        if self.modality is None:
            what = "No modality model is loaded, which this would need."
            raise Refusal(503, "no_model", what, "Start the service with --modality-model BUNDLE.")

    async def receive(
        self, data: bytes, frame: int | None, who: str, ending: contextlib.ExitStack
    ) -> Upload:
        """Decode an uploaded file, apart from this process and not on the worker's thread.

        The client is `who`, as `client_of` has it; at the `ending` of its request the picture gives
        up its slot in memory. Raises what `read_apart` does, and `Refusal` where it took too long
        until it could be read.
        """
        loop, limits = asyncio.get_running_loop(), self.limits
        until = loop.time() + limits.seconds
        try:
            async with asyncio.timeout_at(until):
                await self._reading.acquire()
        except TimeoutError:
            raise too_long() from None
        ending.callback(self._reading.release)
        image = await asyncio.to_thread(read_apart, data, frame, limits.bounds)
        digest = await asyncio.to_thread(hashlib.sha256, data)
        return Upload(image, digest.hexdigest(), who, max(0.0, until - loop.time()))

    def ask(
        self,
        upload: Upload,
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        choices: Choices | None = None,
        alternatives: int | None = None,
    ) -> Generator[str | Answer, None, None]:
        """Pieces of text and whole answers, as `Engine.ask_stream` tells them."""
        model = {"name": self.engine.name, "sha256": self.engine.sha256}
        waiting = iter(questions)
        asked: str | None = None  # the question at hand
        told = ""
        try:
            for item in self.engine.ask_stream(
                upload.image,
                questions,
                max_new_tokens=max_new_tokens,
                choices=choices,
                alternatives=alternatives,
            ):
                if asked is None:
                    asked, told = next(waiting), ""
                    self._record(upload, "accepted", model, asked, "")
                if isinstance(item, Answer):
                    self._record(upload, "ask", item.model, item.question, item.logged)
                    self._metrics.saw_answer(item)
                    asked = None
                else:
                    told += item
                yield item
        except BaseException:  # also when nobody listens any more, who ends the generator
            if asked is not None:
                self._record(upload, "aborted", model, asked, told)
            raise

    @property
    def is_audited(self) -> bool:
        """Whether questions and answers are recorded in an audit log."""
        return self._audit is not None

    def check_audit(self) -> None:
        """Raise `ResourceError` where no answer could be audited, and so none is given."""
        if self._audit is not None:
            self._audit.check()

    def seen(self, upload: Upload) -> Generator[bytes, None, None]:
        """The one picture, as PNG."""
        yield png_of(self.engine.seen(upload.image))

    def classify(
        self, upload: Upload, labels: Sequence[str]
    ) -> Generator[Classification, None, None]:
        """The one classification."""
        assert self.modality is not None
        found = self.modality.classify(upload.image, labels)
        best = next(iter(found.scores))
        self._record(upload, "classify", found.model, "; ".join(labels), best)
        yield found

    def locate(self, upload: Upload, phrase: str) -> Generator[Location, None, None]:
        """The one location."""
        assert self.modality is not None
        found = self.modality.locate(upload.image, phrase)
        x, y = found.peak
        self._record(upload, "locate", found.model, phrase, f"peak {x} {y}")
        yield found

    def _record(
        self, upload: Upload, event: str, model: Mapping[str, Any], question: str, answer: str
    ) -> None:
        if self._audit is None:
            return
        try:
            self._audit.append(
                who=upload.who,
                event=event,
                model=model,
                question=question,
                answer=answer,
                input_sha256=upload.sha256,
            )
        except DataError as error:  # what is wrong with the log is not the client's doing
            raise ResourceError(error.what, error.remedy) from error
