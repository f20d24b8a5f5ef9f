"""Bytes and times against agreement and accuracy, for forms that a model can be exported in.

    python -m experiments.curves CHECKPOINT DATA -o FOLDER [--stats FILE] [FORM ...]

A form is `int8` or `int4`; what `export --experts` takes, such as `delta:rank=64`; or a number of
image tokens: the rest is in int8. Without forms every number of image tokens is one. Each is
exported and verified on DATA; times are the least of a visual question in ONNX Runtime on this CPU.
The rows go to `curve.json` in FOLDER, beside the bundles; what stands there is not repeated.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import medmoe_edge
from medmoe_edge.bench.backends import RuntimeBackend, find_bundle, shape_of
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.evaluation.metrics import Flips
from medmoe_edge.evaluation.record import AnswersRecord
from medmoe_edge.runtimes.costs import cache_values
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.paging.pager import read_extents

TIMES = 25  # the least is kept of
ROWS = "curve.json"


@dataclass(frozen=True)
class Row:
    """One form; bytes and seconds.

    `expert_bytes` are those of the routed experts, `cache_bytes` those of the prompt's KV cache in
    fp32. `agreement` and `flips` are against the checkpoint with all of its tokens (of a bundle
    that has all, only `agreement`), `kl` against it with as many; `rerouted` is the share of tokens
    that went to another expert, `accuracy` exact match and None where no answer is known, `failed`
    the gates that were missed.
    """

    form: str
    bundle_bytes: int
    expert_bytes: int
    cache_bytes: int
    vision: float
    prefill: float
    decode: float
    agreement: float
    kl: float
    rerouted: float | None
    flips: Flips | None
    accuracy: float | None
    failed: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every form, and write the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("forms", nargs="*", metavar="FORM")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--stats", type=Path)
    asked = parser.parse_args(arguments)
    counts = read_checkpoint(asked.checkpoint).config.vision.token_counts
    asked.output.mkdir(parents=True, exist_ok=True)
    file = asked.output / ROWS
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.exists() else []
    for form in asked.forms or map(str, counts):
        if form not in {row["form"] for row in rows}:
            row = measure(asked.checkpoint, asked.data, form, asked.output, asked.stats)
            rows.append(asdict(row))
            file.write_text(json.dumps(rows, indent=2), "utf-8")
            print(json.dumps(rows[-1]), flush=True)


def options_of(form: str, stats: Path | None) -> medmoe_edge.ExportOptions:
    """What a form is exported with; statistics are of all image tokens."""
    plain = medmoe_edge.ExportOptions(stats=stats)
    if form.isdigit():
        return medmoe_edge.ExportOptions(image_tokens=int(form))
    if form == "int4":
        return replace(plain, precision="int4")
    return plain if form == "int8" else replace(plain, experts=form)


def measure(checkpoint: Path, data: Path, form: str, folder: Path, stats: Path | None) -> Row:
    """Export, verify and time one form."""
    out = folder / form.replace(":", "-")
    if not out.exists():
        medmoe_edge.export_model(checkpoint, out, options_of(form, stats))
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
        form=form,
        bundle_bytes=sum(file.stat().st_size for file in out.iterdir()),
        expert_bytes=sum(extent.bytes for extent in read_extents(bundle).values()),
        cache_bytes=4 * cache_values(bundle.config, shape.prompt),
        vision=times["vision"],
        prefill=times["prefill"],
        decode=times["decode"],
        agreement=answers.answer_agreement.share,
        kl=figures.overall.kl.mean,
        rerouted=figures.routing.flips.share if figures.routing else None,
        flips=whole.flips if whole else None,
        accuracy=answers.accuracy.candidate if answers.accuracy else None,
        failed=tuple(gate.name for gate in record.gates if gate.verdict == "failed"),
    )


if __name__ == "__main__":
    main()
