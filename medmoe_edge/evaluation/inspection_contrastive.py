"""What is in a checkpoint or bundle of MedMoE, told from its configuration: no weights are read."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from medmoe_edge.bundle.bundle import MANIFEST
from medmoe_edge.bundle.contrastive import ModalityBundle
from medmoe_edge.config_contrastive import (
    BertConfig,
    ModalityConfig,
    Scores,
    SwinConfig,
    read_scores,
)
from medmoe_edge.engine.proof import proven
from medmoe_edge.errors import CheckpointError

ROUTER_SIZE = 128  # as in models.modality_moe, which needs torch


@dataclasses.dataclass(frozen=True)
class ModalityInspection:
    """A MedMoE's make-up; `parameters` by part.

    `parameters_activated` is what runs for one image and one text: of the experts, one.
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
    target: str | None = None
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
        return ModalityInspection(
            kind="bundle",
            name=name,
            config=bundle.config,
            bytes=sum(files.values()),
            files=files,
            parameters=parameters(bundle.config),
            scores=bundle.scores,
            target=str(bundle.target),
            quantisation=manifest["quantisation"],
            source=manifest["source"],
            licence=manifest["licence"],
            verification=known.status,
            verified=known.to_json(),
        )
    config = _checkpoint_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    files = {path.name: path.stat().st_size for path in weights}
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
