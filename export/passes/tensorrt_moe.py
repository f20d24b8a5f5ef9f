"""Pass: `medmoe::MoE` for TensorRT proper, as routing in standard ops and two plugin nodes.

`export/plugin/__init__.py` says what the two ops take and give. Routing, gates and the last sum are
fp32; only the plugin's activations are fp16 or bf16, cast at its border. The integers and scales
are those that the weights were stored in, the ones of 4 bits packed as for `MatMulNBits`. A later
pass to half must keep nodes of the domain `medmoe`: their gates and scales in fp32 stay so.
"""

import itertools

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from medmoe_edge.errors import ConfigError
from medmoe_edge.export.builder import MEDMOE, Builder, initializer
from medmoe_edge.export.moe_op import MoESpec, Weights, affine, replace_moe, route
from medmoe_edge.export.stored_matrix import StoredMatrix, lazy_tensor
from medmoe_edge.kernels.variant import OPS, PARTS, TILES, Kernel, namespace

PLUGIN = {"plugin_version": "1", "aot": 1}


def lower_moe_to_plugin(
    model: ir.Model, spec: MoESpec, half: ir.DataType = ir.DataType.FLOAT16
) -> tuple[ir.Model, bool]:
    """Replace every `medmoe::MoE` node and drop the function; returns `(model, modified)`.

    `half` is FLOAT16 or BFLOAT16. Raises `ConfigError` where an expert's matrices are not stored in
    a format that the plugin has kernels for.
    """
    modified = replace_moe(
        model,
        spec,
        lambda build, x, weights: _Lowering(model, build, x, weights, spec, half).y(),
    )
    if modified:
        RemoveUnusedNodesPass()(model)
        NameFixPass()(model)
    return model, modified


class _Lowering:
    """One node on its way; T tokens take S slots each, E experts count the meta expert."""

    def __init__(
        self,
        model: ir.Model,
        build: Builder,
        x: ir.Value,
        weights: Weights,
        spec: MoESpec,
        half: ir.DataType,
    ) -> None:
        self.model, self.build, self.x, self.weights = model, build, x, weights
        self.spec, self.half = spec, half
        self.experts = spec.num_experts + spec.meta_expert
        self.slots = spec.top_k + spec.meta_expert

    def y(self) -> ir.Value:
        """The op's result, of the shape of x."""
        build = self.build
        width = build.op("Shape", self.x, start=2)
        x = build.op("Reshape", self.x, build.op("Concat", build.constant([-1]), width, axis=0))
        gates, chosen = self._slots(x)
        order, offsets = self._sorted(build.op("Reshape", chosen, build.constant([-1, 1])))
        tokens = build.op("Div", order, build.constant(self.slots, np.int32))
        hidden = self._plugin("hidden", self._cast(x, self.half), tokens, offsets)
        parts = self._plugin("output", hidden, order, gates, offsets)
        by_token = build.op("Concat", build.constant([-1, self.slots]), width, axis=0)
        parts = build.op("Reshape", self._cast(parts, ir.DataType.FLOAT), by_token)
        total = build.op("ReduceSum", parts, build.constant([1]), keepdims=0)
        return build.op("Reshape", total, build.op("Shape", self.x))

    def _slots(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Gates fp32 and experts int32 of the slots, both `[T, S]`."""
        build = self.build
        gates, chosen, _ = route(build, x, self.weights, self.spec.top_k)
        chosen = self._cast(chosen, ir.DataType.INT32)
        if not self.spec.meta_expert:
            return gates, chosen
        shape = build.op("Concat", build.op("Shape", gates, end=1), build.constant([1]), axis=0)
        last = build.op("Expand", build.constant(self.experts - 1, np.int32), shape)  # [T, 1]
        share = build.op("Expand", build.constant(1.0, np.float32), shape)
        if self.spec.use_residual:
            mix = build.op("Softmax", affine(build, x, self.weights, "coefficient."), axis=-1)
            first, second = build.ops("Split", mix, outputs=2, axis=-1, num_outputs=2)
            gates, share = build.op("Mul", gates, first), build.op("Add", share, second)
        return (
            build.op("Concat", gates, share, axis=1),
            build.op("Concat", chosen, last, axis=1),
        )

    def _sorted(self, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
        """`order` and `offsets` of the slots `[T * S, 1]`: a counting sort, which is stable."""
        build = self.build
        each = build.constant(np.arange(self.experts), np.int32)
        mine = self._cast(build.op("Equal", chosen, each), ir.DataType.INT32)  # [T * S, E]
        down, across = build.constant(0), build.constant(0)
        counts = build.op("ReduceSum", mine, build.constant([0]), keepdims=0)
        ends = build.op("CumSum", counts, across)
        begins = build.op("Sub", ends, counts)
        # the place of a slot: where its expert begins, after those of its expert before it
        earlier = build.op("Sub", build.op("CumSum", mine, down), mine)
        places = build.op("Mul", mine, build.op("Add", earlier, begins))
        places = build.op("ReduceSum", places, build.constant([1]), keepdims=0)
        count = build.op("Squeeze", build.op("Shape", places), build.constant([0]))
        numbers = self._cast(
            build.op("Range", build.constant(0), count, build.constant(1)), ir.DataType.INT32
        )
        order = build.op("ScatterElements", numbers, places, numbers, axis=0)
        first = build.constant([0], np.int32)
        return order, build.op("Concat", first, ends, axis=0)

    def _plugin(self, kernel: Kernel, *leading: ir.Value) -> ir.Value:
        """One plugin node on all experts' parts for it."""
        names = [f"experts.{index}." for index in range(self.spec.num_experts)]
        names += ["meta."] * self.spec.meta_expert
        parts: list[ir.Value] = []
        groups: dict[int | None, str] = {}
        for owner, part in itertools.product(names, PARTS[kernel, self.spec.activation]):
            matrix, _, kind = part.partition(".")
            if kind == "bias":
                parts.append(self._cast(self.weights[owner + part], self.half))
            elif not kind:
                stored, group = self._stored(self.weights[f"{owner}{matrix}.weight"])
                parts += stored
                groups.setdefault(group, str(stored[0].name).removesuffix(".packed"))
        if len(groups) > 1:
            raise ConfigError(
                f"{' and '.join(groups.values())} are in formats that one kernel cannot mix.",
                "Export with --int8 or --int4, which store all experts alike.",
            )
        result = self.build.op(
            OPS[kernel],
            *leading,
            *parts,
            domain=MEDMOE,
            plugin_namespace=namespace(self.spec.activation, self.experts),
            **PLUGIN,
            **({"activation": self.spec.activation} if kernel == "hidden" else {}),
        )
        result.dtype = self.half
        return result

    def _stored(self, weight: ir.Value) -> tuple[list[ir.Value], int | None]:
        """The integers and scales behind a matrix, as the kernels take them, and the group size."""
        matrix = StoredMatrix.behind(weight)
        if matrix is None:
            raise _no_kernel(weight.name, "not quantised")
        if (matrix.bits, matrix.group) == (8, None):
            return [self._initializer(matrix.integers), self._initializer(matrix.scale)], None
        if matrix.bits != 4 or matrix.group is None or matrix.group not in TILES:
            form = f"{matrix.bits} bits in groups of {matrix.group}"
            raise _no_kernel(matrix.integers.name, form)
        return [self._initializer(tensor) for tensor in _packed(matrix)], matrix.group

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        found = self.model.graph.initializers.get(str(tensor.name))
        if found is None:
            found = initializer(tensor)
            self.model.graph.register_initializer(found)
        return found

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        result = self.build.op("Cast", value, to=int(to))
        result.dtype = to
        return result


def _packed(matrix: StoredMatrix) -> list[ir.LazyTensor]:
    """Bytes `[N, K / group, group / 2]` under INT8, and scales `[N, K / group]`."""
    assert matrix.group is not None
    shape = [matrix.channels, matrix.width // matrix.group, matrix.group // 2]
    name = matrix.integers.name

    def bytes_in_groups() -> npt.NDArray[np.int8]:
        return matrix.packed(4).view(np.int8).reshape(shape)

    return [
        lazy_tensor(f"{name}.packed", bytes_in_groups, ir.DataType.INT8, shape),
        lazy_tensor(
            f"{name}.groups.scale",
            lambda: matrix.scales(matrix.group),
            matrix.scale.dtype,
            shape[:2],
        ),
    ]


def _no_kernel(name: str | None, stored: str) -> ConfigError:
    return ConfigError(
        f"The TensorRT plugin has no kernel for {name}: it is {stored}.",
        "Export with --int8 or --int4.",
    )
