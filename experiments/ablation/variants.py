"""The structures that an ablation compares, all made from one dense model and one router.

An upcycled layer starts as `p FFN(x) + FFN(x)`: expert and meta expert are copies, and p is the
new router's probability of the expert, one of the number of experts. The dense layers start as
`(p + 1) FFN(x)` likewise, so that what differs between the variants is their structure.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.errors import DataError
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.training.phases import upcycle

MERGED = "+"  # joins the modalities of an expert that serves several


@dataclass(frozen=True)
class Start:
    """What a variant begins as: a model without experts, and a new router for them."""

    dense: MedMoE
    router: nn.Linear
    config: ModelConfig

    def upcycled(self, router: nn.Linear | None = None, **moe: Any) -> MedMoE:
        """With experts, in place; `moe` is what of them is another."""
        config = replace(self.config, moe=replace(_moe(self.config), **moe))
        return upcycle(self.dense, self.router if router is None else router, config)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        description: In words.
        build: Turns a start, in place, into the model to train.
        train: A pattern of what learns beside the recipe's own patterns in each layer that had
            experts.
        experts: How many experts it has, where it is about that.
        names: Whether its router is taught which modality an image is of.
    """

    description: str
    build: Callable[[Start], MedMoE]
    train: str | None = None
    experts: int | None = None
    names: bool = True

    def patterns(
        self, recipe: tuple[str, ...], model: MedMoE, layers: tuple[int, ...]
    ) -> tuple[str, ...]:
        """What learns: of the recipe's patterns those that name a part of `model`, and its own."""
        names = [name for name, _ in model.named_parameters()]
        kept = [pattern for pattern in recipe if matching(names, pattern)]
        own = [f"decoder.layers.{layer}.{self.train}" for layer in layers] if self.train else []
        return (*kept, *own)


def _without_meta(start: Start) -> MedMoE:
    return start.upcycled(meta_expert=False)


def _top_2(start: Start) -> MedMoE:
    return start.upcycled(top_k=2)


def _fewer(count: int) -> Callable[[Start], MedMoE]:
    """Neighbouring experts become one; its router row is the mean of theirs."""

    def build(start: Start) -> MedMoE:
        names = _moe(start.config).expert_names
        if len(names) <= count:
            raise DataError(
                f"A variant of {count} experts merges those of more modalities, the recipe has "
                f"{len(names)}.",
                "Leave it out.",
            )
        groups = np.array_split(np.arange(len(names)), count)
        merged = nn.Linear(start.router.in_features, count, bias=start.router.bias is not None)
        merged.load_state_dict(
            {
                name: torch.stack([rows[group].mean(0) for group in groups])
                for name, rows in start.router.state_dict().items()
            }
        )
        joined = tuple(MERGED.join(names[at] for at in group) for group in groups)
        return start.upcycled(merged, num_experts=count, expert_names=joined)

    return build


def _learned_router(start: Start) -> MedMoE:
    """Every layer learns a router of its own, so its experts stand for no modality by name."""
    model = start.upcycled(expert_names=())
    for layer in model.config.moe_layers:
        model.moe_layer(layer).router.reset_parameters()
    return model


def _dense_activated(start: Start) -> MedMoE:
    moe = _moe(start.config)
    return _dense(start, moe.top_k + moe.meta_expert)


def _dense_total(start: Start) -> MedMoE:
    moe = _moe(start.config)
    return _dense(start, moe.num_experts + moe.meta_expert)


def _dense(start: Start, copies: int) -> MedMoE:
    decoder, moe = start.config.decoder, _moe(start.config)
    wide = replace(decoder, intermediate_size=copies * decoder.intermediate_size)
    chance = 1.0 / moe.num_experts
    for index in moe.layers:
        layer = start.dense.decoder.layers[index]
        ffn = layer.get_submodule("ffn")
        layer.ffn = widen(ffn, type(ffn)(wide), total=chance + moe.meta_expert)
    return start.dense


@torch.no_grad()
def widen(narrow: nn.Module, wide: nn.Module, total: float) -> nn.Module:
    """`wide`, a feed-forward of a multiple of the hidden units, made to compute `total * narrow`.

    Each hidden unit is copied and its output shared out among the copies at random (uniformly over
    all shares that add up to `total`): equal copies would get equal gradients and stay one unit
    for ever. Net2WiderNet, https://arxiv.org/abs/1511.05641.
    """
    given = narrow.state_dict()
    for name, parameter in wide.named_parameters():
        old = given[name]
        times = [new // size for new, size in zip(parameter.shape, old.shape, strict=True)]
        parameter.copy_(old.repeat(times))
        if name in ("down.weight", "fc2.weight"):  # [D, copies * F]
            parameter.mul_(total * _shares(times[1], old.shape[1]))
        elif name == "fc2.bias":  # the output's, which belongs to no hidden unit
            parameter.mul_(total)
    return wide


def _shares(copies: int, units: int) -> Tensor:
    """`[copies * F]`: what each copy of each hidden unit has of it; a unit's shares sum to 1."""
    return torch.distributions.Dirichlet(torch.ones(copies)).sample((units,)).T.flatten()


def _moe(config: ModelConfig) -> MoEConfig:
    assert config.moe is not None
    return config.moe


VARIANTS: dict[str, Variant] = {
    "baseline": Variant("as the recipe has it: experts, meta expert, router", Start.upcycled),
    "no-meta": Variant("no meta expert", _without_meta),
    "one-expert": Variant("one expert for all modalities", _fewer(1), experts=1),
    "two-experts": Variant("two experts, each of several modalities", _fewer(2), experts=2),
    "four-experts": Variant("four experts, some of several modalities", _fewer(4), experts=4),
    "top-2": Variant("k = 2: two experts for each token", _top_2),
    "learned-router": Variant(
        "router learns from the answers alone, from random weights",
        _learned_router,
        "ffn.router.*",
        names=False,
    ),
    "dense-activated": Variant(
        "dense, as many parameters as run per token", _dense_activated, "ffn.*"
    ),
    "dense-total": Variant("dense, as many parameters as all experts have", _dense_total, "ffn.*"),
}


def applicable(config: ModelConfig) -> tuple[str, ...]:
    """The variants that differ from a model of this configuration."""
    count = _moe(config).num_experts
    few = tuple(name for name, each in VARIANTS.items() if (each.experts or 0) < count)
    return few if count > 1 else tuple(name for name in few if name != "top-2")
