"""The service as an ASGI app, over models that are loaded."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.formparsers import MultiPartParser
from starlette.staticfiles import StaticFiles

from medmoe_edge._version import __version__
from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.errors import add_error_handlers
from medmoe_edge.bedside.serve.guard import Guard
from medmoe_edge.bedside.serve.metrics import Metrics
from medmoe_edge.bedside.serve.openai import openai_routes
from medmoe_edge.bedside.serve.picture import picture_routes
from medmoe_edge.bedside.serve.queue import Places, Worker
from medmoe_edge.bedside.serve.routes import own_routes
from medmoe_edge.bedside.serve.settings import Settings
from medmoe_edge.bedside.serve.state import PAGE, state_routes
from medmoe_edge.bedside.serve.work import Asked, Work
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.image.worker import warm_up

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
