"""What the command line shows: tables and bars for people, one JSON object for programs.

What verification shows is in `render.verification`, of MedMoE in `render.contrastive`.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmoe_edge.errors import shown_bytes

if TYPE_CHECKING:  # rich costs a third of the start-up, and --json needs none of it
    from rich.progress import Progress

    from medmoe_edge.engine.answer import Answer
    from medmoe_edge.errors import MedMoEError, Notice
    from medmoe_edge.evaluation.evaluate import Evaluation, ModalityAccuracy, Score, Scores
    from medmoe_edge.evaluation.inspection import Inspection, ModalityInspection
    from medmoe_edge.families import AnswerScores

NONE = "\N{EN DASH}"  # in a table, what is not known
ENDLESS = 10_000  # columns, for tables that go into a file or another program
log = logging.getLogger(__name__)
printed_json: list[bool] = []  # whether this command line has printed its one object


def as_json(value: Mapping[str, Any], error: "MedMoEError | None" = None) -> None:
    """One object on one line of stdout; ASCII, so that no terminal or locale can refuse it.

    `error` is that with which the verb is about to end, where it has a result all the same.
    """
    told = {"error": error_json(error.code, error.what, error.remedy)} if error else {}
    sys.stdout.write(json.dumps({**value, **told}, allow_nan=False) + "\n")
    printed_json.append(True)


def error_json(code: str, what: str, remedy: str) -> dict[str, str]:
    """A failure for programs."""
    return {"code": code, "message": printable(what), "remedy": printable(remedy)}


def show(text: str = "", style: str = "", *, stderr: bool = False) -> None:
    """One paragraph, in colour only on a terminal and without `NO_COLOR`; never as markup."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=stderr).print(Text(printable(text), style), soft_wrap=True)


def hint(text: str) -> None:
    """One calm line on stderr, unless it is empty or somebody asked for quiet."""
    if text and log.isEnabledFor(logging.WARNING):
        show(text, "dim", stderr=True)


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    left: int = 1,
    styles: Mapping[str, str] | None = None,
) -> None:
    """A table whose first `left` columns are words and whose others are numbers.

    `styles` are by the words of a cell.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if title:
        show(title, "bold")
    table = Table(box=None, show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        cells = [printable(str(value)) for value in row]
        table.add_row(*(Text(cell, (styles or {}).get(cell, "")) for cell in cells))
    console = Console()
    (console if console.is_terminal else Console(width=ENDLESS)).print(table)


def printable(text: str) -> str:
    """The text on one line, without what could steer a terminal: models and files may hold it."""
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in text)


@contextmanager
def bars() -> Iterator["Progress"]:
    """Progress bars on stderr, if that is a terminal and nobody asked for quiet."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    console = Console(stderr=True)
    hidden = not console.is_terminal or not log.isEnabledFor(logging.WARNING)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield progress


def line_above(progress: "Progress", line: str) -> None:
    """One calm line on stderr above the bars, which is told without a terminal too."""
    from rich.text import Text

    if log.isEnabledFor(logging.WARNING):
        progress.console.print(Text(printable(line), "dim"), soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """One bar while the block runs: of unknown length until told of `(step, done, total)`."""
    with bars() as progress:
        task = progress.add_task(what, total=None)
        yield lambda step, done, total: progress.update(
            task, description=step.capitalize(), completed=done, total=total
        )


def show_answers(answers: Sequence["Answer"]) -> None:
    """Each question with its answer, and beneath it what the answer rests on."""
    for number, answer in enumerate(answers):
        if number:
            show()
        show(answer.question)
        show_warnings(answer.warnings)
        show(f"  {answer.shown}", "bold yellow" if answer.unsure else "bold green")
        show(f"  {' · '.join(_grounds(answer))}", "dim")


def show_warnings(warnings: Iterable["Notice"]) -> None:
    """What should be known of a result, one a line."""
    for notice in warnings:
        show(f"  Warning: {notice.message}", "bold yellow")


def show_inspection(inspection: "Inspection") -> None:
    """A model's make-up."""
    config, moe = inspection.config, inspection.config.moe
    decoder, vision, total = config.decoder, config.vision, inspection.parameters_total
    averaged = f", averaged from {vision.features}" if vision.pool > 1 else ""
    rows: list[tuple[str, object]] = [
        ("parameters", "unknown without torch" if total is None else f"{total:,}"),
        ("  of the language part", f"{inspection.parameters_language:,}"),
        ("  activated per token", f"{inspection.parameters_activated:,}"),
        ("vision", f"{vision.kind}, {vision.image_tokens} image tokens{averaged}"),
        ("decoder", f"{decoder.kind}, {decoder.layers} layers of {decoder.hidden_size}"),
    ]
    if moe:
        meta = " + meta expert" if moe.meta_expert else ""
        meta += ", merged into one" if moe.merged else ""
        rows += [
            ("experts", f"{moe.num_experts}, top-{moe.top_k}{meta}, in {len(moe.layers)} layers"),
            ("  in layers", ", ".join(map(str, moe.layers))),
        ]
        if moe.expert_names:
            rows.append(("  for", ", ".join(moe.expert_names)))
        if moe.left_out:
            rows.append(("  left out", f"{', '.join(moe.left_out)}; answers about them say so"))
    if inspection.tensors is not None:
        types = ", ".join(f"{count} {name}" for name, count in (inspection.types or {}).items())
        rows.append(("tensors", f"{inspection.tensors:,} ({types})"))
    show_make_up(inspection, rows)
    show_warnings(inspection.warnings)


def show_evaluation(found: "AnswerScores") -> None:
    """The papers' figures in percent, without the picture too, then how the modality was read."""
    if found.questions is None:
        if found.labels:
            show(_modality_found("the labelled images", found.labels))
        return
    asked, blind = found.questions, found.blind
    groups: list[tuple[str, Scores]] = [("all", asked)]
    if blind:
        groups.append(("blind: a black picture", blind))
    groups += asked.by_source.items()
    scores: list[tuple[str, Score | None]] = []
    for name, group in groups:
        scores += [(name, group.overall), ("  open", group.open), ("  closed", group.closed)]
    scores += list(asked.by_modality.items())
    rows = []
    for name, score in scores:
        if score:
            interval = "{:.1%} to {:.1%}".format(*score.exact_match_interval)
            rows.append(
                (name, score.n, percent(score.exact_match), interval, percent(score.accuracy))
            )
    show_table("", ["", "questions", "exact match", "95% interval", "accuracy"], rows)
    show()
    show_table(
        "",
        ["the papers' figures", "ours", "official", *(["blind"] if blind else [])],
        [
            (name, *(NONE if value is None else f"{value:.2%}" for value in values))
            for name, values in _published(asked, blind).items()
        ],
    )
    show(
        "Official: as the scorer of the papers counts, which pays for repeated words. Ours: a word "
        "counts as often as the reference has it.",
        "dim",
    )
    for line in _remarks(asked, found):
        show(line)


def _published(asked: "Scores", blind: "Scores | None") -> dict[str, list[float | None]]:
    closed = asked.closed.accuracy if asked.closed else None
    told: dict[str, list[float | None]] = {
        "open recall": [asked.open_recall, asked.official_open_recall],
        "closed accuracy": [closed, asked.official_closed_accuracy],
    }
    if blind:
        told["open recall"].append(blind.official_open_recall)
        told["closed accuracy"].append(blind.official_closed_accuracy)
    return told


def _remarks(asked: "Evaluation", found: "AnswerScores") -> Iterator[str]:
    if found.image_tokens:
        yield f"Of an image {found.image_tokens:,} tokens were read."
    if asked.overall.n < found.of:
        yield f"Drawn from {found.of:,} questions."
    if asked.cut_off:
        yield f"{asked.cut_off:,} answers were cut off: allow more with --max-new-tokens."
    if reliability := asked.reliability:
        wrong, half = 1 - reliability.accuracy, 1 - reliability.half
        yield f"Confidence is off by {percent(reliability.ece)} on average (ECE)."
        yield f"Wrong are {percent(wrong)} of all answers, {percent(half)} of the surer half."
    if asked.unsure.answers:
        yield (
            f"Unsure are {percent(asked.unsure.answers)} of the answers, with "
            f"{percent(asked.unsure.errors)} of the errors."
        )
    for what, read in (("these images", asked.router), ("the labelled images", found.labels)):
        if line := _modality_found(what, read):
            yield line


def _modality_found(what: str, read: "ModalityAccuracy | None") -> str:
    if read is None or read.accuracy is None:
        return ""
    return f"Modality found in {what}: {percent(read.accuracy)} of {read.images}"


def show_run(epochs: Sequence[Mapping[str, Any]], *, finished: bool) -> None:
    """How far a training run is, one row an epoch."""
    own = ("phase", "epoch", "loss", "seconds")
    scores = dict.fromkeys(name for row in epochs for name in row if name not in own)
    rows = [
        (
            row["phase"],
            row["epoch"] + 1,
            f"{row['loss']:.4f}",
            *(percent(row[name]) if name in row else "" for name in scores),
            f"{row['seconds']:.0f} s",
        )
        for row in epochs
    ]
    show_table("", ["phase", "epoch", "loss", *scores, "time"], rows)
    show("Finished." if finished else f"{len(rows)} epochs are done; the run is not finished.")


def percent(fraction: float) -> str:
    """A fraction (0..1) for people: 82.4%."""
    return f"{fraction:.1%}"


def wrote(what: str, path: Path) -> None:
    """The last line of a verb that wrote something."""
    show(f"Wrote {what} {path}")


def _grounds(answer: "Answer") -> Iterator[str]:
    if answer.probabilities:
        yield ", ".join(f"{name} {percent(share)}" for name, share in answer.probabilities.items())
    yield f"confidence {percent(answer.confidence)}"
    if answer.modality:
        yield f"modality {answer.modality}"
    shares = sorted(answer.experts.items(), key=lambda item: -item[1])
    if used := [f"{name} {share:.0%}" for name, share in shares if share]:
        yield f"experts {', '.join(used)}"
    yield f"{answer.timings.total:.2f} s, first token after {answer.timings.first_token:.2f} s"


def show_make_up(
    inspection: "Inspection | ModalityInspection", own: Iterable[tuple[str, object]]
) -> None:
    """What both families have around a model's `own` rows."""
    bits = inspection.bits_per_weight
    made_for = {
        "target": inspection.target,
        "runtime": inspection.runtime,
        "bits per weight": None if bits is None else f"{bits:.2f}",
    }
    rows: list[tuple[str, object]] = [("kind", inspection.kind)]
    rows += [(name, value) for name, value in made_for.items() if value]
    rows.append(("size", f"{shown_bytes(inspection.bytes)} in {len(inspection.files)} files"))
    rows += own
    for name in ("quantisation", "source", "licence", "signature", "verification"):
        value = getattr(inspection, name)
        if not isinstance(value, Mapping):
            rows += [(name, value)] if value else []
            continue
        rows.append((name, ""))
        for key, part in value.items():
            if isinstance(part, str | int | float):  # lists are left to --json
                rows.append((f"  {key.replace('_', ' ')}", part))
    verified = inspection.verified
    if verified is not None and verified["machine"] is not None:
        from medmoe_edge.bundle.machine import Machine

        holds = "yes" if verified["here"] else "no: prove it with medmoe-edge verify --quick"
        machine = Machine.from_json(verified["machine"])
        rows += [("  on", str(machine)), ("  which holds here", holds)]
    show_table(inspection.name, ["", ""], rows, left=2)
