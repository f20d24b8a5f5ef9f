"""One routed expert as a graph of its own, for ONNX Runtime on a CPU.

    tokens [n, D], share [n, 1]  ->  part [n, D], the share of each token times the expert of it

The weights are external, in a file `expert.data` that exists nowhere: their offsets count from the
start of the expert's extent in `decoder.data`, and the runtime hands over the arrays that it read.
So all experts of one shape and format share a graph, whatever their number.
"""

import hashlib
from pathlib import Path
from typing import Any

import onnx_ir as ir

from medmoe_edge.export.builder import (
    IR_VERSION,
    Builder,
    floats,
    initializer,
    tensor_of,
)
from medmoe_edge.export.dequantise import insert_dequantise
from medmoe_edge.export.external_data import Extents
from medmoe_edge.export.moe_op import EXPERT_WEIGHTS, feed_forward
from medmoe_edge.export.passes.ort_attention import ORT_OPSET
from medmoe_edge.export.passes.ort_matmul import lower_matmul
from medmoe_edge.export.stored import StoredWeights

WEIGHTS = "expert.data"
PER_GROUP = 3 * 4  # bytes, see `loaded_bytes`
CHUNK = 1 << 20


def write_experts(
    folder: Path, stored: StoredWeights, extents: Extents, activation: str
) -> dict[str, dict[str, Any]]:
    """Write `expert.N.onnx`, one for each shape and format; what the manifest says of the experts.

    That is, of each of the `graphs`, its weights by name: `type`, `shape` and `offset` in the
    extent; and of each of the `experts` its `graph`, the `sha256` of its extent and the `bytes` it
    takes when it is loaded.
    """
    written: dict[bytes, str] = {}
    graphs: dict[str, dict[str, Any]] = {}
    experts: dict[str, dict[str, Any]] = {}
    for owner, (offset, size) in extents.items():
        if ".experts." not in owner:
            continue
        model = expert_model(stored, owner, activation)
        loaded = loaded_bytes(model)
        _place_weights(model, stored, owner, offset)
        content = ir.to_proto(model).SerializeToString(deterministic=True)
        if content not in written:
            name = written[content] = f"expert.{len(written)}.onnx"
            graphs[name] = _layout(model)
            (folder / name).write_bytes(content)
        experts[owner] = {
            "graph": written[content],
            "sha256": _sha256(folder / "decoder.data", offset, size),
            "bytes": loaded,
        }
    return {"graphs": graphs, "experts": experts}


def expert_model(stored: StoredWeights, owner: str, activation: str) -> ir.Model:
    """The graph of the expert that owns the weights `owner.*`."""
    names = [f"{owner}.{part}" for part in EXPERT_WEIGHTS[activation]]
    weights = {name: initializer(stored.tensor(name)) for name in names}
    width = stored.tensor(names[0]).shape[0]
    assert isinstance(width, int)
    build = Builder()
    tokens, share = floats("tokens", "n", width), floats("share", "n", 1)
    expert = feed_forward(build, tokens, weights, f"{owner}.", activation)
    part = build.op("Mul", expert, share)
    part.name, part.dtype, part.shape = "part", ir.DataType.FLOAT, ir.Shape(["n", width])
    graph = ir.Graph(
        [tokens, share],
        [part],
        nodes=build.nodes,
        initializers=list(weights.values()),
        opset_imports={"": ORT_OPSET},
        name="expert",
    )
    for name, value in weights.items():
        if (found := stored.quantised(name)) is not None:
            insert_dequantise(graph, value, *found)
    model = ir.Model(graph, ir_version=IR_VERSION)
    lower_matmul(model)
    return model


def loaded_bytes(model: ir.Model) -> int:
    """What an expert takes in ONNX Runtime's memory once its weights are packed.

    fp32 and int8 matrices take what they take on disk. `MatMulNBits` keeps, beside its integers,
    three fp32 values for each group: the scale as the graph casts it, and in the packed form the
    scale and the sum of the group. Measured on x86 with 1.31: 30 MB for 19.5 MB of an expert in
    groups of 32, 35 MB for 34.7 in int8.
    """
    total = 0
    for node in model.graph:
        weights = [value for value in node.inputs if value is not None and value.const_value]
        if node.op_type == "Cast":  # of scales: counted where they are used
            total += PER_GROUP * tensor_of(weights[0]).size
        else:
            total += sum(tensor_of(value).nbytes for value in weights)
    return total


def _place_weights(model: ir.Model, stored: StoredWeights, owner: str, start: int) -> None:
    """Weights by names and offsets that are the same for every expert; short ones by value."""
    values = list(model.graph.initializers.values())
    for value in values:
        name = str(value.name)
        tensor = stored.tensors[name]
        assert tensor_of(value).nbytes == tensor.nbytes
        own = name.removeprefix(f"{owner}.")
        if isinstance(tensor, ir.ExternalTensor):
            assert tensor.offset is not None
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                tensor.offset - start,
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=own,
            )
        else:
            value.const_value = ir.tensor(tensor.numpy(), name=own)
        value.name = own


def _layout(model: ir.Model) -> dict[str, Any]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {
        str(tensor.name): {
            "type": tensor.dtype.numpy().name,
            "shape": list(tensor.shape.numpy()),
            "offset": tensor.offset,
        }
        for tensor in tensors
        if isinstance(tensor, ir.ExternalTensor)
    }


def _sha256(path: Path, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while size:
            part = file.read(min(size, CHUNK))
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()
