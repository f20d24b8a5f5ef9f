"""The schemas of our ops, so that `onnx.checker` and shape inference accept graphs that use them.

Their functions say what they compute; the schemas hold where an engine's own implementation takes
the place of a function.
"""

from collections.abc import Callable

import onnx
from onnx.defs import OpSchema

from medmoe_edge.export.builder import MEDMOE
from medmoe_edge.export.decoder import INPUTS, OUTPUTS

Inference = Callable[[onnx.shape_inference.InferenceContext], None]
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
VARIADIC = OpSchema.FormalParameterOption.Variadic


def register_schemas() -> None:
    """Make `medmoe::MoE` and `medmoe::Attention` known to onnx, once."""
    for schema in (_moe(), _attention()):
        if not onnx.defs.has(schema.name, schema.domain):
            onnx.defs.register_schema(schema)


def _moe() -> OpSchema:
    schema = OpSchema(
        "MoE",
        MEDMOE,
        1,
        "The mixture of experts of medmoe_edge.export.decoder.",
        inputs=[
            OpSchema.FormalParameter("x", "T", "Tokens [B, S, D]."),
            OpSchema.FormalParameter(
                "weights", "T", "Router, coefficient and experts.", param_option=VARIADIC
            ),
        ],
        outputs=[OpSchema.FormalParameter("y", "T", "Tokens [B, S, D].")],
        type_constraints=[("T", FLOATS, "Floats.")],
        attributes=[
            OpSchema.Attribute("activation", OpSchema.AttrType.STRING, "swiglu or gelu_tanh"),
            OpSchema.Attribute("top_k", OpSchema.AttrType.INT, "experts per token, 1 or 2"),
            OpSchema.Attribute("num_experts", OpSchema.AttrType.INT, "without the meta expert"),
        ],
    )
    schema.set_type_and_shape_inference_function(_like(0))
    return schema


def _attention() -> OpSchema:
    schema = OpSchema(
        "Attention",
        MEDMOE,
        1,
        "The cached attention of medmoe_edge.export.decoder.",
        inputs=[
            OpSchema.FormalParameter(name, "I" if name == "start" else "T", "") for name in INPUTS
        ],
        outputs=[OpSchema.FormalParameter(name, "T", "") for name in OUTPUTS],
        type_constraints=[("T", FLOATS, "Floats."), ("I", ["tensor(int64)"], "Positions.")],
        attributes=[
            OpSchema.Attribute(name, OpSchema.AttrType.INT, "")
            for name in ("num_heads", "head_size", "rotary_size")
        ],
    )
    caches = (INPUTS.index("past_key"), INPUTS.index("past_value"))
    schema.set_type_and_shape_inference_function(_like(0, *caches))
    return schema


def _like(*inputs: int) -> Inference:
    """Each output has the type and shape of the input of that index."""

    def infer(context: onnx.shape_inference.InferenceContext) -> None:
        for output, place in enumerate(inputs):
            kind = context.get_input_type(place)
            if kind is not None:
                context.set_output_type(output, kind)

    return infer
