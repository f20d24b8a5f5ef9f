"""The plugin's kernels, under Triton's interpreter or on a GPU, against float64 token by token."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import interpret
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from medmoe_edge.errors import ConfigError
from medmoe_edge.kernels import Kernel, Variant, launch
from medmoe_edge.kernels.launch import EXPERTS, HALF_ERROR, error_of, random_layer, random_slots

# Activations divide by 1 + exp(-u), which may be infinite: the quotient is then 0, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).abs().max() / expected.abs().max())


# Group, D and F: no multiples of a tile where the format allows it, so that edges are masked.
FORMATS = [(None, 72, 80), (32, 64, 96), (128, 128, 128)]
USES = [("swiglu", 1, 2), ("swiglu", 21, 2), ("gelu_tanh", 1, 3), ("gelu_tanh", 33, 1)]
VARIANTS = [
    pytest.param(use, sizes, half, id=f"{use[0]}-{use[1]}-{sizes[0]}-{half}")
    for use, sizes, half in itertools.product(USES, FORMATS, HALF_ERROR)
]


@pytest.mark.parametrize(("use", "sizes", "half"), VARIANTS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernels_equal_float64(
    request: pytest.FixtureRequest,
    use: tuple[str, int, int],
    sizes: tuple[int | None, int, int],
    half: torch.dtype,
    device: str,
) -> None:
    if device == "cpu":
        request.getfixturevalue("interpreter")
    activation, tokens, slots = use
    layer = random_layer(activation, sizes[0], half, *sizes[1:])
    assert 0 < error_of(layer, tokens, slots, half, device) < HALF_ERROR[half]


@pytest.mark.parametrize("counts", [(0, 0, 70, 0), (64, 0, 1, 5), (65, 1, 0, 4), (0, 17, 47, 6)])
def test_the_slots_may_be_spread_in_any_way(interpreter: None, counts: tuple[int, ...]) -> None:
    layer = random_layer("swiglu", None, torch.float16, 32, 32)
    chosen = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
    chosen = chosen[torch.randperm(70, generator=torch.Generator().manual_seed(4))][:, None]
    x = torch.randn(70, 32, generator=torch.Generator().manual_seed(5)).half()
    gates = torch.ones(70, 1)
    y = launch.feed_forward(x, chosen, gates, layer.first, layer.second, "swiglu")
    assert 0 < relative(y, layer(x, chosen, gates)) < 2e-3


def test_groups_without_a_kernel_are_refused(interpreter: None) -> None:
    layer = random_layer("swiglu", 16, torch.float16, 64, 64)
    chosen, gates = random_slots(2, 1)
    x = torch.zeros(2, 64, dtype=torch.float16)
    with pytest.raises(ConfigError, match="groups of 16"):
        launch.feed_forward(x, chosen, gates, layer.first, layer.second, "swiglu")


# --- what is read -----------------------------------------------------------------------------


class Reads:
    """The bytes that kernels load, by the tensor that they lie in, counted in the interpreter."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.loads: list[tuple[Any, int]] = []
        load = InterpreterBuilder.create_masked_load

        def counted(builder: Any, pointers: Any, mask: Any, *more: Any) -> Any:
            size = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
            self.loads.append((pointers.data[mask.data].ravel(), size))
            return load(builder, pointers, mask, *more)

        patch.setattr(InterpreterBuilder, "create_masked_load", counted)

    def of(self, tensor: Tensor) -> int:
        """Those of one tensor."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return sum(
            size * int(np.count_nonzero((addresses >= start) & (addresses < end)))
            for addresses, size in self.loads
        )


@pytest.mark.parametrize(
    ("activation", "sizes", "tokens"),
    [
        *(("swiglu", sizes, 1) for sizes in FORMATS),
        *(("gelu_tanh", sizes, 1) for sizes in FORMATS),
        ("swiglu", FORMATS[1], 70),
        ("gelu_tanh", FORMATS[0], 70),
    ],
)
def test_only_chosen_experts_are_read_once_per_block(
    interpreter: None,
    monkeypatch: pytest.MonkeyPatch,
    activation: str,
    sizes: tuple[int | None, int, int],
    tokens: int,
) -> None:
    group, width, hidden = sizes
    layer = random_layer(activation, group, torch.float16, width, hidden)
    chosen = torch.tensor([[1, 3]]).repeat(tokens, 1)
    x = torch.ones(tokens, width, dtype=torch.float16)
    reads = Reads(monkeypatch)
    launch.feed_forward(x, chosen, torch.ones(tokens, 2), layer.first, layer.second, activation)
    shapes: list[tuple[Kernel, int, int, list[list[Tensor]]]] = [
        ("hidden", width, hidden, layer.first),
        ("output", hidden, width, layer.second),
    ]
    for kernel, k, n, experts in shapes:
        tile = Variant(kernel, activation, EXPERTS, k, n, group).tiles[tokens > 1]
        blocks = math.ceil(tokens / tile.m)  # of slots; each reads its expert once
        read = [sum(reads.of(part) for part in expert) for expert in experts]
        stored = sum(part.nbytes for part in experts[1])
        assert read[0] == read[2] == 0
        assert read[1] == read[3] == stored * blocks
