"""The command line: help, failures, terminals, and the real process."""

import errno
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command_line import ROOT, FakeEngine, Run, raising, start, two_lines

import medmoe_edge
from medmoe_edge import cli
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.cli.common import Commands
from medmoe_edge.errors import (
    BundleError,
    DataError,
    ImageError,
    MissingDependencyError,
    ModelError,
    ResourceError,
    VerificationError,
    needs,
)
from medmoe_edge.render import console as render

VERBS = ["ask", "export", "calibrate", "init", "train", "data"]
VERBS += ["eval", "verify", "bench", "inspect", "doctor", "plan", "prove"]
VERBS += ["classify", "locate", "index", "retrieve", "serve", "listen", "batch"]

# --- Help --------------------------------------------------------------------------------------


def test_help_groups_the_verbs_by_panel(run: Run) -> None:
    shown = run("--help").stdout
    order = [shown.index(word) for word in ("─ Ask ─", "─ Build ─", "─ Prove ─", "─ Deploy ─")]
    assert order == sorted(order)
    assert shown.index("│ ask ") < shown.index("│ classify ")
    assert all(re.search(rf"^│ {verb} ", shown, re.MULTILINE) for verb in VERBS)
    assert "not a medical device" in shown
    assert run().stdout == shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_one_example_that_parses(
    run: Run, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(verb, "--help")
    (example,) = re.findall(r"^ *Example: medmoe-edge (.*\S)", result.stdout, re.MULTILINE)
    assert result.exit_code == 0
    command, calls = shlex.split(example), []
    group = typer.main.get_command(cli.app)
    assert isinstance(group, Commands)
    monkeypatch.setattr(group.commands[verb], "callback", lambda **given: calls.append(given))
    with pytest.raises(SystemExit) as stopped:
        group.main(command)
    assert (stopped.value.code, command[0], len(calls)) == (0, verb, 1)


def test_the_version(run: Run) -> None:
    assert run("--version").stdout == f"medmoe-edge {medmoe_edge.__version__}\n"


def test_shell_completion_knows_the_verbs() -> None:
    environment = os.environ | {"_CLI.PY_COMPLETE": "complete_bash"}
    words = {"COMP_WORDS": "cli.py e", "COMP_CWORD": "1"}
    result = start("", environment=environment | words)
    assert result.stdout.split() == ["export", "eval"]


# --- Failure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (DataError("What.", "Do."), 2, "What."),
        (ImageError("What.", "Do."), 2, "What."),
        (ModelError("What.", "Do."), 3, "What."),
        (BundleError("One\ntwo \x1b[31m.", "Do."), 3, "One�two �[31m."),
        (VerificationError("What.", "Do."), 4, "What."),
        (ResourceError("What.", "Do."), 5, "What."),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 5, "a: no space left on device."),
        (OSError(errno.EMFILE, "-", "a"), 5, "a cannot be used now: too many open files."),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            2,
            "a cannot be opened: permission denied.",
        ),
        (OSError("strange"), 2, "A file cannot be opened: unknown reason."),
        (MemoryError(), 5, "There is not enough memory."),
        (
            OSError(errno.EROFS, "Read-only file system", "a"),
            5,
            "a cannot be written (Read-only file system).",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 5, "There is not enough memory."),
        (
            ImportError("ort.so: failed to map segment from shared object"),
            5,
            "There is not enough memory.",
        ),
        (
            RuntimeError("can't start new thread"),
            5,
            "The system starts no further thread or process.",
        ),
        (
            BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),  # of fork
            5,
            "The system starts no further thread or process.",
        ),
        (ImportError("no such symbol"), 1, "Unexpected error (ImportError)."),
        (KeyError("Doe^John"), 1, "Unexpected error (KeyError)."),
    ],
)
@pytest.mark.usefixtures("scan")
def test_failures_are_two_lines_and_a_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, what: str
) -> None:
    monkeypatch.setattr("medmoe_edge.engine.engine.load", raising(error))
    result = run("ask", "scan.png", "Is there effusion?")
    assert result.exit_code == code
    assert two_lines(result)[0] == what
    asked = run("ask", "scan.png", "Is there effusion?", "--json")
    assert (asked.exit_code, asked.stderr) == (code, result.stderr)
    assert json.loads(asked.stdout)["error"]["message"] == what
    told = run("ask", "scan.png", "Is there effusion?", "--verbose")
    assert told.exit_code == code
    assert told.stderr.startswith("Traceback")
    assert "Traceback" not in run("ask", "scan.png", "Is there effusion?").stderr


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["aks"], "'ask'"),
        (["--bogus"], "--bogus"),
        (["ask"], "IMAGE"),
        (["ask", "scan.png"], "QUESTION"),
        (["ask", "scan.png", "q", "--jsn"], "--json"),
        (["ask", "scan.png", "q", "--runtime", "gpu"], "'onnxruntime'"),
        (["ask", "scan.png", "q", "--frame", "-1"], "--frame"),
        (["ask", "scan.png", "q", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["train"], "--data"),
        (["eval"], "--data"),
        (["data"], "WHAT"),
        (["calibrate"], "--data"),
        (["calibrate", "--data", "builtin"], "--output"),
        (["export", "--mixed", "few"], "--mixed"),
    ],
)
def test_bad_usage_says_what_and_where_to_look(run: Run, line: list[str], what: str) -> None:
    result = run(*line)
    assert result.exit_code == 2
    told, remedy = two_lines(result)
    assert what in told
    verb = f" {line[0]}" if line[0] in VERBS else ""
    assert remedy == f"See: medmoe-edge{verb} --help"


def test_a_module_of_ours_is_never_called_a_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError), needs("export"):
        __import__("medmoe_edge.nothing")
    with pytest.raises(MissingDependencyError, match="'nothing_at_all'"), needs("export"):
        __import__("nothing_at_all.deep")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["export", "nano", "-o", ""], "value for -o: it is empty."),
        (["ask", "scan.png", "q", "--model="], "value for --model: it is empty."),
        (["calibrate", "nano", "--data", "", "-o", "s"], "value for --data: it is empty."),
        (["inspect", ""], "value: it is empty."),
        (["init", "tiny", ""], "value: it is empty."),
        (["audit", "verify", ""], "value: it is empty."),
        (["listen", "status", "--config", ""], "value for --config: it is empty."),
    ],
)
def test_an_empty_value_is_no_folder(run: Run, line: list[str], what: str) -> None:
    """pathlib would make the current folder of it."""
    result = run(*line)
    assert result.exit_code == 2
    assert two_lines(result) == [f"Invalid {what}", "See: medmoe-edge --help"]


@pytest.mark.usefixtures("scan")
def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medmoe_edge.engine.engine.load", raising(KeyboardInterrupt()))
    result = run("ask", "scan.png", "Is there effusion?")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")
    told = run("ask", "scan.png", "Is there effusion?", "--json")
    assert (told.exit_code, json.loads(told.stdout)["error"]["code"]) == (130, "interrupted")


# --- Quiet, verbose, terminals -----------------------------------------------------------------


@pytest.mark.usefixtures("scan")
def test_quiet_and_verbose_may_stand_anywhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, runtime: str, device: str, **_: object) -> FakeEngine:
        log = logging.getLogger("medmoe_edge.engine.engine")
        log.info("loading")
        log.warning("slow")
        return FakeEngine()

    monkeypatch.setattr("medmoe_edge.engine.engine.load", load)
    expected = {
        (): "slow\n",
        ("-q",): "",
        ("--quiet",): "",
        ("-v",): "loading\nslow\n",
        ("--verbose",): "loading\nslow\n",
    }
    for switch, logged in expected.items():
        for line in (
            [*switch, "ask", "scan.png", "q"],
            ["ask", *switch, "scan.png", "q"],
            ["ask", "scan.png", "q", *switch],
        ):
            assert run(*line).stderr == f"{logged}{NOTICE}\n"
    asked = run("ask", "scan.png", "--", "-q")
    assert asked.stdout.splitlines()[0] == "-q"


class Terminal:
    """Makes rich believe in a terminal, which is one if no variable says otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm-256color"} | environment).items():
            monkeypatch.setenv(name, value)
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)


def test_colour_only_on_a_terminal_and_not_with_no_color(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    render.show("No", "bold green")
    assert capsys.readouterr().out == "No\n"
    Terminal(monkeypatch)
    render.show("No", "bold green")
    assert "\x1b[1;32m" in capsys.readouterr().out
    Terminal(monkeypatch, NO_COLOR="1")
    render.show("No", "bold green")
    assert "32m" not in capsys.readouterr().out


def test_tables_lose_nothing_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_table("A table", ["name", "value"], [("a" * 300, "b" * 300), ("c", "d")])
    title, header, first, second = capsys.readouterr().out.splitlines()
    assert (title, header.split()) == ("A table", ["name", "value"])
    assert (first.split(), second.split()) == (["a" * 300, "b" * 300], ["c", "d"])


def test_bars_only_on_a_terminal_and_not_when_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        with render.working("Reading") as report:
            report("Decoder", 1, 2)
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    logging.getLogger("medmoe_edge").setLevel("WARNING")
    assert shown() == ""
    Terminal(monkeypatch)
    assert "Decoder" in shown()
    logging.getLogger("medmoe_edge").setLevel("ERROR")
    assert shown() == ""


# --- The real process --------------------------------------------------------------------------


def test_the_command_in_a_checkout(tmp_path: Path) -> None:
    shown = start("--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    forced = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    forced |= {"FORCE_COLOR": "1", "TERM": "xterm"}
    coloured = start("ask", cwd=tmp_path, environment=forced)
    plain = start("ask", cwd=tmp_path, environment=forced | {"NO_COLOR": "1"})
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.splitlines()[1] == "See: cli.py ask --help"
    assert ("\x1b[31m" in coloured.stderr, "\x1b" in plain.stderr) == (True, False)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_reason_for_a_traceback(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    streams = {"capture_output": False, "stdout": writing, "stderr": subprocess.PIPE}
    result = start("--version", environment=environment, **streams)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_command_line_starts_light() -> None:
    code = "import sys, medmoe_edge.cli; medmoe_edge.cli.app; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"numpy", "onnxruntime", "rich.console", "rich.table", "rich.progress", "zipfile"}
    assert heavy.isdisjoint(result.stdout.split())
