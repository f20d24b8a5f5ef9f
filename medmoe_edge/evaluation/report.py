"""A verification as one HTML page that needs nothing else: for people, to read and to file."""

import contextlib
import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import MissingDependencyError, ResourceError
from medmoe_edge.evaluation.metrics import Fidelity
from medmoe_edge.evaluation.record import AnswersRecord, ContrastiveRecord
from medmoe_edge.evaluation.verify import Verification

try:
    import jinja2

    from medmoe_edge.evaluation import plots as report_plots
except ModuleNotFoundError as error:
    raise MissingDependencyError(error.name or "matplotlib", "export") from error

TEMPLATE = "report.html.j2"


def write_report(verification: Verification, path: Path) -> None:
    """Write the page; an existing file is replaced only when all is written.

    Raises `ResourceError` where the disk does not take it.
    """
    page = render_report(verification)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written ({error.strerror}).", "Check its folder and the free space."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


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
    plots = {
        "agreement": "",
        "routing": "",
        "errors": report_plots.errors_plot(quantisation.get("matrices") or []),
        "coverage": "",
    }
    if record:
        figures = record.figures
        bound = record.gate("answer_agreement").bound
        plots["agreement"] = report_plots.agreement_plot(figures, bound)
        if figures.routing:
            bound = record.gate("routing_flips").bound
            plots["routing"] = report_plots.routing_plot(figures.routing, bound)
    moe = bundle.config.moe
    names = [str(name) for name in moe.expert_names or range(moe.num_experts)] if moe else []
    if (profile := calibration.get("routing")) and names:
        plots["coverage"] = report_plots.coverage_plot(profile, names)
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
