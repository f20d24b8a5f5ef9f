"""For the tests of documentation: its code blocks, and a folder in which they are run as typed.

A block is run by its language: `bash` line by line, `python` in this process, each page's in one
namespace. A block with a title (```toml title="listen.toml") is written to that file. All others,
`text` and `json`, show what comes out. What cannot be run is marked, above the block, with
`<!-- not run: REASON -->`.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import typer
from command_line import ROOT, Run
from listen_process import free_port
from markdown_it import MarkdownIt

from medmoe_edge import cli
from medmoe_edge.cli.common import Commands

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
SHOWN = {"text", "json", "toml", "yaml", "svg"}  # what is not run
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')
PORT_OF = {"serve": "8000", "listen": "11112"}  # as the pages have them
KEYWORDS = ("umask", "until", "medmoe-edge")  # what `which` does not find, and bash does
SHELL = re.compile(r"[|<>;()$]")  # what only a shell understands
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it is not run."""

    page: str
    line: int
    language: str
    title: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The command lines of a block of bash, long ones put together, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    name = page.relative_to(ROOT).as_posix()
    found, above = [], ""
    for token in MarkdownIt("commonmark").parse(page.read_text("utf-8")):
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            title, reason = TITLE.search(rest), NOT_RUN.search(above)
            assert token.map is not None
            found.append(
                Block(
                    name,
                    token.map[0] + 1,
                    language,
                    title[1] if title else "",
                    token.content,
                    " ".join(reason[1].split()) if reason else "",
                )
            )
        above = token.content if token.type == "html_block" else ""
    return found


@dataclass
class Scratch:
    """A folder where a page's blocks are run, one after the other; services end with it.

    `missing` are the programs that lines were left out for.
    """

    folder: Path
    run: Run
    missing: set[str] = field(default_factory=set)
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    ports: dict[str, str] = field(default_factory=dict)
    services: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for service in self.services.values():
            stop(service)

    def do(self, block: Block) -> None:
        """Run a block, or write it; what fails is an `AssertionError`."""
        if block.reason:
            return
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.local(block.text))
        elif block.language == "python":
            code = compile(self.local(block.text), str(block), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)
        elif block.language == "bash":
            for command in block.commands:
                self.command(command)
        else:
            assert block.language in SHOWN, f"{block}: is it run, or only shown?"

    def local(self, text: str) -> str:
        """Ports as the pages have them become those that services have here."""
        for usual, own in self.ports.items():
            text = re.sub(rf"\b{usual}\b", own, text)
        return text

    def command(self, line: str) -> None:
        """Run a line as typed."""
        if SHELL.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", line)):
            self.bash(line)
            return
        for part in line.split(" && "):
            words = shlex.split(part)
            if words[:2] == ["pip", "install"] or words[:4] == ["python", "-m", "pip", "install"]:
                check_extras(part)
            elif words[0] != "medmoe-edge":
                self.bash(part)
            elif words[1] in PORT_OF and "".join(words[2:3])[:1] in ("", "-"):
                self.start(words[1:])
            else:
                result = self.run(*words[1:])
                assert result.exit_code == 0, f"{part}: {result.stderr}{result.exception!r}"

    def bash(self, line: str) -> str:
        """What a line of bash prints."""
        program = line.lstrip("(").split()[0]
        if program == "until" and self.missing:  # what it waits for was left out
            return ""
        if shutil.which(program) is None and program not in KEYWORDS:
            self.missing.add(program)
            return ""
        done = subprocess.run(
            ["bash", "-c", self.local(line)],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr.decode(errors='replace')}"
        return done.stdout.decode(errors="replace")

    def start(self, words: list[str]) -> None:
        """Start a verb that serves, on a port of its own, in the place of one started before."""
        verb = words[0]
        if verb in self.services:
            stop(self.services.pop(verb))
        port = self.ports[PORT_OF[verb]] = str(free_port())
        if verb == "serve":
            words = [*words, "--port", port]
        else:  # its port is in the file, which is written as the page has it, for other disks
            file = self.folder / words[words.index("--config") + 1]
            text = re.sub(rf"\b{PORT_OF[verb]}\b", port, file.read_text())
            file.write_text(f"reserve_mb = 0\n{text}")
        service = subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), *words],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.services[verb] = service
        assert service.stdout is not None
        first = service.stdout.readline()
        while " on " not in first or "isten" not in first:  # "Listening on", "listens on"
            assert first, f"{verb} did not start"
            first = service.stdout.readline()


def stop(service: subprocess.Popen[str]) -> None:
    """End a service as an operator does."""
    service.send_signal(signal.SIGTERM)
    out, _ = service.communicate(timeout=60)
    assert service.returncode in (0, 143), out


def environment() -> dict[str, str]:
    """Programs find this checkout, and no proxy between them."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "NO_PROXY": "*", "no_proxy": "*"}


def check_extras(command: str) -> None:
    """Installing is for others to test; here, that the extras it names are there."""
    for named in re.findall(r"\[([\w,-]+)\]", command):
        assert set(named.split(",")) <= set(EXTRAS), command


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of `medmoe-edge` parses: its verb, options and choices are there."""
    calls = []
    group = typer.main.get_command(cli.app)
    assert isinstance(group, Commands)
    words = shlex.split(line)[1:]
    command = next(group.commands[word] for word in words if not word.startswith("-"))
    commands = getattr(command, "commands", {})
    each = next((commands[word] for word in words if word in commands), command)
    monkeypatch.setattr(each, "callback", lambda *_, **given: calls.append(given))
    with pytest.raises(SystemExit) as stopped:
        group.main(words)
    assert (stopped.value.code, len(calls)) == (0, 1), line
