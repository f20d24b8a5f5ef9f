"""The verbs about a machine: what answering costs on it, what it has, and what would fit it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medmoe_edge.cli.common import (
    BundleArgument,
    Force,
    Json,
    complete_devices,
    complete_planned,
    tell,
    verb,
)
from medmoe_edge.errors import InputError, needs
from medmoe_edge.pipeline import check_output
from medmoe_edge.render import bench as render_bench
from medmoe_edge.render import console as render

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from medmoe_edge.device.prove import Proof

    Way = tuple[Callable[..., Any], Callable[[Any], None]]  # how to measure, how to show it


@dataclass(frozen=True)
class BenchOptions:
    """What is measured beside a bundle, under which limit, and what is asked."""

    peers: bool
    peer: "Sequence[str]"
    checkpoint: str | None
    memory_limit: str | None
    paging: bool
    soak: int | None
    memory_budget: str | None
    data: Path | None
    follow: float
    drop_pages: bool
    rounds: int
    plot: Path | None

    def check(self) -> None:
        """Raise `InputError` for options that do not go together."""
        limit, paging, soak = self.memory_limit, self.paging, self.soak
        alone = {"--memory-limit": limit, "--paging": paging, "--soak": soak, "--plot": self.plot}
        given = [name for name, value in alone.items() if value]
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} do not go together.", "Give one of them.")
        beside, routed = self.peers or self.peer, paging or soak is not None
        if self.checkpoint and not (beside or limit):
            _refuse_without("--checkpoint", "--peers or --memory-limit")
        for name in ("memory_budget", "data", "follow", "drop_pages"):
            wanted = self.follow < 1 if name == "follow" else getattr(self, name)
            if wanted and not routed:
                _refuse_without(f"--{name.replace('_', '-')}", "--paging or --soak")
        if beside and routed:
            raise InputError("Peers page no experts.", "Leave them out, or use --memory-limit.")
        if self.plot:
            with needs("export"):
                __import__("matplotlib")
            render_bench.check_picture(self.plot)


@verb("bench", "Prove", "bench nano --rounds 3")
def bench(
    bundle: BundleArgument = "nano",
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
    paging: Annotated[bool, typer.Option("--paging", help="Experts at several budgets.")] = False,
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
    options = BenchOptions(
        *(peers, peer or (), checkpoint, memory_limit, paging, soak, memory_budget),
        *(data, follow, drop_pages, rounds, plot),
    )
    options.check()
    if plot:
        check_output(plot, force, Path(bundle), around=(data,))
    with needs("bench"):
        measure, show = _way(options)
    with render.working("Starting") as progress:
        found = measure(bundle, progress=progress)
    if plot:
        render_bench.write_plot(found, plot)
    if not as_json:
        show(found)
        if plot:
            render.wrote("the plot", plot)
    render.as_json(found.to_json())


def _way(options: BenchOptions) -> "Way":
    """The function of the library that measures what was asked for, and the one that shows it."""
    from medmoe_edge.bench import limits, paging, peers, run
    from medmoe_edge.bench.routing import Asking
    from medmoe_edge.bundle.machine import memory_here
    from medmoe_edge.runtimes.paging.prediction import budget_bytes

    data = None if options.data is None else str(options.data.resolve())
    asking = Asking(data, options.follow, options.drop_pages)
    budget, rounds, checkpoint = options.memory_budget, options.rounds, options.checkpoint
    if options.paging:
        budgets = (budget,) if budget else paging.BUDGETS
        measure = partial(paging.bench_paging, budgets=budgets, asking=asking, rounds=rounds)
        return measure, render_bench.show_paging
    if options.soak is not None:
        budget = budget or paging.SOAK_BUDGET
        soak = partial(paging.soak, questions=options.soak, budget=budget, asking=asking)
        return soak, render_bench.show_soak
    beside: dict[str, Any] = {"checkpoint": checkpoint, "rounds": rounds}
    if options.memory_limit is not None:
        limit = budget_bytes(options.memory_limit, memory_here())
        mapped = peers.find_peers(options.peer or limits.MAPPED)
        limited = partial(limits.bench_limited, limit=limit, peers=mapped, **beside)
        return limited, render_bench.show_limited
    every = options.peers and not options.peer
    chosen = peers.PEERS if every else peers.find_peers(options.peer)
    return partial(run.bench, peers=chosen, **beside), render_bench.show_bench


def _refuse_without(option: str, needed: str) -> None:
    raise InputError(f"{option} is for {needed}.", f"Leave it out, or add {needed}.")


@verb("doctor", "Deploy", "doctor")
def doctor(as_json: Json = False) -> None:
    """Show what is installed, which devices are usable, and what to install for what."""
    from medmoe_edge.device.doctor import examine

    found = examine()
    tell(found, as_json, render_bench.show_diagnosis, found.error())


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
        int | None,
        typer.Option(
            help="Of int4: 32, 64 or 128 weights share a scale.",
            show_default="32, or the bundle's",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the prompt, the image's included.", show_default="the image's and 48"
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 32,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="As of export: delta:bits=2 and its like.",
            show_default="whole, or as the bundle's",
        ),
    ] = None,
    image_tokens: Annotated[
        int | None, typer.Option(min=1, help="As of export.", show_default="all, or the bundle's")
    ] = None,
    vision: Annotated[
        Literal["groups", "tokens"] | None,
        typer.Option(help="As of export.", show_default="groups, or the bundle's"),
    ] = None,
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
    from medmoe_edge.device import estimate
    from medmoe_edge.device.hardware import HERE

    own = (precision, group_size, prompt_tokens, experts, image_tokens, vision)
    if measure and (device != HERE or any(own) or new_tokens != estimate.PlanOptions.new_tokens):
        raise InputError(
            "Measured is this machine, with the bundle as it is stored and a short question.",
            "Give --device here, and nothing else of the model, the prompt or the answer.",
        )
    if fit != (latency is not None) or (fit and (measure or precision)):
        raise InputError(
            "--fit needs --latency, and chooses the precision itself.",
            "Give --fit --latency SECONDS, without --precision and --measure.",
        )
    if group_size not in (None, 32, 64, 128):
        raise InputError(f"There are no groups of {group_size}.", "Use 32, 64 or 128.")
    options = estimate.PlanOptions(
        *(device, precision, group_size, prompt_tokens, new_tokens, experts, image_tokens, vision)
    )
    if latency is not None:
        with render.working("Measuring"):
            proposed = estimate.fit(model, options, latency)
        tell(proposed, as_json, render_bench.show_fit, proposed.error())
        return
    with render.working("Measuring"):
        found, comparison = (
            estimate.plan_and_measure(model) if measure else (estimate.plan(model, options), None)
        )
    measured = comparison.to_json() if comparison else None
    show = partial(render_bench.show_plan, comparison=comparison)
    tell(found, as_json, show, found.error(), measured=measured)


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
    what stands in for it is named. Each has a share of 8 minutes, and is not run for want of time
    where it needs more. Needs no network.
    """
    from medmoe_edge.atomic import check_target
    from medmoe_edge.device.prove import RECORD
    from medmoe_edge.device.prove import prove as run

    if output is not None:
        check_target(output, force=force, marker=RECORD)
    with render.working("Proving") as progress:
        found = run(progress)
    if output is not None:
        render_bench.write_proof(found, output, force=force)

    def show(proof: "Proof") -> None:
        render_bench.show_proof(proof)
        if output is not None:
            render.wrote("the proof", output)

    tell(found, as_json, show, found.error())
