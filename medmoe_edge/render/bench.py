"""What the verbs about a machine show: what answering costs on it, what it has, what fits it."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_file, atomic_folder, writing
from medmoe_edge.errors import InputError, shown_bytes
from medmoe_edge.render.console import percent, show, show_table, wrote

if TYPE_CHECKING:
    from medmoe_edge.bench.limits import LimitBench
    from medmoe_edge.bench.measurement import Spread
    from medmoe_edge.bench.paging import AtBudget, PagingBench, Soak
    from medmoe_edge.bench.peers import Comparison
    from medmoe_edge.bench.run import Bench
    from medmoe_edge.device.doctor import Diagnosis
    from medmoe_edge.device.estimate import Fit, Forecast, Plan
    from medmoe_edge.device.measure import Comparison as Measured
    from medmoe_edge.device.prove import Proof
    from medmoe_edge.export.targets import TargetExport

VERDICTS = {"passed": "green", "failed": "bold red", "not run": "dim"}
BUSY = 0.5  # of a machine's threads, from which on other programs matter
WAYS = {"resident": "all resident", "prefetch": "paged", "on_demand": "paged, no prefetch"}
PICTURES = (".png", ".svg", ".pdf")
BLUE = "#0072b2"  # of Okabe and Ito's colours


def show_bench(bench: "Bench") -> None:
    """The bundle's own figures, what they grow with, and its peers."""
    machine = bench.machine
    title = f"{bench.model} ({bench.precision}) on {machine}"
    show_table(title, ["", "", "median", "quartiles"], _figures(bench), left=2)
    show()
    rows = [
        (f"{length.tokens:,}", *_spread(length.seconds, length.tokens), _memory(length.peak))
        for length in bench.lengths
    ]
    show_table("By prompt length", ["tokens", "prefill", "quartiles", "a token", "peak"], rows)
    if bench.length_ratio is not None:
        show(f"A token's prefill, worst length over best: {bench.length_ratio:.2f}")
    if bench.token_bytes is not None:
        peak, cache = bench.token_bytes / 1e3, bench.cache_token_bytes / 1e3
        show(f"A token more adds {peak:,.1f} kB to the peak; the KV cache takes {cache:,.1f} kB")
    show()
    questions = [(f"{count}", *_spread(spread, count)) for count, spread in bench.questions.items()]
    show_table("Questions about one image", ["", "all", "quartiles", "each"], questions)
    if bench.peers:
        _show_peers(bench)
    if machine.load and machine.load > BUSY * machine.threads:
        what = f"Before it began, {machine.load:.1f} programs ran on {machine.threads} threads"
        show(f"{what}: trust ratios more than times.", "yellow")


def _figures(bench: "Bench") -> Iterator[tuple[str, str, str, str]]:
    parts, shape, measured = bench.measured.seconds, bench.shape, bench.measured
    steps, share = shape.new - 1, f"{bench.second_over_first:.2f} of the first question's"
    rows = (
        ("cold start", f"whole process, at most {shape.new} new tokens", bench.cold_start),
        ("load", "", parts["load"]),
        ("vision", f"{shape.image} image tokens", parts["vision"]),
        ("prefill", f"{shape.prompt} tokens: {bench.prefill_rate:,.0f}/s", parts["prefill"]),
        ("decode", f"{steps} tokens: {bench.decode_rate:,.0f}/s", parts["decode"]),
        ("question", f"all three, {shape.new} new tokens", parts["question"]),
        ("second question", f"to its first token: {share}", parts["second"]),
    )
    for name, note, spread in rows:
        median, quartiles, _ = _spread(spread, 1)
        yield name, note, median, quartiles
    yield ("memory", "after a question", _memory(measured.resident), "")
    yield ("  peak", "of a question", _memory(measured.peak), "")
    yield ("  peak", "while loading", _memory(measured.loading), "")
    bandwidth = bench.machine.bandwidth
    low, median, high = (
        f"{value / 1e9:.1f}" for value in (bandwidth.low, bandwidth.median, bandwidth.high)
    )
    each = shown_bytes(bench.decode_bytes)
    note = f"decoding reads {each} a token, {percent(bench.bandwidth_share)} of it"
    yield ("memory bandwidth", note, f"{median} GB/s", f"{low} to {high}")


def _show_peers(bench: "Bench") -> None:
    """Their speed and memory, ours as a multiple of it, and what else differs."""
    show()
    columns = ["", "prefill", "ours", "decode", "ours", "question", "ours", "memory", "ours"]
    rows = [
        (comparison.peer.title, *_compared(bench, comparison))
        for comparison in bench.peers
        if comparison.theirs
    ]
    show_table("Peers (ours: times as fast, and our share of their peak memory)", columns, rows)
    for comparison in bench.peers:
        if comparison.theirs:
            show(f"{comparison.peer.title}: {'; '.join(comparison.peer.differences)}.", "dim")
        else:
            why = f"{comparison.why} {comparison.remedy}"
            show(f"{comparison.peer.title}, {comparison.state}: {why}", "yellow")


def _compared(bench: "Bench", comparison: "Comparison") -> Iterator[str]:
    theirs, ratios = comparison.theirs, comparison.ratios
    assert theirs is not None
    for name, value in (
        ("prefill", f"{theirs.prefill_rate(bench.shape):,.0f}/s"),
        ("decode", f"{theirs.decode_rate(bench.shape):,.0f}/s"),
        ("question", seconds(theirs.seconds["question"].median)),
        ("peak", _memory(theirs.peak)),
    ):
        yield value
        yield f"x {ratios[name]:.2f}" if name in ratios else ""


def show_paging(bench: "PagingBench") -> None:
    """At each budget its three processes, and what the ratios are."""
    experts = f"experts of {shown_bytes(bench.expert_bytes)}"
    show(f"{bench.model} ({bench.precision}), {experts}, {bench.modalities} modalities", "bold")
    for budget in bench.budgets:
        show()
        title = f"Budget {budget.budget}, {shown_bytes(budget.bytes)}"
        columns = ["", "peak", "after", "same modality", "switch"]
        show_table(title, [*columns, "misses", "late", "read", "stall"], _held(budget))
        for line in _ratios(bench, budget):
            show(line)
    show()
    share = percent(bench.share)
    show(f"The most used expert got {share} of a question's tokens.")
    show("; ".join(bench.differences), "dim")


def _held(budget: "AtBudget") -> Iterator[tuple[str, ...]]:
    for way, held in budget.held.items():
        switch = held.switch.paging
        yield (
            WAYS[way],
            _memory(held.peak),
            _memory(held.resident),
            seconds(held.same.seconds.median),
            seconds(held.switch.seconds.median),
            *(f"{switch[name]:.1f}" if switch else "" for name in ("misses", "late")),
            shown_bytes(switch["bytes_read"]) if switch else "",
            seconds(switch["stall"]) if switch else "",
        )


def _ratios(bench: "PagingBench", budget: "AtBudget") -> Iterator[str]:
    same, switch = f"{budget.same_ratio:.2f}", f"{budget.switch_ratio:.2f}"
    gain = f"{budget.prefetch_gain:.2f}"
    yield f"Against resident: x {same} same modality, x {switch} after a switch"
    yield f"Prefetch: {gain} times as fast after a switch as without"
    if budget.saved is not None:
        share = percent(budget.saved / bench.expert_bytes)
        yield f"Peak lower by {shown_bytes(budget.saved)}, {share} of the experts' bytes"
    what = f"{budget.answers - budget.changed} of {budget.answers} answers are the resident ones"
    yield f"{what}, to the last bit"


def show_soak(soak: "Soak") -> None:
    """Memory as it went, and whether an answer changed."""
    title = f"{soak.model} ({soak.precision}), experts in {shown_bytes(soak.bytes)} ({soak.budget})"
    rows = [(f"{asked:,}", _memory(count)) for asked, count in soak.memory.items()]
    show_table(title, ["questions", "memory"], rows, left=0)
    show(f"A question took {seconds(soak.seconds.median)}")
    if soak.growth is not None:
        show(f"Memory once settled: {soak.growth / 1e6:+.2f} MB per 1,000 questions")
    same = f"{soak.questions:,} answers to {soak.distinct} questions"
    style = "yellow" if soak.changed else ""
    show(f"{same}: {soak.changed:,} differ from the first to theirs", style)


def show_limited(bench: "LimitBench") -> None:
    """The speed of each model under the limit, and what storage had to bring."""
    title = f"{bench.model} ({bench.precision}) in {shown_bytes(bench.limit)}"
    if bench.why is not None:
        show(f"{title}: {bench.why}", "yellow")
        return
    columns = ["", "prefill", "decode", "question", "peak", "faults", "read"]
    rows = [
        (
            found.title,
            f"{found.measured.prefill_rate(bench.shape):,.1f}/s",
            f"{found.measured.decode_rate(bench.shape):,.2f}/s",
            seconds(found.measured.seconds["question"].median),
            _memory(found.measured.peak),
            "unknown" if found.faults is None else f"{found.faults:,.0f}",
            "unknown" if found.read is None else shown_bytes(found.read),
        )
        for found in bench.found
        if found.measured
    ]
    show_table(f"{title}, limited by {bench.how}", columns, rows)
    for found in bench.found:
        if found.budget is not None:
            show(f"{found.title}: within {shown_bytes(found.budget)}", "dim")
        for budget, why in found.failed.items():
            show(f"{found.title}, within {shown_bytes(budget)}: {why}", "dim")
        if found.why:
            show(f"{found.title}: {found.why}", "yellow")
        elif found.differences:
            show(f"{found.title}: {'; '.join(found.differences)}.", "dim")


def check_picture(file: Path) -> None:
    """Raise `InputError` unless the name says what kind of picture is wanted."""
    if file.suffix.lower() not in PICTURES:
        raise InputError(f"{file} names no picture format.", f"Use one of: {', '.join(PICTURES)}.")


def write_plot(bench: "Bench", file: Path) -> None:
    """Seconds of a prefill, and of each of its tokens, by length; medians in their quartiles.

    The file appears whole or not at all. Raises `ResourceError` where it cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    check_picture(file)
    lengths = [length.tokens for length in bench.lengths]
    whole = [length.seconds for length in bench.lengths]
    each = [length.seconds * (1e3 / length.tokens) for length in bench.lengths]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    with mpl.rc_context({"text.parse_math": False}):  # a name with dollars is a name
        for axes, spreads, unit in zip(
            figure.subplots(1, 2), (whole, each), ("prefill, s", "per token, ms"), strict=True
        ):
            axes.plot(lengths, [spread.median for spread in spreads], "o-", color=BLUE)
            low, high = zip(*((spread.low, spread.high) for spread in spreads), strict=True)
            axes.fill_between(lengths, low, high, color=BLUE, alpha=0.2)
            axes.set(xlabel="prompt, tokens", ylabel=unit, xlim=(0, None), ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{bench.model} ({bench.precision}) on {bench.machine}")
        with writing(file), atomic_file(file) as part:
            figure.savefig(part, format=file.suffix[1:].lower())


def _spread(spread: "Spread", count: int) -> tuple[str, str, str]:
    """Seconds of so many: their median, their quartiles, and what each takes."""
    quartiles = f"{seconds(spread.low)} to {seconds(spread.high)}"
    return seconds(spread.median), quartiles, seconds(spread.median / count)


def _memory(count: int | None) -> str:
    return "unknown" if count is None else shown_bytes(count)


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


def show_plan(plan: "Plan", comparison: "Measured | None" = None) -> None:
    """A row per precision, what the figures rest on, and how near they came where it ran."""
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
    if plan.left_out:
        show(f"The bundle is without its experts for {', '.join(plan.left_out)}.", "dim")
    if any(forecast.expert_budget for forecast in plan.forecasts):
        moved = ", ".join(f"{f.precision} {shown_bytes(f.switch_bytes)}" for f in plan.forecasts)
        show(f"Paging reads for another modality: {moved}.", "dim")
    if any(forecast.paging_cost > 1 for forecast in plan.forecasts):
        show("Times with paged experts hold what paging was measured to cost on a CPU.", "dim")
    if comparison:
        show_comparison(comparison)


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
        ("image tokens", fit.image_tokens)
        if fit.forecast
        else ("image tokens that would do", fit.image_tokens or "none"),
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


def show_comparison(comparison: "Measured") -> None:
    """Prediction beside measurement."""
    predicted, measured = comparison.predicted, comparison.measured
    rows = [
        (name, seconds(predicted[name]), seconds(measured[name]), f"{ratio:.2f}")
        for name, ratio in comparison.ratios.items()
    ]
    show()
    show_table("Run on this machine", ["", "predicted", "measured", "ratio"], rows)


def seconds(value: float) -> str:
    """A time for people: 2.31 s, or 12.4 ms."""
    return f"{value:.2f} s" if value >= 0.9995 else f"{1000 * value:.3g} ms"


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
        (out / RECORD).write_text(json.dumps(proof.to_json(), indent=2) + "\n", encoding="utf-8")
        (out / PAGE).write_text(proof_page(proof), encoding="utf-8")


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
