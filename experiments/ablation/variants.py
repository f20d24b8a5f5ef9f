"""The structures that an ablation compares, all made from one dense model and one router.

An upcycled layer starts as `p FFN(x) + FFN(x)`: expert and meta expert are copies, and the frozen
router is nearly certain (p about 1). The dense layers start as `2 FFN(x)` likewise, so that what
differs between the variants is their structure.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from typing import Any

import torch
from torch import Tensor, nn

from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.errors import DataError
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.training.phases import upcycle

MERGED = "+"  # joins the modalities of an expert that serves several


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    `build(dense, router, config)` turns the phase-2 model, in place, into the one to train; `train`
    is a pattern of what learns beside the recipe's own patterns in each layer that had experts.
    """

    description: str
    build: Callable[[MedMoE, nn.Linear, ModelConfig], MedMoE]
    train: str | None = None

    def patterns(
        self, recipe: tuple[str, ...], model: MedMoE, layers: tuple[int, ...]
    ) -> tuple[str, ...]:
        """What learns: of the recipe's patterns those that name a part of `model`, and its own."""
        names = [name for name, _ in model.named_parameters()]
        kept = [pattern for pattern in recipe if matching(names, pattern)]
        own = [f"decoder.layers.{layer}.{self.train}" for layer in layers] if self.train else []
        return (*kept, *own)


def _without_meta(dense: MedMoE, router: nn.Linear, config: ModelConfig) -> MedMoE:
    return upcycle(dense, router, _with(config, meta_expert=False))


def _top_2(dense: MedMoE, router: nn.Linear, config: ModelConfig) -> MedMoE:
    return upcycle(dense, router, _with(config, top_k=2))


def _two_experts(dense: MedMoE, router: nn.Linear, config: ModelConfig) -> MedMoE:
    """Neighbouring experts become one; its router row is the mean of theirs."""
    names = _moe(config).expert_names
    if len(names) != 4:
        raise DataError(
            f"The variant two-experts merges four experts, the preset has {len(names)}.",
            "Leave it out.",
        )
    merged = nn.Linear(router.in_features, 2, bias=router.bias is not None)
    means = {name: rows.unflatten(0, (2, 2)).mean(1) for name, rows in router.state_dict().items()}
    merged.load_state_dict(means)
    pairs = (MERGED.join(names[:2]), MERGED.join(names[2:]))
    return upcycle(dense, merged, _with(config, num_experts=2, expert_names=pairs))


def _learned_router(dense: MedMoE, router: nn.Linear, config: ModelConfig) -> MedMoE:
    """Every layer learns a router of its own, so its experts stand for no modality by name."""
    model = upcycle(dense, router, _with(config, expert_names=()))
    for layer in model.config.moe_layers:
        model.moe_layer(layer).router.reset_parameters()
    return model


def _dense_activated(dense: MedMoE, _: nn.Linear, config: ModelConfig) -> MedMoE:
    moe = _moe(config)
    return _dense(dense, config, moe.top_k + moe.meta_expert)


def _dense_total(dense: MedMoE, _: nn.Linear, config: ModelConfig) -> MedMoE:
    moe = _moe(config)
    return _dense(dense, config, moe.num_experts + moe.meta_expert)


def _dense(dense: MedMoE, config: ModelConfig, copies: int) -> MedMoE:
    decoder, moe = config.decoder, _moe(config)
    wide = replace(decoder, intermediate_size=copies * decoder.intermediate_size)
    for index in moe.layers:
        layer = dense.decoder.layers[index]
        ffn = layer.get_submodule("ffn")
        layer.ffn = widen(ffn, type(ffn)(wide), total=1.0 + moe.meta_expert)
    return dense


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


def _with(config: ModelConfig, **moe: Any) -> ModelConfig:
    return replace(config, moe=replace(_moe(config), **moe))


def _moe(config: ModelConfig) -> MoEConfig:
    assert config.moe is not None
    return config.moe


VARIANTS: dict[str, Variant] = {
    "baseline": Variant("as the recipe has it: experts, meta expert, frozen router", upcycle),
    "no-meta": Variant("no meta expert", _without_meta),
    "two-experts": Variant(
        "two experts of two modalities each, router rows averaged", _two_experts
    ),
    "top-2": Variant("k = 2: two experts for each token", _top_2),
    "learned-router": Variant(
        "router learns from the answers alone, from random weights", _learned_router, "ffn.router.*"
    ),
    "dense-activated": Variant(
        "dense, as many parameters as run per token", _dense_activated, "ffn.*"
    ),
    "dense-total": Variant("dense, as many parameters as all experts have", _dense_total, "ffn.*"),
}
