"""One bundle, every target: its stored weights in the graphs or engines of another.

The bundle for ONNX Runtime's CPU is the portable one. All others are made from it, on a workstation
or on the device itself, without the checkpoint and without PyTorch.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medmoe_edge.atomic import atomic_folder
from medmoe_edge.bundle.bundle import MANIFEST, Bundle, write_derived_manifest
from medmoe_edge.bundle.target import DType, Target, TargetName
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import InputError
from medmoe_edge.export.expert_slots import FILE
from medmoe_edge.export.gpu_presets import find_gpu
from medmoe_edge.export.moe_op import MoESpec
from medmoe_edge.export.target_graphs import write_graphs
from medmoe_edge.export.tensorrt_builder import Built, Profile, build_engine
from medmoe_edge.export.tensorrt_library import Library, library_of, library_version, load_library

Progress = Callable[[str, int, int], None]
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
    return Target(name, dtype, *found, positions, positions, paged)


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
    return find_gpu(gpu, library).sm, library_version(load_library(library))


def export_target(
    bundle: Bundle,
    out: Path,
    target: Target,
    *,
    memory_limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
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


def _build(
    bundle: Bundle,
    target: Target,
    graphs: Path,
    folder: Path,
    profiles: list[Profile],
    memory_limit: int | None,
    progress: Progress | None,
) -> dict[str, Built]:
    library = library_of(target)
    gpu = find_gpu(target.gpu, library)
    if library == "tensorrt" and bundle.config.moe is not None and not target.paged:
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
        for name, shapes in (("vision", []), ("decoder", profiles))
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
    if bundle.config.moe is None:
        raise InputError(f"{bundle.name} has no experts to page.", "Leave --paged out.")
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
