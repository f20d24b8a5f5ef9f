"""A PyTorch module as a graph, through PyTorch's own exporter, its weights filled in afterwards."""

import logging
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn

from medmoe_edge.export.builder import initializer
from medmoe_edge.export.passes.ort_attention import ORT_OPSET


class Weights(Protocol):
    """Named parameters as lazy tensors."""

    def tensor(self, name: str) -> ir.TensorProtocol:
        """One parameter; matrices transposed, `[in, out]`."""

    def untransposed(self, name: str) -> ir.TensorProtocol:
        """One parameter as it is."""


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic_shapes: list[dict[int, Any]] | None = None,
) -> ir.Model:
    """The module's graph for inputs such as these, as the exporter gives it.

    `dynamic_shapes` names the axes of each input that vary.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, we do not
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not ours to fix
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=ORT_OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def optimise(model: ir.Model, names: Container[str]) -> list[ir.Value]:
    """Simplify the graph and clear what tells of this machine; returns its weights.

    Those are the initializers of these `names`, now without a tensor and no part of the graph until
    `fill` puts them back: so optimising neither reads nor copies them.
    """
    graph = model.graph
    weights = [value for name, value in graph.initializers.items() if name in names]
    for value in weights:
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    optimize_ir(model)
    for value in weights:
        graph.inputs.remove(value)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with this machine's paths
    return weights


def fill(graph: ir.Graph, value: ir.Value, weights: Weights) -> None:
    """Give a weight its tensor; matrices, which the exporter transposes, as MatMul reads them."""
    users = [usage.node for usage in value.uses()]
    transposed = bool(users) and all(
        node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
        for node in users
    )
    name = str(value.name)
    if not transposed:
        value.const_value = weights.untransposed(name)
        graph.register_initializer(value)
        return
    stored = initializer(weights.tensor(name))
    for node in users:
        node.outputs[0].replace_all_uses_with(stored)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    value.name = None
    graph.register_initializer(stored)
