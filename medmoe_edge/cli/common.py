"""What all verbs share: the app and how it fails, its options, and checks before the work begins.

A failure is two lines on stderr and an exit code, with --json one object on stdout too; a traceback
is shown with --verbose only. For an unknown word it is said what may have been meant: the
nearest by meaning goes before the nearest by letters (who types `quantize` wants `export`, not
`inspect`). Only what exists is ever proposed, there and by a shell's completion.
"""

import contextlib
import glob
import inspect
import io
import itertools
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer
from typer.core import TyperGroup

from medmoe_edge._version import __version__
from medmoe_edge.bundle.machine import system_error
from medmoe_edge.cli import INTERRUPTED, TERMINATED, interruption
from medmoe_edge.embedded import EMBEDDED
from medmoe_edge.errors import InputError, MedMoEError, did_you_mean
from medmoe_edge.render import console as render

log = logging.getLogger("medmoe_edge")
SWITCHES = {"-q", "--quiet", "-v", "--verbose"}
ENDED = {INTERRUPTED: "Interrupted", TERMINATED: "Terminated"}
SIZES = ("COLUMNS", "LINES", "TERMINAL_WIDTH")  # rich prints nothing at all in 0 columns
NARROW = 72  # columns, below which a help without boxes is easier to read
EXIT_CODES = (
    "Exit codes: 0 done; 2 bad usage or input; 3 bad model; 4 a gate failed; 5 memory, disk, a "
    "device or a package is missing; 130 interrupted; 143 terminated."
)

# What else people call each verb, in the order of --help; a panel stands where its first one does.
VERBS: Mapping[str, str] = {
    "ask": "answer query question predict infer inference generate chat run vqa describe caption",
    "classify": "label detect diagnose triage zero-shot",
    "locate": "segment ground heatmap explain attention saliency find-in where",
    "index": "embed archive catalogue catalog",
    "retrieve": "search find similar lookup",
    "pull": "download fetch get clone",
    "export": "quantize quantise convert compile compress onnx tensorrt build "
    "optimize optimise pack",
    "calibrate": "calibration statistics stats observe",
    "init": "new create random scaffold start",
    "train": "fit finetune fine-tune learn tune resume",
    "router": "route routing gate",
    "data": "dataset prepare import preprocess",
    "verify": "test check validate compare fidelity",
    "eval": "evaluate score metrics accuracy measure assess",
    "bench": "benchmark time speed profile perf latency throughput",
    "inspect": "info show summary summarise summarize details list tree",
    "doctor": "diagnostics devices env environment status health version",
    "plan": "estimate predict-memory fits size requirements memory",
    "prove": "proof certify",
    "serve": "server http api rest web deploy openai",
    "listen": "dicom node pacs scp receive",
    "batch": "bulk many folder csv parquet",
    "audit": "anonymize anonymise deidentify de-identify log",
}
OPTIONS: Mapping[str, str] = {
    "--int8": "--quantize --quantise --8bit --w8a8 --precision --bits --dtype",
    "--int4": "--4bit --w4a16 --nf4 --q4",
    "--fp32": "--float32 --full --no-quantize --no-quantise",
    "--mixed": "--bits --budget-bits --bpw --average-bits",
    "--output": "--out --out-dir --outdir --output-dir --dest --save --to --file --target-dir",
    "--data": "--dataset --questions --data-dir --test --val --input --images --source",
    "--calibrate": "--calibration --calib --data --dataset --images --calibration-data",
    "--against": "--checkpoint --reference --original --baseline --source",
    "--beside": "--compare --other --baseline",
    "--references": "--gt --ground-truth --truth --answers --reference",
    "--predictions": "--pred --preds --answers --save-predictions --output --out",
    "--model": "--bundle --checkpoint --name --weights --path",
    "--runtime": "--backend --engine --provider --ep --execution-provider",
    "--device": "--gpu --cuda --cpu --accelerator --where --hardware",
    "--gpu": "--device --arch --sm --card",
    "--max-new-tokens": "--max-tokens --max-length --length --tokens --limit",
    "--frame": "--slice --page --index --layer",
    "--memory-budget": "--memory --ram --vram --max-memory --budget --mem --offload",
    "--samples": "--num-samples --n --count --limit",
    "--limit": "--num --n --count --samples --max-samples --first",
    "--blind": "--no-image --text-only --black --without-image",
    "--sign": "--key --signature --signing-key --cosign --minisign",
    "--force": "--overwrite --yes --replace --clobber -f -y",
    "--json": "--format --as-json --output-format --machine",
    "--quiet": "--silent --no-progress -s",
    "--verbose": "--debug --log-level --trace",
    "--show": "--preview --save-image --picture",
    "--explain": "--heatmap --attention --why --locate",
    "--target": "--format --platform --backend",
    "--precision": "--int8 --int4 --bits --dtype --quantize",
    "--port": "-p --listen",
    "--host": "--bind --address --ip",
    "--token-file": "--token --api-key --auth --password",
    "-k": "--top-k --top --count --n --limit",
}
NO_VERB = re.compile(r"No such command '([^']*)'")
NO_OPTION = re.compile(r"No such option:? '?(-[^\s']*)")
EMPTY_OPTION = re.compile(r"(--[\w-]+)=")
NO_CHOICE = re.compile(r"'([^']*)' is not one of (.*)\.")


class Commands(TyperGroup):
    """A group of verbs whose failures are told to the person, not to a programmer."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order of the help."""
        places = {name: place for place, name in enumerate(VERBS)}
        return sorted(super().list_commands(ctx), key=lambda name: places.get(name, len(VERBS)))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an empty value of any verb: as a path it would mean the current folder."""
        for before, word in itertools.pairwise(["", *args]):
            attached = EMPTY_OPTION.fullmatch(word)
            if ctx.resilient_parsing or (word and not attached):
                continue
            option = attached[1] if attached else before
            hint = option if option.startswith("-") else None  # else it may name a patient
            raise typer.BadParameter("it is empty.", ctx, param_hint=hint)
        return super().parse_args(ctx, args)

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Run one command line and exit; -q and -v may stand anywhere before `--`."""
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        end = given.index("--") if "--" in given else len(given)
        as_json = "--json" in given[:end]
        given = sorted(given[:end], key=lambda word: word not in SWITCHES) + given[end:]
        options["standalone_mode"] = False  # so that failures arrive here, not yet printed
        render.printed_json.clear()
        try:
            _check_folder()
            code = super().main(given, *more, **options) or 0
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has left; what is still buffered has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except SystemExit as stopped:
            code = stopped.code
        except Exception as error:
            code = INTERRUPTED if interruption.happened else _report(error, as_json)
        if code in ENDED:
            _fail(as_json, ENDED[code].lower(), f"{ENDED[code]}.", "Run it again.")
            render.show(f"{ENDED[code]}.", stderr=True)
        sys.exit(code)


def _check_folder() -> None:
    """Refuse a current folder that was deleted: libraries that ask for it end the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"The current folder cannot be used ({error.strerror}).", "Change to another one."
        ) from error


app = typer.Typer(
    name="medmoe-edge",
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= NARROW else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def start(verbs: typer.Typer) -> None:
    """Run the command line of this process."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file that is opened would take its place
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stderr, io.TextIOWrapper):
        given, file = sys.stderr, io.BufferedWriter(_Lossy(sys.stderr))
        sys.stderr = io.TextIOWrapper(file, given.encoding, given.errors, line_buffering=True)
    for name in SIZES:
        if not re.fullmatch("[1-9][0-9]{0,3}", os.environ.get(name, "80")):
            del os.environ[name]
    if not sys.warnoptions:  # meant for programmers, who can turn them on with python -W
        warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack a question's letters
        sys.stdout.reconfigure(errors="replace")
    verbs()


class _Lossy(io.RawIOBase):
    """Takes what cannot be written as written: what nobody can be told must not end the work."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        super().__init__()
        self._file = file  # which would be closed if nobody held it
        self._raw: Any = getattr(file.buffer, "raw", file.buffer)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, data: Any, /) -> int:
        written = None
        with contextlib.suppress(OSError):
            written = self._raw.write(data)
        return len(data) if written is None else int(written)


def verb(name: str, panel: str, example: str) -> Callable[..., Any]:
    """Register a verb, with an example that runs as typed."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        command = app.command(
            name,
            help=paragraphs(inspect.getdoc(function) or ""),
            rich_help_panel=panel,
            epilog=f"Example: medmoe-edge {example}",
        )
        command(function)
        return function

    return register


def paragraphs(text: str) -> str:
    """A docstring whose lines may be broken anew, to fit the terminal."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medmoe-edge {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
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


def explained(message: str, context: Any) -> str:
    """A usage error's message, as typer words it, with what was meant, where that can be told."""
    command = getattr(context, "command", None)
    if found := NO_VERB.search(message):
        known = list(getattr(command, "commands", {}))
        return f"There is no verb {found[1]!r}." + _proposal(found[1], known, VERBS)
    if found := NO_OPTION.search(message):
        known = [name for parameter in getattr(command, "params", ()) for name in parameter.opts]
        known = [name for name in known if name.startswith("-")]
        return f"No such option: {found[1]}." + _proposal(found[1], known, OPTIONS)
    if found := NO_CHOICE.search(message):
        choices = re.findall(r"'([^']*)'", found[2])
        return message + _proposal(found[1], choices, {})
    return message


def _proposal(word: str, known: Iterable[str], meanings: Mapping[str, str]) -> str:
    names = list(known)
    meant = [name for name in names if word.lower() in meanings.get(name, "").split()]
    hint = f"Did you mean {meant[0]!r}?" if meant else did_you_mean(word, names).rstrip()
    return f" {hint}" if hint else ""


def complete_models(incomplete: str) -> list[str]:
    """Embedded models, and folders."""
    folders = sorted(glob.glob(f"{glob.escape(incomplete)}*/"))
    return [*_starting(EMBEDDED, incomplete), *(folder[:-1] for folder in folders)]


def complete_presets(incomplete: str) -> list[str]:
    """Presets of both families."""
    from medmoe_edge.presets import MODALITY_PRESETS, PRESETS

    return _starting((*PRESETS, *MODALITY_PRESETS), incomplete)


def complete_planned(incomplete: str) -> list[str]:
    """What can be planned: models and presets."""
    return list(dict.fromkeys([*complete_models(incomplete), *complete_presets(incomplete)]))


def complete_devices(incomplete: str) -> list[str]:
    """Devices that are known by name."""
    from medmoe_edge.device.hardware import DEVICES, HERE

    return _starting((*DEVICES, HERE), incomplete)


def complete_gpus(incomplete: str) -> list[str]:
    """GPUs that engines are built for."""
    from medmoe_edge.export.gpus import GPUS

    return _starting(GPUS, incomplete)


def complete_data(incomplete: str) -> list[str]:
    """The set that is named, and files."""
    return [*_starting(("builtin",), incomplete), *glob.glob(f"{glob.escape(incomplete)}*")]


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def file_option(text: str, metavar: str = "FILE") -> Any:
    """An option that names a file; `text` is its help, which calls the file `metavar`."""
    return typer.Option(metavar=metavar, help=text)


Runtime = Annotated[
    Literal["auto", "onnxruntime", "tensorrt", "torch"],
    typer.Option(
        metavar="RUNTIME", help="What runs the model: auto, onnxruntime, tensorrt or torch."
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where; auto is what the model was made for, and fails if it is not there."),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What experts may take of memory: 1500MB, 50% of them all, or auto: what is free.",
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
AllowRepetition = Annotated[
    bool,
    typer.Option(
        "--allow-repetition",
        help="Let an answer that repeats itself go on, rather than end it there.",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", help="A bundle, a checkpoint or nano.", autocompletion=complete_models),
]
BundleArgument = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A bundle or nano.", autocompletion=complete_models)
]
AuditFile = Annotated[
    Path | None, typer.Option("--audit", metavar="FILE", help="Log every answer here.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Frame = Annotated[
    int | None, typer.Option(min=0, help="Frame or slice, from 0.", show_default="the middle")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is already there.")]
Sign = Annotated[
    Path | None,
    typer.Option(
        metavar="KEY", help="Sign the bundle with this Ed25519 key (PEM).", show_default="not"
    ),
]
VisionTower = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The vision tower, if the checkpoint holds none."),
]

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint folder or nano.",
        autocompletion=complete_models,
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Questions to calibrate on.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse experts that too few tokens reach, do not make do."),
]


class Result(Protocol):
    """What a verb has found."""

    def to_json(self) -> dict[str, Any]: ...


def tell(
    found: Result | dict[str, Any],
    as_json: bool,
    show: Callable[[Any], object] | str,
    error: MedMoEError | None = None,
    **beside: object,
) -> None:
    """Print a result, as `show` says or does, or as one JSON object with what is `beside` it.

    Then its error is raised, if it has one.
    """
    if as_json:
        values = found if isinstance(found, dict) else found.to_json()
        render.as_json(values | beside, error)
    elif isinstance(show, str):
        render.show(show)
    else:
        show(found)
    if error is not None:
        raise error


def words(text: str | None) -> tuple[str, ...]:
    """The parts of an option with commas between them."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def log_to_stderr(level: str) -> None:
    """Show what the library logs, from `level` on; progress bars follow it."""
    log.handlers = [_StderrHandler()]
    log.setLevel(level)
    # what a memory budget of "auto" came to is told unless somebody asked for quiet
    logging.getLogger(f"{log.name}.engine.memory").setLevel("INFO" if level == "WARNING" else level)


class _StderrHandler(logging.Handler):
    """Writes to what stderr is at the moment, which a progress bar replaces while it runs.

    What cannot be written is lost without a word, and never raises: no decision rests on the log.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: there is nowhere else to say it."""


def _report(error: Exception, as_json: bool) -> int:
    """Say what was wrong and what to do about it; gives the exit code."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "medmoe-edge"
        what = " ".join(error.format_message().split())  # it may list choices in a column
        what = what.replace("Value error, ", "")
        error = InputError(explained(what, context), f"See: {command} --help")
        error_code = "bad_usage"
    else:
        error_code = ""
        if log.isEnabledFor(logging.DEBUG):
            traceback.print_exception(error)
    error = system_error(error) or error
    if isinstance(error, MedMoEError):
        what, remedy, code = error.what, error.remedy, error.exit_code
        error_code = error_code or error.code
    else:  # its own text is left out: it might quote the file that it stumbled over
        what = f"Unexpected error ({type(error).__name__})."
        remedy, code = "Run again with --verbose to see where, and report it.", 1
        error_code = "unexpected"
    _fail(as_json, error_code, what, remedy)
    render.show(what, "red", stderr=True)
    render.show(remedy, stderr=True)
    return code


def _fail(as_json: bool, code: str, what: str, remedy: str) -> None:
    """The failure as the one object on stdout, unless a result that tells it is there already."""
    if as_json and not render.printed_json:
        with contextlib.suppress(OSError):  # where stdout itself is what failed
            render.as_json({"error": render.error_json(code, what, remedy)})
            sys.stdout.flush()
