"""The bundle on ONNX Runtime, on the CPU or CUDA."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime as ort

from medmoe_edge.bundle import Bundle
from medmoe_edge.bundle_weights import check_scales
from medmoe_edge.config import DecoderConfig
from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.base import Cache, Floats, Step, check_room
from medmoe_edge.runtimes.ort_providers import (
    CPU,
    Device,
    check_providers,
    choose_provider,
    preload_cuda,
)

CACHE_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}

logger = logging.getLogger(__name__)


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
        self.buffers = {
            f"{kind}.{layer}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
            for layer in range(decoder.layers)
            for kind in ("key", "value")
        }


class OrtRuntime:
    """Runs a bundle's graphs; the embedding table is mapped, so only rows in use are read.

    `replaced` names weights of the decoder to be exchanged for others of the same shape and type.
    `device` "auto" is what the graphs are made for; with `allow_fallback` the CPU stands in for a
    CUDA that does not load, which otherwise raises `ResourceError`, here or at the first step.
    `choice` says what runs and why.
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
        self._replaced = {  # kept here: a session borrows what it is given
            name: ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in (replaced or {}).items()
        }
        self._embedding = np.load(bundle.path("embedding.npy"), mmap_mode="r", allow_pickle=False)

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`."""
        outputs = self._vision.run(["image_tokens"], {"pixels": pixels})
        return np.asarray(outputs[0], np.float32).squeeze(0)

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`."""
        return np.asarray(self._embedding[ids], np.float32)

    def new_cache(self, capacity: int) -> OrtCache:
        """An empty cache for `capacity` positions."""
        declared = {value.name: value.type for value in self._decoder.get_inputs()}
        dtype = CACHE_TYPES[declared["past_key.0"]]
        return OrtCache(self.config.decoder, capacity, dtype, self.choice.device)

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S."""
        assert isinstance(cache, OrtCache)
        check_room(cache, len(embeds))
        total = cache.length + len(embeds)
        outputs = ["logits", "router_logits"] if self.config.moe else ["logits"]
        binding = self._decoder.io_binding()
        binding.bind_cpu_input("embeds", np.ascontiguousarray(embeds[None]))
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total_length", np.array(total, np.int32))
        for name in outputs:
            binding.bind_output(name)
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_input(f"past_{name}", buffer)
            binding.bind_ortvalue_output(f"present_{name}", buffer)
        self._decoder.run_with_iobinding(binding)
        results = [value.numpy() for value in binding.get_outputs()[: len(outputs)]]
        cache.length = total
        router = results[1][0] if self.config.moe else np.zeros((len(embeds), 0, 0), np.float32)
        return Step(results[0][0], router)

    @cached_property
    def _vision(self) -> ort.InferenceSession:
        return self._open("vision.onnx", session_options())

    @cached_property
    def _decoder(self) -> ort.InferenceSession:
        options = session_options()
        for name, value in self._replaced.items():
            options.add_initializer(name, value)
        return self._open("decoder.onnx", options)

    def _open(self, name: str, options: ort.SessionOptions) -> ort.InferenceSession:
        session = open_session(self.bundle.path(name), options, self.choice.providers)
        self.choice = check_providers(
            self.choice, session.get_providers(), allow_fallback=self._allow_fallback
        )
        return session


def session_options() -> ort.SessionOptions:
    """Quiet, and without the arena, which would keep the peak of the prefill for ever."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    return options


def open_session(
    path: Path, options: ort.SessionOptions, providers: Sequence[str] = (CPU,)
) -> ort.InferenceSession:
    """Load a graph; raises `BundleError` where ONNX Runtime refuses it."""
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise BundleError(
            f"ONNX Runtime {ort.__version__} cannot load {path.name}.",
            "Export the checkpoint again with this version.",
        ) from error
