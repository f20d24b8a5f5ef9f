"""From a checkpoint to a bundle that carries its proof: calibrate, export, verify."""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image as Picture

from medmoe_edge import verification
from medmoe_edge.bundle import Bundle
from medmoe_edge.calibration.data import CalibrationData, Sample, read_calibration
from medmoe_edge.calibration.run import calibrate
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint import read_checkpoint
from medmoe_edge.datasets import Example
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import InputError
from medmoe_edge.export.build import export_bundle
from medmoe_edge.export.plan import Method, Precision
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.ort import OrtRuntime
from medmoe_edge.verification import Data, Verification

Progress = Callable[[str, int, int], None]
SAMPLES = 128  # to calibrate on
PROOF_SAMPLES = 300  # to verify on; fewer where there are no more
BASELINES: dict[str, Literal["nf4", "int8"]] = {
    "bitsandbytes-nf4": "nf4",
    "bitsandbytes-int8": "int8",
}
FEWEST_HELD_OUT = 100  # else the proof is on all samples, those of the calibration included


@dataclass(frozen=True)
class Export:
    """A new bundle; `verification` is its proof, None where no data was given to prove it on."""

    bundle: Path
    verification: Verification | None


def read_data(
    checkpoint: Path, source: str, *, vision_tower: Path | None = None
) -> CalibrationData:
    """Calibration data (a folder, a question file or "builtin") for the modalities of a model."""
    moe = read_checkpoint(checkpoint, vision_tower=vision_tower).config.moe
    return read_calibration(source, known_modalities=moe.expert_names if moe else ())


def export(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision = "int8",
    method: Method = "auto",
    budget_bits: float | None = None,
    calibrate_on: str | None = None,
    samples: int = SAMPLES,
    stats: Path | None = None,
    strict: bool = False,
    name: str | None = None,
    vision_tower: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Export a checkpoint; calibrated and proven where `calibrate_on` names data.

    `stats` are statistics that `calibrate` wrote; the bundle is then not yet proven. `strict`
    refuses to calibrate an expert that too few tokens reach. Raises `VerificationError`, and leaves
    no bundle, where the proof fails; `ModelError`, `InputError` and `ResourceError` otherwise.
    """
    if calibrate_on is not None and stats is not None:
        raise InputError("Both data and statistics were given.", "Give one of the two.")
    found: list[Verification] = []
    with contextlib.ExitStack() as stack:
        statistics, prove = (Statistics.open(stats) if stats else None), None
        if calibrate_on is not None:
            data = read_data(checkpoint, calibrate_on, vision_tower=vision_tower)
            beside = tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f".{out.name}.")
            folder = Path(stack.enter_context(beside))
            statistics = calibrate(
                checkpoint,
                data,
                folder / "statistics",
                samples=samples,
                hessians=precision in ("int4", "mixed"),
                strict=strict,
                vision_tower=vision_tower,
                progress=progress,
            )
            proof = Data(data.name, list(as_examples(proof_samples(data, statistics), folder)))

            def prove(bundle: Path) -> None:
                result = verification.verify(
                    bundle, checkpoint, proof, vision_tower=vision_tower, progress=progress
                )
                found.append(result)
                if error := result.error():
                    raise error

        bundle = export_bundle(
            checkpoint,
            out,
            precision=precision,
            method=method,
            statistics=statistics,
            budget_bits=budget_bits,
            name=name,
            vision_tower=vision_tower,
            force=force,
            prove=prove,
            progress=progress,
        )
    return Export(bundle, found[0] if found else None)


def proof_samples(data: CalibrationData, statistics: Statistics) -> list[Sample]:
    """What a bundle with these statistics is verified on."""
    drawn = set(statistics.source.drawn)
    used = [sample for sample in data.samples if sample.id in drawn]
    held_out = data.draw(PROOF_SAMPLES, exclude=used)
    return held_out if len(held_out) >= FEWEST_HELD_OUT else data.draw(PROOF_SAMPLES)


def verify(
    bundle: Path,
    checkpoint: Path,
    source: str,
    *,
    beside: Sequence[str] = (),
    vision_tower: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Measure a bundle against its checkpoint on every question of a source; see `verification`.

    `beside` names what is measured too: other bundles of the checkpoint, "bitsandbytes-nf4" or
    "bitsandbytes-int8".
    """
    data = read_data(checkpoint, source, vision_tower=vision_tower)
    with tempfile.TemporaryDirectory() as folder:
        samples = data.draw(len(data.samples))
        questions = Data(data.name, list(as_examples(samples, Path(folder))))
        others = {name: partial(_peer, name, checkpoint, vision_tower) for name in beside}
        return verification.verify(
            bundle,
            checkpoint,
            questions,
            beside=others,
            vision_tower=vision_tower,
            progress=progress,
        )


def _peer(name: str, checkpoint: Path, vision_tower: Path | None) -> Runtime:
    if name not in BASELINES:
        return OrtRuntime(Bundle.open(bundle_path(name)))
    from medmoe_edge.runtimes.bitsandbytes import BitsAndBytesRuntime

    source = read_checkpoint(checkpoint, vision_tower=vision_tower)
    return BitsAndBytesRuntime(source, BASELINES[name])


def as_examples(samples: Iterable[Sample], folder: Path) -> Iterator[Example]:
    """Samples as the questions that verification reads; parts of files are written to `folder`."""
    cut: dict[object, Path] = {}
    for sample in samples:
        image = sample.image
        if sample.frame is not None or sample.field is not None:
            image = cut.setdefault(sample.picture, folder / f"{len(cut)}.png")
            if not image.exists():
                Picture.fromarray(sample.load().pixels).save(image)
        yield Example(
            id=sample.id,
            image=image,
            question=sample.question,
            answer=sample.answer,
            answer_type=sample.answer_type,
            modality=sample.modality,
            body=None,
            content=None,
            source="calibration",
        )
