"""From settings to a running service: the models are loaded, then requests are taken."""

import logging
from collections.abc import Callable
from pathlib import Path

from medmoe_edge.audit import AuditLog
from medmoe_edge.engine import load
from medmoe_edge.engine_loading import Device, RuntimeName
from medmoe_edge.errors import ModelError
from medmoe_edge.modality_engine import ModalityEngine, load_modality
from medmoe_edge.prefix_cache import LastPrefix
from medmoe_edge.serve_app import create_app
from medmoe_edge.serve_server import run
from medmoe_edge.serve_settings import Settings

EMBEDDED_MODALITY = "modality-nano"

logger = logging.getLogger(__name__)


def start(
    settings: Settings,
    ready: Callable[[str], None],
    *,
    model: str = "nano",
    runtime: RuntimeName = "auto",
    device: Device = "auto",
    memory_budget: str | None = None,
    modality_model: str | None = None,
    audit: Path | None = None,
) -> None:
    """Serve until SIGTERM; `ready` is called with the URL. The errors of `load` and `run`."""
    settings.check_tls()
    engine = load(model, runtime=runtime, device=device, memory_budget=memory_budget)
    engine.prefixes = LastPrefix(engine.sha256, engine.runtime)  # questions about an image follow
    modality = _modality(modality_model)
    log = None if audit is None else AuditLog(audit)
    run(create_app(engine, settings, modality=modality, audit=log), settings, ready)


def _modality(model: str | None) -> ModalityEngine | None:
    """The model that was named, or the embedded one where it can be had."""
    if model is not None:
        return load_modality(model)
    try:
        return load_modality(EMBEDDED_MODALITY)
    except ModelError as error:
        logger.warning("Nothing classifies and locates here. %s", error)
        return None
