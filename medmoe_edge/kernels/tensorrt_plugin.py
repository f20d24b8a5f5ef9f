"""The two ops for TensorRT: shapes, tactics, and PTX that is baked into the engine.

TensorRT plugins written in Python have a fixed list of inputs, and here the number of experts and
the activation decide how many there are. So each such list is registered in a namespace of its own,
`namespace(...)`, which the graph's nodes name in `plugin_namespace`; the names of the ops stay. The
plugins have no attributes: all else follows from the inputs' types and shapes.

The weights of 4 bits come as INT8 tensors, whose bytes the kernel reads as they are: TensorRT's
ONNX parser widens UINT8 initializers to INT32. Source of the interface: the Python package
`tensorrt.plugin` of TensorRT 11.4 (`_lib.py`, `_plugin_class.py`, `_validate.py`).
Nothing here has run inside TensorRT: its library does not load where this was written.

The kernels are compiled ahead of time, for GPUs that are not here; Triton brings the assembler, so
neither a GPU nor CUDA is needed.

    python -m medmoe_edge.kernels.tensorrt_plugin

prints a table of docs/plugin.md: registers, KiB of shared memory and bytes spilled of every kernel
at StableLM-2-1.6B's and Phi-2's sizes, for every GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from medmoe_edge.errors import ConfigError, MissingDependencyError, ResourceError
from medmoe_edge.kernels import (
    LEADING,
    OPS,
    PARTS,
    Half,
    Kernel,
    Tile,
    Variant,
    group_of,
    namespace,
    of_both_models,
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

    Called again for the same ops, it changes the capability. Raises `MissingDependencyError`, and
    `ResourceError` where TensorRT is there and its Python code for plugins cannot be loaded.
    """
    try:
        import_module("tensorrt")  # by itself, so that what is missing can be told
        plugin: Any = import_module("tensorrt.plugin")  # it has no stubs
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt":
            raise MissingDependencyError("tensorrt", "tensorrt") from error
        raise ResourceError(
            f"TensorRT is installed and its plugins cannot be loaded ({error}).",
            "Install its Python package of 10.9 or later whole, or use a bundle for the CPU.",
        ) from error
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


try:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from medmoe_edge.kernels import triton as kernels
except ImportError as error:
    raise MissingDependencyError("triton", "plugin") from error

# Compute capability -> version of the PTX, times ten. Left alone, Triton writes the newest that its
# assembler knows, which only the newest driver takes; these are of CUDA 12.9, and 13.0 for Thor.
PTX_VERSIONS = {87: 88, 89: 88, 90: 88, 110: 90, 120: 88}
ALIGNED = [["tt.divisibility", 16]]  # what TensorRT and torch allocate begins at 256 bytes


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU: `ptx` takes the pointers of `Variant.pointers` and nothing else.

    `registers` are per thread, `shared` is in bytes per program, `spilled` in bytes per thread.
    """

    name: str
    ptx: str
    cubin: bytes
    threads: int
    shared: int
    registers: int
    spilled: int


def compile_kernel(variant: Variant, tile: Tile, capability: int) -> Compiled:
    """Compile for a compute capability such as 87; raises `ConfigError` for one not listed here."""
    if capability not in PTX_VERSIONS:
        raise ConfigError(
            f"The plugin is not compiled for compute capability {capability}.",
            f"Choose one of {', '.join(map(str, PTX_VERSIONS))}.",
        )
    constants = variant.constants(tile)
    pointers = variant.pointers()
    source = ASTSource(
        getattr(kernels, f"{variant.kernel}_kernel"),
        {**pointers, **dict.fromkeys(constants, "constexpr")},
        constants,
        dict.fromkeys(_places(pointers), ALIGNED),
    )
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
        "ptx_version": PTX_VERSIONS[capability],
    }
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(
        made.metadata.name,
        _without_scratch(made.asm["ptx"], len(list(_places(pointers)))),
        made.asm["cubin"],
        made.metadata.num_warps * 32,
        made.metadata.shared,
        registers,
        spilled,
    )


def _places(pointers: dict[str, str | tuple[str, ...]]) -> Iterator[tuple[int, ...]]:
    """Where each pointer stands: (argument,), or (argument, index) in a tuple."""
    for index, kinds in enumerate(pointers.values()):
        if isinstance(kinds, str):
            yield (index,)
        else:
            yield from ((index, inner) for inner in range(len(kinds)))


def _without_scratch(ptx: str, wanted: int) -> str:
    """The PTX without the two parameters that Triton adds at the end for scratch memory.

    These kernels use none, and whoever launches the PTX with the parameters it knows of, as
    TensorRT does, would leave the driver reading past the end of its list.
    """
    head, listed, rest = re.split(r"(?<=\.entry )(\w+\([^)]*)(?=\))", ptx, maxsplit=1)
    name, *parameters = re.split(r"\(|,", listed)
    dropped = [parameter.split()[-1] for parameter in parameters[wanted:]]
    assert len(dropped) == 2
    assert not any(re.search(rf"\b{parameter}\b", rest) for parameter in dropped)
    return f"{head}{name}({','.join(parameters[:wanted])}\n{rest}"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory, which only spilling takes here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(\w+):(\d+)", printed))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def main() -> None:
    """Print the table; takes about two minutes."""
    print("| kernel | weights | tile | " + " | ".join(f"SM{sm}" for sm in PTX_VERSIONS) + " |")
    print("|---|---|---|" + "---|" * len(PTX_VERSIONS))
    for variant in of_both_models():
        for use, tile in zip(("decode", "prefill"), variant.tiles, strict=True):
            made = [compile_kernel(variant, tile, capability) for capability in PTX_VERSIONS]
            cells = [f"{one.registers} / {one.shared / 1024:.1f} / {one.spilled}" for one in made]
            print(f"| {variant} | {use} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
