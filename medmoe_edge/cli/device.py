"""The verbs that deploy: what a device can run, and what is installed to run it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medmoe_edge.cli.common import Force, Json, verb
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
            help="A device's name, a file that describes one, or here: this CPU, measured.",
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
    group_size: Annotated[
        int, typer.Option(help="Of int4: 32, 64 or 128 weights share a scale.")
    ] = 32,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the prompt, the image's included.", show_default="the image's and 48"
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 32,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Propose the most exact form that answers within --latency."),
    ] = False,
    latency: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="With --fit: of a whole answer.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --device here: run the bundle, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict memory, time to the first token and tokens per second; say what fits.

    A device of your own is described in TOML or JSON: kind, memory_gb, bandwidth_gb_s, int8_tops,
    fp16_tops.
    """
    from medmoe_edge.device.estimate import PlanOptions, plan_and_measure
    from medmoe_edge.device.estimate import fit as find_fit
    from medmoe_edge.device.estimate import plan as make
    from medmoe_edge.device.hardware import HERE

    if measure and (device != HERE or precision):
        raise InputError(
            "Measured is this machine, in the bundle's precision.",
            "Give --device here, and no --precision.",
        )
    if fit != (latency is not None) or (fit and (measure or precision)):
        raise InputError(
            "--fit needs --latency, and chooses the precision itself.",
            "Give --fit --latency SECONDS, without --precision and --measure.",
        )
    if group_size not in (32, 64, 128):
        raise InputError(f"There are no groups of {group_size}.", "Use 32, 64 or 128.")
    options = PlanOptions(device, precision, group_size, prompt_tokens, new_tokens)
    if latency is not None:
        with render.working("Measuring"):
            proposed = find_fit(model, options, latency)
        if as_json:
            render.as_json(proposed.to_json())
        else:
            render_device.show_fit(proposed)
        if error := proposed.error():
            raise error
        return
    comparison = None
    with render.working("Measuring"):
        if measure:
            found, comparison = plan_and_measure(model)
        else:
            found = make(model, options)
    if as_json:
        told = comparison.to_json() if comparison else None
        render.as_json(found.to_json() | {"measured": told}, found.error())
    else:
        render_device.show_plan(found)
        if comparison:
            render_device.show_comparison(comparison)
    if error := found.error():
        raise error


@verb("prove", "Deploy", "prove -o proof")
def prove(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A new folder for proof.json and proof.html."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run every GPU path of this package here, each against something independent.

    A path passes, fails or is not run, with the reason; without a CUDA device none is proven, and
    what stands in for it is named. Ends within 8 minutes, and needs no network.
    """
    from medmoe_edge.atomic import check_target
    from medmoe_edge.device.prove import RECORD
    from medmoe_edge.device.prove import prove as run

    if output is not None:
        check_target(output, force=force, marker=RECORD)
    with render.working("Proving") as progress:
        found = run(progress)
    if output is not None:
        render_device.write_proof(found, output, force=force)
    if as_json:
        render.as_json(found.to_json(), found.error())
    else:
        render_device.show_proof(found)
        if output is not None:
            render.wrote("the proof", output)
    if error := found.error():
        raise error
