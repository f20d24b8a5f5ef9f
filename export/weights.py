"""Checkpoint tensors as lazy ONNX tensors, read when written; and scales folded into them.

And experts as what they add to the meta expert they were copied from, E = meta + D: whole, or as
the product of two narrow matrices (DeRS, arXiv 2503.01359, stores up-cycled experts so).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.recorded import DELTA
from medmoe_edge.calibration.quantisers import DeltaForm
from medmoe_edge.config import ModelConfig
from medmoe_edge.export.decoder import ACTIVATIONS, EXPERT_WEIGHTS

if TYPE_CHECKING:  # targets are made of bundles where neither PyTorch is nor safetensors
    from torch import Tensor

    from medmoe_edge.checkpoint.reader import Checkpoint

CHUNK_BYTES = 2**26  # of fp32 rows in memory at a time
FLOOR = 0.01  # of the mean importance, for inputs that calibration hardly saw
LEAST = 1e-30  # of a squared singular value


@dataclass(frozen=True)
class Factors:
    """What a tensor is multiplied with: its first axis by `rows`, its last by `columns`."""

    rows: Floats | None = None
    columns: Floats | None = None


class MatrixTensor(ir.LazyTensor):
    """A matrix as MatMul reads it, `[in, out]`, that can also be had row by row of `[out, in]`."""

    def __init__(self, name: str, source: "WeightSource") -> None:
        self.source = source
        shape = ir.Shape(source.checkpoint.names[name].shape[::-1])
        super().__init__(self._whole, ir.DataType.FLOAT, shape=shape, name=name)

    def rows(self) -> Iterator[Floats]:
        """Blocks `[n, in]` of output channels, in order."""
        return self.source.rows(there(self.name))

    def _whole(self) -> ir.TensorProtocol:
        matrix = self.source.array(there(self.name))
        return ir.tensor(np.ascontiguousarray(matrix.T), name=self.name)


class WeightSource:
    """The parameters of a checkpoint in fp32, times the factors that calibration folds in."""

    def __init__(self, checkpoint: "Checkpoint", factors: Mapping[str, Factors] | None = None):
        self.checkpoint = checkpoint
        self.factors = factors or {}

    def names_under(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, without it."""
        names = self.checkpoint.names
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def tensor(self, name: str) -> ir.LazyTensor:
        """One parameter, read only when its values are needed; matrices transposed."""
        if len(self.checkpoint.names[name].shape) == 2:
            return MatrixTensor(name, self)
        return self.untransposed(name)

    def untransposed(self, name: str) -> ir.LazyTensor:
        """One parameter in the checkpoint's own layout, read only when its values are needed."""
        shape = ir.Shape(self.checkpoint.names[name].shape)
        return ir.LazyTensor(partial(self._read, name), ir.DataType.FLOAT, shape=shape, name=name)

    def array(self, name: str) -> Floats:
        """One parameter in the checkpoint's own layout; raises `CheckpointError`."""
        return self._finished(name, self.checkpoint.tensor(name), slice(None))

    def rows(self, name: str) -> Iterator[Floats]:
        """A matrix in blocks of its rows, each as `array` would give it."""
        rows, width = self.checkpoint.names[name].shape
        step = max(CHUNK_BYTES // (4 * width), 1)
        if rows <= step:
            yield self.array(name)
            return
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            yield self._finished(name, self.checkpoint.rows(name, block.start, block.stop), block)

    def _finished(self, name: str, tensor: "Tensor", block: slice) -> Floats:
        from torch import float32

        from medmoe_edge.calibration.collect import check_finite

        check_finite(tensor, name)
        array: Floats = tensor.to(float32, copy=True).numpy()
        factors = self.factors.get(name, Factors())
        if factors.rows is not None:
            array *= factors.rows[block].reshape(-1, *[1] * (array.ndim - 1))
        if factors.columns is not None:
            array *= factors.columns
        return array

    def _read(self, name: str) -> ir.TensorProtocol:
        return ir.tensor(self.array(name), name=name)


Importance = Callable[[str], Floats | None]


def delta_tensors(
    expert: ir.TensorProtocol, meta: ir.TensorProtocol, form: DeltaForm, importance: Importance
) -> list[ir.LazyTensor]:
    """What an expert's matrix `[K, N]` adds to the meta expert's, computed when it is written.

    Either `NAME.delta`, or of a smaller rank `NAME.delta.a` `[K, R]` and `NAME.delta.b` `[R, N]`.
    """
    name = str(expert.name)
    stem = name.removesuffix(".weight")
    width, channels = (int(size) for size in expert.shape.numpy())

    def lazy(ending: str, make: Callable[[], Floats], shape: list[int]) -> ir.LazyTensor:
        own = f"{stem}{DELTA}{ending}"

        def tensor() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(make()), name=own)

        return ir.LazyTensor(tensor, ir.DataType.FLOAT, shape=ir.Shape(shape), name=own)

    def whole() -> Floats:
        added: Floats = expert.numpy() - meta.numpy()
        return added

    if form.rank is None or form.rank >= min(width, channels):
        return [lazy("", whole, [width, channels])]
    pending: list[Floats] = []  # b, from when a is written until it is itself

    def first() -> Floats:
        a, b = low_rank(whole(), form.rank or 0, importance(name))
        pending[:] = [b]
        return a

    def second() -> Floats:
        if not pending:
            first()
        return pending.pop()

    return [
        lazy(".a", first, [width, form.rank]),
        lazy(".b", second, [form.rank, channels]),
    ]


def low_rank(matrix: Floats, rank: int, importance: Floats | None) -> tuple[Floats, Floats]:
    """Factors `[K, R]` and `[R, N]` whose product is nearest to a matrix `[K, N]`.

    Nearest in the outputs for inputs whose mean squares are `importance` `[K]`, taken as
    uncorrelated; None: all alike. The factors share the singular values evenly, so that neither
    is harder to round. Source: Eckart & Young, Psychometrika 1 (1936), on diag(sqrt(importance)) D.
    """
    scale = np.ones(len(matrix), np.float64)
    if importance is not None:
        mean = float(importance.mean(dtype=np.float64)) or 1.0
        scale = np.sqrt(importance / mean + FLOOR)
    weighted = scale[:, None] * matrix
    narrow = len(matrix) <= matrix.shape[1]
    gram = weighted @ weighted.T if narrow else weighted.T @ weighted
    values, vectors = np.linalg.eigh(gram)  # rising
    chosen = vectors[:, : -rank - 1 : -1]
    root = np.sqrt(np.sqrt(np.maximum(values[: -rank - 1 : -1], LEAST)))  # of singular values
    if narrow:  # weighted = U S V^T, chosen is U
        a, b = chosen * root, (chosen.T @ weighted) / root[:, None]
    else:
        a, b = (weighted @ chosen) / root, chosen.T * root[:, None]
    return (a / scale[:, None]).astype(np.float32), b.astype(np.float32)


@dataclass(frozen=True)
class FoldPoint:
    """One activation: the `inputs` that it is, what makes it and what reads it.

    `producers` are parameters whose rows (or values, of a bias) are its channels, `consumers`
    matrices whose columns are.
    """

    inputs: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]

    @property
    def quantised(self) -> list[str]:
        """The consumers that quantisation rounds: all but routers and coefficients."""
        from medmoe_edge.calibration.statistics import input_of

        return [name for name in self.consumers if input_of(name) is not None]


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
    from medmoe_edge.calibration.statistics import input_of

    inputs = dict.fromkeys(filter(None, map(input_of, consumers)))
    return FoldPoint(tuple(inputs), tuple(f"{norm}.{part}" for part in parts), consumers)


def _feed_forwards(config: ModelConfig, layer: int) -> list[str]:
    """The owners of feed-forward matrices: the experts and the meta expert, or the dense layer."""
    own = f"decoder.layers.{layer}.ffn."
    if config.moe is None or layer not in config.moe.layers:
        return [own]
    if config.moe.merged:
        return [f"{own}merged."]
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
