"""Bytes and times against agreement and accuracy, for every number of image tokens.

    python -m experiments.image_tokens CHECKPOINT DATA -o FOLDER

Each number is exported in int8, data-free, and verified on DATA; times are the least of a visual
question in ONNX Runtime on this CPU. The rows go to `curve.json` in FOLDER, beside the bundles.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import medmoe_edge
from medmoe_edge.bench.backends import RuntimeBackend, find_bundle, shape_of
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.evaluation.metrics import Flips
from medmoe_edge.evaluation.record import AnswersRecord
from medmoe_edge.runtimes.costs import cache_values
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

TIMES = 25  # the least is kept of
SHOWN = ("image_tokens", "cache_bytes", "vision", "prefill", "agreement", "accuracy", "flips")


@dataclass(frozen=True)
class Row:
    """One number of image tokens; bytes and seconds.

    `cache_bytes` are those of the prompt's KV cache in fp32. `agreement` and `flips` are against
    the checkpoint with all of its tokens (of a bundle that has all, only `agreement`), `kl` against
    it with as many; `accuracy` is exact match, None where no answer is known.
    """

    image_tokens: int
    bundle_bytes: int
    cache_bytes: int
    vision: float
    prefill: float
    decode: float
    agreement: float
    kl: float
    flips: Flips | None
    accuracy: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every number, and write the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args(arguments)
    rows: list[Row] = []
    for count in read_checkpoint(asked.checkpoint).config.vision.token_counts:
        rows.append(measure(asked.checkpoint, asked.data, count, asked.output))
        told = json.dumps([asdict(row) for row in rows], indent=2)
        (asked.output / "curve.json").write_text(told, "utf-8")
        values = asdict(rows[-1])
        print(*(f"{name} {values[name]}" for name in SHOWN), sep=", ", flush=True)


def measure(checkpoint: Path, data: Path, count: int, folder: Path) -> Row:
    """Export, verify and time one number of image tokens."""
    out = folder / f"{count}-tokens"
    medmoe_edge.export_model(checkpoint, out, medmoe_edge.ExportOptions(image_tokens=count))
    options = medmoe_edge.VerifyOptions(checkpoint, str(data), record=False)
    record = medmoe_edge.verify(out, options).record
    assert isinstance(record, AnswersRecord)
    figures, whole = record.figures, record.figures.reduction
    answers = whole.answers if whole else figures.overall
    bundle = find_bundle(str(out))
    shape = shape_of(bundle)
    backend = RuntimeBackend(OrtRuntime(bundle), shape)
    backend.touch()
    laps = [backend.question() for _ in range(TIMES)]
    times = {part: min(lap[part] for lap in laps) for part in laps[0]}
    return Row(
        image_tokens=count,
        bundle_bytes=sum(file.stat().st_size for file in out.iterdir()),
        cache_bytes=4 * cache_values(bundle.config, shape.prompt),
        vision=times["vision"],
        prefill=times["prefill"],
        decode=times["decode"],
        agreement=answers.answer_agreement.share,
        kl=figures.overall.kl.mean,
        flips=whole.flips if whole else None,
        accuracy=answers.accuracy.candidate if answers.accuracy else None,
    )


if __name__ == "__main__":
    main()
