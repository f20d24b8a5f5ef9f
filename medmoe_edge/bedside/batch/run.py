"""Questions to a whole archive: one row for each image and question, however often interrupted.

What is done is kept in a journal beside the output (`inputs.py`), so that the same call goes on
where it ended. Rows come in the order of the inputs, whatever the order in which they were
answered; an image that cannot be read has rows that say so.

The results are a Parquet or a CSV file, as the suffix of its name says.

    image_number, image         which image of the inputs, from 0, and its path as given there
    slices, slices_of           of a series: the images that were asked, and how many it has
    question_number, question   which question of the image, from 0
    answer, confidence, modality, experts, complete, seconds    as in `answer.Answer`; null without
    confidence_kind, unsure, stopped    of the same
    warnings                    of the answer: each a code and a message; null without an answer
    model, model_sha256         what answered
    error                       what was wrong with the image; null where there is an answer

The two numbers name a row, also where a path or a question comes twice. `seconds` of an image's
first question include reading the image. A Parquet file's metadata hold `notice`, `verification`
and `medmoe_edge`, the version; a CSV has the first two as columns, `experts` as JSON and `warnings`
as text, and needs no further package. Text that a spreadsheet would take for a formula (a file may
be named so) begins with an apostrophe there.

By series, a row is about a series: the answer that most of the asked slices give, `image` the one
that gives it with most confidence, and `seconds` those of all slices.
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from medmoe_edge._types import Progress
from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_file, check_apart, refuse_existing
from medmoe_edge.bedside.batch.inputs import (
    Asked,
    Header,
    Item,
    Journal,
    Row,
    fingerprint,
    group_series,
    hashes_of,
    header_of,
    read_items,
)
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.config import Device, RuntimeName
from medmoe_edge.embedded import EMBEDDED
from medmoe_edge.engine.answer import Answer, logged
from medmoe_edge.engine.answer import shown as shown_answer
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.errors import (
    InputError,
    MedMoEError,
    ModelError,
    Notice,
    ResourceError,
    needs,
)

if TYPE_CHECKING:
    from medmoe_edge.bedside.audit.log import AuditLog
    from medmoe_edge.bedside.listen.config import Series


GROUP = 10_000  # rows that are held in memory at once
UNREADABLE = Notice("unreadable_slices", "Some of the chosen slices could not be read.")

COLUMNS = (
    *("image_number", "image", "question_number", "question", "answer", "confidence", "modality"),
    *("experts", "complete", "model", "model_sha256", "seconds", "error", "warnings"),
    *("unsure", "stopped", "confidence_kind"),
    *("slices", "slices_of"),
)

FORMATS = (".parquet", ".csv")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet computes


class Written(NamedTuple):
    """How many rows there are, without an answer, and with warnings."""

    rows: int
    errors: int
    warned: int


def check_format(output: Path) -> None:
    """Raise `InputError` for a name whose suffix is of no format.

    Raises `MissingDependencyError` where the format needs a package that is not there.
    """
    if output.suffix.lower() not in FORMATS:
        raise InputError(
            f"{output} is not named as a table.", f"Let its name end in {' or '.join(FORMATS)}."
        )
    if output.suffix.lower() == ".parquet":
        with needs("batch"):
            import pyarrow  # noqa: F401


def write_results(
    output: Path, items: Sequence[Item], journal: Journal, verification: str
) -> Written:
    """Write all that the journal keeps, whole or not at all.

    Raises `ResourceError` where the disk does not take it.
    """
    about = {"notice": NOTICE, "verification": verification, "medmoe_edge": __version__}
    form = _csv if output.suffix.lower() == ".csv" else _parquet
    count = errors = warned = 0
    try:
        with atomic_file(output) as file, form(file, about) as write:
            for rows in _groups(_rows(items, journal)):
                write(rows)
                count += len(rows)
                errors += sum(row["error"] is not None for row in rows)
                warned += sum(bool(row.get("warnings")) for row in rows)
    except OSError as error:
        raise ResourceError(
            f"{output} cannot be written ({error.strerror or type(error).__name__}).",
            "Free some space and run it again: nothing is asked twice.",
        ) from error
    return Written(count, errors, warned)


Write = Callable[[list[Row]], None]


@contextlib.contextmanager
def _parquet(file: IO[bytes], about: dict[str, str]) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.float64()
    kinds: dict[str, Any] = {
        **dict.fromkeys(("image_number", "question_number"), pyarrow.int64()),
        **dict.fromkeys(("confidence", "seconds"), number),
        "experts": pyarrow.map_(text, number),
        **dict.fromkeys(("complete", "unsure"), pyarrow.bool_()),
        "warnings": pyarrow.list_(pyarrow.struct([("code", text), ("message", text)])),
        "slices": pyarrow.list_(text),
        "slices_of": pyarrow.int64(),
    }
    schema = pyarrow.schema([(name, kinds.get(name, text)) for name in COLUMNS])
    with parquet.ParquetWriter(file, schema.with_metadata(about)) as writer:

        def write(rows: list[Row]) -> None:
            listed = [
                {**row, "experts": row["experts"] and list(row["experts"].items())} for row in rows
            ]
            writer.write_table(pyarrow.Table.from_pylist(listed, writer.schema))

        yield write


@contextlib.contextmanager
def _csv(file: IO[bytes], about: dict[str, str]) -> Iterator[Write]:
    """Told to be UTF-8 by a mark at the beginning, which spreadsheets look for."""
    stream = io.TextIOWrapper(file, encoding="utf-8-sig", newline="", write_through=True)
    ends = {name: about[name] for name in ("verification", "notice")}
    writer = csv.DictWriter(stream, [*COLUMNS, *ends])
    writer.writeheader()

    def write(rows: list[Row]) -> None:
        for row in rows:
            told = "; ".join(f"{one['code']}: {one['message']}" for one in row["warnings"] or ())
            lists = {name: row[name] and json.dumps(row[name]) for name in ("experts", "slices")}
            cells = {**row, **lists, "warnings": told, **ends}
            writer.writerow({name: _as_text(value) for name, value in cells.items()})

    yield write
    stream.detach()  # the file is closed by who opened it


def _as_text(value: Any) -> Any:
    """A cell that a spreadsheet would take for a formula, marked as text for it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _rows(items: Sequence[Item], journal: Journal) -> Iterator[Row]:
    for number, rows in journal.results():
        item = items[number]
        series = {
            "slices": [shown(name) for name, _ in item.slices] or None,
            "slices_of": item.of if item.slices else None,
        }
        for place, row in enumerate(rows):
            image = {"image_number": number, "question_number": place, **row, **series}
            yield image | {"image": shown(row.get("image", item.image))}


def shown(name: str) -> str:
    """A path as text: bytes that are no UTF-8 become `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    return iter(lambda: list(islice(rows, GROUP)), [])


Numbered = tuple[int, Item]


class Identity(NamedTuple):
    """Which model answers: `verification` is a bundle's proof, or "reference"."""

    name: str
    sha256: str
    verification: str


class Answering(Protocol):
    """What answers the questions of a batch, in whatever order."""

    def begin(self, questions: Iterable[str]) -> Identity:
        """Load the model; raises `InputError` for a question that it cannot be asked."""
        ...

    def headers(self, paths: Sequence[str]) -> Iterator[tuple[int, Header]]:
        """What each file's header tells, under its number; see `inputs.header_of`."""
        ...

    def answers(self, pending: Sequence[Numbered]) -> Iterator[tuple[int, Asked]]:
        """The results of each image, under its number."""
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to load the engine and how to ask it; the same in every process."""

    model: str = "nano"
    runtime: RuntimeName = "auto"
    device: Device = "auto"
    memory_budget: str | None = None
    max_new_tokens: int = 32
    allow_repetition: bool = False

    def load(self) -> Engine:
        """The engine; the errors of `engine.load`."""
        return load(
            self.model,
            runtime=self.runtime,
            device=self.device,
            memory_budget=self.memory_budget,
            allow_repetition=self.allow_repetition,
        )

    def elsewhere(self) -> "Recipe":
        """The same for a process that works in another folder."""
        if self.model in EMBEDDED or not Path(self.model).is_dir():
            return self
        return dataclasses.replace(self, model=os.path.abspath(self.model))


class Here:
    """Answers in this process."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def begin(self, questions: Iterable[str]) -> Identity:
        """Load the model; see `Answering`."""
        self._engine = self._recipe.load()
        return check(self._engine, questions, self._recipe.max_new_tokens)

    def headers(self, paths: Sequence[str]) -> Iterator[tuple[int, Header]]:
        """What each file's header tells, in order."""
        yield from enumerate(map(header_of, paths))

    def answers(self, pending: Sequence[Numbered]) -> Iterator[tuple[int, Asked]]:
        """The results of each image, in order."""
        for number, item in pending:
            yield number, answer(self._engine, item, self._recipe.max_new_tokens)


def check(engine: Engine, questions: Iterable[str], max_new_tokens: int) -> Identity:
    """Which model it is; raises `InputError` for a question that would be too long of any image."""
    limit = engine.config.decoder.max_positions
    for question in questions:
        needed = engine.prompt_tokens(question) + max_new_tokens
        if needed > limit:
            raise InputError(
                f"A question of {len(question):,} characters needs {needed:,} positions with its "
                f"image and answer; the model has {limit:,}.",
                "Ask a shorter question or allow fewer new tokens.",
            )
    return Identity(engine.name, engine.sha256, engine.verification)


def answer(engine: Engine, item: Item, max_new_tokens: int) -> Asked:
    """Ask about an image or a series.

    There is a row for each question; what is wrong with the image is told in all of them. Of a
    series each slice is asked, one after the other, and they vote; those that cannot be read are
    left out and told of, and only where none can be read there is no answer. Where the model or the
    machine fails there is none either: that is no fault of a slice. Where the machine fails no
    hashes are kept, so that a resumed run asks again.
    """
    hashes = hashes_of(item)  # before, so that a file that changes meanwhile counts as changed
    by_slice: dict[str, list[Answer]] = {}
    error: MedMoEError | None = None
    try:
        for name, path in item.slices or ((item.image, item.path),):
            try:
                by_slice[name] = engine.ask_all(path, item.questions, max_new_tokens=max_new_tokens)
            except InputError as wrong:
                error = wrong
    except MedMoEError as wrong:
        by_slice, error = {}, wrong
    if not by_slice:
        rows = [_row(engine, question, error=str(error)) for question in item.questions]
        return Asked({} if isinstance(error, ResourceError) else hashes, rows)
    if not item.slices:
        return Asked(hashes, [_row(engine, each.question, each) for each in by_slice[item.image]])
    notices = (*item.notices, *((UNREADABLE,) if error else ()))
    places = range(len(item.questions))
    return Asked(hashes, [_voted_row(engine, by_slice, place, notices) for place in places])


def _voted_row(
    engine: Engine,
    by_slice: Mapping[str, Sequence[Answer]],
    place: int,
    notices: tuple[Notice, ...],
) -> Row:
    """What slices say together to one question."""
    from medmoe_edge.bedside.listen.selection import voted

    said = {name: answers[place] for name, answers in by_slice.items()}
    best, found = voted(said)[:2]
    found = dataclasses.replace(found, warnings=(*found.warnings, *notices))
    seconds = sum(each.timings.total for each in said.values())
    return _row(engine, found.question, found) | {"image": best, "seconds": seconds}


def _row(
    engine: Engine, question: str, found: Answer | None = None, error: str | None = None
) -> Row:
    same = ("confidence", "modality", "experts", "complete", "unsure", "stopped", "confidence_kind")
    return {
        "question": question,
        "answer": found and found.text,
        **{name: found and getattr(found, name) for name in same},
        "warnings": found and [dataclasses.asdict(notice) for notice in found.warnings],
        "model": engine.name,
        "model_sha256": engine.sha256,
        "seconds": found and found.timings.total,
        "error": error,
    }


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """What became of a batch: `rows` were written to `output`, of which `errors` have no answer.

    `warned` rows have an answer with warnings.

    Of `images` images, `resumed` had been done by earlier runs, and `changed` too, but are other
    files since, or the machine had failed at them, and were asked again; `links` are the paths
    without rows, each with the one that leads to the same file and has them. `seconds` are of this
    run. By series, `series` is their number, with images that stand alone, `resumed` counts these,
    and `left_out` are images that are not asked about, by the reason.
    """

    output: str
    images: int
    rows: int
    errors: int
    warned: int
    resumed: int
    seconds: float
    model: dict[str, str]
    changed: int = 0
    links: dict[str, str] = dataclasses.field(default_factory=dict)
    series: int | None = None
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    notice: str = NOTICE

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object."""
        return dataclasses.asdict(self)


def run_batch(
    inputs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    questions: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe | None = None,
    series: "Series | None" = None,
    answering: Answering | None = None,
    audit: "AuditLog | None" = None,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> BatchReport:
    """Ask all questions about all images, and write the answers to a Parquet or a CSV file.

    `inputs` says what the inputs may be, `results` what is written. `recipe` is how to ask (by
    default nano), `answering` where: in this process, or `cluster.OnRay`. With `series`, DICOM
    files are asked by series: `series.slices` says about which of its slices. Interrupted at any
    moment, the same call goes on; `force` replaces an output that exists, and a journal of another
    job. With `audit`, every answer has its entry in that log before it is kept, about the image
    that its row names. Raises `InputError`
    for inputs, questions or an output that cannot be used, the errors of `engine.load`, and
    `ResourceError` for a disk that is full.
    """
    started = time.perf_counter()
    inputs, output = Path(inputs), Path(output)
    recipe = recipe or Recipe()
    refuse_existing(output, force=force)
    written = () if audit is None else audit.files
    check_apart(output, *written, around=(inputs, questions))
    check_format(output)
    asked_of_all = None if questions is None else Path(questions)
    items, links = read_items(inputs, asked_of_all, besides=(output, *written))
    answering = answering or Here(recipe)
    model = answering.begin(dict.fromkeys(each for item in items for each in item.questions))
    images, left_out = len(items), dict[str, int]()
    if series is not None:
        headers = _headers(items, answering, progress)
        items, left_out = group_series(items, headers, series)
    options = (recipe.max_new_tokens, recipe.allow_repetition, *(("audited",) if audit else ()))
    job = fingerprint(items, model.sha256, *options)
    with Journal(output, job, force=force) as journal:
        if output.exists() and not force:  # of another command, which has ended meanwhile
            journal.remove()
        refuse_existing(output, force=force)
        changed = _changed(items, journal.done(), progress)
        journal.forget(changed)
        done = journal.done()
        progress("asking", len(done), len(items))
        pending = [(number, item) for number, item in enumerate(items) if number not in done]
        for finished, (number, asked) in enumerate(answering.answers(pending), len(done) + 1):
            if any(row["model_sha256"] != model.sha256 for row in asked.rows):
                raise ModelError(
                    "A machine of the cluster has another model of that name.",
                    "Bring the same bundle and version of medmoe-edge to all of them.",
                )
            if audit is not None:
                _audit(audit, items[number], asked)
            journal.keep(number, asked)
            progress("asking", finished, len(items))
        report = write_results(output, items, journal, model.verification)
        journal.remove()
    return BatchReport(
        output=str(output),
        images=images,
        rows=report.rows,
        errors=report.errors,
        warned=report.warned,
        resumed=len(done),
        seconds=time.perf_counter() - started,
        model=model._asdict(),
        changed=len(changed),
        links=links,
        series=None if series is None else len(items),
        left_out=left_out,
    )


def _headers(items: Sequence[Item], answering: Answering, progress: Progress) -> list[Header]:
    """Those of all images, in their order."""
    found: dict[int, Header] = {}
    for number, header in answering.headers([item.path for item in items]):
        found[number] = header
        progress("reading headers", len(found), len(items))
    return [found[number] for number in range(len(items))]


def _changed(
    items: Sequence[Item], done: Mapping[int, dict[str, str]], progress: Progress
) -> list[int]:
    """The numbers of the images whose files are others than those that were asked about."""
    found = []
    for place, (number, hashes) in enumerate(done.items(), 1):
        if hashes_of(items[number]) != hashes:
            found.append(number)
        progress("looking for changes", place, len(done))
    return found


def _audit(audit: "AuditLog", item: Item, asked: Asked) -> None:
    for row in asked.rows:
        if row["error"] is not None:
            continue
        image = row.get("image", item.image)
        digest = asked.hashes[image]
        if not digest:
            raise ResourceError(
                f"{shown(image)} could not be read for a while, and its answer not be audited.",
                "Run the same again: what is done is kept.",
            )
        told = shown_answer(row["answer"], complete=row["complete"], unsure=row["unsure"])
        audit.append(
            who="batch",
            event="answer",
            model={"name": row["model"], "sha256": row["model_sha256"]},
            question=row["question"],
            answer=logged(told, (notice["code"] for notice in row["warnings"])),
            input_sha256=digest,
        )
