"""The results of a batch as a parquet file.

    image_number, image         which image of the inputs, from 0, and its path as given there
    question_number, question   which question of the image, from 0
    answer, confidence, modality, experts, complete, seconds    as in `answer.Answer`; null without
    warnings                    of the answer: each a code and a message; null without an answer
    model, model_sha256         what answered
    error                       what was wrong with the image; null where there is an answer

The two numbers name a row, also where a path or a question comes twice. `seconds` of an image's
first question include reading the image. The file's metadata hold `notice`, `verification` and
`medmoe_edge`, the version.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import parquet

from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_file
from medmoe_edge.bedside.batch.inputs import Item, Journal, Row
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import ResourceError

GROUP = 10_000  # rows that are held in memory at once

WARNING = pyarrow.struct([("code", pyarrow.string()), ("message", pyarrow.string())])
SCHEMA = pyarrow.schema(
    [
        ("image_number", pyarrow.int64()),
        ("image", pyarrow.string()),
        ("question_number", pyarrow.int64()),
        ("question", pyarrow.string()),
        ("answer", pyarrow.string()),
        ("confidence", pyarrow.float64()),
        ("modality", pyarrow.string()),
        ("experts", pyarrow.map_(pyarrow.string(), pyarrow.float64())),
        ("complete", pyarrow.bool_()),
        ("model", pyarrow.string()),
        ("model_sha256", pyarrow.string()),
        ("seconds", pyarrow.float64()),
        ("error", pyarrow.string()),
        ("warnings", pyarrow.list_(WARNING)),
    ]
)


class Written(NamedTuple):
    """How many rows there are, without an answer, and with warnings."""

    rows: int
    errors: int
    warned: int


def write_results(
    output: Path, items: Sequence[Item], journal: Journal, verification: str
) -> Written:
    """Write all that the journal keeps, whole or not at all.

    Raises `ResourceError` where the disk does not take it.
    """
    about = {"notice": NOTICE, "verification": verification, "medmoe_edge": __version__}
    count = errors = warned = 0
    try:
        with (
            atomic_file(output) as file,
            parquet.ParquetWriter(file, SCHEMA.with_metadata(about)) as writer,
        ):
            for rows in _groups(_rows(items, journal)):
                writer.write_table(pyarrow.Table.from_pylist(rows, writer.schema))
                count += len(rows)
                errors += sum(row["error"] is not None for row in rows)
                warned += sum(bool(row.get("warnings")) for row in rows)
    except OSError as error:
        raise ResourceError(
            f"{output} cannot be written ({error.strerror or type(error).__name__}).",
            "Free some space and run it again: nothing is asked twice.",
        ) from error
    return Written(count, errors, warned)


def _rows(items: Sequence[Item], journal: Journal) -> Iterator[Row]:
    for number, rows in journal.results():
        for place, row in enumerate(rows):
            image = {"image_number": number, "image": shown(items[number].image)}
            yield {
                **image,
                "question_number": place,
                **row,
                "experts": row["experts"] and list(row["experts"].items()),
            }


def shown(name: str) -> str:
    """A path as text: bytes that are no UTF-8 become `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    return iter(lambda: list(islice(rows, GROUP)), [])
