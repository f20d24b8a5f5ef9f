"""What is in a checkpoint or bundle of either family: no weights are read."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from medmoe_edge.bundle.bundle import MANIFEST, ModalityBundle, Target
from medmoe_edge.calibration.quantisers import Format
from medmoe_edge.checkpoint.keys import Shape, decoder_parameters, expected_parameters
from medmoe_edge.config import ModelConfig
from medmoe_edge.config_contrastive import (
    BertConfig,
    ModalityConfig,
    Scores,
    SwinConfig,
    read_scores,
)
from medmoe_edge.engine.loading import proven
from medmoe_edge.errors import CheckpointError, InputError, MissingDependencyError, Notice


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A model's make-up.

    `parameters_total` counts every tensor, the vision tower included (None where counting the
    tower needs torch, which is not installed); `parameters_language` the decoder without tower
    and projector, and `parameters_activated` what of it runs for one token: the router, the
    top-k experts and the meta expert, but not the other experts. `tensors` counts the official
    layout's tensors, `types` them by number type; `bytes` are those of all files.
    `bits_per_weight` is the mean over the decoder's matrices, scales and zero points included, of a
    checkpoint over all tensors. `target` is what a bundle is made for and `runtime` what runs it,
    in words; `verification` its outcome: "passed", "failed" or "not measured"; `verified`
    says on which `machine` and whether that holds `here`. `warnings` are a checkpoint's.
    """

    kind: Literal["checkpoint", "bundle"]
    name: str
    config: ModelConfig
    bytes: int
    files: dict[str, int]
    parameters_total: int | None
    parameters_language: int
    parameters_activated: int
    experts_per_layer: dict[int, int]
    tensors: int | None = None
    types: dict[str, int] | None = None
    shared_router: bool | None = None
    bits_per_weight: float | None = None
    target: Target | None = None
    runtime: str | None = None
    quantisation: Any = None
    source: Any = None
    licence: Any = None
    verification: str | None = None
    verified: dict[str, Any] | None = None
    warnings: tuple[Notice, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["target"] = self.target.to_json() if self.target else None
        layers = {str(layer): experts for layer, experts in self.experts_per_layer.items()}
        values["warnings"] = [dataclasses.asdict(notice) for notice in self.warnings]
        return {**values, "config": self.config.to_json(), "experts_per_layer": layers}


def inspect_model(path: Path, *, vision_tower: Path | None = None) -> Inspection:
    """Look into a checkpoint folder or a bundle.

    `vision_tower` is handed to `read_checkpoint`. Raises `InputError` where there is no folder,
    `ModelError` for a damaged model.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder.", "Give a bundle or a checkpoint folder.")
    if (path / "manifest.json").exists():
        return _inspect_bundle(path)
    return _inspect_checkpoint(path, vision_tower)


def activated_parameters(config: ModelConfig) -> int:
    """Parameters of the language part that run for one token."""
    shapes = decoder_parameters(config)
    experts = _total({name: shape for name, shape in shapes.items() if ".ffn.experts." in name})
    if config.moe is None or config.moe.merged:
        return _total(shapes)
    return _total(shapes) - experts + experts * config.moe.top_k // config.moe.num_experts


def _inspect_checkpoint(path: Path, vision_tower: Path | None) -> Inspection:
    try:
        from medmoe_edge.checkpoint.reader import read_checkpoint
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "torch", "export") from error
    checkpoint = read_checkpoint(path, vision_tower=vision_tower)
    stored = [*checkpoint.names.values(), *checkpoint.twins.values()]
    files = {file.name: file.stat().st_size for file in sorted({tensor.file for tensor in stored})}
    return Inspection(
        kind="checkpoint",
        files=files,
        bytes=sum(files.values()),
        parameters_total=_total({n: tensor.shape for n, tensor in checkpoint.names.items()}),
        tensors=len(stored),
        types=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in stored)),
        shared_router=checkpoint.shared_router if checkpoint.config.moe else None,
        warnings=checkpoint.warnings,
        bits_per_weight=_mean(
            (8.0 * tensor.dtype.itemsize, math.prod(tensor.shape))
            for tensor in checkpoint.names.values()
        ),
        runtime="PyTorch: the reference, to be exported",
        **_common(path, checkpoint.config),
    )


def _inspect_bundle(path: Path) -> Inspection:
    from medmoe_edge.bundle.bundle import Bundle
    from medmoe_edge.engine.loading import proven

    bundle = Bundle.open(path, verify=False)
    manifest, known = bundle.manifest, proven(bundle)
    config = ModelConfig.from_json(manifest["config"], "manifest.json config")
    files = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    try:
        total = _total(expected_parameters(config))
    except MissingDependencyError:
        total = None
    return Inspection(
        kind="bundle",
        files=files,
        bytes=sum(files.values()),
        parameters_total=total,
        bits_per_weight=_bits_per_weight(config, manifest.get("quantisation")),
        target=bundle.target,
        runtime=bundle.target.runtime,
        quantisation=manifest.get("quantisation"),
        source=manifest.get("source"),
        licence=manifest.get("licence"),
        verification=known.status,
        verified=known.to_json(),
        **_common(path, config),
    )


def _common(path: Path, config: ModelConfig) -> dict[str, Any]:
    experts = config.moe.num_experts if config.moe else 0
    return {
        "name": path.absolute().name,
        "config": config,
        "parameters_language": _total(decoder_parameters(config)),
        "parameters_activated": activated_parameters(config),
        "experts_per_layer": dict.fromkeys(config.moe_layers, experts),
    }


def _bits_per_weight(config: ModelConfig, quantisation: Any) -> float | None:
    """Of the decoder's matrices, as the manifest tells how each is stored; None if it does not."""
    shapes = decoder_parameters(config)
    try:
        matrices = quantisation.get("matrices") or []
        if not matrices:
            return 32.0 if quantisation["precision"] == "fp32" else None
        return _mean(
            (Format(each["bits"], each["group"]).bits_per_weight(width), rows * width)
            for each in matrices
            for rows, width in [shapes[each["name"]]]
        )
    except (AttributeError, LookupError, TypeError, ValueError):  # of another version
        return None


def _mean(values: Iterable[tuple[float, int]]) -> float:
    """Of values, each with its weight."""
    bits = weights = 0.0
    for value, weight in values:
        bits, weights = bits + value * weight, weights + weight
    return bits / max(weights, 1)


def _total(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


ROUTER_SIZE = 128  # as in models.modality_moe, which needs torch


@dataclasses.dataclass(frozen=True)
class ModalityInspection:
    """A MedMoE's make-up; `parameters` by part.

    `parameters_activated` is what runs for one image and one text: of the experts, one.
    `bits_per_weight` is of all that is stored, graphs included.
    `verification` is a bundle's proof of fidelity: "passed", "failed" or "not measured"; `verified`
    says on which `machine` and whether that holds `here`.
    """

    kind: Literal["checkpoint", "bundle"]
    name: str
    config: ModalityConfig
    bytes: int
    files: dict[str, int]
    parameters: dict[str, int]
    scores: Scores
    bits_per_weight: float | None = None
    target: str | None = None
    runtime: str | None = None
    quantisation: Any = None
    source: Any = None
    licence: Any = None
    verification: str | None = None
    verified: dict[str, Any] | None = None

    @property
    def parameters_total(self) -> int:
        """Of all parts."""
        return sum(self.parameters.values())

    @property
    def parameters_activated(self) -> int:
        """Of what runs for one image and one text."""
        experts = self.parameters["experts"]
        return self.parameters_total - experts + experts // self.config.experts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        totals = {
            "parameters_total": self.parameters_total,
            "parameters_activated": self.parameters_activated,
        }
        configs = {"config": self.config.to_json(), "scores": self.scores.to_json()}
        return {**values, **totals, **configs}


def inspect_modality(folder: Path) -> ModalityInspection:
    """Look into a checkpoint folder or a bundle; raises `ModelError` for a damaged one."""
    name = folder.absolute().name
    if (folder / MANIFEST).exists():
        bundle = ModalityBundle.open(folder, verify=False)
        manifest, known = bundle.manifest, proven(bundle)
        files = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
        stored = sum(size for name, size in files.items() if not name.endswith((".json", ".md")))
        return ModalityInspection(
            kind="bundle",
            name=name,
            config=bundle.config,
            bytes=sum(files.values()),
            files=files,
            parameters=parameters(bundle.config),
            scores=bundle.scores,
            bits_per_weight=8 * stored / sum(parameters(bundle.config).values()),
            target=str(bundle.target),
            runtime=bundle.target.runtime,
            quantisation=manifest["quantisation"],
            source=manifest["source"],
            licence=manifest["licence"],
            verification=known.status,
            verified=known.to_json(),
        )
    config = _checkpoint_config(folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    return ModalityInspection(
        kind="checkpoint",
        name=name,
        config=config,
        bytes=sum(files.values()),
        files=files,
        parameters=parameters(config),
        scores=read_scores(folder),
    )


def parameters(config: ModalityConfig) -> dict[str, int]:
    """How many parameters each part has."""
    size, last = config.size, config.vision.channels[-1]
    router = _linear(last, ROUTER_SIZE) + _linear(ROUTER_SIZE, len(config.modalities))
    projections = sum(_linear(channels, size) for channels in config.vision.channels)
    expert = projections + _linear(size, size // 2) + _linear(size // 2, 1)
    return {
        "image tower": _swin(config.vision),
        "router": router,
        "experts": config.experts * expert,
        "text tower": _bert(config.text),
    }


def _swin(config: SwinConfig) -> int:
    total = _linear(3 * config.patch_size**2, config.embed_size) + 2 * config.embed_size
    offsets = (2 * config.window_size - 1) ** 2
    for size, depth, heads in zip(config.channels, config.depths, config.heads, strict=True):
        inner = config.mlp_ratio * size
        feed_forward = _linear(size, inner) + _linear(inner, size)
        total += depth * (4 * _linear(size, size) + offsets * heads + feed_forward + 4 * size)
    for size in config.channels[:-1]:
        total += 4 * size * 2 * size + 2 * 4 * size  # merging: reduction without bias, and a norm
    return total + 2 * config.channels[-1]


def _bert(config: BertConfig) -> int:
    size, inner = config.hidden_size, config.intermediate_size
    embeddings = (config.vocab_size + config.max_positions + 2) * size + 2 * size
    layer = 4 * _linear(size, size) + _linear(size, inner) + _linear(inner, size) + 4 * size
    return embeddings + config.layers * layer


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _checkpoint_config(folder: Path) -> ModalityConfig:
    path = folder / "config.json"
    try:
        data = json.loads(path.read_bytes())["config"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read.", "Copy the checkpoint again.") from error
    return ModalityConfig.from_json(data, "config.json config")
