"""From settings to a running service: uvicorn on a socket, with a gentle end."""

import asyncio
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.app import create_app
from medmoe_edge.bedside.serve.guard import SENDING
from medmoe_edge.bedside.serve.settings import Settings
from medmoe_edge.contrastive.engine import load_modality
from medmoe_edge.engine.engine import load
from medmoe_edge.engine.loading import Device, RuntimeName
from medmoe_edge.engine.prefix_cache import LastPrefix
from medmoe_edge.errors import InputError

HEAD_SECONDS = 10.0  # for a request's head to be whole, from its first byte or the connection
MAX_CONNECTIONS = 256


class ImpatientProtocol(H11Protocol):
    """Closes connections whose request does not come: uvicorn itself waits for ever."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first head its time."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Give the next head its time once it begins."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        super().connection_lost(exc)
        self._stop_timer()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = None


def run(app: FastAPI, settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted is then still answered.

    `ready` is called with the URL once requests are taken. Raises `InputError` where it cannot
    listen, and `KeyboardInterrupt` after a SIGINT.
    """
    with listening(settings) as listener:
        server = Server(app, settings, lambda: ready(url_of(settings, listener)))
        before = signal.signal(
            signal.SIGTERM, lambda *_: None
        )  # uvicorn raises it again at its end
        try:
            server.run([listener])
        finally:
            signal.signal(signal.SIGTERM, before)


class Server(uvicorn.Server):
    """Uvicorn as this service needs it."""

    def __init__(self, app: FastAPI, settings: Settings, ready: Callable[[], None]) -> None:
        limits, self._ready = settings.limits, ready
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=round(limits.upload_seconds + limits.seconds + SENDING),
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._ready()


def listening(settings: Settings) -> socket.socket:
    """A socket that listens; raises `InputError` where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise InputError(
            f"Nothing can listen on {settings.host}, port {settings.port} ({error.strerror}).",
            "Choose another --host or --port.",
        ) from error


def url_of(settings: Settings, listener: socket.socket) -> str:
    """Where it can be reached; the port is the real one."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{settings.scheme}://{host}:{listener.getsockname()[1]}"


@dataclass(frozen=True)
class Served:
    """The models that a service loads (see `engine.load`), and its audit log."""

    model: str = "nano"
    runtime: RuntimeName = "auto"
    device: Device = "auto"
    memory_budget: str | None = None
    drop_pages: bool = False
    modality_model: str = "modality-nano"
    audit: Path | None = None


def start(settings: Settings, served: Served, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM.

    Args:
        settings: Where it listens, and what a request may ask for.
        served: The models, and the log of answers.
        ready: Called with the URL once requests are taken.

    Raises:
        MedMoEError: What `engine.load`, `load_modality` and `server.run` raise.
    """
    settings.check_tls()
    engine = load(
        served.model,
        runtime=served.runtime,
        device=served.device,
        memory_budget=served.memory_budget,
        drop_pages=served.drop_pages,
    )
    engine.prefixes = LastPrefix(engine.sha256, engine.runtime)  # questions about an image follow
    modality = load_modality(served.modality_model)
    log = None if served.audit is None else AuditLog(served.audit)
    run(create_app(engine, settings, modality=modality, audit=log), settings, ready)
