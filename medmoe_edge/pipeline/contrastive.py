"""From a checkpoint of MedMoE to a bundle that carries its proof.

Weights in 8-bit groups need no calibration: the images that are named serve for the proof alone.
"""

import dataclasses
from pathlib import Path

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.atomic import atomic_folder, check_target
from medmoe_edge.bundle.bundle import MANIFEST, ModalityBundle
from medmoe_edge.calibration.data import Sample, read_calibration
from medmoe_edge.evaluation.contrastive import Pictures, verify_modality
from medmoe_edge.evaluation.record import may_record
from medmoe_edge.evaluation.verify import Verification
from medmoe_edge.export.contrastive import Precision, write_modality_bundle
from medmoe_edge.pipeline.med_moe import (
    PROOF_SAMPLES,
    Export,
    check_recordable,
    travelling_pictures,
)


def export_modality(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision = "int8",
    prove_on: str | None = None,
    name: str | None = None,
    as_published: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Export a checkpoint; proven where `prove_on` names data, as `verify_modality_on` reads it.

    Raises `VerificationError`, and leaves no bundle, where the proof fails; `ModelError`,
    `InputError` and `ResourceError` otherwise.
    """
    check_target(out, force=force, marker=MANIFEST)
    pictures = read_pictures(prove_on) if prove_on is not None else None
    with atomic_folder(out, force=force, marker=MANIFEST) as staging:
        write_modality_bundle(
            checkpoint,
            staging,
            precision=precision,
            name=name,
            as_published=as_published,
            progress=progress,
        )
        found = None
        if pictures is not None:
            found = verify_modality(
                staging,
                checkpoint,
                pictures,
                record=True,
                inputs=travelling_pictures(),
                progress=progress,
            )
            if error := found.error():
                error.found = found
                raise error
    (progress or no_progress)("done", 1, 1)
    if found is None:
        return Export(out, None)
    return Export(out, dataclasses.replace(found, bundle=ModalityBundle.open(out, False)))


def verify_modality_on(
    bundle: Path,
    checkpoint: Path,
    source: str,
    *,
    record: bool | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Measure a bundle against its checkpoint on the images of a source.

    That is a folder, a question file or "builtin". Raises what `verify_modality` does, and
    `InputError` or `DataError` for data that cannot be used.
    """
    check_recordable(bundle, record)
    recordable = record is None and may_record(bundle)
    return verify_modality(
        bundle,
        checkpoint,
        read_pictures(source),
        record=record,
        inputs=travelling_pictures() if record or recordable else (),
        progress=progress,
    )


def read_pictures(source: str) -> Pictures:
    """Up to 300 different images of a source, of each modality in turn."""
    data = read_calibration(source)
    drawn: dict[object, Sample] = {}
    for sample in data.draw(len(data.samples)):
        drawn.setdefault(sample.picture, sample)
    chosen = list(drawn.values())[:PROOF_SAMPLES]
    return Pictures(data.name, data.sha256, [sample.load for sample in chosen])
