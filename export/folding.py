"""Where a scale per channel can pass from activations into weights without changing the model.

At a fold point the producers' output channels are divided by s and the consumers' input channels
multiplied by s: norms into the matrices that read them (routers too, whose logits stay the same),
v into out, up into down. GELU lets nothing pass, so Phi's fc2 has no fold point.
Source: SmoothQuant, arXiv 2211.10438, and AWQ, arXiv 2306.00978.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from medmoe_edge._types import Floats
from medmoe_edge.calibration.statistics import site_of
from medmoe_edge.config import ModelConfig
from medmoe_edge.export.ops import ACTIVATIONS, EXPERT_WEIGHTS
from medmoe_edge.export.weights import Factors


@dataclass(frozen=True)
class FoldPoint:
    """One activation: the `sites` where it is observed, what makes it and what reads it.

    `producers` are parameters whose rows (or values, of a bias) are its channels, `consumers`
    matrices whose columns are.
    """

    sites: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]

    @property
    def quantised(self) -> list[str]:
        """The consumers that quantisation rounds: all but routers and coefficients."""
        return [name for name in self.consumers if site_of(name) is not None]


def fold_points(config: ModelConfig) -> Iterator[FoldPoint]:
    """Every fold point of a decoder, in the order of execution."""
    for layer in range(config.decoder.layers):
        own = f"decoder.layers.{layer}."
        attention = tuple(f"{own}attention.{name}.weight" for name in "qkv")
        reads = tuple(_feed_forward_readers(config, layer))
        norm = config.decoder.norm_parameters
        if config.decoder.parallel:  # one norm for both branches
            yield _after_norm(f"{own}input_norm", norm, attention + reads)
        else:
            yield _after_norm(f"{own}input_norm", norm, attention)
            yield _after_norm(f"{own}post_norm", norm, reads)
        value = f"{own}attention.v"
        yield FoldPoint(
            (f"{own}attention.mixed",),
            (f"{value}.weight", f"{value}.bias"),
            (f"{own}attention.out.weight",),
        )
        if ACTIVATIONS[config.decoder.kind] == "swiglu":
            for owner in _feed_forwards(config, layer):
                yield FoldPoint(
                    (f"{owner}hidden",), (f"{owner}up.weight",), (f"{owner}down.weight",)
                )
    yield _after_norm("decoder.norm", config.decoder.norm_parameters, ("decoder.head.weight",))


def fold(scales: Mapping[FoldPoint, Floats]) -> dict[str, Factors]:
    """The factors of every parameter that the scales `[K]` of these points touch."""
    rows: dict[str, Floats] = {}
    columns: dict[str, Floats] = {}
    for point, scale in scales.items():
        rows |= dict.fromkeys(point.producers, (1 / scale).astype(np.float32))
        columns |= dict.fromkeys(point.consumers, scale)
    names = dict.fromkeys([*rows, *columns])
    return {name: Factors(rows.get(name), columns.get(name)) for name in names}


def _after_norm(norm: str, parts: tuple[str, ...], consumers: tuple[str, ...]) -> FoldPoint:
    sites = dict.fromkeys(site for name in consumers if (site := site_of(name)))
    return FoldPoint(tuple(sites), tuple(f"{norm}.{part}" for part in parts), consumers)


def _feed_forwards(config: ModelConfig, layer: int) -> list[str]:
    """The owners of feed-forward matrices: the experts and the meta expert, or the dense layer."""
    own = f"decoder.layers.{layer}.ffn."
    if config.moe is None or layer not in config.moe.layers:
        return [own]
    owners = [f"{own}experts.{index}." for index in range(config.moe.num_experts)]
    return owners + [f"{own}meta."] * config.moe.meta_expert


def _feed_forward_readers(config: ModelConfig, layer: int) -> Iterator[str]:
    first = [
        name
        for name in EXPERT_WEIGHTS[ACTIVATIONS[config.decoder.kind]]
        if name in ("gate.weight", "up.weight", "fc1.weight")
    ]
    for owner in _feed_forwards(config, layer):
        yield from (f"{owner}{name}" for name in first)
    if config.moe is not None and layer in config.moe.layers:
        yield f"decoder.layers.{layer}.ffn.router.weight"
        if config.moe.use_residual:
            yield f"decoder.layers.{layer}.ffn.coefficient.weight"
