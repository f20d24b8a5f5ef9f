"""The TensorRT runtime over a device made of NumPy arrays: what goes where, when, and what replays.

The fake is as strict as CUDA: work happens only when the stream is waited for, host and device are
different memory, fresh device memory is not zero unless asked for, and a captured graph holds the
addresses that were bound when it was captured. What needs a real engine is marked `gpu`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from engine_graphs import Decoder, Floats

from medmoe_edge.bundle.bundle import Target
from medmoe_edge.config import MoEConfig
from medmoe_edge.errors import BundleError, InputError, MissingDependencyError, ResourceError
from medmoe_edge.export.gpus import load_library
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.paging.pager import Bytes
from medmoe_edge.runtimes.slots.slots import Event
from medmoe_edge.runtimes.tensorrt.device import CudaDevice
from medmoe_edge.runtimes.tensorrt.runtime import (
    TensorRTCache,
    TensorRTEngine,
    TensorRTRuntime,
    check_target,
)

DECODER = Decoder()
SIZES = DECODER.sizes
TARGET = Target("tensorrt-rtx", "fp16", "sm89", "1.7.1", SIZES.capacity, SIZES.prefill)


class Sent:
    def wait(self) -> None:
        pass


class FakeBuffer:
    def __init__(self, device: "FakeDevice", size: int) -> None:
        self.array = np.zeros(size, np.uint8)
        self.address = 4096 + sum(array.nbytes + 1 for array in device.memory.values())
        device.memory[self.address] = self.array


class FakeMirror(FakeBuffer):
    def __init__(self, device: "FakeDevice", shape: tuple[int, ...], dtype: Any) -> None:
        self.host = np.full(shape, 77, dtype)  # what was never written is not right by chance
        super().__init__(device, self.host.nbytes)
        self.device = device

    def upload(self) -> None:
        self.device.put(lambda: np.copyto(self.array, self.host.reshape(-1).view(np.uint8)))

    def download(self) -> None:
        self.device.put(lambda: np.copyto(self.host.reshape(-1).view(np.uint8), self.array))


class FakeDevice:
    sm = "sm89"
    stream = 5

    def __init__(self, *, unified: bool = False) -> None:
        self.unified = unified
        self.memory: dict[int, npt.NDArray[np.uint8]] = {}
        self.queue: list[Callable[[], None]] = []
        self.captures = 0

    def put(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def zeros(self, size: int) -> FakeBuffer:
        return FakeBuffer(self, size)

    def mirror(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> FakeMirror:
        return FakeMirror(self, shape, dtype)

    def pinned(self, size: int) -> Bytes:
        array = np.zeros(size, np.uint8)
        self.memory[array.ctypes.data] = array
        return array

    def send(self, source: Bytes, address: int) -> Event:
        begin, array = next(
            (begin, array)
            for begin, array in self.memory.items()
            if begin <= address < begin + max(1, array.nbytes)
        )
        array[address - begin :][: source.nbytes] = source
        return Sent()

    def synchronise(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        assert not self.queue, "captured beside work in flight"
        work()
        recorded, self.queue = self.queue, []
        self.captures += 1
        return lambda: self.queue.extend(recorded)


class FakeContext:
    """Computes what `Decoder` does, out of the memory at the addresses bound to it."""

    def __init__(self, device: FakeDevice, profile: int, in_place: bool = True) -> None:
        self.device, self.profile, self.in_place = device, profile, in_place
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.launches: list[int] = []
        self.fails = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = SIZES.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == FakeDevice.stream
        bound = {name: self.device.memory[address] for name, address in self.addresses.items()}
        tokens = self.shapes["embeds"][1]
        self.launches.append(tokens)
        self.device.put(lambda: self._compute(bound, tokens))
        return not self.fails

    def _compute(self, bound: dict[str, npt.NDArray[np.uint8]], tokens: int) -> None:
        for kind in ("key", "value"):
            past, present = bound[f"past_{kind}.0"], bound[f"present_{kind}.0"]
            assert (past is present) == self.in_place, "written elsewhere, or where it is read"
            present[:] = past
        (start,) = bound["start"].view(np.int64)
        x = bound["embeds"].view(np.float32).reshape(-1, SIZES.hidden)[:tokens]
        keys = bound["present_key.0"].view(np.float16).reshape(SIZES.capacity, SIZES.hidden)
        keys[start : start + tokens] = x
        bound["present_value.0"].view(np.float16)[:] = keys.ravel() / 2
        logits, _ = DECODER.reference(keys[: start + tokens].astype(np.float32))
        bound["logits"].view(np.float32)[:] = logits
        routing = x @ DECODER.router
        bound["router_logits"].view(np.float32)[: routing.size] = routing.ravel()


class FakeEngine:
    def __init__(self, device: FakeDevice, in_place: bool = True) -> None:
        self.contexts = [FakeContext(device, profile, in_place) for profile in (0, 1)]

    def context(self, profile: int) -> FakeContext:
        return self.contexts[profile]


@dataclasses.dataclass
class Rig:
    """A runtime with the fakes below it."""

    runtime: TensorRTRuntime
    device: FakeDevice
    engine: FakeEngine

    def steps(self, x: Floats, cache: TensorRTCache, *lengths: int) -> list[Any]:
        """Runs `x` in steps of the lengths given."""
        ends = np.cumsum(lengths)
        return [
            self.runtime.step(x[end - length : end], cache)
            for end, length in zip(ends, lengths, strict=True)
        ]


def fake_bundle(folder: Path) -> Any:
    """As much of a bundle of `DECODER` as the runtime looks at."""
    base = PRESETS["tiny"]
    decoder = dataclasses.replace(
        base.decoder,
        hidden_size=SIZES.hidden,
        heads=1,
        layers=1,
        vocab_size=SIZES.vocabulary,
        max_positions=SIZES.capacity,
    )
    config = dataclasses.replace(base, decoder=decoder, moe=MoEConfig(layers=(0,), num_experts=2))
    table = np.random.default_rng(1).standard_normal((SIZES.vocabulary, SIZES.hidden))
    np.save(folder / "embedding.npy", table.astype(np.float16))
    return SimpleNamespace(
        config=config, target=TARGET, folder=folder, path=lambda name: folder / name
    )


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    device = FakeDevice()
    engine = FakeEngine(device)
    runtime = TensorRTRuntime(fake_bundle(tmp_path), device=device, open_engine=lambda name: engine)
    return Rig(runtime, device, engine)


def tokens(count: int, seed: int = 0) -> Floats:
    """Embeddings that fp16 holds exactly."""
    values = np.random.default_rng(seed).standard_normal((count, SIZES.hidden))
    return values.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    "lengths", [(1,), (8,), (5, 1, 1, 1), (9,), (16, 1, 1), (17, 1), (20, 3, 1), (1, 1, 1, 7)]
)
def test_steps_of_any_length_give_what_one_pass_does(rig: Rig, lengths: tuple[int, ...]) -> None:
    x = tokens(sum(lengths))
    steps = rig.steps(x, rig.runtime.new_cache(len(x)), *lengths)
    logits, routing = DECODER.reference(x)
    np.testing.assert_allclose(steps[-1].logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        np.concatenate([step.router_logits for step in steps]), routing, rtol=1e-4, atol=1e-5
    )
    for step, end in zip(steps, np.cumsum(lengths), strict=True):
        np.testing.assert_allclose(step.logits, DECODER.reference(x[:end])[0], atol=1e-3)


def test_a_long_prefill_goes_in_chunks_and_one_token_is_decoded(rig: Rig) -> None:
    rig.steps(tokens(17), rig.runtime.new_cache(17), 17)
    prefill, decode = rig.engine.contexts
    rig.steps(tokens(1), rig.runtime.new_cache(1), 1)
    assert (prefill.launches, decode.launches) == ([6, 6, 5], [1])


def test_decode_is_captured_once_and_replayed_where_the_token_stands(rig: Rig) -> None:
    x, cache = tokens(10), rig.runtime.new_cache(10)
    rig.steps(x, cache, 4, 1, 1, 1, 1, 1, 1)
    assert rig.device.captures == 1
    assert rig.engine.contexts[1].launches == [1, 1]  # one to settle, one recorded; then replays


def test_nothing_is_captured_before_tensorrt_allows_it(rig: Rig) -> None:
    allowed = [False, False, True]
    rig.engine.contexts[1].__dict__["is_stream_capturable"] = lambda stream: allowed.pop(0)
    x = tokens(8)
    steps = rig.steps(x, rig.runtime.new_cache(8), 3, 1, 1, 1, 1, 1)
    assert (rig.device.captures, allowed) == (1, [])
    np.testing.assert_allclose(steps[-1].logits, DECODER.reference(x)[0], atol=1e-3)


def test_an_engine_that_copies_its_cache_gets_a_second_one(tmp_path: Path) -> None:
    device = FakeDevice()
    engine = FakeEngine(device, in_place=False)
    bundle = fake_bundle(tmp_path)
    bundle.target = dataclasses.replace(
        TARGET, name="tensorrt", gpu="sm87", library_version="10.13.3"
    )
    runtime = TensorRTRuntime(bundle, device=device, open_engine=lambda name: engine)
    old, x = Rig(runtime, device, engine), tokens(12)
    cache = runtime.new_cache(12)
    steps = old.steps(x, cache, 4, 1, 1, 1, 1, 1, 1, 2)
    for step, end in zip(steps, (4, 5, 6, 7, 8, 9, 10, 12), strict=True):
        np.testing.assert_allclose(step.logits, DECODER.reference(x[:end])[0], atol=1e-3)
    assert device.captures == 2  # one for each of the two
    cache.length = 5
    assert np.abs(old.steps(x[5:], cache, 1)[0].logits - steps[2].logits).max() < 1e-3


class Half(FakeContext):
    """The first engine of two leaves what it was given plus one, the second takes one away."""

    def _compute(self, bound: dict[str, npt.NDArray[np.uint8]], tokens: int) -> None:
        if "hidden" in self.addresses:
            assert set(bound) == {"embeds", "start", "hidden", "past_key.0", "past_value.0"} | {
                "present_key.0",
                "present_value.0",
                "router_logits",
            }
            (start,) = bound["start"].view(np.int64)
            x = bound["embeds"].view(np.float32)
            bound["hidden"].view(np.float32)[: x.size] = x + 1
            routing = x.reshape(-1, SIZES.hidden)[:tokens] @ DECODER.router
            bound["router_logits"].view(np.float32)[: routing.size] = routing.ravel()
        else:
            assert "router_logits" not in bound  # its layer has no experts
            x = bound["embeds"].view(np.float32).reshape(-1, SIZES.hidden)[:tokens] - 1
            (start,) = bound["start"].view(np.int64)
            keys = bound["past_key.1"].view(np.float16).reshape(SIZES.capacity, SIZES.hidden)
            keys[start : start + tokens] = x
            logits, _ = DECODER.reference(keys[: start + tokens].astype(np.float32))
            bound["logits"].view(np.float32)[:] = logits


def test_a_decoder_in_two_engines_runs_as_one(tmp_path: Path) -> None:
    device, bundle, opened = FakeDevice(), fake_bundle(tmp_path), []
    decoder = dataclasses.replace(bundle.config.decoder, layers=2)
    bundle.config = dataclasses.replace(bundle.config, decoder=decoder)
    bundle.target = dataclasses.replace(TARGET, engines=2)
    engines = {}
    for name in bundle.target.decoders:
        engines[f"{name}.engine"] = engine = FakeEngine(device)
        engine.contexts = [Half(device, profile) for profile in (0, 1)]

    def open_engine(name: str) -> FakeEngine:
        opened.append(name)
        return engines[name]

    runtime = TensorRTRuntime(bundle, device=device, open_engine=open_engine)
    x, cache = tokens(12), runtime.new_cache(12)
    steps = Rig(runtime, device, engines["decoder.0.engine"]).steps(x, cache, 4, 1, 1, 1, 1, 4)
    for step, end in zip(steps, (4, 5, 6, 7, 8, 12), strict=True):
        logits, routing = DECODER.reference(x[:end])
        np.testing.assert_allclose(step.logits, logits, atol=1e-2)
        rows = len(step.router_logits)
        np.testing.assert_allclose(step.router_logits, routing[end - rows :], atol=1e-4)
    assert opened == ["decoder.0.engine", "decoder.1.engine"]
    assert device.captures == 1  # both in one graph


def test_every_cache_has_its_own_graph(rig: Rig) -> None:
    inputs = [tokens(8, seed=seed) for seed in (1, 2)]
    caches = [rig.runtime.new_cache(8) for _ in inputs]
    for end in range(1, 9):  # in turns
        for x, cache in zip(inputs, caches, strict=True):
            step = rig.runtime.step(x[end - 1 : end], cache)
            np.testing.assert_allclose(step.logits, DECODER.reference(x[:end])[0], atol=1e-3)
    assert rig.device.captures == 2


def test_setting_the_length_back_forgets(rig: Rig) -> None:
    x, cache = tokens(9), rig.runtime.new_cache(12)
    rig.steps(x, cache, 6, 1, 1, 1)
    cache.length = 6
    again = tokens(3, seed=9)
    steps = rig.steps(again, cache, 1, 1, 1)
    expected, _ = DECODER.reference(np.concatenate((x[:6], again)))
    np.testing.assert_allclose(steps[-1].logits, expected, atol=1e-3)


def test_what_a_step_gave_is_not_overwritten_by_the_next(rig: Rig) -> None:
    first, _ = rig.steps(tokens(4), rig.runtime.new_cache(4), 2, 2)
    np.testing.assert_allclose(first.logits, DECODER.reference(tokens(4)[:2])[0], atol=1e-3)


def test_a_cache_has_the_positions_of_the_engine(rig: Rig) -> None:
    assert rig.runtime.new_cache(3).capacity == SIZES.capacity
    with pytest.raises(InputError, match="need 25 positions, the engine was built for 24"):
        rig.runtime.new_cache(SIZES.capacity + 1)


def test_a_step_beyond_the_cache_is_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="exceed"):
        rig.runtime.step(tokens(25), rig.runtime.new_cache(24))


def test_a_step_that_fails_says_so(rig: Rig) -> None:
    rig.engine.contexts[0].fails = True
    with pytest.raises(ResourceError, match="did not run a step"):
        rig.runtime.step(tokens(2), rig.runtime.new_cache(2))


def test_embeddings_are_read_from_the_table(rig: Rig) -> None:
    table = np.load(rig.runtime.bundle.path("embedding.npy"))
    rows = rig.runtime.embed([3, 0, 3])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table[[3, 0, 3]])


def test_the_vision_engine_gets_pixels_and_gives_tokens(tmp_path: Path) -> None:
    device, bundle = FakeDevice(), fake_bundle(tmp_path)
    vision = bundle.config.vision
    shape = (vision.image_tokens, SIZES.hidden)

    class Tower(FakeContext):
        def execute_async_v3(self, stream: int) -> bool:
            pixels, image = (
                device.memory[self.addresses[name]].view(np.float32)
                for name in ("pixels", "image_tokens")
            )
            device.put(lambda: np.copyto(image, pixels[: image.size] + 1))
            return True

    engine = FakeEngine(device)
    engine.contexts[0] = Tower(device, 0)
    runtime = TensorRTRuntime(bundle, device=device, open_engine=lambda name: engine)
    side = vision.image_size
    for seed in (0, 1):
        pixels = np.random.default_rng(seed).random((1, 3, side, side), np.float32)
        image = runtime.encode_image(pixels)
        assert image.shape == shape
        np.testing.assert_array_equal(image.ravel(), pixels.ravel()[: image.size] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library_version": "1.6.0"}, "built with TensorRT for RTX 1.6.0, 1.7.1 is installed"),
        ({"gpu": "sm120"}, "built for GPUs of sm120, the one here is sm89"),
    ],
)
def test_engines_of_another_version_or_gpu_are_refused(change: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        check_target(dataclasses.replace(TARGET, **change), "1.7.1", "sm89")
    assert "--target tensorrt-rtx --gpu sm89" in caught.value.remedy


def test_a_damaged_engine_is_refused(tmp_path: Path) -> None:
    try:
        load_library("tensorrt-rtx")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    path = tmp_path / "decoder.engine"
    path.write_bytes(b"no engine" * 100)
    with pytest.raises(BundleError, match=r"TensorRT cannot load decoder\.engine: "):
        TensorRTEngine(path, TARGET, FakeDevice())


def test_a_machine_without_a_gpu_says_so() -> None:
    core = pytest.importorskip("cuda.core")
    try:
        core.Device().set_current()
    except Exception:
        with pytest.raises(ResourceError, match="needs an NVIDIA GPU and its driver"):
            CudaDevice("rtx")
    else:
        pytest.skip("there is a GPU")


@pytest.mark.gpu
def test_a_cache_begins_as_zeros_and_mirrors_carry_both_ways() -> None:
    device = CudaDevice("rtx")
    mirror = device.mirror((3, 5))
    mirror.host[:] = np.arange(15).reshape(3, 5)
    mirror.upload()
    replay = device.capture(mirror.download)
    device.synchronise()
    mirror.host[:] = 0
    replay()
    device.synchronise()
    np.testing.assert_array_equal(mirror.host, np.arange(15).reshape(3, 5))
