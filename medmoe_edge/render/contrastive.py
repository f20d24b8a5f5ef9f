"""What the verbs show of a MedMoE: scores with bars, where a phrase lies, an archive, figures."""

from typing import TYPE_CHECKING

from medmoe_edge.render.console import (
    percent,
    show,
    show_make_up,
    show_table,
    show_warnings,
    wrote,
)

if TYPE_CHECKING:
    from pathlib import Path

    from medmoe_edge.archive.indexing import Indexing
    from medmoe_edge.archive.store import Retrieval
    from medmoe_edge.contrastive.evaluate import Mean, ModalityEvaluation, Share
    from medmoe_edge.contrastive.features import Classification, Location, Reading
    from medmoe_edge.evaluation.inspection import ModalityInspection

SHOWN = 20  # of many labels; --json has them all
INTERVAL = "95% interval"
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
    show_warnings(found.warnings)
    _ground(found.reading, found.timings["total"])


def show_location(found: "Location", picture: "Path") -> None:
    """How well a phrase fits, and where best."""
    x, y = found.peak
    height, width = found.heat.shape
    show(found.phrase)
    show(f"  most alike at {x}, {y} of {width} x {height} pixels", "bold green")
    show_warnings(found.warnings)
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
            (
                number,
                hit.path,
                f"{hit.similarity:.3f}",
                hit.modality,
                f"frame {hit.frame} of {hit.frames}" if hit.frames > 1 else "",
            )
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
    # the modalities that may be meant, the first in any case
    likely = [
        f"{name} {percent(share)}"
        for number, (name, share) in enumerate(reading.probabilities.items())
        if number == 0 or share >= 0.05
    ]
    show(f"image read as {', '.join(likely)} · {seconds:.2f} s", "dim")


def show_modality_inspection(inspection: "ModalityInspection") -> None:
    """A MedMoE's make-up."""
    config, scores = inspection.config, inspection.scores
    swin, bert = config.vision, config.text
    experts = "one, shared by all" if config.shared_expert else f"{config.experts}, of which 1 runs"
    rows = [
        ("parameters", f"{inspection.parameters_total:,}"),
        *((f"  of the {part}", f"{count:,}") for part, count in inspection.parameters.items()),
        ("  activated", f"{inspection.parameters_activated:,}"),
        ("image tower", f"Swin, {swin.image_size} pixels, {len(swin.depths)} scales"),
        ("text tower", f"BERT, {bert.layers} layers of {bert.hidden_size}"),
        ("experts", experts),
        ("  for", ", ".join(config.modalities)),
        ("temperature", f"{scores.temperature:g}"),
        (
            "unfamiliar",
            f"entropy > {scores.entropy_limit:.2g}, evidence < {scores.evidence_limit:.2g}",
        ),
    ]
    show_make_up(inspection, rows)
    show_warnings(inspection.warnings)


def show_modality_evaluation(found: "ModalityEvaluation") -> None:
    """Every figure in percent with its 95% interval."""
    for name, routing in found.routing.items():
        counts = [
            (kind, share.count, share.right, *_figures(share))
            for kind, share in (*routing.modalities.items(), ("all", routing.overall))
        ]
        show_table(f"Modality of {name}", ["", "images", "right", "accuracy", INTERVAL], counts)
    rows: list[tuple[object, ...]] = []
    for name, task in found.zero_shot.tasks.items():
        images = sum(share.count for share in task.findings.values())
        rows.append((name, images, *_figures(task.balanced)))
        rows += [
            (f"  {finding}", share.count, *_figures(share))
            for finding, share in task.findings.items()
        ]
    rows.append(("mean of the tasks", "", *_figures(found.zero_shot.mean)))
    show_table("Zero-shot classification", ["", "images", "balanced accuracy", INTERVAL], rows)
    show_table(
        "Retrieval",
        ["", "candidates", "within", "recall", INTERVAL],
        [
            (what, retrieval.candidates, rank, *_figures(share))
            for what, retrieval in (
                ("text for an image", found.text_for_image),
                ("image for a text", found.image_for_text),
            )
            for rank, share in retrieval.recall.items()
        ],
    )
    model, centre = found.localisation.model, found.localisation.centre
    rows = [
        (phrase, share.count, *_figures(share), percent(centre.phrases[phrase].share))
        for phrase, share in model.phrases.items()
    ]
    rows.append(("all", model.hits.count, *_figures(model.hits), percent(centre.hits.share)))
    rows.append(("average precision", "", percent(model.precision), "", percent(centre.precision)))
    show_table("Localisation", ["", "places", "hit", INTERVAL, "centre of image"], rows)


def _figures(found: "Share | Mean") -> tuple[str, str]:
    low, high = found.interval
    return percent(found.share), f"{percent(low)} to {percent(high)}"
