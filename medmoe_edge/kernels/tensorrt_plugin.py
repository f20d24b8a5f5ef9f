"""The two ops for TensorRT: shapes, tactics, and PTX that is baked into the engine.

TensorRT plugins written in Python have a fixed list of inputs, and here the number of experts and
the activation decide how many there are. So each such list is registered in a namespace of its own,
`namespace(...)`, which the graph's nodes name in `plugin_namespace`; the names of the ops stay. The
plugins have no attributes: all else follows from the inputs' types and shapes.

The weights of 4 bits come as INT8 tensors, whose bytes the kernel reads as they are: TensorRT's
ONNX parser widens UINT8 initializers to INT32. Source of the interface: the Python package
`tensorrt.plugin` of TensorRT 11.4 (`_lib.py`, `_plugin_class.py`, `_validate.py`).
Nothing here has run inside TensorRT: its library does not load where this was written.
"""

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any

from medmoe_edge.errors import ConfigError, MissingDependencyError
from medmoe_edge.kernels.ahead_of_time import compile_kernel
from medmoe_edge.kernels.variant import (
    LEADING,
    OPS,
    PARTS,
    Half,
    Kernel,
    Variant,
    group_of,
    namespace,
)

HALVES: dict[str, Half] = {"HALF": "fp16", "BF16": "bf16"}  # by TensorRT's names
TYPES = {
    **{"*fp16": "HALF", "*bf16": "BF16", "*fp32": "FLOAT"},
    **{"*i32": "INT32", "*i8": "INT8", "*u8": "INT8"},
}
Described = Any
"""A `tensorrt.plugin.TensorDesc`."""


def register(activation: str, experts: int, capability: int) -> None:
    """Make both ops known to TensorRT, to be compiled for a compute capability such as 87.

    Called again for the same ops, it changes the capability. Raises `MissingDependencyError`.
    """
    try:
        plugin: Any = import_module("tensorrt.plugin")  # it has no stubs
    except ImportError as error:
        raise MissingDependencyError("tensorrt", "tensorrt") from error
    for kernel, name in OPS.items():
        op = f"{namespace(activation, experts)}::{name}"
        if op not in _registered:
            _registered[op] = Op(plugin, kernel, activation, experts)
            _registered[op].register(op)
        _registered[op].capability = capability


class Op:
    """What TensorRT asks about one op while it builds an engine."""

    capability: int

    def __init__(self, plugin: Any, kernel: Kernel, activation: str, experts: int) -> None:
        self.plugin, self.activation, self.experts = plugin, activation, experts
        self.kernel: Kernel = kernel

    def register(self, op: str) -> None:
        """Give TensorRT the three callbacks under `namespace::name`."""
        plugin = self.plugin
        launch = tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]  # type: ignore[name-defined]
        plugin.register(op)(self._signed(self.describe, [], plugin.TensorDesc))
        plugin.autotune(op)(
            self._signed(self.autotune, ["outputs"], list[plugin.AutoTuneCombination])  # type: ignore[name-defined]
        )
        plugin.aot_impl(op)(self._signed(self.compile, ["outputs", "tactic"], launch))

    @property
    def names(self) -> list[str]:
        """Of the inputs, in order."""
        parts = [part.replace(".", "_") for part in PARTS[self.kernel, self.activation]]
        each = [f"{part}_{index}" for index in range(self.experts) for part in parts]
        return [*LEADING[self.kernel], *each]

    def describe(self, *inputs: Described) -> Described:
        """Shape and type of the result: a row per slot, of the activations' type."""
        named = dict(zip(self.names, inputs, strict=True))
        slots = named["tokens" if self.kernel == "hidden" else "order"].shape_expr[0]
        scale = inputs[len(LEADING[self.kernel]) + 1]
        return self.plugin.from_shape_expr((slots, scale.shape_expr[0]), inputs[0].dtype)

    def autotune(self, *inputs_and_outputs: Described) -> list[Any]:
        """The types as they are, and a tactic for each tile: TensorRT takes the faster one."""
        *inputs, outputs = inputs_and_outputs
        types = ", ".join(each.dtype.name for each in [*inputs, *outputs])
        return [self.plugin.AutoTuneCombination(types, "LINEAR", [1, 2])]

    def compile(self, *inputs_and_more: Described) -> tuple[str, str, Any, Any]:
        """Name and PTX of the kernel, how it is launched, and its scalars, of which it has none."""
        *inputs, _, tactic = inputs_and_more
        variant = self.variant(inputs)
        self.check_types(variant, inputs)
        tile = variant.tiles[tactic - 1]
        made = compile_kernel(variant, tile, self.capability)
        slots = inputs[1].shape_expr[0]  # of `tokens` or `order`
        launch = self.plugin.KernelLaunchParams(
            grid_x=variant.columns(tile),
            grid_y=self.plugin.min(slots, slots // tile.m + self.experts),
            block_x=made.threads,
            shared_mem=made.shared,
        )
        return made.name, made.ptx, launch, self.plugin.SymIntExprs(0)

    def variant(self, inputs: list[Described]) -> Variant:
        """The kernel that fits the inputs; raises `ConfigError` where there is none."""
        matrix = [size.constant_value() for size in inputs[len(LEADING[self.kernel])].shape_expr]
        group = group_of(matrix)
        width, channels = matrix if group is None else (matrix[1] * group, matrix[0])
        half = HALVES.get(inputs[0].dtype.name)
        if half is None:
            raise ConfigError(
                f"The plugin has no kernel for activations in {inputs[0].dtype.name}.",
                "Export the graph in fp16 or bf16.",
            )
        return Variant(self.kernel, self.activation, self.experts, width, channels, group, half)

    def check_types(self, variant: Variant, inputs: list[Described]) -> None:
        """Raise `ConfigError` for an input that the kernel would read as of another type."""
        expected = variant.pointers()
        del expected[variant.result]
        weights = expected.pop("weights")
        for name, kind, given in zip(
            self.names, [*expected.values(), *weights], inputs, strict=True
        ):
            if given.dtype.name != TYPES[str(kind)]:
                raise ConfigError(
                    f"The plugin's input {name} is {given.dtype.name}, not {TYPES[str(kind)]}.",
                    "Keep the plugin's nodes out of the conversion to half precision.",
                )

    def _signed(
        self, method: Callable[..., Any], more: list[str], returns: Any
    ) -> Callable[..., Any]:
        """The method under the fixed signature that TensorRT checks."""

        def function(*arguments: Described) -> Any:
            return method(*arguments)

        kind, described = Parameter.POSITIONAL_OR_KEYWORD, self.plugin.TensorDesc
        inputs = [Parameter(name, kind, annotation=described) for name in self.names]
        rest = [Parameter(name, kind) for name in more]
        vars(function)["__signature__"] = Signature([*inputs, *rest], return_annotation=returns)
        return function


_registered: dict[str, Op] = {}
