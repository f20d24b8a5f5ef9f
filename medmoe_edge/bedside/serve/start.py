"""From settings to a running service: the models are loaded, then requests are taken."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.serve.app import create_app
from medmoe_edge.bedside.serve.server import run
from medmoe_edge.bedside.serve.settings import Settings
from medmoe_edge.contrastive.engine import load_modality
from medmoe_edge.engine.engine import load
from medmoe_edge.engine.loading import Device, RuntimeName
from medmoe_edge.engine.prefix_cache import LastPrefix


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
