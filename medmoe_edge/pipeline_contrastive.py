"""From a checkpoint of MedMoE to a bundle that carries its proof.

Weights in 8-bit groups need no calibration: the images that are named serve for the proof alone.
"""

from functools import partial
from pathlib import Path

from medmoe_edge.atomic import check_target
from medmoe_edge.bundle.bundle import MANIFEST
from medmoe_edge.bundle.contrastive import ModalityBundle
from medmoe_edge.calibration.data import read_calibration
from medmoe_edge.calibration.samples import Sample
from medmoe_edge.evaluation.contrastive import Pictures, verify_modality
from medmoe_edge.evaluation.verify import Verification
from medmoe_edge.export.contrastive_build import Precision, Progress, export_modality_bundle
from medmoe_edge.pipeline import PROOF_SAMPLES, Export


def export_modality(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision = "int8",
    prove_on: str | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Export a checkpoint; proven where `prove_on` names data, as `verify_modality_on` reads it.

    Raises `VerificationError`, and leaves no bundle, where the proof fails; `ModelError`,
    `InputError` and `ResourceError` otherwise.
    """
    check_target(out, force=force, marker=MANIFEST)
    build = partial(
        export_modality_bundle,
        checkpoint,
        out,
        precision=precision,
        name=name,
        force=force,
        progress=progress,
    )
    if prove_on is None:
        build()
        return Export(out, None)
    pictures = read_pictures(prove_on)
    found: list[Verification] = []

    def prove(bundle: Path) -> None:
        found.append(verify_modality(bundle, checkpoint, pictures, progress=progress))
        if error := found[0].error():
            raise error

    build(prove=prove)
    return Export(out, Verification(ModalityBundle.open(out, False), [], found[0].record))


def verify_modality_on(
    bundle: Path, checkpoint: Path, source: str, *, progress: Progress | None = None
) -> Verification:
    """Measure a bundle against its checkpoint on the images of a source.

    That is a folder, a question file or "builtin". Raises what `verify_modality` does, and
    `InputError` or `DataError` for data that cannot be used.
    """
    return verify_modality(bundle, checkpoint, read_pictures(source), progress=progress)


def read_pictures(source: str) -> Pictures:
    """Up to 300 different images of a source, of each modality in turn."""
    data = read_calibration(source)
    drawn: dict[object, Sample] = {}
    for sample in data.draw(len(data.samples)):
        drawn.setdefault(sample.picture, sample)
    chosen = list(drawn.values())[:PROOF_SAMPLES]
    return Pictures(data.name, data.sha256, [sample.load for sample in chosen])
