"""The verb that measures what answering costs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmoe_edge import render, render_bench
from medmoe_edge.cli_app import Force, Json, check_output, verb
from medmoe_edge.cli_errors import needs
from medmoe_edge.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from medmoe_edge.bench_result import Bench


@verb("bench", "Prove", "bench nano --rounds 3")
def bench(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle or nano.")] = "nano",
    *,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Beside it: PyTorch, bitsandbytes, fp32 ONNX Runtime, llama.cpp."
        ),
    ] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="What peers load: what the bundle was exported from.",
            show_default="random weights of its shapes",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of all that is measured.")] = 5,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="A picture: cost against prompt length."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure speed and memory on this machine; the last line is a JSON object.

    With --json nothing else is printed.
    """
    from medmoe_edge.bench import bench as measure

    if checkpoint is not None and not peers:
        raise InputError("Only peers load a checkpoint.", "Add --peers.")
    write_plot = _plotter(plot, force)
    with render.working("Starting") as progress:
        found = measure(
            bundle, rounds=rounds, peers=peers, checkpoint=checkpoint, progress=progress
        )
    write_plot(found)
    if not as_json:
        render_bench.show_bench(found)
        if plot:
            render.wrote("the plot", plot)
    render.as_json(found.to_json())


def _plotter(path: Path | None, force: bool) -> "Callable[[Bench], None]":
    """Looks at once for what the picture needs; writes nothing without a path."""
    if path is None:
        return lambda _: None
    check_output(path, force)
    with needs("export"):
        from medmoe_edge import bench_plot
    bench_plot.check_format(path)
    return partial(bench_plot.write_plot, file=path)
