"""`medmoe-edge export`: a checkpoint folder in, a bundle out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medmoe_edge import __version__
from medmoe_edge.atomic import atomic_folder
from medmoe_edge.bundle import MANIFEST, NOTICE, write_manifest
from medmoe_edge.checkpoint import Checkpoint, read_checkpoint
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.decoder import DecoderBuilder
from medmoe_edge.export.external_data import Extents, save_model
from medmoe_edge.export.moe_op import MoESpec
from medmoe_edge.export.ort_matmul import lower_matmul
from medmoe_edge.export.ort_moe import lower_moe
from medmoe_edge.export.quantise import decoder_policy, quantise_weights
from medmoe_edge.export.vision import export_vision, vision_policy
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.prompt import Tokenizer

Precision = Literal["fp32", "int8"]
Progress = Callable[[str, int, int], None]
QUANTISATION: dict[Precision, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {
        "precision": "int8",
        "decoder": "W8A8: symmetric int8 weights per output channel, dynamic 8-bit activations",
        "router": "fp32",
        "vision": "symmetric int8 weights per output channel, fp32 arithmetic",
        "embedding": "fp16",
    },
}
STEPS = ("vision", "embedding", "decoder", "manifest")
MODEL_CARD = "README.md"


def export_bundle(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision = "int8",
    name: str | None = None,
    vision_tower: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export the checkpoint folder to the bundle folder `out`, which appears whole or not at all.

    `progress` is called with `(step, done, total)`. Raises `ModelError` for a checkpoint that
    cannot be used, `InputError` for an `out` that may not be replaced, and `ResourceError` where
    the disk does not take it.
    """
    source = read_checkpoint(checkpoint, vision_tower=vision_tower)
    _check(source)
    report = progress or (lambda step, done, total: None)
    with atomic_folder(out, force=force, marker=MANIFEST) as folder:
        report(STEPS[0], 0, len(STEPS))
        _write_vision(source, folder, precision)
        report(STEPS[1], 1, len(STEPS))
        _write_embedding(source, folder, precision)
        report(STEPS[2], 2, len(STEPS))
        experts = _write_decoder(source, folder, precision)
        report(STEPS[3], 3, len(STEPS))
        _copy_companions(source, folder)
        write_manifest(
            folder, _manifest(source, precision, experts, name or source.folder.resolve().name)
        )
    report("done", len(STEPS), len(STEPS))
    return out


def _check(source: Checkpoint) -> None:
    decoder = source.config.decoder
    if source.tokenizer_file is None:
        raise CheckpointError(
            f"{source.folder} has no tokenizer.json.",
            "Save the model's fast tokenizer there (tokenizer.save_pretrained).",
        )
    Tokenizer.from_file(source.tokenizer_file).check_vocabulary(decoder.vocab_size)
    if decoder.head_size % 16 or decoder.rotary_size % 16:
        raise CheckpointError(
            f"Heads of {decoder.head_size} channels, {decoder.rotary_size} of them rotating, "
            "do not fit ONNX Runtime's attention.",
            "Both must be multiples of 16.",
        )


def _write_vision(source: Checkpoint, folder: Path, precision: Precision) -> None:
    model = export_vision(source)
    if precision == "int8":
        quantise_weights(model, vision_policy(model).__contains__)
    save_model(model, folder, "vision")


def _write_embedding(source: Checkpoint, folder: Path, precision: Precision) -> None:
    table = WeightSource(source).array("decoder.embed.weight")  # [V, D]
    dtype = np.float16 if precision == "int8" else np.float32
    np.save(folder / "embedding.npy", table.astype(dtype), allow_pickle=False)


def _write_decoder(source: Checkpoint, folder: Path, precision: Precision) -> Extents:
    model = DecoderBuilder(source.config, WeightSource(source)).model()
    if precision == "int8":
        quantise_weights(model, decoder_policy)
    if source.config.moe is not None:
        lower_moe(model, MoESpec.of(source.config))
    if precision == "int8":
        lower_matmul(model)
    return save_model(model, folder, "decoder")


def _copy_companions(source: Checkpoint, folder: Path) -> None:
    assert source.tokenizer_file is not None
    shutil.copyfile(source.tokenizer_file, folder / "tokenizer.json")
    card = source.folder / MODEL_CARD
    if card.is_file():
        shutil.copyfile(card, folder / MODEL_CARD)


def _manifest(
    source: Checkpoint, precision: Precision, experts: Extents, name: str
) -> dict[str, Any]:
    return {
        "name": name,
        "config": source.config.to_json(),
        "quantisation": QUANTISATION[precision],
        "experts": experts,
        "source": {"checkpoint_sha256": source.sha256(), "exporter": f"medmoe-edge {__version__}"},
        "licence": _licence(source.folder / MODEL_CARD),
        "intended_use": NOTICE,
    }


def _licence(card: Path) -> str:
    """The `license:` line of the model card's front matter, as Hugging Face writes it."""
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return "not stated by the checkpoint"
