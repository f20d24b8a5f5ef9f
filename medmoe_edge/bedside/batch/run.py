"""Questions to a whole archive: one row for each image and question, however often interrupted.

What is done is kept in a journal beside the output (`batch_journal`), so that the same call goes on
where it ended. Rows come in the order of the inputs, whatever the order in which they were
answered; an image that cannot be read has rows that say so.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medmoe_edge.bedside.batch.asking import Answering, Here, Recipe
from medmoe_edge.bedside.batch.inputs import Item, fingerprint, read_items
from medmoe_edge.bedside.batch.journal import Journal
from medmoe_edge.bedside.batch.parquet import write_results
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import InputError, ModelError

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """What became of a batch: `rows` were written to `output`, of which `errors` have no answer.

    `warned` rows have an answer with warnings.

    Of `images` images, `resumed` had been done by earlier runs; `seconds` are of this one.
    """

    output: str
    images: int
    rows: int
    errors: int
    warned: int
    resumed: int
    seconds: float
    model: dict[str, str]
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
    answering: Answering | None = None,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> BatchReport:
    """Ask all questions about all images, and write the answers to a parquet file.

    `batch_inputs` says what the inputs may be, `batch_parquet` what is written. `recipe` is how to
    ask (by default nano), `answering` where: in this process, or `batch_ray.OnRay`. Interrupted at
    any moment, the same call goes on; `force` replaces an output that exists, and a journal of
    another job. Raises `InputError` for inputs, questions or an output that cannot be used, the
    errors of `engine.load`, and `ResourceError` for a disk that is full.
    """
    started = time.perf_counter()
    inputs, output = Path(inputs), Path(output)
    recipe = recipe or Recipe()
    if output.exists() and not force:
        raise InputError(f"{output} exists already.", "Choose another name, or pass force.")
    items = read_items(inputs, None if questions is None else Path(questions), besides=(output,))
    answering = answering or Here(recipe)
    model = answering.begin(dict.fromkeys(each for item in items for each in item.questions))
    job = fingerprint(items, model.sha256, recipe.max_new_tokens)
    with Journal(output, job, force=force) as journal:
        done = journal.done()
        _answer(items, done, journal, answering, model.sha256, progress)
        written = write_results(output, items, journal, model.verification)
        journal.remove()
    return BatchReport(
        output=str(output),
        images=len(items),
        rows=written.rows,
        errors=written.errors,
        warned=written.warned,
        resumed=len(done),
        seconds=time.perf_counter() - started,
        model=model._asdict(),
    )


def _answer(
    items: Sequence[Item],
    done: set[int],
    journal: Journal,
    answering: Answering,
    sha256: str,
    progress: Progress,
) -> None:
    """Bring all that is not done into the journal."""
    pending = [(number, item) for number, item in enumerate(items) if number not in done]
    finished = len(done)
    progress("asking", finished, len(items))
    for number, rows in answering.answers(pending):
        if any(row["model_sha256"] != sha256 for row in rows):
            raise ModelError(
                "A machine of the cluster has another model of that name.",
                "Bring the same bundle and version of medmoe-edge to all of them.",
            )
        journal.keep(number, rows)
        finished += 1
        progress("asking", finished, len(items))
