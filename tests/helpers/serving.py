"""For the tests of the service: a stand-in for the models, and the service in a thread."""

import contextlib
import io
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import patients
from command_line import answer_to
from fastapi import FastAPI
from PIL import Image as Pillow
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.server import Server, create_app, listening, url_of
from medmoe_edge.bedside.serve.settings import Limits, Settings
from medmoe_edge.bedside.serve.work import Metrics, RequestSlots, Work
from medmoe_edge.contrastive.features import Classification, Location, Reading
from medmoe_edge.engine.answer import Answer, Choices, Piece
from medmoe_edge.engine.loading import Proven
from medmoe_edge.image.pixels import Image, Pixels
from medmoe_edge.prompt import check_question

WORDS = ("No", " effusion", " is", " seen")
LOCAL = "http://localhost"
BANNER = re.compile(r'"patient":\{[^{}]*\}')  # whose picture it is: told to whoever shows it alone
MODEL = {"name": "stand-in", "sha256": "0" * 64, "verification": "passed", "runtime": "none"}


class StandIn:
    """Answers the same to everything, a word at a time, as far as `may_go_on`.

    `images` are their sizes, `greys` how bright they were, `choices` what it was to choose from;
    `told` counts the words; `ended` is set whenever an answer is over, also one that was not told
    to its end. `changes` are what its answers have otherwise, such as warnings.
    """

    name, sha256, verification = "stand-in", "0" * 64, "passed"
    proven: Proven | None = None

    def __init__(self) -> None:
        self.images: list[tuple[int, ...]] = []
        self.greys: list[int] = []
        self.choices: list[Choices | None] = []
        self.told = 0
        self.may_go_on, self.begun, self.ended = (threading.Event() for _ in range(3))
        self.may_go_on.set()
        self.error: Exception | None = None
        self.changes: dict[str, Any] = {}

    def prompt_tokens(self, question: str) -> int:
        return len(check_question(question).split())

    def seen(self, image: Image) -> Pixels:
        return image.pixels[:1, :1]

    def ask_stream(
        self,
        image: Image,
        questions: Sequence[str],
        *,
        max_new_tokens: int,
        choices: Choices | None = None,
        alternatives: int | None = None,
    ) -> Iterator[str | Answer]:
        self.choices.append(choices)
        self.images.append(image.pixels.shape)
        self.greys.append(int(image.pixels.mean()))
        for question in map(check_question, questions):
            try:
                for word in WORDS[:max_new_tokens]:
                    self.told += 1
                    likely = [(word, -0.1), ("!", -2.5)][: alternatives or 0]
                    yield word if alternatives is None else Piece(word, (word, -0.1), likely)
                    self.begun.set()
                    assert self.may_go_on.wait(20)
                    if self.error:
                        raise self.error
                complete = max_new_tokens >= len(WORDS)
                text = "".join(WORDS[:max_new_tokens])
                answer = answer_to(question, text, complete=complete, model=MODEL)
                yield replace(answer, **self.changes)
            finally:
                self.ended.set()


class StandInModality:
    """Finds the first label likeliest, and everything in the upper left corner."""

    name, sha256, verification = "stand-in-modality", "1" * 64, "passed"
    proven: Proven | None = None

    def read(self) -> Reading:
        return Reading({"total": 0.1}, MODEL, "xray", {"xray": 1.0}, 0.0, False)

    def classify(self, image: Image, labels: Sequence[str]) -> Classification:
        scores = {label: 1.0 / len(labels) for label in labels}
        return Classification({"total": 0.1}, MODEL, scores, scores, self.read())

    def locate(self, image: Image, phrase: str) -> Location:
        heat = np.full(image.pixels.shape[:2], -1, np.float32)
        heat[0, 0] = 1
        return Location({"total": 0.1}, MODEL, phrase, heat, (0, 0), 0.5, self.read())


class Overheard:
    """Around the app: keeps what it answers in words for the search for patients at the end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As the app does."""

        async def overheard(message: Message) -> None:
            if message["type"] == "http.response.body":
                body = message.get("body", b"").decode("latin-1")
                patients.bodies.append(BANNER.sub("", body))
            await send(message)

        await self.app(scope, receive, overheard)


def app_over(
    engine: StandIn, *, limits: Limits | None = None, modality: bool = True, **options: Any
) -> FastAPI:
    """The app; `options` are of `Settings`, one `token`, or the audit log."""
    audit, token = options.pop("audit", None), options.pop("token", None)
    if token is not None:
        options["tokens"] = {"ward": token}
    settings = Settings(limits=limits or Limits(), **options)
    found: Any = StandInModality() if modality else None
    app = create_app(engine, settings, modality=found, audit=audit)
    app.add_middleware(Overheard)
    return app


def work_over(engine: StandIn, audit: AuditLog) -> Work:
    """What the service does with an engine, without the service."""
    return Work(engine, None, Limits(), Metrics(RequestSlots(1)), audit)


@contextlib.contextmanager
def client_of(app: FastAPI) -> Iterator[TestClient]:
    """A client of an app that runs in this process."""
    with TestClient(app, base_url=LOCAL) as client:
        yield client


@contextlib.contextmanager
def live(engine: StandIn, **options: Any) -> Iterator[str]:
    """The URL of a service that listens, in a thread of its own."""
    app, ready = app_over(engine, port=0, **options), threading.Event()
    settings = Settings(port=0, **{k: options[k] for k in ("certificate", "key") if k in options})
    with listening(settings.host, settings.port, "") as listener:
        server = Server(app, settings, ready.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert ready.wait(20)
            yield url_of(settings, listener)
        finally:
            engine.may_go_on.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def png(width: int = 8, height: int = 8) -> bytes:
    """A black picture."""
    file = io.BytesIO()
    Pillow.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def upload(data: bytes | None = None, name: str = "scan.png") -> dict[str, Any]:
    """The `files` of a request."""
    return {"image": (name, png() if data is None else data)}
