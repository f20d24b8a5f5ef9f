"""Pass: `medmoe::MoE` for ONNX Runtime on a CPU, one `If` per expert.

Only the experts that some token was routed to run, on those tokens alone.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from medmoe_edge.export.builder import Builder
from medmoe_edge.export.moe_op import MoESpec, Weights, add_meta, feed_forward, replace_moe, route


def lower_moe(model: ir.Model, spec: MoESpec) -> tuple[ir.Model, bool]:
    """Replace every `medmoe::MoE` node and drop the function; returns `(model, modified)`."""
    modified = replace_moe(
        model, spec, lambda build, x, weights: _routed_experts(build, x, weights, spec)
    )
    if modified:
        NameFixPass()(model)  # branches and the graph around them share one name space
    return model, modified


def _routed_experts(build: Builder, x: ir.Value, weights: Weights, spec: MoESpec) -> ir.Value:
    gates, chosen, _ = route(build, x, weights, spec.top_k)
    per_token = build.constant([-1, spec.top_k])
    gates, chosen = (build.op("Reshape", value, per_token) for value in (gates, chosen))  # [T, K]
    shape = build.op("Shape", x)
    width = build.op("Gather", shape, build.constant([2]))
    flat = build.op("Concat", build.constant([-1]), width, axis=0)
    tokens = build.op("Reshape", x, flat)  # [T, D]
    total = build.op("ConstantOfShape", build.op("Shape", tokens))
    for index in range(spec.num_experts):
        mine = build.op("Equal", chosen, build.constant(index))  # [T, K]
        share = build.op("Where", mine, gates, build.constant(0.0, np.float32))
        share = build.op("ReduceSum", share, build.constant([-1]), keepdims=1)  # [T, 1]
        total = _expert_if_needed(build, (tokens, share, total), weights, index, spec.activation)
    return add_meta(build, x, build.op("Reshape", total, shape), weights, spec)


def _expert_if_needed(
    build: Builder,
    state: tuple[ir.Value, ir.Value, ir.Value],
    weights: Weights,
    index: int,
    activation: str,
) -> ir.Value:
    """The running total with expert `index` added on the tokens whose share of it is not zero."""
    tokens, share, total = state
    rows = build.op("NonZero", build.op("Squeeze", share, build.constant([-1])))  # [1, n]
    count = build.op("Squeeze", build.op("Shape", rows, start=1), build.constant([0]))
    needed = build.op("Greater", count, build.constant(0))

    run = Builder()
    places = run.op("Transpose", rows, perm=[1, 0])  # [n, 1]
    mine = run.op("GatherND", tokens, places)  # [n, D]
    part = feed_forward(run, mine, weights, f"experts.{index}.", activation)
    part = run.op("Mul", part, run.op("GatherND", share, places))
    added = run.op("ScatterND", total, places, part, reduction="add")

    skip = Builder()
    kept = skip.op("Identity", total)
    return build.op(
        "If",
        needed,
        then_branch=ir.Graph([], [added], nodes=run.nodes, name=f"expert_{index}"),
        else_branch=ir.Graph([], [kept], nodes=skip.nodes, name=f"skip_{index}"),
    )
