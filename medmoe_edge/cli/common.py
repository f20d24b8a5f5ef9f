"""What all verbs share: the app, its options, and what is checked before the work begins."""

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medmoe_edge._version import __version__
from medmoe_edge.cli.errors import Commands, log_to_stderr
from medmoe_edge.errors import InputError

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
