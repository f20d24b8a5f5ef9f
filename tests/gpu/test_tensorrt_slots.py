"""Experts of an engine in slots: its graph, run by ONNX Runtime's CPU where there is no GPU.

The runtime, its slots and its replays are the real ones, over the strict fake device of
`test_tensorrt_runtime`. What needs TensorRT on a GPU was not executed.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from graphs import PAGED, in_steps, normal
from test_tensorrt_runtime import FakeDevice

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle, Target, write_derived_manifest
from medmoe_edge.embedded import bundle_path
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import (
    BundleError,
    CheckpointError,
    InputError,
    ResourceError,
)
from medmoe_edge.evaluation.targets import GraphRuntime, as_written
from medmoe_edge.export.builder import FILE, PAGE
from medmoe_edge.export.gpus import make_logger
from medmoe_edge.export.targets import export_target, plan_target, write_graphs
from medmoe_edge.export.tensorrt_builder import parse
from medmoe_edge.runtimes.base import Cache, Step
from medmoe_edge.runtimes.paging.pager import ExpertPager
from medmoe_edge.runtimes.slots.slots import Chosen, Table
from medmoe_edge.runtimes.tensorrt.runtime import PagedTensorRTRuntime

Make = Callable[..., Path]
STEPS = (17, 5, 1, 1, 1)
POSITIONS = 40
TARGET = Target("tensorrt-rtx", "fp16", "sm89", "1.7.1", POSITIONS, POSITIONS, paged=True)


class GraphContext:
    """Runs a graph out of the memory at the addresses that are bound when it is launched."""

    def __init__(self, device: FakeDevice, path: Path) -> None:
        self.device, self.launches = device, 0
        self.session = ort.InferenceSession(path, as_written(), providers=["CPUExecutionProvider"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        bound = {name: self.device.memory[address] for name, address in self.addresses.items()}
        shapes = dict(self.shapes)
        self.launches += 1
        self.device.put(lambda: self._compute(bound, shapes))
        return True

    def _compute(
        self, bound: dict[str, npt.NDArray[np.uint8]], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        feeds = {}
        for value in self.session.get_inputs():
            shape = shapes.get(value.name) or tuple(value.shape)
            dtype = np.dtype(TYPES[value.type])
            size = int(np.prod(shape)) * dtype.itemsize
            feeds[value.name] = bound[value.name][:size].view(dtype).reshape(shape).copy()
        names = [value.name for value in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            bound[name][: len(content)] = content


TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class GraphEngine:
    """An engine that is a graph; both profiles share its session."""

    def __init__(self, device: FakeDevice, path: Path) -> None:
        self.device, self.path = device, path
        self.contexts: list[GraphContext] = []

    def context(self, profile: int) -> GraphContext:
        self.contexts.append(GraphContext(self.device, self.path))
        return self.contexts[-1]


class Recorded(PagedTensorRTRuntime):
    """Remembers into which parts its steps were cut."""

    parts: dict[int, int]

    def _run_with(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        self.__dict__.setdefault("parts", {})[cache.length] = len(embeds)
        return super()._run_with(embeds, cache, table)


@pytest.fixture(scope="module")
def paged(tiny_bundle: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A bundle for an engine, which holds the graphs in the place of engines; made once."""
    made: dict[str, Bundle] = {}

    def make(precision: str, preset: str = "tiny", **moe: Any) -> Bundle:
        key = repr((precision, preset, moe))
        if key not in made:
            portable = Bundle.open(tiny_bundle(precision, preset, **moe))
            folder = tmp_path_factory.mktemp("paged")
            for name in ("tokenizer.json", "embedding.npy"):
                (folder / name).write_bytes(portable.path(name).read_bytes())
            write_derived_manifest(folder, portable, TARGET, write_graphs(portable, TARGET, folder))
            made[key] = Bundle.open(folder)
        return made[key]

    return make


def runtime_of(
    bundle: Bundle, budget: int | str, *, unified: bool = False
) -> tuple[Recorded, FakeDevice]:
    device = FakeDevice(unified=unified)
    runtime = Recorded(
        bundle,
        budget,
        device=device,
        open_engine=lambda name: GraphEngine(device, bundle.path(name.replace("engine", "onnx"))),
    )
    return runtime, device


def least(bundle: Bundle) -> int:
    with pytest.raises(InputError, match="is too small") as caught:
        runtime_of(bundle, 1)
    return int(caught.value.remedy.split(" take ")[1].split()[0].replace(",", ""))


# --- the same bits ----------------------------------------------------------------------------


def check(runtime: Recorded, everything: Recorded, lengths: tuple[int, ...]) -> list[Step]:
    """The bits of all experts in slots, of the same parts, which are returned."""
    found = in_steps(runtime, lengths)
    parts = tuple(runtime.parts[begin] for begin in sorted(runtime.parts))
    wanted = in_steps(everything, parts)
    routing = np.concatenate([step.router_logits for step in wanted])
    assert np.concatenate([step.router_logits for step in found]).tobytes() == routing.tobytes()
    ends = np.cumsum(parts).tolist()
    for step, end in zip(found, np.cumsum(lengths).tolist(), strict=True):
        assert step.logits.tobytes() == wanted[ends.index(end)].logits.tobytes()
    return wanted


@pytest.mark.parametrize(("precision", "preset", "moe"), PAGED)
def test_steps_give_the_bits_of_all_experts_in_slots(
    paged: Callable[..., Bundle], precision: str, preset: str, moe: dict[str, Any]
) -> None:
    """In a memory that is copied to, and in unified one."""
    bundle = paged(precision, preset, **moe)
    everything, _ = runtime_of(bundle, "100%")
    in_steps(everything, STEPS)
    assert tuple(everything.parts.values()) == STEPS  # nothing was cut
    for budget, unified in (("50%", True), ("50%", False), (least(bundle), False)):
        runtime, device = runtime_of(bundle, budget, unified=unified)
        check(runtime, everything, STEPS)
        slots = runtime.requests.slots
        assert slots.experts.pager.used <= slots.experts.pager.budget
        assert (slots.store.host_bytes == 0) == unified
        assert device.captures == 1


@pytest.mark.parametrize(("precision", "preset", "moe"), PAGED)
def test_the_graph_computes_what_the_one_with_constants_does(
    tiny_bundle: Make,
    paged: Callable[..., Bundle],
    tmp_path: Path,
    precision: str,
    preset: str,
    moe: dict[str, Any],
) -> None:
    """But for the rounding of products of other shapes."""
    portable = Bundle.open(tiny_bundle(precision, preset, **moe))
    write_graphs(portable, replace(TARGET, paged=False), tmp_path)
    constants = GraphRuntime(portable, tmp_path / "vision.onnx", tmp_path / "decoder.onnx")
    runtime, _ = runtime_of(paged(precision, preset, **moe), "100%")
    for found, wanted in zip(in_steps(runtime, STEPS), in_steps(constants, STEPS), strict=True):
        bound = 5e-3 * np.abs(wanted.logits).max()
        np.testing.assert_allclose(found.logits, wanted.logits, atol=bound)
        chosen = (step.router_logits.argmax(-1) for step in (found, wanted))
        np.testing.assert_array_equal(*chosen)


def test_a_captured_step_stays_right_while_experts_come_and_go(
    paged: Callable[..., Bundle],
) -> None:
    """Two requests in turns, each with a captured graph, over the fewest slots."""
    bundle = paged("int8", top_k=2)
    size = bundle.config.decoder.hidden_size
    inputs = [normal(12, size, seed=seed) for seed in (1, 2)]
    everything, _ = runtime_of(bundle, "100%")
    few, device = runtime_of(bundle, least(bundle))
    caches = [[runtime.new_cache(12) for _ in inputs] for runtime in (everything, few)]
    for at in range(12):
        for which, x in enumerate(inputs):
            steps = [
                runtime.step(x[at : at + 1], own[which])
                for runtime, own in zip((everything, few), caches, strict=True)
            ]
            assert steps[0].logits.tobytes() == steps[1].logits.tobytes()
    assert device.captures == 2
    report = few.paging()
    assert report["replays"] > 0
    assert report["hits"] > 0
    assert everything.paging()["replays"] < report["replays"]


def test_absent_experts_leave_no_trace_even_of_no_numbers(paged: Callable[..., Bundle]) -> None:
    bundle = paged("fp32", "tiny-phi")
    runtime, device = runtime_of(bundle, "75%")
    for address in runtime.requests.slots.store.pools.addresses.values():
        device.memory[address][:] = 0xFF  # NaN, in fp16
    for step in check(runtime, runtime_of(bundle, "100%")[0], (2, 3, 5, 1)):
        assert np.isfinite(step.logits).all()


def test_an_image_tells_what_is_fetched_and_the_report_what_came_of_it(
    paged: Callable[..., Bundle],
) -> None:
    runtime, _ = runtime_of(paged("int8"), "60%")
    side = runtime.config.vision.image_size
    tokens = runtime.encode_image(np.zeros((1, 3, side, side), np.float32))
    cache = runtime.new_cache(len(tokens) + 1)
    runtime.step(tokens, cache)
    runtime.step(tokens[:1], cache)
    report = runtime.paging()
    json.dumps(report)
    assert report["hits"] + report["misses"] > 0
    assert runtime.paging()["hits"] == runtime.paging()["loads"] == 0


# --- what is stored ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_each_expert_is_one_extent_with_its_hash(
    paged: Callable[..., Bundle], precision: str
) -> None:
    bundle = paged(precision)
    data, moe = bundle.path(FILE).read_bytes(), bundle.config.moe
    assert moe is not None
    paging, extents = bundle.manifest["paging"], bundle.manifest["experts"]
    assert len(extents) == len(moe.layers) * moe.num_experts
    size = sum(kind["bytes"] for kind in paging["slots"].values())
    for owner, (offset, length) in extents.items():
        assert (offset % PAGE, length) == (0, size)
        content = data[offset : offset + length]
        assert hashlib.sha256(content).hexdigest() == paging["experts"][owner]["sha256"]
    for kind in paging["slots"].values():
        width = 2 if kind["dtype"] == "bfloat16" else np.dtype(kind["dtype"]).itemsize
        assert kind["bytes"] == width * int(np.prod(kind["shape"]))
    matrix = bundle.config.decoder.hidden_size * bundle.config.decoder.intermediate_size
    bits = {"int8": 8, "int4": 4, "fp32": 16}[precision]
    assert paging["slots"]["slots.up.weight"]["bytes"] == matrix * bits // 8
    assert b"experts.0.up.weight" not in bundle.path("decoder.onnx").read_bytes()


def test_a_corrupted_expert_fails_its_request_and_no_other(
    paged: Callable[..., Bundle], tmp_path: Path
) -> None:
    source = paged("int8")
    for path in source.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bundle = Bundle.open(tmp_path)
    wanted = in_steps(runtime_of(bundle, "100%")[0], STEPS)
    runtime, _ = runtime_of(bundle, "100%")
    intact = (tmp_path / FILE).read_bytes()
    offset, size = bundle.manifest["experts"]["decoder.layers.2.ffn.experts.1"]
    for at in (offset, offset + size - 1):  # in the first kind and in the last
        changed = bytearray(intact)
        changed[at] ^= 1
        (tmp_path / FILE).write_bytes(changed)
        with pytest.raises(BundleError, match=r"Expert 1 of layer 2 in .* was changed"):
            in_steps(runtime, STEPS)
    (tmp_path / FILE).write_bytes(intact)
    for step, right in zip(in_steps(runtime, STEPS), wanted, strict=True):
        assert step.logits.tobytes() == right.logits.tobytes()


# --- TensorRT -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("trt")
def test_nanos_engine_is_built_for_any_number_of_slots(tmp_path: Path) -> None:
    portable = Bundle.open(bundle_path("nano"))
    target = plan_target(portable, "tensorrt-rtx", gpu="sm89", paged=True)
    built = export_target(portable, tmp_path / "out", target)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.target == target
    assert not built["decoder"].cached
    assert bundle.path("decoder.engine").read_bytes()[:4] == b"vtrt"
    assert str(bundle.target) == "tensorrt-rtx sm89 fp16 paged"
    with pytest.raises(ResourceError):  # no GPU here
        load(bundle.folder, memory_budget="50%")
    with pytest.raises(InputError, match="cannot share"):
        load(bundle.folder, memory_budget=ExpertPager(10**9))


def test_the_engines_inputs_are_slots_and_its_outputs_what_was_chosen(
    trt: Any, paged: Callable[..., Bundle]
) -> None:
    bundle = paged("int4", "tiny", top_k=2, use_residual=True)
    moe, log = bundle.config.moe, make_logger(trt)
    assert moe is not None
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = parse(trt, network, log, bundle.path("decoder.onnx"), "TensorRT")
    inputs = {v.name: v for v in map(network.get_input, range(network.num_inputs))}
    outputs = {v.name: v for v in map(network.get_output, range(network.num_outputs))}
    slots = bundle.manifest["paging"]["slots"]
    assert {name for name in inputs if name.startswith("slots.")} == set(slots)
    for name, kind in slots.items():
        assert list(inputs[name].shape) == [-1, *kind["shape"]]
        wanted = {"int8": trt.int8, "float16": trt.float16, "float32": trt.float32}[kind["dtype"]]
        assert inputs[name].dtype == wanted
    assert list(inputs["table"].shape) == [len(moe.layers), moe.num_experts]
    assert inputs["table"].dtype == trt.int32
    for layer in range(len(moe.layers)):
        assert list(outputs[f"chosen.{layer}"].shape) == [1, -1, moe.top_k]
        assert outputs[f"chosen.{layer}"].dtype == trt.int64
    del parser


# --- what is refused --------------------------------------------------------------------------


def test_experts_of_unlike_formats_are_refused(unlike_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stored otherwise"):
        write_graphs(Bundle.open(unlike_bundle), TARGET, tmp_path)


def test_what_cannot_be_paged_says_so(tiny_bundle: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no experts to page"):
        plan_target(
            Bundle.open(tiny_bundle("fp32", dense=True)), "tensorrt-rtx", gpu="sm89", paged=True
        )
    portable = Bundle.open(tiny_bundle("int8"))
    with pytest.raises(InputError, match="pages experts in fp16 only"):
        plan_target(portable, "onnxruntime-cuda", paged=True)
    whole = Target("tensorrt-rtx", "fp16", "sm89", "1.7.1", POSITIONS, POSITIONS)
    for name in ("tokenizer.json", "embedding.npy"):
        (tmp_path / name).write_bytes(portable.path(name).read_bytes())
    write_derived_manifest(tmp_path, portable, whole, {})
    with pytest.raises(InputError, match="with all experts in memory") as caught:
        load(tmp_path, memory_budget="50%")
    assert "--paged" in caught.value.remedy


def test_bf16_weights_are_stored_in_bf16(tiny_bundle: Make, tmp_path: Path) -> None:
    portable = Bundle.open(tiny_bundle("fp32"))
    places = write_graphs(portable, replace(TARGET, dtype="bf16"), tmp_path)
    kind = places["paging"]["slots"]["slots.up.weight"]
    assert (kind["dtype"], kind["bytes"]) == ("bfloat16", 2 * int(np.prod(kind["shape"])))
    offset, _ = places["experts"]["decoder.layers.0.ffn.experts.0"]
    content = (tmp_path / FILE).read_bytes()[offset:][: kind["bytes"]]
    values = np.frombuffer(content, ml_dtypes.bfloat16).astype(np.float32)
    assert 0 < np.abs(values).max() < 10
