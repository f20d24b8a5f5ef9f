"""For the tests of bench: a worker without a process of its own."""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from medmoe_edge.bench.worker import Station
from medmoe_edge.errors import MedMoEError, ResourceError


class InProcess:
    """A worker whose station is here; what it is asked and answers goes through JSON all the same.

    `started` lists them all and `prefixes` what they were to run under, until a test clears them.
    """

    started: ClassVar[list["InProcess"]] = []
    prefixes: ClassVar[list[Sequence[str]]] = []

    def __init__(self, timeout: float = 0, prefix: Sequence[str] = ()) -> None:
        self.station, self.prefix, self.ended = Station(), prefix, False
        self.started.append(self)
        self.prefixes.append(prefix)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True

    def ask(self, do: str, **arguments: Any) -> Any:
        """The station's answer; raises `ResourceError` for what went wrong there."""
        try:
            value = getattr(self.station, do)(**json.loads(json.dumps(arguments)))
        except MedMoEError as error:
            raise ResourceError(error.what, error.remedy) from error
        return json.loads(json.dumps(value))
