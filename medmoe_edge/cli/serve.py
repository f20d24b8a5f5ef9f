"""The verb that serves; whatever only it needs is imported inside it."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.cli.common import Device, DropPages, Json, MemoryBudget, Runtime, verb
from medmoe_edge.cli.errors import needs
from medmoe_edge.render import console as render


@verb("serve", "Deploy", "serve --port 8000")
def serve(
    host: Annotated[str, typer.Option(help="Others than this machine need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    model: Annotated[str, typer.Option(help="A bundle, a checkpoint or nano.")] = "nano",
    runtime: Runtime = "auto",
    device: Device = "auto",
    memory_budget: MemoryBudget = None,
    drop_pages: DropPages = False,
    modality_model: Annotated[str, typer.Option(help="For classify and locate.")] = "modality-nano",
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who has its token may ask; chmod 600.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM.")] = None,
    audit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Log every answer here.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 8,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 64,
    max_megapixels: Annotated[int, typer.Option(min=1, max=100, help="Of a picture.")] = 100,
    max_questions: Annotated[int, typer.Option(min=1, help="In a request.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    max_seconds: Annotated[float, typer.Option(min=1, help="For a request's answer.")] = 60,
    as_json: Json = False,
) -> None:
    """Answer over HTTP, with a page, JSON and OpenAI's chat completions.

    On SIGTERM it answers what it has accepted, and ends.
    """
    with needs("serve"):
        from medmoe_edge.bedside.serve import start as serve_start
        from medmoe_edge.bedside.serve.settings import Limits, Settings, read_token

    log = logging.getLogger("medmoe_edge.bedside.serve.guard")
    if log.isEnabledFor(logging.WARNING):  # the access log, unless --quiet
        log.setLevel(logging.INFO)
    limits = Limits(
        upload_bytes=max_megabytes * 10**6,
        pixels=max_megapixels * 10**6,
        questions=max_questions,
        new_tokens=max_new_tokens,
        seconds=max_seconds,
        waiting=queue,
    )
    token = None if token_file is None else read_token(token_file)
    settings = Settings(host, port, token, tls_cert, tls_key, limits)

    def ready(url: str) -> None:
        if as_json:
            render.as_json({"url": url})
        else:
            render.show(f"Listening on {url}; end with Ctrl+C.")
        sys.stdout.flush()
        render.show(NOTICE, "yellow", stderr=True)

    serve_start.start(
        settings,
        ready,
        model=model,
        runtime=runtime,
        device=device,
        memory_budget=memory_budget,
        drop_pages=drop_pages,
        modality_model=modality_model,
        audit=audit,
    )
    render.show("Stopped; all that was accepted is answered.", stderr=True)
