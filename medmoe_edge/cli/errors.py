"""The group of verbs, and how it fails: two lines on stderr, an exit code, no traceback."""

import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from medmoe_edge.errors import InputError, MedMoEError, MissingDependencyError, ResourceError
from medmoe_edge.render import console as render

log = logging.getLogger("medmoe_edge")
SWITCHES = {"-q", "--quiet", "-v", "--verbose"}
ORDER = (  # of the verbs in --help; a panel stands where its first one does
    *("ask", "classify", "locate", "index", "retrieve"),
    *("export", "calibrate", "init", "train", "data"),
    *("verify", "eval", "ablate", "bench", "inspect"),
    *("doctor", "plan", "serve", "listen", "batch", "audit"),
)


class Commands(TyperGroup):
    """A group of verbs whose failures are told to the person, not to a programmer."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order of the help."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Run one command line and exit; -q and -v may stand anywhere before `--`."""
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        end = given.index("--") if "--" in given else len(given)
        given = sorted(given[:end], key=lambda word: word not in SWITCHES) + given[end:]
        options["standalone_mode"] = False  # so that failures arrive here, not yet printed
        try:
            code = super().main(given, *more, **options) or 0
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has left; what is still buffered has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except Exception as error:
            code = _report(error)
        if code == 130:
            render.show("Interrupted.", stderr=True)
        sys.exit(code)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of what only the packages of an extra can do."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("medmoe_edge"):
            raise  # no package to install: a mistake of ours
        raise MissingDependencyError(error.name.partition(".")[0], extra) from error


def log_to_stderr(level: str) -> None:
    """Show what the library logs, from `level` on; progress bars follow it."""
    log.handlers = [_StderrHandler()]
    log.setLevel(level)


class _StderrHandler(logging.Handler):
    """Writes to what stderr is at the moment, which a progress bar replaces while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _report(error: Exception) -> int:
    """Say what was wrong and what to do about it; gives the exit code."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "medmoe-edge"
        what = " ".join(error.format_message().split())  # it may list choices in a column
        error = InputError(what, f"See: {command} --help")
    elif log.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
    if isinstance(error, OSError | MemoryError):
        error = _explained(error)
    if isinstance(error, MedMoEError):
        what, remedy, code = error.what, error.remedy, error.exit_code
    else:  # its own text is left out: it might quote the file that it stumbled over
        what = f"Unexpected error ({type(error).__name__})."
        remedy, code = "Run again with --verbose to see where, and report it.", 1
    render.show(what, "red", stderr=True)
    render.show(remedy, stderr=True)
    return code


def _explained(error: OSError | MemoryError) -> MedMoEError:
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return ResourceError("There is not enough memory.", "Close other programs and try again.")
    what = f"{error.filename or 'A file'}: {(error.strerror or 'it cannot be used').lower()}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(what, "Free some space, or write to another disk.")
    return InputError(what, "Check the path and its permissions.")
