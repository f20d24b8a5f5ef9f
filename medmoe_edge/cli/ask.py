"""The verbs that ask a model; whatever only one of them needs is imported inside it."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmoe_edge.cli.common import (
    AllowRepetition,
    Device,
    DropPages,
    Force,
    Frame,
    Json,
    MemoryBudget,
    ModelOption,
    NewTokens,
    Runtime,
    complete_models,
    tell,
    verb,
)
from medmoe_edge.errors import InputError, needs
from medmoe_edge.pipeline import check_output
from medmoe_edge.render import console as render
from medmoe_edge.render import contrastive as render_contrastive

if TYPE_CHECKING:
    from medmoe_edge.contrastive.features import Location, Reading
    from medmoe_edge.engine.answer import Answer
    from medmoe_edge.image.pixels import Image


INDEX = Path("medmoe-index")  # where both verbs of the archive look for it: in the current folder

ImageFile = Annotated[
    Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG, TIFF, WebP, BMP, GIF, DICOM or NIfTI.")
]

Model = Annotated[
    str,
    typer.Option(help="A bundle, a checkpoint or modality-nano.", autocompletion=complete_models),
]

INDEX_HELP = "The index, in the current folder."


@verb("classify", "Ask", 'classify scan.png --labels "effusion,pneumonia,normal"')
def classify(
    image: ImageFile,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="LABELS", help="With commas between them.", show_default="those of --prompts"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON: each label with a list of texts, of which the best counts.",
            show_default="the labels themselves",
        ),
    ] = None,
    model: Model = "modality-nano",
    frame: Frame = None,
    as_json: Json = False,
) -> None:
    """Score labels that nobody trained it on; one of them is taken to be right.

    The scores add up to 100%: name what else it could be, such as "no finding".
    """
    from medmoe_edge.contrastive.engine import load_modality
    from medmoe_edge.contrastive.text import parse_labels, read_prompts

    texts = read_prompts(prompts) if prompts else None
    names = list(texts or {}) if labels is None else parse_labels(labels)
    if not names:
        raise InputError(
            "There are no labels.", 'Name two or more: --labels "pneumonia,no finding"'
        )
    with render.working("Comparing"):
        found = load_modality(model).classify(image, names, prompts=texts, frame=frame)
    tell(found, as_json, render_contrastive.show_classification)
    if as_json and len(names) == 1:
        render.show(render_contrastive.ONE_LABEL, "yellow", stderr=True)
    end(found.notice, found.reading)


@verb("locate", "Ask", 'locate scan.png "heart" -o heart.png')
def locate(
    image: ImageFile,
    phrase: Annotated[str, typer.Argument(metavar="PHRASE", help="What to look for.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PNG", help="The picture of the map.")
    ],
    model: Model = "modality-nano",
    frame: Frame = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show where in an image a phrase lies, as a map over it.

    What is not in the image has a likeliest place too: look at the similarity.
    """
    from medmoe_edge.contrastive.engine import load_modality
    from medmoe_edge.image.loading import load_image

    check_picture(output, force, image)
    with render.working("Looking"):
        engine = load_modality(model)
        picture = load_image(image, frame=frame)
        found = engine.locate(picture, phrase)
        write_heat(output, picture, found)
    show = partial(render_contrastive.show_location, picture=output)
    tell(found, as_json, show, picture=str(output))
    end(found.notice, found.reading)


@verb("index", "Ask", "index .")
def index(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images, also in folders.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="INDEX", help=INDEX_HELP)
    ] = INDEX,
    model: Model = "modality-nano",
    force: Annotated[
        bool, typer.Option("--force", help="Make it anew, whatever made what is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make or update the index of a folder of images, for retrieve.

    Only new and changed files are read. An index is patient data: keep it as you keep the images.
    """
    from medmoe_edge.contrastive.engine import load_modality

    with needs("archive"):
        from medmoe_edge.archive.indexing import index_folder
    with render.working("Reading") as report:
        made = index_folder(folder, output, load_modality(model), force=force, progress=report)
    tell(made, as_json, render_contrastive.show_indexing)
    end(made.notice)


@verb("retrieve", "Ask", 'retrieve "left pleural effusion"')
def retrieve(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A text, or an image file.")],
    index: Annotated[Path, typer.Option(metavar="INDEX", help=INDEX_HELP)] = INDEX,
    count: Annotated[int, typer.Option("-k", min=1, max=10_000, help="How many images.")] = 10,
    model: Model = "modality-nano",
    as_json: Json = False,
) -> None:
    """Find the images of an index that are most like a text or an image.

    Make the index first: medmoe-edge index FOLDER
    """
    from medmoe_edge.contrastive.engine import load_modality

    with needs("archive"):
        from medmoe_edge.archive.store import retrieve as find
    with render.working("Searching"):
        found = find(query, index, load_modality(model), count)
    tell(found, as_json, render_contrastive.show_retrieval)
    end(found.notice, found.reading)


def check_picture(output: Path, force: bool, source: Path) -> None:
    """Refuse a picture before the work that it would be the result of."""
    check_output(output, force, source)
    if output.suffix.lower() != ".png":
        raise InputError(f"{output} is not named as a PNG.", "Let its name end in .png.")


def write_heat(output: Path, picture: "Image", found: "Location") -> None:
    """Write the map over a picture, whole or not at all."""
    from medmoe_edge.atomic import atomic_file, writing
    from medmoe_edge.contrastive.heatmap import heat_picture

    with writing(output), atomic_file(output) as file:
        heat_picture(picture.pixels, found).save(file, "PNG")


def end(notice: str, reading: "Reading | None" = None) -> None:
    """On stderr, what must be known of every result."""
    if reading and reading.unfamiliar:
        render.show(render_contrastive.UNFAMILIAR, "yellow", stderr=True)
    render.show(notice, "yellow", stderr=True)


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
    frame: Frame = None,
    max_new_tokens: NewTokens = 32,
    choices: Annotated[
        str | None,
        typer.Option(
            metavar="CHOICES",
            help='Answer with the likeliest of these, with commas between them: "yes,no".',
            show_default="any answer",
        ),
    ] = None,
    allow_repetition: AllowRepetition = False,
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
            help="Draw where the key phrase of question and answer lies, found by modality-nano; "
            "nothing where the answer does not rest on the picture.",
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
    from medmoe_edge.atomic import atomic_file, writing
    from medmoe_edge.engine.answer import choices_of
    from medmoe_edge.engine.engine import load
    from medmoe_edge.image.inputs import as_image
    from medmoe_edge.image.loading import check_file, png_of
    from medmoe_edge.image.pixels import Image, black_picture, shown_name

    given = None if choices is None else choices_of(choices.split(","), "")
    if explain:
        if len(questions) > 1:
            raise InputError("--explain draws one question.", "Ask the others without it.")
        check_picture(explain, force, image)
    if show:
        check_picture(show, force, image)
        if explain and show.resolve() == explain.resolve():
            raise InputError("--show and --explain name one file.", "Give each its own.")
    piped = _standard_input() if str(image) == "-" else None
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
            allow_repetition=allow_repetition,
        )
        # read once where it is shown or piped: what is asked about is what is written
        picture: Path | Image = image
        if piped is not None or show or explain:
            picture = as_image(image if piped is None else piped, frame=frame)
        answers = engine.ask_all(
            picture, questions, max_new_tokens=max_new_tokens, choices=given, frame=frame
        )
        if show:
            seen = png_of(engine.seen(picture))
            with writing(show), atomic_file(show) as file:
                file.write(seen)
        found = None
        if explain and isinstance(picture, Image):
            (blind,) = engine.ask_all(
                black_picture(), questions, max_new_tokens=max_new_tokens, choices=given
            )
            found = _explain(explain, picture, answers[0], blind)
    if as_json:
        told: dict[str, object] = {"answers": [answer.to_json() for answer in answers]}
        if explain:
            told["explanation"] = found.to_json() | {"picture": str(explain)} if found else None
        if show:
            told["picture"] = str(show)
        if engine.memory:
            told["memory"] = engine.memory.to_json()
        render.as_json(told)
    else:
        render.show_answers(answers)
        if found and explain:
            render_contrastive.show_explanation(found, answers[0].modality, explain)
        if show:
            render.wrote("what the model saw", show)
    if found and found.reading.unfamiliar:
        render.show(render_contrastive.UNFAMILIAR, "yellow", stderr=True)
    if explain and not found:
        from medmoe_edge.contrastive.heatmap import NO_MAP

        render.show(NO_MAP, "yellow", stderr=True)
    if engine.proven:
        render.hint(engine.proven.hint)
    for notice in dict.fromkeys(answer.notice for answer in answers):
        render.show(notice, "yellow", stderr=True)


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(
            "There is no image on standard input.",
            'Pipe one in: medmoe-edge ask - "Is there effusion?" < scan.png',
        )
    return sys.stdin.buffer.read()


def _explain(
    output: Path, picture: "Image", answer: "Answer", blind: "Answer"
) -> "Location | None":
    """Draw where the answer's key phrase lies; nothing where it does not rest on the picture.

    `blind` is the answer to the same question about a black picture.
    """
    from medmoe_edge.contrastive.engine import load_modality
    from medmoe_edge.contrastive.heatmap import rests_on_picture
    from medmoe_edge.contrastive.text import key_phrase

    if not rests_on_picture(answer, blind):
        return None
    phrase = key_phrase(answer.question, answer.text)
    found = load_modality("modality-nano").locate(picture, phrase)
    write_heat(output, picture, found)
    return found
