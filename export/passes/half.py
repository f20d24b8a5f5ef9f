"""Pass: large weights stored in fp16 behind `Cast`; the arithmetic stays fp32.

For what is small beside the decoder and costs most when it errs: the vision tower. In int8 per
channel nano's image tokens are off by 1 to 2% of their length, and on pictures unlike those it was
trained on that alone sends one token in a hundred to another expert; in fp16 it is nothing.
"""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import initializer, tensor_of

SMALL = 256  # weights: below, they stay as they are


def halve_weights(model: ir.Model) -> tuple[ir.Model, bool]:
    """Store the graph's large fp32 weights in fp16, lazily; returns `(model, modified)`."""
    chosen = [
        value
        for value in model.graph.initializers.values()
        if value.dtype == ir.DataType.FLOAT and tensor_of(value).size >= SMALL
    ]
    for value in chosen:
        source, name = tensor_of(value), str(value.name)
        stored = initializer(
            ir.LazyTensor(
                partial(_half, source, name),
                ir.DataType.FLOAT16,
                shape=ir.Shape(source.shape.numpy()),
                name=name,
            )
        )
        del model.graph.initializers[name]
        model.graph.register_initializer(stored)
        cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name = f"{name}.float"
        model.graph.insert_before(model.graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
    return model, bool(chosen)


def to_half(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.float16]:
    """The array in fp16; raises `CheckpointError` where that cannot hold its values."""
    with np.errstate(over="ignore"):  # seen in the next line
        stored = array.astype(np.float16)
    if not np.isfinite(stored).all():
        raise CheckpointError(
            f"The tensor {name} holds values that fp16 cannot.",
            "Its training diverged: use an earlier checkpoint, or export with --fp32.",
        )
    return stored


def _half(source: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.tensor(to_half(source.numpy(), name), name=name)
