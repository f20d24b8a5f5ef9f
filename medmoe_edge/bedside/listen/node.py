"""The DICOM node: receives, answers and sends, each in threads of its own, over one queue.

A thread does one job after another; what fails is tried again later, and later still. When is kept
in memory, by a clock that never jumps; after a restart everything is tried at once.

Whether the node is well can be asked of its HTTP port, which also takes objects by STOW-RS and has
figures for Prometheus; systemd is told by itself (sd_notify(3)).
"""

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Self

import filelock
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from medmoe_edge.atomic import permitted
from medmoe_edge.bedside.listen.answering import Answering, Asked
from medmoe_edge.bedside.listen.config import Configuration, Http
from medmoe_edge.bedside.listen.desk import Desk, Tidying, remove_leftovers, sweep
from medmoe_edge.bedside.listen.fetching import Fetching
from medmoe_edge.bedside.listen.queue import Folder, Queue
from medmoe_edge.bedside.listen.receiving import (
    BAD_REQUEST,
    Limits,
    Receiving,
    Refused,
    stored,
    transfer_syntaxes,
)
from medmoe_edge.bedside.listen.report_sr import Locator
from medmoe_edge.bedside.listen.selection import classes_set_aside, classes_with_pixels
from medmoe_edge.bedside.listen.sending import Sending, commitment_handlers
from medmoe_edge.bedside.serve.settings import read_tokens
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import MedMoEError, ResourceError, needs
from medmoe_edge.image.pixels import MAX_BYTES

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)
VERIFICATION = "1.2.840.10008.1.1"
STUCK = 600.0  # seconds for one slice's answers, after which an engine hangs
MOST_UPLOADS, UPLOAD_SECONDS = 2, 300.0  # of STOW-RS
MULTIPART = 1_000_000  # bytes around the objects of a request
MOST_CONNECTIONS, PATIENCE = 64, 10.0  # seconds that open associations get to end by themselves
# Their messages quote UIDs, AE titles and values of what they read.
TALKATIVE = "pynetdicom pydicom highdicom httpx httpcore hl7"
NOTIFYING, IDLE = 1.0, 1.0  # seconds for systemd to listen; between looks, when nobody wakes it
FIRST_DELAY, LONGEST_DELAY = 1.0, 300.0  # seconds, doubled with each failure
MANY = 10  # failures, one after the other, after which all wait: nobody is there


class Worker(threading.Thread):
    """Calls `do` for the keys that `pending(limit)` names: new ones first, then those longest due.

    `do` ends well, or raises: then the key is left for later. It must not be in the log what the
    key stands for, so the log tells an error's own words only where they are ours. `rest` is called
    when there is nothing to do for now, and at the end. While `check` raises, nothing is done.
    """

    def __init__(
        self,
        name: str,
        pending: Callable[[int], Sequence[str]],
        do: Callable[[str], None],
        rest: Callable[[], None] = lambda: None,
        first_delay: float = FIRST_DELAY,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._pending, self._do, self._rest = pending, do, rest
        self._first_delay, self._check = first_delay, check
        self._stopping, self._awake = threading.Event(), threading.Event()
        self._delayed: dict[str, tuple[float, float]] = {}  # key -> not before, next delay
        self._began: float | None = None  # the job at hand
        self._told = ""  # why it cannot work
        self._failures = 0  # since the last job that ended well

    def wake(self) -> None:
        """There is something new."""
        self._awake.set()

    def stop(self) -> None:
        """End after the job at hand; `join` waits for that."""
        self._stopping.set()
        self._awake.set()

    def run(self) -> None:
        """The thread's life."""
        while not self._stopping.is_set():
            self._awake.clear()
            with contextlib.suppress(Exception):  # not even what the log raises ends the thread
                if self._works():
                    continue
            self._awake.wait(IDLE)
        self._rest()

    def _works(self) -> bool:
        """Do what is due now; whether anything was."""
        try:
            self._check()
            if (key := self._next()) is not None:
                self._attempt(key)
                return True
            self._rest()
            self._told = ""
        except Exception as error:
            why, told = _why(error), self._told
            self._told = why
            if why != told:
                log.error("%s cannot work (%s): waiting.", self.name, why)
        return False

    def _next(self) -> str | None:
        """The key to do now; one more than the delayed are asked for, so that a new one is seen."""
        now = time.monotonic()
        keys = self._pending(len(self._delayed) + 1)
        since = {key: self._delayed.get(key, (0.0,))[0] for key in keys}
        return min((key for key in since if since[key] <= now), key=since.__getitem__, default=None)

    def busy(self) -> float:
        """Seconds since the job at hand began; 0 where there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def _attempt(self, key: str) -> None:
        self._began = time.monotonic()
        try:
            self._do(key)
            self._delayed.pop(key, None)
            self._failures = 0
        except Exception as error:
            _, delay = self._delayed.get(key, (0.0, self._first_delay))
            self._delayed[key] = time.monotonic() + delay, min(2 * delay, LONGEST_DELAY)
            self._failures += 1
            told = (self.name, key[:16], _why(error), delay)
            log.warning("%s: %s failed (%s), again in %.0f s.", *told)
            if self._failures >= MANY:
                self._stopping.wait(self._first_delay * 2 ** min(self._failures - MANY, 6))
        finally:
            self._began = None


def _why(error: Exception) -> str:
    """An error in the log: its own words may tell of a patient unless they are ours."""
    return error.what if isinstance(error, MedMoEError) else type(error).__name__


class Node:
    """A node at work inside `with`; `engine` is used by one thread alone.

    What failed is tried again after `first_delay` seconds, an engine hangs that takes longer than
    `stuck` for a slice, and open associations get `patience` to end by themselves.

    Raises `ResourceError` where its port or its folder is in use.
    """

    def __init__(
        self,
        configuration: Configuration,
        engine: Asked,
        locator: Locator | None = None,
        *,
        first_delay: float = FIRST_DELAY,
        stuck: float = STUCK,
        patience: float = PATIENCE,
    ) -> None:
        self.configuration, self._stuck, self._patience = configuration, stuck, patience
        for name in TALKATIVE.split():
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self.folder = Folder(configuration.folder)
        self._lock = filelock.FileLock(self.folder.lock, timeout=0, fallback_to_soft=False)
        try:
            with permitted(self.folder.root):
                self._lock.acquire()
        except filelock.Timeout as error:
            raise ResourceError(
                "Another node works in this folder.",
                "One node owns a queue: stop it, or give each node a folder of its own.",
            ) from error
        self.queue = Queue(self.folder.queue)
        self.folder.remember()
        with permitted(self.folder.root):
            sweep(self.folder, self.queue, keep_images=configuration.keep_images)
            remove_leftovers(self.folder, self.queue)
        self.answering = Answering(configuration, self.folder, self.queue, engine, locator)
        worker = partial(Worker, first_delay=first_delay, check=self.folder.check)
        self._answerer = worker("Answering", self.answering.pending, self.answering.do)
        self.receiving = Receiving(configuration, self.folder, self.queue, self._answerer.wake)
        self.desk = Desk(configuration.folder)
        tidying = Tidying(configuration, self.desk)
        tidier = worker("Tidying", tidying.pending, tidying.do)
        names = [f"Fetching from {each.shown}" for each in configuration.sources] or ["Fetching"]
        self._fetchers = []
        for place, name in enumerate(names):
            fetching = Fetching(configuration, self.folder, self.queue, self.receiving, place)
            self._fetchers.append(worker(name, fetching.pending, fetching.do))
        self._workers = [self._answerer, tidier, *self._fetchers]
        for each in configuration.destinations:
            sending = Sending(each, configuration.ae_title, self.folder, self.queue)
            name = f"Sending to {each.shown}"
            self._workers.append(worker(name, sending.pending, sending.do, sending.rest))
        self._web: WebServer | None = None
        self._entity = _entity(configuration)
        self._server: ThreadedAssociationServer | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        receiving = self.receiving
        size = min(self.configuration.max_object_mb * 1_000_000, MAX_BYTES)
        limits = Limits(size, self.configuration.timeout)
        handlers: list[EventHandlerType] = [
            (evt.EVT_REQUESTED, receiving.requested),
            (evt.EVT_REJECTED, receiving.rejected),
            (evt.EVT_ACCEPTED, receiving.accepted),
            (evt.EVT_C_ECHO, receiving.echo),
            (evt.EVT_C_STORE, receiving.store),
            *limits.handlers,
            *commitment_handlers(self.queue),
        ]
        settings = self.configuration
        try:
            if settings.http is not None:
                self._web = WebServer(self, settings.http)
            self._server = self._entity.start_server(
                (settings.host, settings.port),
                block=False,
                evt_handlers=handlers,
                ssl_context=settings.tls.server() if settings.tls else None,
            )
        except BaseException as error:
            self._entity.shutdown()
            self._close()
            if not isinstance(error, OSError):
                raise
            raise ResourceError(
                f"The node cannot listen there ({error.strerror or type(error).__name__}).",
                "Is another running? Configure another host or port.",
            ) from error
        for worker in self._workers:
            worker.start()
        if self._web is not None:
            self._web.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let what is being received end, then what is being answered and sent."""
        self.receiving.ending = True
        if self._server is not None:
            self._server.shutdown()
        if self._web is not None:
            self._web.stop()
        end = time.monotonic() + self._patience
        while (there := self._entity.active_associations) and time.monotonic() < end:
            for association in there:
                if association.requestor.primitive is None:  # nothing was asked for
                    _hang_up(association)
            time.sleep(0.05)
        self._entity.shutdown()
        for worker in self._workers:
            worker.stop()
        end = time.monotonic() + self._patience
        for worker in self._workers:  # a source may say nothing for minutes
            worker.join(max(0.0, end - time.monotonic()) if worker in self._fetchers else None)
        self._close()

    def ails(self) -> str:
        """What is wrong with the node so that only a new start helps; empty where nothing is."""
        for worker in self._workers:
            if not worker.is_alive():
                return f"{worker.name} has ended"
        quiet = time.monotonic() - self.answering.progress
        if min(self._answerer.busy(), quiet) > self._stuck:
            return "an answer takes too long"
        return ""

    def lacks(self) -> str:
        """Why the node would not take an object now; empty where it would."""
        try:
            self.folder.check()
            self.answering.audit.check()
            self.queue.counts()
            self.receiving.judge_room(0)
        except (MedMoEError, Refused) as error:
            return str(error)
        return self.ails()

    def watch(self, stop: threading.Event) -> None:
        """Until `stop`, tell systemd that the node is ready, and from then on that it is well."""
        notify("READY=1")
        every = int(os.environ.get("WATCHDOG_USEC", 0)) / 2e6 or None
        while not stop.wait(every):
            if why := self.ails():
                log.error("The node is not well (%s).", why)
            else:
                notify("WATCHDOG=1")
        notify("STOPPING=1")

    @property
    def web_port(self) -> int:
        """Where its HTTP port is."""
        assert self._web is not None
        return self._web.port

    def _close(self) -> None:
        if self._web is not None:
            self._web.stop()
        self.desk.close()
        self.queue.close()
        self._lock.release()


def notify(state: str) -> None:
    """Tell systemd, if it has started this process and wants to know."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path or not hasattr(socket, "AF_UNIX"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.settimeout(NOTIFYING)  # or one that does not listen would keep us from ending
        link.connect(f"\0{path[1:]}" if path[0] == "@" else path)
        link.sendall(state.encode())


class WebServer:
    """The node's HTTP port, in a thread of its own.

    Raises `InputError` for a token file or certificates of no use, and `ResourceError` where the
    port is in use.
    """

    def __init__(self, node: Node, settings: Http) -> None:
        with needs("serve"):
            import uvicorn

            from medmoe_edge.bedside.serve.server import QUIET, listening
        self._tokens = read_tokens(settings.token_file) if settings.token_file else {}
        self._node = node
        self._uploads = threading.Semaphore(MOST_UPLOADS)
        config = uvicorn.Config(
            self._of_this_site(self._app(), is_local=settings.is_local and not self._tokens),
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=round(PATIENCE),
            **QUIET,
        )
        config.load()
        if settings.tls is not None:
            config.ssl = settings.tls.server()
        self._socket = listening(settings.host, settings.port, "Configure another under [http].")
        self.port = int(self._socket.getsockname()[1])
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="HTTP", daemon=True
        )

    def start(self) -> None:
        """Take requests."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is under way."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(2 * PATIENCE)
        self._socket.close()

    def _app(self) -> "Starlette":
        from starlette.applications import Starlette
        from starlette.routing import Route

        return Starlette(
            routes=[
                # whether only a new start helps, and whether it would take an object now
                Route("/healthz", lambda _: _told(self._node.ails())),
                Route("/readyz", lambda _: _told(self._node.lacks())),
                Route("/metrics", self._figures),
                Route("/studies", self._studies, methods=["POST"]),
                Route("/studies/{study}", self._studies, methods=["POST"]),
            ]
        )

    def _of_this_site(self, app: "Starlette", *, is_local: bool) -> "ASGIApp":
        """The app, closed to pages of other sites and to packed bodies, as the service is."""
        from starlette.datastructures import Headers

        from medmoe_edge.bedside.serve.errors import Refusal
        from medmoe_edge.bedside.serve.guard import check_encoding, check_site

        async def checked(scope: "Scope", receive: "Receive", send: "Send") -> None:
            try:
                check_site(Headers(scope=scope), is_local=is_local)
                check_encoding(Headers(scope=scope))
            except Refusal as refused:
                await refused.response()(scope, receive, send)
            else:
                await app(scope, receive, send)

        return checked

    def _figures(self, request: "Request") -> "Response":
        """Figures for Prometheus; numbers alone."""
        from starlette.responses import Response

        if self._who(request) is None:
            return _unauthorised()
        return Response(figures(self._node), media_type="text/plain; version=0.0.4")

    async def _studies(self, request: "Request") -> "Response":
        """STOW-RS, of few at once, as each is in memory until it is kept."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        who = self._who(request)
        if who is None:
            return _unauthorised()
        if not self._uploads.acquire(blocking=False):
            return JSONResponse({"error": "Others are sending."}, 503, {"Retry-After": "5"})
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                body = await self._body(request)
            if body is None:
                return JSONResponse({"error": "It is larger than max_object_mb allows."}, 413)
            kind = request.headers.get("content-type", "")
            study = request.path_params.get("study")
            status, told = await asyncio.to_thread(
                stored, self._node.receiving, body, kind, who, study
            )
        except TimeoutError:
            return JSONResponse({"error": "It took too long."}, 408)
        except ClientDisconnect:
            log.warning("A sender over HTTP broke off: nothing of its request is kept.")
            return JSONResponse({"error": "It broke off."}, BAD_REQUEST)
        finally:
            self._uploads.release()
        if told is None:
            what = "It is not multipart/related of application/dicom, or has no end."
            return JSONResponse({"error": what}, status)
        return JSONResponse(told.to_json_dict(), status, media_type="application/dicom+json")

    def _who(self, request: "Request") -> str | None:
        """The name of the token that was given; None where it is none of ours."""
        if not self._tokens:
            return "DICOMweb"  # of this machine: others need a token
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        for name, token in self._tokens.items():
            if hmac.compare_digest(given, token.encode()):
                return f"DICOMweb {name}"
        log.warning("A request without a valid token was refused.")
        return None

    async def _body(self, request: "Request") -> bytes | None:
        """All of it; None where it is too large."""
        limit = self._node.configuration.max_object_mb * 1_000_000 + MULTIPART
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                return None
        return bytes(body)


def _unauthorised() -> "Response":
    from starlette.responses import JSONResponse

    refusal = {"error": "A token is needed: Authorization: Bearer TOKEN"}
    return JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})


def _told(fault: str) -> "Response":
    from starlette.responses import JSONResponse

    state = {"status": fault or "ready", "notice": NOTICE}
    return JSONResponse(state, 503 if fault else 200)


def figures(node: Node) -> str:
    """How the node stands, as Prometheus has it; no name, UID, question or answer."""
    import prometheus_client

    found = node.desk.status(node.configuration)
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=registry)
    values: list[tuple[str, str, str, Mapping[str, float]]] = [
        ("objects", "Objects received.", "", {"": found["objects"]}),
        ("series", "Series by state.", "state", found["series"]),
        ("results", "Results made.", "", {"": found["results"]}),
        ("not_asked", "Objects not asked about, or refused.", "reason", found["not_asked"]),
        ("unsent", "Documents to be sent.", "destination", found["unsent"]),
        ("set_aside", "Refused there: see listen retry.", "destination", found["set_aside"]),
        ("uncommitted", "Sent, and not yet said to be kept.", "destination", found["uncommitted"]),
        ("requests", "Studies to fetch.", "state", found["requests"]),
        ("free_bytes", "Free on the disk.", "", {"": node.folder.free()}),
        ("used_bytes", "Of the node's folder.", "", {"": node.folder.used()}),
        ("well", "1 unless only a new start helps.", "", {"": float(not node.ails())}),
    ]
    for name, about, label, numbers in values:
        labels = [label] if label else []
        gauge = prometheus_client.Gauge(f"medmoe_listen_{name}", about, labels, registry=registry)
        for key, value in numbers.items():
            (gauge.labels(key) if label else gauge).set(value)
    return prometheus_client.generate_latest(registry).decode()


def _hang_up(association: Association) -> None:
    """End a connection as if its peer had, who has not said anything yet."""
    connection = association.dul.socket
    if connection is not None and connection.socket is not None:
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)
    association.kill()
    association.dul.to_user_queue.put(None)  # type: ignore[arg-type]  # ends its thread's wait


def _entity(configuration: Configuration) -> ApplicationEntity:
    entity = ApplicationEntity(configuration.ae_title)
    entity.maximum_associations = configuration.max_associations + MOST_CONNECTIONS  # silent ones
    entity.acse_timeout = entity.dimse_timeout = configuration.timeout
    entity.network_timeout = configuration.timeout
    entity.add_supported_context(VERIFICATION)
    syntaxes = transfer_syntaxes()
    for uid in (*classes_with_pixels(), *classes_set_aside()):
        entity.add_supported_context(uid, syntaxes)
    if any(node.commitment for node in configuration.dicom):  # who answers calls as SCP
        uid = StorageCommitmentPushModel
        entity.add_supported_context(uid, scu_role=True, scp_role=True)
    return entity
