"""What the worker's thread does: an upload and a question in, answers out, each of them audited."""

import asyncio
import contextlib
import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.errors import Refusal, too_long
from medmoe_edge.bedside.serve.metrics import Metrics
from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.results import Classification, Location
from medmoe_edge.engine.answer import Answer
from medmoe_edge.engine.proof import Proven
from medmoe_edge.errors import DataError, ResourceError
from medmoe_edge.image.loading import Image, Pixels, png_of
from medmoe_edge.image.worker import read_apart

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
        self, image: Image, questions: Sequence[str], *, max_new_tokens: int
    ) -> Iterator[str | Answer]: ...


@dataclass(frozen=True)
class Upload:
    """What came in: the picture, and of the file its digest; `who` is the client's address.

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
        self._limits, self._metrics, self._audit = limits, metrics, audit
        self._places = asyncio.Semaphore(PICTURES)

    def check_ask(self, questions: int, max_new_tokens: int) -> None:
        """Raise `Refusal` for more than one request may ask."""
        limits = self._limits
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

        Args:
            data: The file.
            frame: From 0; None is the middle one.
            who: The client's address.
            ending: Called at the request's end, until which the picture has its place in memory.

        Raises:
            ImageError, ResourceError: As of `read_apart`.
            Refusal: It took too long until there was a place for it.
        """
        loop, limits = asyncio.get_running_loop(), self._limits
        until = loop.time() + limits.seconds
        try:
            async with asyncio.timeout_at(until):
                await self._places.acquire()
        except TimeoutError:
            raise too_long() from None
        ending.callback(self._places.release)
        image = await asyncio.to_thread(read_apart, data, frame, limits.bounds)
        digest = await asyncio.to_thread(hashlib.sha256, data)
        return Upload(image, digest.hexdigest(), who, max(0.0, until - loop.time()))

    def ask(
        self, upload: Upload, questions: Sequence[str], max_new_tokens: int
    ) -> Generator[str | Answer, None, None]:
        """Pieces of text and whole answers, as `Engine.ask_stream` tells them."""
        for item in self.engine.ask_stream(upload.image, questions, max_new_tokens=max_new_tokens):
            if isinstance(item, Answer):
                self._record(upload, "ask", item.model, item.question, item.text)
                self._metrics.saw_answer(item)
            yield item

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
