"""From settings to a running service: the models are loaded, then requests are taken."""

from collections.abc import Callable
from pathlib import Path

from medmoe_edge.audit import AuditLog
from medmoe_edge.engine import load
from medmoe_edge.engine_loading import Device, RuntimeName
from medmoe_edge.modality_engine import load_modality
from medmoe_edge.prefix_cache import LastPrefix
from medmoe_edge.serve_app import create_app
from medmoe_edge.serve_server import run
from medmoe_edge.serve_settings import Settings


def start(
    settings: Settings,
    ready: Callable[[str], None],
    *,
    model: str = "nano",
    runtime: RuntimeName = "auto",
    device: Device = "auto",
    memory_budget: str | None = None,
    drop_pages: bool = False,
    modality_model: str = "modality-nano",
    audit: Path | None = None,
) -> None:
    """Serve until SIGTERM; `ready` is called with the URL. The errors of `load` and `run`."""
    settings.check_tls()
    engine = load(
        model,
        runtime=runtime,
        device=device,
        memory_budget=memory_budget,
        drop_pages=drop_pages,
    )
    engine.prefixes = LastPrefix(engine.sha256, engine.runtime)  # questions about an image follow
    modality = load_modality(modality_model)
    log = None if audit is None else AuditLog(audit)
    run(create_app(engine, settings, modality=modality, audit=log), settings, ready)
