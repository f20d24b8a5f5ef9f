"""One routed expert as a graph of its own, for ONNX Runtime on a CPU.

    tokens [n, D], share [n, 1]  ->  part [n, D], the share of each token times the expert of it

The weights are external, in a file `expert.data` that exists nowhere: their offsets count from the
start of the expert's extent in `decoder.data`, and the runtime hands over the arrays that it read.
So all experts of one shape and format share a graph, whatever their number.

An expert that is stored as what it adds to the meta expert reads that one's first products too, and
gives what it adds to its hidden layer besides: the meta expert stays in memory, with the segments.

    tokens [n, D], share [n, 1], gate and up (or fc1) [n, F]  ->  part [n, D], hidden [n, F]

The decoder cut at its experts, for a runtime that pages them in by itself.

Written beside a bundle's `decoder.onnx`, over the same `decoder.data`, so that they cost a few
kilobytes each and no second copy of any weight:

    segment.0.onnx   embeddings -> tokens.0 [1, S, D], gates.0 and chosen.0 [S, K] of the first
                     layer with experts, and whatever later segments read
    segment.1.onnx   routed.0 [1, S, D], the chosen experts' sum -> ... tokens.1, gates.1, chosen.1
    ...
    segment.M.onnx   ... -> logits and router_logits, as of `decoder.onnx`

A segment reads and writes values of the same names, and the KV cache of its own layers. All but the
routed experts is in them, the meta experts too: what runs before a routed sum is known comes as
early as it can. Of experts as deltas a segment gives gate.n and up.n (or fc1.n) [S, F] too and
hidden.n [S, F], and the next takes mixed.n, which is that with the experts' added. The experts'
graphs are described above.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from medmoe_edge._types import there
from medmoe_edge.config import ModelConfig
from medmoe_edge.export.builder import (
    IR_VERSION,
    MEDMOE,
    Builder,
    Extents,
    drop_function,
    floats,
    initializer,
    tensor_of,
)
from medmoe_edge.export.decoder import (
    EXPERT_WEIGHTS,
    MATRICES,
    MoESpec,
    Weights,
    add_meta,
    feed_forward,
    route_tokens,
)
from medmoe_edge.export.passes.ort_cpu import (
    ORT_OPSET,
    delta_base,
    delta_output,
    delta_part,
    fuse_qkv,
    lower_attention,
    lower_matmul,
)
from medmoe_edge.export.quantise import insert_dequantise
from medmoe_edge.export.stored import StoredWeights, placed, specify

WEIGHTS = "expert.data"
PER_GROUP = 3 * 4  # bytes, see `loaded_bytes`


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
        _place_expert(model, stored, owner, offset)
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
    parts = [f"{owner}.{part}" for part in EXPERT_WEIGHTS[activation]]
    names = [name for part in parts for name in sorted(stored.deltas.get(part, [part]))]
    weights = {name: initializer(stored.tensor(name)) for name in names}
    *first, last = MATRICES[activation]
    hidden, width = stored.tensor(f"{owner}.{last}.weight").shape.numpy()
    build = Builder()
    inputs = [floats("tokens", "n", width), floats("share", "n", 1)]
    outputs = {}
    if stored.deltas:
        inputs += [floats(name, "n", hidden) for name in first]
        outputs["hidden"], part = delta_part(build, inputs, weights, f"{owner}.", activation)
    else:
        expert = feed_forward(build, inputs[0], weights, f"{owner}.", activation)
        part = build.op("Mul", expert, inputs[1])
    outputs["part"] = part
    for name, value in outputs.items():
        size = width if name == "part" else hidden
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(["n", size])
    graph = ir.Graph(
        inputs,
        list(outputs.values()),
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


def _place_expert(model: ir.Model, stored: StoredWeights, owner: str, start: int) -> None:
    """Weights by names and offsets that are the same for every expert; short ones by value."""
    for value in list(model.graph.initializers.values()):
        name = str(value.name)
        tensor = stored.tensors[name]
        assert tensor_of(value).nbytes == tensor.nbytes
        own = name.removeprefix(f"{owner}.")
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = placed(tensor, WEIGHTS, start)
        else:
            value.const_value = ir.tensor(tensor.numpy(), name=own)
        value.name = own


def _layout(model: ir.Model) -> dict[str, Any]:
    return {
        str(tensor.name): {
            "type": tensor.dtype.numpy().name,
            "shape": list(tensor.shape.numpy()),
            "offset": tensor.offset,
        }
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }


def _sha256(path: Path, offset: int, size: int) -> str:
    return hashlib.sha256(np.memmap(path, np.uint8, "r", offset, (size,)).data).hexdigest()


RETURNED = ("routed", "mixed")  # by the experts of a layer
INPUT = -1  # the stage of what is there before any node runs


def write_paged_graphs(folder: Path, config: ModelConfig, extents: Extents) -> dict[str, Any]:
    """Write the segments and the experts' graphs beside the lowered decoder of `folder`.

    Returns the manifest's `paging`: how many `segments`, and what `write_experts` says.
    """
    stored = StoredWeights(folder / "decoder.onnx")
    model = specify(config, stored)
    lower_attention(model)
    fuse_qkv(model)
    cut_experts(model, MoESpec.of(config), deltas=bool(stored.deltas))
    lower_matmul(model)
    NameFixPass()(model)
    segments = list(split(model))
    for index, segment in enumerate(segments):
        _place_weights(segment, stored.stored)
        ir.save(segment, folder / f"segment.{index}.onnx")
    about = write_experts(folder, stored, extents, MoESpec.of(config).activation)
    return {"segments": len(segments), **about}


def cut_experts(model: ir.Model, spec: MoESpec, *, deltas: bool) -> tuple[ir.Model, bool]:
    """Leave out the routed experts of every `medmoe::MoE`; returns `(model, modified)`.

    Of the n-th, `tokens.n`, `gates.n` and `chosen.n` become outputs, `routed.n` an input; of
    `deltas` also the meta expert's products `gate.n`, `up.n` (or `fc1.n`) and `hidden.n`, which
    comes back as `mixed.n`.
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == MEDMOE and node.op_type == "MoE"]
    for index, node in enumerate(nodes):
        build = Builder()
        x, old = there(node.inputs[0]), node.outputs[0]
        weights = {
            name: value
            for name, value in zip(spec.weight_names, node.inputs[1:], strict=True)
            if value is not None
        }
        around = _around_deltas if deltas else _around_experts
        named, returned, new = around(build, x, weights, spec, index)
        for name, (value, dtype, shape) in named.items():
            value.name, value.dtype, value.shape = f"{name}.{index}", dtype, shape
            graph.outputs.append(value)
        graph.inputs.extend(returned)
        graph.insert_before(node, build.nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    if nodes:
        drop_function(model, "MoE")
    return model, bool(nodes)


Named = dict[str, tuple[ir.Value, ir.DataType, ir.Shape | None]]


def _around_experts(
    build: Builder, x: ir.Value, weights: Weights, spec: MoESpec, index: int
) -> tuple[Named, list[ir.Value], ir.Value]:
    """What a layer hands to its experts, what comes back, and its output."""
    gates, chosen = route_tokens(build, x, weights, spec)
    per_choice = ir.Shape(["S", spec.top_k])
    named: Named = {
        "tokens": (build.op("Identity", x), ir.DataType.FLOAT, x.shape),
        "gates": (gates, ir.DataType.FLOAT, per_choice),
        "chosen": (chosen, ir.DataType.INT64, per_choice),
    }
    routed = floats(f"routed.{index}", 1, "S", "D")
    return named, [routed], add_meta(build, x, routed, weights, spec)


def _around_deltas(
    build: Builder, x: ir.Value, weights: Weights, spec: MoESpec, index: int
) -> tuple[Named, list[ir.Value], ir.Value]:
    """The same where experts are what they add to the meta expert."""
    base = delta_base(build, x, weights, spec)
    products = zip(MATRICES[spec.activation], base.products, strict=False)
    per_choice = ir.Shape(["S", spec.top_k])
    named: Named = {
        "tokens": (base.tokens, ir.DataType.FLOAT, ir.Shape(["S", "D"])),
        "gates": (base.gates, ir.DataType.FLOAT, per_choice),
        "chosen": (base.chosen, ir.DataType.INT64, per_choice),
        **{name: (value, ir.DataType.FLOAT, ir.Shape(["S", "F"])) for name, value in products},
        "hidden": (base.hidden, ir.DataType.FLOAT, ir.Shape(["S", "F"])),
    }
    sums = [floats(f"mixed.{index}", "S", "F"), floats(f"routed.{index}", "S", "D")]
    y = delta_output(build, base, sums, weights, spec)
    return named, sums, build.op("Unsqueeze", y, build.constant([0]))


def split(model: ir.Model) -> Iterator[ir.Model]:
    """The stages of a cut decoder, each a model of its own.

    Stage n + 1 begins with `routed.n`, and `mixed.n` where there is one.
    """
    graph = model.graph
    stages = _stages(graph)
    last = max(stages.values())
    for stage in range(last + 1):
        reads: dict[ir.Value, None] = {}
        writes: dict[ir.Value, None] = {}
        for value, own in stages.items():
            if own > stage:
                continue
            used_later = any(stages.get(user.outputs[0], INPUT) > own for user, _ in value.uses())
            if own == stage and (value.is_graph_output() or used_later):
                writes[value] = None
            if any(stages.get(user.outputs[0]) == stage for user, _ in value.uses()) and (
                own < stage or value.is_graph_input()
            ):
                reads[value] = None
        for value in writes:
            value.dtype = value.dtype or ir.DataType.FLOAT  # what is handed on are activations
        part = ir.convenience.extract(graph, list(reads), list(writes))
        part.name = f"segment.{stage}"
        yield ir.Model(part, ir_version=model.ir_version)


def _stages(graph: ir.Graph) -> dict[ir.Value, int]:
    """Of every value that depends on an input, the stage that computes it.

    Inputs are there from the start, `routed.n` and `mixed.n` from the end of stage n. What depends
    on weights alone belongs to no stage: each that reads it has its own.
    """
    stages = {
        value: int(number) + 1 if name in RETURNED else INPUT
        for value in graph.inputs
        for name, _, number in [str(value.name).partition(".")]
    }
    for node in graph:
        read = [stages[value] for value in node.inputs if value in stages]
        if read:
            stages.update(dict.fromkeys(node.outputs, max(0, *read)))
    return stages


def _place_weights(model: ir.Model, stored: Mapping[str, ir.TensorProtocol]) -> None:
    """Take every weight from where it lies in `decoder.data` already; in the order of names."""
    initializers = model.graph.initializers
    for name, value in sorted(initializers.items()):
        initializers[name] = initializers.pop(name)
        assert tensor_of(value).nbytes == stored[name].nbytes
        value.const_value = tensor = stored[name]
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = placed(tensor, "decoder.data")
