"""The verbs that make a checkpoint and its data: `init`, `train` and `data`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medmoe_edge.cli.common import Force, verb
from medmoe_edge.cli.usage import complete_presets
from medmoe_edge.errors import InputError, needs
from medmoe_edge.render import console as render

SHIPPED_RECIPES = {"med-moe": "nano", "modality-moe": "modality-nano"}


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
            help="The name of a recipe, or its JSON file.",
            show_default="that of the model",
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
        Path, typer.Option(metavar="DIR", help="Where the files that the recipe names lie.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The run; resumed if begun.")
    ],
) -> None:
    """Train a model by a recipe, or go on where a run was interrupted.

    A med-moe learns to answer questions, a modality-moe to match images with texts.
    """
    with needs("train"):
        from medmoe_edge.training.contrastive import (
            is_modality_recipe,
            read_modality_recipe,
            train_modality,
        )
        from medmoe_edge.training.recipe import read_recipe
        from medmoe_edge.training.run import train as train_model
    recipe = recipe or SHIPPED_RECIPES[model or "med-moe"]
    of_modalities = is_modality_recipe(recipe)
    if model and of_modalities != (model == "modality-moe"):
        raise InputError(
            f"The recipe {recipe!r} is not of a {model}.", "Leave --model out: the recipe says it."
        )
    with render.bars() as bars:
        if of_modalities:
            checkpoint = train_modality(read_modality_recipe(recipe), data, output, bars)
        else:
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
    from medmoe_edge.data.prepare import prepare

    with render.working("Preparing"):
        prepared = prepare(dataset, source, out, force=force)
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.questions.items())
    render.wrote(f"{counts} questions about {prepared.images:,} images to", prepared.folder)
