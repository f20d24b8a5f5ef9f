"""The kernels on torch tensors: for the torch runtime on CUDA, and for the tests.

Shapes are those of the package's docstring. Tensors must be contiguous and on one device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmoe_edge.errors import MissingDependencyError
from medmoe_edge.kernels.variant import Half, Kernel, Tile, Variant, group_of

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
