"""A process that `bench_process.Worker` starts: it loads one model and runs what it is asked to."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe_edge.bench.asking import Asker, Asking
from medmoe_edge.bench.backends import Contestant, EngineContestant, Shape, open_contestant
from medmoe_edge.bench.machine import faults, peak, read_from_storage, reset_peak, resident
from medmoe_edge.bench.timing import REST, seconds, turn
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import MedMoEError


class Station:
    """The methods are the requests; all take and give plain JSON values."""

    contestant: Contestant
    asker: Asker

    def open(
        self, kind: Any, path: str, form: str, config: Mapping[str, Any], shape: Mapping[str, int]
    ) -> dict[str, Any]:
        """Load a model: `load` seconds until it could answer, and the `peak` bytes meanwhile."""

        def make() -> None:
            self.contestant = open_contestant(
                kind, Path(path), form, ModelConfig.from_json(config), Shape(**shape)
            )
            self.contestant.touch()  # sessions are opened by their first use

        first = seconds(make)
        load = max(first - seconds(self.contestant.touch), 0.0)
        told = {"load": load, "peak": peak()}
        reset_peak()
        return told

    def question(self) -> list[dict[str, float]]:
        """Seconds of a question's parts, of as many as a turn holds."""
        return turn(self.contestant.question)

    def memory(self) -> dict[str, int | None]:
        """Bytes resident now, and at most since the model was loaded or the last prefill began."""
        return {"resident": resident(), "peak": peak()}

    def prefill(self, tokens: int) -> list[float]:
        """Seconds of prefills of so many tokens; only of bundles."""
        contestant = self._bundle()
        reset_peak()
        return turn(lambda: contestant.prefill(tokens))

    def ask(self, questions: int) -> list[float]:
        """Seconds of so many questions about one image; only of bundles."""
        contestant = self._bundle()
        return turn(lambda: contestant.ask(questions))

    def storage(self) -> dict[str, int | None]:
        """Major page faults of this process so far, and bytes that it had read from storage."""
        return {"faults": faults(), "read": read_from_storage()}

    def open_asker(
        self, path: str, budget: int | None, prefetch: bool, asking: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Load a bundle to ask about modalities: `load` seconds until it had answered once."""

        def make() -> None:
            self.asker = Asker(Path(path), budget, prefetch, Asking(**asking))

        told = {"load": seconds(make), "peak": peak()}
        reset_peak()
        return told

    def ask_about(self, modality: int, number: int) -> dict[str, Any]:
        """One answer; see `Asker.ask`."""
        time.sleep(REST)
        return self.asker.ask(modality, number)

    def make_checkpoint(self, config: Mapping[str, Any], tokenizer: str, out: str) -> None:
        """Write a checkpoint of random weights."""
        from medmoe_edge.checkpoint.reader import write_checkpoint
        from medmoe_edge.presets_random import random_tensors

        model = ModelConfig.from_json(config)
        tensors = random_tensors(model, seed=0)
        write_checkpoint(Path(out), model, tensors, tokenizer_file=Path(tokenizer))

    def make_bundle(self, checkpoint: str, out: str) -> None:
        """Export a checkpoint in fp32."""
        from medmoe_edge.export.build import export_bundle

        export_bundle(Path(checkpoint), Path(out), precision="fp32")

    def make_gguf(self, config: Mapping[str, Any], form: Any, out: str) -> None:
        """Write a GGUF of equal shape, with random weights."""
        from medmoe_edge.bench.gguf import write_gguf

        write_gguf(ModelConfig.from_json(config), form, Path(out))

    def _bundle(self) -> EngineContestant:
        assert isinstance(self.contestant, EngineContestant)
        return self.contestant


def main() -> None:
    """Serve requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the bench does
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the replies
    station = Station()
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            reply = {"value": getattr(station, do)(**request)}
        except MedMoEError as error:
            reply = {"what": error.what, "remedy": error.remedy}
        except Exception as error:
            traceback.print_exc()
            reply = {
                "what": f"It failed ({type(error).__name__}).",
                "remedy": "See what it wrote with --verbose.",
            }
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
