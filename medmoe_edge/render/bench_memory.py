"""What `bench` shows of paging, of a soak, and of a memory limit."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from medmoe_edge.render.console import megabytes, percent, show, show_table
from medmoe_edge.render.device import seconds

if TYPE_CHECKING:
    from medmoe_edge.bench.limited import LimitBench
    from medmoe_edge.bench.paging import AtBudget, PagingBench
    from medmoe_edge.bench.soak import Soak

WAYS = {"resident": "all resident", "prefetch": "paged", "on_demand": "paged, no prefetch"}

COLUMNS = ["", "peak", "after", "same modality", "switch", "misses", "late", "read", "stall"]


def show_paging(bench: "PagingBench") -> None:
    """At each budget its three processes, and what the ratios are."""
    experts = f"experts of {megabytes(bench.expert_bytes)}"
    show(f"{bench.model} ({bench.precision}), {experts}, {bench.modalities} modalities", "bold")
    for budget in bench.budgets:
        show()
        title = f"Budget {budget.budget}, {megabytes(budget.bytes)}"
        columns = [
            "",
            "peak",
            "after",
            "same modality",
            "switch",
            "misses",
            "late",
            "read",
            "stall",
        ]
        show_table(title, columns, _held(budget))
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
            megabytes(round(switch["bytes_read"])) if switch else "",
            seconds(switch["stall"]) if switch else "",
        )


def _ratios(bench: "PagingBench", budget: "AtBudget") -> Iterator[str]:
    same, switch = f"{budget.same_ratio:.2f}", f"{budget.switch_ratio:.2f}"
    gain = f"{budget.prefetch_gain:.2f}"
    yield f"Against resident: x {same} same modality, x {switch} after a switch"
    yield f"Prefetch: {gain} times as fast after a switch as without"
    if budget.saved is not None:
        share = percent(budget.saved / bench.expert_bytes)
        yield f"Peak lower by {megabytes(budget.saved)}, {share} of the experts' bytes"
    what = f"{budget.answers - budget.changed} of {budget.answers} answers are the resident ones"
    yield f"{what}, to the last bit"


def show_soak(soak: "Soak") -> None:
    """Memory as it went, and whether an answer changed."""
    title = f"{soak.model} ({soak.precision}), experts in {megabytes(soak.bytes)} ({soak.budget})"
    rows = [(f"{asked:,}", _memory(count)) for asked, count in soak.memory.items()]
    show_table(title, ["questions", "memory"], rows, left=0)
    show(f"A question took {seconds(soak.seconds.median)}")
    if soak.growth is not None:
        show(f"Memory once settled: {soak.growth / 1e6:+.2f} MB per 1,000 questions")
    same = f"{soak.questions:,} answers to {soak.distinct} questions"
    style = "yellow" if soak.changed else ""
    show(f"{same}: {soak.changed:,} differ from the first to theirs", style)


def show_limited(bench: "LimitBench") -> None:
    """Everybody's speed in as little memory, and what that cost."""
    title = f"{bench.model} ({bench.precision}) in {megabytes(bench.limit)}"
    if bench.why is not None:
        show(f"{title}: {bench.why}", "yellow")
        return
    columns = ["", "prefill", "decode", "question", "peak", "faults", "read"]
    rows = []
    for found in bench.found:
        rates = bench.rates(found)
        if found.measured is None or rates is None:
            continue
        prefill, decode = rates
        rows.append(
            (
                found.title,
                f"{prefill:,.1f}/s",
                f"{decode:,.2f}/s",
                seconds(found.measured.seconds["question"].median),
                _memory(found.measured.peak),
                "unknown" if found.faults is None else f"{found.faults:,.0f}",
                "unknown" if found.read is None else megabytes(round(found.read)),
            )
        )
    show_table(f"{title}, limited by {bench.how}", columns, rows)
    for found in bench.found:
        if found.budget is not None:
            show(f"{found.title}: within {megabytes(found.budget)}", "dim")
        for budget, why in found.failed.items():
            show(f"{found.title}, within {megabytes(budget)}: {why}", "dim")
        if found.why:
            show(f"{found.title}: {found.why}", "yellow")
        elif found.differences:
            show(f"{found.title}: {'; '.join(found.differences)}.", "dim")


def _memory(count: int | None) -> str:
    return "unknown" if count is None else megabytes(count)
