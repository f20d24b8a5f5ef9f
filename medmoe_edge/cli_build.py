"""The verbs that build: checkpoints, statistics, bundles, data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medmoe_edge import render, render_proof
from medmoe_edge.cli_app import (
    Checkpoint,
    Force,
    Json,
    Samples,
    Strict,
    VisionTower,
    check_output,
    verb,
)
from medmoe_edge.cli_errors import needs
from medmoe_edge.errors import InputError

if TYPE_CHECKING:
    from medmoe_edge.export.plan import Precision


@verb("export", "Build", "export --int8 --calibrate builtin")
def export(
    checkpoint: Checkpoint = "nano",
    int8: Annotated[bool, typer.Option("--int8", help="W8A8; the default.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="Groups of 32 weights.")] = False,
    mixed: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="So many bits a weight, spent where they matter."),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Not quantised.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images, a question file or builtin: to calibrate on, and to prove the result.",
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Statistics of: medmoe-edge calibrate; no proof."),
    ] = None,
    samples: Samples = 128,
    strict: Strict = False,
    method: Annotated[
        Literal["auto", "rtn"],
        typer.Option(help="auto: the best that the data allow; rtn: plain rounding."),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="The bundle.", show_default="NAME-PRECISION"
        ),
    ] = None,
    vision_tower: VisionTower = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle that answers without torch.

    With --calibrate it is verified before it appears: a failed gate leaves no bundle (exit 4).
    """
    with needs("export"):
        from medmoe_edge import pipeline
    from medmoe_edge.embedded import EMBEDDED, checkpoint_path

    given: dict[Precision, bool] = {
        "int8": int8,
        "int4": int4,
        "mixed": mixed is not None,
        "fp32": fp32,
    }
    chosen: list[Precision] = [name for name in given if given[name]]
    if len(chosen) > 1:
        raise InputError(f"--{' and --'.join(chosen)} exclude each other.", "Give one of them.")
    precision: Precision = chosen[0] if chosen else "int8"
    folder = checkpoint_path(checkpoint)
    name = checkpoint if checkpoint in EMBEDDED else folder.resolve().name
    with render.working("Reading") as report:
        made = pipeline.export(
            folder,
            output or Path(f"{name}-{precision}"),
            precision=precision,
            method=method,
            budget_bits=mixed,
            calibrate_on=calibrate,
            samples=samples,
            stats=stats,
            strict=strict,
            name=name,
            vision_tower=vision_tower,
            force=force,
            progress=report,
        )
    if as_json:
        found = made.verification.to_json() if made.verification else None
        bundle = {"bundle": str(made.bundle), "name": name, "precision": precision}
        render.as_json(bundle | {"verification": found})
        return
    if made.verification:
        render_proof.show_verification(made.verification)
    render.wrote("the bundle", made.bundle)
    if made.verification is None:
        render_proof.show_not_measured()


@verb("calibrate", "Build", "calibrate nano --data builtin -o nano.stats")
def calibrate(
    checkpoint: Checkpoint = "nano",
    *,
    data: Annotated[
        str, typer.Option(metavar="DATA", help="A folder of images, a question file or builtin.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="STATS", help="The file.")],
    samples: Samples = 128,
    hessians: Annotated[
        bool, typer.Option(help="Second moments, for GPTQ; much the largest part.")
    ] = True,
    strict: Strict = False,
    vision_tower: VisionTower = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Gather the statistics that quantisation needs; an interrupted run goes on where it was."""
    with needs("export"):
        from medmoe_edge import pipeline
        from medmoe_edge.calibration.run import calibrate as gather
        from medmoe_edge.checkpoint import read_checkpoint
    from medmoe_edge.embedded import checkpoint_path

    check_output(output, force)
    folder = checkpoint_path(checkpoint)
    with render.working("Reading") as report:
        source = pipeline.read_data(folder, data, vision_tower=vision_tower)
        statistics = gather(
            folder,
            source,
            output,
            samples=samples,
            hessians=hessians,
            strict=strict,
            vision_tower=vision_tower,
            force=force,
            progress=report,
        )
    if as_json:
        render.as_json({"statistics": str(output)} | statistics.summary())
    else:
        moe = read_checkpoint(folder, vision_tower=vision_tower).config.moe
        render_proof.show_coverage(statistics, moe.expert_names if moe else (), source.skipped)
        render.wrote("the statistics", output)


@verb("init", "Build", "init tiny my-tiny")
def init(
    preset: Annotated[
        str, typer.Argument(metavar="PRESET", help="tiny, nano or one of the published sizes.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    force: Force = False,
) -> None:
    """Write a random checkpoint in the official layout."""
    with needs("export"):
        from medmoe_edge.presets import initialise
    with render.working("Writing"):
        initialise(preset, out, seed, force)
    render.wrote("the checkpoint", out)


@verb("train", "Build", "train nano --data data -o run")
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="The name of a recipe, or its JSON file.")
    ] = "nano",
    *,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the files that the recipe names lie.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The run; resumed if begun.")
    ],
) -> None:
    """Train a model in Med-MoE's three phases, or go on where a run was interrupted."""
    with needs("train"):
        from medmoe_edge.training.recipe import read_recipe
        from medmoe_edge.training.run import train as train_model
    with render.bars() as bars:
        checkpoint = train_model(read_recipe(recipe), data, output, bars)
    render.wrote("the checkpoint", checkpoint)


@verb("data", "Build", "data slake Slake1.0.zip slake")
def data(
    dataset: Annotated[Literal["slake", "vqa-rad", "pathvqa"], typer.Argument(metavar="DATASET")],
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="The official download, a folder or zip.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder of JSONL and images to write.")
    ],
    force: Force = False,
) -> None:
    """Turn an official download into the question files that train and eval read."""
    from medmoe_edge.data_preparation import prepare

    with render.working("Preparing"):
        prepared = prepare(dataset, source, out, force=force)
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.questions.items())
    render.wrote(f"{counts} questions about {prepared.images:,} images to", prepared.folder)
