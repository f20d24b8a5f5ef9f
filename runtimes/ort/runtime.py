"""The bundle on ONNX Runtime, on the CPU or CUDA, with its KV cache on the device."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.recorded import check_scales
from medmoe_edge.config import DecoderConfig
from medmoe_edge.runtimes.arithmetic import load_notices
from medmoe_edge.runtimes.base import Cache, CacheArray, EmbeddingTable, Step, check_room, in_parts
from medmoe_edge.runtimes.ort.sessions import (
    Device,
    EarlySessions,
    check_providers,
    choose_provider,
    preload_cuda,
    session_options,
)


class OrtCache:
    """One buffer `[1, H, capacity, head_size]` per layer for keys and one for values.

    A buffer lies on the device, and is bound both as what a step reads and as what it writes:
    nothing is copied.
    """

    def __init__(
        self, decoder: DecoderConfig, capacity: int, dtype: type[np.generic], device: str
    ) -> None:
        shape = (1, decoder.heads, capacity, decoder.head_size)
        self.capacity = capacity
        self.length = 0
        self.dtype = np.dtype(dtype)
        self.origin = f"onnxruntime {ort.__version__} {device}"
        self.buffers = {
            f"{kind}.{layer}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
            for layer in range(decoder.layers)
            for kind in ("key", "value")
        }

    def arrays(self) -> Iterator[CacheArray]:
        """What it holds, `[H, length, head_size]`: keys and values of each layer in turn."""
        for buffer in self.buffers.values():
            yield buffer.numpy()[0, :, : self.length]

    def fill(self, arrays: Iterable[CacheArray]) -> None:
        """Hold those instead; their number, shape and type must be right."""
        for buffer, array in zip(self.buffers.values(), arrays, strict=True):
            whole = np.zeros(buffer.shape(), self.dtype)
            whole[0, :, : array.shape[1]] = array
            buffer.update_inplace(whole)
            self.length = array.shape[1]


VISION, DECODER = "vision.onnx", "decoder.onnx"
PREFILL_AT_ONCE = 384  # tokens
CACHE_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}

logger = logging.getLogger(__name__)


class OrtRuntime:
    """Runs a bundle's graphs, which are opened in the background from the start.

    `replaced` names weights of the decoder to be exchanged for others of the same shape and type.
    `device` "auto" is what the graphs are made for; with `allow_fallback` the CPU stands in for a
    CUDA that does not load, which otherwise raises `ResourceError`, here or at the first step.
    `choice` says what runs and why, `warnings` what is to be known of its answers.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        replaced: Mapping[str, Floats] | None = None,
        *,
        device: Device = "auto",
        allow_fallback: bool = False,
    ) -> None:
        check_scales(bundle)
        self.bundle, self.config = bundle, bundle.config
        self._allow_fallback = allow_fallback
        self.choice = choose_provider(
            device,
            ort.get_available_providers(),
            bundle.target.name,
            allow_fallback=allow_fallback,
        )
        logger.info("ONNX Runtime runs on %s: %s.", self.choice.device, self.choice.why)
        if self.choice.device == "cuda":
            preload_cuda()
        self.warnings = load_notices(bundle) if self.choice.device == "cpu" else ()
        self._replaced = {  # kept here: a session borrows what it is given
            name: ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in (replaced or {}).items()
        }
        self._sessions = EarlySessions(
            {bundle.path(name): options for name, options in self._graphs().items()},
            self.choice.providers,
        )
        self._embedding = EmbeddingTable(bundle.path("embedding.npy"))

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`."""
        outputs = self._vision.run(["image_tokens"], {"pixels": pixels})
        return np.asarray(outputs[0], np.float32).squeeze(0)

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`."""
        return self._embedding[ids]

    def new_cache(self, capacity: int) -> OrtCache:
        """An empty cache for `capacity` positions."""
        declared = {value.name: value.type for value in self._decoder.get_inputs()}
        dtype = CACHE_TYPES[declared["past_key.0"]]
        return OrtCache(self.config.decoder, capacity, dtype, self.choice.device)

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S.

        A CPU takes long prompts in parts: attention's scores `[H, S, positions]` would outgrow the
        weights, and half of them, in the future of their tokens, be computed in vain.
        """
        assert isinstance(cache, OrtCache)
        check_room(cache, len(embeds))
        at_once = PREFILL_AT_ONCE if self.choice.device == "cpu" else len(embeds)
        return in_parts(embeds, at_once, lambda part: self._run(part, cache))

    def _run(self, embeds: Floats, cache: OrtCache) -> Step:
        return self._run_bound(embeds, cache, self._decoder.io_binding())[0]

    def _run_bound(
        self, embeds: Floats, cache: OrtCache, binding: ort.IOBinding, more: Sequence[str] = ()
    ) -> tuple[Step, list[npt.NDArray[Any]]]:
        """A step, and `more` of the decoder's outputs; what is not usual is bound already."""
        total = cache.length + len(embeds)
        outputs = ["logits", "router_logits"] if self.config.moe else ["logits"]
        binding.bind_cpu_input("embeds", np.ascontiguousarray(embeds[None]))
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total_length", np.array(total, np.int32))
        for name in (*outputs, *more):
            binding.bind_output(name)
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_input(f"past_{name}", buffer)
            binding.bind_ortvalue_output(f"present_{name}", buffer)
        self._decoder.run_with_iobinding(binding)
        values = binding.get_outputs()[: len(outputs) + len(more)]
        results = [value.numpy() for value in values]
        cache.length = total
        router = results[1][0] if self.config.moe else np.zeros((len(embeds), 0, 0), np.float32)
        return Step(results[0][0], router), results[len(outputs) :]

    def _graphs(self) -> dict[str, ort.SessionOptions]:
        """What is to be opened, in the order in which it is needed."""
        decoder = session_options()
        for name, value in self._replaced.items():
            decoder.add_initializer(name, value)
        return {VISION: session_options(), DECODER: decoder}

    @cached_property
    def _vision(self) -> ort.InferenceSession:
        return self._opened(VISION)

    @cached_property
    def _decoder(self) -> ort.InferenceSession:
        return self._opened(DECODER)

    def _opened(self, name: str) -> ort.InferenceSession:
        session = self._sessions[name]
        self.choice = check_providers(
            self.choice, session.get_providers(), allow_fallback=self._allow_fallback
        )
        return session
