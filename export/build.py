"""`medmoe-edge export`: a checkpoint folder in, a bundle out."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_folder
from medmoe_edge.bundle.bundle import MANIFEST, NOTICE, write_manifest
from medmoe_edge.bundle.gates import DEFAULT_GATES
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.decoder import DecoderBuilder
from medmoe_edge.export.external_data import Extents, save_model
from medmoe_edge.export.moe_op import MoESpec
from medmoe_edge.export.passes.half import halve_weights, to_half
from medmoe_edge.export.passes.ort_attention import lower_attention
from medmoe_edge.export.passes.ort_matmul import lower_matmul
from medmoe_edge.export.passes.ort_moe import lower_moe
from medmoe_edge.export.passes.ort_paged import write_paged_graphs
from medmoe_edge.export.passes.ort_qkv import fuse_qkv
from medmoe_edge.export.plan import (
    GroupSize,
    Method,
    Plan,
    Precision,
    check_precision,
    make_plan,
)
from medmoe_edge.export.quantise import quantise_weights
from medmoe_edge.export.vision import export_vision
from medmoe_edge.export.vision_quantise import quantise_linears
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.prompt import Tokenizer

Progress = Callable[[str, int, int], None]
STORED: dict[Precision, str] = {
    "fp32": "fp32",
    "int8": "int8 weights per output channel, dynamic 8-bit activations (W8A8)",
    "int4": "int4 weights in groups of {group}; the head as in int8",
    "mixed": "each expert by its sensitivity; the head as in int8",
}
VISION = "fp16 weights, fp32 arithmetic"
VISION_INT8 = "8-bit weights and activations in groups of 32; the rest as fp16 weights"
STEPS = ("vision", "embedding", "decoder", "manifest")
MODEL_CARD = "README.md"


def export_bundle(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision = "int8",
    method: Method = "auto",
    statistics: Statistics | None = None,
    budget_bits: float | None = None,
    group: GroupSize | None = None,
    name: str | None = None,
    vision_tower: Path | None = None,
    force: bool = False,
    prove: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Export the checkpoint folder to the bundle folder `out`, which appears whole or not at all.

    `statistics`, of this very checkpoint, calibrate; `budget_bits` is the mean of a mixed export,
    `group` is that of int4 (32 where none is given); `prove` is given the finished folder before it
    takes its place, and may refuse it by raising. `progress` is called with `(step, done, total)`.
    Raises `ModelError` for a checkpoint that cannot be used, `InputError` for an `out` that may not
    be replaced or statistics of another checkpoint, and `ResourceError` where the disk does not
    take it.
    """
    source = read_checkpoint(checkpoint, vision_tower=vision_tower)
    check_exportable(source, precision, budget_bits, calibrated=statistics is not None, group=group)
    if statistics is not None:
        statistics.check(source)
    report = progress or (lambda step, done, total: None)
    with atomic_folder(out, force=force, marker=MANIFEST) as folder:
        report(STEPS[0], 0, 1)
        vision = _write_vision(source, folder, precision)
        report(STEPS[1], 0, 1)
        _write_embedding(source, folder, precision)
        report(STEPS[2], 0, 1)
        plan = make_plan(source, precision, method, statistics, budget_bits, group)
        experts = _write_decoder(source, folder, plan, partial(report, STEPS[2]))
        paging = write_paged_graphs(folder, source.config, experts) if source.config.moe else None
        report(STEPS[3], 0, 1)
        _copy_companions(source, folder)
        name = name or source.folder.resolve().name
        write_manifest(folder, _manifest(source, plan, vision, experts, paging, name))
        if prove is not None:
            prove(folder)
    report("done", 1, 1)
    return out


def check_exportable(
    source: Checkpoint,
    precision: Precision,
    budget_bits: float | None,
    *,
    calibrated: bool,
    group: GroupSize | None = None,
) -> None:
    """Refuse what no work can mend: a checkpoint that does not fit, a precision out of reach.

    Raises `CheckpointError`, and `InputError` for a mixed export that is not `calibrated` or whose
    budget is too small.
    """
    decoder = source.config.decoder
    check_precision(source, precision, budget_bits, calibrated=calibrated, group=group)
    Tokenizer.from_file(source.tokenizer_path()).check_vocabulary(decoder.vocab_size)
    if decoder.head_size % 16 or decoder.rotary_size % 16:
        raise CheckpointError(
            f"Heads of {decoder.head_size} channels, {decoder.rotary_size} of them rotating, "
            "do not fit ONNX Runtime's attention.",
            "Both must be multiples of 16.",
        )


def _write_vision(source: Checkpoint, folder: Path, precision: Precision) -> str:
    """Returns how its weights are stored, in words."""
    model, stored = export_vision(source), "fp32"
    if precision != "fp32":
        in_8_bits = source.config.vision.kind == "clip" and quantise_linears(model)[1]
        stored = VISION_INT8 if in_8_bits else VISION
        halve_weights(model)
    save_model(model, folder, "vision")
    return stored


def _write_embedding(source: Checkpoint, folder: Path, precision: Precision) -> None:
    name = "decoder.embed.weight"  # [V, D]
    dtype = np.dtype(np.float32 if precision == "fp32" else np.float16)
    shape = tuple(source.names[name].shape)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    with (folder / "embedding.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in WeightSource(source).rows(name):
            (rows if precision == "fp32" else to_half(rows, name)).tofile(file)


def _write_decoder(
    source: Checkpoint, folder: Path, plan: Plan, progress: Callable[[int, int], None]
) -> Extents:
    model = DecoderBuilder(source.config, WeightSource(source, plan.factors)).model()
    quantise_weights(model, plan)
    if source.config.moe is not None:
        lower_moe(model, MoESpec.of(source.config))
    lower_attention(model)
    fuse_qkv(model)
    lower_matmul(model)
    return save_model(model, folder, "decoder", progress=progress)


def _copy_companions(source: Checkpoint, folder: Path) -> None:
    shutil.copyfile(source.tokenizer_path(), folder / "tokenizer.json")
    card = source.folder / MODEL_CARD
    if card.is_file():
        shutil.copyfile(card, folder / MODEL_CARD)


def _manifest(
    source: Checkpoint,
    plan: Plan,
    vision: str,
    experts: Extents,
    paging: dict[str, Any] | None,
    name: str,
) -> dict[str, Any]:
    statistics = plan.statistics
    quantised = {"router": "fp32", "vision": vision, "embedding": "fp16"}
    return {
        "name": name,
        "config": source.config.to_json(),
        "quantisation": {
            "precision": plan.precision,
            "decoder": STORED[plan.precision].format(group=plan.group),
            **({} if plan.precision == "fp32" else quantised),
            "matrices": plan.matrices,
        },
        "gates": DEFAULT_GATES[plan.precision].to_json(),
        "calibration": statistics.summary() if statistics else None,
        "experts": experts,
        "paging": paging,
        "source": {"checkpoint_sha256": source.sha256(), "exporter": f"medmoe-edge {__version__}"},
        "licence": licence(source.folder / MODEL_CARD),
        "intended_use": NOTICE,
    }


def licence(card: Path) -> str:
    """The `license:` line of the model card's front matter, as Hugging Face writes it."""
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return "not stated by the checkpoint"
