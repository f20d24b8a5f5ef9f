"""Processes of their own for what is measured, so that memory is its own and so are crashes.

A worker reads requests and writes replies, a line of JSON each; `bench_worker` is the other side.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from medmoe_edge.errors import ResourceError

TIMEOUT = 1800.0  # seconds of one request: loading or writing a large model is one
ROOT = Path(__file__).parents[2]  # where a process that starts elsewhere finds medmoe_edge
COMMAND = "from medmoe_edge.cli import main; main()"
logger = logging.getLogger(__name__)


class Worker:
    """A process that does what it is asked; a context, which leaves no process behind.

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
        """Have one thing done, and wait for what it yields.

        Raises `ResourceError` where that fails, ends the process or takes too long.
        """
        late = threading.Event()

        def expire() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.timeout, expire)
        timer.start()
        try:
            line = self._exchange(json.dumps({"do": do, **arguments}))
        finally:
            timer.cancel()
        if not line:
            raise self._end(late.is_set())
        reply = json.loads(line)
        if "what" in reply:
            self._log_errors()
            raise ResourceError(reply["what"], reply["remedy"])
        return reply["value"]

    def _exchange(self, request: str) -> str:
        pipes = self._process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        try:
            pipes.stdin.write(request + "\n")
            pipes.stdin.flush()
            return pipes.stdout.readline()
        except BrokenPipeError:
            return ""

    def _end(self, late: bool) -> ResourceError:
        code = self._process.wait()
        self._log_errors()
        if late:
            return ResourceError(
                f"It took longer than {self.timeout:,.0f} s and was stopped.",
                "Measure a smaller model, or on a faster machine.",
            )
        return ended(code)

    def _log_errors(self) -> None:
        self._errors.seek(0)
        logger.debug("A worker wrote: %s", self._errors.read().decode(errors="replace"))


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
        raise ResourceError(
            f"A question took longer than {timeout:,.0f} s.", "Measure a smaller model."
        ) from error
    seconds = time.perf_counter() - start
    if done.returncode:
        logger.debug("It wrote: %s", done.stderr.decode(errors="replace"))
        raise ended(done.returncode)
    return seconds


def ended(code: int) -> ResourceError:
    """The error for a process that ended by itself, from its exit status."""
    if code >= 0:
        return ResourceError(
            f"Its process ended with exit code {code}.", "See what it wrote with --verbose."
        )
    if -code == getattr(signal, "SIGKILL", None):
        return ResourceError(
            "Its process was killed, as systems do that run out of memory.",
            "Close other programs, or measure a smaller model.",
        )
    name = signal.Signals(-code).name
    return ResourceError(f"Its process crashed ({name}).", "See what it wrote with --verbose.")


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}
