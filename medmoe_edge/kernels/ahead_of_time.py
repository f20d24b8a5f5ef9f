"""Compiles the kernels for GPUs that are not here: PTX for the engine, and what a program takes.

    python -m medmoe_edge.kernels.ahead_of_time

prints a table of docs/plugin.md: registers, KiB of shared memory and bytes spilled of every kernel
at StableLM-2-1.6B's and Phi-2's sizes, for every GPU. Triton brings the assembler, so neither a GPU
nor CUDA is needed.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medmoe_edge.errors import ConfigError, MissingDependencyError
from medmoe_edge.kernels.variant import Tile, Variant, of_both_models

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
