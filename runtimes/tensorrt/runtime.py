"""A bundle of TensorRT engines: `vision.engine` and `decoder.engine`, on one GPU.

An engine that is not for this library or this GPU is refused with a remedy. The decoder may be in
two engines, of its first and its last layers; what the first computes stays on the device. Each has
two optimisation profiles: prefill, of 1 to `prefill` tokens a step, and decode, of one token.

The KV cache is written in place: `present_*` is bound to the buffer of `past_*`. An engine of
TensorRT before 10.15 copies the cache instead; it writes into a second set of buffers, and the two
take turns. A decode step is captured as a CUDA graph, once per cache and set of buffers, and
replayed for every token after: where the token stands, it reads from the device (`start`).
"""

import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.bundle import Bundle, Target
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import BundleError, InputError, ResourceError
from medmoe_edge.export.gpus import (
    EXTRAS,
    TITLES,
    library_of,
    library_version,
    load_library,
    make_logger,
    reason,
    writes_in_place,
)
from medmoe_edge.runtimes.base import Cache, EmbeddingTable, Step, check_room, in_parts
from medmoe_edge.runtimes.paging.pager import ExpertFile
from medmoe_edge.runtimes.slots.slots import Chosen, Kind, SlotPools, SlotRequests, Table
from medmoe_edge.runtimes.tensorrt.device import CudaDevice, Device, MirroredArray


class Context(Protocol):
    """What is used of TensorRT's `IExecutionContext`, which says False where it fails."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """The shape of an input of varying shape."""

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Where an input is read or an output written, on the device."""

    def execute_async_v3(self, stream: int) -> bool:
        """Run, when the stream comes to it."""


def is_capturable(context: Context, stream: int) -> bool:
    """Whether TensorRT lets a launch be recorded; the library for RTX may still be compiling."""
    ask: Callable[[int], bool] | None = getattr(context, "is_stream_capturable", None)
    return ask is None or ask(stream)


class Engine(Protocol):
    """A model on the device."""

    def context(self, profile: int) -> Context:
        """Runs the engine within one of its optimisation profiles."""


def check_target(target: Target, version: str, sm: str) -> None:
    """Raise `BundleError` unless engines for `target` run on this library and this GPU."""
    title = TITLES[library_of(target)]
    again = f"Build it again: medmoe-edge export CHECKPOINT --target {target.name} --gpu {sm}"
    if target.library_version != version:
        raise BundleError(
            f"The bundle was built with {title} {target.library_version}, "
            f"{version} is installed here, and engines run only on their own version.",
            again,
        )
    if target.gpu != sm:
        raise BundleError(
            f"The bundle was built for GPUs of {target.gpu}, the one here is {sm}.", again
        )


class TensorRTEngine:
    """A deserialised engine; raises `BundleError` for a file that TensorRT refuses."""

    def __init__(self, path: Path, target: Target, device: Device) -> None:
        self._trt = load_library(library_of(target))
        check_target(target, library_version(self._trt), device.sm)
        self._device, self._log = device, make_logger(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BundleError(
                f"TensorRT cannot load {path.name}: {reason(chr(10).join(self._log.errors))}.",
                "Build the bundle again on, or for, this machine; see medmoe-edge doctor.",
            )

    def context(self, profile: int) -> Context:
        """Runs the engine within one of its optimisation profiles."""
        # Memory for what this profile needs, not for the largest of all.
        strategy = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context: Any = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(
            profile, self._device.stream
        ):
            raise ResourceError(
                "The GPU has too little memory left for the engine's intermediate results.",
                "Close other programs that use it, or use a smaller bundle (--int4).",
            )
        self._device.synchronise()
        ran: Context = context
        return ran


PREFILL, DECODE = 0, 1  # the decoder's optimisation profiles
HALF, SINGLE = 2, 4  # bytes of fp16 and of bf16, and of fp32


class TensorRTCache:
    """A device buffer `[1, H, capacity, head_size]` per layer for keys and one for values.

    They begin as zeros: attention gives positions not yet written the weight 0, and 0 times
    whatever lay in the memory might be NaN. A step reads `buffers` and writes `written`,
    which are the same where the engine writes in place.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, device: Device, *, in_place: bool = True
    ) -> None:
        decoder = config.decoder
        size = decoder.heads * capacity * decoder.head_size * HALF
        self.capacity = capacity
        self.length = 0
        self.buffers, written = (
            {
                f"{kind}.{layer}": device.zeros(size)
                for layer in range(decoder.layers)
                for kind in ("key", "value")
            }
            if wanted
            else {}
            for wanted in (True, not in_place)
        )
        self.written = written or self.buffers
        self.decoded = False
        self.replays: dict[int, Callable[[], None]] = {}  # captured decode steps, by what they read

    @property
    def side(self) -> int:
        """Which of the two sets the next step reads."""
        return id(self.buffers)

    def turn(self) -> None:
        """What the last step wrote is what the next one reads."""
        self.buffers, self.written = self.written, self.buffers


class TensorRTRuntime:
    """Runs a bundle's engines. `device` and `open_engine` are CUDA and TensorRT but in tests."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device | None = None,
        open_engine: Callable[[str], Engine] | None = None,
    ) -> None:
        self.bundle, self.config = bundle, bundle.config
        self.target = bundle.target
        self.name: str = self.target.name
        self._device = device or CudaDevice(EXTRAS[library_of(self.target)])
        self._open = open_engine or self._open_file
        self._embedding = EmbeddingTable(bundle.path("embedding.npy"))

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`."""
        return self._tower.run(pixels)

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`."""
        return self._embedding[ids]

    def new_cache(self, capacity: int) -> TensorRTCache:
        """An empty cache, of as many positions as the engine was built for.

        Raises `InputError` if that is less than `capacity`.
        """
        if capacity > self.target.capacity:
            raise InputError(
                f"Image, question and answer need {capacity} positions, the engine was built for "
                f"{self.target.capacity}.",
                "Ask a shorter question or allow fewer new tokens.",
            )
        in_place = writes_in_place(self.target)
        return TensorRTCache(self.config, self.target.capacity, self._device, in_place=in_place)

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S.

        More than the engine takes at once go in several steps.
        """
        assert isinstance(cache, TensorRTCache)
        check_room(cache, len(embeds))
        return in_parts(embeds, self.target.prefill, lambda part: self._run(part, cache))

    def _run(self, embeds: Floats, cache: TensorRTCache) -> Step:
        lane = self._lane(len(embeds))
        lane.fill(embeds, cache.length)
        if lane is self._prefill:
            lane.launch(len(embeds), cache)
        else:
            self._launch_decode(cache)
        self._device.synchronise()
        cache.length += len(embeds)
        cache.turn()
        return lane.read(len(embeds))

    def _lane(self, tokens: int) -> "Chain":
        return self._decode if tokens == 1 else self._prefill

    def _launch_decode(self, cache: TensorRTCache) -> None:
        """The first step of a cache as it is, for TensorRT to settle; from the second, a graph."""
        stream = self._device.stream
        replay = cache.replays.get(cache.side)
        if replay is None and cache.decoded and self._decode.is_capturable(stream):
            replay = self._device.capture(lambda: self._decode.launch(1, cache))
            cache.replays[cache.side] = replay
        if replay is None:
            self._decode.launch(1, cache)
            cache.decoded = True
        else:
            replay()

    def _open_file(self, name: str) -> Engine:
        return TensorRTEngine(self.bundle.path(name), self.target, self._device)

    @cached_property
    def _tower(self) -> "Tower":
        return Tower(self._open("vision.engine").context(0), self._device, self.config)

    @cached_property
    def _decoders(self) -> list[Engine]:
        return [self._open(f"{name}.engine") for name in self.target.decoders]

    @cached_property
    def _prefill(self) -> "Chain":
        return self._new_chain(PREFILL, self.target.prefill)

    @cached_property
    def _decode(self) -> "Chain":
        return self._new_chain(DECODE, 1)

    def _new_chain(self, profile: int, tokens: int) -> "Chain":
        parts = self.target.layers(self.config.decoder.layers)
        chain: list[Lane] = []
        for engine, layers in zip(self._decoders, parts, strict=True):
            lane = self._new_lane(engine.context(profile), tokens, layers)
            if chain:
                lane.follow(chain[-1])
            chain.append(lane)
        return Chain(chain)

    def _new_lane(self, context: Context, tokens: int, layers: range) -> "Lane":
        return Lane(context, self._device, self.config, tokens, layers)


class Chain:
    """One profile of the decoder: a lane for each of its engines, one after the other."""

    def __init__(self, lanes: Sequence["Lane"]) -> None:
        self.lanes = lanes

    def is_capturable(self, stream: int) -> bool:
        """Whether TensorRT lets a launch be recorded, of every engine."""
        return all(is_capturable(lane.context, stream) for lane in self.lanes)

    def fill(self, embeds: Floats, start: int) -> None:
        """What the next launch reads; the one before must be done."""
        for lane in self.lanes:
            lane.fill(embeds, start)

    def launch(self, tokens: int, cache: TensorRTCache) -> None:
        """Put a step on the stream."""
        for lane in self.lanes:
            lane.launch(tokens, cache)

    def read(self, tokens: int) -> Step:
        """What the last launch wrote; it must be done."""
        routing = [lane.read_routing(tokens) for lane in self.lanes]
        filled = [each for each in routing if each.size] or routing[:1]
        return Step(self.lanes[-1].outputs["logits"].host.copy(), np.concatenate(filled, 1))


class Lane:
    """One profile of an engine of the decoder, with buffers for `tokens` tokens a step at most.

    Beside `inputs` and `outputs`, which go up and down with every step, `addresses` are those of
    what stays on the device, and `shapes` those of inputs that the engine leaves open.
    """

    def __init__(
        self, context: Context, device: Device, config: ModelConfig, tokens: int, layers: range
    ) -> None:
        decoder, experts = config.decoder, config.moe.router_rows if config.moe else 0
        self.context, self.device = context, device
        self.size, self.layers = decoder.hidden_size, layers
        self.inputs = {
            "embeds": device.mirror((tokens, self.size)),
            "start": device.mirror((1,), np.int64),
        }
        self.outputs: dict[str, MirroredArray] = {}
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        if layers.stop == decoder.layers:
            self.outputs["logits"] = device.mirror((decoder.vocab_size,))
        else:
            self.hidden = device.zeros(tokens * self.size * SINGLE)
            self.addresses["hidden"] = self.hidden.address
        if routed := sum(layer in layers for layer in config.moe_layers):
            self.outputs["router_logits"] = device.mirror((tokens, routed, experts))

    def follow(self, before: "Lane") -> None:
        """Read what the engine of the layers before leaves on the device."""
        del self.inputs["embeds"]
        self.addresses["embeds"] = before.addresses["hidden"]

    def fill(self, embeds: Floats, start: int) -> None:
        """What the next launch reads; the one before must be done."""
        if "embeds" in self.inputs:
            self.inputs["embeds"].host[: len(embeds)] = embeds
        self.inputs["start"].host[0] = start

    def launch(self, tokens: int, cache: TensorRTCache) -> None:
        """Put a step on the stream: inputs up, the engine, outputs down."""
        mirrors = {**self.inputs, **self.outputs}
        own = [f"{kind}.{layer}" for layer in self.layers for kind in ("key", "value")]
        addresses = {
            **self.addresses,
            **{name: mirror.address for name, mirror in mirrors.items()},
            **{f"past_{name}": cache.buffers[name].address for name in own},
            **{f"present_{name}": cache.written[name].address for name in own},
        }
        shapes = {**self.shapes, "embeds": (1, tokens, self.size)}
        inputs, outputs = list(self.inputs.values()), list(self.outputs.values())
        run(self.context, self.device, shapes, addresses, inputs, outputs)

    def read_routing(self, tokens: int) -> Floats:
        """The router logits `[S, M, E]` of its layers, as the last launch wrote them."""
        if "router_logits" not in self.outputs:
            return np.zeros((tokens, 0, 0), np.float32)
        found: Floats = self.outputs["router_logits"].host[:tokens].copy()
        return found


class Tower:
    """The vision engine with its buffers."""

    def __init__(self, context: Context, device: Device, config: ModelConfig) -> None:
        side = config.vision.image_size
        self.context, self.device = context, device
        self.pixels = device.mirror((1, 3, side, side))
        self.tokens = device.mirror((config.vision.image_tokens, config.decoder.hidden_size))

    def run(self, pixels: Floats) -> Floats:
        """Pixels `[1, 3, S, S]` to image tokens `[N, D]`."""
        self.pixels.host[:] = pixels
        addresses = {"pixels": self.pixels.address, "image_tokens": self.tokens.address}
        run(self.context, self.device, {}, addresses, [self.pixels], [self.tokens])
        self.device.synchronise()
        return np.array(self.tokens.host, np.float32)


def run(
    context: Context,
    device: Device,
    shapes: Mapping[str, tuple[int, ...]],
    addresses: Mapping[str, int],
    inputs: Sequence[MirroredArray],
    outputs: Sequence[MirroredArray],
) -> None:
    """Bind, and put on the stream: inputs up, the engine, outputs down."""
    fine = [context.set_input_shape(name, shape) for name, shape in shapes.items()]
    fine += [context.set_tensor_address(name, address) for name, address in addresses.items()]
    for mirror in inputs:
        mirror.upload()
    fine.append(context.execute_async_v3(device.stream))
    for mirror in outputs:
        mirror.download()
    if not all(fine):
        raise ResourceError(
            "TensorRT did not run a step of the engine.",
            "Ask again with --verbose for its own words; see also: medmoe-edge doctor",
        )


class PagedTensorRTRuntime(TensorRTRuntime):
    """Runs a paged bundle's engines; `budget` is that of its routed experts, in bytes or as text.

    `drop_pages` is that of `ExpertFile`. Raises what `SlotRequests` and `TensorRTRuntime` raise.

    The engine takes the slots as inputs (`export/passes/tensorrt.py`). They are bound like the KV
    cache, by addresses that stay, so that a captured decode step stays right too: it reads the
    table from the device, as it reads where the token stands. Each launch is a whole step;
    `slots/slots.py` runs it again until every expert that it chose was there.
    """

    def __init__(
        self,
        bundle: Bundle,
        budget: int | str,
        *,
        device: Device | None = None,
        open_engine: Callable[[str], Engine] | None = None,
        drop_pages: bool = False,
    ) -> None:
        kinds = Kind.all_of(bundle)
        super().__init__(bundle, device=device, open_engine=open_engine)
        self._pools = SlotPools(self._device, kinds)
        file = ExpertFile(bundle, drop_pages=drop_pages)
        self.requests = SlotRequests(bundle, file, self._pools, budget, self._run_with)

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`; a request begins here."""
        return self.requests.begin(super().encode_image, pixels)

    def paging(self) -> dict[str, Any]:
        """The report on what ran since the last one or the image: see `SlotRequests`."""
        return self.requests.report()

    def _run(self, embeds: Floats, cache: TensorRTCache) -> Step:
        return self.requests.step(embeds, cache)

    def _run_with(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        assert isinstance(cache, TensorRTCache)
        (lane,) = self._lane(len(embeds)).lanes  # a paged decoder is in one engine
        lane.inputs["table"].host[:] = table
        step = super()._run(embeds, cache)
        moe = there(self.config.moe)
        shape = len(embeds), moe.top_k
        chosen = [
            lane.outputs[f"chosen.{layer}"].host[: shape[0] * shape[1]].reshape(shape)
            for layer in range(len(table))
        ]
        # a NaN may be sent anywhere: the logits tell
        return step, np.stack(chosen, 1).clip(0, moe.num_experts - 1)

    def _new_lane(self, context: Context, tokens: int, layers: range) -> Lane:
        lane, slots = super()._new_lane(context, tokens, layers), self.requests.slots
        lane.inputs["table"] = self._device.mirror(slots.shape, np.int32)
        for layer in range(slots.shape[0]):
            count = tokens * there(self.config.moe).top_k
            lane.outputs[f"chosen.{layer}"] = self._device.mirror((count,), np.int64)
        for kind in self._pools.kinds:
            lane.addresses[kind.name] = self._pools.addresses[kind.name]
            lane.shapes[kind.name] = (slots.count, *kind.shape)
        return lane
