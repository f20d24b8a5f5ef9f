"""The report's plots, as inline SVG; colours are Okabe and Ito's, told apart by every eye."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from medmoe_edge.evaluation.gates import wilson
from medmoe_edge.evaluation.metrics import Fidelity, Routing

BLUE, ORANGE, INK, SOFT, LINE = "#0072b2", "#d55e00", "#1c2733", "#5b6875", "#dde3e9"
KINDS = {  # of matrices: colour, marker and place beside the layer's tick
    "attention": ("#56b4e9", "o", -0.18),
    "feed-forward": ("#009e73", "s", 0),
    "expert": (ORANGE, "^", 0),
    "meta expert": ("#cc79a7", "D", 0.18),
}
STYLE: Any = {  # typed as strings of all kinds by matplotlib
    "svg.hashsalt": "report",  # ids that do not vary
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name with dollars is a name
    "font.size": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
}


def agreement_plot(figures: Fidelity, bound: float | None) -> str:
    """Answer agreement of all questions, each modality and each answer type, with its bounds."""
    types = {name.lower(): answers for name, answers in figures.by_answer_type.items()}
    groups = {"all": figures.overall, **figures.by_modality, **types}
    rows = [answers.answer_agreement for answers in groups.values()]
    intervals = np.array([wilson(row) for row in rows])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.9 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(rows))
        axes.hlines(places, *intervals.T * 100, color=BLUE, linewidth=5, alpha=0.25)
        axes.plot([row.share * 100 for row in rows], places, "o", color=BLUE, markersize=7)
        _bound(axes.axvline, bound)
        names = [f"{name}  ({row.total:,})" for name, row in zip(groups, rows, strict=True)]
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlabel("answers that agree with the checkpoint's, %")
        axes.set_xlim(right=100.0 + 0.02 * (100 - axes.get_xlim()[0]))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        return _svg(figure)


def routing_plot(routing: Routing, bound: float | None) -> str:
    """Routing flips and the router logits' error, by decoder layer."""
    layers = list(map(str, routing.by_layer))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.8), layout=ConstrainedLayoutEngine(wspace=0.12))
        left, right = figure.subplots(1, 2)
        flips = [share.share * 100 for share in routing.by_layer.values()]
        left.bar(layers, flips, color=BLUE, width=0.55)
        _bound(left.axhline, bound)
        left.set_ylabel("tokens routed otherwise, %")
        errors = [error * 100 for error in routing.error_by_layer.values()]
        right.bar(layers, errors, color="#56b4e9", width=0.55)
        right.set_ylabel("error of the router logits, %")
        for axes in (left, right):
            axes.set_xlabel("decoder layer")
            axes.grid(axis="y")
            axes.tick_params(axis="x", length=0)
        return _svg(figure)


def errors_plot(matrices: Sequence[Mapping[str, Any]]) -> str:
    """Relative error of every quantised matrix of the decoder's layers; empty for none."""
    points: dict[str, list[tuple[int, float]]] = {kind: [] for kind in KINDS}
    for matrix in matrices:
        if match := re.match(r"decoder\.layers\.(\d+)\.(.+)", str(matrix["name"])):
            points[_kind(match[2])].append((int(match[1]), float(matrix["error"]) * 100))
    if not any(points.values()):
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        for kind, (colour, marker, place) in KINDS.items():
            if points[kind]:
                layers, errors = np.array(points[kind]).T
                axes.plot(layers + place, errors, marker, color=colour, label=kind, markersize=5)
        axes.set_xticks(sorted({layer for group in points.values() for layer, _ in group}))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("relative error, %")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False)
        return _svg(figure)


def coverage_plot(routing: Mapping[str, Any], experts: Sequence[str]) -> str:
    """Tokens that reached each expert, one map of experts x modalities per MoE layer."""
    counts = np.array(routing["tokens"], np.float64)  # [M, E, modalities]
    columns = min(4, len(counts))
    rows = -(-len(counts) // columns)
    with mpl.rc_context(STYLE):
        height = 0.8 + rows * (0.5 + 0.42 * counts.shape[1])
        figure = Figure(figsize=(8.6, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(counts) :]:
            axes.set_visible(False)
        norm = LogNorm(1, max(counts.max(), 10))
        for axes, layer, tokens in zip(grid.flat, routing["layers"], counts, strict=False):
            axes.spines[:].set_visible(False)
            axes.imshow(np.maximum(tokens, 1), cmap="cividis", norm=norm, aspect="auto")
            axes.set_title(f"layer {layer}")
            axes.set_yticks(range(len(experts)), experts)
            axes.set_xticks(
                range(len(routing["modalities"])), routing["modalities"], rotation=35, ha="right"
            )
            axes.tick_params(length=0, labelcolor=INK)
            for (expert, modality), value in np.ndenumerate(tokens):
                light = norm(max(value, 1)) < 0.55
                axes.text(
                    *(modality, expert, _count(value)),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if light else INK,
                )
        figure.supxlabel("modality of the image", fontsize=10)
        figure.supylabel("expert", fontsize=10)
        return _svg(figure)


def _bound(line: Any, bound: float | None) -> None:
    if bound is not None:
        line(bound * 100, color=ORANGE, linestyle=(0, (4, 3)), linewidth=1.4)


def _kind(matrix: str) -> str:
    for part, kind in (
        ("attention.", "attention"),
        ("experts.", "expert"),
        ("meta.", "meta expert"),
    ):
        if part in matrix:
            return kind
    return "feed-forward"


def _count(value: float) -> str:
    if value < 1000:
        return f"{value:.0f}"
    thousands = value / 1000
    return f"{thousands:.1f}k" if thousands < 10 else f"{thousands:,.0f}k"


def _svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, the same for the same data."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    return text.getvalue()[text.getvalue().index("<svg") :]
