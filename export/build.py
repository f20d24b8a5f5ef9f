"""`medmoe-edge export`: a checkpoint folder in, a bundle out."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_edge._types import Counting, Progress, no_progress
from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_folder
from medmoe_edge.bundle.bundle import DEFAULT_GATES, MANIFEST, NOTICE, write_manifest
from medmoe_edge.bundle.recorded import Recorded, SignatureMaker, write_recorded
from medmoe_edge.calibration.quantisers import (
    PAIR_BOUND,
    VISION_IN_8_BITS,
    DeltaForm,
)
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint.published import published
from medmoe_edge.checkpoint.reader import Checkpoint, as_checkpoint
from medmoe_edge.config import GroupSize, Method, ModelConfig, Precision, VisionScales
from medmoe_edge.errors import CheckpointError, InputError, plain
from medmoe_edge.export.builder import Extents, save_model
from medmoe_edge.export.decoder import DecoderBuilder, MoESpec
from medmoe_edge.export.half import halve_weights, to_half
from medmoe_edge.export.passes.ort_cpu import (
    fuse_qkv,
    lower_attention,
    lower_deltas,
    lower_matmul,
    lower_moe,
)
from medmoe_edge.export.passes.ort_paged import write_paged_graphs
from medmoe_edge.export.plan import (
    GROUP,
    Plan,
    check_deltas,
    check_precision,
    make_plan,
)
from medmoe_edge.export.quantise import quantise_weights
from medmoe_edge.export.vision import export_vision, quantise_linears, tower_by_tokens
from medmoe_edge.export.weights import WeightSource

STORED: dict[Precision, str] = {
    "fp32": "fp32",
    "int8": "int8 weights per output channel, dynamic 8-bit activations (W8A8)",
    "int4": "int4 weights in groups of {group}; the head as in int8",
    "mixed": "each expert by its sensitivity; the head as in int8",
}
VISION = "fp16 weights, fp32 arithmetic"
STEPS = ("vision", "embedding", "decoder", "manifest")
MODEL_CARD = "README.md"


@dataclass(frozen=True)
class BuildOptions:
    """How a checkpoint's weights are stored in a bundle.

    Attributes:
        precision: Of the decoder.
        method: "auto" takes the best that the statistics allow; "rtn" rounds to nearest.
        budget_bits: Bits per weight of a mixed export, on average; None otherwise.
        group: Weights that share a scale in int4; None: 32.
        name: Of the bundle; None: that of the checkpoint's folder.
        deltas: Of routed experts that are stored as what they add to the meta expert; None: whole.
        vision: What shares a scale of a transformer tower's activations in 8 bits: "groups" of 32
            channels, or all channels of each of the "tokens", which is faster.
    """

    precision: Precision = "int8"
    method: Method = "auto"
    budget_bits: float | None = None
    group: GroupSize | None = None
    name: str | None = None
    deltas: DeltaForm | None = None
    vision: VisionScales = "groups"


INT8_BUNDLE = BuildOptions()


def export_bundle(
    checkpoint: Path | Checkpoint,
    out: Path,
    options: BuildOptions = INT8_BUNDLE,
    *,
    statistics: Statistics | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Export a checkpoint to the bundle folder `out`, which appears whole or not at all.

    Args:
        checkpoint: Its folder, or the checkpoint itself where it is open already.
        out: The bundle.
        options: How weights are stored.
        statistics: Of this very checkpoint; they calibrate.
        force: Replace an older bundle.
        progress: Called with `(step, done, total)`.

    Returns:
        `out`.

    Raises:
        ModelError: For a checkpoint that cannot be used.
        InputError: For an `out` that may not be replaced, or statistics of another checkpoint.
        ResourceError: Where the disk does not take it.
    """
    source = as_checkpoint(checkpoint)
    check_exportable(source, options, calibrated=statistics is not None)
    with atomic_folder(out, force=force, marker=MANIFEST) as staging:
        write_bundle(source, staging, options, statistics=statistics, progress=progress)
    progress("done", 1, 1)
    return out


def write_bundle(
    source: Checkpoint,
    folder: Path,
    options: BuildOptions,
    *,
    statistics: Statistics | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write the files of a bundle into the empty `folder`; arguments and errors of `export_bundle`.

    What is exported for others to see is written beside its place and verified there first.
    """
    if statistics is not None:
        statistics.check(source)
    progress(STEPS[0], 0, 1)
    signature = SignatureMaker()
    vision = _write_vision(source, folder, options, signature)
    progress(STEPS[1], 0, 1)
    _write_embedding(source, folder, options.precision)
    progress(STEPS[2], 0, 1)
    plan = make_plan(
        source,
        options.precision,
        options.method,
        statistics,
        options.budget_bits,
        options.group,
        options.deltas,
    )
    experts = _write_decoder(source, folder, plan, signature, partial(progress, STEPS[2]))
    paged = _has_extents(source.config, experts)
    paging = write_paged_graphs(folder, source.config, experts) if paged else None
    progress(STEPS[3], 0, 1)
    _copy_companions(source, folder)
    write_recorded(folder, Recorded(signature.signature()))
    name = options.name or source.folder.resolve().name
    write_manifest(folder, _manifest(source, plan, vision, experts, paging, name))


def _has_extents(config: ModelConfig, experts: Extents) -> bool:
    """Whether every routed expert lies in the data file: the smallest deltas are in the graph."""
    moe = config.moe
    if moe is None or moe.merged:
        return False
    return sum(".experts." in owner for owner in experts) == moe.num_experts * len(moe.layers)


def check_exportable(source: Checkpoint, options: BuildOptions, *, calibrated: bool) -> None:
    """Refuse what no work can mend: a checkpoint that does not fit, a precision out of reach.

    Raises `CheckpointError`, and `InputError` for a mixed export that is not `calibrated` or whose
    budget is too small, and for scales per token where the tower is not in 8 bits.
    """
    decoder = source.config.decoder
    check_precision(
        source,
        options.precision,
        options.budget_bits,
        calibrated=calibrated,
        group=options.group,
    )
    if options.deltas is not None:
        check_deltas(
            *(source, options.precision, options.deltas, options.group or GROUP),
            calibrated=calibrated,
        )
    if options.vision == "tokens" and not (
        source.config.vision.is_transformer and options.precision != "fp32"
    ):
        raise InputError(
            "A scale per token is for a vision transformer in 8 bits, which this export has not.",
            "Leave --vision out: convolutions stay in fp16, and --fp32 quantises nothing.",
        )
    _ = source.tokenizer  # refused here where it is of another model
    if decoder.head_size % 16 or decoder.rotary_size % 16:
        raise CheckpointError(
            f"Heads of {decoder.head_size} channels, {decoder.rotary_size} of them rotating, "
            "do not fit ONNX Runtime's attention.",
            "Both must be multiples of 16.",
        )


def _write_vision(
    source: Checkpoint, folder: Path, options: BuildOptions, signature: SignatureMaker
) -> str:
    """Returns how its weights are stored, in words."""
    transformer, quantised = source.config.vision.is_transformer, options.precision != "fp32"
    if options.vision == "tokens":
        model, in_8_bits = tower_by_tokens(source, signature)
    else:
        model = export_vision(source)
        in_8_bits = quantised and transformer and quantise_linears(model, signature)[1]
    if quantised:
        halve_weights(model)
    save_model(model, folder, "vision")
    in_words = VISION_IN_8_BITS[options.vision] if in_8_bits else VISION
    return in_words if quantised else "fp32"


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
    source: Checkpoint,
    folder: Path,
    plan: Plan,
    signature: SignatureMaker,
    progress: Counting,
) -> Extents:
    model = DecoderBuilder(source.config, WeightSource(source, plan.factors)).model()
    if plan.deltas is not None:
        lower_deltas(model, MoESpec.of(source.config), plan.delta_form, plan.importance)
    quantise_weights(model, plan, signature)
    if source.config.moe is not None and plan.deltas is None:
        lower_moe(model, MoESpec.of(source.config))
    lower_attention(model)
    fuse_qkv(model)
    lower_matmul(model)
    return save_model(model, folder, "decoder", progress=progress)


def _copy_companions(source: Checkpoint, folder: Path) -> None:
    source.tokenizer.write(folder / "tokenizer.json")
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
    statistics, forms = plan.statistics, plan.forms
    quantised = {
        "router": "fp32",
        "vision": vision,
        "embedding": "fp16",
        "pair_bound": PAIR_BOUND,  # that of all int8 weights per channel, see `Format.pair_bound`
    }
    return {
        "name": name,
        "config": source.config.to_json(),
        "quantisation": {
            "precision": plan.precision,
            "decoder": STORED[plan.precision].format(group=plan.group),
            **({} if plan.precision == "fp32" else quantised),
            **({"experts": str(plan.deltas)} if plan.deltas else {}),
            **({"deltas": {name: form.stored for name, form in forms.items()}} if forms else {}),
            "matrices": plan.matrices,
        },
        "gates": DEFAULT_GATES[plan.precision].to_json(),
        "calibration": statistics.summary() if statistics else None,
        "experts": experts,
        "paging": paging,
        "source": {
            "checkpoint_sha256": source.sha256(),
            "exporter": f"medmoe-edge {__version__}",
            **published(source.folder, source.file_hashes()),
        },
        **({"warnings": plain(source.warnings)} if source.warnings else {}),
        **left_out(source.config),
        "licence": licence(source.folder / MODEL_CARD),
        "intended_use": NOTICE,
    }


def left_out(config: ModelConfig) -> dict[str, Any]:
    """What the manifest says of a model that was cut to some modalities; nothing of others."""
    moe = config.moe
    if moe is None or not (moe.left_out or moe.merged):
        return {}
    told = {"kept": list(moe.expert_names), "modalities": list(moe.left_out), "merged": moe.merged}
    return {"left_out": told}


def licence(card: Path) -> str:
    """The `license:` line of the model card's front matter, as Hugging Face writes it."""
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return "not stated by the checkpoint"
