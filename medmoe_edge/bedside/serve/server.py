"""The service: an ASGI app over loaded models, and uvicorn on a socket with a gentle end."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_1_0_0
from starlette.formparsers import MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from medmoe_edge._version import __version__
from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.errors import Refusal, add_error_handlers
from medmoe_edge.bedside.serve.guard import PROTECTED, SENDING, Guard
from medmoe_edge.bedside.serve.ollama import ollama_routes
from medmoe_edge.bedside.serve.openai import openai_routes
from medmoe_edge.bedside.serve.routes import own_routes, picture_routes
from medmoe_edge.bedside.serve.settings import Settings
from medmoe_edge.bedside.serve.work import Asked, Metrics, RequestSlots, Work, Worker
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.config import Device, RuntimeName
from medmoe_edge.contrastive.engine import ModalityEngine, load_modality
from medmoe_edge.engine.engine import load
from medmoe_edge.engine.prefix_cache import LastPrefix
from medmoe_edge.errors import ResourceError
from medmoe_edge.image.worker import warm_up

PAGE = Path(__file__).parent / "page"


def state_routes(work: Work, worker: Worker, metrics: Metrics) -> APIRouter:
    """`/healthz`, `/readyz`, `/metrics` and the page at `/`, whose files are under `/page`."""
    router = APIRouter()

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the process answers at all."""
        return {"status": "ok"}

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """Whether questions are answered: a model is at work, and its answers can be audited."""
        if not worker.is_alive:
            raise Refusal(503, "not_ready", "No questions are answered now.", "Try again later.")
        await asyncio.to_thread(work.check_audit)
        return {"status": "ready", "notice": NOTICE}

    @router.get("/metrics", response_class=Response)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_PLAIN_1_0_0)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        index = PAGE / "index.html"
        if not index.is_file():
            raise Refusal(
                404, "no_page", "There is no page in this installation.", "See /openapi.json."
            )
        return FileResponse(index)

    return router


STOPPING = 10.0  # seconds for the worker to end, once all requests have


logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of clients' mistakes

MultiPartParser.spool_max_size = 2**40  # uploads stay in memory, which the limits of requests bound


def create_app(
    engine: Asked,
    settings: Settings,
    *,
    modality: ModalityEngine | None = None,
    audit: AuditLog | None = None,
) -> FastAPI:
    """The app; while it runs, nobody else may use the engines."""
    limits = settings.limits
    slots, worker = RequestSlots(1 + limits.waiting), Worker()
    metrics = Metrics(slots)
    work = Work(engine, modality, limits, metrics, audit)

    @contextlib.asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        warm_up()
        yield
        await asyncio.to_thread(worker.stop, STOPPING)

    app = FastAPI(
        title="medmoe-edge",
        version=__version__,
        description=f"Questions about medical images. {NOTICE}",
        lifespan=running,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        form_limits={"max_files": 1, "max_fields": 200, "max_part_size": 2**16},
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    add_error_handlers(app)
    app.include_router(own_routes(work, worker))
    app.include_router(picture_routes(limits))
    app.include_router(openai_routes(work, worker))
    app.include_router(ollama_routes(work, worker))
    app.include_router(state_routes(work, worker, metrics))
    if PAGE.is_dir():
        app.mount("/page", StaticFiles(directory=PAGE))
    if settings.tokens:
        _state_security(app)
    app.add_middleware(Guard, settings=settings, slots=slots, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _state_security(app: FastAPI) -> None:
    """Have the OpenAPI document say which routes need a token."""
    document = app.openapi()
    schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["token"] = {"type": "http", "scheme": "bearer"}
    for path, operations in document["paths"].items():
        if path.startswith(PROTECTED):
            for operation in operations.values():
                operation["security"] = [{"token": []}]


HEAD_SECONDS = 10.0  # for a request's head to be whole, from its first byte or the connection
MAX_CONNECTIONS = 256


class TimeoutProtocol(H11Protocol):
    """Ends connections whose request does not come to its end, or whose answer nobody takes.

    uvicorn itself waits for ever, and so does closing, where the peer is there and does not read.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _sending_timer: asyncio.TimerHandle | None = None
    _unsent = 0  # bytes that waited for the peer at the last look
    _took = False  # whether it has taken some since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first head its time."""
        super().connection_made(transport)
        self._watch_head()
        self._watch_sending()

    def data_received(self, data: bytes) -> None:
        """Give the next head its time once it begins."""
        super().data_received(data)
        self._watch_head()

    def resume_writing(self) -> None:
        """The peer reads."""
        super().resume_writing()
        self._took = True

    def on_response_complete(self) -> None:
        """Give the rest of a body that was answered before its end some time, too."""
        super().on_response_complete()
        if self._is_unread:
            self._stop_timer()
            self._head_timer = self.loop.call_later(SENDING, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        super().connection_lost(exc)
        self._stop_timer()
        if self._sending_timer is not None:
            self._sending_timer.cancel()

    @property
    def _is_unread(self) -> bool:
        """Whether what comes is the rest of a request that has its answer."""
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE and not self._is_unread:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = None

    def _watch_sending(self) -> None:
        """Look once in a while whether the peer takes what it is sent."""
        unsent = self.transport.get_write_buffer_size()
        if 0 < self._unsent <= unsent and not self._took:
            self.transport.abort()
            return
        self._unsent, self._took = unsent, False
        self._sending_timer = self.loop.call_later(SENDING, self._watch_sending)


QUIET: dict[str, Any] = {  # of uvicorn, which says nothing in the log or in answers by itself
    "http": TimeoutProtocol,
    "ws": "none",
    "log_config": None,
    "log_level": "warning",
    "access_log": False,
    "server_header": False,
}


def run(app: FastAPI, settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted is then still answered.

    `ready` is called with the URL once requests are taken. Raises `ResourceError` where it cannot
    listen, and `KeyboardInterrupt` after a SIGINT.
    """
    with listening(settings.host, settings.port, "Choose another --host or --port.") as listener:
        server = Server(app, settings, lambda: ready(url_of(settings, listener)))
        before = signal.signal(
            signal.SIGTERM, lambda *_: None
        )  # uvicorn raises it again at its end
        try:
            server.run([listener])
        finally:
            signal.signal(signal.SIGTERM, before)
    if server.failure is not None:
        raise server.failure


class Server(uvicorn.Server):
    """Uvicorn as this service needs it; `failure` is why nobody could be told that it listens."""

    failure: BaseException | None = None

    def __init__(self, app: FastAPI, settings: Settings, ready: Callable[[], None]) -> None:
        limits, self._ready = settings.limits, ready
        config = uvicorn.Config(
            app,
            lifespan="on",
            proxy_headers=settings.proxy is not None,
            forwarded_allow_ips=settings.proxy,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=round(limits.upload_seconds + limits.seconds + SENDING),
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
            **QUIET,
        )
        super().__init__(config)

    async def main_loop(self) -> None:
        """Say that it listens, and go on; where that cannot be said, end as at any other time."""
        try:
            self._ready()
        except (Exception, SystemExit) as error:
            self.failure = error
        else:
            await super().main_loop()


def listening(host: str, port: int, remedy: str) -> socket.socket:
    """A socket that listens; raises `ResourceError` where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ResourceError(
            f"Nothing can listen on {host}, port {port} ({why}).", remedy
        ) from error


def url_of(settings: Settings, listener: socket.socket) -> str:
    """Where it can be reached; the port is the real one."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{settings.scheme}://{host}:{listener.getsockname()[1]}"


@dataclass(frozen=True)
class ServiceModels:
    """The models that a service loads (see `engine.load`), and its audit log."""

    model: str = "nano"
    runtime: RuntimeName = "auto"
    device: Device = "auto"
    memory_budget: str | None = None
    drop_pages: bool = False
    allow_repetition: bool = False
    modality_model: str = "modality-nano"
    audit: Path | None = None


def start(settings: Settings, models: ServiceModels, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM; `ready` is called with the URL once requests are taken.

    Raises what `engine.load`, `load_modality` and `run` raise.
    """
    settings.check_tls()
    log = None if models.audit is None else AuditLog(models.audit)
    engine = load(
        models.model,
        runtime=models.runtime,
        device=models.device,
        memory_budget=models.memory_budget,
        drop_pages=models.drop_pages,
        allow_repetition=models.allow_repetition,
    )
    engine.prefixes = LastPrefix(engine.sha256, engine.runtime)  # questions about an image follow
    modality = load_modality(models.modality_model)
    run(create_app(engine, settings, modality=modality, audit=log), settings, ready)
