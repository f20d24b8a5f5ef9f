"""The verb `listen`: a DICOM node that answers configured questions."""

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.cli.common import Device, Json, Runtime, verb
from medmoe_edge.cli.errors import needs
from medmoe_edge.errors import MedMoEError
from medmoe_edge.render import console as render

if TYPE_CHECKING:
    from medmoe_edge.bedside.listen.config import Configuration
    from medmoe_edge.bedside.listen.report_picture import Locator


@verb("listen", "Deploy", "listen --config listen.toml")
def listen(
    config: Annotated[Path, typer.Option(metavar="FILE", help="Its configuration, TOML or JSON.")],
    runtime: Runtime = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Receive DICOM images, answer configured questions, send reports on.

    It ends on SIGTERM or Ctrl-C, after the work at hand; what waits is done after the next start.
    """
    with needs("listen"):
        from medmoe_edge.bedside.listen.config import load_configuration
        from medmoe_edge.bedside.listen.node import Node
    import medmoe_edge

    configuration = load_configuration(config)
    with render.working("Loading"):
        engine = medmoe_edge.load(
            configuration.model,
            runtime=runtime,
            device=device,
            memory_budget=configuration.memory_budget,
            drop_pages=configuration.drop_pages,
        )
        locator = _locator(configuration)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Node(configuration, engine, locator) as node:
        place = {"ae_title": configuration.ae_title, "host": configuration.host, "port": node.port}
        if as_json:
            render.as_json(place)
            sys.stdout.flush()
        else:
            render.show("{ae_title} listens on {host}, port {port}.".format(**place))
        render.show(NOTICE, "yellow", stderr=True)
        stop.wait()


def _locator(configuration: "Configuration") -> "Locator | None":
    """What draws heat maps, if they are wanted and it can be had."""
    if "heat-map" not in configuration.documents:
        return None
    from medmoe_edge.contrastive.engine import load_modality

    try:
        return load_modality(configuration.heat_map_model)
    except MedMoEError as error:
        render.show(f"No heat maps: {error.what}", "yellow", stderr=True)
        return None
