"""MedMoE as two graphs, so that the features of texts can be kept.

    image.onnx  pixels [1, 3, S, S]               -> regions [1, h, w, D], pooled [1, D],
                                                     router_logits [1, E]
    text.onnx   ids, words [T, P], seen [T, P]    -> word_features [T, P, D], pooled [T, D],
                                                     mask [T, P]

Of the experts only the chosen one runs: a chain of `If`, each with one expert and the rest of the
chain. Swin and BERT are traced by PyTorch's exporter, one expert likewise, once for all of them.
"""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from medmoe_edge._types import Progress, no_progress
from medmoe_edge._version import __version__
from medmoe_edge.bundle.bundle import (
    MODALITY_GATES,
    NOTICE,
    ModalityBundle,
    write_manifest,
)
from medmoe_edge.bundle.recorded import Recorded, SignatureMaker, write_recorded
from medmoe_edge.calibration.collect import check_finite
from medmoe_edge.calibration.quantisers import VISION_INT8
from medmoe_edge.checkpoint.contrastive import modality_sha256, read_modality_checkpoint
from medmoe_edge.checkpoint.published import published
from medmoe_edge.config_contrastive import read_scores
from medmoe_edge.export.build import MODEL_CARD, licence
from medmoe_edge.export.builder import Builder, fix_names, save_model
from medmoe_edge.export.half import halve_weights
from medmoe_edge.export.quantise import Array, lazy_tensor, quantise_weights
from medmoe_edge.export.vision import fill, optimise, quantise_linears, trace
from medmoe_edge.models.contrastive import ModalityMoE, mixed_regions
from medmoe_edge.prompt import Tokenizer

logger = logging.getLogger(__name__)

FIRST = "experts.0."  # the parameters of the expert that is traced
TEXT_OUTPUTS = ("word_features", "pooled", "mask")


class _Tower(nn.Module):
    """Pixels to the pyramid's scales and the router's logits."""

    def __init__(self, model: ModalityMoE) -> None:
        super().__init__()
        self.vision, self.router = model.vision, model.router

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        pyramid = self.vision(pixels)
        return *pyramid.scales, self.router(pyramid.last.mean((1, 2)))


class _Expert(nn.Module):
    """The pyramid's scales to regions and their mean, by the first expert."""

    def __init__(self, model: ModalityMoE) -> None:
        super().__init__()
        self.experts = nn.ModuleList([model.experts[0]])

    def forward(self, *scales: Tensor) -> tuple[Tensor, Tensor]:
        regions = self.experts[0](scales)
        return regions, regions.mean((1, 2))


class _Text(nn.Module):
    def __init__(self, model: ModalityMoE) -> None:
        super().__init__()
        self.text = model.text

    def forward(self, ids: Tensor, words: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.text(ids, words, seen)
        return found.words, found.pooled, found.mask


class _Published(_Tower):
    """Pixels to what the authors' code makes of an image, with all experts."""

    def __init__(self, model: ModalityMoE) -> None:
        super().__init__(model)
        self.experts = model.experts

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        pyramid = self.vision(pixels)
        pooled = pyramid.last.mean((1, 2))
        logits = self.router(pooled)
        return mixed_regions(self.experts, pyramid.scales, logits), pooled, logits


def export_image(model: ModalityMoE) -> ir.Model:
    """The image's graph; it computes what `ModalityMoE.encode_image` does for one image."""
    if model.config.as_published:
        return _export_published(model)
    config, weights = model.config.vision, _Weights(model)
    scales = {
        f"scale.{stage}": torch.zeros(1, grid, grid, channels)
        for stage, (grid, channels) in enumerate(zip(config.grids, config.channels, strict=True))
    }
    pixels = {"pixels": torch.zeros(1, 3, config.image_size, config.image_size)}
    made = trace(_Tower(model), pixels, [*scales, "router_logits"])
    for value in optimise(made, weights.state):
        fill(made.graph, value, weights)
    expert = trace(_Expert(model), scales, ["regions", "pooled"])
    expert.graph.inputs.extend(optimise(expert, weights.state))
    *seen, router_logits = made.graph.outputs
    branches = [
        _branch(expert.graph, index, seen, made.graph, weights)
        for index in range(model.config.experts)
    ]
    chosen = _run_chosen(made.graph, router_logits, branches)
    made.graph.outputs.clear()
    for value, like in zip(chosen, expert.graph.outputs, strict=True):
        value.name, value.type, value.shape = like.name, like.type, like.shape
    made.graph.outputs.extend([*chosen, router_logits])
    fix_names(made)
    return made


def _export_published(model: ModalityMoE) -> ir.Model:
    side, weights = model.config.vision.image_size, _Weights(model)
    pixels = {"pixels": torch.zeros(1, 3, side, side)}
    made = trace(_Published(model), pixels, ["regions", "pooled", "router_logits"])
    for value in optimise(made, weights.state):
        fill(made.graph, value, weights)
    return made


def export_text(model: ModalityMoE) -> ir.Model:
    """The text's graph; it computes what `ModalityMoE.encode_text` does."""
    weights = _Weights(model)
    integers = torch.zeros(2, 8, dtype=torch.long)
    example = {"ids": integers, "words": integers.clone(), "seen": integers == 0}
    varying = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    made = trace(_Text(model), example, TEXT_OUTPUTS, [varying] * 3)
    for value in optimise(made, weights.state):
        fill(made.graph, value, weights)
    return made


def _branch(
    traced: ir.Graph, index: int, scales: list[ir.Value], around: ir.Graph, weights: "_Weights"
) -> ir.Graph:
    """One expert that reads the scales of the graph `around` it, which holds its weights too."""
    branch = traced.clone()
    inputs = list(branch.inputs)
    branch.inputs.clear()
    for value, scale in zip(inputs, scales, strict=False):
        value.replace_all_uses_with(scale)
    for value in inputs[len(scales) :]:
        value.name = str(value.name).replace(FIRST, f"experts.{index}.")
        fill(around, value, weights)
    branch.name = f"expert_{index}"
    return branch


def _run_chosen(
    graph: ir.Graph, router_logits: ir.Value, branches: list[ir.Graph]
) -> list[ir.Value]:
    """Emit the chain, from its end: the last expert needs no question. Returns its outputs."""
    *others, rest = branches
    build = Builder()
    chosen = build.op("ArgMax", router_logits, axis=1, keepdims=0)  # [1]; the first of equals
    if others:
        graph.extend(build.nodes)
    for index in reversed(range(len(others))):
        build = Builder()
        asked = build.op("Equal", chosen, build.constant([index]))
        outputs = build.ops("If", asked, outputs=2, then_branch=others[index], else_branch=rest)
        rest = ir.Graph([], outputs, nodes=build.nodes, name=f"from_{index}")
    nodes = list(rest)  # the chain, or the only expert, is part of the graph itself
    for value in list(rest.initializers.values()):
        del rest.initializers[str(value.name)]
        graph.register_initializer(value)
    outputs = list(rest.outputs)
    rest.outputs.clear()
    rest.remove(nodes)
    graph.extend(nodes)
    return outputs


class _Weights:
    """A model's parameters as lazy tensors; raises `CheckpointError` for one that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {name: value.detach() for name, value in model.named_parameters()}

    def tensor(self, name: str) -> ir.LazyTensor:
        """One parameter; matrices transposed, `[in, out]`."""
        return self._lazy(name, self.state[name].T)

    def untransposed(self, name: str) -> ir.LazyTensor:
        """One parameter as it is."""
        return self._lazy(name, self.state[name])

    def _lazy(self, name: str, tensor: Tensor) -> ir.LazyTensor:
        return lazy_tensor(
            name, partial(_finite, tensor, name), ir.DataType.FLOAT, list(tensor.shape)
        )


def _finite(tensor: Tensor, name: str) -> Array:
    check_finite(tensor, name)
    array: Array = tensor.numpy()
    return array


Precision = Literal["fp32", "int8"]
STORED: dict[Precision, str] = {"fp32": "fp32", "int8": VISION_INT8}


def write_modality_bundle(
    checkpoint: Path,
    folder: Path,
    *,
    precision: Precision,
    name: str | None,
    as_published: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Write the files of a bundle into the empty `folder`.

    `progress` is called with `(step, done, total)`. Raises `ModelError` for a checkpoint that
    cannot be used, and `ResourceError` where the disk does not take it.
    """
    model = read_modality_checkpoint(checkpoint, as_published=as_published)
    scores = read_scores(checkpoint)
    for notice in scores.warnings:
        logger.warning("%s", notice.message)
    words = checkpoint / "tokenizer.json"
    Tokenizer.from_file(words).check_vocabulary(model.config.text.vocab_size)
    progress("image", 0, 1)
    signature = SignatureMaker()
    save_model(_stored(export_image(model), precision, signature), folder, "image")
    progress("text", 0, 1)
    save_model(_stored(export_text(model), precision, signature), folder, "text")
    progress("manifest", 0, 1)
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
        "gates": MODALITY_GATES[precision].to_json(),
        "source": {
            "checkpoint_sha256": modality_sha256(checkpoint),
            "exporter": f"medmoe-edge {__version__}",
            **published(checkpoint, {}),
        },
        "licence": licence(card),
        "intended_use": NOTICE,
    }
    write_manifest(folder, contents)


def _stored(model: ir.Model, precision: Precision, signature: SignatureMaker) -> ir.Model:
    if precision == "int8":
        quantise_linears(model, signature)
        halve_weights(model)
    else:
        quantise_weights(model, lambda _: None, signature)
    return model
