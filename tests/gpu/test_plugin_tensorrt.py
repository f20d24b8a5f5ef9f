"""The plugin in NVIDIA's own Python code for plugins, with the C++ beneath it replaced.

This proves signatures, shapes, tactics and launches; that TensorRT then runs the kernel rightly can
only be seen on a GPU.
"""

import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from tensorrt_stub import PLUGIN_VERSIONS, Build, DataType, bindings, stub
from test_plugin_ahead_of_time import own_cache

from medmoe_edge.errors import ConfigError, MissingDependencyError, ResourceError
from medmoe_edge.kernels import Kernel, tensorrt_plugin
from medmoe_edge.kernels.tensorrt_plugin import register

__all__ = ["own_cache"]  # a fixture

T, SLOTS, EXPERTS, D, F = 37, 2, 3, 64, 160
HALF, INT32, FLOAT, INT8 = DataType.HALF, DataType.INT32, DataType.FLOAT, DataType.INT8


@pytest.fixture(params=PLUGIN_VERSIONS)
def tensorrt(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    folder = bindings(request.param)
    if folder is None:
        pytest.skip(f"needs NVIDIA's Python code of TensorRT {request.param}: .ci/bindings FOLDER")
    module = stub(folder)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(tensorrt_plugin, "_registered", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in its docstrings
        importlib.import_module("tensorrt.plugin")
    yield module
    for name in [name for name in sys.modules if name.startswith("tensorrt.")]:
        del sys.modules[name]


def inputs(kernel: Kernel, group: int | None, half: Any = HALF) -> list[tuple[list[int], Any]]:
    """Shapes and types of all inputs for SwiGLU."""
    slots = T * SLOTS
    width, channels = (D, F) if kernel == "hidden" else (F, D)
    if group is None:
        parts = [([width, channels], INT8), ([channels], FLOAT)]
    else:
        parts = [
            ([channels, width // group, group // 2], INT8),
            ([channels, width // group], HALF),
        ]
    indices: list[tuple[list[int], Any]] = [([slots], INT32), ([EXPERTS + 1], INT32)]
    if kernel == "hidden":
        return [([T, width], half), *indices, *(2 * EXPERTS * parts)]
    return [([slots, width], half), indices[0], ([T, SLOTS], FLOAT), indices[1], *(EXPERTS * parts)]


@pytest.mark.parametrize("group", [None, 32], ids=["int8", "int4"])
@pytest.mark.parametrize("kernel", ["hidden", "output"])
def test_tensorrt_launches_the_kernel_for_its_inputs(
    tensorrt: ModuleType, kernel: Kernel, group: int | None
) -> None:
    register("swiglu", EXPERTS, 87)
    name = {"hidden": "RoutedHidden", "output": "RoutedOutput"}[kernel]
    given = inputs(kernel, group)
    build = Build(tensorrt, f"medmoe_swiglu_{EXPERTS}::{name}", given)
    channels = F if kernel == "hidden" else D
    assert build.result(dynamic=T * SLOTS) == ([T * SLOTS, channels], HALF)
    types, tactics = build.tactics()
    assert [kind for kind, _ in types] == [*(kind for _, kind in given), HALF]
    assert tactics == [1, 2]
    for tactic, rows in ((1, 16), (2, 64)):
        launch, scalars, kernel_name, ptx = build.launch(tactic)
        assert launch["grid_x"] * 64 >= channels > (launch["grid_x"] - 1) * 64
        assert launch["grid_y"] == T * SLOTS // rows + EXPERTS
        assert [launch[key] for key in ("grid_z", "block_y", "block_z")] == [1, 1, 1]
        assert f".reqntid {launch['block_x']}" in ptx
        assert scalars == 0
        entry = ptx.split(f".entry {kernel_name}(")[1].split(")")[0]
        assert entry.count(".param") == len(given) + 1
        assert ".target sm_87" in ptx


def test_a_later_call_changes_the_gpu(tensorrt: ModuleType) -> None:
    register("swiglu", EXPERTS, 87)
    register("swiglu", EXPERTS, 89)
    build = Build(tensorrt, f"medmoe_swiglu_{EXPERTS}::RoutedOutput", inputs("output", None))
    build.result(dynamic=T * SLOTS)
    build.tactics()
    assert ".target sm_89" in build.launch(1)[3]


def test_activations_in_fp32_are_refused(tensorrt: ModuleType) -> None:
    register("swiglu", EXPERTS, 87)
    given = inputs("output", None, FLOAT)
    build = Build(tensorrt, f"medmoe_swiglu_{EXPERTS}::RoutedOutput", given)
    build.result(dynamic=T * SLOTS)
    build.tactics()
    with pytest.raises(ConfigError, match="activations in FLOAT"):
        build.launch(1)


def test_scales_turned_half_are_refused(tensorrt: ModuleType) -> None:
    register("swiglu", EXPERTS, 87)
    given = [(dims, HALF if kind == FLOAT else kind) for dims, kind in inputs("hidden", None)]
    build = Build(tensorrt, f"medmoe_swiglu_{EXPERTS}::RoutedHidden", given)
    build.result(dynamic=T * SLOTS)
    build.tactics()
    with pytest.raises(ConfigError, match="gate_scale_0 is HALF, not FLOAT"):
        build.launch(1)


# What the builder and the runtime use of the C++ bindings, in every version.
USED = (
    *("STRONGLY_TYPED", "build_serialized_network", "parse_from_file", "get_error"),
    *("set_memory_pool_limit", "progress_monitor", "IProgressMonitor", "WORKSPACE"),
    *("create_optimization_profile", "add_optimization_profile", "set_timing_cache"),
    *("deserialize_cuda_engine", "create_execution_context", "ON_PROFILE_CHANGE"),
    *("set_optimization_profile_async", "set_tensor_address", "set_input_shape"),
    "execute_async_v3",
)


@pytest.mark.parametrize("version", ["10.3", *PLUGIN_VERSIONS])
def test_the_bindings_have_what_is_used(version: str) -> None:
    folder = bindings(version)
    if folder is None:
        pytest.skip(f"needs the bindings of TensorRT {version}: .ci/bindings FOLDER")
    (library,) = folder.glob("tensorrt.*")
    content = library.read_bytes()
    assert [name for name in USED if name.encode() not in content] == []
    streams = b"buildSerializedNetworkToStream" in content
    assert streams == (version not in ("10.3", "10.9"))  # before, a plan is built at once
    assert (folder / "plugin").is_dir() == (version != "10.3")


def test_without_tensorrt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"medmoe-edge\[tensorrt\]"):
        register("swiglu", EXPERTS, 87)


def test_plugins_that_cannot_be_loaded_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))  # without its plugin part
    with pytest.raises(ResourceError, match="its plugins cannot be loaded") as error:
        register("swiglu", EXPERTS, 87)
    assert "10.9" in error.value.remedy
