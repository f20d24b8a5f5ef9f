"""`data labels`: a folder of pictures or a table of them -> labelled images of a dataset folder.

A folder's sub-folders say what is known: `ct/normal/1.png`, or `train/ct/chest/normal/1.png`. A
table is a CSV file with a column `image`, and columns for what is known of it.
"""

import contextlib
import csv
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image as Picture

from medmoe_edge.data.datasets import SPLITS, Split, modality_name, read_text
from medmoe_edge.data.download import safe_name
from medmoe_edge.data.folder import Prepared, adding, split_evenly
from medmoe_edge.data.prepare import set_name
from medmoe_edge.errors import DataError, ImageError, InputError

Header = Callable[[Path], tuple[str | None, str | None]]
"""What a DICOM file says: its modality, and a name for its patient that tells nothing of them."""

LEVELS = ("split", "modality", "body", "finding", "patient", "-")
_BY_DEPTH = {1: ("modality",), 2: ("modality", "finding"), 3: ("modality", "body", "finding")}
_COLUMNS = {  # what else a column is called
    "image": ("file", "filename", "file_name", "path", "image_path", "image_file"),
    "modality": ("type",),
    "body": ("body_part", "bodypart", "organ", "region", "site"),
    "finding": ("label", "class", "diagnosis", "findings", "disease"),
    "split": ("set", "subset", "partition", "fold"),
    "patient": ("patient_id", "patientid", "subject", "subject_id", "case"),
}
_RASTER = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif")
_DICOM = (".dcm", ".dicom")
_SUFFIXES = (*_RASTER, *_DICOM, ".nii", ".nii.gz")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelOptions:
    """What a folder or a table does not say itself.

    Attributes:
        name: The set's; by default the folder's or table's.
        modality: Of all images.
        body: Of all images.
        finding: Of all images.
        split: Of all images; by default a tenth each is held out to validate and to test on.
        levels: What the sub-folders mean, outermost first, of `LEVELS`; by default the modality,
            then the finding, with the body between them where there are three. A level with the
            names of splits is known by them.
    """

    name: str | None = None
    modality: str | None = None
    body: str | None = None
    finding: str | None = None
    split: Split | None = None
    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A picture and what is known of it so far."""

    file: Path
    name: str
    modality: str | None = None
    body: str | None = None
    finding: str | None = None
    split: str | None = None
    patient: str | None = None


def add_labels(
    source: Path, out: Path, options: LabelOptions, *, header: Header, force: bool = False
) -> Prepared:
    """Add the pictures of a folder or of a table to the dataset folder `out`; see `folder.adding`.

    `header` reads DICOM files, whose modality and patient count where nothing else was said.
    Pictures that cannot be opened are left out, with a warning.

    Raises `DataError` for pictures of unknown modality, a bad table and where there is none,
    `InputError` as `adding`.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist.", "Check the path.")
    if unknown := next((each for each in options.levels if each not in LEVELS), None):
        raise InputError(f"There is no level {unknown!r}.", f"Use: {', '.join(LEVELS)}.")
    found = list(_in_folder(source, options) if source.is_dir() else _in_table(source))
    found = [_completed(each, options, header) for each in found if _opens(each.file)]
    if not found:
        raise DataError(f"{source} holds no picture that can be read.", "Check the folder or file.")
    unknown_images = [each for each in found if each.modality is None]
    if unknown_images:
        raise DataError(
            f"{source}: of {len(unknown_images)} images the modality is not known, "
            f"image {found.index(unknown_images[0]) + 1} among them.",
            "Name sub-folders or a column after it, or add --modality.",
        )
    name = set_name(options.name or source.stem)
    found = _split(found)
    with adding(name, out, force=force) as (addition, prepared):
        for each in found:
            addition.label(
                image=addition.write(each.name, each.file.read_bytes()),
                modality=modality_name(each.modality or ""),
                body=each.body or "",
                finding=each.finding or "",
                source=name,
                split=each.split,
                patient=each.patient,
            )
    return prepared[0]


def _in_folder(folder: Path, options: LabelOptions) -> Iterator[_Found]:
    for file in _pictures(folder):
        relative = file.relative_to(folder)
        levels = list(relative.parts[:-1])
        given: dict[str, str] = {}
        if "split" not in options.levels:
            place = next((n for n, part in enumerate(levels) if part.lower() in SPLITS), None)
            if place is not None:
                given["split"] = levels.pop(place)
        named = options.levels or _meaning(len(levels), options)
        given |= dict(zip(named, levels, strict=False))
        given.pop("-", None)
        yield _Found(file, safe_name(relative.as_posix(), str(folder)), **given)


def _meaning(depth: int, options: LabelOptions) -> tuple[str, ...]:
    """What sub-folders mean where nobody said so; what holds for all images has no level."""
    if options.modality is None:
        return _BY_DEPTH.get(min(depth, 3), ())
    return {0: (), 1: ("finding",)}.get(depth, ("body", "finding"))


def _pictures(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(parent, name)
            if name.startswith(".") or not file.is_file():  # a pipe would never end
                continue
            if name.lower().endswith(_SUFFIXES) or ("." not in name and _is_dicom(file)):
                yield file


def _is_dicom(file: Path) -> bool:
    """By its suffix or its mark: archives name their files as they like."""
    if file.name.lower().endswith(_DICOM):
        return True
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _in_table(file: Path) -> Iterator[_Found]:
    text = read_text(file)
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    columns = _columns(reader.fieldnames or (), file)
    for number, row in enumerate(reader, start=2):
        values = {key: (row[column] or "").strip() for key, column in columns.items()}
        if not values["image"]:
            raise DataError(f"{file}, line {number} names no image.", "Fill it in.")
        image = _beside(file, values.pop("image"))
        if image is None:
            raise DataError(f"{file}, line {number}: there is no such image.", "Check the path.")
        known = {key: value for key, value in values.items() if value}
        mark = hashlib.sha256(str(image.resolve()).encode()).hexdigest()[:8]
        yield _Found(image, f"{mark}-{image.name}", **known)


def _columns(names: Sequence[str], file: Path) -> dict[str, str]:
    """Which column holds which key; raises `DataError` where none holds the image."""
    lower = {name.strip().lower().replace(" ", "_"): name for name in names if name}
    found = {
        key: lower[each]
        for key, others in _COLUMNS.items()
        if (each := next((n for n in (key, *others) if n in lower), None))
    }
    if "image" not in found:
        raise DataError(
            f"{file} has no column 'image'.",
            "Give a CSV file with a first line of names: image, modality, body, finding.",
        )
    return found


def _beside(table: Path, name: str) -> Path | None:
    """The image that a table names from its own folder, also without its suffix."""
    path = table.parent / PurePosixPath(name.replace("\\", "/"))
    names = (path, *(path.with_name(path.name + suffix) for suffix in _SUFFIXES))
    return next((each for each in names if each.is_file()), None)


def _opens(file: Path) -> bool:
    if not file.name.lower().endswith(_RASTER):
        return True
    try:
        with Picture.open(file):
            return True
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError):
        logger.warning("A picture cannot be opened and is left out (%s).", file.suffix.lower())
        return False


def _completed(found: _Found, options: LabelOptions, header: Header) -> _Found:
    """With what holds for all images, and what a DICOM file says of itself."""
    modality, patient = found.modality, found.patient
    if not (modality and patient) and _is_dicom(found.file):
        with contextlib.suppress(ImageError):  # whoever reads the picture will hear why
            said, whose = header(found.file)
            modality, patient = modality or said, patient or whose
    split: str | None = options.split
    if split is None and found.split:
        if found.split.lower() not in SPLITS:
            raise DataError(
                f"There is no split {found.split!r}.", "Use train, val or test in its column."
            )
        split = SPLITS[found.split.lower()]
    return replace(
        found,
        modality=options.modality or modality,
        body=options.body or found.body,
        finding=options.finding or found.finding,
        split=split,
        patient=patient,
    )


def _split(found: list[_Found]) -> list[_Found]:
    """With a split for each: one patient, or one picture, is one group."""
    groups = [each.patient or hashlib.sha256(each.file.read_bytes()).hexdigest() for each in found]
    strata: dict[Hashable, Hashable] = {}
    for each, group in zip(found, groups, strict=True):
        if each.split is None:
            strata.setdefault(group, (each.modality, each.finding))
    splits = split_evenly(strata)
    sizes = Counter(each.split for each in found)
    if sizes[None] not in (0, len(found)):
        logger.warning("%d images name no split and were given one.", sizes[None])
    return [
        each if each.split else replace(each, split=splits[group])
        for each, group in zip(found, groups, strict=True)
    ]
