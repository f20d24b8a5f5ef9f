"""The plugin's kernels compiled for GPUs that are not here: what they take, and what launches."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from triton import knobs

from medmoe_edge.errors import ConfigError
from medmoe_edge.kernels import Variant
from medmoe_edge.kernels.tensorrt_plugin import PTX_VERSIONS, Compiled, compile_kernel

# The ones that take the most; `python -m medmoe_edge.kernels.tensorrt_plugin` compiles all.
HIDDEN = Variant("hidden", "swiglu", 5, 2048, 5632, 32, "bf16")
OUTPUT = Variant("output", "gelu_tanh", 5, 10240, 2560, None, "fp16")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile in earnest, and leave nothing in the home folder."""
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.fixture(scope="module", params=PTX_VERSIONS, ids=lambda capability: f"sm{capability}")
def compiled(request: pytest.FixtureRequest, own_cache: None) -> tuple[int, list[Compiled]]:
    decode, prefill = HIDDEN.tiles[0], OUTPUT.tiles[1]
    return request.param, [
        compile_kernel(HIDDEN, decode, request.param),
        compile_kernel(OUTPUT, prefill, request.param),
    ]


def test_a_program_fits_the_gpu(compiled: tuple[int, list[Compiled]]) -> None:
    for kernel in compiled[1]:
        assert 0 < kernel.registers <= 255
        assert kernel.registers * kernel.threads <= 65536
        assert kernel.spilled == 0
        assert 0 < kernel.shared <= 48 * 1024  # what needs no opting in to


def test_the_ptx_takes_inputs_and_outputs_alone(compiled: tuple[int, list[Compiled]]) -> None:
    capability, kernels = compiled
    for kernel, arguments in zip(kernels, (3 + 5 * 4 + 1, 4 + 5 * 3 + 1), strict=True):
        entries = re.findall(r"\.entry (\w+)\(([^)]*)\)", kernel.ptx)
        assert [name for name, _ in entries] == [kernel.name]
        assert entries[0][1].count(".param") == arguments
        version = divmod(PTX_VERSIONS[capability], 10)
        assert kernel.ptx.split(".version ")[1].split()[0] == "{}.{}".format(*version)


def test_the_ptx_assembles(compiled: tuple[int, list[Compiled]], tmp_path: Path) -> None:
    capability, kernels = compiled
    tools = knobs.nvidia
    tool = (tools.ptxas if capability < 90 else tools.ptxas_blackwell).path
    for kernel in kernels:
        (tmp_path / "kernel.ptx").write_text(kernel.ptx)
        target = kernel.ptx.split(".target ")[1].split()[0]
        command = [tool, f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_weights_are_loaded_sixteen_bytes_at_a_time() -> None:
    ptx = compile_kernel(HIDDEN, HIDDEN.tiles[0], 87).ptx
    assert "ld.global.v4.b32" in ptx


def test_other_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"capability 75.*87, 89, 90, 110, 120"):
        compile_kernel(HIDDEN, HIDDEN.tiles[0], 75)
