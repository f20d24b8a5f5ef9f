"""How the service is: alive, ready, its figures; and the page."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_1_0_0

from medmoe_edge.bedside.serve.errors import Refusal
from medmoe_edge.bedside.serve.metrics import Metrics
from medmoe_edge.bedside.serve.queue import Worker
from medmoe_edge.bundle.bundle import NOTICE

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
