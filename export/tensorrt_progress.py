"""A TensorRT build watched: how far it is, and how to stop it.

An exception must not pass through TensorRT's own frames. So Ctrl-C, or what `progress` raises, is
noted, TensorRT is told to stop at its next step, and the exception is raised when it has.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[str, int, int], None]


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
