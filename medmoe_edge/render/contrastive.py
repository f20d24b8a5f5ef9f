"""What the verbs of MedMoE show: scores with bars, where a phrase lies, what an archive holds."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from medmoe_edge.render.console import percent, show, show_table, wrote

if TYPE_CHECKING:
    from pathlib import Path

    from medmoe_edge.archive.indexing import Indexing
    from medmoe_edge.archive.store import Retrieval
    from medmoe_edge.contrastive.results import Classification, Location, Reading

SHOWN = 20  # of many labels; --json has them all
BAR = 30  # columns of a score of 1
UNFAMILIAR = "Unfamiliar image: unlike those the model knows. Do not rely on what is said of it."
ONE_LABEL = (
    "One label has no rival: its score would be 100% whatever the image. "
    "Compare it with others, such as: no finding."
)


def show_classification(found: "Classification") -> None:
    """Labels with bars, the best first; of a single one only how similar it is."""
    if len(found.scores) == 1:
        rows = [(label, "", "", f"{value:.3f}") for label, value in found.similarities.items()]
    else:
        rows = [
            (label, "█" * round(BAR * score), percent(score), f"{found.similarities[label]:.3f}")
            for label, score in list(found.scores.items())[:SHOWN]
        ]
    show_table("", ["label", "", "score", "similarity"], rows, left=2)
    if more := len(found.scores) - len(rows):
        show(f"and {more:,} more labels; --json has them all")
    if len(rows) == 1:
        show(ONE_LABEL, "yellow")
    _ground(found.reading, found.timings["total"])


def show_location(found: "Location", picture: "Path") -> None:
    """How well a phrase fits, and where best."""
    x, y = found.peak
    height, width = found.heat.shape
    show(found.phrase)
    show(f"  most alike at {x}, {y} of {width} x {height} pixels", "bold green")
    show(f"  similarity to the whole image {found.similarity:.3f}", "dim")
    _ground(found.reading, found.timings["total"])
    wrote("the map", picture)


def show_indexing(made: "Indexing") -> None:
    """What became of a folder's files."""
    rows = [
        ("images in the index", f"{made.entries:,}"),
        ("  embedded now", f"{made.embedded:,}"),
        ("  known pictures, moved or copied", f"{made.reused:,}"),
        ("  unchanged", f"{made.unchanged:,}"),
        ("removed: no longer there", f"{made.removed:,}"),
        ("skipped: no image, or unreadable", f"{made.skipped:,}"),
        *((f"  {name}", "") for name in made.skipped_files[:5]),
    ]
    show_table("", ["", ""], rows)
    show(f"Wrote in {made.seconds:.1f} s the index {made.index}")


def show_retrieval(found: "Retrieval") -> None:
    """The images that were found, by their paths below the indexed folder."""
    if found.hits:
        rows = [
            (number, hit.path, f"{hit.similarity:.3f}", hit.modality, _frame(hit.frame, hit.frames))
            for number, hit in enumerate(found.hits, 1)
        ]
        show_table("", ["", "image", "similarity", "modality", ""], rows, left=2)
    else:
        show("The index is empty.")
    show(f"of {found.entries:,} images below {found.folder}, in {found.seconds:.2f} s", "dim")


def show_explanation(found: "Location", router: str | None, picture: "Path") -> None:
    """Where the key phrase of an answer lies, and how both models read the image."""
    show()
    show_location(found, picture)
    reading = found.reading
    name = found.model["name"]
    likely = percent(reading.probabilities[reading.modality])
    rows = [(name, reading.modality, likely), ("the answer's router", router or "unknown", "")]
    show_table("modality", ["", "", ""], rows, left=2)


def _ground(reading: "Reading", seconds: float) -> None:
    likely = (f"{name} {percent(share)}" for name, share in _likely(reading))
    show(f"image read as {', '.join(likely)} · {seconds:.2f} s", "dim")


def _likely(reading: "Reading") -> Iterator[tuple[str, float]]:
    """The modalities that may be meant, the first in any case."""
    for number, (name, share) in enumerate(reading.probabilities.items()):
        if number == 0 or share >= 0.05:
            yield name, share


def _frame(frame: int, frames: int) -> str:
    return f"frame {frame} of {frames}" if frames > 1 else ""
