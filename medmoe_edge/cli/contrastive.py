"""The verbs of MedMoE: labels, places and an archive; what each needs is imported inside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmoe_edge.cli.common import Force, Json, check_apart, check_output, verb
from medmoe_edge.cli.usage import complete_models
from medmoe_edge.errors import InputError, needs
from medmoe_edge.render import console as render
from medmoe_edge.render import contrastive as render_contrastive

if TYPE_CHECKING:
    from medmoe_edge.contrastive.features import Location, Reading
    from medmoe_edge.image.pixels import Image, Pixels

INDEX = Path("medmoe-index")  # where both verbs of the archive look for it: in the current folder

ImageFile = Annotated[
    Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG, TIFF, WebP, BMP, GIF, DICOM or NIfTI.")
]
Model = Annotated[
    str,
    typer.Option(help="A bundle, a checkpoint or modality-nano.", autocompletion=complete_models),
]
Frame = Annotated[
    int | None, typer.Option(min=0, help="Frame or slice, from 0.", show_default="the middle")
]
Index = Annotated[Path, typer.Option(metavar="INDEX", help="The index, in the current folder.")]


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
    if as_json:
        render.as_json(found.to_json())
        if len(names) == 1:
            render.show(render_contrastive.ONE_LABEL, "yellow", stderr=True)
    else:
        render_contrastive.show_classification(found)
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
    if as_json:
        render.as_json(found.to_json() | {"picture": str(output)})
    else:
        render_contrastive.show_location(found, output)
    end(found.notice, found.reading)


@verb("index", "Ask", "index .")
def index(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images, also in folders.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="INDEX", help="The index, in the current folder."),
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
    if as_json:
        render.as_json(made.to_json())
    else:
        render_contrastive.show_indexing(made)
    end(made.notice)


@verb("retrieve", "Ask", 'retrieve "left pleural effusion"')
def retrieve(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A text, or an image file.")],
    index: Index = INDEX,
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
    if as_json:
        render.as_json(found.to_json())
    else:
        render_contrastive.show_retrieval(found)
    end(found.notice, found.reading)


def check_picture(output: Path, force: bool, source: Path) -> None:
    """Refuse a picture before the work that it would be the result of."""
    check_output(output, force)
    check_apart(output, source)
    if output.suffix.lower() != ".png":
        raise InputError(f"{output} is not named as a PNG.", "Let its name end in .png.")


def write_heat(output: Path, picture: "Image", found: "Location") -> None:
    """Write the map over a picture, whole or not at all."""
    from medmoe_edge.atomic import atomic_file
    from medmoe_edge.contrastive.heatmap import heat_picture

    with atomic_file(output) as file:
        heat_picture(picture.pixels, found).save(file, "PNG")


def write_picture(output: Path, pixels: "Pixels") -> None:
    """Write a picture as PNG, whole or not at all."""
    from medmoe_edge.atomic import atomic_file
    from medmoe_edge.image.loading import png_of

    with atomic_file(output) as file:
        file.write(png_of(pixels))


def end(notice: str, reading: "Reading | None" = None) -> None:
    """On stderr, what must be known of every result."""
    if reading and reading.unfamiliar:
        render.show(render_contrastive.UNFAMILIAR, "yellow", stderr=True)
    render.show(notice, "yellow", stderr=True)
