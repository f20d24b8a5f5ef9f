"""A checkpoint folder of MedMoE to a bundle."""

import shutil
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from medmoe_edge._types import Progress, no_progress
from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_folder
from medmoe_edge.bundle.bundle import MANIFEST, NOTICE, write_manifest
from medmoe_edge.bundle.contrastive import DEFAULT_GATES, ModalityBundle
from medmoe_edge.bundle.recorded import Recorded, write_recorded
from medmoe_edge.bundle.signature import SignatureMaker
from medmoe_edge.checkpoint.contrastive import modality_sha256, read_modality_checkpoint
from medmoe_edge.config_contrastive import read_scores
from medmoe_edge.export.build import MODEL_CARD, VISION_INT8, licence
from medmoe_edge.export.contrastive import export_image, export_text
from medmoe_edge.export.external_data import save_model
from medmoe_edge.export.passes.half import halve_weights
from medmoe_edge.export.vision_quantise import quantise_linears
from medmoe_edge.prompt import Tokenizer

Precision = Literal["fp32", "int8"]
STORED: dict[Precision, str] = {"fp32": "fp32", "int8": VISION_INT8}


def export_modality_bundle(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision = "int8",
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export the checkpoint folder to the bundle folder `out`, which appears whole or not at all.

    `progress` is called with `(step, done, total)`. Raises `ModelError` for a checkpoint that
    cannot be used, `InputError` for an `out` that may not be replaced and `ResourceError` where the
    disk does not take it.
    """
    with atomic_folder(out, force=force, marker=MANIFEST) as staging:
        write_modality_bundle(
            checkpoint, staging, precision=precision, name=name, progress=progress
        )
    return out


def write_modality_bundle(
    checkpoint: Path,
    folder: Path,
    *,
    precision: Precision,
    name: str | None,
    progress: Progress | None = None,
) -> None:
    """Write the files of a bundle into the empty `folder`: see `export_modality_bundle`."""
    report = progress or no_progress
    model, scores = read_modality_checkpoint(checkpoint), read_scores(checkpoint)
    words = checkpoint / "tokenizer.json"
    Tokenizer.from_file(words).check_vocabulary(model.config.text.vocab_size)
    report("image", 0, 1)
    signature = SignatureMaker()
    save_model(_stored(export_image(model), precision, signature), folder, "image")
    report("text", 0, 1)
    save_model(_stored(export_text(model), precision, signature), folder, "text")
    report("manifest", 0, 1)
    shutil.copyfile(words, folder / words.name)
    write_recorded(folder, Recorded(signature.signature()))
    card = checkpoint / MODEL_CARD
    if card.is_file():
        shutil.copyfile(card, folder / MODEL_CARD)
    contents: dict[str, Any] = {
        "kind": ModalityBundle.kind,
        "name": name or checkpoint.resolve().name,
        "config": model.config.to_json(),
        "scores": scores.to_json(),
        "quantisation": {"precision": precision, "image": STORED[precision]},
        "gates": DEFAULT_GATES[precision].to_json(),
        "source": {
            "checkpoint_sha256": modality_sha256(checkpoint),
            "exporter": f"medmoe-edge {__version__}",
        },
        "licence": licence(card),
        "intended_use": NOTICE,
    }
    write_manifest(folder, contents)
    report("done", 1, 1)


def _stored(model: ir.Model, precision: Precision, signature: SignatureMaker) -> ir.Model:
    if precision == "int8":
        quantise_linears(model, signature)
        halve_weights(model)
    return model
