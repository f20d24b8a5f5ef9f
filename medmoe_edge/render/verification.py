"""What the verbs of quantisation and its proof show to people."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medmoe_edge.render.console import show, show_table

if TYPE_CHECKING:
    from medmoe_edge.calibration.data import Skipped
    from medmoe_edge.calibration.statistics import Statistics
    from medmoe_edge.evaluation.ablation_results import Ablation
    from medmoe_edge.evaluation.targets import Agreement
    from medmoe_edge.evaluation.verify import Verification

VERDICTS = {"met": "green", "within chance": "yellow", "failed": "bold red"}
STATUSES = {"covered": "green", "drew more": "green", "borrowed": "yellow", "data-free": "yellow"}
COMPARED = ("answers agree", "accuracy", "KL, nats", "routing flips")
NONE = "\N{EN DASH}"


def show_verification(verification: "Verification") -> None:
    """The gates, the figures by modality, other candidates beside the bundle, and the verdict."""
    name, record = verification.bundle.name, verification.record
    if record:
        _show_gates(f"{name} against its checkpoint", record["gates"])
        _show_modalities(record["figures"])
        if verification.beside:
            candidates = {f"{name} (this bundle)": record["figures"]}
            candidates |= {other: found.to_json() for other, found in verification.beside.items()}
            _show_candidates(candidates)
    for fault in verification.faults:
        show(f"Not sound: {fault}", "red")
    if record:
        verdict, style = ("Passed", "green") if verification.passed else ("Failed", "bold red")
        show(f"{verdict}: {_measured(record)}.", style)
        return
    if not verification.faults:
        show("Its files are whole, its weights and experts sound.")
    show_not_measured()


def show_not_measured() -> None:
    """What is to be done about a bundle without proof."""
    show("What quantisation cost was not measured: see medmoe-edge verify --help.", "yellow")


def show_agreement(found: "Sequence[Agreement]") -> None:
    """Every target against the specification."""
    from medmoe_edge.evaluation.targets import BOUND

    rows = [
        (
            target.target,
            target.executed,
            f"{target.logit_error:.1e}",
            f"{target.worst_question:.1e}",
            f"{target.same_answers.count:,} of {target.same_answers.total:,}",
            f"{target.rerouted.count:,} of {target.rerouted.total:,}",
            f"{target.widest_tie:.2g}",
        )
        for target in found
    ]
    columns = ["target", "run by", "logits off by", "worst", "same answers", "rerouted", "tie"]
    show_table("Against the specification: stored weights, fp32 arithmetic", columns, rows, left=2)
    show(
        "Rerouted: tokens x layers sent to other experts; tie: the widest lead, in probability, "
        "that one of those experts had.",
        "dim",
    )
    for target in found:
        if not target.agrees:
            show(
                f"{target.target} is off by more than {BOUND:.0%}. ONNX Runtime's CPU rounds the "
                "activations of quantised matrices to 8 bits; elsewhere it is a fault.",
                "yellow",
            )


def show_coverage(
    statistics: "Statistics", expert_names: Sequence[str], skipped: Sequence["Skipped"]
) -> None:
    """What each expert saw, what was done where it was too little, and which images were unfit."""
    samples = ", ".join(f"{count} {name}" for name, count in statistics.samples.items())
    rows = [
        (
            record.layer,
            expert_names[record.expert] if expert_names else record.expert,
            f"{record.tokens:,}",
            NONE if record.own_modality_tokens is None else f"{record.own_modality_tokens:,}",
            f"{record.needed:,}",
            f"{record.borrowed:,}",
            record.status,
        )
        for record in statistics.coverage
    ]
    title = f"Calibrated on {samples}"
    if rows:
        columns = ["layer", "expert", "tokens", "own modality", "needed", "borrowed", "status"]
        show_table(title, columns, rows, left=2, styles=STATUSES)
    else:
        show(title)
    for image in skipped:
        show(f"Skipped: {image.reason}", "yellow")


def show_ablation(ablation: "Ablation") -> None:
    """One row per variant, the recipe that trained all, and the routers' confusions.

    The table is cut where its columns change their subject, so that each part fits a terminal.
    """
    from medmoe_edge.evaluation.ablation_results import caption, confusion_table, table

    columns, rows = table(ablation)
    cuts = [1, columns.index("its interval") + 1, columns.index("activated"), len(columns)]
    for start, stop in itertools.pairwise(cuts):
        part = [[row[0], *row[start:stop]] for row in rows]
        show_table("", [columns[0], *columns[start:stop]], part)
        show()
    show(caption(ablation), "dim")
    for row in ablation.rows:
        for images, found in row.result.router.items():
            columns, confusions = confusion_table(found)
            show_table(f"{row.result.variant}: modality found, {images}", columns, confusions)


def _show_gates(title: str, gates: Sequence[Mapping[str, Any]]) -> None:
    from medmoe_edge.evaluation.gates import GateResult

    results = [GateResult.from_json(gate) for gate in gates]
    rows = [
        (gate.title, gate.shown(gate.measured), gate.bounds or NONE, gate.asked, gate.verdict)
        for gate in results
    ]
    show_table(title, ["gate", "measured", "interval", "bound", "verdict"], rows, styles=VERDICTS)
    for note in (gate.note for gate in results if gate.note):
        show(f"  {note}", "dim")
    show()


def _show_modalities(figures: Mapping[str, Any]) -> None:
    if "by_modality" not in figures:  # of a MedMoE, the gates tell all
        return
    flips = figures["routing"]["by_modality"] if figures["routing"] else {}
    rows = {
        name: (f"{answers['n']:,}", *_compared(answers, flips.get(name)))
        for name, answers in figures["by_modality"].items()
    }
    _show_columns("", ["modality", "questions", *COMPARED], rows)


def _show_candidates(candidates: Mapping[str, Mapping[str, Any]]) -> None:
    rows = {
        name: (
            *_compared(found["overall"], found["routing"]["flips"] if found["routing"] else None),
            f"{found['vision']['cosine_mean']:.4f}",
        )
        for name, found in candidates.items()
    }
    _show_columns("Beside other candidates", ["", *COMPARED, "image cosine"], rows)


def _show_columns(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """A table without the columns that hold nothing."""
    cells = [columns, *([name, *row] for name, row in rows.items())]
    kept = [column for column in zip(*cells, strict=True) if {*column[1:]} != {NONE}]
    first, *others = zip(*kept, strict=True)
    show_table(title, first, others)
    show()


def _measured(record: Mapping[str, Any]) -> str:
    figures = record["figures"]
    images = f"{figures['images']:,} images"
    if "questions" in figures:
        images = f"{figures['questions']:,} questions about {images}"
    return f"{images} of {record['data']['name']}, {record['when'].partition('T')[0]}"


def _compared(answers: Mapping[str, Any], flips: Mapping[str, Any] | None) -> Iterator[str]:
    """The figures of the columns `COMPARED`."""
    yield f"{answers['answer_agreement']['share']:.2%}"
    accuracy = answers["accuracy"]
    yield f"{100 * accuracy['difference']:+.2f} points" if accuracy else NONE
    yield f"{answers['kl']['mean']:.2g}"
    yield f"{flips['share']:.2%}" if flips else NONE
