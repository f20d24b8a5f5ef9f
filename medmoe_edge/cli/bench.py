"""The verb that measures what answering costs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medmoe_edge.cli.common import Force, Json, check_output, verb
from medmoe_edge.cli.errors import needs
from medmoe_edge.errors import InputError
from medmoe_edge.render import bench as render_bench
from medmoe_edge.render import bench_memory as render_bench_memory
from medmoe_edge.render import console as render

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from medmoe_edge.bench.asking import Asking
    from medmoe_edge.bench.result import Bench

    Way = tuple[Callable[..., Any], Callable[[Any], None]]  # how to measure, how to show it


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
    peer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="What peers load: what the bundle was exported from.",
            show_default="random weights of its shapes",
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="All under a limit: the bundle paged, llama.cpp mapped."),
    ] = None,
    paging: Annotated[
        bool, typer.Option("--paging", help="Experts paged at several budgets.")
    ] = False,
    soak: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="So many questions: does memory grow?"),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What experts may take, for --paging or --soak: 1500MB, or 50% of them all.",
            show_default="four from 100% to 25%, or 50% for a soak",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Questions with modalities, to page by the model's own routing.",
            show_default="noise, and routing that is made to follow",
        ),
    ] = None,
    follow: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the tokens that such routing moves.")
    ] = 1.0,
    drop_pages: Annotated[
        bool,
        typer.Option("--drop-pages", help="With --paging or --soak: experts come from storage."),
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of all that is measured; fewer of what takes long.")
    ] = 5,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="A picture: cost against prompt length."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure speed and memory on this machine; the last line is a JSON object.

    With --json nothing else is printed. --memory-limit, --paging and --soak measure that alone.
    """
    beside, routed = bool(peers or peer), paging or soak is not None
    _refuse_both(
        {"--memory-limit": memory_limit, "--paging": paging, "--soak": soak, "--plot": plot}
    )
    _refuse_useless("--peers or --memory-limit", beside or memory_limit, checkpoint=checkpoint)
    _refuse_useless(
        "--paging or --soak",
        routed,
        memory_budget=memory_budget,
        data=data,
        follow=follow < 1,
        drop_pages=drop_pages,
    )
    if beside and routed:
        raise InputError("Peers page no experts.", "Leave them out, or use --memory-limit.")
    write_plot = _plotter(plot, force)
    if paging:
        measure, show = _paging(memory_budget, _asking(data, follow, drop_pages), rounds)
    elif soak is not None:
        measure, show = _soak(soak, memory_budget, _asking(data, follow, drop_pages))
    elif memory_limit is not None:
        measure, show = _limited(memory_limit, peer or (), checkpoint, rounds)
    else:
        measure, show = _speed(peer or (), peers, checkpoint, rounds)
    with render.working("Starting") as progress:
        found = measure(bundle, progress=progress)
    write_plot(found)
    if not as_json:
        show(found)
        if plot:
            render.wrote("the plot", plot)
    render.as_json(found.to_json())


def _speed(names: "Sequence[str]", every: bool, checkpoint: str | None, rounds: int) -> "Way":
    from medmoe_edge.bench.peers import PEERS, find_peers
    from medmoe_edge.bench.run import bench as measure

    peers = find_peers(names) if names or not every else PEERS
    run = partial(measure, peers=peers, checkpoint=checkpoint, rounds=rounds)
    return run, render_bench.show_bench


def _limited(limit: str, names: "Sequence[str]", checkpoint: str | None, rounds: int) -> "Way":
    from medmoe_edge.bench.limited import MAPPED, bench_limited
    from medmoe_edge.bench.peers import find_peers
    from medmoe_edge.device.devices import memory_here
    from medmoe_edge.runtimes.paging.prediction import budget_bytes

    peers = find_peers(names or MAPPED)
    run = partial(
        bench_limited,
        limit=budget_bytes(limit, memory_here()),
        peers=peers,
        checkpoint=checkpoint,
        rounds=rounds,
    )
    return run, render_bench_memory.show_limited


def _paging(budget: str | None, asking: "Asking", rounds: int) -> "Way":
    from medmoe_edge.bench.paging import BUDGETS, bench_paging

    budgets = (budget,) if budget else BUDGETS
    run = partial(bench_paging, budgets=budgets, asking=asking, rounds=rounds)
    return run, render_bench_memory.show_paging


def _soak(questions: int, budget: str | None, asking: "Asking") -> "Way":
    from medmoe_edge.bench.soak import BUDGET, soak

    run = partial(soak, questions=questions, budget=budget or BUDGET, asking=asking)
    return run, render_bench_memory.show_soak


def _asking(data: Path | None, follow: float, drop_pages: bool) -> "Asking":
    from medmoe_edge.bench.asking import Asking

    return Asking(None if data is None else str(data.resolve()), follow, drop_pages)


def _refuse_both(options: "Mapping[str, object]") -> None:
    given = [name for name, value in options.items() if value]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} do not go together.", "Give one of them.")


def _refuse_useless(needed: str, there: object, **options: object) -> None:
    for name, value in options.items():
        if value and not there:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is for {needed}.", f"Leave it out, or add {needed}.")


def _plotter(path: Path | None, force: bool) -> "Callable[[Bench], None]":
    """Looks at once for what the picture needs; writes nothing without a path."""
    if path is None:
        return lambda _: None
    check_output(path, force)
    with needs("export"):
        from medmoe_edge.bench import plot as bench_plot
    bench_plot.check_format(path)
    return partial(bench_plot.write_plot, file=path)
