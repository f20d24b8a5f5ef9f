"""From settings to a running service: the models are loaded, then requests are taken."""

from collections.abc import Callable
from pathlib import Path

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.app import create_app
from medmoe_edge.bedside.serve.server import run
from medmoe_edge.bedside.serve.settings import Settings
from medmoe_edge.contrastive.engine import load_modality
from medmoe_edge.engine.engine import load
from medmoe_edge.engine.loading import Device, RuntimeName
from medmoe_edge.engine.prefix_cache import LastPrefix


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
