"""From a checkpoint to a bundle that carries its proof: calibrate, export, verify."""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as Picture

from medmoe_edge.calibration.data import CalibrationData, Sample, read_calibration
from medmoe_edge.calibration.run import calibrate
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint import read_checkpoint
from medmoe_edge.datasets import Example
from medmoe_edge.errors import InputError
from medmoe_edge.export.build import export_bundle
from medmoe_edge.export.plan import Method, Precision
from medmoe_edge.verification import Data, Verification, verify

Progress = Callable[[str, int, int], None]
SAMPLES = 128  # to calibrate on
PROOF_SAMPLES = 300  # to verify on; fewer where there are no more
FEWEST_HELD_OUT = 100  # else the proof is on all samples, those of the calibration included


@dataclass(frozen=True)
class Export:
    """A new bundle; `verification` is its proof, None where no data was given to prove it on."""

    bundle: Path
    verification: Verification | None


def read_data(checkpoint: Path, source: str, *, vision_tower: Path | None = None) -> CalibrationData:
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
            proof = Data(data.name, list(as_examples(proof_samples(data, samples), folder)))

            def prove(bundle: Path) -> None:
                result = verify(
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


def proof_samples(data: CalibrationData, calibrated: int) -> list[Sample]:
    """What a bundle calibrated on so many samples is verified on."""
    used = data.draw(calibrated)
    held_out = data.draw(PROOF_SAMPLES, exclude=used)
    return held_out if len(held_out) >= FEWEST_HELD_OUT else data.draw(PROOF_SAMPLES)


@contextlib.contextmanager
def verification_data(source: str) -> Iterator[Data]:
    """Every question of a source, for the time of the block; pictures within files are cut out."""
    data = read_calibration(source)
    with tempfile.TemporaryDirectory() as folder:
        samples = data.draw(len(data.samples))
        yield Data(data.name, list(as_examples(samples, Path(folder))))


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
