"""What `bench` shows to people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from medmoe_edge.render.console import megabytes, percent, show, show_table
from medmoe_edge.render.device import seconds

if TYPE_CHECKING:
    from medmoe_edge.bench.peers import Comparison
    from medmoe_edge.bench.result import Bench
    from medmoe_edge.bench.timing import Spread

BUSY = 0.5  # of a machine's threads, from which on other programs matter


def show_bench(bench: "Bench") -> None:
    """The bundle's own figures, what they grow with, and its peers."""
    machine = bench.machine
    title = f"{bench.model} ({bench.precision}) on {machine.cpu}, {machine.threads} threads"
    show_table(title, ["", "", "median", "quartiles"], _figures(bench), left=2)
    show()
    rows = [
        (
            f"{length.tokens:,}",
            seconds(length.seconds.median),
            _quartiles(length.seconds),
            seconds(length.seconds.median / length.tokens),
            _memory(length.peak),
        )
        for length in bench.lengths
    ]
    show_table("By prompt length", ["tokens", "prefill", "quartiles", "a token", "peak"], rows)
    for line in _growth(bench):
        show(line)
    show()
    questions = [
        (f"{count}", seconds(spread.median), _quartiles(spread), seconds(spread.median / count))
        for count, spread in bench.questions.items()
    ]
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
        yield (name, note, seconds(spread.median), _quartiles(spread))
    yield ("memory", "after a question", _memory(measured.resident), "")
    yield ("  peak", "of a question", _memory(measured.peak), "")
    yield ("  peak", "while loading", _memory(measured.loading), "")
    bandwidth = bench.machine.bandwidth
    low, median, high = (
        f"{value / 1e9:.1f}" for value in (bandwidth.low, bandwidth.median, bandwidth.high)
    )
    each = megabytes(round(bench.decode_bytes))
    note = f"decoding reads {each} a token, {percent(bench.bandwidth_share)} of it"
    yield ("memory bandwidth", note, f"{median} GB/s", f"{low} to {high}")


def _growth(bench: "Bench") -> Iterator[str]:
    """How the costs of a prompt grow with it."""
    if bench.length_ratio is not None:
        yield f"A token's prefill, worst length over best: {bench.length_ratio:.2f}"
    if bench.token_bytes is not None:
        peak, cache = bench.token_bytes / 1e3, bench.cache_token_bytes / 1e3
        yield f"A token more adds {peak:,.1f} kB to the peak; the KV cache takes {cache:,.1f} kB"


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
    from medmoe_edge.bench.measurement import decode_rate, prefill_rate

    theirs, ratios = comparison.theirs, comparison.ratios
    assert theirs is not None
    for name, value in (
        ("prefill", f"{prefill_rate(theirs, bench.shape):,.0f}/s"),
        ("decode", f"{decode_rate(theirs, bench.shape):,.0f}/s"),
        ("question", seconds(theirs.seconds["question"].median)),
        ("peak", _memory(theirs.peak)),
    ):
        yield value
        yield f"x {ratios[name]:.2f}" if name in ratios else ""


def _quartiles(spread: "Spread") -> str:
    return f"{seconds(spread.low)} to {seconds(spread.high)}"


def _memory(count: int | None) -> str:
    return "unknown" if count is None else megabytes(count)
