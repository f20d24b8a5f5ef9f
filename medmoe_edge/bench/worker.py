"""A process of its own for each measured model, so that its memory and its crashes are its own.

`Worker` starts this module as a process that reads requests and writes replies, a line of JSON
each; the methods of `Requests` answer them there.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Self

from medmoe_edge._types import there
from medmoe_edge.bench import measurement
from medmoe_edge.bench.backends import BundleBackend, Kind, open_backend
from medmoe_edge.bench.measurement import Measured, Shape, Spread, seconds, turn
from medmoe_edge.bench.routing import Asking, Session
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.machine import peak_memory, reset_peak
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import MedMoEError, ResourceError

TIMEOUT = 1800.0  # seconds of one request: loading or writing a large model is one
ROOT = Path(__file__).parents[2]  # where a process that starts elsewhere finds medmoe_edge
COMMAND = "from medmoe_edge.cli import main; main()"
logger = logging.getLogger(__name__)


class Worker:
    """A process that answers requests; a context manager, which leaves no process behind.

    `prefix` stands before its command, to run it under a limit.
    """

    def __init__(self, timeout: float = TIMEOUT, prefix: Sequence[str] = ()) -> None:
        self.timeout, self._prefix = timeout, prefix

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*self._prefix, sys.executable, "-m", "medmoe_edge.bench.worker"],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it writes only into folders that go with the bench
        self._process.communicate()
        self._errors.close()

    @property
    def ended(self) -> bool:
        """Whether it takes no more requests."""
        return self._process.poll() is not None

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a request and wait for its result.

        Raises `ResourceError` where that fails, ends the process or takes too long.
        """
        late = threading.Event()

        def expire() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.timeout, expire)
        timer.start()
        try:
            line = self._reply_to(json.dumps({"do": do, **arguments}))
        finally:
            timer.cancel()
        reply = json.loads(line) if line else {}
        if "value" in reply:
            return reply["value"]
        code = None if line else self._process.wait()
        self._errors.seek(0)
        logger.debug("A worker wrote: %s", self._errors.read().decode(errors="replace"))
        if code is None:
            raise ResourceError(reply["what"], reply["remedy"])
        raise too_slow(self.timeout) if late.is_set() else ended(code)

    def _reply_to(self, request: str) -> str:
        pipes = self._process
        to, back = there(pipes.stdin), there(pipes.stdout)
        try:
            to.write(request + "\n")
            to.flush()
            return back.readline()
        except BrokenPipeError:
            return ""


class Measurement:
    """Gathers what workers report of one model; see `open_backend` for the arguments."""

    def __init__(
        self,
        bundle: Bundle,
        shape: Shape,
        kind: Kind = "bundle",
        path: Path | None = None,
        form: str = "",
    ) -> None:
        self._opening = {
            "kind": kind,
            "path": str((path or bundle.folder).resolve()),
            "form": form,
            "config": bundle.config.to_json(),
            "shape": asdict(shape),
        }
        self._seconds: dict[str, list[float]] = {}
        self._bytes: dict[str, list[int | None]] = {}

    def open(self, worker: Worker) -> None:
        """Load it, and ask once to have its memory."""
        opened = worker.ask("open", **self._opening)
        self._seconds.setdefault("load", []).append(opened["load"])
        worker.ask("question")
        for name, count in {"loading": opened["peak"], **worker.ask("memory")}.items():
            self._bytes.setdefault(name, []).append(count)

    def turn(self, worker: Worker) -> None:
        """Ask for as long as a turn takes."""
        for parts in worker.ask("question"):
            whole = sum(value for name, value in parts.items() if name != "second")
            for name, value in {**parts, "question": whole}.items():
                self._seconds.setdefault(name, []).append(value)

    def result(self) -> Measured:
        """Medians over all workers and turns; one of each at least."""
        memory = {}
        for name, counts in self._bytes.items():
            known = [count for count in counts if count is not None]
            memory[name] = int(median(known)) if known else None
        return Measured({name: Spread.of(own) for name, own in self._seconds.items()}, **memory)


def cold_start(arguments: Sequence[str], timeout: float = TIMEOUT) -> float:
    """Seconds of a whole process of the command line; raises `ResourceError` where it fails."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise too_slow(timeout) from error
    taken = time.perf_counter() - start
    if done.returncode:
        logger.debug("It wrote: %s", done.stderr.decode(errors="replace"))
        raise ended(done.returncode)
    return taken


def too_slow(timeout: float) -> ResourceError:
    """The error for a process that was stopped."""
    return ResourceError(
        f"It took longer than {timeout:,.0f} s and was stopped.",
        "Measure a smaller model, or on a faster machine.",
    )


def ended(code: int) -> ResourceError:
    """The error for a process that ended by itself, from its exit status."""
    if -code == getattr(signal, "SIGKILL", None):
        return ResourceError(
            "Its process was killed, as systems do that run out of memory.",
            "Close other programs, or measure a smaller model.",
        )
    how = f"ended with exit code {code}" if code >= 0 else f"crashed ({signal.Signals(-code).name})"
    return ResourceError(f"Its process {how}.", "See what it wrote with --verbose.")


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}


class Requests:
    """What a worker's process does: each method is a request, of plain JSON values."""

    def open(
        self, kind: Any, path: str, form: str, config: Mapping[str, Any], shape: Mapping[str, int]
    ) -> dict[str, Any]:
        """Load a model: `load` seconds until it could answer, and the `peak` bytes meanwhile."""

        def make() -> None:
            model = ModelConfig.from_json(config)
            self.backend = open_backend(kind, Path(path), form, model, Shape(**shape))
            self.backend.touch()

        told = _opened(make)
        return told | {"load": max(told["load"] - seconds(self.backend.touch), 0.0)}

    def question(self) -> list[dict[str, float]]:
        """Seconds of a question's parts, of as many as a turn holds."""
        return turn(self.backend.question)

    def prefill(self, tokens: int) -> list[float]:
        """Seconds of prefills of so many tokens; only of bundles."""
        reset_peak()
        return turn(lambda: self._bundle().prefill(tokens))

    def ask(self, questions: int) -> list[float]:
        """Seconds of so many questions about one image; only of bundles."""
        return turn(lambda: self._bundle().ask(questions))

    def memory(self) -> dict[str, int | None]:
        """See `measurement.memory`; the peak is since the model was loaded or the last prefill."""
        return measurement.memory()

    def storage(self) -> dict[str, int | None]:
        """See `measurement.storage`."""
        return measurement.storage()

    def open_session(
        self, path: str, budget: int | None, prefetch: bool, asking: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Load a bundle to ask about modalities: `load` seconds until it had answered once."""

        def make() -> None:
            self.session = Session(Path(path), budget, prefetch, Asking(**asking))

        return _opened(make)

    def ask_about(self, modality: int, number: int) -> dict[str, Any]:
        """See `Session.ask`."""
        time.sleep(measurement.REST)
        return self.session.ask(modality, number)

    def make_checkpoint(self, config: Mapping[str, Any], tokenizer: str, out: str) -> None:
        """Write a checkpoint of random weights."""
        from medmoe_edge.checkpoint.reader import write_checkpoint
        from medmoe_edge.training.initialise import random_tensors

        model = ModelConfig.from_json(config)
        tensors = random_tensors(model, seed=0)
        write_checkpoint(Path(out), model, tensors, tokenizer_file=Path(tokenizer))

    def make_bundle(self, checkpoint: str, out: str) -> None:
        """Export a checkpoint in fp32."""
        from medmoe_edge.export.build import BuildOptions, export_bundle

        export_bundle(Path(checkpoint), Path(out), BuildOptions(precision="fp32"))

    def make_gguf(self, config: Mapping[str, Any], form: Any, out: str) -> None:
        """Write a GGUF of equal shape, with random weights."""
        from medmoe_edge.bench.gguf import write_gguf

        write_gguf(ModelConfig.from_json(config), form, Path(out))

    def _bundle(self) -> BundleBackend:
        assert isinstance(self.backend, BundleBackend)
        return self.backend


def _opened(make: Callable[[], None]) -> dict[str, Any]:
    """Seconds and the peak of loading; the peak of what follows begins anew."""
    told = {"load": seconds(make), "peak": peak_memory()}
    reset_peak()
    return told


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the bench does
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the replies
    requests = Requests()
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            reply = {"value": getattr(requests, do)(**request)}
        except MedMoEError as error:
            reply = {"what": error.what, "remedy": error.remedy}
        except Exception as error:
            traceback.print_exc()
            what = f"It failed ({type(error).__name__})."
            reply = {"what": what, "remedy": "See what it wrote with --verbose."}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
