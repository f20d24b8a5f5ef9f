"""The experts as two GPU kernels that read only what was chosen, for TensorRT and for torch.

TensorRT's ahead-of-time plugins launch exactly one kernel each, and a feed-forward is two products
of which the second needs all of the first. So `medmoe::MoE` becomes two plugin ops with routing in
standard ops before them (`export/passes/tensorrt.py`):

    hidden = medmoe::RoutedHidden<activation>(x, tokens, offsets, experts' first matrices ...)
    parts  = medmoe::RoutedOutput(hidden, order, gates, offsets, experts' second matrices ...)

A token takes one slot per chosen expert and one for the meta expert, which is one more expert that
everyone takes. Slot `t * S + j` is the j-th of the S slots of token t. Slots are sorted by expert:

    order    [T * S] int32    the slot at each place of the sorted list
    tokens   [T * S] int32    its token, `order // S`
    offsets  [E + 1] int32    where each expert's slots begin; the last is T * S
    gates    [T, S]  fp32     the weight of each slot
    x        [T, D]           fp16 or bf16
    hidden   [T * S, F]       gate, up and activation fused; in sorted order
    parts    [T * S, D]       gate times expert, in the order of the slots; y is their sum by token

Of every expert the matrices are inputs of their own, so that each pages by itself, in this order:

    swiglu     gate, its scale, up, its scale        | down, its scale
    gelu_tanh  fc1, its scale, its bias              | fc2, its scale, its bias

A matrix `[K, N]` is either int8 `[K, N]` with fp32 scales `[N]`, or 4 bits in groups along K: bytes
`[N, K / group, group / 2]`, the first of two lowest, zero point 8, with fp16 scales
`[N, K / group]`; the same bytes as every other target's. Biases are fp16 or bf16, as x.

Below stands what is fixed when a kernel is compiled: which of the two, the format, the sizes, the
tiles.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from medmoe_edge.errors import ConfigError

Kernel = Literal["hidden", "output"]
Half = Literal["fp16", "bf16"]

OPS: dict[Kernel, str] = {"hidden": "RoutedHidden", "output": "RoutedOutput"}

PARTS: dict[tuple[Kernel, str], tuple[str, ...]] = {
    ("hidden", "swiglu"): ("gate", "gate.scale", "up", "up.scale"),
    ("hidden", "gelu_tanh"): ("fc1", "fc1.scale", "fc1.bias"),
    ("output", "swiglu"): ("down", "down.scale"),
    ("output", "gelu_tanh"): ("fc2", "fc2.scale", "fc2.bias"),
}
"""The tensors that a kernel takes of each expert, in order."""

LEADING: dict[Kernel, tuple[str, ...]] = {
    "hidden": ("x", "tokens", "offsets"),
    "output": ("hidden", "order", "gates", "offsets"),
}
"""The inputs before the experts'."""


class Tile(NamedTuple):
    """The block of one program `[m, n]`, taken in steps of k, and how it is run."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Decode, whose blocks hold few slots, and prefill. Sizes that spill nowhere and need at most 48 KiB
# of shared memory, which a kernel gets without asking for more (a plugin cannot ask).
TILES: dict[int | None, tuple[Tile, Tile]] = {
    None: (Tile(16, 64, 64, 4, 4), Tile(64, 64, 64, 4, 3)),
    32: (Tile(16, 64, 32, 2, 3), Tile(64, 64, 32, 4, 2)),
    128: (Tile(16, 32, 128, 4, 3), Tile(64, 32, 128, 4, 2)),
}


@dataclass(frozen=True)
class Variant:
    """One kernel for matrices `[width, channels]`: int8 (`group` None) or 4 bits in groups.

    `experts` counts the meta expert. Raises `ConfigError` for a group size without tiles.
    """

    kernel: Kernel
    activation: str
    experts: int
    width: int
    channels: int
    group: int | None
    half: Half = "fp16"

    def __post_init__(self) -> None:
        if self.group not in TILES or self.width % (self.group or 1):
            raise ConfigError(
                f"The plugin has no kernel for groups of {self.group} in rows of {self.width}.",
                "Quantise the experts to int8, or to int4 in groups of 32 or 128.",
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of one expert, named."""
        return PARTS[self.kernel, self.activation]

    @property
    def result(self) -> str:
        """The output's name in the kernel."""
        return {"hidden": "hidden", "output": "parts"}[self.kernel]

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        """Of decode and of prefill."""
        return TILES[self.group]

    def pointers(self) -> dict[str, str | tuple[str, ...]]:
        """The kernel's arguments in order, with Triton's names of what they point to."""
        types = {"tokens": "*i32", "order": "*i32", "offsets": "*i32", "gates": "*fp32"}
        arguments = {name: types.get(name, f"*{self.half}") for name in LEADING[self.kernel]}
        matrix = "*i8" if self.group is None else "*u8"
        scale = "*fp32" if self.group is None else "*fp16"
        kinds = {"scale": scale, "bias": f"*{self.half}"}
        expert = tuple(kinds.get(part.partition(".")[2], matrix) for part in self.parts)
        return {**arguments, "weights": expert * self.experts, self.result: f"*{self.half}"}

    def constants(self, tile: Tile) -> dict[str, int | bool]:
        """The kernel's compile-time constants."""
        flags = {
            "hidden": {"GATED": self.activation == "swiglu"},
            "output": {"BIASED": self.activation == "gelu_tanh"},
        }
        return {
            **flags[self.kernel],
            "K": self.width,
            "N": self.channels,
            "GROUP": self.group or 0,
            "EXPERTS": self.experts,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
        }

    def __str__(self) -> str:
        weights = "int8" if self.group is None else f"int4, groups of {self.group}"
        return f"{self.activation} {self.kernel} | {weights}"

    def columns(self, tile: Tile) -> int:
        """Blocks of output channels."""
        return math.ceil(self.channels / tile.n)

    def grid(self, slots: int, tile: Tile) -> tuple[int, int]:
        """Programs along the channels and along the slots; enough however the slots are spread."""
        return self.columns(tile), min(slots, slots // tile.m + self.experts)


def group_of(matrix: Sequence[int]) -> int | None:
    """The group size that the shape of a stored matrix tells; None for int8 `[K, N]`."""
    return None if len(matrix) == 2 else 2 * matrix[2]


def of_both_models() -> Iterator[Variant]:
    """The kernels of StableLM-2-1.6B and Phi-2 with four experts and the meta expert, in fp16."""
    sizes = {"swiglu": (2048, 5632), "gelu_tanh": (2560, 10240)}
    for (activation, (d, f)), group in product(sizes.items(), TILES):
        yield Variant("hidden", activation, 5, d, f, group)
        yield Variant("output", activation, 5, f, d, group)


def namespace(activation: str, experts: int) -> str:
    """TensorRT's namespace of the two ops for so many experts, the meta expert counted."""
    return f"medmoe_{activation}_{experts}"
