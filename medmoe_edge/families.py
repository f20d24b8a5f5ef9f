"""The two families of models behind one interface, so that a verb need not know which it was given.

What a method needs is imported inside it: a verb pays for nothing that it does not use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medmoe_edge.bundle.bundle import Kind, model_kind
from medmoe_edge.embedded import EMBEDDED, bundle_path
from medmoe_edge.errors import DataError, InputError, needs

if TYPE_CHECKING:
    from medmoe_edge._types import Progress
    from medmoe_edge.contrastive.evaluate import ModalityEvaluation
    from medmoe_edge.data.datasets import Example
    from medmoe_edge.engine.loading import Device, RuntimeName
    from medmoe_edge.evaluation.evaluate import Evaluation, ModalityAccuracy, Scores
    from medmoe_edge.evaluation.inspection import Inspection, ModalityInspection
    from medmoe_edge.evaluation.verify import Verification
    from medmoe_edge.export.plan import GroupSize, Method, Precision
    from medmoe_edge.pipeline.med_moe import Export


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint becomes a portable bundle; see `med_moe.export`."""

    precision: "Precision" = "int8"
    method: "Method" = "auto"
    budget_bits: float | None = None
    group: "GroupSize | None" = None
    experts: str | None = None
    calibrate_on: str | None = None
    samples: int = 128
    stats: Path | None = None
    strict: bool = False
    name: str | None = None
    vision_tower: Path | None = None
    as_published: bool = False
    force: bool = False


@dataclass(frozen=True)
class CalibrateOptions:
    """What a checkpoint is calibrated on.

    Attributes:
        data: A folder of images, a file of questions, a dataset folder, or "builtin".
        samples: Questions to draw from it, evenly over the modalities.
        hessians: Whether to gather second moments, for GPTQ; much the largest part.
        strict: Whether to refuse experts that too few tokens reach.
        vision_tower: The vision tower, if the checkpoint holds none.
        force: Whether to replace what is already there.
    """

    data: str
    samples: int = 128
    hessians: bool = True
    strict: bool = False
    vision_tower: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class VerifyOptions:
    """What a bundle is verified against, on which data; see `med_moe.verify`."""

    against: Path | None = None
    data: str = "builtin"
    beside: Sequence[str] = ()
    report: Path | None = None
    vision_tower: Path | None = None
    record: bool | None = None


@dataclass(frozen=True)
class EvaluateOptions:
    """What a model is scored on, and where it runs.

    `blind`: the same questions about a black picture are scored too. At most `limit` questions are
    asked, drawn by `seed`. `predictions` is where every answer is written. With `labels` a Med-MoE
    may do without `data`: then only how it reads labelled images is scored.
    """

    data: Path | None
    labels: Path | None = None
    predictions: Path | None = None
    runtime: "RuntimeName" = "auto"
    device: "Device" = "auto"
    blind: bool = False
    limit: int | None = None
    seed: int = 0
    max_new_tokens: int = 32


@dataclass(frozen=True)
class AnswerScores:
    """How a Med-MoE answered questions, without looking too, and how it read labelled images.

    `of` is the number of questions that those asked were drawn from; `questions` is None where none
    were asked.
    """

    questions: "Evaluation | None"
    of: int
    labels: "ModalityAccuracy | None" = None
    blind: "Scores | None" = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return (self.questions.to_json() if self.questions else {}) | {
            "of": self.of,
            "labels": asdict(self.labels) if self.labels else None,
            "blind": asdict(self.blind) if self.blind else None,
        }


def score_file(
    predictions: Path, references: Path, *, limit: int | None = None, seed: int = 0
) -> AnswerScores:
    """Score answers that lie in a file; see `evaluation.predictions.score_predictions`."""
    from medmoe_edge.evaluation.evaluate import sample_examples
    from medmoe_edge.evaluation.predictions import score_predictions

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
        with needs("export"):
            from medmoe_edge.pipeline import med_moe
        given = {name: value for name, value in vars(options).items() if name != "as_published"}
        return med_moe.export(checkpoint, out, **given, progress=progress)

    def verify(self, bundle: Path, options: VerifyOptions, progress: "Progress") -> "Verification":
        """See `evaluation.verify`, and `med_moe.verify` against a checkpoint."""
        if options.against is None:
            from medmoe_edge.evaluation.verify import verify

            return verify(bundle, progress=progress)
        with needs("export"):
            from medmoe_edge.pipeline import med_moe
        return med_moe.verify(
            bundle,
            options.against,
            options.data,
            beside=options.beside,
            vision_tower=options.vision_tower,
            record=options.record,
            progress=progress,
        )

    def evaluate(self, model: str, options: EvaluateOptions, progress: "Progress") -> AnswerScores:
        """Ask every question, and read the labelled images that are not to train on."""
        from medmoe_edge.data.datasets import read_examples, read_labels
        from medmoe_edge.engine.engine import load
        from medmoe_edge.evaluation import evaluate as evaluation

        given = read_examples(options.data) if options.data else []
        examples = evaluation.sample_examples(given, options.limit, options.seed)
        if options.data:
            evaluation.check_examples(examples)
        labelled = read_labels(options.labels) if options.labels else []
        labelled = [item for item in labelled if item.split != "train"]
        if options.labels and not labelled:
            raise DataError(
                f"{options.labels} holds no image to validate or to test on, only to train on.",
                "Give some images another split, or leave the labels out.",
            )
        engine = load(model, runtime=options.runtime, device=options.device)
        longest = options.max_new_tokens
        asked = None
        if examples:
            asked = evaluation.evaluate(
                engine,
                examples,
                max_new_tokens=longest,
                progress=lambda *done: progress("Questions", *done),
            )
        if asked and options.predictions:
            evaluation.save_predictions(asked.predictions, options.predictions)
        blind = read = None
        if examples and options.blind:
            blind = evaluation.evaluate_blind(
                engine,
                examples,
                max_new_tokens=longest,
                progress=lambda *done: progress("Blind", *done),
            )
        if options.labels:
            read = evaluation.evaluate_labels(
                engine, labelled, progress=lambda *done: progress("Labels", *done)
            )
        return AnswerScores(asked, len(given), read, blind)

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
                "--stats": options.stats,
                "--strict": options.strict,
                "--vision-tower": options.vision_tower,
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
        return export_modality(
            checkpoint,
            out,
            precision="fp32" if options.precision == "fp32" else "int8",
            prove_on=options.calibrate_on,
            name=options.name,
            as_published=options.as_published,
            force=options.force,
            progress=progress,
        )

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
        return verify_modality_on(
            bundle, options.against, options.data, record=options.record, progress=progress
        )

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


FAMILIES: Mapping[Kind, Family] = {"med-moe": MedMoEFamily(), "modality-moe": ContrastiveFamily()}


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
