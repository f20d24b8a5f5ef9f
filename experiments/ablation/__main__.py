"""Train variants of a model's structure alike, and show what each part is worth.

Run it from a checkout, with the extra `train` installed:

    python -m experiments.ablation CHECKPOINT --data data -o OUT

An interrupted run is resumed by the same command.
"""

from pathlib import Path
from typing import Annotated

import typer

from experiments.ablation.results import show_ablation
from experiments.ablation.run import Options, ablate
from medmoe_edge.cli.common import Json
from medmoe_edge.errors import MedMoEError
from medmoe_edge.render import console
from medmoe_edge.training.recipe import read_recipe


def ablation(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Whose tower all variants have.")
    ],
    *,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of the files that the recipe names.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The folder; resumed if begun.")
    ],
    recipe: Annotated[str, typer.Option(help="Of the decoder and its training.")] = "nano",
    variant: Annotated[
        list[str] | None,
        typer.Option(help="One of several; the first is what the others are compared with."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of phase 2, for each.", show_default="the recipe's")
    ] = None,
    image_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an image.", show_default="the checkpoint's")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of all that is drawn.", show_default="the recipe's")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train variants of a model's structure alike, and show what each part is worth."""
    try:
        with console.bars() as bars:
            options = Options(variant or (), epochs, image_tokens, seed)
            found = ablate(read_recipe(recipe), checkpoint, data, output, options, bars)
    except MedMoEError as error:
        console.show(f"{error.what} {error.remedy}", "red", stderr=True)
        raise typer.Exit(error.exit_code) from error
    if as_json:
        console.as_json(found.to_json())
    else:
        show_ablation(found)


if __name__ == "__main__":
    typer.run(ablation)
