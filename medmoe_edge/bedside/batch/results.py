"""The results of a batch as a Parquet or a CSV file, as the suffix of its name says.

    image_number, image         which image of the inputs, from 0, and its path as given there
    question_number, question   which question of the image, from 0
    answer, confidence, modality, experts, complete, seconds    as in `answer.Answer`; null without
    warnings                    of the answer: each a code and a message; null without an answer
    model, model_sha256         what answered
    error                       what was wrong with the image; null where there is an answer

The two numbers name a row, also where a path or a question comes twice. `seconds` of an image's
first question include reading the image. A Parquet file's metadata hold `notice`, `verification`
and `medmoe_edge`, the version; a CSV has the first two as columns, `experts` as JSON and `warnings`
as text, and needs no further package.
"""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_file
from medmoe_edge.bedside.batch.inputs import Item, Journal, Row
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import InputError, ResourceError, needs

GROUP = 10_000  # rows that are held in memory at once
COLUMNS = (
    *("image_number", "image", "question_number", "question", "answer", "confidence", "modality"),
    *("experts", "complete", "model", "model_sha256", "seconds", "error", "warnings"),
)
FORMATS = (".parquet", ".csv")


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
        "complete": pyarrow.bool_(),
        "warnings": pyarrow.list_(pyarrow.struct([("code", text), ("message", text)])),
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
            experts = row["experts"] and json.dumps(row["experts"])
            writer.writerow({**row, "experts": experts, "warnings": told, **ends})

    yield write
    stream.detach()  # the file is closed by who opened it


def _rows(items: Sequence[Item], journal: Journal) -> Iterator[Row]:
    for number, rows in journal.results():
        for place, row in enumerate(rows):
            image = {"image_number": number, "image": shown(items[number].image)}
            yield {**image, "question_number": place, **row}


def shown(name: str) -> str:
    """A path as text: bytes that are no UTF-8 become `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    return iter(lambda: list(islice(rows, GROUP)), [])
