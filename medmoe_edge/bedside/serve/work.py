"""What the worker's thread does: an upload and a question in, answers out, each of them audited."""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.errors import Refusal
from medmoe_edge.bedside.serve.metrics import Metrics
from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.results import Classification, Location
from medmoe_edge.engine.answer import Answer
from medmoe_edge.engine.proof import Proven
from medmoe_edge.errors import DataError, ImageError, MedMoEError, ResourceError
from medmoe_edge.image.loading import Image, load_image, shown_name


class Asked(Protocol):
    """What the service needs of `medmoe_edge.engine.engine.Engine`."""

    name: str
    sha256: str
    verification: str
    proven: Proven | None

    def prompt_tokens(self, question: str) -> int: ...

    def ask_stream(
        self, image: Image, questions: Sequence[str], *, max_new_tokens: int
    ) -> Iterator[str | Answer]: ...


@dataclass(frozen=True)
class Upload:
    """What came in; `frame` counts from 0, None is the middle; `who` is the client's address."""

    data: bytes
    frame: int | None
    who: str


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

    def ask(
        self, upload: Upload, questions: Sequence[str], max_new_tokens: int
    ) -> Generator[str | Answer, None, None]:
        """Pieces of text and whole answers, as `Engine.ask_stream` tells them."""
        image = self._picture(upload)
        for item in self.engine.ask_stream(image, questions, max_new_tokens=max_new_tokens):
            if isinstance(item, Answer):
                self._record(upload, "ask", item.model, item.question, item.text)
                self._metrics.saw_answer(item)
            yield item

    def classify(
        self, upload: Upload, labels: Sequence[str]
    ) -> Generator[Classification, None, None]:
        """The one classification."""
        assert self.modality is not None
        found = self.modality.classify(self._picture(upload), labels)
        best = next(iter(found.scores))
        self._record(upload, "classify", found.model, "; ".join(labels), best)
        yield found

    def locate(self, upload: Upload, phrase: str) -> Generator[Location, None, None]:
        """The one location."""
        assert self.modality is not None
        found = self.modality.locate(self._picture(upload), phrase)
        x, y = found.peak
        self._record(upload, "locate", found.model, phrase, f"peak {x} {y}")
        yield found

    def _picture(self, upload: Upload) -> Image:
        picture = read_upload(upload.data, upload.frame)
        height, width = picture.pixels.shape[:2]
        if height * width > self._limits.pixels:
            raise ImageError(
                f"The image has more than the limit of {self._limits.pixels:,} pixels.",
                "Shrink it or crop it first.",
            )
        return picture

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
                input_sha256=hashlib.sha256(upload.data).hexdigest(),
            )
        except DataError as error:  # what is wrong with the log is not the client's doing
            raise ResourceError(error.what, error.remedy) from error


def read_upload(data: bytes, frame: int | None) -> Image:
    """The picture in an uploaded file; the errors of `medmoe_edge.image.loading.load_image`."""
    with path_to(data) as path:
        try:
            return load_image(path, frame=frame)
        except MedMoEError as error:
            error.what = error.what.replace(shown_name(path), "The image")
            error.args = (f"{error.what} {error.remedy}",)
            raise


@contextlib.contextmanager
def path_to(data: bytes) -> Iterator[Path]:
    """A path for those who can only read files; in memory, where the system allows that."""
    if sys.platform == "linux":
        with open(os.memfd_create("image"), "wb") as file:
            file.write(data)
            file.flush()
            yield Path(f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "image")
            path.write_bytes(data)
            yield path
