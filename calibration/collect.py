"""One pass over the calibration samples, layer by layer: memory holds one layer, not the model.

A layer is done once its statistics are in the work folder, so a killed pass goes on at the first
layer that has none.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from medmoe_edge._types import Progress
from medmoe_edge.calibration.coverage import Neighbours, Pair
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.calibration.samples import Sample
from medmoe_edge.calibration.statistics import (
    FORMAT,
    SiteFiles,
    SiteStatistics,
    site_of,
    write_sites,
)
from medmoe_edge.calibration.stream import LayerStream
from medmoe_edge.calibration.tensor_file import writing
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.errors import CheckpointError, InputError
from medmoe_edge.models.decoder import MoE, route

RUN = "run.json"
HEAD = "decoder.head.in"


class Observer:
    """Gathers `statistics` by site of what enters the `nn.Linear` modules of any module.

    `site_of(name of a weight)` says the site, or None for one that is not observed; matrices of
    one site share their input, which is taken once. While `weights` `[T]` is set, the tokens
    count as borrowed. Activations that are not finite raise `CheckpointError`.
    """

    def __init__(
        self, module: nn.Module, site_of: Callable[[str], str | None], *, hessians: bool
    ) -> None:
        self.statistics: dict[str, SiteStatistics] = {}
        self.weights: Tensor | None = None
        self._hessians = hessians
        self._linears: dict[str, nn.Linear] = {}
        self._hooks: list[RemovableHandle] = []
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear) and (site := site_of(f"{name}.weight")) is not None:
                self._linears.setdefault(site, part)

    def __enter__(self) -> Self:
        self._hooks = [self._watch(site, linear) for site, linear in self._linears.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, site: str, linear: nn.Linear) -> RemovableHandle:
        return linear.register_forward_pre_hook(lambda _, inputs: self.update(site, inputs[0]))

    def update(self, site: str, x: Tensor) -> None:
        """Add activations `[..., K]` to a site."""
        tokens = x.detach().flatten(0, -2).float().cpu()  # [T, K]
        if not len(tokens):
            return
        if not all(extreme.isfinite() for extreme in tokens.aminmax()):
            raise CheckpointError(
                f"The activations of {site} are infinite or no numbers.",
                "The weights before it are damaged: use another checkpoint.",
            )
        if site not in self.statistics:
            self.statistics[site] = SiteStatistics.empty(tokens.shape[1], hessian=self._hessians)
        weights = None if self.weights is None else self.weights.numpy()
        self.statistics[site].update(tokens.numpy(), weights)


@dataclass(frozen=True)
class Collected:
    """What one pass left in its work folder: files of sites, and the routing."""

    files: tuple[Path, ...]
    routing: RoutingProfile


def collect(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    work: Path,
    *,
    hessians: bool,
    borrow: Mapping[Pair, int] | None = None,
    progress: Progress | None = None,
) -> Collected:
    """Run `samples` through the checkpoint in fp32 and gather the statistics of every site.

    With `borrow`, instead only those of the experts that it names, each from so many tokens which
    the router sent elsewhere (`Neighbours`). `progress` is called with `(step, done,
    total)`.

    A pass that was interrupted goes on; what `work` holds of another pass (other samples, another
    checkpoint) is deleted first. Raises `InputError` for a folder that holds anything else,
    `CheckpointError` for weights or activations that are not finite, and `ResourceError` where
    the disk does not take it.
    """
    borrow = borrow or {}
    identity = {
        "format": FORMAT,
        "checkpoint": checkpoint.sha256(),
        "samples": hashlib.sha256(repr(list(samples)).encode()).hexdigest(),
        "hessians": hessians,
        "borrow": sorted(borrow.items()),
    }
    with torch.inference_mode(), writing(work):
        _prepare(work, json.dumps(identity))
        stream = LayerStream(checkpoint, samples, work, progress or (lambda *_: None))
        last = max((layer for layer, _ in borrow), default=checkpoint.config.decoder.layers - 1)
        files = [_layer(stream, index, borrow, hessians) for index in range(last + 1)]
        if not borrow:
            files.append(_head(stream, hessians))
        contents = SiteFiles(files).contents
    profiles = (RoutingProfile.from_json(content["routing"]) for content in contents)
    return Collected(tuple(files), reduce(RoutingProfile.stack, profiles))


def _prepare(work: Path, identity: str) -> None:
    """Make the folder, or empty it if it holds another pass."""
    run = work / RUN
    if run.is_file():
        if run.read_text(encoding="utf-8") == identity:
            return
        shutil.rmtree(work)
    elif work.exists() and any(work.iterdir()):
        raise InputError(f"{work} holds other things.", "Give an empty folder to work in.")
    work.mkdir(parents=True, exist_ok=True)
    run.write_text(identity, encoding="utf-8")


def _layer(stream: LayerStream, index: int, borrow: Mapping[Pair, int], hessians: bool) -> Path:
    """The file of one decoder layer's sites, made now unless it is there."""
    file = stream.work / f"layer-{index:02}.safetensors"
    if file.exists():
        return file
    layer = stream.load_layer(index)
    observer = Observer(
        layer, lambda name: site_of(f"decoder.layers.{index}.{name}"), hessians=hessians
    )
    neighbours = [Neighbours(e, count) for (at, e), count in borrow.items() if at == index]
    with contextlib.nullcontext() if borrow else observer:
        profile = _run(stream, layer, index, neighbours)
    if isinstance(layer.ffn, MoE):
        with observer:
            for lent in neighbours:
                observer.weights = lent.weights
                layer.ffn.experts[lent.expert](lent.tokens)
    write_sites(file, observer.statistics, {"routing": profile.to_json()})
    return file


def _run(
    stream: LayerStream, layer: nn.Module, index: int, neighbours: Sequence[Neighbours]
) -> RoutingProfile:
    """Run a layer over all samples; count what its router chose, and nearly chose."""
    moe = layer.ffn if isinstance(layer.ffn, MoE) else None
    profile = _profile(stream, [] if moe is None else [index])
    for modality, inputs in zip(stream.modalities, stream.forward(layer, index), strict=True):
        if moe is None:
            continue
        logits = moe.router_logits(inputs)  # [T, E]
        _, chosen = route(logits, moe.top_k)  # [T, K]
        profile.record(index, modality, chosen.numpy())
        for lent in neighbours:
            lent.offer(inputs, logits.softmax(-1), chosen)
    return profile


def _head(stream: LayerStream, hessians: bool) -> Path:
    """The file of the head's site."""
    file = stream.work / "head.safetensors"
    if not file.exists():
        observer = Observer(nn.Identity(), site_of, hessians=hessians)
        for states in stream.head_inputs():
            observer.update(HEAD, states)
        write_sites(file, observer.statistics, {"routing": _profile(stream, []).to_json()})
    return file


def _profile(stream: LayerStream, layers: Sequence[int]) -> RoutingProfile:
    moe = stream.config.moe
    return RoutingProfile.empty(stream.modalities, layers, moe.num_experts if moe else 0)
