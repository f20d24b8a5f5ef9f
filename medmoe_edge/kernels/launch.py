"""The kernels on torch tensors: for the torch runtime on CUDA, and for the tests.

Shapes are those of the package's docstring. Tensors must be contiguous and on one device.
"""

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from medmoe_edge.errors import MissingDependencyError
from medmoe_edge.kernels.variant import PARTS, Half, Kernel, Tile, Variant, group_of
from medmoe_edge.models.decoder import MoE

try:
    from medmoe_edge.kernels import triton as kernels
except ImportError as error:
    raise MissingDependencyError("triton", "plugin") from error


Expert = Sequence[Tensor]

"""An expert's parts for one kernel, in the order of `variant.PARTS`."""


HALVES: dict[torch.dtype, Half] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
DECODE = 16  # slots: up to here the tiles of decode, of which one block holds an expert's slots


def feed_forward(
    x: Tensor,
    chosen: Tensor,
    gates: Tensor,
    first: Sequence[Expert],
    second: Sequence[Expert],
    activation: str,
) -> Tensor:
    """`y[t]` = sum over j of `gates[t, j]` times expert `chosen[t, j]` of `x[t]`.

    x and y are `[T, D]` in fp16 or bf16, `chosen` and `gates` `[T, S]`; `first` and `second` are
    the experts' matrices for the two kernels, the meta expert's last. Raises `ConfigError` for
    groups that there is no kernel for.
    """
    order, offsets = group_by_expert(chosen, len(first))
    tokens = order // chosen.shape[1]
    hidden = routed_hidden(x, tokens, offsets, first, activation)
    parts = routed_output(hidden, order, gates, offsets, second)
    return parts.view(*chosen.shape, -1).sum(1, dtype=torch.float32).to(x.dtype)


def linear(x: Tensor, parts: Expert) -> Tensor:
    """`[T, K]` times one stored matrix, plus the bias where there is one: an expert of all slots.

    x and the result `[T, N]` are fp16 or bf16; `parts` are the matrix, its scale and maybe a bias.
    Raises `ConfigError` for groups that there is no kernel for.
    """
    slots = torch.arange(len(x) + 1, dtype=torch.int32, device=x.device)
    gates = torch.ones(len(x), device=x.device)
    return routed_output(x, slots[:-1], gates, slots[:: len(x)].contiguous(), [parts])


def group_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """`order` and `offsets` of the slots `[T, S]`."""
    slots = chosen.flatten()
    each = torch.arange(experts, device=slots.device)
    counts = (slots[:, None] == each).sum(0)  # bincount would wait for the device
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.argsort(slots, stable=True).int(), offsets.int()


def routed_hidden(
    x: Tensor, tokens: Tensor, offsets: Tensor, experts: Sequence[Expert], activation: str
) -> Tensor:
    """`hidden` `[T * S, F]`."""
    variant = _variant("hidden", activation, experts, x)
    hidden = x.new_empty(len(tokens), variant.channels)
    return _launch(variant, [x, tokens, offsets], experts, hidden, len(tokens))


def routed_output(
    hidden: Tensor, order: Tensor, gates: Tensor, offsets: Tensor, experts: Sequence[Expert]
) -> Tensor:
    """`parts` `[T * S, D]`."""
    activation = "swiglu" if len(experts[0]) == 2 else "gelu_tanh"
    variant = _variant("output", activation, experts, hidden)
    parts = hidden.new_empty(len(order), variant.channels)
    return _launch(variant, [hidden, order, gates, offsets], experts, parts, len(order))


def _variant(kernel: Kernel, activation: str, experts: Sequence[Expert], x: Tensor) -> Variant:
    matrix, scale = experts[0][:2]
    return Variant(
        kernel,
        activation,
        len(experts),
        width=x.shape[1],
        channels=scale.shape[0],
        group=group_of(matrix.shape),
        half=HALVES[x.dtype],
    )


def _launch(
    variant: Variant, leading: list[Tensor], experts: Sequence[Expert], result: Tensor, slots: int
) -> Tensor:
    tile = _tile(variant, slots)
    kernel = getattr(kernels, f"{variant.kernel}_kernel")
    kernel[variant.grid(slots, tile)](
        *leading,
        tuple(part for expert in experts for part in expert),
        result,
        **variant.constants(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return result


def _tile(variant: Variant, slots: int) -> Tile:
    decode, prefill = variant.tiles
    return decode if slots <= DECODE else prefill


class StoredLinear(nn.Module):
    """In the place of `nn.Linear`: `[..., K]` to `[..., N]` in `dtype`, fp16 or bf16.

    `matrix`, `scale` and a bias of that dtype are as the docstring of `export.plugin` has them.
    """

    def __init__(
        self, matrix: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.parts = [matrix, scale, *([] if bias is None else [bias])]

    @property
    def form(self) -> tuple[torch.dtype, torch.Size]:
        """Matrices of the same form can go through one kernel together."""
        return self.parts[0].dtype, self.parts[0].shape

    def forward(self, x: Tensor) -> Tensor:
        """`x W + b`."""
        y = linear(x.flatten(0, -2).to(self.dtype), self.parts)
        return y.view(*x.shape[:-1], -1)


class StoredMoE(MoE):
    """The layer of a `MoE` whose experts all consist of `StoredLinear`s, of the same forms."""

    def __init__(self, moe: MoE, activation: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.top_k, self.noise, self.rows = moe.top_k, moe.noise, moe.rows
        self.merged = None
        self.router, self.coefficient = moe.router, moe.coefficient
        self.experts, self.meta = moe.experts, moe.meta
        self.activation, self.dtype = activation, dtype

    @classmethod
    def of(cls, moe: MoE, activation: str, dtype: torch.dtype) -> Self | None:
        """The layer in the kernels; None where they cannot run its experts together."""
        if moe.merged is not None:
            return None
        forms = [
            [linear.form if isinstance(linear, StoredLinear) else None for linear in linears]
            for linears in map(nn.Module.children, _experts(moe))
        ]
        alike = None not in forms[0] and all(form == forms[0] for form in forms)
        return cls(moe, activation, dtype) if alike else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]` in `dtype`; the meta expert is one more, that everyone takes."""
        tokens = x.flatten(0, -2)  # [T, D]
        gates, chosen = self.route(tokens)
        if self.meta is not None:
            share = torch.ones_like(gates[:, :1])
            if self.coefficient is not None:
                with torch.autocast(x.device.type, enabled=False):
                    mix = self.coefficient(tokens.float()).softmax(-1)  # [T, 2]
                gates, share = gates * mix[:, :1], share + mix[:, 1:]
            last = torch.full_like(chosen[:, :1], len(self.experts))
            gates, chosen = torch.cat((gates, share), -1), torch.cat((chosen, last), -1)
        first, second = self._parts("hidden"), self._parts("output")
        y = feed_forward(tokens.to(self.dtype), chosen, gates, first, second, self.activation)
        return y.view_as(x)

    def _parts(self, kernel: Kernel) -> list[list[Tensor]]:
        """What a kernel takes, of every expert."""
        matrices = [part for part in PARTS[kernel, self.activation] if "." not in part]
        return [
            [part for name in matrices for part in cast(StoredLinear, getattr(expert, name)).parts]
            for expert in _experts(self)
        ]


def _experts(moe: MoE) -> list[nn.Module]:
    """The routed ones, then the meta expert."""
    return [*moe.experts, *([] if moe.meta is None else [moe.meta])]
