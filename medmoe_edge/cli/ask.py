"""The verbs that ask a model; whatever only one of them needs is imported inside it."""

import sys
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

STANDARD_INPUT = "-"

if TYPE_CHECKING:
    from medmoe_edge.contrastive.features import Location
    from medmoe_edge.engine.answer import Answer
    from medmoe_edge.image.pixels import Image


@verb("ask", "Ask", 'ask scan.png "Is there effusion?"')
def ask(
    image: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGE",
            help="PNG, JPEG, TIFF, WebP, BMP, GIF, DICOM or NIfTI; - reads standard input.",
        ),
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
    from medmoe_edge.engine.engine import load
    from medmoe_edge.image.inputs import as_image
    from medmoe_edge.image.loading import check_file
    from medmoe_edge.image.pixels import Image, shown_name

    if explain:
        _check_explanation(explain, image, len(questions), force)
    if show:
        check_picture(show, force, image)
        if explain and show.resolve() == explain.resolve():
            raise InputError("--show and --explain name one file.", "Give each its own.")
    piped = _standard_input() if str(image) == STANDARD_INPUT else None
    if piped is None:  # before a model is loaded, which may take a minute
        check_file(image, shown_name(image))
    with render.working("Answering"):
        engine = load(
            model,
            runtime=runtime,
            device=device,
            memory_budget=memory_budget,
            drop_pages=drop_pages,
            prefix_cache=prefix_cache,
        )
        # read once where it is shown or piped: what is asked about is what is written
        picture: Path | Image = image
        if piped is not None or show or explain:
            picture = as_image(image if piped is None else piped, frame=frame)
        answers = engine.ask_all(picture, questions, max_new_tokens=max_new_tokens, frame=frame)
        if show:
            write_picture(show, engine.seen(picture))
        found = None
        if explain and isinstance(picture, Image):
            found = _explain(explain, picture, answers[0])
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


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(
            "There is no image on standard input.",
            'Pipe one in: medmoe-edge ask - "Is there effusion?" < scan.png',
        )
    return sys.stdin.buffer.read()


def _explain(output: Path, picture: "Image", answer: "Answer") -> "Location":
    """Draw where the answer's key phrase lies."""
    from medmoe_edge.contrastive.engine import load_modality
    from medmoe_edge.contrastive.text import key_phrase

    phrase = key_phrase(answer.question, answer.text)
    found = load_modality("modality-nano").locate(picture, phrase)
    write_heat(output, picture, found)
    return found
