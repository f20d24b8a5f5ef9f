"""Ways of quantising the matrices of the stress model: `nn.Linear` in, its stand-in out."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medmoe_edge._types import Floats
from medmoe_edge.calibration.methods import quantise_gptq, search_migration
from medmoe_edge.calibration.quantisers import (
    Format,
    Quantised,
    round_searched,
    round_to_nearest,
    shares,
)
from medmoe_edge.calibration.statistics import InputStatistics
from medmoe_edge.export.plan import TYPICAL
from medmoe_edge.runtimes.torch.eager import Kind, quantise_linear

INT8 = Format(8)


@dataclass(frozen=True)
class Fold:
    """Matrices whose inputs can only be scaled together, as they come from one norm or matrix.

    `statistics` has what each matrix saw itself; `common` what the whole fold saw.
    """

    linears: list[nn.Linear]
    statistics: list[InputStatistics]
    common: InputStatistics

    @property
    def weights(self) -> list[Floats]:
        """Their weights, `[N, K]` each."""
        return [linear.weight.detach().numpy() for linear in self.linears]


class StandIn(NamedTuple):
    """What computes in a matrix's place, and the bits that each of its weights takes."""

    module: nn.Module
    bits: float


Method = Callable[[Fold], list[StandIn]]
Rounding = Callable[[Floats, InputStatistics, Format], Quantised]


class W8A8(nn.Module):
    """int8 rows times `dynamic_uint8` of the inputs, which are first divided by `divisor` `[K]`.

    With `per_token` each token is divided by its largest magnitude too, as our exporter has it.
    """

    def __init__(self, weight: Floats, divisor: Floats, per_token: bool) -> None:
        super().__init__()
        self.weight, self.divisor = torch.from_numpy(weight), torch.from_numpy(divisor)
        self.per_token = per_token

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        x = x / self.divisor
        if not self.per_token:
            return nn.functional.linear(dynamic_uint8(x), self.weight)
        peak = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        return nn.functional.linear(dynamic_uint8(x / peak), self.weight) * peak


def dynamic_uint8(x: Tensor) -> Tensor:
    """What ONNX's DynamicQuantizeLinear leaves of x: one asymmetric grid for all of its values."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def linear(weight: Floats) -> nn.Linear:
    """A matrix without bias, `[N, K]`."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    return module


def int8(rounding: Rounding, *, smooth: bool = True, per_token: bool = True) -> Method:
    """W8A8, after SmoothQuant with a searched strength or without."""

    def method(fold: Fold) -> list[StandIn]:
        scale = np.ones_like(fold.common.mean_square)
        if smooth:
            power = fold.common.mean_square
            typical = TYPICAL * np.sqrt(power) if per_token else np.inf
            low = np.maximum(fold.common.minimum, -typical)
            high = np.minimum(fold.common.maximum, typical)
            _, scale = search_migration(low, high, power, fold.weights)
        return [
            StandIn(
                W8A8(rounding(weight * scale, seen, INT8).dequantise(), scale, per_token),
                INT8.bits_per_weight(len(scale)),
            )
            for weight, seen in zip(fold.weights, divided(fold.statistics, scale), strict=True)
        ]

    return method


def divided(statistics: list[InputStatistics], scale: Floats) -> Iterator[InputStatistics]:
    """The second moments of inputs that were divided by `scale` `[K]`."""
    for seen in statistics:
        assert seen.hessian is not None
        hessian = seen.hessian / scale[:, None] / scale
        yield replace(seen, mean_square=seen.mean_square / scale**2, hessian=hessian)


def int4(rounding: Rounding, group: int) -> Method:
    """The method that rounds every matrix by itself."""

    def method(fold: Fold) -> list[StandIn]:
        form = fitting(group, len(fold.common.mean_square))
        return [
            StandIn(
                linear(rounding(weight, seen, form).dequantise()),
                form.bits_per_weight(weight.shape[1]),
            )
            for weight, seen in zip(fold.weights, fold.statistics, strict=True)
        ]

    return method


def search_awq(mean_square: Floats, weights: Sequence[Floats], format: Format) -> Floats:
    """AWQ's s_k = E[x_k^2]^(a/2) `[K]`, of geometric mean 1, with the best a (arXiv 2306.00978).

    The best has the least sum over `weights` `[N, K]` of E[x_k^2] (W - Ŵ)^2, where Ŵ is W diag(s)
    rounded to nearest in `format`, divided by s again.
    """
    counted = shares(mean_square, len(mean_square))
    logs = np.log(counted, dtype=np.float64)
    logs -= logs.mean()

    def error(scale: Floats) -> float:
        total = 0.0
        for weight in weights:
            scaled = weight * scale
            scaled -= round_to_nearest(scaled, format).dequantise()
            total += float(np.einsum("nk,nk->k", scaled, scaled) @ (counted / scale**2))
        return total

    candidates = [np.exp(a / 2 * logs).astype(np.float32) for a in np.arange(0, 1.01, 0.1)]
    return min(candidates, key=error)


def int4_awq(group: int) -> Method:
    """AWQ: round to nearest what has been scaled; that inputs are divided folds away."""

    def method(fold: Fold) -> list[StandIn]:
        power = fold.common.mean_square
        form = fitting(group, len(power))
        scale = search_awq(power, fold.weights, form)
        return [
            StandIn(
                linear(round_to_nearest(weight * scale, form).dequantise() / scale),
                form.bits_per_weight(len(power)),
            )
            for weight in fold.weights
        ]

    return method


def fitting(group: int, width: int) -> Format:
    """4 bits in groups of `group`, or of the next power of two that divides `width`."""
    while width % group:
        group //= 2
    return Format(4, group)


def bitsandbytes(kind: Kind) -> Method:
    """The baseline: bitsandbytes' own modules."""

    def method(fold: Fold) -> list[StandIn]:
        stand_ins = [(each, *quantise_linear(each, kind)) for each in fold.linears]
        return [StandIn(module, bits / each.weight.numel()) for each, module, bits in stand_ins]

    return method


def nearest(weight: Floats, _: InputStatistics, form: Format) -> Quantised:
    """Round to nearest."""
    return round_to_nearest(weight, form)


def searched(weight: Floats, _: InputStatistics, form: Format) -> Quantised:
    """Searched scales, without data."""
    return round_searched(weight, form)


def weighted(weight: Floats, seen: InputStatistics, form: Format) -> Quantised:
    """Searched scales that weigh each input by its power."""
    return round_searched(weight, form, seen.mean_square)


def gptq(weight: Floats, seen: InputStatistics, form: Format) -> Quantised:
    """GPTQ on the inputs' Hessian."""
    assert seen.hessian is not None
    return quantise_gptq(weight, seen.hessian, form)


METHODS: dict[str, Method] = {
    "int8, one scale for all tokens": int8(nearest, smooth=False, per_token=False),
    "int8": int8(nearest, smooth=False),
    "int8, SmoothQuant": int8(nearest),
    "int8, SmoothQuant, GPTQ": int8(gptq),
    "int8 bitsandbytes": bitsandbytes("int8"),
    "nf4 bitsandbytes": bitsandbytes("nf4"),
    **{
        f"int4, groups of {group}, {name}": method
        for group in (32, 128)
        for name, method in {
            "to nearest": int4(nearest, group),
            "searched": int4(searched, group),
            "searched, weighted": int4(weighted, group),
            "AWQ": int4_awq(group),
            "GPTQ": int4(gptq, group),
        }.items()
    },
}


Seen = Mapping[str, tuple[nn.Linear, InputStatistics]]
"""Matrices by their names, with what each saw."""

BASE, FEW = Format(8), 32  # of a whole matrix; weights that share a scale in 4 bits and fewer


def whole_experts(form: Format) -> Callable[[Seen], dict[str, StandIn]]:
    """Every routed expert and the meta expert in one format, by GPTQ."""

    def method(experts: Seen) -> dict[str, StandIn]:
        return {
            name: StandIn(linear(_gptq(matrix, seen, form)), form.bits_per_weight(_width(matrix)))
            for name, (matrix, seen) in experts.items()
        }

    return method


def delta_experts(base: Format, bits: int) -> Callable[[Seen], dict[str, StandIn]]:
    """The meta expert in `base`, and what each expert adds to it in a few bits, by GPTQ.

    As `export --experts delta:bits=B` has it: of 8 and 4 bits the scales are searched.
    """
    form = Format(bits, FEW)

    def method(experts: Seen) -> dict[str, StandIn]:
        made = {}
        for name, (matrix, seen) in experts.items():
            if (meta := meta_of(name)) == name:
                bits_taken = base.bits_per_weight(_width(matrix))
                made[name] = StandIn(linear(_gptq(matrix, seen, base)), bits_taken)
        for name, (matrix, seen) in experts.items():
            if (meta := meta_of(name)) == name:
                continue
            added = (matrix.weight - experts[meta][0].weight).detach().numpy()
            rounded = round_searched(added, form)
            if bits == 2:
                assert seen.hessian is not None
                rounded = quantise_gptq(added, seen.hessian, form, evenly=True)
            base_weight = made[meta].module.get_parameter("weight")
            whole = base_weight.numpy() + rounded.dequantise()
            made[name] = StandIn(linear(whole), form.bits_per_weight(_width(matrix)))
        return made

    return method


def meta_of(name: str) -> str:
    """The meta expert's matrix beside an expert's; its own name of one that is."""
    return re.sub(r"\.experts\.\d+\.", ".meta.", name)


def _gptq(matrix: nn.Linear, seen: InputStatistics, form: Format) -> Floats:
    return gptq(matrix.weight.detach().numpy(), seen, form).dequantise()


def _width(matrix: nn.Linear) -> int:
    return matrix.weight.shape[1]


EXPERT_METHODS: dict[str, Callable[[Seen], dict[str, StandIn]]] = {
    "experts and meta in int8": whole_experts(BASE),
    "in int4, groups of 32": whole_experts(Format(4, FEW)),
    "meta int8, deltas 4 bits": delta_experts(BASE, 4),
    "meta int8, deltas 2 bits": delta_experts(BASE, 2),
    "meta int4, deltas 4 bits": delta_experts(Format(4, FEW), 4),
    "meta int4, deltas 2 bits": delta_experts(Format(4, FEW), 2),
}
"""Only the experts' matrices are rounded, so that they are what is compared."""
