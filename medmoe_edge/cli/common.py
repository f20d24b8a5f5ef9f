"""What all verbs share: the app and how it fails, its options, and checks before the work begins.

A failure is two lines on stderr and an exit code; a traceback is shown with --verbose only.
"""

import errno
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from medmoe_edge._version import __version__
from medmoe_edge.errors import InputError, MedMoEError, ResourceError
from medmoe_edge.render import console as render

log = logging.getLogger("medmoe_edge")
SWITCHES = {"-q", "--quiet", "-v", "--verbose"}
ORDER = (  # of the verbs in --help; a panel stands where its first one does
    *("ask", "classify", "locate", "index", "retrieve"),
    *("pull", "export", "calibrate", "init", "train", "router", "data"),
    *("verify", "eval", "bench", "inspect"),
    *("doctor", "plan", "serve", "listen", "batch", "audit"),
)


class Commands(TyperGroup):
    """A group of verbs whose failures are told to the person, not to a programmer."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order of the help."""
        places = {name: place for place, name in enumerate(ORDER)}
        return sorted(super().list_commands(ctx), key=lambda name: places.get(name, len(ORDER)))

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


app = typer.Typer(
    name="medmoe-edge",
    cls=Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the `medmoe-edge` command."""
    if not sys.warnoptions:  # meant for programmers, who can turn them on with python -W
        warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack a question's letters
        sys.stdout.reconfigure(errors="replace")
    app()


def verb(name: str, panel: str, example: str) -> Callable[..., Any]:
    """Register a verb, with an example that runs as typed."""
    return app.command(name, rich_help_panel=panel, epilog=f"Example: medmoe-edge {example}")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medmoe-edge {__version__}")
        raise typer.Exit


@app.callback()
def _medmoe_edge(
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress, no warnings: results and errors.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Tell what is done; errors with traceback.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Med-MoE at the bedside: questions about medical images, answered by an edge device.

    For research only; not a medical device. -q and -v may stand anywhere.
    """
    log_to_stderr("DEBUG" if verbose else "ERROR" if quiet else "WARNING")


Runtime = Annotated[
    Literal["auto", "onnxruntime", "tensorrt", "torch"], typer.Option(help="What runs the model.")
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where; auto is what the model was made for, and fails if it is not there."),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What experts may take of memory: 1500MB, or 50% of them all.",
        show_default="no limit",
    ),
]
DropPages = Annotated[
    bool,
    typer.Option(
        "--drop-pages",
        help="With a memory budget: keep nothing of experts in the page cache.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is already there.")]
VisionTower = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The vision tower, if the checkpoint holds none."),
]


Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder or nano.")
]
Samples = Annotated[int, typer.Option(min=1, help="Questions to calibrate on.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse experts that too few tokens reach, do not make do."),
]


def check_output(file: Path, force: bool) -> None:
    """Refuse an output before the work rather than after it."""
    if file.exists() and not force:
        raise InputError(f"{file} exists already.", "Choose another name, or add --force.")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is not a folder.", "Make it first, or choose another.")
    if file.is_dir():
        raise InputError(f"{file} is a folder.", "Give the name of a file.")


def check_apart(output: Path, source: Path) -> None:
    """Refuse an output that would take the place of the image that it is made from."""
    if output.resolve() == source.resolve():
        raise InputError(f"{output} would replace its own input.", "Choose another name.")


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
