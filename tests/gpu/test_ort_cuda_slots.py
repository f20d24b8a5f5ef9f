"""Experts of a graph for ONNX Runtime taken from slots: the bits of the resident graph."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from graphs import initializer, model, moe_config, moe_layer, random_tokens, run_all, run_ort

from medmoe_edge.config import ModelConfig, Precision
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import MEDMOE, Builder, Stacks, floats
from medmoe_edge.export.decoder import MoESpec, moe_function
from medmoe_edge.export.passes.ort_cuda import lower_moe_cuda, take_experts_from_slots
from medmoe_edge.export.plan import Plan
from medmoe_edge.export.quantise import quantise_weights

SLOTS = 6  # for two layers of four experts


def lowered(config: ModelConfig, plan: Plan) -> ir.Model:
    """Two layers of experts one after the other."""
    spec, build = MoESpec.of(config), Builder()
    x = value = floats("x", 1, "S", config.decoder.hidden_size)
    weights = []
    for layer in range(2):
        state, own = moe_layer(config, seed=layer).state_dict(), []
        for name in spec.weight_names:
            array = state[name].numpy()
            array = np.ascontiguousarray(array.T if array.ndim == 2 else array)
            own.append(initializer(f"decoder.layers.{layer}.ffn.{name}", array))
        value = build.op("MoE", value, *own, domain=MEDMOE, **spec.attributes)
        value.type, value.shape = x.type, x.shape
        weights += own
    value.name = "y"
    whole = model([x], [value], build, weights, [moe_function(spec)])
    quantise_weights(whole, plan)
    lower_moe_cuda(whole, spec)
    return whole


def fill(
    layers: list[Stacks], table: npt.NDArray[np.int32], slots: int
) -> dict[str, npt.NDArray[Any]]:
    """The slots, with every expert of the table in its own and rubbish in the others."""
    filled = {}
    for name, tensor in layers[0].items():
        shape = (slots, *tensor.shape.numpy()[1:])
        filled[name] = np.full(shape, 77, tensor.dtype.numpy())
        for layer, expert in np.argwhere(table >= 0):
            filled[name][table[layer, expert]] = layers[layer][name].numpy()[expert]
    return filled


@pytest.mark.parametrize(
    ("form", "kind", "options"),
    [
        ("int8", "stablelm", {"top_k": 1}),
        ("int4", "stablelm", {"top_k": 2, "use_residual": True}),
        ("fp32", "phi", {"top_k": 2, "router_bias": False}),
        ("int4", "phi", {"top_k": 1, "meta_expert": False}),
    ],
)
def test_slots_give_the_bits_of_the_resident_graph(
    form: Precision, kind: str, options: dict[str, Any]
) -> None:
    config = moe_config(kind, size=64, hidden=128, **options)
    graph = lowered(config, Plan(form, "rtn"))
    x = random_tokens(1, 2, config.decoder.hidden_size)
    resident = run_ort(graph, x=x)
    whole = lowered(config, Plan(form, "rtn"))
    table = np.arange(8, dtype=np.int32).reshape(2, 4)
    layers = take_experts_from_slots(whole)
    wanted = run_ort(whole, x=x, table=table, **fill(layers, table, 8))
    assert np.allclose(wanted, resident, rtol=1e-5, atol=1e-5 * np.abs(resident).max())
    assert form == "int4" or wanted.tobytes() == resident.tobytes()

    layers = take_experts_from_slots(graph)
    assert not any("experts" in name for name in graph.graph.initializers)
    table = np.full((2, 4), -1, np.int32)
    runs = 0
    while True:  # replayed until nothing is absent
        runs += 1
        y, *chosen = run_all(graph, x=x, table=table, **fill(layers, table, SLOTS))
        needed = [(m, int(e)) for m in range(2) for e in np.unique(chosen[m])]
        absent = [expert for expert in needed if table[expert] < 0]
        if not absent:
            break
        certain = [expert for expert in needed if expert[0] <= absent[0][0]]
        table[:] = -1
        for slot, expert in enumerate(certain):
            table[expert] = SLOTS - 1 - slot
    assert runs <= 3
    assert y.tobytes() == wanted.tobytes()


def test_layers_of_unlike_formats_are_refused() -> None:
    config = moe_config("stablelm", size=64, hidden=128)
    graph = lowered(config, Plan("int4", "rtn"))
    other = lowered(config, Plan("int8", "rtn"))
    node, theirs = (
        [each for each in whole.graph if each.op_type == "QMoE"][1] for whole in (graph, other)
    )
    node.replace_input_with(2, theirs.inputs[2])
    with pytest.raises(CheckpointError, match="stored otherwise"):
        take_experts_from_slots(graph)
