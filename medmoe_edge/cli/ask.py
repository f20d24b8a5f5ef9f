"""The verbs that ask a model; whatever only one of them needs is imported inside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmoe_edge.cli.common import (
    Device,
    DropPages,
    Force,
    Json,
    MemoryBudget,
    ModelOption,
    Runtime,
    verb,
)
from medmoe_edge.cli.contrastive import check_picture, write_heat, write_picture
from medmoe_edge.errors import InputError
from medmoe_edge.render import console as render
from medmoe_edge.render import contrastive as render_contrastive

if TYPE_CHECKING:
    from medmoe_edge.contrastive.results import Location
    from medmoe_edge.engine.answer import Answer


@verb("ask", "Ask", 'ask scan.png "Is there effusion?"')
def ask(
    image: Annotated[
        Path,
        typer.Argument(metavar="IMAGE", help="PNG, JPEG, TIFF, WebP, BMP, GIF, DICOM or NIfTI."),
    ],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="One or more.")],
    model: ModelOption = "nano",
    runtime: Runtime = "auto",
    device: Device = "auto",
    memory_budget: MemoryBudget = None,
    drop_pages: DropPages = False,
    frame: Annotated[
        int | None, typer.Option(min=0, help="Frame or slice, from 0.", show_default="the middle")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    prefix_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep here what the model makes of images, and answer more about them at once. "
            "It is patient data, for your eyes alone, of at most 2 GB.",
            show_default="nothing is kept",
        ),
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG",
            help="Draw where the key phrase of question and answer lies, found by modality-nano.",
            show_default="nothing is drawn",
        ),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG",
            help="Write exactly the picture that the model saw, at its resolution.",
            show_default="nothing is written",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Answer questions about one image."""
    import medmoe_edge
    from medmoe_edge.image.loading import load_image

    if explain:
        _check_explanation(explain, image, len(questions), force)
    if show:
        check_picture(show, force, image)
        if explain and show.resolve() == explain.resolve():
            raise InputError("--show and --explain name one file.", "Give each its own.")
    with render.working("Answering"):
        engine = medmoe_edge.load(
            model,
            runtime=runtime,
            device=device,
            memory_budget=memory_budget,
            drop_pages=drop_pages,
            prefix_cache=prefix_cache,
        )
        # read once where it is shown: what is asked about is what is written
        picture = load_image(image, frame=frame) if show else image
        answers = engine.ask_all(picture, questions, max_new_tokens=max_new_tokens, frame=frame)
        if show:
            write_picture(show, engine.seen(picture))
        found = _explain(explain, image, frame, answers[0]) if explain else None
    if as_json:
        told = {"explanation": found.to_json() | {"picture": str(explain)}} if found else {}
        seen = {"picture": str(show)} if show else {}
        render.as_json({"answers": [answer.to_json() for answer in answers], **told, **seen})
    else:
        render.show_answers(answers)
        if found and explain:
            render_contrastive.show_explanation(found, answers[0].modality, explain)
        if show:
            render.wrote("what the model saw", show)
    if found and found.reading.unfamiliar:
        render.show(render_contrastive.UNFAMILIAR, "yellow", stderr=True)
    if engine.proven:
        render.hint(engine.proven.hint)
    for notice in dict.fromkeys(answer.notice for answer in answers):
        render.show(notice, "yellow", stderr=True)


def _check_explanation(output: Path, image: Path, questions: int, force: bool) -> None:
    if questions > 1:
        raise InputError("--explain draws one question.", "Ask the others without it.")
    check_picture(output, force, image)


def _explain(output: Path, file: Path, frame: int | None, answer: "Answer") -> "Location":
    """Draw where the answer's key phrase lies."""
    from medmoe_edge.contrastive.engine import load_modality
    from medmoe_edge.contrastive.text import key_phrase
    from medmoe_edge.image.loading import load_image

    picture = load_image(file, frame=frame)
    phrase = key_phrase(answer.question, answer.text)
    found = load_modality("modality-nano").locate(picture, phrase)
    write_heat(output, picture, found)
    return found
