"""For the tests of TensorRT: a decoder of one attention layer and two experts, as small as can be.

    keys = x, values = x / 2, written at position start + i of the cache
    h_i = x_i + attention of x_i over the keys and values up to position start + i
    logits = h_last W_0 + the chosen expert's h_last W_e,   router_logits = x R

The matrices are integers behind DequantizeLinear. `reference` computes the same with NumPy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medmoe_edge.export.builder import Builder, floats, initializer, save_model
from medmoe_edge.export.tensorrt_builder import Profile

Floats = npt.NDArray[np.float32]
OPSET, IR_VERSION = 24, 11  # of TensorScatter
OWNERS = ("decoder.head", "decoder.layers.0.ffn.experts.0", "decoder.layers.0.ffn.experts.1")


@dataclass(frozen=True)
class Sizes:
    """Hidden size, vocabulary, positions of the cache, tokens of a step at most."""

    hidden: int = 32
    vocabulary: int = 64
    capacity: int = 24
    prefill: int = 8

    @property
    def profiles(self) -> list[Profile]:
        """Prefill and decode."""
        one, most = (1, 1, self.hidden), (1, self.prefill, self.hidden)
        return [{"embeds": (one, most, most)}, {"embeds": (one, one, one)}]


class Decoder:
    """The weights, and the two ways to compute with them."""

    def __init__(self, sizes: Sizes | None = None) -> None:
        self.sizes = sizes or Sizes()
        random = np.random.default_rng(0)
        shape = (self.sizes.hidden, self.sizes.vocabulary)
        self.integers = [random.integers(-127, 128, shape).astype(np.int8) for _ in OWNERS]
        self.scales = [random.uniform(1e-3, 2e-3, shape[1]).astype(np.float32) for _ in OWNERS]
        self.router = random.standard_normal((shape[0], 2)).astype(np.float32)

    def reference(self, x: Floats) -> tuple[Floats, Floats]:
        """All tokens so far `[T, D]` to the last one's logits `[V]`, and `router_logits`."""
        scores = x @ x[-1] / np.sqrt(x.shape[1])
        shares = np.exp(scores - scores.max())
        h = x[-1] + shares / shares.sum() @ x / 2
        routing = x @ self.router
        matrices = [i * s for i, s in zip(self.integers, self.scales, strict=True)]
        return h @ (matrices[0] + matrices[1 + int(routing[-1].argmax())]), routing[:, None]

    def write(self, folder: Path, activation: ir.DataType = ir.DataType.FLOAT16) -> Path:
        """`decoder.onnx` with its weights beside it, computing in `activation`."""
        save_model(_Graph(self, activation).model(), folder, "decoder")
        return folder / "decoder.onnx"


class _Graph:
    def __init__(self, decoder: Decoder, activation: ir.DataType) -> None:
        self.decoder, self.activation = decoder, activation
        self.build = Builder()
        self.weights: list[ir.Value] = []

    def model(self) -> ir.Model:
        build, sizes = self.build, self.decoder.sizes
        embeds = floats("embeds", 1, "S", sizes.hidden)
        start = ir.val("start", ir.DataType.INT64, [1])
        past = [
            ir.val(f"past_{kind}.0", self.activation, [1, 1, sizes.capacity, sizes.hidden])
            for kind in ("key", "value")
        ]
        x = self._cast(embeds)  # [1, S, D]
        h, present = self._attention(x, start, past)
        logits, routing = self._product(self._last(h), 0), self._routing(embeds)
        chosen = build.op("ArgMax", self._last(routing), axis=-1)  # [1, 1]
        for expert in (0, 1):
            share = self._cast(build.op("Equal", chosen, build.constant(expert)))
            routed = build.op("Mul", self._product(self._last(h), 1 + expert), share)
            logits = build.op("Add", logits, routed)
        outputs = [
            _named(build.op("Cast", logits, to=int(ir.DataType.FLOAT)), "logits"),
            _named(build.op("Unsqueeze", routing, build.constant([2])), "router_logits"),
        ]
        outputs[0].shape = ir.Shape([1, sizes.vocabulary])
        outputs[1].shape = ir.Shape([1, "S", 1, 2])
        graph = ir.Graph(
            [embeds, start, *past],
            [*outputs, *present],
            nodes=build.nodes,
            initializers=self.weights,
            opset_imports={"": OPSET},
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION)

    def _attention(
        self, x: ir.Value, start: ir.Value, past: list[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        build, one = self.build, self.build.constant([1])
        query = build.op("Unsqueeze", x, one)  # [1, 1, S, D]
        half = build.op("Mul", query, self._cast(build.constant(0.5, np.float32)))
        present = []
        for cache, new in zip(past, (query, half), strict=True):
            value = build.op("TensorScatter", cache, new, start, axis=-2, mode="linear")
            value.name = str(cache.name).replace("past", "present")
            value.type, value.shape = cache.type, cache.shape
            present.append(value)
        length = build.op("Gather", build.op("Shape", x), build.constant(1))
        steps = build.op("Range", build.constant(0), length, build.constant(1))
        position = build.op("Unsqueeze", build.op("Add", steps, start), one)  # [S, 1]
        columns = build.constant(np.arange(self.decoder.sizes.capacity))
        visible = build.op("LessOrEqual", columns, position)  # [S, C]
        scale = self._cast(build.constant(self.decoder.sizes.hidden**-0.5, np.float32))
        keys = build.op("Transpose", present[0], perm=[0, 1, 3, 2])
        scores = build.op("Mul", build.op("MatMul", query, keys), scale)  # [1, 1, S, C]
        hidden = self._cast(build.constant(-6e4, np.float32))
        shares = build.op("Softmax", build.op("Where", visible, scores, hidden), axis=-1)
        mixed = build.op("Squeeze", build.op("MatMul", shares, present[1]), one)
        return build.op("Add", x, mixed), present

    def _routing(self, embeds: ir.Value) -> ir.Value:
        weight = self._stored("decoder.layers.0.ffn.router.weight", self.decoder.router)
        return self.build.op("MatMul", embeds, weight)  # [1, S, E]

    def _product(self, h: ir.Value, owner: int) -> ir.Value:
        name = f"{OWNERS[owner]}.weight"
        integers = self._stored(name, self.decoder.integers[owner])
        scale = self._cast(self._stored(f"{name}.scale", self.decoder.scales[owner]))
        return self.build.op(
            "MatMul", h, self.build.op("DequantizeLinear", integers, scale, axis=1)
        )

    def _last(self, value: ir.Value) -> ir.Value:
        return self.build.op("Gather", value, self.build.constant(-1), axis=1)

    def _cast(self, value: ir.Value) -> ir.Value:
        return self.build.op("Cast", value, to=int(self.activation))

    def _stored(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        self.weights.append(initializer(ir.tensor(array, name=name)))
        return self.weights[-1]


def _named(value: ir.Value, name: str) -> ir.Value:
    value.name, value.dtype = name, ir.DataType.FLOAT
    return value
