"""The command line: each verb parses, calls one function of the library and prints.

Start-up is part of answering, so whatever only one verb needs is imported inside that verb.
"""

import dataclasses
import io
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medmoe_edge import __version__, render
from medmoe_edge.cli_errors import Commands, log_to_stderr, needs
from medmoe_edge.errors import InputError

app = typer.Typer(
    name="medmoe-edge",
    cls=Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the `medmoe-edge` command."""
    if not sys.warnoptions:  # meant for programmers, who can turn them on with python -W
        warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack a question's letters
        sys.stdout.reconfigure(errors="replace")
    app()


def _verb(name: str, panel: str, example: str) -> Callable[..., Any]:
    return app.command(name, rich_help_panel=panel, epilog=f"Example: medmoe-edge {example}")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medmoe-edge {__version__}")
        raise typer.Exit


@app.callback()
def _medmoe_edge(
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress, no warnings: results and errors.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Tell what is done; errors with traceback.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Med-MoE at the bedside: questions about medical images, answered by an edge device.

    For research only; not a medical device. -q and -v may stand anywhere.
    """
    log_to_stderr("DEBUG" if verbose else "ERROR" if quiet else "WARNING")


Runtime = Annotated[
    Literal["auto", "onnxruntime", "torch"], typer.Option(help="What runs the model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is already there.")]
VisionTower = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The vision tower, if the checkpoint holds none."),
]


@_verb("ask", "Ask", 'ask scan.png "Is there effusion?"')
def ask(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG, TIFF, DICOM or NIfTI.")
    ],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="One or more.")],
    model: Annotated[str, typer.Option(help="A bundle, a checkpoint or nano.")] = "nano",
    runtime: Runtime = "auto",
    frame: Annotated[
        int | None, typer.Option(min=0, help="Frame or slice, from 0.", show_default="the middle")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    as_json: Json = False,
) -> None:
    """Answer questions about one image."""
    import medmoe_edge

    with render.working("Answering"):
        engine = medmoe_edge.load(model, runtime=runtime)
        answers = engine.ask_all(image, questions, max_new_tokens=max_new_tokens, frame=frame)
    if as_json:
        render.as_json({"answers": [answer.to_json() for answer in answers]})
    else:
        render.show_answers(answers)
    for notice in dict.fromkeys(answer.notice for answer in answers):
        render.show(notice, "yellow", stderr=True)


@_verb("export", "Build", "export --int8")
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder or nano.")
    ] = "nano",
    int8: Annotated[bool, typer.Option("--int8/--fp32", help="How weights are stored.")] = True,
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
    """Turn a checkpoint into a bundle that answers without torch."""
    with needs("export"):
        from medmoe_edge.export.build import export_bundle
    from medmoe_edge.embedded import EMBEDDED, checkpoint_path

    folder = checkpoint_path(checkpoint)
    name = checkpoint if checkpoint in EMBEDDED else folder.resolve().name
    precision: Literal["int8", "fp32"] = "int8" if int8 else "fp32"
    with render.working("Reading") as report:
        bundle = export_bundle(
            folder,
            output or Path(f"{name}-{precision}"),
            precision=precision,
            name=name,
            vision_tower=vision_tower,
            force=force,
            progress=report,
        )
    if as_json:
        render.as_json({"bundle": str(bundle), "name": name, "precision": precision})
    else:
        render.wrote("the bundle", bundle)


@_verb("init", "Build", "init tiny my-tiny")
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


@_verb("train", "Build", "train nano --data data -o run")
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


@_verb("data", "Build", "data slake Slake1.0.zip slake")
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


@_verb("eval", "Prove", "eval --data slake/test.jsonl")
def evaluate(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="A bundle, a checkpoint or nano.")
    ] = "nano",
    *,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="Questions: our JSONL or a LLaVA-style list.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled images; those to train on are left out."),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Where to write every answer.")
    ] = None,
    runtime: Runtime = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score a model's answers with the papers' metrics and exact match."""
    import medmoe_edge
    from medmoe_edge import evaluate as evaluation
    from medmoe_edge.datasets import read_examples, read_labels

    if predictions:
        _check_output(predictions, force)
    examples = read_examples(data)
    labelled = [item for item in read_labels(labels) if item.split != "train"] if labels else []
    with render.working("Loading") as report:
        engine = medmoe_edge.load(bundle, runtime=runtime)
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


@_verb("inspect", "Prove", "inspect nano")
def inspect(
    model: Annotated[str, typer.Argument(metavar="PATH|nano", help="A bundle or a checkpoint.")],
    vision_tower: VisionTower = None,
    as_json: Json = False,
) -> None:
    """Show what is in a checkpoint or bundle: structure, parameters, sizes."""
    from medmoe_edge.embedded import bundle_path
    from medmoe_edge.inspection import inspect_model

    inspection = inspect_model(bundle_path(model), vision_tower=vision_tower)
    if as_json:
        render.as_json(inspection.to_json())
    else:
        render.show_inspection(inspection)


def _check_output(file: Path, force: bool) -> None:
    """Before the work rather than after it."""
    if file.exists() and not force:
        raise InputError(f"{file} exists.", "Choose another name, or add --force.")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is not a folder.", "Make it first, or choose another.")
