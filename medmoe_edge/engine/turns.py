"""What engines of both families share: requests one at a time, an end, and a name."""

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from medmoe_edge.errors import InputError


class OneAtATime:
    """A loaded model that computes one request at a time, and can be closed.

    Methods may be called from any thread. What computes is one model with one cache, so that
    requests wait for each other; for more at a time, load more engines. It is a context manager.
    """

    name: str
    verification: str
    runtime: object

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory back, after the request at hand; a second time does nothing."""
        if self._closed:
            return
        with self.one_at_a_time():
            self._closed = True
            self._release()

    def _release(self) -> None:
        del self.runtime

    def __repr__(self) -> str:
        run_by = "closed" if self._closed else getattr(self.runtime, "name", "unknown runtime")
        return f"<{type(self).__name__} {self.name}, {run_by}, verification {self.verification}>"

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Wait for one's turn.

        Raises `InputError` where the engine is closed, and where this thread itself is in the
        midst of a stream, for which it would wait forever.
        """
        if self._owner == threading.get_ident():
            raise InputError(
                "An answer is being streamed by this thread.", "Read it to its end, or close it."
            )
        with self._turn:
            if self._closed:
                raise InputError(f"The engine of {self.name} is closed.", "Load the model again.")
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
