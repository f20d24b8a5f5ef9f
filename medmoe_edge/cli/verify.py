"""The verbs that prove: what a model is, how well it answers, what quantisation cost."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medmoe_edge.cli import contrastive_build as cli_modality_build
from medmoe_edge.cli.common import Device, Force, Json, Runtime, VisionTower, check_output, verb
from medmoe_edge.cli.errors import needs
from medmoe_edge.errors import InputError
from medmoe_edge.render import console as render
from medmoe_edge.render import contrastive_evaluation as render_modality_proof
from medmoe_edge.render import verification as render_proof

if TYPE_CHECKING:
    from collections.abc import Callable

    from medmoe_edge.evaluation.verify import Verification


@verb("eval", "Prove", "eval --data slake/test.jsonl")
def evaluate(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="A bundle, a checkpoint or an embedded model.")
    ] = "nano",
    *,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE|DIR",
            help="Questions: our JSONL or a LLaVA-style list. For a modality-moe the folder of "
            "labels.jsonl, vqa_val.jsonl and slake_boxes.json.",
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled images; those to train on are left out."),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Where to write every answer.")
    ] = None,
    runtime: Runtime = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score a model's answers with the papers' metrics and exact match.

    Of a modality-moe: how it routes, classifies, retrieves and locates.
    """
    import medmoe_edge
    from medmoe_edge.bundle.bundle import model_kind
    from medmoe_edge.data.datasets import read_examples, read_labels
    from medmoe_edge.evaluation import evaluate as evaluation

    if bundle == "modality-nano" or model_kind(Path(bundle)) == "modality-moe":
        cli_modality_build.refuse({"--labels": labels, "--predictions": predictions})
        _evaluate_modality(bundle, data, runtime, as_json)
        return
    if predictions:
        check_output(predictions, force)
    examples = read_examples(data)
    labelled = [item for item in read_labels(labels) if item.split != "train"] if labels else []
    with render.working("Loading") as report:
        engine = medmoe_edge.load(bundle, runtime=runtime, device=device)
        asked = evaluation.evaluate(engine, examples, progress=partial(report, "Questions"))
        found = (
            evaluation.evaluate_labels(engine, labelled, progress=partial(report, "Labels"))
            if labels
            else None
        )
    if predictions:
        evaluation.save_predictions(asked.predictions, predictions)
    if as_json:
        render.as_json(asked.to_json() | {"labels": dataclasses.asdict(found) if found else None})
    else:
        render.show_evaluation(asked, found)


def _evaluate_modality(model: str, data: Path, runtime: Runtime, as_json: bool) -> None:
    from medmoe_edge.contrastive.engine import load_modality
    from medmoe_edge.contrastive.evaluate import evaluate_modality

    if runtime == "tensorrt":
        raise InputError("A modality-moe does not run on tensorrt.", "Leave --runtime out.")
    with render.working("Loading") as report:
        engine = load_modality(model, runtime=runtime)
        found = evaluate_modality(engine, data, report)
    if as_json:
        render.as_json(found.to_json())
    else:
        render_modality_proof.show_modality_evaluation(found)


@verb("verify", "Prove", "verify nano --against nano --data builtin")
def verify(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle or nano.")] = "nano",
    *,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="What it was exported from: measures with DATA."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Questions: a JSONL file, a folder of images, builtin.",
            show_default="builtin",
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OTHER",
            help="Measured too, for comparison: another bundle, bitsandbytes-nf4 or -int8.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="A page with plots.")
    ] = None,
    targets: Annotated[
        Literal["all-available"] | None,
        typer.Option(help="Instead: do the graphs of every target compute the same on DATA?"),
    ] = None,
    vision_tower: VisionTower = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Check a bundle; with --against, measure what quantisation cost and record it in the bundle.

    A failed gate ends with exit code 4 and leaves the bundle marked: asking it warns.
    """
    from medmoe_edge.bundle.bundle import model_kind
    from medmoe_edge.embedded import bundle_path, checkpoint_path

    if targets is not None:
        _verify_targets(
            bundle, data or "builtin", as_json, others=bool(against or beside or report)
        )
        return
    if against is None and (data or beside):
        raise InputError(
            "--data and --beside measure against a checkpoint.", "Add --against CHECKPOINT."
        )
    folder = bundle_path(bundle)
    is_modality = model_kind(folder) == "modality-moe"
    if is_modality:
        given = {"--beside": beside, "--report": report, "--vision-tower": vision_tower}
        cli_modality_build.refuse(given)
    write_report = _report_writer(report, force)
    with render.working("Reading") as progress:
        if is_modality:
            checkpoint = None if against is None else checkpoint_path(against)
            found = cli_modality_build.verify_modality(
                folder, checkpoint, data or "builtin", progress
            )
        elif against is None:
            from medmoe_edge.evaluation.verify import verify as check

            found = check(folder, progress=progress)
        else:
            with needs("export"):
                from medmoe_edge import pipeline
            found = pipeline.verify(
                folder,
                checkpoint_path(against),
                data or "builtin",
                beside=beside or [],
                vision_tower=vision_tower,
                progress=progress,
            )
    write_report(found)
    if as_json:
        render.as_json(found.to_json())
    else:
        render_proof.show_verification(found)
        if report:
            render.wrote("the report", report)
    if error := found.error():
        raise error


def _verify_targets(bundle: str, data: str, as_json: bool, *, others: bool) -> None:
    from medmoe_edge.embedded import bundle_path

    if others:
        raise InputError(
            "--targets holds a bundle's targets against each other.",
            "Leave --against, --beside and --report out.",
        )
    with needs("rtx"):
        from medmoe_edge.pipeline_targets import agree
    with render.working("Reading") as progress:
        found = agree(bundle_path(bundle), data, progress=progress)
    if as_json:
        render.as_json({"bundle": bundle, "targets": [target.to_json() for target in found]})
    else:
        render_proof.show_agreement(found)


def _report_writer(path: Path | None, force: bool) -> "Callable[[Verification], None]":
    """Looks at once for what the page needs; writes nothing without a path."""
    if path is None:
        return lambda _: None
    check_output(path, force)
    from medmoe_edge.evaluation.report import write_report

    return partial(write_report, path=path)


@verb("ablate", "Prove", "ablate run --data data -o ablation")
def ablate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that train wrote.")],
    *,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the files that the recipe names lie.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The folder; resumed if begun.")
    ],
    recipe: Annotated[str, typer.Option(help="The recipe that made the run.")] = "nano",
    variant: Annotated[
        list[str] | None,
        typer.Option(help="One of several; the first is what the others are held against."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of phase 3, for each.", show_default="the recipe's")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train variants of a model's structure alike, and show what each part is worth."""
    with needs("train"):
        from medmoe_edge.evaluation import ablation
        from medmoe_edge.training.recipe import read_recipe
    with render.bars() as bars:
        found = ablation.ablate(
            read_recipe(recipe),
            run,
            data,
            output,
            variants=variant or ablation.ALL,
            epochs=epochs,
            progress=bars,
        )
    if as_json:
        render.as_json(found.to_json())
    else:
        render_proof.show_ablation(found)


@verb("inspect", "Prove", "inspect nano")
def inspect(
    model: Annotated[str, typer.Argument(metavar="PATH|nano", help="A bundle or a checkpoint.")],
    vision_tower: VisionTower = None,
    as_json: Json = False,
) -> None:
    """Show what is in a checkpoint or bundle: structure, parameters, sizes."""
    from medmoe_edge.bundle.bundle import model_kind
    from medmoe_edge.embedded import bundle_path
    from medmoe_edge.evaluation.inspection import inspect_model

    if model_kind(folder := bundle_path(model)) == "modality-moe":
        cli_modality_build.inspect_modality(folder, as_json)
        return
    inspection = inspect_model(folder, vision_tower=vision_tower)
    if as_json:
        render.as_json(inspection.to_json())
    else:
        render.show_inspection(inspection)
