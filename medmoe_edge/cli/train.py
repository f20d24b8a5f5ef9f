"""The verbs that make a checkpoint and its data: `init`, `train`, `router` and `data`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medmoe_edge.cli.common import (
    Force,
    Json,
    VisionTower,
    app,
    complete_presets,
    tell,
    verb,
    words,
)
from medmoe_edge.embedded import checkpoint_path
from medmoe_edge.errors import InputError, needs
from medmoe_edge.render import console as render

if TYPE_CHECKING:
    from medmoe_edge.data.folder import Prepared
    from medmoe_edge.training.router import RouterResult

SHIPPED_RECIPES = {"med-moe": "nano", "modality-moe": "modality-nano"}
FINE_TUNE = "fine-tune"


@verb("init", "Build", "init tiny my-tiny")
def init(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            help="tiny, nano or one of the published sizes.",
            autocompletion=complete_presets,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    force: Force = False,
) -> None:
    """Write a random checkpoint in the official layout, to export and try things with.

    Its tokenizer is a stand-in that makes every byte a token, and says so in every answer: copy the
    model's own tokenizer.json over it before weights that were trained.
    """
    with needs("export"):
        from medmoe_edge.training.initialise import initialise
    with render.working("Writing"):
        initialise(preset, out, seed, force)
    render.wrote("the checkpoint", out)


@verb("train", "Build", "train nano --data data -o run")
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="The name of a recipe, or its TOML or JSON file.",
            show_default="that of the model; fine-tune with --from",
        ),
    ] = None,
    *,
    model: Annotated[
        Literal["med-moe", "modality-moe"] | None,
        typer.Option(
            help="Whose own recipe to use, where none is given: nano or modality-nano.",
            show_default="med-moe",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR|FILE", help="A dataset folder, or a file of questions alone."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="The run; resumed if begun."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--from", metavar="CHECKPOINT", help="Go on from its weights and tokenizer."),
    ] = None,
    vision_tower: VisionTower = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"] | None,
        typer.Option(help="auto: what this processor does faster.", show_default="the recipe's"),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="RANK",
            help="Train LoRA adapters in place of the decoder's matrices: far less memory.",
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write logs for TensorBoard too.")
    ] = False,
    show_recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Instead: print a recipe as TOML, with comments."),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Instead: print how far the run in this folder is."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model by a recipe, or go on where a run was interrupted.

    A med-moe learns to answer questions, a modality-moe to match images with texts. With --from a
    med-moe goes on from a checkpoint: its experts become those of the modalities in the data.
    """
    if show_recipe is not None or watch is not None:
        others = (recipe, model, data, output, base, vision_tower, precision, lora, tensorboard)
        if (show_recipe and watch) or any(others):
            raise InputError(
                "--show-recipe and --watch print, and train nothing.", "Give one of them alone."
            )
        _tell(show_recipe, watch, as_json)
        return
    if data is None or output is None:
        missing = "--data" if data is None else "--output"
        raise InputError(f"{missing} was not given.", "See: medmoe-edge train --help")
    with needs("train"):
        from medmoe_edge.training.contrastive import (
            is_modality_recipe,
            read_modality_recipe,
            train_modality,
        )
        from medmoe_edge.training.recipe import read_recipe
        from medmoe_edge.training.report import TrainOptions
        from medmoe_edge.training.run import train as train_model
    recipe = recipe or (FINE_TUNE if base else SHIPPED_RECIPES[model or "med-moe"])
    of_modalities = is_modality_recipe(recipe)
    if model and of_modalities != (model == "modality-moe"):
        raise InputError(
            f"The recipe {recipe!r} is not of a {model}.", "Leave --model out: the recipe says it."
        )
    given = {"--from": base, "--lora": lora, "--vision-tower": vision_tower}
    unfit = next((name for name, value in given.items() if of_modalities and value), None)
    if unfit:
        raise InputError(f"{unfit} does not go with a modality-moe model.", "Leave it out.")
    with render.bars() as bars:
        options = TrainOptions(
            base=checkpoint_path(base) if base else None,
            vision_tower=vision_tower,
            precision=precision,
            lora_rank=lora,
            tensorboard=tensorboard,
            say=lambda line: render.line_above(bars, line),
        )
        if of_modalities:
            found = read_modality_recipe(recipe)
            checkpoint = train_modality(found, data, output, bars, options)
        else:
            checkpoint = train_model(read_recipe(recipe), data, output, bars, options)
    told = {"checkpoint": str(checkpoint)}
    tell(told, as_json, lambda _: render.wrote("the checkpoint", checkpoint))


def _tell(name: str | None, run: Path | None, as_json: bool) -> None:
    """A recipe, or how far a run is."""
    with needs("train"):
        from medmoe_edge.training.contrastive import is_modality_recipe, read_modality_recipe
        from medmoe_edge.training.recipe import as_toml, read_recipe
        from medmoe_edge.training.report import read_log
    if name is not None:
        found = read_modality_recipe(name) if is_modality_recipe(name) else read_recipe(name)
        tell(found, as_json, lambda recipe: typer.echo(as_toml(recipe), nl=False))
    if run is not None:
        rows = read_log(run)
        told = {"epochs": rows, "finished": (run / "checkpoint").is_dir()}
        tell(told, as_json, lambda told: render.show_run(rows, finished=told["finished"]))


router = typer.Typer(no_args_is_help=True)
app.add_typer(
    router,
    name="router",
    rich_help_panel="Build",
    help="Put a router into a checkpoint: from an official file, or fitted to labelled images.",
    epilog="Example: medmoe-edge router train CHECKPOINT --data data",
)
Order = Annotated[
    str | None,
    typer.Option(
        "--modalities",
        metavar="A,B,...",
        help="The order of the file's rows, which it does not say: mri,ct,pathology,xray.",
    ),
]
Copy = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="OUT",
        help="Write a copy with the new router.",
        show_default="the checkpoint itself is changed",
    ),
]
Changed = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.")]


@router.command("import", epilog="Example: medmoe-edge router import phi_router.pth CHECKPOINT")
def router_import(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="phi_router.pth or stablelm_router.pth.")
    ],
    checkpoint: Changed,
    modalities: Order = None,
    output: Copy = None,
    vision_tower: VisionTower = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Put an official router file into every layer of a checkpoint that holds experts.

    No code in the file is run.
    """
    with needs("train"):
        from medmoe_edge.training.router import import_into

    with render.working("Writing"):
        result = import_into(
            file,
            checkpoint_path(checkpoint),
            modalities=words(modalities),
            out=output,
            vision_tower=vision_tower,
            force=force,
        )
    if not result.modalities:
        render.hint("Nobody said whose expert is which: name them with --modalities.")
    tell(result, as_json, _show_router)


@router.command("train", epilog="Example: medmoe-edge router train CHECKPOINT --data data")
def router_train(
    checkpoint: Changed,
    *,
    data: Annotated[
        Path, typer.Option(metavar="DIR|FILE", help="Labelled images, or a dataset folder.")
    ],
    output: Copy = None,
    vision_tower: VisionTower = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit the router of a checkpoint to labelled images alone; nothing else changes."""
    with needs("train"):
        from medmoe_edge.training.router import train_router

    with render.working("Reading images") as report:
        result = train_router(
            checkpoint_path(checkpoint),
            data,
            out=output,
            vision_tower=vision_tower,
            force=force,
            progress=report,
        )
    tell(result, as_json, _show_router)


def _show_router(result: "RouterResult") -> None:
    if result.modalities:
        render.show(f"Experts: {', '.join(result.modalities)}")
    if result.accuracy is not None:
        of = f"{result.held_out} held-out images" if result.held_out else "the images it learned"
        render.show(f"The modality is found in {render.percent(result.accuracy)} of {of}.")
    render.wrote("the router into", result.checkpoint)


@verb("data", "Build", "data slake Slake1.0.zip data")
def data(
    what: Annotated[
        Literal["slake", "vqa-rad", "pathvqa", "labels", "questions"],
        typer.Argument(metavar="WHAT", help="What SOURCE is."),
    ],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="The official download; for labels a folder of images or a CSV file; for "
            "questions a JSONL file or a LLaVA-style list.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="The dataset folder, to which the set is added."),
    ],
    lang: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Languages of slake: en, zh.", show_default="en"),
    ] = None,
    as_published: Annotated[
        bool,
        typer.Option("--as-published", help="Keep official splits even where they share pictures."),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Of the set, of labels and questions.", show_default="the file's"),
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"] | None,
        typer.Option(
            help="Of all labels or questions.", show_default="a tenth each to val and test"
        ),
    ] = None,
    modality: Annotated[str | None, typer.Option(help="Of all labelled images.")] = None,
    body: Annotated[str | None, typer.Option(help="Of all labelled images.")] = None,
    finding: Annotated[str | None, typer.Option(help="Of all labelled images.")] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="What the sub-folders of labels mean: split, modality, body, finding, patient, -.",
            show_default="modality, finding",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add a set to a dataset folder, which train, eval and calibrate read.

    Sets merge; --force replaces the one of the same name. No picture and no patient is in two
    splits: what is held out to test on is not learned from.
    """
    from medmoe_edge.data.folder import LabelOptions, add_labels
    from medmoe_edge.data.prepare import add_questions, prepare

    official = {"--lang": lang, "--as-published": as_published}
    own = {"--name": name, "--split": split}
    labelling = {"--modality": modality, "--body": body, "--finding": finding, "--levels": levels}
    others = {"labels": official, "questions": official | labelling}.get(what, own | labelling)
    for option, value in others.items():
        if value:
            raise InputError(f"{option} does not go with {what}.", "Leave it out.")
    with render.working("Preparing"):
        if what == "labels":
            from medmoe_edge.image.loading import dicom_origin

            options = LabelOptions(name, modality, body, finding, split, words(levels))
            prepared = add_labels(source, out, options, header=dicom_origin, force=force)
        elif what == "questions":
            prepared = add_questions(source, out, name=name, split=split, force=force)
        else:
            prepared = prepare(
                what,
                source,
                out,
                languages=words(lang) or ("en",),
                as_published=as_published,
                force=force,
            )
    tell(prepared, as_json, _show_prepared)


def _show_prepared(prepared: "Prepared") -> None:
    if prepared.left_out:
        render.show(
            f"Left out: {prepared.left_out:,} questions whose picture or patient is held out in "
            "another split."
        )
    if prepared.modalities:
        counts = ", ".join(f"{name} {count:,}" for name, count in prepared.modalities.items())
        render.show(f"Modalities: {counts}")
    told = [f"{count:,} {split} questions" for split, count in prepared.questions.items()]
    told += [f"{count:,} {split} labels" for split, count in prepared.labels.items()]
    render.wrote(f"{', '.join(told)} about {prepared.images:,} images to", prepared.folder)
