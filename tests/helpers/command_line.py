"""For the tests of the command line: how to run it, and a stand-in for a loaded model."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
from typer.testing import Result

from medmoe_edge.engine.answer import Answer, Timings
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image
from medmoe_edge.presets import PRESETS
from medmoe_edge.prompt import check_question

ROOT = Path(__file__).parents[2]


class Run(Protocol):
    """The fixture `run`."""

    def __call__(self, *arguments: str) -> Result: ...


def answer_to(question: str, text: str = "No", **values: Any) -> Answer:
    """What an engine might say of a chest X-ray."""
    timings = Timings(0.01, 0.2, 0.1, 0.02, 0.04, 0.33, 0.37, tokens=1, prefix_reused=False)
    experts = {"mri": 0.1, "ct": 0.0, "pathology": 0.2, "xray": 0.7}
    model = {"name": "fake", "sha256": "0" * 64, "verification": "passed"}
    answer = Answer(question, text, 0.934, "xray", experts, timings, model)
    return dataclasses.replace(answer, **values)


class FakeEngine:
    """Answers "No" to everything, after checking its input as the real one does.

    `blind` is what it says of the black picture that answers are held against.
    """

    config = PRESETS["nano"]
    expert_names = ("mri", "ct", "pathology", "xray")
    proven = fitted = None
    blind = "Yes"
    memory = None

    def __init__(self) -> None:
        self.asked: list[tuple[Path | Image, list[str], dict[str, object]]] = []

    def ask_all(
        self, image: Path | Image, questions: Sequence[str], **options: Any
    ) -> list[Answer]:
        self.asked.append((image, list(questions), options))
        if not isinstance(image, Image):
            load_image(image, frame=options.get("frame"))
        elif image.pixels.shape == (64, 64, 3) and not image.pixels.any():
            return [answer_to(question, self.blind) for question in questions]
        return [answer_to(check_question(question)) for question in questions]

    def modality(self, image: Path) -> str | None:
        return "xray"


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def two_lines(result: Result) -> list[str]:
    """The error of a failed run: what was wrong, and what to do."""
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    assert result.stdout == ""
    return lines


def start(
    *arguments: str, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    options = {"capture_output": True} | options
    return subprocess.run(command, text=True, check=False, env=environment, **options)


def start_without(packages: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process where these packages are not installed."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(packages)}))\n"
        "from medmoe_edge.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, text=True, check=False, cwd=ROOT, capture_output=True)
