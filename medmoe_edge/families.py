"""The two families of models behind one interface, so that a verb need not know which it was given.

What a method needs is imported inside it: a verb pays for nothing that it does not use.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from medmoe_edge.bundle.bundle import Kind, model_kind
from medmoe_edge.data.datasets import NO_SCAN
from medmoe_edge.embedded import EMBEDDED, bundle_path
from medmoe_edge.errors import DataError, InputError, Told, needs
from medmoe_edge.pipeline import (
    EvaluateOptions,
    ExportOptions,
    VerifyOptions,
    collector_paused,
)

if TYPE_CHECKING:
    from medmoe_edge._types import Progress
    from medmoe_edge.config import Confidence
    from medmoe_edge.contrastive.evaluate import ModalityEvaluation
    from medmoe_edge.data.datasets import Example, Finding, LabelledImage
    from medmoe_edge.engine.engine import Engine
    from medmoe_edge.evaluation.confidence import RefusalFit, Said
    from medmoe_edge.evaluation.evaluate import Evaluation, ModalityAccuracy, Scores
    from medmoe_edge.evaluation.findings import FindingScore, NoScans, Paraphrased, Versions
    from medmoe_edge.evaluation.inspection import Inspection, ModalityInspection
    from medmoe_edge.evaluation.verify import Verification
    from medmoe_edge.pipeline.med_moe import Export


@dataclass(frozen=True)
class AnswerScores(Told):
    """How a Med-MoE answered questions, without looking too, and how it read labelled images.

    Attributes:
        questions: How it answered; None where none were asked.
        of: The number of questions that those asked were drawn from.
        labels: How it read the modality of labelled images.
        blind: How it answered the same questions about a black picture.
        findings: How well it saw each finding.
        no_scans: Which pictures it took for no scans; None where that was fitted (`refusals`).
        languages: How it answered in other languages than English.
        paraphrases: What other words cost, over `"all"` questions and by their source.
        confidence: What the bundle knows of its confidence, from before or from this run.
        refusals: Thresholds fitted in this run, whose `questions.reliability` is then raw.
        fitted_on_these: Whether an earlier run fitted the confidence on these very questions: then
            `questions.reliability` flatters it, and `confidence.after` does not.
        image_tokens: How many the model read of each image; None of answers in a file.
    """

    questions: "Evaluation | None"
    of: int
    labels: "ModalityAccuracy | None" = None
    blind: "Scores | None" = None
    findings: "Sequence[FindingScore]" = ()
    no_scans: "NoScans | None" = None
    languages: "Mapping[str, Versions] | None" = None
    paraphrases: "Mapping[str, Paraphrased] | None" = None
    confidence: "Confidence | None" = None
    refusals: "Mapping[str, RefusalFit] | None" = None
    fitted_on_these: bool = False
    image_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        told = super().to_json()
        return (told.pop("questions") or {}) | told


def score_file(
    predictions: Path, references: Path, *, limit: int | None = None, seed: int = 0
) -> AnswerScores:
    """Score answers that lie in a file; see `evaluation.evaluate.score_predictions`."""
    from medmoe_edge.evaluation.evaluate import sample_examples, score_predictions

    counts: list[int] = []

    def choose(examples: "Sequence[Example]") -> "Sequence[Example]":
        counts.append(len(examples))
        return sample_examples(examples, limit, seed)

    return AnswerScores(score_predictions(predictions, references, choose=choose), counts[0])


class Family(Protocol):
    """What the verbs do with a model of one family; each method raises `MedMoEError`."""

    def check_export(self, options: ExportOptions, target: str) -> None:
        """Raise `InputError` for an option or a target that the family does not have."""

    def export(
        self, checkpoint: Path, out: Path, options: ExportOptions, progress: "Progress"
    ) -> "Export":
        """Write a portable bundle, verified where data is given."""

    def verify(self, bundle: Path, options: VerifyOptions, progress: "Progress") -> "Verification":
        """Check a bundle; with a checkpoint, measure what quantisation cost."""

    def evaluate(
        self, model: str, options: EvaluateOptions, progress: "Progress"
    ) -> "AnswerScores | ModalityEvaluation":
        """Score a model on data."""

    def inspect(self, folder: Path, vision_tower: Path | None) -> "Inspection | ModalityInspection":
        """Describe what a bundle or checkpoint holds."""


class MedMoEFamily:
    """Med-MoE: questions about an image, answered in words."""

    def check_export(self, options: ExportOptions, target: str) -> None:
        """Little is refused before the checkpoint is read."""
        if options.as_published:
            raise InputError("--as-published is for modality-moe models.", "Leave it out.")

    def export(
        self, checkpoint: Path, out: Path, options: ExportOptions, progress: "Progress"
    ) -> "Export":
        """See `med_moe.export`."""
        with needs("export"), collector_paused():
            from medmoe_edge.pipeline import med_moe
        return med_moe.export(checkpoint, out, options, progress)

    def verify(self, bundle: Path, options: VerifyOptions, progress: "Progress") -> "Verification":
        """See `evaluation.verify`, and `med_moe.verify` against a checkpoint."""
        if options.report is not None:  # looks at once for what the page needs
            from medmoe_edge.evaluation.report import write_report
        if options.against is None:
            from medmoe_edge.evaluation.verify import verify

            found = verify(bundle, progress=progress)
        else:
            with needs("export"):
                from medmoe_edge.pipeline import med_moe
            found = med_moe.verify(bundle, options.against, options, progress)
        if options.report is not None:
            write_report(found, options.report)
        return found

    def evaluate(self, model: str, options: EvaluateOptions, progress: "Progress") -> AnswerScores:
        """Ask every question, and read the images that are not to train on."""
        from medmoe_edge.engine.engine import load
        from medmoe_edge.evaluation import evaluate as evaluation

        data = _read_scored(options)
        if options.fit_confidence:
            with needs("export"):
                from medmoe_edge.evaluation.confidence import check_fittable

            check_fittable(bundle_path(model))
        engine = load(
            model,
            runtime=options.runtime,
            device=options.device,
            allow_repetition=options.allow_repetition,
        )
        told = _Told(progress)
        tokens = engine.config.vision.image_tokens
        scores = AnswerScores(None, data.of, confidence=engine.fitted, image_tokens=tokens)
        if options.fit_confidence:
            engine.fitted = None  # what is fitted is the model's own probability
        longest = options.max_new_tokens
        if data.examples:
            asked = evaluation.evaluate(
                engine, data.examples, max_new_tokens=longest, progress=told("Questions")
            )
            scores = replace(scores, questions=asked)
            if options.predictions:
                evaluation.save_predictions(asked.predictions, options.predictions)
        scores = _with_confidence(engine, model, options, data, scores, told)
        if data.examples and options.blind:
            blind = evaluation.evaluate_blind(
                engine, data.examples, max_new_tokens=longest, progress=told("Blind")
            )
            scores = replace(scores, blind=blind)
        if options.labels:
            labels = evaluation.evaluate_labels(engine, data.labelled, progress=told("Labels"))
            scores = replace(scores, labels=labels)
        return _seen(engine, data, scores, told)

    def inspect(self, folder: Path, vision_tower: Path | None) -> "Inspection":
        """See `evaluation.inspection`."""
        from medmoe_edge.evaluation.inspection import inspect_model

        return inspect_model(folder, vision_tower=vision_tower)


class ContrastiveFamily:
    """MedMoE: images and texts compared with each other."""

    def check_export(self, options: ExportOptions, target: str) -> None:
        """Weights in 8-bit groups need no calibration, and there is one target."""
        _refuse(
            {
                "--group-size": options.group,
                "--experts": options.experts,
                "--vision": options.vision != "groups",
                "--stats": options.stats,
                "--strict": options.strict,
                "--vision-tower": options.vision_tower,
                "--modality": options.modalities,
                "--merge": options.merge,
                "--image-tokens": options.image_tokens,
                "--target": target != "onnxruntime",
            }
        )
        if options.precision not in ("fp32", "int8"):
            raise InputError(
                f"A modality-moe model is not exported in {options.precision}.",
                "Use --int8 or --fp32.",
            )

    def export(
        self, checkpoint: Path, out: Path, options: ExportOptions, progress: "Progress"
    ) -> "Export":
        """See `pipeline.contrastive.export_modality`."""
        with needs("export"):
            from medmoe_edge.pipeline.contrastive import export_modality
        return export_modality(checkpoint, out, options, progress)

    def verify(self, bundle: Path, options: VerifyOptions, progress: "Progress") -> "Verification":
        """See `evaluation.contrastive`."""
        _refuse(
            {
                "--beside": options.beside,
                "--report": options.report,
                "--vision-tower": options.vision_tower,
            }
        )
        if options.against is None:
            from medmoe_edge.evaluation.contrastive import verify_modality

            return verify_modality(bundle, progress=progress)
        with needs("export"):
            from medmoe_edge.pipeline.contrastive import verify_modality_on
        return verify_modality_on(bundle, options.against, options, progress)

    def evaluate(
        self, model: str, options: EvaluateOptions, progress: "Progress"
    ) -> "ModalityEvaluation":
        """See `contrastive.evaluate`."""
        from medmoe_edge.contrastive.engine import load_modality
        from medmoe_edge.contrastive.evaluate import evaluate_modality

        _refuse(
            {
                "--labels": options.labels,
                "--predictions": options.predictions,
                "--blind": options.blind,
                "--limit": options.limit,
                "--findings": options.findings,
                "--languages": options.languages,
                "--paraphrases": options.paraphrases,
                "--fit-confidence": options.fit_confidence,
                "--selective-accuracy": options.selective_accuracy,
                "--allow-repetition": options.allow_repetition,
                "--device": options.device == "cuda",
            }
        )
        if options.runtime == "tensorrt":
            raise InputError("A modality-moe does not run on tensorrt.", "Leave --runtime out.")
        engine = load_modality(model, runtime=options.runtime)
        if options.data is None:
            raise InputError("A modality-moe model is scored on --data.", "Give a folder of it.")
        return evaluate_modality(engine, options.data, progress)

    def inspect(self, folder: Path, vision_tower: Path | None) -> "ModalityInspection":
        """See `evaluation.inspection_contrastive`."""
        from medmoe_edge.evaluation.inspection import inspect_modality

        return inspect_modality(folder)


class _Scored(NamedTuple):
    """What a Med-MoE is scored on: questions (drawn from `of`), labelled images, findings."""

    examples: "Sequence[Example]"
    of: int
    labelled: "Sequence[LabelledImage]"
    findings: "Sequence[Finding]"
    languages: Sequence[Mapping[str, str]]
    paraphrases: Mapping[str, Sequence[str]]

    @property
    def pictures(self) -> "list[Finding]":
        """Pictures that are no scans."""
        return [one for one in self.findings if one.modality == NO_SCAN]

    @property
    def scans(self) -> list[Path]:
        """All other images, each once."""
        scans = [one.image for one in self.findings if one.modality != NO_SCAN]
        scans += [item.image for item in self.labelled]
        scans += [example.image for example in self.examples]
        return list(dict.fromkeys(scans))

    def owned(self, images: Sequence[Path], said: Sequence[Any]) -> "list[Said]":
        """The refusals of each image, beside its patient, or itself where none is named."""
        named: list[Finding | Example] = [*self.findings, *self.examples]
        patients = {one.image.resolve(): one.patient for one in named if one.patient}
        owners = [patients.get(file, str(file)) for file in (image.resolve() for image in images)]
        return [(owner, one.refusals) for owner, one in zip(owners, said, strict=True)]


def _read_scored(options: EvaluateOptions) -> _Scored:
    """Read all files before a model is loaded; images to train on are left out."""
    from medmoe_edge.data.datasets import check_exist, read_examples, read_findings, read_labels
    from medmoe_edge.evaluation.evaluate import check_examples, sample_examples
    from medmoe_edge.evaluation.findings import read_paraphrases, read_versions

    if options.data is None and (options.fit_confidence or options.paraphrases):
        what = "--fit-confidence" if options.fit_confidence else "--paraphrases"
        raise InputError(f"{what} is about questions with answers.", "Add --data FILE.")
    if options.selective_accuracy is not None and not options.fit_confidence:
        raise InputError(
            "--selective-accuracy is what a fit aims at.", "Add --fit-confidence, or leave it out."
        )
    given = read_examples(options.data) if options.data else []
    examples = sample_examples(given, options.limit, options.seed)
    if options.data:
        check_examples(examples)
        check_exist((example.image for example in examples), options.data)
    labelled = read_labels(options.labels) if options.labels else []
    findings = read_findings(options.findings) if options.findings else []
    scored = _Scored(
        examples,
        len(given),
        [item for item in labelled if item.split != "train"],
        [item for item in findings if item.split != "train"],
        read_versions(options.languages) if options.languages else [],
        read_paraphrases(options.paraphrases) if options.paraphrases else {},
    )
    for file, held_out in ((options.labels, scored.labelled), (options.findings, scored.findings)):
        if file and not held_out:
            raise DataError(
                f"{file} holds no image to validate or to test on, only to train on.",
                "Give some images another split, or leave the file out.",
            )
        if file:
            check_exist((each.image for each in held_out), file)
    if options.languages and not scored.scans:
        raise InputError(
            "--languages asks about images, and there are none.", "Add --data or --findings."
        )
    return scored


class _Told:
    """The progress of each step, by its name."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress

    def __call__(self, step: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(step, done, total)


def _with_confidence(
    engine: "Engine",
    model: str,
    options: EvaluateOptions,
    data: _Scored,
    scores: AnswerScores,
    told: _Told,
) -> AnswerScores:
    """The scores, with pictures that are no scans and with the confidence that is to be fitted."""
    from medmoe_edge.evaluation import confidence as fitting
    from medmoe_edge.evaluation import findings as seeing
    from medmoe_edge.evaluation.verify import Data

    pictures = [one.image for one in data.pictures]
    of_pictures = seeing.ask_flagship(engine, pictures, progress=told("No scans"))
    of_scans = seeing.ask_flagship(engine, data.scans, progress=told("Scans")) if pictures else []
    if pictures and not options.fit_confidence:
        found = seeing.score_no_scans(data.pictures, of_pictures, of_scans)
        scores = replace(scores, no_scans=found)
    known = scores.confidence
    if scores.questions is None or options.data is None or not (known or options.fit_confidence):
        return scores
    asked = Data(options.data.name, data.examples)
    if not options.fit_confidence:
        same = known is not None and known.data_sha256 == asked.sha256()
        return replace(scores, fitted_on_these=same)
    answers = scores.questions.predictions
    fitted = fitting.fit_confidence(
        data.examples,
        answers,
        data=asked.name,
        data_sha256=asked.sha256(),
        selective_accuracy=options.selective_accuracy,
    )
    refusals = fitting.fit_refusals(
        engine.config.codes,
        data.owned([example.image for example in data.examples], answers),
        data.owned(data.scans[: len(of_scans)], of_scans),
        data.owned(pictures, of_pictures),
    )
    kept = fitting.keep_confidence(bundle_path(model), fitted, refusals)
    engine.fitted, engine.thresholds = kept.confidence, kept.refusals
    return replace(scores, confidence=kept.confidence, refusals=refusals)


def _seen(engine: "Engine", data: _Scored, scores: AnswerScores, told: _Told) -> AnswerScores:
    """The scores, with those of findings, of other languages and of other words."""
    from medmoe_edge.evaluation import findings as seeing

    if len(data.findings) > len(data.pictures):
        known, engine.fitted = engine.fitted, None  # calibration makes ties of what can be ordered
        found = seeing.evaluate_findings(engine, data.findings, progress=told("Findings"))
        scores, engine.fitted = replace(scores, findings=found), known
    if data.languages:
        versions = seeing.evaluate_versions(
            engine, data.languages, data.scans, progress=told("Languages")
        )
        scores = replace(scores, languages=versions)
    if data.paraphrases and scores.questions:
        reworded = seeing.evaluate_paraphrases(
            engine,
            data.examples,
            scores.questions.predictions,
            data.paraphrases,
            progress=told("Paraphrases"),
        )
        scores = replace(scores, paraphrases=reworded)
    return scores


FAMILIES: dict[Kind, Family] = {"med-moe": MedMoEFamily(), "modality-moe": ContrastiveFamily()}


def family_of(model: str | Path) -> Family:
    """The family of an embedded model, a bundle or a checkpoint; raises `BundleError`."""
    name = str(model)
    return FAMILIES[model_kind(bundle_path(name) if name in EMBEDDED else Path(name))]


def check_calibratable(checkpoint: Path) -> None:
    """Raise `InputError` for a checkpoint whose weights are rounded without statistics."""
    if model_kind(checkpoint) != "med-moe":
        raise InputError(
            f"{checkpoint} is a modality-moe model, which needs no calibration.",
            "Export it at once: medmoe-edge export CHECKPOINT --int8",
        )


def _refuse(options: Mapping[str, object]) -> None:
    """Raise `InputError` for the first option that was given: they are Med-MoE's."""
    for option, value in options.items():
        if value:
            raise InputError(f"{option} does not go with a modality-moe model.", "Leave it out.")
