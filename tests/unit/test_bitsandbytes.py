"""bitsandbytes' formats against the papers' arithmetic, and its runtime against the eager one."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medmoe_edge.calibration.statistics import input_of
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import MissingDependencyError
from medmoe_edge.runtimes.torch.eager import (
    BitsAndBytesRuntime,
    EagerRuntime,
    Kind,
    bitsandbytes,
    quantise_linear,
)

# The 16 values of nf4: QLoRA, arXiv 2305.14314, appendix E.
NEGATIVE = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
NF4 = torch.tensor((*NEGATIVE, 0.0, *POSITIVE))


def nf4(weight: Tensor) -> Tensor:
    """The weight that nf4 stands for: the nearest value times the largest magnitude of its 64."""
    blocks = weight.reshape(-1, 64)
    peak = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / peak[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * peak).view_as(weight)


def int8(x: Tensor) -> Tensor:
    """Rows of x in fp16, rounded to 127 steps of their largest magnitude; ties as fp32 has them."""
    x = x.half().float()
    peak = x.abs().amax(-1, keepdim=True)
    return (x * (127 / peak)).round().double() * peak.double() / 127


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7])
def test_linears_compute_what_the_papers_say(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 96, bias=bias).requires_grad_(False), torch.randn(rows, 128)
    shift = linear.bias.double() if bias else 0
    quantised, bits = quantise_linear(linear, "nf4")
    torch.testing.assert_close(
        quantised(x).double(), x.double() @ nf4(linear.weight).double().T + shift, rtol=0, atol=1e-5
    )
    assert bits == 128 * 96 * 4 + 128 * 96 // 64 * 32
    quantised, bits = quantise_linear(linear, "int8")
    expected = int8(x) @ int8(linear.weight).T + shift
    torch.testing.assert_close(quantised(x).double(), expected, rtol=0, atol=1e-4)
    assert bits == 128 * 96 * 8 + 96 * 32


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-4), ("int8", 0.3)])
def test_runtime_computes_with_the_weights_that_are_stored(
    tiny_checkpoint: Callable[..., Path], preset: str, kind: Kind, tolerance: float
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint(preset))
    runtime, expected = BitsAndBytesRuntime(checkpoint, kind), EagerRuntime(checkpoint)
    for name, weight in expected.model.named_parameters():
        if input_of(name):
            weight.data = nf4(weight.data) if kind == "nf4" else int8(weight.data).float()
    embeds = runtime.embed([5, 9, 200, 3])
    cache = runtime.new_cache(4)
    runtime.step(embeds[:3], cache)
    np.testing.assert_allclose(
        runtime.step(embeds[3:], cache).logits,
        expected.step(embeds, expected.new_cache(4)).logits,
        rtol=0,
        atol=tolerance,
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_only_what_our_quantisers_quantise_is_replaced(
    tiny_checkpoint: Callable[..., Path], kind: Kind
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint())
    runtime = BitsAndBytesRuntime(checkpoint, kind)
    stored = dict(runtime.model.named_parameters())
    shapes = [tuple(checkpoint.names[name].shape) for name in stored if input_of(name)]
    assert len(shapes) > 20
    for name, parameter in stored.items():
        assert parameter.dtype.is_floating_point == (input_of(name) is None), name
    weights = sum(rows * width for rows, width in shapes)
    scales = weights / 64 if kind == "nf4" else sum(rows for rows, _ in shapes)
    assert runtime.bits_per_weight == (4 if kind == "nf4" else 8) + 32 * scales / weights


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"medmoe-edge\[baselines\]"):
        bitsandbytes()
