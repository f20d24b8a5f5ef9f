"""A verification as one HTML page that needs nothing else: for people, to read and to file."""

import importlib.resources
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_edge.atomic import atomic_file, writing
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.config import Confidence
from medmoe_edge.errors import needs
from medmoe_edge.evaluation.gates import wilson
from medmoe_edge.evaluation.metrics import Fidelity, Routing
from medmoe_edge.evaluation.record import AnswersRecord, ContrastiveRecord
from medmoe_edge.evaluation.verify import Verification

with needs("export"):
    import jinja2
    import matplotlib as mpl
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

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


def reliability_plot(fitted: Confidence) -> str:
    """Left, how often answers of each confidence are right; right, errors among the surest."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout=ConstrainedLayoutEngine(wspace=0.12))
        left, right = figure.subplots(1, 2)
        left.plot((0, 100), (0, 100), color=LINE, linewidth=1.4)
        for name, found, colour, marker in (
            ("as the model gives it", fitted.before, ORANGE, "^"),
            ("calibrated", fitted.after, BLUE, "o"),
        ):
            places = [100 * one.confidence for one in found.bins]
            shares = [100 * one.accuracy for one in found.bins]
            left.plot(places, shares, marker=marker, color=colour, markersize=5, label=name)
            kept, wrong = 100 * np.array(found.risk_coverage).T
            right.plot(kept, wrong, marker=marker, color=colour, markersize=5)
        left.axvline(100 * fitted.threshold, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.2)
        left.set_xlabel("confidence, %; dashed: unsure below")
        left.set_ylabel("answers that are right, %")
        right.set_xlabel("answers kept, the surest first, %")
        right.set_ylabel("wrong among them, %")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.grid()
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
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


TEMPLATE = "report.html.j2"


def write_report(verification: Verification, path: Path) -> None:
    """Write the page; an existing file is replaced only when all is written.

    Raises `ResourceError` where the disk does not take it.
    """
    page = render_report(verification)
    with writing(path), atomic_file(path) as file:
        file.write(page.encode())


def render_report(verification: Verification) -> str:
    """The page as HTML; sections whose data is absent are left out."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"percent": _percent, "points": _points, "figure": _figure}
    source = (
        importlib.resources.files("medmoe_edge.evaluation").joinpath(TEMPLATE).read_text("utf-8")
    )
    record, bundle = _record(verification), verification.bundle
    quantisation, calibration = (
        part if isinstance(part := bundle.manifest.get(key), Mapping) else {}
        for key in ("quantisation", "calibration")
    )
    fitted = verification.fitted
    plots = {
        "confidence": reliability_plot(fitted) if fitted else "",
        "agreement": "",
        "routing": "",
        "errors": errors_plot(quantisation.get("matrices") or []),
        "coverage": "",
    }
    if record:
        figures = record.figures
        bound = record.gate("answer_agreement").bound
        plots["agreement"] = agreement_plot(figures, bound)
        if figures.routing:
            bound = record.gate("routing_flips").bound
            plots["routing"] = routing_plot(figures.routing, bound)
    moe = bundle.config.moe
    names = [str(name) for name in moe.expert_names or range(moe.num_experts)] if moe else []
    if (profile := calibration.get("routing")) and names:
        plots["coverage"] = coverage_plot(profile, names)
    coverage = calibration.get("coverage") or []
    rows = [(f"{bundle.name} (this bundle)", record.figures)] if record else []
    rows += verification.beside.items()
    return page.from_string(source).render(
        name=bundle.name,
        precision=quantisation.get("precision"),
        notice=NOTICE,
        verdict=_verdict(verification),
        faults=verification.faults,
        record=record,
        tiles=_tiles(record.figures) if record else [],
        gates=record.gates if record else (),
        plots=plots,
        fitted=fitted,
        short=[(names[part["expert"]], part) for part in coverage if part["status"] != "covered"],
        rows=rows,
        provenance=_provenance(verification, quantisation),
    )


def _record(verification: Verification) -> AnswersRecord | None:
    """The record of a Med-MoE, whose figures the page shows."""
    record = verification.record
    assert not isinstance(record, ContrastiveRecord)
    return record


def _verdict(verification: Verification) -> dict[str, str]:
    record = _record(verification)
    if error := verification.error():
        return {"state": "failed", "headline": "Failed: do not use it", "detail": error.what}
    if record is None:
        detail = "Its files are whole and its experts sound; it was held against no checkpoint."
        return {"state": "unknown", "headline": "Not measured", "detail": detail}
    figures, verdicts = record.figures, [gate.verdict for gate in record.gates]
    detail = (
        f"No gate failed on {figures.questions:,} questions about {figures.images:,} images "
        f"of {record.data.name}."
    )
    if undecided := len(verdicts) - verdicts.count("met"):
        detail += f" Gates that so few cannot decide: {undecided}."
    if record.passed is None:
        return {"state": "unknown", "headline": "Not decided", "detail": detail}
    return {"state": "passed", "headline": "Passed", "detail": detail}


def _tiles(figures: Fidelity) -> list[dict[str, str]]:
    overall, routing = figures.overall, figures.routing
    tiles = [(_percent(overall.answer_agreement.share), "answers agree")]
    if overall.accuracy:
        tiles.append((_points(overall.accuracy.difference), "accuracy, in points"))
    if routing:
        tiles.append((_percent(routing.flips.share), "routing flips"))
    tiles.append((_figure(overall.kl.mean), "KL, nats per token"))
    tiles.append((f"{figures.vision.cosine_mean:.4f}", "cosine of image tokens"))
    return [{"value": value, "label": label} for value, label in tiles]


def _provenance(
    verification: Verification, quantisation: Mapping[str, Any]
) -> list[tuple[str, str]]:
    bundle, record = verification.bundle, verification.record
    rows = [("Bundle", f"{bundle.name}, manifest sha256 {bundle.sha256}")]
    rows += [
        (f"Quantisation: {key}", str(value))
        for key, value in quantisation.items()
        if isinstance(value, str | int | float)
    ]
    if record:
        rows += [
            ("Checkpoint", f"sha256 {record.checkpoint_sha256}"),
            ("Questions", f"{record.data.name}, sha256 {record.data.sha256}"),
            ("Runtime", record.runtime),
            ("Machine", str(record.machine or "not recorded")),
            ("Measured", record.when),
        ]
    return [*rows, ("Licence", str(bundle.manifest["licence"]))]


def _percent(fraction: float) -> str:
    return f"{fraction:.2%}"


def _points(fraction: float) -> str:
    """A difference of accuracies in percentage points: +0.14."""
    return f"{fraction * 100:+.2f}".replace("-", "\N{MINUS SIGN}")


def _figure(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 or not value else f"{value:.1e}"
