"""Weights of a checkpoint block by block: the same numbers as at once, and never a NaN."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import changed, normal
from torch import Tensor

from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export import weights
from medmoe_edge.export.weights import Factors, MatrixTensor, WeightSource

Make = Callable[..., Path]
UP = "decoder.layers.0.ffn.experts.1.up.weight"
ROUTER = "decoder.layers.2.ffn.router.weight"
EMBED, HEAD = "decoder.embed.weight", "decoder.head.weight"


@pytest.fixture
def seven_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows of 64 weights, which divide none of the matrices."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", 7 * 4 * 64 + 3)


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("name", [UP, ROUTER, EMBED, HEAD])
def test_blocks_hold_the_same_numbers(
    tiny_checkpoint: Make, name: str, twins: bool, folded: bool
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint())
    assert checkpoint.shared_router
    if twins:
        checkpoint = dataclasses.replace(checkpoint, twins={name: checkpoint.stored[name]})
    rows, columns = checkpoint.names[name].shape
    by_row, by_column = np.exp(normal(rows)), np.exp(normal(columns, seed=1))
    factors = {name: Factors(by_row, by_column)} if folded else None
    source = WeightSource(checkpoint, factors)
    whole = source.array(name)
    blocks = list(source.rows(name))
    assert [len(block) for block in blocks] == [7] * (rows // 7) + [rows % 7] * (rows % 7 > 0)
    assert np.array_equal(np.concatenate(blocks), whole)
    plain = checkpoint.tensor(name).float().numpy()
    expected = np.outer(by_row, by_column) * plain if folded else plain
    np.testing.assert_allclose(whole, expected, rtol=1e-6)
    assert whole.flags.writeable  # its own memory: the checkpoint's is a map of the file
    tensor = source.tensor(name)
    assert isinstance(tensor, MatrixTensor)
    assert np.array_equal(np.concatenate(list(tensor.rows())), tensor.numpy().T)
    assert tensor.shape.numpy() == (columns, rows)


def test_few_rows_are_one_block(tiny_checkpoint: Make) -> None:
    source = WeightSource(read_checkpoint(tiny_checkpoint()))
    assert [block.shape for block in source.rows(HEAD)] == [(320, 64)]


def test_a_tensor_that_is_no_matrix_keeps_its_layout(tiny_checkpoint: Make) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint())
    bias, kernel = "decoder.layers.0.attention.v.bias", "vision.patch_embedding.weight"
    factors = {bias: Factors(rows=np.full(64, 2, np.float32))}
    source = WeightSource(checkpoint, factors)
    for name, factor in ((bias, 2), (kernel, 1)):
        tensor = source.tensor(name)
        assert type(tensor) is ir.LazyTensor
        assert tensor.shape.numpy() == checkpoint.names[name].shape
        assert np.array_equal(tensor.numpy(), checkpoint.tensor(name).float().numpy() * factor)


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 50])
def test_a_weight_that_is_no_number_is_named(
    tiny_checkpoint: Make, tmp_path: Path, bad: float, row: int
) -> None:
    def spoil(name: str, tensor: Tensor) -> Tensor:
        if name == UP:
            tensor = tensor.clone()
            tensor[row, 3] = bad
        return tensor

    source = WeightSource(read_checkpoint(changed(tiny_checkpoint(), tmp_path / "spoilt", spoil)))
    for read in (source.array, lambda name: list(source.rows(name))):
        with pytest.raises(CheckpointError, match=r"experts\.1\.up\.weight holds values that are"):
            read(UP)
