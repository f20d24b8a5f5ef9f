"""What `verify`, `eval`, `calibrate`, `export` and a comparison of bundles show to people."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medmoe_edge.render.console import hint, show, show_table

if TYPE_CHECKING:
    from medmoe_edge.calibration.data import Skipped
    from medmoe_edge.calibration.statistics import Statistics
    from medmoe_edge.config import Confidence
    from medmoe_edge.evaluation.confidence import Problem
    from medmoe_edge.evaluation.findings import FindingScore
    from medmoe_edge.evaluation.gates import Compared, GateResult
    from medmoe_edge.evaluation.inspection import Change, Changes
    from medmoe_edge.evaluation.metrics import Answers, Fidelity, Reduction, Share
    from medmoe_edge.evaluation.mutations import Mutations
    from medmoe_edge.evaluation.quick import Quick
    from medmoe_edge.evaluation.record import ContrastiveFigures
    from medmoe_edge.evaluation.targets import Agreement
    from medmoe_edge.evaluation.verify import Verification
    from medmoe_edge.families import AnswerScores

VERDICTS = {
    **{"met": "green", "not decided": "yellow", "failed": "bold red"},
    "within chance": "yellow",  # in records of earlier versions
}
OUTCOMES = {"passed": "green", "not decided": "yellow", "failed": "bold red"}
STATUSES = {"covered": "green", "drew more": "green", "borrowed": "yellow", "data-free": "yellow"}
COMPARED = ("answers agree", "accuracy", "KL, nats", "routing flips")
NONE = "\N{EN DASH}"
FEW = 8  # matrices named
LISTED, LONGEST = 20, 60  # rows of a part of a change record, letters of a value; --json has all


def show_verification(verification: "Verification") -> None:
    """The gates, the figures by modality, other candidates beside the bundle, and the verdict."""
    from medmoe_edge.engine.loading import proven
    from medmoe_edge.evaluation.record import AnswersRecord

    name, record = verification.bundle.name, verification.record
    if record:
        show_gates(f"{name} against its checkpoint", record.gates)
        if isinstance(record, AnswersRecord):  # of a MedMoE, the gates tell all
            _show_modalities(record.figures)
            _show_reduction(record.figures.reduction)
            if verification.beside:
                _show_candidates({f"{name} (this bundle)": record.figures, **verification.beside})
    if verification.fitted:
        show_confidence(verification.fitted)
    _show_damage(verification.faults, verification.weights)
    _show_mutations(record.mutations if record else None)
    if record:
        outcome = verification.outcome
        seen, day = _seen(record.figures, "images"), record.when.partition("T")[0]
        verdict = f"{outcome.capitalize()}: {seen} of {record.data.name}, {day}."
        show(verdict, OUTCOMES[outcome])
        hint(proven(verification.bundle).hint)
        return
    if verification.passed is None:
        show("Its files are whole, its weights and experts sound.")
    show_not_measured()


def show_quick(found: "Quick") -> None:
    """The gates, and the verdict for this machine."""
    show_gates(f"{found.bundle.name} on this machine", found.gates)
    _show_damage(found.faults, found.weights)
    _show_mutations(found.mutations)
    seen = "" if found.figures is None else f": {_seen(found.figures, 'recorded images')}"
    outcome = {True: "passed", None: "not decided", False: "failed"}[found.passed]
    show(f"{outcome.capitalize()} on {found.machine}{seen}.", OUTCOMES[outcome])
    if found.passed is not False:
        show("So few only look for failures: see medmoe-edge verify for what was proven.", "dim")


def _show_damage(faults: Sequence[str], weights: "Compared | None") -> None:
    for fault in faults:
        show(f"Not sound: {fault}", "red")
    if weights is None:
        show("It carries no marks of its checkpoint's weights, which were not compared.", "yellow")
        return
    for name in weights.wrong[:FEW]:
        show(f"Not the checkpoint's: {name}", "red")
    if len(weights.wrong) > FEW:
        show(f"and {len(weights.wrong) - FEW} more", "red")


def _show_mutations(found: "Mutations | None") -> None:
    if found is not None:
        show(found.summary, "yellow" if found.unseen else "dim")


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


def show_seen(found: "AnswerScores") -> None:
    """How findings are seen, what is taken for no scan, what other words cost, and confidence."""
    if found.findings:
        show()
        columns = ["finding", "present", "absent", "AUC", "", "sensitivity", "specificity"]
        rows = map(_finding_row, found.findings)
        show_table("Findings: yes against no", [*columns, "shuffled"], rows)
        show(
            "Shuffled: each image with the answer about another one. In brackets: 95% intervals, "
            "and where 95% of the shuffled ones lie. A black picture is at 0.50 whatever it says.",
            "dim",
        )
    for line in _seen_lines(found):
        show(line)
    if found.confidence:
        show()
        show_confidence(found.confidence)
        if found.refusals is not None:
            show("It was fitted in this run: the figures above it are of raw confidence.", "dim")
        elif found.fitted_on_these:
            show(
                "It was fitted on these very questions: the figures after fitting are of fits that "
                "did not see the answer's image, those above are not.",
                "dim",
            )


def show_confidence(fitted: "Confidence") -> None:
    """What a bundle knows of its confidence, and what that is worth."""
    before, after, unsure = fitted.before, fitted.after, fitted.unsure
    rows = [
        (name, f"{value.ece:.1%}", f"{value.accuracy:.1%}", f"{value.half:.1%}")
        for name, value in (("before fitting", before), ("after", after))
    ]
    about = f"{after.n:,} answers about {fitted.images:,} images of {fitted.data}"
    show_table(f"Confidence, by {about}", ["", "off by (ECE)", "right", "surer half"], rows)
    show(
        f"Unsure below {fitted.threshold:.0%}: {unsure.answers:.1%} of the answers, with "
        f"{unsure.errors:.1%} of the errors; of the others {unsure.accuracy:.1%} are right "
        f"({fitted.selective_accuracy:.0%} was aimed at)."
    )
    if fitted.doubtful_refusals:
        names = ", ".join(code.replace("_", " ") for code in fitted.doubtful_refusals)
        show(f"Refusals that are not to be relied on, by the fit: {names}.", "yellow")


def _finding_row(score: "FindingScore") -> tuple[object, ...]:
    (low, high), (least, most) = score.auc_interval, score.chance
    return (
        *(score.finding, score.present, score.absent),
        *(f"{score.auc:.2f}", f"[{low:.2f} to {high:.2f}]"),
        *(f"{score.sensitivity:.1%}", f"{score.specificity:.1%}"),
        f"{score.shuffled.auc:.2f} [{least:.2f} to {most:.2f}]",
    )


def _seen_lines(found: "AnswerScores") -> Iterator[str]:
    if seen := found.no_scans:
        yield (
            f"Taken for no scan: {_counted(seen.pictures)} pictures that are none, "
            f"{_counted(seen.scans)} scans."
        )
    for code, fit in (found.refusals or {}).items():
        caught = f"{_counted(fit.refused)} that it is meant for, " if fit.refused else ""
        name = code.replace("_", " ")
        yield (
            f"Refusal, {name}: from {fit.threshold:.2g} on. It flags {caught}"
            f"{_counted(fit.usual)} others."
        )
        yield from (_PROBLEMS[problem] for problem in fit.problems)
    for language, said in (found.languages or {}).items():
        yield (
            f"In {language}: {_counted(said.alike)} answered as in English, "
            f"{_counted(said.flagged)} marked as unsure, {_counted(said.silent)} neither."
        )
    for name, cost in (found.paraphrases or {}).items():
        low, high = cost.interval
        yield (
            f"In other words, {name}: {cost.original:.1%} of {cost.questions:,} right become "
            f"{cost.paraphrased:.1%}: {100 * cost.loss:.1f} points lost "
            f"({100 * low:.1f} to {100 * high:.1f})."
        )


_PROBLEMS: "Mapping[Problem, str]" = {
    "not separated": (
        "That is no more than chance may give: it does not tell what it is meant for from the "
        "others, and its threshold is as without pictures that are no scans."
    ),
    "flags too many": "That is more than the 2% of the others that were aimed at.",
}


def _counted(share: "Share") -> str:
    return f"{share.count:,} of {share.total:,} ({share.share:.1%})"


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
    told = statistics.source.labelled_by  # which decides what each expert is calibrated on
    if told:
        by = ", ".join(f"{count:,} {TOLD_BY.get(who, who)}" for who, count in told.items())
        show(f"Modality told: {by}.", "dim")
    free = [row for row in rows if row[-1] == "data-free"]
    if free:
        named = ", ".join(f"layer {layer} {expert}" for layer, expert, *_ in free)
        show(f"Stayed data-free, for want of tokens: {named}.", "yellow")
    elif rows:
        show("No expert stayed data-free.", "green")
    for image in skipped:
        show(f"Skipped: {image.reason}", "yellow")


TOLD_BY = {
    "list": "by the list",
    "dicom": "by DICOM",
    "folder": "by the folder",
    "router": "by the model's own router",
}


def show_gates(title: str, gates: "Sequence[GateResult]") -> None:
    """What was measured, what was asked, and the notes."""
    rows = [
        (gate.title, gate.shown(gate.measured), gate.bounds or NONE, gate.asked, gate.verdict)
        for gate in gates
    ]
    show_table(title, ["gate", "measured", "interval", "bound", "verdict"], rows, styles=VERDICTS)
    for note in (gate.note for gate in gates if gate.note):
        show(f"  {note}", "dim")
    show()


def _show_modalities(figures: "Fidelity") -> None:
    flips = figures.routing.by_modality if figures.routing else {}
    rows = {
        name: (f"{answers.n:,}", *_compared(answers, flips.get(name)))
        for name, answers in figures.by_modality.items()
    }
    _show_columns("", ["modality", "questions", *COMPARED], rows)


def _show_reduction(found: "Reduction | None") -> None:
    """Which answers fewer image tokens turned, in both directions."""
    if found is None:
        return
    groups = {"all": found.flips, **found.by_modality}
    groups |= {name.lower(): flips for name, flips in found.by_answer_type.items()}
    rows = [
        (name, f"{flips.changed.total:,}", _counted(flips.changed), flips.lost, flips.gained)
        for name, flips in groups.items()
    ]
    columns = ["", "questions", "changed", "right to wrong", "wrong to right"]
    show_table(f"Against the checkpoint with all {found.image_tokens} image tokens", columns, rows)
    show()


def _show_candidates(candidates: "Mapping[str, Fidelity]") -> None:
    rows = {
        name: (
            *_compared(found.overall, found.routing.flips if found.routing else None),
            f"{found.vision.cosine_mean:.4f}",
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


def _seen(figures: "Fidelity | ContrastiveFigures", images: str) -> str:
    from medmoe_edge.evaluation.metrics import Fidelity

    told = f"{figures.images:,} {images}"
    return (
        f"{figures.questions:,} questions about {told}" if isinstance(figures, Fidelity) else told
    )


def _compared(answers: "Answers", flips: "Share | None") -> Iterator[str]:
    """The figures of the columns `COMPARED`."""
    yield f"{answers.answer_agreement.share:.2%}"
    yield f"{100 * answers.accuracy.difference:+.2f} points" if answers.accuracy else NONE
    yield f"{answers.kl.mean:.2g}"
    yield f"{flips.share:.2%}" if flips else NONE


def show_changes(changes: "Changes") -> None:
    """A change record: which bundles, and what differs, part by part; long parts are cut."""
    rows = [
        (name.replace("_", " "), before, changes.after[name])
        for name, before in changes.before.items()
    ]
    show_table("Bundles", ["", "before", "after"], _shown(rows), left=3)
    for title, compared in (("weights", changes.weights), ("files", changes.files)):
        if compared is None:
            show("Weights: not compared, since they lie in engines.")
            continue
        counts = ", ".join(
            f"{len(compared[kind]):,} {kind}" for kind in ("changed", "added", "removed")
        )
        show(f"{title.capitalize()}: {compared['same']:,} the same, {counts}.")
        names = compared["changed"] if title == "weights" else []
        for name in names[:LISTED]:
            show(f"  {name}")
        if len(names) > LISTED:
            show(f"  and {len(names) - LISTED:,} more: --json has them all.")
    for title in ("precision", "gates", "thresholds", "verification", "other"):
        _show_part(title.capitalize(), getattr(changes, title))
    answered = f"{len(changes.answers):,} of {changes.asked:,} that both carry"
    _show_part(f"Questions answered otherwise by the checkpoints: {answered}", changes.answers)


def _show_part(title: str, changes: "Sequence[Change]") -> None:
    if not changes:
        show(f"{title}: no change." if ":" not in title else f"{title}.")
        return
    show_table(title, ["", "before", "after"], _shown(changes[:LISTED]), left=3)
    if len(changes) > LISTED:
        show(f"and {len(changes) - LISTED:,} more: --json has them all.")


def _shown(rows: "Sequence[Sequence[Any]]") -> list[list[str]]:
    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        text = NONE if value is None else text
        return text if len(text) <= LONGEST + 4 else f"{text[:LONGEST]} ..."

    return [[str(name), cell(before), cell(after)] for name, before, after in rows]
