"""The graphs of every target but the portable one, made from a bundle's stored weights.

onnxruntime-cuda  QMoE, MatMulNBits and GroupQueryAttention in half
tensorrt-rtx      standard ONNX in half, of fixed capacity: our ops are inlined, TensorScatter
                  becomes TensorRT's in-place cache update, and integers behind DequantizeLinear
                  stay integers in the engine. Every expert runs on every token: that has no
                  branches, so that a decode step is one CUDA graph
tensorrt          the same in the operators that the installed version's parser takes
                  (`passes/tensorrt_parser.py`), with the plugin for the experts where it can be
                  compiled ahead of time, from 10.9 on: only the chosen ones are read

Those of a paged target take their experts from slots (`builder.py`).

One bundle, every target: its stored weights in the graphs or engines of another.

The bundle for ONNX Runtime's CPU is the portable one. All others are made from it, on a workstation
or on the device itself, without the checkpoint and without PyTorch.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from medmoe_edge._types import Progress, no_progress, there
from medmoe_edge.atomic import atomic_folder, check_target
from medmoe_edge.bundle.bundle import (
    MANIFEST,
    Bundle,
    DType,
    Target,
    TargetName,
    write_derived_manifest,
)
from medmoe_edge.bundle.machine import available_memory
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import InputError
from medmoe_edge.export.builder import (
    FILE,
    MEDMOE,
    Stacks,
    reads_slots,
    save_model,
    write_experts,
)
from medmoe_edge.export.decoder import MoESpec
from medmoe_edge.export.gpus import (
    MOST_ENGINES,
    Library,
    build_memory,
    find_gpu,
    library_of,
    library_version,
    load_library,
)
from medmoe_edge.export.half import Keep, root_mean_squares, routing, to_half_graph
from medmoe_edge.export.jetson import check_tensorrt, find_jetson
from medmoe_edge.export.passes.ort_cpu import lower_attention
from medmoe_edge.export.passes.ort_cuda import (
    lower_matmul_cuda,
    lower_moe_cuda,
    take_experts_from_slots,
)
from medmoe_edge.export.passes.tensorrt import (
    lower_deltas_everywhere,
    lower_moe_to_plugin,
    lower_moe_to_slots,
)
from medmoe_edge.export.passes.tensorrt_parser import Parser, write_for
from medmoe_edge.export.stored import float_vision, specification
from medmoe_edge.export.tensorrt_builder import Built, Profile, build_engine

HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def write_graphs(
    bundle: Bundle, target: Target, folder: Path, progress: Progress = no_progress
) -> dict[str, Any]:
    """Write `vision` and `decoder` (.onnx and .data) for a target, and paged experts beside them.

    The decoder is in as many graphs as the target has `engines` for it.

    Returns what the manifest says of where experts then lie. Raises `BundleError` where the
    bundle's graphs cannot be read, and as `lower` does.
    """
    save_model(vision_graph(bundle, target), folder, "vision")
    parts = zip(target.decoders, target.layers(bundle.config.decoder.layers), strict=True)
    for name, layers in parts:
        model = specification(bundle, layers)
        experts = lower(model, bundle.config, target)
        extents = save_model(model, folder, name, progress=partial(progress, "graphs"))
    return write_experts(folder, bundle.config, experts) if experts else {"experts": extents}


def lower(model: ir.Model, config: ModelConfig, target: Target) -> list[Stacks]:
    """All of a target's passes over a specification; returns the experts of each layer, if paged.

    Raises `ModelError` for what the target cannot compute.
    """
    spec = MoESpec.of(config) if config.moe else None
    experts: list[Stacks] = []
    if spec:
        lower_deltas_everywhere(model, spec)
    if target.name == "onnxruntime-cuda":
        lower_attention(model)
        if spec:
            lower_moe_cuda(model, spec)
        lower_matmul_cuda(model)
    else:
        parser = Parser.of_target(target)
        if spec and target.paged:
            experts = lower_moe_to_slots(model, spec, HALVES[target.dtype])
        elif spec and target.name == "tensorrt" and parser.plugins and _is_quantised(model):
            lower_moe_to_plugin(model, spec, HALVES[target.dtype])
        write_for(model, parser, config.decoder)
        _fix_capacity(model.graph, target.capacity)
    to_half_graph(model, HALVES[target.dtype], _exact(model))
    if target.paged and target.name == "onnxruntime-cuda":
        experts = take_experts_from_slots(model)
    return experts


def _is_quantised(model: ir.Model) -> bool:
    """Whether experts are stored as integers, which the plugin's kernels are for."""
    return any(node.op_type == "DequantizeLinear" for node in model.graph)


def _exact(model: ir.Model) -> Keep:
    """What stays as it is: routing, squares, stored scales, slots, the plugin's own types."""
    routes, roots = routing(model), root_mean_squares(model)
    return lambda node: (
        routes(node)
        or roots(node)
        or node.op_type == "DequantizeLinear"
        or node.domain == MEDMOE
        or reads_slots(node)
    )


def vision_graph(bundle: Bundle, target: Target) -> ir.Model:
    """The vision tower and projector in half."""
    model = float_vision(bundle)
    if target.is_engine:
        write_for(model, Parser.of_target(target))
    to_half_graph(model, HALVES[target.dtype], lambda node: False)
    return model


def _fix_capacity(graph: ir.Graph, capacity: int) -> None:
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name).startswith(("past_", "present_")):
            _, heads, _, size = there(value.shape)
            value.shape = ir.Shape([1, heads, capacity, size])


COMPANIONS = ("tokenizer.json", "embedding.npy", "README.md")
POSITIONS = 1024  # of an engine's cache, where the model has as many


def plan_target(
    bundle: Bundle,
    name: TargetName,
    *,
    gpu: str | None = None,
    dtype: DType = "fp16",
    capacity: int | None = None,
    paged: bool = False,
) -> Target:
    """The target in full: engines are for one `gpu`, their cache is of `capacity` positions.

    The experts of a `paged` target are kept apart, and how much memory they get is said when it is
    loaded. Raises `BundleError` for a bundle that is a target's already, `InputError` for what does
    not go together and `MissingDependencyError` where the library that builds engines is not
    installed.
    """
    bundle.check_portable()
    if paged:
        _check_paged(bundle, name)
    found = check_request(name, gpu=gpu, dtype=dtype, capacity=capacity)
    if found is None:
        return Target(name, dtype, paged=paged)
    most = bundle.config.decoder.max_positions
    positions = min(POSITIONS, most) if capacity is None else capacity
    if not bundle.config.vision.image_tokens < positions <= most:
        raise InputError(
            f"A cache of {positions} positions does not fit this model.",
            f"Its image takes {bundle.config.vision.image_tokens}, and it knows {most}.",
        )
    engines = 1 if paged else _engines(bundle, available_memory())
    return Target(name, dtype, *found, positions, positions, paged, engines)


def _engines(bundle: Bundle, available: int | None) -> int:
    """How many engines the decoder is built in: the least of `MOST_ENGINES` that memory is for.

    Where it is for none, as many as there may be, and the build says how much is missing.
    """
    weights = bundle.path("decoder.data").stat().st_size
    layers = bundle.config.decoder.layers
    fitting = (
        count
        for count in range(1, MOST_ENGINES)
        if available is None or build_memory(weights // count) <= available
    )
    return min(next(fitting, MOST_ENGINES), layers)


def check_request(
    name: TargetName, *, gpu: str | None, dtype: DType, capacity: int | None
) -> tuple[str, str] | None:
    """What can be refused before any work: see `plan_target`.

    Returns what an engine is bound to, the GPU's compute capability and the library's version;
    None for a target that has no engines.
    """
    if name == "onnxruntime-cuda":
        _check_cuda(gpu, capacity, dtype)
        return None
    if gpu is None:
        raise InputError(f"{name} builds for one GPU.", "Add --gpu, for example: --gpu sm89")
    library: Library = "tensorrt-rtx" if name == "tensorrt-rtx" else "tensorrt"
    found, version = find_gpu(gpu, library).sm, library_version(load_library(library))
    if library == "tensorrt":
        check_tensorrt(version, find_jetson())
    return found, version


def export_target(
    bundle: Bundle,
    out: Path,
    target: Target,
    *,
    memory_limit: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Built]:
    """Write the bundle `out` for `target`, whole or not at all; what was built, by engine.

    `memory_limit` bounds an engine's GPU memory for intermediate results, in bytes. Raises
    `ModelError` for a graph that the target does not take, `InputError` for an `out` that may not
    be replaced, `ResourceError` where memory, disk or the GPU is missing.
    """
    engines: dict[str, Built] = {}
    places: dict[str, Any] = {}
    with atomic_folder(out, force=force, marker=MANIFEST) as folder:
        for name in COMPANIONS:
            if name in bundle.manifest["files"]:
                shutil.copyfile(bundle.path(name), folder / name)
        if target.is_engine:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".graphs.") as graphs:
                written = write_graphs(bundle, target, Path(graphs), progress)
                if target.paged:
                    places = written
                    (Path(graphs) / FILE).rename(folder / FILE)
                slots = places["paging"]["slots"] if target.paged else {}
                profiles = decoder_profiles(bundle.config, target, slots)
                engines = _build(
                    bundle, target, Path(graphs), folder, profiles, memory_limit, progress
                )
        else:
            places = write_graphs(bundle, target, folder, progress)
        write_derived_manifest(folder, bundle, target, places)
    return {name: replace(built, path=out / built.path.name) for name, built in engines.items()}


@dataclass(frozen=True)
class TargetOptions:
    """How a portable bundle becomes one for another target.

    Attributes:
        target: Which one.
        gpu: What engines are built for, a name of `gpus.GPUS`; None: no engines are.
        dtype: Of activations and cache.
        positions: Of the cache; None: as many as the model has.
        paged: Whether experts are paged.
        memory_limit: Bytes that building may take.
        force: Whether to replace what is already there.
    """

    target: TargetName
    gpu: str | None = None
    dtype: DType = "fp16"
    positions: int | None = None
    paged: bool = False
    memory_limit: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TargetExport:
    """A bundle for a target, and what its engines took to build; none for graphs."""

    bundle: Path
    target: Target
    engines: Mapping[str, Built]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        engines = {
            name: {
                "bytes": built.bytes,
                "seconds": built.seconds,
                "peak_memory": built.peak_memory,
                "cached": built.cached,
            }
            for name, built in self.engines.items()
        }
        return {"bundle": str(self.bundle), "target": self.target.to_json(), "engines": engines}


def export_for(
    model: Path,
    out: Path,
    options: TargetOptions,
    portable: Callable[[Path], object],
    progress: Progress = no_progress,
) -> TargetExport:
    """Write a bundle for another target; for the errors see `plan_target` and `export_target`.

    Args:
        model: A portable bundle, or a checkpoint that `portable` exports to a folder first.
        out: The bundle's folder.
        options: The target, and what is built for it.
        portable: Exports the checkpoint to the folder that it is given.
        progress: Told of every step.
    """
    check_target(out, force=options.force, marker=MANIFEST)
    check_request(options.target, gpu=options.gpu, dtype=options.dtype, capacity=options.positions)
    beside = out.resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".portable.") as at:
        folder = model
        if not (model / MANIFEST).exists():
            folder = Path(at) / "bundle"
            portable(folder)
        bundle = Bundle.open(folder)
        target = plan_target(
            bundle,
            options.target,
            gpu=options.gpu,
            dtype=options.dtype,
            capacity=options.positions,
            paged=options.paged,
        )
        engines = export_target(
            bundle,
            out,
            target,
            memory_limit=options.memory_limit,
            force=options.force,
            progress=progress,
        )
    return TargetExport(out, target, engines)


def _build(
    bundle: Bundle,
    target: Target,
    graphs: Path,
    folder: Path,
    profiles: list[Profile],
    memory_limit: int | None,
    progress: Progress,
) -> dict[str, Built]:
    library = library_of(target)
    gpu = find_gpu(target.gpu, library)
    if library == "tensorrt" and bundle.config.moe is not None and Parser.of_target(target).plugins:
        from medmoe_edge.kernels.tensorrt_plugin import register

        spec = MoESpec.of(bundle.config)
        register(spec.activation, spec.num_experts + spec.meta_expert, gpu.capability)
    return {
        name: build_engine(
            graphs / f"{name}.onnx",
            folder / f"{name}.engine",
            library=library,
            gpu=gpu,
            profiles=shapes,
            memory_limit=memory_limit,
            progress=progress,
        )
        for name, shapes in (("vision", []), *((name, profiles) for name in target.decoders))
    }


def decoder_profiles(
    config: ModelConfig, target: Target, slots: Mapping[str, Any]
) -> list[Profile]:
    """Prefill, fastest at an image with a short question, and decode.

    `slots` are the inputs of a paged decoder, of which there may be any number, up to one for each
    expert.
    """
    size, usual = config.decoder.hidden_size, config.vision.image_tokens + 32
    experts = len(config.moe_layers) * config.moe.num_experts if config.moe else 0
    pools: Profile = {
        name: ((1, *kind["shape"]), (experts // 2, *kind["shape"]), (experts, *kind["shape"]))
        for name, kind in slots.items()
    }
    steps = ((1, min(usual, target.prefill), target.prefill), (1, 1, 1))
    return [
        {"embeds": ((1, least, size), (1, common, size), (1, most, size)), **pools}
        for least, common, most in steps
    ]


def _check_paged(bundle: Bundle, name: TargetName) -> None:
    if bundle.config.moe is None or bundle.config.moe.merged:
        raise InputError(f"{bundle.name} has no experts to page.", "Leave --paged out.")
    if "experts" in bundle.manifest["quantisation"]:
        raise InputError(
            f"{bundle.name} holds experts as deltas, which no GPU pages.",
            "Leave --paged out, or give a bundle that was exported without --experts.",
        )
    if name == "tensorrt":
        raise InputError(
            "TensorRT's parser lists no Gather of integers of 8 bits, which paged experts are.",
            "Leave --paged out, or page with the target tensorrt-rtx or onnxruntime-cuda.",
        )
    if name == "onnxruntime-cuda" and bundle.manifest["quantisation"]["precision"] != "fp32":
        raise InputError(
            "onnxruntime-cuda pages experts in fp16 only: quantised ones it repacks when a model "
            "is loaded, all at once.",
            "Give an --fp32 bundle, leave --paged out, or choose a TensorRT target.",
        )


def _check_cuda(gpu: str | None, capacity: int | None, dtype: DType) -> None:
    if gpu is not None or capacity is not None:
        raise InputError(
            "--gpu and --positions are for engines; onnxruntime-cuda runs on any GPU.",
            "Leave them out, or choose the target tensorrt-rtx or tensorrt.",
        )
    if dtype != "fp16":
        raise InputError(
            f"onnxruntime-cuda computes in fp16, not {dtype}: NumPy holds no such cache.",
            "Leave --dtype out.",
        )
