"""For the tests of bench: a worker without a process of its own."""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import pytest

from medmoe_edge.bench import measurement, worker
from medmoe_edge.bench.worker import Requests
from medmoe_edge.errors import MedMoEError, ResourceError


class InProcess:
    """A worker in this process; what it is asked and answers goes through JSON all the same.

    `started` lists them all and `prefixes` what they were to run under, until a test clears them.
    """

    started: ClassVar[list["InProcess"]] = []
    prefixes: ClassVar[list[Sequence[str]]] = []

    def __init__(self, timeout: float = 0, prefix: Sequence[str] = ()) -> None:
        self.requests, self.prefix, self.ended = Requests(), prefix, False
        self.started.append(self)
        self.prefixes.append(prefix)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer; raises `ResourceError` for what went wrong there."""
        try:
            value = getattr(self.requests, do)(**json.loads(json.dumps(arguments)))
        except MedMoEError as error:
            raise ResourceError(error.what, error.remedy) from error
        return json.loads(json.dumps(value))


def without_processes(monkeypatch: pytest.MonkeyPatch) -> list[InProcess]:
    """Workers in this process, no pauses and no repetitions; returns the workers as they start."""
    started: list[InProcess] = []
    monkeypatch.setattr(InProcess, "started", started)
    monkeypatch.setattr(InProcess, "prefixes", [])
    monkeypatch.setattr(worker, "Worker", InProcess)
    monkeypatch.setattr(worker, "cold_start", lambda arguments: 0.5)
    monkeypatch.setattr(measurement, "SLOT", 0.0)
    monkeypatch.setattr(measurement, "REST", 0.0)
    monkeypatch.setattr(measurement, "STREAMED", 2**12)
    monkeypatch.setattr(measurement, "threads", lambda: 1)  # torch keeps what it is told
    return started
