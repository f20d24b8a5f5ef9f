"""The command line: each verb parses, calls one function of the library and prints.

Start-up is part of answering, so whatever only one verb needs is imported inside that verb, and
nothing at all is imported before an interrupt would end in peace.
"""

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmoe_edge.cli.common import app

__all__ = ["app", "main"]
INTERRUPTED = 128 + signal.SIGINT  # as a shell says it
TERMINATED = 128 + signal.SIGTERM


class Interruption:
    """Ctrl-C as an exception, and the memory of it.

    A library that is interrupted while it is imported may turn the exception into one of its own.
    """

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        """Handle SIGINT."""
        self.happened = True
        _raise(KeyboardInterrupt(), frame)


def _raise(error: BaseException, frame: FrameType | None) -> None:
    """Raise where a signal arrived or, within PyTorch or an extension being loaded, once it is.

    Native code that sets itself up may swallow an exception (PyTorch goes on without NumPy), or
    end the process by it (pybind11's terminate). A weak reference's callback swallows any.
    """
    loading = None
    while frame is not None:
        if _is_native(frame):
            loading = frame
        elif frame.f_code.co_qualname == "_get_module_lock.<locals>.cb":  # importlib's callback
            loading = frame.f_back
        frame = frame.f_back
    if loading is None:
        raise error

    def later(*_: object) -> None:
        sys.settrace(None)
        raise error

    loading.f_trace = later  # called as soon as the outermost loader itself goes on
    sys.settrace(lambda *_: None)


def _is_native(frame: FrameType) -> bool:
    """Whether a frame loads an extension, or is the body of a module of PyTorch."""
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    if frame.f_code.co_name == "<module>" and package == "torch":
        return True
    return frame.f_code.co_qualname.startswith("ExtensionFileLoader.")


interruption = Interruption()


def main() -> None:
    """The entry point of the `medmoe-edge` command."""
    signal.signal(signal.SIGINT, interruption)
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        from medmoe_edge.cli.common import start

        start(_registered())
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or interruption.happened:
            sys.stderr.write("Interrupted.\n")
            raise SystemExit(INTERRUPTED) from None
        raise


def _terminate(_number: int, frame: FrameType | None) -> None:
    """Leave as after an error: what was begun is removed on the way out."""
    _raise(SystemExit(TERMINATED), frame)


def _registered() -> "Any":
    """The app, once importing their modules has registered its verbs."""
    from medmoe_edge.cli import (  # noqa: F401
        ask,
        bedside,
        bench,
        export,
        train,
        verify,
    )
    from medmoe_edge.cli.common import app

    return app


def __getattr__(name: str) -> object:
    if name == "app":
        return _registered()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
