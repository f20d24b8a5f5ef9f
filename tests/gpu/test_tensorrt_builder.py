"""Real engines of TensorRT for RTX, built with no GPU; nothing runs here."""

import contextlib
import io
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from engine_graphs import Decoder, Sizes

from medmoe_edge.errors import (
    ConfigError,
    MissingDependencyError,
    ModelError,
    ResourceError,
)
from medmoe_edge.export import tensorrt_builder
from medmoe_edge.export.gpus import (
    Library,
    check_memory,
    find_gpu,
    load_library,
    make_logger,
    reason,
)
from medmoe_edge.export.tensorrt_builder import (
    Built,
    build_engine,
    layer_of,
    load_timings,
    save_timings,
)

Build = Callable[..., Built]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    folder = tmp_path / "graph"
    folder.mkdir()
    return Decoder().write(folder)


@pytest.fixture
def build(trt: Any, tmp_path: Path) -> Build:
    """Builds a graph to `out/decoder.engine`, with a cache of the test's own."""
    (tmp_path / "out").mkdir()

    def run(graph: Path, *, gpu: str = "sm89", sizes: Sizes | None = None, **more: Any) -> Built:
        more.setdefault("profiles", (sizes or Sizes()).profiles)
        return build_engine(
            graph,
            tmp_path / "out" / "decoder.engine",
            library="tensorrt-rtx",
            gpu=find_gpu(gpu, "tensorrt-rtx"),
            cache=tmp_path / "cache",
            **more,
        )

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of TensorRT's work, where only the files around it matter."""

    def run(self: Any, *arguments: Any) -> None:
        arguments[-1].write(f"engine for {self.gpu.sm}".encode())

    monkeypatch.setattr(tensorrt_builder._Build, "run", run)


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("gpu", ["sm86", "rtx-4090", "sm120"])
def test_a_decoder_of_two_profiles_is_built(build: Build, graph: Path, gpu: str) -> None:
    built = build(graph, gpu=gpu)
    assert built.path.read_bytes()[:4] == b"vtrt"
    assert built.bytes == built.path.stat().st_size
    assert built.peak_memory is None or built.peak_memory > built.bytes
    assert not built.cached


def test_a_decoder_in_bf16_is_built(build: Build, tmp_path: Path) -> None:
    assert build(Decoder().write(tmp_path, ir.DataType.BFLOAT16)).bytes > 0


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, None)])
def test_quantised_weights_stay_as_small_as_they_are(
    build: Build, tmp_path: Path, bits: int, group: int | None
) -> None:
    weights = 512 * 1024
    integers = np.random.default_rng(0).integers(-7, 8, (512, 1024)).astype(np.int8)
    graph = product(tmp_path / "product.onnx", integers, bits, group)
    built = build(graph, profiles=product_profiles())
    groups = 512 // group if group else 1
    stored = weights * bits // 8 + groups * 1024 * 2
    assert stored <= built.bytes < stored + 300_000  # fp16 weights would take 1 MB more, or 3


def product_profiles() -> list[dict[str, Any]]:
    return [{"x": ((1, 512), (8, 512), (64, 512))}, {"x": ((1, 512),) * 3}]


def product(path: Path, integers: Any, bits: int, group: int | None) -> Path:
    """`x` `[S, K]` times a quantised matrix `[K, N]`, in fp16, as a file."""
    helper, kinds = onnx.helper, {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}
    width, channels = integers.shape
    shape = [width // group, channels] if group else [channels]
    form: Any = {"axis": 0, "block_size": group} if group else {"axis": 1}
    fp16 = onnx.TensorProto.FLOAT16
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["f"], **form),
            helper.make_node("MatMul", ["x", "f"], ["y"]),
        ],
        "product",
        [helper.make_tensor_value_info("x", fp16, ["S", width])],
        [helper.make_tensor_value_info("y", fp16, ["S", channels])],
        [
            helper.make_tensor("w", kinds[bits], integers.shape, integers.ravel()),
            onnx.numpy_helper.from_array(np.full(shape, 0.01, np.float16), "s"),
        ],
    )
    imports = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def test_the_second_build_comes_from_the_cache(build: Build, graph: Path) -> None:
    first = build(graph)
    content = first.path.read_bytes()
    second = build(graph)
    assert (second.cached, second.path.read_bytes()) == (True, content)
    assert second.seconds < first.seconds


@pytest.mark.parametrize("change", ["weights", "profiles", "gpu", "limit", "kernels"])
@pytest.mark.usefixtures("quick")
def test_what_an_engine_is_built_from_is_its_key(
    build: Build, graph: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(graph)
    changes: dict[str, dict[str, Any]] = {
        "weights": {},
        "profiles": {"sizes": Sizes(prefill=4)},
        "gpu": {"gpu": "sm120"},
        "limit": {"memory_limit": 2**30},
        "kernels": {},
    }
    if change == "kernels":  # of our plugin: they come with the package
        monkeypatch.setattr(tensorrt_builder, "__version__", "0.0.0")
    if change == "weights":
        data = bytearray((graph.parent / "decoder.data").read_bytes())
        data[100] ^= 1
        (graph.parent / "decoder.data").write_bytes(data)
    assert not build(graph, **changes[change]).cached


@pytest.mark.usefixtures("quick")
def test_a_damaged_engine_in_the_cache_is_built_again(
    build: Build, graph: Path, tmp_path: Path
) -> None:
    build(graph)
    (kept,) = (tmp_path / "cache").glob("*.engine")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert not build(graph).cached
    assert build(graph).cached


@pytest.mark.usefixtures("quick")
def test_the_cache_keeps_what_was_used_last(
    build: Build, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_builder, "KEPT", 2)
    for gpu in ("sm86", "sm89", "sm86", "sm120"):
        build(graph, gpu=gpu)
    assert len(list((tmp_path / "cache").glob("*.engine"))) == 2
    assert build(graph, gpu="sm86").cached
    assert not build(graph, gpu="sm89").cached


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_costs_no_engine(
    build: Build, graph: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert build(graph).path.read_bytes() == b"engine for sm89"
    assert "is not kept" in caplog.text


def test_progress_is_of_the_outermost_phases(build: Build, graph: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build(graph, progress=lambda *step: seen.append(step))
    outermost, done, total = seen[0]
    assert (done, total > 1) == (0, True)
    steps = [done for name, done, _ in seen if name == outermost]
    assert steps == sorted(steps)
    assert len(steps) > 1
    assert all(0 <= done <= total for _, done, total in seen)
    assert 1 < len({name for name, _, _ in seen}) < 10  # not every kernel that is tried


def test_ctrl_c_leaves_the_engine_that_was_there(build: Build, graph: Path, tmp_path: Path) -> None:
    good = tmp_path / "out" / "decoder.engine"
    good.write_bytes(b"good")
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(graph, progress=interrupt)
    assert (left(tmp_path), good.read_bytes()) == (["decoder.engine"], b"good")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list((tmp_path / "cache").glob("*"))


def test_an_error_of_the_progress_stops_the_build(
    build: Build, graph: Path, tmp_path: Path
) -> None:
    calls = []

    def fail(*step: object) -> None:
        calls.append(step)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        build(graph, progress=fail)
    assert (len(calls), left(tmp_path)) == (1, [])


def test_a_build_works_beside_the_main_thread(build: Build, graph: Path) -> None:
    built: list[Built] = []
    thread = threading.Thread(target=lambda: built.append(build(graph)))
    thread.start()
    thread.join()
    assert built[0].bytes > 0


def refusal(build: Build, tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> ModelError:
    """What a decoder with a changed graph is refused with."""
    path = Decoder().write(tmp_path)
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)
    with pytest.raises(ModelError) as caught:
        build(path)
    assert left(tmp_path) == []
    return caught.value


EXPERT = "decoder.layers.0.ffn.experts.1.weight"


def expert_product(model: onnx.ModelProto) -> Any:
    """The product with an expert's matrix."""
    (name,) = (node.output[0] for node in model.graph.node if EXPERT in node.input)
    (product,) = (node for node in model.graph.node if name in node.input)
    return product


def test_an_unknown_op_is_named_with_its_layer(build: Build, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = expert_product(model)
        node.op_type, node.domain, node.name = "Unheard", "medmoe", "node_of_expert_1"
        model.opset_import.append(onnx.helper.make_opsetid("medmoe", 1))

    what = refusal(build, tmp_path, change).what
    assert "op medmoe::Unheard of node 'node_of_expert_1'" in what
    assert "at decoder.layers.0.ffn.experts.1: " in what
    assert "Plugin not found" in what
    assert "\n" not in what


def test_an_unsupported_type_is_named_with_its_layer(build: Build, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == EXPERT:
                tensor.data_type = onnx.TensorProto.UINT8

    what = refusal(build, tmp_path, change).what
    assert "op DequantizeLinear" in what
    assert "at decoder.layers.0.ffn.experts.1: " in what
    assert "UINT8" in what


def test_shapes_that_do_not_fit_are_named_with_their_layer(build: Build, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == EXPERT:
                tensor.dims[:] = [tensor.dims[0] // 2, tensor.dims[1]]
                for entry in tensor.external_data:
                    if entry.key == "length":
                        entry.value = str(int(entry.value) // 2)

    what = refusal(build, tmp_path, change).what
    assert "op MatMul" in what
    assert "at decoder.layers.0.ffn.experts.1: " in what
    assert "must match" in what
    assert "CUDA" not in what  # that there is no driver is not the reason


def test_the_layer_of_a_node_without_weights_is_the_nearest_above() -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["y"]),
        helper.make_node("Softmax", ["y"], ["z"]),
        helper.make_node("Neg", ["x"], ["n"]),
    ]
    weight = onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), "a.weight")
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], [weight]))
    assert [layer_of(model, node) for node in nodes] == ["a", "a", ""]


def test_what_the_gpu_cannot_compute_is_said(
    build: Build, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmoe_edge.export import gpus as gpu_presets

    monkeypatch.setattr(gpu_presets, "TURING", 0)  # a GPU that the presets refuse
    monkeypatch.setattr(gpu_presets, "RTX_CAPABILITIES", (75,))
    with pytest.raises(ModelError, match=r"cannot build this for sm75: .*FP32 GEMM"):
        build(graph, gpu="sm75")


def test_too_little_memory_on_the_gpu(build: Build, graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="within 1e-05 MB") as caught:
        build(graph, memory_limit=10)
    assert caught.value.remedy == "Allow more, or leave the limit out."
    assert left(tmp_path) == []


def test_too_little_memory_here(
    build: Build, graph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt_builder, "available_memory", lambda: 10**6)
    with pytest.raises(ResourceError, match="needs about 419 MB of memory, 1 MB are free"):
        build(graph)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("available", "fits"), [(3 * 10**9, False), (4 * 10**9, True), (None, True)]
)
def test_a_build_needs_three_times_the_weights(available: int | None, fits: bool) -> None:
    if fits:
        check_memory(10**9, available)
    else:
        with pytest.raises(ResourceError):
            check_memory(10**9, available)


def test_a_full_disk_is_said(
    build: Build, graph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorrt_builder, "atomic_file", lambda out: contextlib.nullcontext(Full()))
    with pytest.raises(ResourceError, match="No space left on device"):
        build(graph)
    assert left(tmp_path) == []


def test_tensorrt_proper_builds_only_on_the_gpu_itself(
    trt: Any, graph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(tensorrt_builder, "load_library", lambda name: trt)
    with pytest.raises(ResourceError, match="builds on the GPU that will run the engine"):
        build_engine(
            graph,
            tmp_path / "decoder.engine",
            library="tensorrt",
            gpu=find_gpu("orin-nano-8g", "tensorrt"),
            profiles=Sizes().profiles,
            cache=tmp_path / "cache",
        )
    assert not (tmp_path / "decoder.engine").exists()


def test_impossible_profiles_are_refused(build: Build, graph: Path) -> None:
    with pytest.raises(ConfigError, match="cannot have the shapes"):
        build(graph, profiles=[{"embeds": ((1, 8, 32), (1, 4, 32), (1, 2, 32))}])


def test_a_damaged_graph_is_refused(build: Build, graph: Path) -> None:
    graph.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="is no ONNX graph"):
        build(graph)


def test_a_graph_without_its_weights_is_refused(build: Build, graph: Path) -> None:
    (graph.parent / "decoder.data").unlink()
    with pytest.raises(ModelError, match=r"lacks its weights, decoder\.data"):
        build(graph)


@pytest.mark.parametrize(
    ("library", "package", "extra"),
    [("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "rtx"), ("tensorrt", "tensorrt", "tensorrt")],
)
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, library: Library, package: str, extra: str
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingDependencyError, match=rf"'{package}'.*\[{extra}\]"):
        load_library(library)


def test_a_broken_library_is_no_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ResourceError, match=r"cannot be loaded .*libnvinfer"):
        load_library("tensorrt")


def test_messages_go_to_logging_and_only_errors_are_collected(
    trt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    log = make_logger(trt)
    with caplog.at_level(logging.DEBUG, "medmoe_edge"):
        log.log(trt.ILogger.ERROR, "bad")
        log.log(trt.ILogger.ERROR, "CUDA driver version is insufficient for CUDA runtime version")
        log.log(trt.ILogger.WARNING, "so so")
    assert log.errors == ["bad"]
    assert [record.levelname for record in caplog.records] == ["INFO", "DEBUG", "DEBUG"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Assertion failed: x > 0", "x > 0"),
        (
            "I::f: Error Code 4: API Usage Error (node_8: no. In validate at /a.cpp:38)",
            "node_8: no",
        ),
        (
            "Invalid Node - n\nI::f: Error Code 2: Internal Error (why (not). In f at /a:1)",
            "why (not)",
        ),
        ("", "it does not say why"),
    ],
)
def test_the_reason_is_what_the_message_says(message: str, words: str) -> None:
    assert reason(message) == words


def test_timings_that_cannot_be_kept_cost_no_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    save_timings(Mock(), tmp_path / "cache" / "timings.cache")
    assert "not kept" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # to the library for RTX they are nothing
def test_timings_are_kept_and_given_back(trt: Any, tmp_path: Path) -> None:
    config = trt.Builder(make_logger(trt)).create_builder_config()
    path = tmp_path / "new" / "timings.cache"
    load_timings(config, path)
    save_timings(config, path)
    assert path.stat().st_size > 0
    load_timings(config, path)
