"""The verb `batch`: questions to a whole archive, on this machine or on a cluster."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmoe_edge.cli.common import Device, Force, Json, MemoryBudget, Runtime, check_output, verb
from medmoe_edge.cli.errors import needs
from medmoe_edge.errors import InputError
from medmoe_edge.render import console as render

if TYPE_CHECKING:
    from medmoe_edge.bedside.batch.asking import Answering, Recipe
    from medmoe_edge.bedside.batch.run import BatchReport


@verb("batch", "Deploy", "batch scans --questions questions.txt -o results.parquet")
def batch(
    inputs: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|CSV",
            help="All files of a folder, or a table: image, perhaps question.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PARQUET", help="The file to write.")
    ],
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One on a line.", show_default="those of the table"),
    ] = None,
    model: Annotated[str, typer.Option(help="A bundle, a checkpoint or nano.")] = "nano",
    runtime: Runtime = "auto",
    device: Device = "auto",
    memory_budget: MemoryBudget = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="On a Ray cluster: HOST:PORT, or local for processes of this machine.",
            show_default="in this process",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Engines on the cluster.", show_default="one a machine"),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Answer questions about all images of an archive, one row for each.

    Interrupted, the same command goes on where it ended. An image that cannot be read has a row
    that says so. On a cluster, paths must lead to the same files on every machine.
    """
    check_output(output, force)
    if workers and ray is None:
        raise InputError("Workers are of a cluster.", "Name one: --ray ADDRESS, or --ray local.")
    with needs("batch"):
        from medmoe_edge.bedside.batch.asking import Recipe
        from medmoe_edge.bedside.batch.run import run_batch
    recipe = Recipe(model, runtime, device, memory_budget, max_new_tokens)
    try:
        with render.working("Loading") as progress, _place(ray, recipe, workers) as answering:
            report = run_batch(
                *(inputs, output, questions),
                recipe=recipe,
                answering=answering,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        render.show("What is done is kept: the same command goes on.", stderr=True)
        raise
    if as_json:
        render.as_json(report.to_json())
    else:
        _show(report)
    render.show(report.notice, "yellow", stderr=True)


def _place(
    ray: str | None, recipe: "Recipe", workers: int | None
) -> contextlib.AbstractContextManager["Answering"]:
    """Where the engines are."""
    if ray is None:
        from medmoe_edge.bedside.batch.asking import Here

        return contextlib.nullcontext(Here(recipe))
    with needs("ray"):
        from medmoe_edge.bedside.batch.cluster import OnRay
    return OnRay(ray, recipe, workers)


def _show(report: "BatchReport") -> None:
    rows = [
        ("images", f"{report.images:,}"),
        ("  done by earlier runs", f"{report.resumed:,}"),
        ("rows", f"{report.rows:,}"),
        ("  without an answer", f"{report.errors:,}"),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    render.show_table("", ["", ""], rows)
    render.wrote("the answers", Path(report.output))
