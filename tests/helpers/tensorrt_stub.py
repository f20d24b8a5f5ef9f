"""TensorRT's C++ classes, as far as its own Python code for plugins asks for them.

`tensorrt.plugin` itself, which checks signatures and turns what a plugin returns into launches, is
NVIDIA's, from the package `tensorrt-cu13-bindings`. Dimensions are plain numbers here; those of the
profile's dynamic axes are marked, since a plugin may not read them.
"""

import contextlib
import enum
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT8", "INT32"])
TensorFormat = enum.Enum("TensorFormat", ["LINEAR"])
DimensionOperation = enum.Enum(
    "DimensionOperation",
    ["SUM", "SUB", "PROD", "FLOOR_DIV", "CEIL_DIV", "MIN", "MAX", "EQUAL", "LESS"],
)
QuickPluginCreationRequest = enum.Enum("QuickPluginCreationRequest", ["STRICT_AOT", "STRICT_JIT"])
OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    DimensionOperation.SUM: lambda a, b: a + b,
    DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    DimensionOperation.MIN: min,
}


class IDimensionExpr:
    def __init__(self, value: int, dynamic: bool = False) -> None:
        self.value, self.dynamic = value, dynamic

    def is_constant(self) -> bool:
        return not self.dynamic

    def get_constant_value(self) -> int:
        return self.value


class ExpressionBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(value)

    def operation(self, op: Any, a: IDimensionExpr, b: IDimensionExpr) -> IDimensionExpr:
        return IDimensionExpr(OPERATIONS[op](a.value, b.value), a.dynamic or b.dynamic)


class Registry(dict[str, Any]):
    def register_creator(self, creator: Any, namespace: str) -> None:
        self[f"{namespace}::{creator.name}"] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self[f"{namespace}::{name}"]


class Logger:
    WARNING = 0

    def log(self, severity: int, message: str) -> None:
        pass


class TensorDesc(SimpleNamespace):
    """`PluginTensorDesc`, and with itself as `desc` also `DynamicPluginTensorDesc`."""

    def __init__(self, dims: Sequence[int] = (), kind: Any = None) -> None:
        super().__init__(dims=dims, type=kind, format=TensorFormat.LINEAR, scale=1.0)

    @property
    def desc(self) -> "TensorDesc":
        return self


EMPTY = [
    *("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime"),
    *("IPluginV3QuickAOTBuild", "IPluginCreatorV3Quick", "ISymExpr", "IExprBuilder", "ITensor"),
    "PluginField",
]
FIELDS = ["INT8", "INT16", "INT32", "INT64", "FLOAT16", "FLOAT32", "FLOAT64", "CHAR", "UNKNOWN"]


def stub(folder: Path) -> ModuleType:
    """A module `tensorrt` whose submodule `plugin` is the real one in `folder`."""
    module = ModuleType("tensorrt")
    module.__path__ = [str(folder)]
    registry = Registry()
    names = {
        **{name: type(name, (), {}) for name in EMPTY},
        "DataType": DataType,
        "DimensionOperation": DimensionOperation,
        "Dims": SimpleNamespace(MAX_DIMS=8),
        "DimsExprs": lambda size: [None] * size,
        "DynamicPluginTensorDesc": TensorDesc,
        "IDimensionExpr": IDimensionExpr,
        "Logger": Logger,
        "PluginArgDataType": SimpleNamespace(INT32="INT32"),
        "PluginArgType": SimpleNamespace(INT="INT"),
        "PluginFieldCollection": list,
        "PluginFieldType": SimpleNamespace(**{name: name for name in FIELDS}),
        "PluginTensorDesc": TensorDesc,
        "QuickPluginCreationRequest": QuickPluginCreationRequest,
        "TensorFormat": TensorFormat,
        "TensorRTPhase": SimpleNamespace(BUILD="BUILD"),
        "get_plugin_registry": lambda: registry,
    }
    vars(module).update(names)
    return module


PLUGIN_VERSIONS = ("10.9", "10.13", "10.15", "11.4")  # each the first of a form, and the newest


def bindings(version: str) -> Path | None:
    """The folder of NVIDIA's Python code of a version; None where it is not at hand.

    It is that of the installed package, or one in the folder that `MEDMOE_TENSORRT_BINDINGS` names,
    which `.ci/bindings` fills.
    """
    more = Path(os.environ.get("MEDMOE_TENSORRT_BINDINGS") or "nowhere")
    for folder in sorted(more.glob(f"{version}.*/tensorrt_bindings")):
        return folder
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.distribution("tensorrt-cu13-bindings")
        if found.version.startswith(f"{version}."):
            return Path(str(found.locate_file("tensorrt_bindings")))
    return None


class Build:
    """What TensorRT's builder asks of a plugin in an engine, in its order.

    Axes of length `dynamic` are those of the profile, which vary.
    """

    def __init__(self, module: Any, name: str, inputs: Sequence[tuple[Sequence[int], Any]]) -> None:
        namespace, op = name.split("::")
        creator = module.get_plugin_registry().get_creator(op, "1", namespace)
        request = QuickPluginCreationRequest.STRICT_AOT
        self.plugin = creator.create_plugin(op, namespace, [], "BUILD", request)
        self.inputs, self.builder = inputs, ExpressionBuilder()

    def result(self, dynamic: int) -> tuple[list[int], Any]:
        """Shape and type of the output."""
        (kind,) = self.plugin.get_output_data_types(
            [kind for _, kind in self.inputs], [len(dims) for dims, _ in self.inputs]
        )
        self.dims = [
            [IDimensionExpr(size, size == dynamic) for size in dims] for dims, _ in self.inputs
        ]
        (shape,) = self.plugin.get_output_shapes(self.dims, [], self.builder)
        self.output = [size.value for size in shape], kind
        return self.output

    def tactics(self) -> tuple[list[tuple[Any, Any]], list[int]]:
        """Types and layouts of all inputs and the output, and the tactics for them."""
        self.described = [TensorDesc(dims, kind) for dims, kind in [*self.inputs, self.output]]
        count = len(self.inputs)
        found = self.plugin.get_supported_format_combinations(self.described, count)
        self.plugin.configure_plugin(self.described[:count], self.described[count:])
        return [(each.type, each.format) for each in found], self.plugin.get_valid_tactics()

    def launch(self, tactic: int) -> tuple[dict[str, int], int, str, str]:
        """Grid, block and shared memory; the number of scalars; the kernel's name and PTX."""
        self.plugin.set_tactic(tactic)
        parameters, scalars = SimpleNamespace(), SimpleNamespace()
        count = len(self.inputs)
        self.plugin.get_launch_params(
            self.dims, self.described, count, parameters, scalars, self.builder
        )
        name, ptx = self.plugin.get_kernel(self.described[:count], self.described[count:])
        numbers = {key: each.expr.value for key, each in vars(parameters).items()}
        return numbers, scalars.nbSymExprs, name, ptx.decode()
