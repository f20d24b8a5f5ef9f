"""An ONNX file into a TensorRT network; what TensorRT does not take is named as we name it.

A TensorRT build watched: how far it is, and how to stop it.

An exception must not pass through TensorRT's own frames. So Ctrl-C, or what `progress` raises, is
noted, TensorRT is told to stop at its next step, and the exception is raised when it has.

An ONNX graph becomes a TensorRT engine for one GPU, built with either of TensorRT's libraries.

Networks are strongly typed: the graph alone says what is computed in fp16, bf16 or fp32, and which
weights stay in 4 or 8 bits. The engine is written as it is made, to a file that takes the place of
`out` only when it is whole. TensorRT for RTX needs no GPU to build.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnx
import platformdirs

from medmoe_edge._types import Progress
from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_file, file_sha256, writing
from medmoe_edge.bundle.machine import (
    available_memory,
    peak_memory,
    reset_peak,
    return_free_memory,
)
from medmoe_edge.errors import ConfigError, MissingDependencyError, ModelError, ResourceError
from medmoe_edge.export.gpus import (
    MB,
    TITLES,
    Gpu,
    Library,
    check_memory,
    library_version,
    load_library,
    make_logger,
    reason,
)

KEPT = 16  # engines; those used least recently go first


logger = logging.getLogger(__name__)


class EngineCache:
    """A folder of engines, by default in the user's own cache."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or platformdirs.user_cache_path("medmoe-edge") / "engines"

    def fetch(self, key: str, out: Path) -> bool:
        """Copy the engine of a key to `out`, whole or not at all; False where there is none."""
        for path in self.folder.glob(f"{key}-*.engine"):
            if file_sha256(path) != path.stem.partition("-")[2]:
                path.unlink(missing_ok=True)
                continue
            with path.open("rb") as source, atomic_file(out) as file:
                shutil.copyfileobj(source, file, 2**20)
            with contextlib.suppress(OSError):  # of a folder that can only be read
                os.utime(path)  # used now
            return True
        return False

    def keep(self, key: str, engine: Path) -> None:
        """Put a copy of an engine into the cache, and remove what is too much.

        Where the cache cannot be written, that is logged: the engine itself is none the worse.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (
                engine.open("rb") as source,
                atomic_file(self.folder / f"{key}-{file_sha256(engine)}.engine") as file,
            ):
                shutil.copyfileobj(source, file, 2**20)
            by_age = sorted(self.folder.glob("*.engine"), key=lambda path: path.stat().st_mtime_ns)
            for path in by_age[:-KEPT]:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("The engine is not kept in %s (%s).", self.folder, error.strerror)


def engine_key(graph: Path, settings: Any) -> str:
    """The hash of a graph with its weights and of `settings` (JSON: GPU, profiles, version)."""
    parts = [json.dumps(settings, sort_keys=True), *map(file_sha256, graph_files(graph))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def graph_files(graph: Path) -> Sequence[Path]:
    """The ONNX file and the files of its weights; raises `ModelError` if one cannot be read."""
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's errors share no base with those of the file system
        raise ModelError(f"{graph} is no ONNX graph.", "Export the model again.") from error
    locations = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [graph, *(graph.parent / name for name in sorted(locations))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{graph} lacks its weights, {missing[0]}.", "Copy or export the whole folder again."
        )
    return files


PARTS = (".weight", ".bias", ".scale")
MAKES_FLOATS = ("DequantizeLinear", "Cast", "Transpose")


def parse(trt: Any, network: Any, log: Any, graph: Path, title: str) -> Any:
    """Read `graph` into `network`, weights mapped; keep the parser returned as long as the network.

    Raises `ModelError`, which names the ONNX op, its node and our layer.
    """
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise _refusal(parser, onnx.load(graph, load_external_data=False), title)
    return parser


def _refusal(parser: Any, model: onnx.ModelProto, title: str) -> ModelError:
    error = parser.get_error(0)
    node = _node(model, error)
    where = "the graph"
    if node is not None:
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        layer = layer_of(model, node)
        where = f"the op {op} of node {node.name!r}" + (f" at {layer}" if layer else "")
    return ModelError(
        f"{title} does not take {where}: {reason(error.desc())}.",
        "Choose another precision, or the target onnxruntime-cuda.",
    )


def _node(model: onnx.ModelProto, error: Any) -> onnx.NodeProto | None:
    nodes = list(model.graph.node)
    named = [node for node in nodes if node.name and node.name == error.node_name()]
    at = error.node()
    return named[0] if named else nodes[at] if 0 <= at < len(nodes) else None


def layer_of(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """The nearest weight that a node reads, without `.weight`; empty where it reads none.

    Weights reach a node through what makes floats of integers, which counts as no distance.
    """
    weights = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith(PARTS)}
    makers = {name: maker for maker in model.graph.node for name in maker.output}
    names: deque[str] = deque(node.input)
    seen = set(names)
    while names:
        name = names.popleft()
        if name in weights:
            return name.removesuffix(".scale").rpartition(".")[0]
        if name in makers:
            further = [one for one in makers[name].input if one not in seen]
            seen.update(further)
            if makers[name].op_type in MAKES_FLOATS:
                names.extendleft(reversed(further))
            else:
                names.extend(further)
    return ""


class Watch:
    """Reports the outermost phases of a build; TensorRT calls it through `make_monitor`."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.stopped_by: BaseException | None = None
        self._steps: dict[str, int] = {}  # of the phases that are reported
        self._outermost = ""

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins; only the outermost and those right inside it are of interest."""
        if parent is None:
            self._outermost = name
        if parent is None or parent == self._outermost:
            self._steps[name] = steps
            self._report(name, 0)

    def step_complete(self, name: str, step: int) -> bool:
        """A step of a phase is done; False tells TensorRT to stop."""
        self._report(name, step + 1)
        return self.stopped_by is None

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C stop the build, and raise whatever stopped it once the block has ended."""
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGINT, self._interrupt)
        else:  # signals are another thread's
            before = None
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        if self.stopped_by is not None:
            raise self.stopped_by

    def _interrupt(self, *_: object) -> None:
        self.stopped_by = KeyboardInterrupt()

    def _report(self, name: str, done: int) -> None:
        if self.progress is None or name not in self._steps or self.stopped_by is not None:
            return
        try:
            self.progress(name, done, self._steps[name])
        except BaseException as error:
            self.stopped_by = error


def make_monitor(trt: Any, watch: Watch) -> Any:
    """The `IProgressMonitor` that hands everything to `watch`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the library is chosen at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            watch.phase_start(name, parent, steps)

        def phase_finish(self, name: str) -> None:
            """Nothing to say: its last step was reported."""

        def step_complete(self, name: str, step: int) -> bool:
            return watch.step_complete(name, step)

    return Monitor()


OUT_OF_WORKSPACE = re.compile("workspace|mem budget|OutOfMemory")  # in TensorRT's messages
Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]

"""Of each input of varying shape: the smallest, the one to be fastest at, the largest."""


@dataclass(frozen=True)
class Built:
    """An engine on disk: its size, and what it took to build it.

    `peak_memory` is the most that the process held, in bytes, None where the system does not tell.
    A `cached` engine was not built anew.
    """

    path: Path
    bytes: int
    seconds: float
    peak_memory: int | None
    cached: bool
    library_version: str


def build_engine(
    graph: Path,
    out: Path,
    *,
    library: Library,
    gpu: Gpu,
    profiles: Sequence[Profile],
    memory_limit: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build `graph` (its weights beside it) for `gpu` into `out`, or take it from the cache.

    `memory_limit` bounds the GPU memory for intermediate results, in bytes; `cache` is a folder, by
    default the user's; `progress` is called with `(phase, done, total)` and may raise to stop.
    Raises `ModelError` for a graph that cannot be built, `ConfigError` for impossible profiles,
    `MissingDependencyError`, and `ResourceError` for too little memory, a full disk or, with
    TensorRT proper, another GPU than the one to build for. Ctrl-C stops it at the next step.
    """
    trt, begun = load_library(library), time.monotonic()
    engines, key = EngineCache(cache), _key(trt, graph, library, gpu, profiles, memory_limit)
    with writing(out):
        if engines.fetch(key, out):
            return _built(trt, out, begun, peak=None, cached=True)
        check_memory(sum(file.stat().st_size for file in graph_files(graph)), available_memory())
        if library == "tensorrt":
            _check_present(gpu)
        reset_peak()
        with atomic_file(out) as file:
            timings = engines.folder / f"timings-{library_version(trt)}-{gpu.sm}.cache"
            _Build(trt, library, gpu, progress).run(graph, profiles, memory_limit, timings, file)
        peak = peak_memory()
        return_free_memory()  # most of the weights, which the next engine's build has room for
        engines.keep(key, out)
    return _built(trt, out, begun, peak=peak, cached=False)


class _Build:
    """One build: the TensorRT objects that must live until it ends."""

    def __init__(self, trt: Any, library: Library, gpu: Gpu, progress: Progress | None) -> None:
        self.trt, self.library, self.gpu = trt, library, gpu
        self.title = f"{TITLES[library]} {library_version(trt)}"
        self.log = make_logger(trt)
        self.watch = Watch(progress)
        self.builder = trt.Builder(self.log)

    def run(
        self,
        graph: Path,
        profiles: Sequence[Profile],
        memory_limit: int | None,
        timings: Path,
        file: IO[bytes],
    ) -> None:
        typed = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self.builder.create_network(typed)
        parser = parse(self.trt, network, self.log, graph, self.title)
        config = self._config(memory_limit)
        for profile in profiles:
            self._add_profile(config, profile)
        if self.library == "tensorrt":  # the library for RTX times nothing
            load_timings(config, timings)
        with self.watch.interruptible(), self._in_memory():
            done = self._write(network, config, file)
        del parser  # lived until here: the network's weights are its
        if not done:
            raise self._failure(memory_limit)
        if self.library == "tensorrt":
            save_timings(config, timings)

    def _write(self, network: Any, config: Any, file: IO[bytes]) -> bool:
        """Build into the file: piece by piece where TensorRT can (from 10.13 on), or at once."""
        if not hasattr(self.builder, "build_serialized_network_to_stream"):
            plan = self.builder.build_serialized_network(network, config)
            return plan is not None and file.write(plan) > 0
        writer = _make_writer(self.trt, file)
        done = self.builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        return bool(done)

    def _config(self, memory_limit: int | None) -> Any:
        config = self.builder.create_builder_config()
        if self.library == "tensorrt-rtx":
            config.num_compute_capabilities = 1
            wanted = getattr(self.trt.ComputeCapability, self.gpu.sm.upper())
            config.set_compute_capability(wanted, 0)
        if memory_limit is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, memory_limit)
        self.monitor = make_monitor(self.trt, self.watch)
        config.progress_monitor = self.monitor
        return config

    def _add_profile(self, config: Any, profile: Profile) -> None:
        shapes = self.builder.create_optimization_profile()
        for name, (smallest, common, largest) in profile.items():
            shapes.set_shape(name, smallest, common, largest)
        if config.add_optimization_profile(shapes) < 0:
            raise ConfigError(
                f"The engine cannot have the shapes {dict(profile)}.",
                "They must grow from the smallest to the largest.",
            )

    @contextlib.contextmanager
    def _in_memory(self) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise ResourceError(
                f"{self.title} ran out of memory.", "Build on a machine with more memory."
            ) from error

    def _failure(self, memory_limit: int | None) -> ModelError | ResourceError:
        messages = "\n".join(self.log.errors)
        if memory_limit is not None and OUT_OF_WORKSPACE.search(messages):
            limit = f"{memory_limit / MB:g} MB"
            return ResourceError(
                f"{self.title} cannot build this within {limit} of intermediate results.",
                "Allow more, or leave the limit out.",
            )
        return ModelError(
            f"{self.title} cannot build this for {self.gpu.name}: {reason(messages)}.",
            "Choose another precision, or the target onnxruntime-cuda.",
        )


def load_timings(config: Any, path: Path) -> None:
    """Give a build the kernels' timings of builds before it."""
    stored = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False)


def save_timings(config: Any, path: Path) -> None:
    """Keep the timings of a build for the next; where that cannot be, the engine stands."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(bytes(memoryview(config.get_timing_cache().serialize())))
    except OSError as error:
        logger.warning("Timings are not kept in %s (%s).", path.parent, error.strerror)


def _make_writer(trt: Any, file: IO[bytes]) -> Any:
    """Takes the engine piece by piece; an `error` of the disk is kept, and TensorRT told of it."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # the library is chosen at run time
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()


def _check_present(gpu: Gpu) -> None:
    """Raise `ResourceError` unless the GPU is here: TensorRT proper tries its kernels."""
    try:
        from cuda.core import Device
    except ModuleNotFoundError as error:
        raise MissingDependencyError("cuda-core", "tensorrt") from error
    try:
        capability = Device().compute_capability
    except Exception as error:  # cuda-core's exceptions share no base, and differ with what lacks
        raise ResourceError(
            f"TensorRT builds on the GPU that will run the engine, and no {gpu.sm} GPU is here.",
            "Run this export on the device itself.",
        ) from error
    if (present := capability.major * 10 + capability.minor) != gpu.capability:
        raise ResourceError(
            f"TensorRT builds on the GPU that will run the engine: this one is sm{present}, "
            f"{gpu.name} is {gpu.sm}.",
            f"Run this export on the device itself, or build for sm{present}.",
        )


def _key(
    trt: Any,
    graph: Path,
    library: Library,
    gpu: Gpu,
    profiles: Sequence[Profile],
    memory_limit: int | None,
) -> str:
    settings = {
        "library": [library, str(trt.__version__)],
        "exporter": __version__,  # whose plugin is compiled into the engine
        "gpu": gpu.sm,
        "profiles": [dict(profile) for profile in profiles],
        "memory_limit": memory_limit,
    }
    return engine_key(graph, settings)


def _built(trt: Any, out: Path, begun: float, *, peak: int | None, cached: bool) -> Built:
    size, seconds = out.stat().st_size, time.monotonic() - begun
    return Built(out, size, seconds, peak, cached, library_version(trt))
