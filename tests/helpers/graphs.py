"""For the tests of export: models of one `medmoe::MoE` node, how to run a graph, statistics."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from medmoe_edge.calibration.collect import Observer
from medmoe_edge.calibration.coverage import ExpertCoverage
from medmoe_edge.calibration.quantisers import Format
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.calibration.statistics import Source, Statistics, input_of
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint, write_checkpoint
from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.export.builder import IR_VERSION, MEDMOE, OPSET, Builder, floats
from medmoe_edge.export.decoder import MoESpec, moe_function
from medmoe_edge.models.decoder import MoE, PhiFeedForward, StableLmFeedForward
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.base import Runtime, Step
from medmoe_edge.runtimes.torch.eager import EagerRuntime

Floats = npt.NDArray[np.float32]
UNLIKE_FORMATS = {  # of one expert, as a mixed export may choose them; see `unlike_bundle`
    "decoder.layers.0.ffn.experts.1.gate.weight": Format(2, 32),
    "decoder.layers.0.ffn.experts.1.up.weight": Format(8, 32),
    "decoder.layers.0.ffn.experts.1.down.weight": Format(4, 64),
}
FEED_FORWARD: dict[str, type[nn.Module]] = {
    "phi": PhiFeedForward,
    "stablelm": StableLmFeedForward,
}

STRUCTURES: list[tuple[str, dict[str, Any]]] = [
    ("stablelm", {"top_k": 1}),
    ("stablelm", {"top_k": 2, "use_residual": True}),
    ("phi", {"top_k": 2, "router_bias": False}),
    ("phi", {"top_k": 1, "meta_expert": False}),
]
PAGED: list[tuple[str, str, dict[str, Any]]] = [
    ("int8", "tiny", {}),
    ("int4", "tiny", {"top_k": 2, "use_residual": True}),
    ("int8", "tiny-phi", {"top_k": 2}),
    ("int4", "tiny-phi", {"meta_expert": False, "router_bias": False}),
    ("fp32", "tiny-phi", {}),
]


def relative(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """The largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def moe_config(kind: str = "stablelm", size: int = 16, hidden: int = 24, **moe: Any) -> ModelConfig:
    base = PRESETS["tiny-phi" if kind == "phi" else "tiny"]
    decoder = replace(base.decoder, hidden_size=size, heads=1, intermediate_size=hidden)
    return replace(base, decoder=decoder, moe=MoEConfig(layers=(0,), **moe))


def moe_layer(config: ModelConfig, seed: int = 0) -> MoE:
    """The torch layer, with weights large enough that every expert is chosen by some token."""
    assert config.moe is not None
    decoder = config.decoder
    torch.manual_seed(seed)
    moe = MoE(config.moe, decoder.hidden_size, lambda: FEED_FORWARD[decoder.kind](decoder))
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    return moe.eval()


def moe_model(moe: MoE, config: ModelConfig) -> ir.Model:
    """`x` to `y` through one `medmoe::MoE` with the layer's weights."""
    spec = MoESpec.of(config)
    x, y = (floats(name, "B", "S", config.decoder.hidden_size) for name in "xy")
    weights = []
    for name in spec.weight_names:
        array = moe.state_dict()[name].numpy()
        array = np.ascontiguousarray(array.T if array.ndim == 2 else array)
        weights.append(initializer(f"decoder.layers.0.ffn.{name}", array))
    build = Builder()
    value = build.op("MoE", x, *weights, domain=MEDMOE, **spec.attributes)
    value.name, value.type, value.shape = y.name, y.type, y.shape
    return model([x], [value], build, weights, [moe_function(spec)])


def product_model(array: Floats, name: str = "w") -> ir.Model:
    """`x` `[1, S, K]` times the matrix `[K, N]` is `y`."""
    build, x, w = Builder(), floats("x", 1, "S", array.shape[0]), initializer(name, array)
    return model([x], [named("y", build.op("MatMul", x, w))], build, [w])


def named(name: str, value: ir.Value) -> ir.Value:
    """A float value under a name, so that it can be an output."""
    value.name, value.dtype = name, ir.DataType.FLOAT
    return value


def model(
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    build: Builder,
    weights: list[ir.Value],
    functions: list[ir.Function] | None = None,
) -> ir.Model:
    imports = {"": OPSET, MEDMOE: 1} if functions else {"": OPSET}
    graph = ir.Graph(
        inputs, outputs, nodes=build.nodes, initializers=weights, opset_imports=imports, name="test"
    )
    return ir.Model(graph, ir_version=IR_VERSION, functions=functions or [])


def initializer(name: str, array: npt.NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )


def random_tokens(batch: int, length: int, size: int, seed: int = 1) -> Floats:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((batch, length, size)).astype(np.float32)


def run_ort(graph: ir.Model, **feeds: npt.NDArray[Any]) -> Floats:
    """The first output, from ONNX Runtime."""
    return np.asarray(run_all(graph, **feeds)[0], np.float32)


def run_all(graph: ir.Model, **feeds: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """All outputs, from ONNX Runtime."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    content = ir.to_proto(graph).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def op_types(graph: ir.Model) -> Counter[str]:
    """How often each op occurs, branches included."""
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(graph.graph))


def constant(graph: ir.Model, name: str) -> npt.NDArray[Any]:
    """The values of an initializer."""
    tensor = graph.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def changed(
    checkpoint: Path, folder: Path, change: Callable[[str, Tensor], Tensor], **decoder: Any
) -> Path:
    """A copy of a checkpoint with its tensors, and maybe settings of the decoder, changed."""
    source = read_checkpoint(checkpoint)
    config = replace(source.config, decoder=replace(source.config.decoder, **decoder))
    tensors = ((name, change(name, tensor)) for name, tensor in source)
    write_checkpoint(folder, config, tensors, tokenizer_file=source.tokenizer_file)
    return folder


@torch.inference_mode()
def observed(
    checkpoint: Checkpoint, *, hessians: bool = True, data_free: Sequence[tuple[int, int]] = ()
) -> Statistics:
    """Statistics of random embeddings, all experts (layer, index) covered but the `data_free`."""
    model = EagerRuntime(checkpoint).model
    x = torch.from_numpy(normal(4, 100, checkpoint.config.decoder.hidden_size, seed=5))
    with Observer(model, input_of, hessians=hessians) as observer:
        model.head(model(x).hidden)
    coverage = tuple(
        ExpertCoverage(layer, expert, 0, 256, None, status="data-free")
        for layer, expert in data_free
    )
    return Statistics(
        checkpoint.sha256(),
        Source("random", "ab" * 32),
        RoutingProfile.empty([], [], 0),
        coverage,
        observer.statistics,
    )


def structure(graph: Path) -> list[str]:
    """What an ONNX file computes and which weights it holds, a line each, without their values.

    Nodes in order with their inputs, outputs and attributes, those of branches indented; then
    weights by name, type and shape.
    """
    proto = onnx.load(graph, load_external_data=False)
    imports = sorted((entry.domain, entry.version) for entry in proto.opset_import)
    return [str(imports), *_nodes(proto.graph, "")]


def _nodes(graph: onnx.GraphProto, indent: str) -> Iterator[str]:
    for node in graph.node:
        plain = {
            attribute.name: str(onnx.helper.get_attribute_value(attribute))
            for attribute in node.attribute
            if not attribute.g.node
        }
        parts = [node.domain, node.op_type, list(node.input), list(node.output)]
        yield indent + " ".join(map(str, [*parts, sorted(plain.items())]))
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            if attribute.g.node:
                yield f"{indent}{attribute.name}"
                yield from _nodes(attribute.g, f"{indent}  ")
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        yield f"{indent}{tensor.name} {tensor.data_type} {list(tensor.dims)}"
    for kind, values in (("reads", graph.input), ("makes", graph.output)):
        yield f"{indent}{kind} {[value.name for value in values]}"


def in_steps(runtime: Runtime, lengths: Sequence[int]) -> list[Step]:
    """What a runtime makes of random embeddings that come in steps of these lengths."""
    embeds = normal(sum(lengths), runtime.config.decoder.hidden_size, seed=3)
    cache, steps = runtime.new_cache(sum(lengths)), []
    for length in lengths:
        steps.append(runtime.step(embeds[cache.length : cache.length + length], cache))
    assert cache.length == sum(lengths)
    return steps
