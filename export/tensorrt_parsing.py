"""An ONNX file into a TensorRT network; what TensorRT does not take is named as we name it."""

from collections import deque
from pathlib import Path
from typing import Any

import onnx

from medmoe_edge.errors import ModelError
from medmoe_edge.export.tensorrt_library import reason

PARTS = (".weight", ".bias", ".scale")
MAKES_FLOATS = ("DequantizeLinear", "Cast", "Transpose")


def parse(trt: Any, network: Any, log: Any, graph: Path, title: str) -> Any:
    """Read `graph` into `network`, weights mapped; keep the parser returned as long as the network.

    Raises `ModelError`, which names the ONNX op, its node and our layer.
    """
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise _refusal(parser, onnx.load(graph, load_external_data=False), title)
    return parser


def _refusal(parser: Any, model: onnx.ModelProto, title: str) -> ModelError:
    error = parser.get_error(0)
    node = _node(model, error)
    where = "the graph"
    if node is not None:
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        layer = layer_of(model, node)
        where = f"the op {op} of node {node.name!r}" + (f" at {layer}" if layer else "")
    return ModelError(
        f"{title} does not take {where}: {reason(error.desc())}.",
        "Choose another precision, or the target onnxruntime-cuda.",
    )


def _node(model: onnx.ModelProto, error: Any) -> onnx.NodeProto | None:
    nodes = list(model.graph.node)
    named = [node for node in nodes if node.name and node.name == error.node_name()]
    at = error.node()
    return named[0] if named else nodes[at] if 0 <= at < len(nodes) else None


def layer_of(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """The nearest weight that a node reads, without `.weight`; empty where it reads none.

    Weights reach a node through what makes floats of integers, which counts as no distance.
    """
    weights = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith(PARTS)}
    makers = {name: maker for maker in model.graph.node for name in maker.output}
    names: deque[str] = deque(node.input)
    seen = set(names)
    while names:
        name = names.popleft()
        if name in weights:
            return name.removesuffix(".scale").rpartition(".")[0]
        if name in makers:
            further = [one for one in makers[name].input if one not in seen]
            seen.update(further)
            if makers[name].op_type in MAKES_FLOATS:
                names.extendleft(reversed(further))
            else:
                names.extend(further)
    return ""
