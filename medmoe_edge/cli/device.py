"""The verbs that deploy: what a device can run, and what is installed to run it."""

from typing import Annotated, Literal

import typer

from medmoe_edge.cli.common import Json, verb
from medmoe_edge.cli.usage import complete_devices, complete_planned
from medmoe_edge.errors import InputError
from medmoe_edge.render import console as render
from medmoe_edge.render import device as render_device


@verb("doctor", "Deploy", "doctor")
def doctor(as_json: Json = False) -> None:
    """Show what is installed, which devices are usable, and what to install for what."""
    from medmoe_edge.device.doctor import examine

    found = examine()
    if as_json:
        render.as_json(found.to_json(), found.error())
    else:
        render_device.show_diagnosis(found)
    if error := found.error():
        raise error


@verb("plan", "Deploy", "plan med-moe-stablelm-1.6b --device orin-agx-64g")
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A bundle, checkpoint, preset or nano.",
            autocompletion=complete_planned,
        ),
    ] = "nano",
    *,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="A device's name, or here: this CPU, measured.",
            autocompletion=complete_devices,
        ),
    ],
    precision: Annotated[
        Literal["int8", "int4", "mixed", "fp16", "fp32"] | None,
        typer.Option(
            metavar="PRECISION",
            help="Only one: int8, int4, mixed, fp16 or fp32.",
            show_default="all",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --device here: run the bundle, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict memory, time to the first token and tokens per second; say what fits."""
    from medmoe_edge.device.estimate import plan as make
    from medmoe_edge.device.estimate import plan_and_measure
    from medmoe_edge.device.hardware import HERE

    if measure and (device != HERE or precision):
        raise InputError(
            "Measured is this machine, in the bundle's precision.",
            "Give --device here, and no --precision.",
        )
    comparison = None
    with render.working("Measuring"):
        if measure:
            found, comparison = plan_and_measure(model)
        else:
            found = make(model, device, precision)
    if as_json:
        told = comparison.to_json() if comparison else None
        render.as_json(found.to_json() | {"measured": told}, found.error())
    else:
        render_device.show_plan(found)
        if comparison:
            render_device.show_comparison(comparison)
    if error := found.error():
        raise error
