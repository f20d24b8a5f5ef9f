"""From a checkpoint to a bundle that carries its proof; here what its steps are asked for.

The options are handed through whole, from the command line or from Python down to the step.
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmoe_edge.atomic import check_apart, refuse_special
from medmoe_edge.config import (
    Device,
    GroupSize,
    Method,
    Precision,
    RuntimeName,
    VisionScales,
)
from medmoe_edge.errors import InputError, Options

SAMPLES = 128  # to calibrate on


def check_output(
    file: Path, force: bool, *inputs: Path | None, around: Iterable[Path | str | None] = ()
) -> None:
    """Refuse an output before the work rather than after it.

    It is none of its inputs, and replaces nothing in them but in those that are `around` it, or
    what a verb wrote into a model's folder.
    """
    refuse_special(file)
    if file.exists() and not force:
        raise InputError(f"{file} exists already.", "Choose another name, or add --force.")
    if file.exists():
        from medmoe_edge.checkpoint.published import is_beside_model

        held = (path for path in inputs if path and not is_beside_model(file.resolve(), path))
        check_apart(file, *held, around=around)
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is not a folder.", "Make it first, or choose another.")
    if file.is_dir():
        raise InputError(f"{file} is a folder.", "Give the name of a file.")


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Around what makes many objects and little garbage: imports, and the graphs of an export.

    The collector would walk PyTorch's modules time and again, a seventh of nano's export. Graphs
    are cycles, and wait for it; their weights do not: saving a graph puts its file in their place.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@dataclass(frozen=True)
class ExportOptions(Options):
    """How a checkpoint becomes a portable bundle.

    Attributes:
        precision: "int8", "int4", "mixed" or "fp32".
        method: How weights are rounded; "auto" takes the best that the statistics allow.
        budget_bits: The mean bits per weight; with "mixed" alone.
        group: Weights that share a scale; with int4 alone.
        experts: How routed experts are stored, see
            `calibration.quantisers.read_deltas`; None: whole.
        vision: What shares a scale of a vision transformer's activations in 8 bits, "groups" of 32
            channels or "tokens", see `export.vision`.
        calibrate_on: A folder of images, a file of questions, a dataset folder, or "builtin", to
            calibrate and to verify on; None: the bundle is not yet verified.
        samples: Questions to calibrate on, evenly over the modalities.
        stats: Statistics that `calibrate` wrote, in place of `calibrate_on`.
        strict: Whether to refuse experts that too few tokens reach.
        name: The bundle's name; None: that of the checkpoint's folder.
        vision_tower: The vision tower, if the checkpoint holds none.
        as_published: MedMoE alone: whether to keep what the published code computes.
        modalities: The experts of these alone are exported, calibrated and verified; empty: all.
        merge: Whether that one expert becomes one feed-forward with the meta expert.
        image_tokens: So many for each image, of squares of features averaged; None: the
            checkpoint's.
        force: Whether to replace what is already there.
    """

    precision: Precision = "int8"
    method: Method = "auto"
    budget_bits: float | None = None
    group: GroupSize | None = None
    experts: str | None = None
    vision: VisionScales = "groups"
    calibrate_on: str | Path | None = None
    samples: int = SAMPLES
    stats: Path | None = None
    strict: bool = False
    name: str | None = None
    vision_tower: Path | None = None
    as_published: bool = False
    modalities: tuple[str, ...] = ()
    merge: bool = False
    image_tokens: int | None = None
    force: bool = False


@dataclass(frozen=True)
class CalibrateOptions(Options):
    """What a checkpoint is calibrated on.

    Attributes:
        data: A folder of images, a file of questions, a dataset folder, or "builtin".
        samples: Questions to draw from it, evenly over the modalities.
        hessians: Whether to gather second moments, for GPTQ; much the largest part.
        strict: Whether to refuse experts that too few tokens reach.
        vision_tower: The vision tower, if the checkpoint holds none.
        force: Whether to replace what is already there.
    """

    data: str | Path
    samples: int = SAMPLES
    hessians: bool = True
    strict: bool = False
    vision_tower: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class VerifyOptions(Options):
    """What a bundle is verified against, and on which data.

    Attributes:
        against: The checkpoint that it was made from; None: only the bundle itself is checked.
        data: What it is asked about, as of `CalibrateOptions`.
        beside: What is measured too: other bundles of the checkpoint, "bitsandbytes-nf4" or
            "bitsandbytes-int8".
        report: A file for the record, for people.
        vision_tower: The vision tower, if the checkpoint holds none.
        record: Whether the bundle keeps the record; None: where it is the user's own.
        signing: Whether the bundle is signed afterwards: without that, one that is signed already
            takes no record, with which its signature would not hold.
    """

    against: Path | None = None
    data: str | Path = "builtin"
    beside: Sequence[str] = ()
    report: Path | None = None
    vision_tower: Path | None = None
    record: bool | None = None
    signing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        data = self.data if self.data != "builtin" else None
        if self.against is None and (data or self.beside or self.vision_tower):
            raise InputError(
                "--data, --beside and --vision-tower are to measure against a checkpoint.",
                "Add --against CHECKPOINT.",
            )
        if self.against is None and self.record:
            raise InputError("There is nothing to record.", "Add --against CHECKPOINT.")


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """What a model is scored on, and where it runs.

    Attributes:
        data: Questions with answers; None: only `labels` and `findings` are scored.
        labels: Images with their modality.
        predictions: Where every answer is written.
        runtime: What runs the model.
        device: Where it runs.
        blind: Whether the same questions about a black picture are scored too.
        limit: At most so many questions are asked, drawn by `seed`.
        seed: Of that draw.
        max_new_tokens: Where an answer is cut off.
        findings: Images with their findings.
        languages: Questions in several languages.
        paraphrases: Those of `data` in other words.
        fit_confidence: Whether the bundle is to keep how often its answers are right.
        selective_accuracy: It then keeps a threshold, too: of the answers above it so many are
            right.
        allow_repetition: Whether an answer that repeats itself goes on.
    """

    data: Path | None
    labels: Path | None = None
    predictions: Path | None = None
    runtime: RuntimeName = "auto"
    device: Device = "auto"
    blind: bool = False
    limit: int | None = None
    seed: int = 0
    max_new_tokens: int = 32
    findings: Path | None = None
    languages: Path | None = None
    paraphrases: Path | None = None
    fit_confidence: bool = False
    selective_accuracy: float | None = None
    allow_repetition: bool = False
