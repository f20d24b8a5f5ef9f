"""What the verbs that deploy show to people."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_folder
from medmoe_edge.errors import shown_bytes
from medmoe_edge.render.console import show, show_table, wrote

if TYPE_CHECKING:
    from medmoe_edge.device.doctor import Diagnosis
    from medmoe_edge.device.estimate import Fit, Forecast, Plan
    from medmoe_edge.device.measure import Comparison
    from medmoe_edge.device.prove import Proof
    from medmoe_edge.pipeline.targets import TargetExport

STATES = {"problem": "bold red", "warning": "yellow", "hint": "dim"}


def show_diagnosis(diagnosis: "Diagnosis") -> None:
    """What was found, then what is wrong with it and what to do."""
    show_table("", ["", ""], [(fact.name, fact.value) for fact in diagnosis.facts], left=2)
    show()
    rows = [
        (extra.name, extra.purpose, extra.state, extra.command if extra.missing else "")
        for extra in diagnosis.extras
    ]
    show_table("Extras", ["extra", "for", "state", "to install"], rows, left=4)
    for finding in diagnosis.findings:
        show()
        show(f"{finding.level.capitalize()}: {finding.what}", STATES[finding.level])
        show(f"  {finding.remedy}")


VERDICTS = {"passed": "green", "failed": "bold red", "not run": "dim"}


def show_proof(proof: "Proof") -> None:
    """A row for each path, then what the figures of those that ran are."""
    rows = [
        (path.what, path.verdict, path.why or "", path.stand_in or "", seconds(path.seconds))
        for path in proof.paths
    ]
    columns = ["path", "on the GPU", "", "run in its place", "took"]
    show_table("This machine's GPU paths", columns, rows, styles=VERDICTS, left=4)
    if proof.machine["throttled"]:
        show("The power mode limits the clocks: times are not the fastest.", "yellow")
    show("Figures: --json, or a page to send in: -o FOLDER", "dim")


def show_plan(plan: "Plan") -> None:
    """A row per precision, then what the figures rest on."""
    columns = ["", "decoder", "memory to run", "to build", "first token", "tokens/s", "fits"]
    rows = [
        (
            each.precision,
            shown_bytes(each.weights),
            shown_bytes(each.memory_run),
            shown_bytes(each.memory_build),
            seconds(each.first_token),
            f"{each.tokens_per_second:,.1f}",
            _verdict(each),
        )
        for each in plan.forecasts
    ]
    device = plan.device
    title = f"{plan.model} on {device.title}, {shown_bytes(device.usable)} usable"
    show_table(title, columns, rows, styles={"yes": "green"})
    if heavy := [f.precision for f in plan.forecasts if f.memory_build > device.usable]:
        show(
            f"To build {', '.join(heavy)} takes more memory than it has: build elsewhere.", "yellow"
        )
    rests = "measured rates" if device.ratings is None else "the maker's figures"
    asked = f"{plan.prompt_tokens} prompt and {plan.new_tokens} new tokens"
    show(f"Predicted for {asked}, from {rests}; not run.", "dim")
    if any(forecast.paging_cost > 1 for forecast in plan.forecasts):
        show("Times with paged experts hold what paging was measured to cost on a CPU.", "dim")


def show_fit(fit: "Fit") -> None:
    """The form that is proposed, and the commands that make and run it."""
    forecast = fit.forecast or fit.nearest
    if forecast is None:
        return
    took = seconds(forecast.answer(fit.new_tokens))
    memory = min(forecast.memory_run, fit.device.usable)
    group = f" in groups of {forecast.group}" if forecast.precision == "int4" else ""
    rows = [
        ("precision", f"{forecast.precision}{group}"),
        ("image tokens", str(fit.image_tokens)),
        ("memory", f"{shown_bytes(memory)} of {shown_bytes(fit.device.usable)} usable"),
        ("experts in memory", f"{fit.resident_experts} of {fit.experts}"),
        ("memory budget", "none" if forecast.expert_budget is None else _verdict(forecast)),
        ("first token", seconds(forecast.first_token)),
        (f"{fit.new_tokens} tokens", f"{took}, of {seconds(fit.latency)} wished"),
    ]
    what = "Proposed" if fit.forecast else "Nearest"
    show_table(f"{what} for {fit.model} on {fit.device.title}", ["", ""], rows, left=2)
    for command in fit.commands:
        show(command, "bold")
    show("Predicted, not run.", "dim")


def show_comparison(comparison: "Comparison") -> None:
    """Prediction beside measurement."""
    rows = [
        (
            name,
            seconds(comparison.predicted[name]),
            seconds(comparison.measured[name]),
            f"{ratio:.2f}",
        )
        for name, ratio in comparison.ratios.items()
    ]
    show()
    show_table("Run on this machine", ["", "predicted", "measured", "ratio"], rows)


def seconds(value: float) -> str:
    """A time for people: 2.31 s, or 12.4 ms."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _verdict(forecast: "Forecast") -> str:
    if forecast.short:
        return f"no, {shown_bytes(forecast.short)} short"
    if forecast.expert_budget is None:
        return "yes"
    share = forecast.expert_budget / forecast.experts
    return f"with {shown_bytes(forecast.expert_budget)} for experts ({share:.0%} of them)"


def show_target(made: "TargetExport") -> None:
    """The engines, what they took, and where they are."""
    rows = [
        (
            name,
            shown_bytes(built.bytes),
            seconds(built.seconds),
            shown_bytes(built.peak_memory) if built.peak_memory else "",
            "from the cache" if built.cached else "built",
        )
        for name, built in made.engines.items()
    ]
    if rows:
        show_table(f"For {made.target}", ["engine", "size", "took", "peak memory", ""], rows)
    wrote("the bundle", made.bundle)


def write_proof(proof: "Proof", folder: Path, *, force: bool = False) -> None:
    """Write `proof.json` and `proof.html`; raises `InputError` for a folder that is there."""
    from medmoe_edge.device.prove import PAGE, RECORD

    with atomic_folder(folder, force=force, marker=RECORD) as out:
        (out / RECORD).write_text(json.dumps(proof.to_json(), indent=2) + "\n")
        (out / PAGE).write_text(proof_page(proof))


def proof_page(proof: "Proof") -> str:
    """One page for people, which needs nothing else."""
    rows = "".join(
        f"<tr class='{escape(path.verdict.replace(' ', '-'))}'><td>{escape(path.what)}</td>"
        f"<td>{escape(path.verdict)}{escape(f': {path.why}' if path.why else '')}</td>"
        f"<td>{escape(path.stand_in or '')}</td><td>{_listed(path.figures)}</td>"
        f"<td>{path.seconds:.1f} s</td></tr>"
        for path in proof.paths
    )
    machine = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>"
        for key, value in proof.machine.items()
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>medmoe-edge prove</title>"
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:left;"
        "vertical-align:top;border-bottom:1px solid #ccc}.passed td:nth-child(2){color:#060}"
        ".failed td:nth-child(2){color:#a00}</style>"
        f"<h1>medmoe-edge {__version__} on its GPU</h1><table><tr><th>path<th>verdict"
        f"<th>run in its place<th>figures<th>took</tr>{rows}</table>"
        f"<h2>Machine</h2><table>{machine}</table></html>\n"
    )


def _listed(figures: Mapping[str, float | str | bool]) -> str:
    told = (
        f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in figures.items()
    )
    return "<br>".join(map(escape, told))
