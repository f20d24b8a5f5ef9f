"""The bundle on ONNX Runtime, on the CPU or CUDA, with its KV cache on the device.

ONNX Runtime itself falls back to the CPU without a word to the caller where CUDA's libraries do not
load; here that is an error, unless it is allowed.

Opening a session packs the weights for the CPU's kernels, which is most of what loading takes. So
it begins when a model is loaded, while its first image is still being read, on threads of its own,
two sessions at a time.

How this processor adds the products of 8-bit integers in ONNX Runtime: exactly or not.

Signed weights times unsigned activations go through `vpmaddubsw` on processors with AVX2 or AVX-512
and without VNNI; it adds two neighbouring products in 16 bits, which saturates at 32,767. A model
of one `DynamicQuantizeMatMul` with the largest products there are shows it.
"""

import contextlib
import io
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge._types import Floats
from medmoe_edge._version import too_old
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.machine import (
    CLOSE,
    Arithmetic,
    cpu_features_here,
    keep_one_heap,
    refused,
)
from medmoe_edge.bundle.recorded import check_scales, int8_products
from medmoe_edge.calibration.quantisers import PAIR_BOUND
from medmoe_edge.config import DecoderConfig, Device
from medmoe_edge.errors import BundleError, MedMoEError, Notice, ResourceError
from medmoe_edge.runtimes.base import Cache, CacheArray, EmbeddingTable, Step, check_room, in_parts

WIDTH, CHANNELS = 8, 16
LARGEST = 127  # of an int8 weight; activations of one size are quantised to 255
# What every session is told, so that all processors answer alike. Where an Arm processor has SME,
# KleidiAI's `DynamicQuantizeMatMul` gives each token a scale of its own; its 4-bit kernels quantise
# whole rows of activations instead of blocks.
SAME_EVERYWHERE = ("mlas.disable_kleidiai", "1")
NO_FALLBACK: dict[str, Any] = {"enable_fallback": 0}  # of every session: see `open_session`


@cache
def int8_arithmetic() -> Arithmetic:
    """ "exact", or "saturating" where 2 * 255 * 127 does not come out."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(*SAME_EVERYWHERE)
    session = ort.InferenceSession(_model(), options, ["CPUExecutionProvider"], **NO_FALLBACK)
    (found,) = session.run(["y"], {"a": np.ones((1, WIDTH), np.float32)})
    right = np.allclose(found, WIDTH * LARGEST, rtol=1e-3)
    return "exact" if right else "saturating"


def _model() -> bytes:
    """The model as protobuf: the base install has no library that writes it (onnx.proto)."""
    weights = np.full((WIDTH, CHANNELS), LARGEST, np.int8).tobytes()
    node = b"".join(_field(1, name) for name in (b"a", b"b", b"s"))
    node += _field(2, b"y") + _field(4, b"DynamicQuantizeMatMul") + _field(7, b"com.microsoft")
    stored = _number(1, WIDTH) + _number(1, CHANNELS) + _number(2, 3) + _field(8, b"b")
    scale = _number(2, 1) + _field(8, b"s") + _field(9, np.float32(1).tobytes())
    graph = _field(1, node) + _field(2, b"probe")
    graph += _field(5, stored + _field(9, weights)) + _field(5, scale)
    graph += _field(11, _tensor(b"a", WIDTH)) + _field(12, _tensor(b"y", CHANNELS))
    opsets = (_number(2, 21), _field(1, b"com.microsoft") + _number(2, 1))
    return _number(1, 10) + _field(7, graph) + b"".join(_field(8, opset) for opset in opsets)


def _tensor(name: bytes, size: int) -> bytes:
    """A float value `[1, size]`."""
    shape = _field(1, _number(1, 1)) + _field(1, _number(1, size))
    return _field(1, name) + _field(2, _field(1, _number(1, 1) + _field(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


AT_ONCE = 2**22  # bytes of a weight looked at in one piece

logger = logging.getLogger(__name__)


def load_notices(bundle: Bundle) -> tuple[Notice, ...]:
    """What answers on the CPU are to warn of; it is logged too.

    Bundles from before `Format.pair_bound` run as they are. An exact way would cost more than a new
    export: weights split in two take twice the memory and time, and ONNX Runtime's own option
    (`session.x64quantprecision`) misses weights that the branches of an `If` take from outside, so
    that whole and paged graphs would answer differently.
    """
    _tell_of_slow_processor()
    found = []
    if int8_arithmetic() == "saturating" and not keeps_pair_bound(bundle):
        what = (
            "This processor, which has no VNNI, cannot add the int8 products of "
            f"{bundle.name} exactly: answers may differ from the original model's. Export it again "
            "with this version of medmoe-edge, whose int8 is exact on every processor."
        )
        found.append(Notice("int8_saturates", what))
    for notice in found:
        logger.warning("%s", notice.message)
    return tuple(found)


def keeps_pair_bound(bundle: Bundle) -> bool:
    """Whether its int8 products are exact on every processor: by its manifest, else its weights.

    Reading stops at the first pair beyond the bound, which weights rounded without it have soon.
    """
    quantisation = bundle.manifest.get("quantisation")
    if isinstance(quantisation, dict) and quantisation.get("pair_bound") == PAIR_BOUND:
        return True
    products = int8_products(bundle.path("decoder.onnx"))
    return all(pairs_within(weight) for _, weight in products)


def pairs_within(weight: npt.NDArray[np.int8]) -> bool:
    """Whether no stored neighbours 2i, 2i + 1 along K of `[K, N]` sum to more than the bound."""
    paired = weight[: len(weight) // 2 * 2]
    step = 2 * max(AT_ONCE // (2 * max(weight.shape[1], 1)), 1)
    return all(
        np.abs(np.add(block[::2], block[1::2], dtype=np.int16)).max(initial=0) <= PAIR_BOUND
        for block in (paired[start : start + step] for start in range(0, len(paired), step))
    )


def slow_processor(features: Mapping[str, bool]) -> str | None:
    """What to say of a processor of these features (`cpu_features`); None if nothing."""
    if features.get("AVX2") is False:
        return "This processor has no AVX2: answers are exact, but slow."
    return None


@cache
def _tell_of_slow_processor() -> None:
    """Once a process: answers are right there, so that they carry no warning."""
    if told := slow_processor(cpu_features_here()):
        logger.warning(told)


TARGETS: dict[str, Literal["cpu", "cuda"]] = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}

CPU = "CPUExecutionProvider"

CUDA = "CUDAExecutionProvider"

REMEDY = (
    "See what is missing: medmoe-edge doctor; install it: pip install 'medmoe-edge[gpu]'; "
    "or run it on the CPU."
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A provider and the reason for it."""

    device: Literal["cpu", "cuda"]
    why: str

    @property
    def providers(self) -> list[str]:
        """For a session. CUDA's keeps the CPU's beside it, which computes shapes."""
        return [CUDA, CPU] if self.device == "cuda" else [CPU]


def choose_provider(
    requested: Device, available: Sequence[str], target: str, *, allow_fallback: bool = False
) -> Choice:
    """The provider for graphs that were made for `target`, the name in a bundle's manifest.

    `available` are the providers that ONNX Runtime was built with. `auto` takes what the graphs are
    made for. Raises `BundleError` for graphs that `requested` cannot run, and `ResourceError` where
    CUDA is not available and the CPU may not stand in for it.
    """
    made_for = TARGETS.get(target)
    if made_for is None:
        raise BundleError(
            f"The bundle is made for {target}, not for ONNX Runtime.",
            f"Export the model for one of: {', '.join(TARGETS)}.",
        )
    if requested == "cpu":
        return Choice("cpu", "it was asked for")
    if made_for == "cpu":
        if requested == "cuda":
            raise BundleError(
                "The bundle's graphs are made for the CPU.",
                "Export the model with: --target onnxruntime-cuda",
            )
        return Choice("cpu", "the bundle's graphs are made for it")
    if CUDA in available:
        return Choice("cuda", "the bundle's graphs are made for it")
    if allow_fallback:
        return _fall_back("the installed ONNX Runtime has no CUDA provider")
    raise ResourceError(
        "The bundle is made for CUDA, and the installed ONNX Runtime has no CUDA provider.", REMEDY
    )


def check_providers(choice: Choice, loaded: Sequence[str], *, allow_fallback: bool) -> Choice:
    """What a session really runs on, by its own account `loaded`, once it is open.

    Raises `ResourceError` for a fall back to the CPU that is not allowed.
    """
    if choice.device == "cpu" or CUDA in loaded:
        return choice
    if allow_fallback:
        return _fall_back("CUDA's provider did not load")
    raise ResourceError(
        "ONNX Runtime could not load its CUDA provider and would have run on the CPU: a driver, a "
        "library or the GPU itself is missing.",
        REMEDY,
    )


def preload_cuda() -> None:
    """Load the CUDA libraries that pip installed, which are on no search path.

    What cannot be found is a matter for `check_providers`: the system may have it.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        ort.preload_dlls()
    if said.getvalue():
        logger.debug("%s", said.getvalue().strip())


def _fall_back(why: str) -> Choice:
    logger.warning("The bundle is made for CUDA and runs on the CPU, slowly: %s.", why)
    return Choice("cpu", why)


OPENED_AT_ONCE = 2  # memory's bandwidth is the bound

SPIN_MICROSECONDS = 100

WEIGHTS = ("*.data", "*.npy")  # files of a bundle


class EarlySessions:
    """Sessions of some graphs by name, opened in their order; who needs one waits for it.

    What opening raised is raised then. Once nobody knows the sessions, no more are opened.

    ONNX Runtime maps the weights that it does not pack. Who writes into such a file, as `cp` over a
    bundle in use does, mixes two models, and who cuts it ends the process: `check` tells before
    they are read. A file that is removed or replaced stays what it was for those who have it open.
    """

    def __init__(
        self, graphs: Mapping[Path, ort.SessionOptions], providers: Sequence[str] = (CPU,)
    ) -> None:
        keep_one_heap()
        threads = ThreadPoolExecutor(OPENED_AT_ONCE, "open-session")
        self._opening = {
            path.name: threads.submit(partial(open_session, path, options, providers))
            for path, options in graphs.items()
        }
        threads.shutdown(wait=False)  # a thread ends when nothing is left to open
        weakref.finalize(self, threads.shutdown, wait=False, cancel_futures=True)
        folders = {path.parent for path in graphs}
        weights = [path for folder in folders for form in WEIGHTS for path in folder.glob(form)]
        files = contextlib.ExitStack()
        weakref.finalize(self, files.close)
        self._weights = [(path, files.enter_context(path.open("rb"))) for path in weights]
        self._states = [_state(file) for _, file in self._weights]

    def __getitem__(self, name: str) -> ort.InferenceSession:
        self.check()
        return self._opening[name].result()

    def check(self) -> None:
        """Raise `BundleError` where weights were changed in their place since this was made."""
        for (path, file), state in zip(self._weights, self._states, strict=True):
            if _state(file) != state:
                raise BundleError(
                    f"{path} was changed while it was in use.",
                    "Load the model again, which checks it; put a new bundle into another folder.",
                )


def _state(file: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def open_session(
    path: Path, options: ort.SessionOptions, providers: Sequence[str] = (CPU,)
) -> ort.InferenceSession:
    """Load a graph; raises what `not_opened` makes of ONNX Runtime's error.

    Where CUDA fails the CPU stands in for it, as `check_providers` tells: ONNX Runtime's own fall
    back, which `NO_FALLBACK` turns off, prints on stdout.
    """
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers), **NO_FALLBACK)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        if CUDA in providers and isinstance(error, ValueError | RuntimeError):
            logger.debug("CUDA's provider failed: %s", error)
            return open_session(path, options)
        raise not_opened(path.name, error) from error


def not_opened(name: str, error: Exception, remedy: str = CLOSE) -> MedMoEError:
    """The error for a graph that was not opened: the machine's refusal, or ONNX Runtime's.

    `remedy` says what to do where memory is missing.
    """
    return refused(name, error, remedy) or BundleError(
        f"ONNX Runtime {ort.__version__} cannot load {name}.",
        "Export the checkpoint again with this version.",
    )


def session_options() -> ort.SessionOptions:
    """Quiet, computing the same everywhere, and without the arena, which would keep the peak of the
    prefill for ever.

    Raises `ResourceError` where ONNX Runtime is older than all that this was tried with.
    """
    if found := too_old(ort.__version__):
        raise ResourceError(*found)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry(*SAME_EVERYWHERE)
    return options


def one_of_many(options: ort.SessionOptions) -> ort.SessionOptions:
    """For one of many sessions that run in turns: its threads soon sleep when there is no work.

    Each session has threads of its own; spinning, those of one keep the next from running, and both
    from a machine that does something else (ten times slower beside one busy neighbour). A short
    spin bridges the gap between two operators. A pool for all sessions would forbid every session
    of the process one of its own.
    """
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    return options


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


class OrtRuntime:
    """Runs a bundle's graphs, which are opened in the background from the start.

    `replaced` names weights of the decoder to be exchanged for others of the same shape and type;
    then the decoder alone is opened, of a bundle that was opened whole before.
    `device` "auto" is what the graphs are made for; with `allow_fallback` the CPU stands in for a
    CUDA that does not load, which otherwise raises `ResourceError`, here or at the first step.
    `choice` says what runs and why, `warnings` what is to be known of its answers.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        replaced: Mapping[str, npt.NDArray[Any]] | None = None,
        *,
        device: Device = "auto",
        allow_fallback: bool = False,
    ) -> None:
        if not replaced:
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
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`; raises as `embed` does."""
        self._sessions.check()
        outputs = self._vision.run(["image_tokens"], {"pixels": pixels})
        return np.asarray(outputs[0], np.float32).squeeze(0)

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`; raises `BundleError` where weights were changed."""
        self._sessions.check()
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
        return (
            {DECODER: decoder} if self._replaced else {VISION: session_options(), DECODER: decoder}
        )

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
