"""The service as an ASGI app, over models that are loaded: its routes, its health, its page."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_1_0_0
from starlette.formparsers import MultiPartParser
from starlette.staticfiles import StaticFiles

from medmoe_edge._version import __version__
from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.errors import Refusal, add_error_handlers
from medmoe_edge.bedside.serve.guard import Guard
from medmoe_edge.bedside.serve.openai import openai_routes
from medmoe_edge.bedside.serve.routes import own_routes, picture_routes
from medmoe_edge.bedside.serve.settings import Settings
from medmoe_edge.bedside.serve.work import Asked, Metrics, Places, Work, Worker
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.image.worker import warm_up

PAGE = Path(__file__).parent / "page"


def state_routes(worker: Worker, metrics: Metrics) -> APIRouter:
    """`/healthz`, `/readyz`, `/metrics` and the page at `/`, whose files are under `/page`."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the process answers at all."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """Whether questions are answered: the model is loaded and its thread at work."""
        if not worker.is_alive:
            raise Refusal(503, "not_ready", "No questions are answered now.", "Try again later.")
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
    places, worker = Places(1 + limits.waiting), Worker()
    metrics = Metrics(places)
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
    app.include_router(state_routes(worker, metrics))
    if PAGE.is_dir():
        app.mount("/page", StaticFiles(directory=PAGE))
    app.add_middleware(Guard, settings=settings, places=places, metrics=metrics)
    return app
