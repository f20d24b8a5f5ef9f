"""`medmoe-edge prove`: every path of this package to a GPU, run on the GPU that is here.

Each path is held against something independent: the kernels against float64, everything that
answers against the specification (fp32, every expert, in ONNX Runtime) on the inputs that travel
with nano. A path passes, fails, or is not run, with the reason: no CUDA device, or a package that
is not installed, or no time left. Each has a share of the time, and asks between its steps, which
cannot be interrupted themselves, whether it is over.

Without a CUDA device none is proven. What can be run instead is run all the same and named, as a
stand-in: Triton's interpreter, PyTorch on the CPU, a target's graph in ONNX Runtime, an engine of
TensorRT for RTX that is built but cannot be executed. A stand-in that fails fails its path. No
stand-in is timed: what it took says nothing of a GPU.

Nothing is downloaded, and nothing of a patient is in a proof. The tests marked `gpu` run this.
"""

import contextlib
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path as FilePath
from typing import Any, Literal, NamedTuple

import numpy as np

from medmoe_edge._types import Floats, Progress, no_progress
from medmoe_edge._version import __version__
from medmoe_edge.bundle.bundle import Bundle, Target
from medmoe_edge.bundle.recorded import read_recorded
from medmoe_edge.device.hardware import cuda_devices, describe_machine
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import MedMoEError, MissingDependencyError, Told, VerificationError
from medmoe_edge.export.gpus import EXTRAS, GPUS, Library, writes_in_place
from medmoe_edge.runtimes.base import Cache, Runtime, Step

Verdict = Literal["passed", "failed", "not run"]
Device = Literal["cuda", "cpu"]
Figures = dict[str, float | str | bool]

NO_DEVICE = "no CUDA device"
NO_TIME = "no time left"
SECONDS, LAST = 480, 60  # for all paths; of which none begins another step in the last ones
QUESTIONS: dict[Device, int] = {"cuda": 6, "cpu": 2}
TOKENS: dict[Device, tuple[int, ...]] = {"cuda": (1, 21), "cpu": (2,)}  # of the kernels' layers
NEW_TOKENS = 32
NO_ENGINE = Target("tensorrt-rtx", "fp16", "sm89", "none", *2 * (1024,))  # a stand-in's graphs
BOUND = 0.01  # of logits and image tokens, relative
WIDTH, HIDDEN = 2048, 5632  # of one full-width layer: StableLM-2-1.6B's
FORMATS = {"int8": None, "int4-32": 32, "int4-128": 128}
REPEATS = 50
PAGE, RECORD = "proof.html", "proof.json"  # what is sent in


class Fault(Exception):
    """A path computed something, and it is not what it should be."""


class OutOfTimeError(Exception):
    """A path's share of the time is over: nothing is known of it."""


class Watch:
    """How long a path may take, by a clock in seconds."""

    def __init__(
        self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.end = clock() + seconds

    def check(self) -> None:
        """To be asked before each step; raises `OutOfTimeError`."""
        if self.clock() >= self.end:
            raise OutOfTimeError


class Watched:
    """A runtime that asks the watch before each step."""

    def __init__(self, runtime: Runtime, watch: Watch) -> None:
        self.name, self.config = runtime.name, runtime.config
        self.embed, self.new_cache = runtime.embed, runtime.new_cache
        self._runtime, self._watch = runtime, watch

    def encode_image(self, pixels: Floats) -> Floats:
        """That of the runtime."""
        self._watch.check()
        return self._runtime.encode_image(pixels)

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """That of the runtime."""
        self._watch.check()
        return self._runtime.step(embeds, cache)


@dataclass(frozen=True)
class Checked:
    """What came of one path.

    Attributes:
        name: Of the path.
        what: It, in words.
        verdict: On the GPU; a stand-in never passes for it.
        why: Of a verdict other than passed.
        stand_in: What ran in the GPU's place; None where it ran itself, or nothing did.
        figures: What was measured: errors relative, times in seconds, sizes in bytes.
        seconds: All of it took.
    """

    name: str
    what: str
    verdict: Verdict
    why: str
    stand_in: str | None
    figures: Mapping[str, float | str | bool]
    seconds: float


@dataclass(frozen=True)
class Proof(Told):
    """All paths, and the machine they were run on."""

    TOLD = ("failed",)

    machine: Mapping[str, Any]
    paths: tuple[Checked, ...]

    @property
    def failed(self) -> list[str]:
        """The names of the paths that failed."""
        return [path.name for path in self.paths if path.verdict == "failed"]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"version": __version__} | super().to_json()

    def error(self) -> VerificationError | None:
        """Where a path failed."""
        if not self.failed:
            return None
        return VerificationError(
            f"Not as it should be on this machine: {', '.join(self.failed)}.",
            "Do not use those paths here, and report it with the proof (-o FOLDER).",
        )


class Path(NamedTuple):
    """A way to run on a GPU: what it needs, and how it is tried, there or in the place of it."""

    name: str
    what: str
    needs: tuple[tuple[str, str, str], ...]  # module, package, extra
    run: Callable[["Bench"], Figures]
    stand_in: str
    share: int = 1  # of the time, beside the others'


class Bench:
    """What paths are tried with: nano, its recorded inputs, a folder, a device, and a watch.

    `weights` is the bundle whose stored weights the specification is of.
    """

    def __init__(self, folder: FilePath, device: Device, watch: Watch) -> None:
        self.folder, self.device, self.watch = folder, device, watch
        self.bundle = self.weights = Bundle.open(bundle_path("nano"))

    @cached_property
    def _recording(self) -> Any:
        from medmoe_edge.evaluation.recording import unpack_recording

        return unpack_recording(self.bundle, read_recorded(self.bundle))[0]

    def compare(self, runtime: Runtime) -> Figures:
        """Hold a runtime against the specification, and time it on a GPU; raises `Fault`."""
        from medmoe_edge.evaluation.targets import agree

        recording, watched = self._recording, Watched(runtime, self.watch)
        examples = list(
            islice(
                (each for group in recording.examples.values() for each in group),
                QUESTIONS[self.device],
            )
        )
        (found,) = agree(
            self._specified,
            {"path": lambda: contextlib.nullcontext((watched, "here"))},
            recording.tokenizer,
            examples,
            load=recording.load,
        )
        figures: Figures = {
            "questions": found.questions,
            "logit_error": found.logit_error,
            "vision_error": found.vision_error,
            "bound": BOUND,
        }
        if not max(found.logit_error, found.vision_error) <= BOUND:  # NaN is no agreement either
            raise Fault(
                f"Logits are off by {found.logit_error:.2g} and image tokens by "
                f"{found.vision_error:.2g} of the specification, more than {BOUND:g}."
            )
        return figures | (times_of(watched) if self.device == "cuda" else {})

    @contextlib.contextmanager
    def _specified(self) -> Iterator[tuple[Runtime, str]]:
        from medmoe_edge.evaluation.targets import specified

        self.watch.check()
        with specified(self.weights) as (runtime, where):
            yield Watched(runtime, self.watch), where


def times_of(runtime: Runtime) -> Figures:
    """Seconds to a first token, and tokens per second, after a first round; memory of the GPU."""
    side = runtime.config.vision.image_size
    pixels = np.zeros((1, 3, side, side), np.float32)

    def answer() -> tuple[float, float]:
        begun = time.perf_counter()
        features = runtime.encode_image(pixels)
        cache = runtime.new_cache(len(features) + NEW_TOKENS + 1)
        runtime.step(features, cache)
        first = time.perf_counter()
        embeds = runtime.embed([0])
        for _ in range(NEW_TOKENS):
            runtime.step(embeds, cache)
        return first - begun, NEW_TOKENS / (time.perf_counter() - first)

    answer()
    first, rate = answer()
    found: Figures = {"first_token_seconds": first, "tokens_per_second": rate}
    if (used := _memory_used()) is not None:
        found["gpu_memory_used"] = used
    return found


def _memory_used() -> int | None:
    """Of the first GPU, by whatever runs on it; None where it cannot be asked."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


# --- the paths ----------------------------------------------------------------------------------


def _kernels(bench: Bench) -> Figures:
    """The kernels of the experts against float64; on a GPU one layer of full width, and timed."""
    import torch

    from medmoe_edge.kernels import launch

    cuda = bench.device == "cuda"
    kernels = contextlib.nullcontext() if cuda else launch.interpreted()
    figures: Figures = {}
    with kernels:
        for activation in ("swiglu", "gelu_tanh"):
            for name, group in FORMATS.items():
                layer = launch.random_layer(activation, group, torch.float16, 128, 128)
                for tokens in TOKENS[bench.device]:
                    bench.watch.check()
                    error = launch.error_of(layer, tokens, 2, torch.float16, bench.device)
                    figures[f"error_{activation}_{name}_{tokens}"] = error
                    _check_error(error, f"{activation} in {name}, {tokens} tokens")
        if cuda:
            for name, group in FORMATS.items():
                bench.watch.check()
                layer = launch.random_layer("swiglu", group, torch.float16, WIDTH, HIDDEN)
                error = launch.error_of(layer, 1, 2, torch.float16, "cuda")
                _check_error(error, f"swiglu in {name}, full width")
                seconds = launch.seconds_of(layer, 2, REPEATS)
                rate = layer.bytes_of(2) / seconds
                figures |= {f"full_width_{name}_error": error, f"full_width_{name}_s": seconds}
                figures[f"full_width_{name}_of_bandwidth"] = rate / launch.bandwidth()
    return figures


def _check_error(error: float, what: str) -> None:
    from medmoe_edge.kernels.launch import HALF_ERROR

    bound = min(HALF_ERROR.values())
    if not 0 < error < bound:
        raise Fault(f"The kernel for {what} is off float64 by {error:.2g}, more than {bound:g}.")


def _torch(bench: Bench) -> Figures:
    from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime

    return bench.compare(TorchBundleRuntime(bench.bundle, bench.device))


def _torch_paged(bench: Bench) -> Figures:
    from medmoe_edge.runtimes.torch.paged import PagedTorchRuntime

    runtime = PagedTorchRuntime(bench.bundle, "50%", bench.device)
    return bench.compare(runtime) | _paged(runtime)


def _paged(runtime: Any) -> Figures:
    """How many experts were in memory; raises `Fault` where it was all of them."""
    slots = runtime.requests.slots
    moe = runtime.config.moe
    every = len(moe.layers) * moe.num_experts
    if not slots.count < every:
        raise Fault(f"All {every} experts were in memory, so that nothing was paged.")
    return {"experts": every, "slots": slots.count}


def _ort_cuda(bench: Bench) -> Figures:
    from medmoe_edge.export.targets import export_target
    from medmoe_edge.runtimes.ort.runtime import OrtRuntime

    out = bench.folder / "onnxruntime-cuda"
    export_target(bench.bundle, out, Target("onnxruntime-cuda", "fp16"), force=True)
    return bench.compare(OrtRuntime(Bundle.open(out), device=bench.device))


def _ort_cuda_paged(bench: Bench) -> Figures:
    """In fp16, the one form that is paged: nano is exported anew from its checkpoint."""
    from medmoe_edge.embedded import checkpoint_path
    from medmoe_edge.export.build import BuildOptions, export_bundle
    from medmoe_edge.export.targets import export_target
    from medmoe_edge.runtimes.ort.paged import SlotOrtRuntime

    bench.watch.check()
    exact = bench.folder / "fp32"
    export_bundle(checkpoint_path("nano"), exact, BuildOptions(precision="fp32"))
    out = bench.folder / "paged"
    bench.watch.check()
    export_target(Bundle.open(exact), out, Target("onnxruntime-cuda", "fp16", paged=True))
    bench.weights = Bundle.open(exact)
    runtime = SlotOrtRuntime(Bundle.open(out), "50%", device=bench.device)
    return bench.compare(runtime) | _paged(runtime)


def _engine(bench: Bench) -> Figures:
    """Build, deserialise, compare, replay; on the CPU what of that there is."""
    from medmoe_edge.export.targets import export_target, plan_target, write_graphs

    if bench.device == "cpu":
        from medmoe_edge.evaluation.targets import GraphRuntime

        graphs = bench.folder / "graphs"
        graphs.mkdir()
        write_graphs(bench.bundle, NO_ENGINE, graphs)
        paths = (graphs / f"{name}.onnx" for name in ("vision", "decoder"))
        return bench.compare(GraphRuntime(bench.bundle, *paths)) | _built_elsewhere(bench)
    from medmoe_edge.runtimes.tensorrt.device import CudaDevice
    from medmoe_edge.runtimes.tensorrt.runtime import TensorRTRuntime

    library = _library()
    device = CudaDevice(EXTRAS[library])
    target = plan_target(bench.bundle, library, gpu=device.sm)
    built = export_target(bench.bundle, bench.folder / library, target, force=True)
    runtime = TensorRTRuntime(Bundle.open(bench.folder / library), device=device)
    figures = bench.compare(runtime) | {
        "library": f"{library} {target.library_version}",
        "build_seconds": built["decoder"].seconds,
        "engine_bytes": built["decoder"].bytes,
        "build_peak_memory": built["decoder"].peak_memory or 0,
        "cache_in_place": writes_in_place(target),
    }
    return figures | _replayed(runtime)


def _replayed(runtime: Any) -> Figures:
    """Decode until a captured graph was replayed; raises `Fault` where none was."""
    cache, embeds = runtime.new_cache(8), runtime.embed([0])
    for _ in range(6):
        runtime.step(embeds, cache)
    if not cache.replays:
        raise Fault("No decode step was captured as a CUDA graph.")
    again = runtime.new_cache(8)
    plain = [runtime.step(embeds, again).logits for _ in range(2)]
    cache.length = 1
    replayed = runtime.step(embeds, cache).logits
    gap = float(np.abs(replayed - plain[1]).max() / np.abs(plain[1]).max())
    if not gap <= BOUND:
        raise Fault(f"A replayed step is off a plain one by {gap:.2g}, more than {BOUND:g}.")
    return {"graphs_captured": len(cache.replays), "replay_error": gap}


def _built_elsewhere(bench: Bench) -> Figures:
    """An engine of TensorRT for RTX, which needs no GPU to be built, where that is installed."""
    from medmoe_edge.export.targets import export_target, plan_target

    try:
        target = plan_target(bench.bundle, "tensorrt-rtx", gpu="sm89")
    except MissingDependencyError:
        return {"engine_built": False}
    bench.watch.check()
    built = export_target(bench.bundle, bench.folder / "engines", target)
    return {
        "engine_built": True,
        "build_seconds": built["decoder"].seconds,
        "engine_bytes": built["decoder"].bytes,
        "build_peak_memory": built["decoder"].peak_memory or 0,
    }


def _engine_paged(bench: Bench) -> Figures:
    from medmoe_edge.evaluation.targets import PagedGraphRuntime, export_paged_graphs
    from medmoe_edge.export.targets import export_target, plan_target
    from medmoe_edge.runtimes.tensorrt.device import CudaDevice
    from medmoe_edge.runtimes.tensorrt.runtime import PagedTensorRTRuntime

    out = bench.folder / "paged"
    if bench.device == "cpu":
        out.mkdir()
        export_paged_graphs(bench.bundle, replace(NO_ENGINE, paged=True), out)
        graphs = PagedGraphRuntime(out, "50%")
        return bench.compare(graphs) | _paged(graphs)
    if _library() != "tensorrt-rtx":
        raise MissingDependencyError("tensorrt-rtx-cu13-bindings", "rtx")
    device = CudaDevice(EXTRAS["tensorrt-rtx"])
    target = plan_target(bench.bundle, "tensorrt-rtx", gpu=device.sm, paged=True)
    export_target(bench.bundle, out, target, force=True)
    runtime = PagedTensorRTRuntime(Bundle.open(out), "50%", device=device)
    return bench.compare(runtime) | _paged(runtime)


def _library() -> Library:
    """The library that serves the GPU that is here."""
    from medmoe_edge.runtimes.tensorrt.device import CudaDevice

    gpu = GPUS.get(CudaDevice("rtx").sm)
    return gpu.library if gpu else "tensorrt"


_ONNX = (("onnx", "onnx", "export"), ("onnx_ir", "onnx-ir", "export"))
_TORCH = (("torch", "torch", "export"), *_ONNX)
PATHS = (
    Path(
        "kernels",
        "the experts' kernels against float64",
        (("torch", "torch", "export"), ("triton", "triton", "plugin")),
        _kernels,
        "Triton's interpreter",
        share=2,
    ),
    Path("torch", "PyTorch, all experts in memory", _TORCH, _torch, "PyTorch on the CPU, fp32"),
    Path(
        *("torch-paged", "PyTorch, half of the experts in memory", _TORCH, _torch_paged),
        "PyTorch on the CPU, fp32",
    ),
    Path(
        *("onnxruntime-cuda", "ONNX Runtime on CUDA", _ONNX, _ort_cuda),
        "the same graph in ONNX Runtime on the CPU",
    ),
    Path(
        *("onnxruntime-cuda-paged", "ONNX Runtime on CUDA, half of the experts in memory", _TORCH),
        _ort_cuda_paged,
        "the same graph in ONNX Runtime on the CPU",
    ),
    Path(
        *("engine", "TensorRT: build, load, compare, replay", _ONNX, _engine),
        "the engine's graph in ONNX Runtime on the CPU",
    ),
    Path(
        *("engine-paged", "TensorRT for RTX, half of the experts in memory", _ONNX, _engine_paged),
        "the engine's graph in ONNX Runtime on the CPU",
    ),
)


# --- running them -------------------------------------------------------------------------------


def prove(
    progress: Progress = no_progress,
    device: Device | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Proof:
    """Try every path on the GPU that is here, or its stand-in.

    Args:
        progress: Called with the path, and how many are done of all.
        device: `cpu` for stand-ins even where there is a GPU; None: what is here.
        clock: Seconds from any moment on, by which each path has its share of the time; what one
            does not use, the later ones have.

    Returns:
        The proof; a path that fails does not stop the others.
    """
    here = device or ("cuda" if cuda_devices() else "cpu")
    end, checked = clock() + SECONDS - LAST, []
    with tempfile.TemporaryDirectory(prefix="medmoe-prove.") as folder:
        for place, path in enumerate(PATHS):
            progress(path.name, place, len(PATHS))
            left = sum(other.share for other in PATHS[place:])
            share = (end - clock()) * path.share / left
            own = FilePath(folder) / path.name
            own.mkdir()
            checked.append(check(path, own, here, Watch(share, clock)))
    return Proof(describe_machine(here), tuple(checked))


def check(path: Path, folder: FilePath, device: Device, watch: Watch | None = None) -> Checked:
    """Try one path, for as long as the watch allows."""
    watch = watch or Watch()
    begun = watch.clock()
    cpu = device == "cpu"
    tried = Checked(path.name, path.what, "not run", NO_DEVICE if cpu else "", None, {}, 0.0)
    if lacking := [need for need in path.needs if importlib.util.find_spec(need[0]) is None]:
        _, package, extra = lacking[0]
        why = f"{package} is not installed (medmoe-edge[{extra}])"
        return replace(tried, why=f"{NO_DEVICE}; {why}" if cpu else why)
    try:
        watch.check()
        figures = path.run(Bench(folder, device, watch))
    except OutOfTimeError:
        why = f"{NO_DEVICE}; {NO_TIME}" if cpu else NO_TIME
        return replace(tried, why=why, seconds=watch.clock() - begun)
    except MissingDependencyError as error:
        return replace(tried, why=f"{NO_DEVICE}; {error.what}" if cpu else error.what)
    except Fault as fault:
        tried = replace(tried, verdict="failed", why=str(fault))
    except MedMoEError as error:
        tried = replace(tried, verdict="failed", why=f"{error.what} {error.remedy}")
    except Exception as error:  # a driver or a library may fail in any way: that is the finding
        tried = replace(tried, verdict="failed", why=f"{type(error).__name__}: {error}")
    else:
        tried = replace(tried, figures=figures, verdict="not run" if cpu else "passed")
    seconds = watch.clock() - begun
    return replace(tried, stand_in=path.stand_in if cpu else None, seconds=seconds)
