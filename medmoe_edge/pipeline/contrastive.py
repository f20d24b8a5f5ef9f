"""From a checkpoint of MedMoE to a bundle that carries its proof.

Weights in 8-bit groups need no calibration: the images that are named serve for the proof alone.
"""

import dataclasses
from pathlib import Path

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.atomic import atomic_folder, check_target
from medmoe_edge.bundle.bundle import MANIFEST
from medmoe_edge.calibration.data import Sample, read_calibration
from medmoe_edge.evaluation.contrastive import Pictures, verify_modality
from medmoe_edge.evaluation.record import may_record
from medmoe_edge.evaluation.verify import Verification
from medmoe_edge.export.contrastive import write_modality_bundle
from medmoe_edge.pipeline import ExportOptions, VerifyOptions
from medmoe_edge.pipeline.med_moe import (
    PROOF_SAMPLES,
    Export,
    check_recordable,
    recorded_pictures,
)


def export_modality(
    checkpoint: Path,
    out: Path,
    options: ExportOptions,
    progress: Progress = no_progress,
) -> Export:
    """Export a checkpoint; proven where `options.calibrate_on` names images.

    Args:
        checkpoint: The folder of a checkpoint.
        out: The bundle's folder.
        options: The precision, fp32 or int8, `calibrate_on`, `name`, `as_published` and `force`.
        progress: Told of every step.

    Returns:
        The bundle and its verification.

    Raises:
        VerificationError: A gate failed, and there is no bundle.
        ModelError: The checkpoint cannot be used.
        InputError: The data cannot be used.
        ResourceError: The disk is full.
    """
    check_target(out, force=options.force, marker=MANIFEST)
    pictures = None if options.calibrate_on is None else read_pictures(options.calibrate_on)
    with atomic_folder(out, force=options.force, marker=MANIFEST) as staging:
        write_modality_bundle(
            checkpoint,
            staging,
            precision="fp32" if options.precision == "fp32" else "int8",
            name=options.name,
            as_published=options.as_published,
            progress=progress,
        )
        found = None
        if pictures is not None:
            found = verify_modality(
                staging,
                checkpoint,
                pictures,
                record=True,
                inputs=recorded_pictures(),
                progress=progress,
            )
            if error := found.error():
                error.found = found
                raise error
    progress("done", 1, 1)
    if found is None:
        return Export(out, None)
    return Export(
        out, dataclasses.replace(found, bundle=dataclasses.replace(found.bundle, folder=out))
    )


def verify_modality_on(
    bundle: Path, checkpoint: Path, options: VerifyOptions, progress: Progress = no_progress
) -> Verification:
    """Measure a bundle against its checkpoint on the images of `options.data`.

    Args:
        bundle: The folder of a bundle.
        checkpoint: The folder of the checkpoint it was made from.
        options: On what, and whether the record is kept.
        progress: Told of every step.

    Raises:
        ModelError: As `verify_modality` says.
        InputError: The data cannot be used, or `check_recordable` refuses the record.
        ResourceError: The record cannot be written.
    """
    check_recordable(bundle, options)
    carries = options.record or (options.record is None and may_record(bundle))
    return verify_modality(
        bundle,
        checkpoint,
        read_pictures(options.data),
        record=options.record,
        inputs=recorded_pictures() if carries else (),
        progress=progress,
    )


def read_pictures(source: str | Path) -> Pictures:
    """Up to 300 different images of a source, of each modality in turn."""
    data = read_calibration(source)
    drawn: dict[object, Sample] = {}
    for sample in data.draw(len(data.samples)):
        drawn.setdefault(sample.picture, sample)
    chosen = list(drawn.values())[:PROOF_SAMPLES]
    return Pictures(data.name, data.sha256, [sample.load for sample in chosen])
