"""What `eval` shows of a MedMoE: routing, tasks, retrieval, places."""

from typing import TYPE_CHECKING

from medmoe_edge.render.console import percent, show_table

if TYPE_CHECKING:
    from medmoe_edge.contrastive.evaluate import Mean, ModalityEvaluation, Retrieval, Share

INTERVAL = "95% interval"


def show_modality_evaluation(found: "ModalityEvaluation") -> None:
    """Every figure in percent with its 95% interval."""
    for name, routing in found.routing.items():
        counts: list[tuple[object, ...]] = [
            *((kind, *_counted(share)) for kind, share in routing.modalities.items()),
            ("all", *_counted(routing.overall)),
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
            *_retrieved("text for an image", found.text_for_image),
            *_retrieved("image for a text", found.image_for_text),
        ],
    )
    _show_places(found)


def _show_places(found: "ModalityEvaluation") -> None:
    model, centre = found.localisation.model, found.localisation.centre
    rows: list[tuple[object, ...]] = [
        (phrase, share.count, *_figures(share), percent(centre.phrases[phrase].share))
        for phrase, share in model.phrases.items()
    ]
    rows.append(("all", model.hits.count, *_figures(model.hits), percent(centre.hits.share)))
    rows.append(("average precision", "", percent(model.precision), "", percent(centre.precision)))
    show_table("Localisation", ["", "places", "hit", INTERVAL, "centre of image"], rows)


def _retrieved(what: str, found: "Retrieval") -> list[tuple[object, ...]]:
    return [
        (what, found.candidates, rank, *_figures(share)) for rank, share in found.recall.items()
    ]


def _counted(share: "Share") -> tuple[object, ...]:
    return share.count, share.right, *_figures(share)


def _figures(found: "Share | Mean") -> tuple[str, str]:
    low, high = found.interval
    return percent(found.share), f"{percent(low)} to {percent(high)}"
