"""Pictures of strangers are decoded in another process, so that none can take too much.

A file of a kilobyte may unpack to gigabytes, in libraries that know no limit. `read_apart` hands
it to a process that may take `Bounds.megabytes` and `Bounds.seconds`, and is ended where it takes
more; whoever else asks is answered meanwhile by a second one. They start when they are first
needed, stay for the next picture, and end with this process. Where the system has no limit for
memory (macOS, Windows), only the time is bounded, and what a header says.

Over the pipes go lines of JSON, each followed by so many bytes: nothing that a hostile file might
have made of the other process is run here.
"""

import atexit
import contextlib
import dataclasses
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from medmoe_edge import errors
from medmoe_edge.errors import (
    ImageError,
    MedMoEError,
    MissingDependencyError,
    Notice,
    ResourceError,
    of_machine,
)
from medmoe_edge.image.loading import decoding, load_image
from medmoe_edge.image.pixels import HEAD_BYTES, MAX_PIXELS, Image, is_dicom, shown_name

NAME = "The image"  # how messages call an upload
START_SECONDS = 60.0  # for a process to be ready, on a slow disk
PROCESSES = 2
AT_ONCE = 0.5  # seconds in which no picture has ended a process yet
CHUNK = 2**20
MIB = 2**20
# what is told of an image beside its pixels, as plain values or lists of them
FIELDS = {field.name for field in dataclasses.fields(Image)} - {"pixels", "notices"}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What one picture may take: pixels, and memory and seconds while it is decoded."""

    pixels: int = MAX_PIXELS
    megabytes: int = 900
    seconds: float = 4.5


@dataclasses.dataclass(frozen=True, eq=False)
class GreyValues:
    """Values `[H, W]` of a grey DICOM frame in its unit (HU for CT), as large as its picture.

    `inverted`: the lowest value is shown white.
    """

    values: npt.NDArray[np.float32]
    inverted: bool


@dataclasses.dataclass(frozen=True)
class Stated:
    """What a DICOM file says of the patient and the series: to be shown, never to be kept.

    `patient` has those of `name`, `id`, `birth_date`, `sex`, `study_date`, `study`, `series` and
    `laterality` that are stated, dates in ISO 8601. `series` is a hash, the same for all files of
    a patient's series. `position` along the normal of the plane in mm, or else `instance`, puts
    them in order.
    """

    patient: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    series: str | None = None
    position: float | None = None
    instance: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Displayed:
    """A picture, the values behind it if it is a grey frame of a DICOM file, and what that says."""

    image: Image
    values: GreyValues | None
    stated: Stated


def read_apart(
    source: bytes | Path, frame: int | None = None, bounds: Bounds | None = None
) -> Image:
    """What `load_image` reads of an upload or of a path, decoded in another process.

    Raises `ImageError` as `load_image` does, or where it takes more memory or time than its bounds
    allow, and `ResourceError` where the other process cannot be started.
    """
    answer = _ask(source, frame, bounds or Bounds(), values=False)
    return _image_of(answer)


def read_for_display(
    source: bytes | Path, frame: int | None = None, bounds: Bounds | None = None
) -> Displayed:
    """The same, with what a person who looks at it may want to know."""
    answer = _ask(source, frame, bounds or Bounds(), values=True)
    behind = answer.arrays[1:]
    values = GreyValues(behind[0], answer.fields["inverted"]) if behind else None
    return Displayed(_image_of(answer), values, Stated(**answer.fields["stated"]))


@contextlib.contextmanager
def held(data: bytes) -> Iterator[Path]:
    """A path that the other processes can read: for several frames of one upload.

    It lies in memory where the system can do so (Linux), else in a folder that is then removed.
    Messages name it `NAME`, as they do all uploads.
    """
    with contextlib.ExitStack() as ending:
        file, path = _nameless(ending, os.getpid())
        file.write(data)
        file.flush()
        yield path


def _image_of(answer: "_Answer") -> Image:
    notices = tuple(Notice(**notice) for notice in answer.fields["notices"])
    told = {name: answer.fields[name] for name in FIELDS}
    told = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
    return Image(answer.arrays[0], notices=notices, **told)


def warm_up() -> None:
    """Start a process for the first picture, unless there is one; this does not wait for it."""
    with contextlib.suppress(queue.Empty), _POOL.process(block=False):
        pass


@dataclasses.dataclass(frozen=True, eq=False)
class _Answer:
    """What the other process tells: fields, and read-only arrays."""

    fields: dict[str, Any]
    arrays: list[npt.NDArray[Any]]


def _ask(source: bytes | Path, frame: int | None, bounds: Bounds, *, values: bool) -> _Answer:
    request = {**dataclasses.asdict(bounds), "frame": frame, "values": values}
    request["upload"] = isinstance(source, bytes) or values  # only uploads are displayed
    if isinstance(source, Path):
        request["path"] = str(source.absolute())
    else:
        request["bytes"] = len(source)
    data = b"" if isinstance(source, Path) else source
    started = time.monotonic()
    for _ in range(2):
        with _POOL.process() as process:
            answer = process.ask(request, data, bounds)
        if answer is not None:
            return answer
        if time.monotonic() - started > AT_ONCE:
            break  # else it may have been ended before, by the system or a person
    raise ImageError(
        f"{NAME} cannot be decoded: it ends the program that does it, or takes too much memory.",
        "Export it again, or save it as PNG.",
    )


class _Process:
    """The other process, as seen from here; one request at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "medmoe_edge.image.worker"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what libraries say there may quote the file
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl+C is for us: what was accepted is still answered
            )
        except OSError as error:
            raise _not_started() from error
        self._in = cast(IO[bytes], self._process.stdin)
        self._out = cast(IO[bytes], self._process.stdout)
        self._is_ready = False

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], data: bytes, bounds: Bounds) -> _Answer | None:
        """Its answer; None if it has ended by itself.

        Whatever goes wrong, the process has then ended or can be asked again.
        """
        if not self._is_ready:
            with self._killed_after(START_SECONDS):
                self._is_ready = self._out.readline() == b"ready\n"
            if not self._is_ready:
                self.end()
                raise _not_started()
        with self._killed_after(bounds.seconds) as late:
            try:
                self._in.write(json.dumps(request).encode() + b"\n")
                self._in.write(data)
                self._in.flush()
                answer = json.loads(self._out.readline())
                if "error" in answer:
                    raise _error_of(answer)
                return _Answer(answer, [self._array(*array) for array in answer["arrays"]])
            except (OSError, ValueError):  # it has ended: no line, or half of one
                self.end()
                if not late.is_set():
                    return None
        what = f"{NAME} takes longer to decode than the limit of {bounds.seconds:g} s."
        raise ImageError(what, "Shrink it or crop it first, or save it as PNG.")

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):
                pipe.close()

    def _array(self, shape: list[int], dtype: str) -> npt.NDArray[Any]:
        array = np.empty(shape, dtype)
        left = _bytes_of(array)
        while left:
            count = cast(Any, self._out).readinto(left)
            if not count:
                raise ValueError("the process has ended")
            left = left[count:]
        array.setflags(write=False)
        return array

    @contextlib.contextmanager
    def _killed_after(self, seconds: float) -> Iterator[threading.Event]:
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()
            timer.join()
            if late.is_set():  # perhaps just after the answer
                self.end()


class _Pool:
    """A few places for processes; a process is started when a free place has none."""

    def __init__(self) -> None:
        # the last one used comes first, so that a second is started only when it is needed
        self._places: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._places.put(None)

    @contextlib.contextmanager
    def process(self, block: bool = True) -> Iterator[_Process]:
        """A process that nobody else asks meanwhile; waits for one, or raises `queue.Empty`."""
        process = self._places.get(block)
        try:
            if process is not None and not process.is_alive:
                process.end()
                process = None  # if none can be started, the place stays free
            process = process or _Process()
            yield process
        finally:
            self._places.put(process)

    def close(self) -> None:
        """End the processes that nobody asks."""
        with contextlib.suppress(queue.Empty):
            while True:
                process = self._places.get_nowait()
                if process is not None:
                    process.end()


_POOL = _Pool()
atexit.register(_POOL.close)


def _not_started() -> ResourceError:
    return ResourceError(
        "The process that decodes images cannot be started.", "Close other programs, and try again."
    )


def _error_of(answer: dict[str, Any]) -> MedMoEError:
    """The error that the other process tells of; only those of ours."""
    kind = getattr(errors, str(answer["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, MedMoEError)):
        kind = ImageError
    error = kind.__new__(kind)
    MedMoEError.__init__(error, str(answer["what"]), str(answer["remedy"]))
    return error


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(cast(Any, array.reshape(-1).view(np.uint8)))


# Below is what runs in the other process.


def main() -> None:
    """Answer requests from standard input until it ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print there must not mix with the answers
    for reader in ("raster", "dicom", "nifti"):  # now, or it would take of a picture's time
        with contextlib.suppress(MissingDependencyError):
            importlib.import_module(f"medmoe_edge.image.{reader}")
    answers.write(b"ready\n")
    answers.flush()
    while line := requests.readline():
        request = json.loads(line)
        with _source(requests, request) as path:
            answer = _answer(path, request)
        told = [(array.shape, array.dtype.str) for array in answer.arrays]
        answers.write(json.dumps(answer.fields | {"arrays": told}).encode() + b"\n")
        for array in answer.arrays:
            answers.write(_bytes_of(np.ascontiguousarray(array)))
        answers.flush()
        del answer


@contextlib.contextmanager
def _source(requests: IO[bytes], request: dict[str, Any]) -> Iterator[Path]:
    """The path of what is asked about; what was sent lies in memory, where the system can."""
    if "path" in request:
        yield Path(request["path"])
        return
    with contextlib.ExitStack() as ending:
        file, path = _nameless(ending, "self")
        left = request["bytes"]
        while left:
            data = requests.read(min(left, CHUNK))
            left -= file.write(data) if data else sys.exit()
        file.flush()
        yield path


def _nameless(ending: contextlib.ExitStack, process: int | str) -> tuple[IO[bytes], Path]:
    """A file that `process` holds open until the end, and the path of it."""
    if hasattr(os, "memfd_create"):  # Linux
        file = ending.enter_context(os.fdopen(os.memfd_create("image"), "wb"))
        return file, Path(f"/proc/{process}/fd/{file.fileno()}")
    path = Path(ending.enter_context(tempfile.TemporaryDirectory()), "image")
    return ending.enter_context(path.open("wb")), path


def _answer(path: Path, request: dict[str, Any]) -> _Answer:
    try:
        with _bounded(request["megabytes"] * MIB, request["seconds"]):
            return _read(path, request)
    except MissingDependencyError as error:
        return _failed(error)
    except (MemoryError, ResourceError, OSError) as error:
        if found := of_machine(NAME, error) or of_machine(NAME, error.__context__):
            return _failed(found)
        if isinstance(error, OSError):
            raise
        what = f"{NAME} takes more memory to decode than the limit of {request['megabytes']:,} MiB."
        return _failed(ImageError(what, "Shrink it or crop it first."))
    except MedMoEError as error:
        if request["upload"]:
            error.what = error.what.replace(shown_name(path), NAME)
        return _failed(error)


def _failed(error: MedMoEError) -> _Answer:
    told = {"error": type(error).__name__, "what": error.what, "remedy": error.remedy}
    return _Answer(told, [])


def _read(path: Path, request: dict[str, Any]) -> _Answer:
    image = load_image(path, frame=request["frame"], most_pixels=request["pixels"])
    fields = {name: getattr(image, name) for name in FIELDS}
    fields |= {"notices": list(map(dataclasses.asdict, image.notices)), "stated": {}}
    with path.open("rb") as file:
        wanted = request["values"] and is_dicom(file.read(HEAD_BYTES))
    if wanted:
        from medmoe_edge.image.dicom import read_grey_values, read_stated

        with decoding(NAME):
            found = read_grey_values(path, request["frame"], NAME)
            fields["stated"] = read_stated(path, request["frame"])
        if found is not None:
            return _Answer(fields | {"inverted": found[1]}, [image.pixels, found[0]])
    return _Answer(fields, [image.pixels])


@contextlib.contextmanager
def _bounded(memory: int, seconds: float) -> Iterator[None]:
    """Limits of the system for this process: bytes in all, and seconds of the processor from now.

    The time counts here too, in case the one who asks has ended.
    """
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime + 2 * seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
    if sys.platform != "linux":
        yield
        return
    pages = Path("/proc/self/statm").read_text("ascii").split()
    size, resident = (int(count) * resource.getpagesize() for count in pages[:2])
    limit = size + max(memory - resident, 16 * MIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


if __name__ == "__main__":
    main()
