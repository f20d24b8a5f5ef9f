"""A dataset folder: what `train`, `eval` and `calibrate` read, made of one or more sets.

    dataset.json                    which sets it holds
    train.jsonl val.jsonl test.jsonl    questions
    labels.jsonl                    what is known of images, each with its split
    images/SET/...                  the pictures of each set

A set is added to what is there already, or replaces itself; other files stay. No picture and no
patient is in two splits: what is known to be held out for a test is not learned from.

Labelled images (`data labels`) come from a folder, whose sub-folders say what is known
(`ct/normal/1.png`, `train/ct/chest/normal/1.png`), or from a table, a CSV file with a column
`image` and columns for what is known of it.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image as Picture

from medmoe_edge.atomic import atomic_folder, carry_over, file_sha256
from medmoe_edge.data.datasets import (
    LABELS_FILE,
    QUESTION_FILES,
    SPLITS,
    Record,
    Split,
    UniqueIds,
    files_below,
    json_lines,
    modality_name,
    parse_json,
    read_text,
    safe_name,
    set_name,
    split_evenly,
)
from medmoe_edge.errors import DataError, ImageError, InputError, Told

logger = logging.getLogger(__name__)
SUMMARY = "dataset.json"
_ORDER: tuple[Split, ...] = ("train", "val", "test")  # a later one wins over an earlier
_FILES = {split: QUESTION_FILES[split][0] for split in _ORDER}
_WRITTEN = (SUMMARY, LABELS_FILE, *_FILES.values())
Row = dict[str, Any]


@dataclass(frozen=True)
class Prepared(Told):
    """What a folder holds after a set was added.

    Attributes:
        folder: Where it is.
        questions: Of the set, for each split that has any.
        labels: Labelled images of the set, for each split that has any.
        images: Pictures of the set.
        left_out: Questions of any set that were left out of a split, because their picture or
            patient is held out in another.
        modalities: How many labelled images of the set are of each modality.
    """

    folder: Path
    questions: Mapping[Split, int]
    labels: Mapping[Split, int]
    images: int
    left_out: int
    modalities: Mapping[str, int]


@dataclass
class Addition:
    """A set that is being added to a folder that nobody else sees yet.

    Of the pictures, `sums` are the SHA-256 by their paths in the folder; by these hashes `held` are
    the places in `_ORDER` where other sets hold them, `said` their modalities, and who says so.
    """

    name: str
    folder: Path
    source: Path
    sums: dict[str, str] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    said: dict[str, tuple[str, str]] = field(default_factory=dict)
    questions: dict[Split, list[Row]] = field(
        default_factory=lambda: {split: [] for split in _ORDER}
    )
    labels: list[Row] = field(default_factory=list)
    copied: set[str] = field(default_factory=set)
    _unique: UniqueIds = field(default_factory=UniqueIds)

    def ask(self, split: Split, *, id: str, **row: str | None) -> None:
        """Add a question; what is None is left out."""
        self.questions[split].append({"id": self._unique(id)} | _known(row))
        self._agree(row, f"question {id!r}")

    def label(self, where: str, **row: str | None) -> None:
        """Add what is known of an image; `where` is the place that says it."""
        self.labels.append(_known(row))
        self._agree(row, where)

    def know(self, row: "_Row", digest: str) -> None:
        """Take note of what another set says of a picture, whose path and SHA-256 are known."""
        self.sums[row.data["image"]] = digest
        self.held[digest] = max(row.held, self.held.get(digest, 0))
        if modality := row.data.get("modality"):
            self.said.setdefault(digest, (modality_name(str(modality)), repr(row.data["image"])))

    def splits(
        self, groups: Mapping[Hashable, Hashable], pictures: Iterable[tuple[Hashable, str]]
    ) -> dict[Hashable, Split]:
        """As of `split_evenly`, but where another set holds a picture (by SHA-256) of a group."""
        known: dict[Hashable, int] = {}
        for group, digest in pictures:
            if digest in self.held:
                known[group] = max(self.held[digest], known.get(group, 0))
        return split_evenly(groups) | {group: _ORDER[place] for group, place in known.items()}

    def _agree(self, row: Mapping[str, str | None], where: str) -> None:
        """Raise `DataError` for a picture that is of another modality elsewhere."""
        digest, named = self.sums.get(row["image"] or ""), row.get("modality")
        if digest is None or named is None:
            return
        modality = modality_name(named)
        said, elsewhere = self.said.setdefault(digest, (modality, where))
        if said != modality:
            raise DataError(
                f"{self.source}: the picture of {where} is labelled {modality}, "
                f"and {said} in {elsewhere}.",
                "A picture is of one modality: keep the right label.",
            )

    def write(self, name: str, content: bytes) -> str:
        """Write a picture of the set once; gives its path in the folder back."""
        path = self.folder / "images" / self.name / name
        inside = path.relative_to(self.folder).as_posix()
        if name not in self.copied:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.copied.add(name)
            self.sums[inside] = hashlib.sha256(content).hexdigest()
        return inside


@contextlib.contextmanager
def adding(
    name: str, source: Path, out: Path, *, force: bool = False, as_published: bool = False
) -> Iterator[tuple[Addition, list[Prepared]]]:
    """Add the set `name` from `source` to the dataset folder `out`, which is replaced as a whole.

    Whatever else lies in the folder stays in it; of the set itself, what is in images/NAME goes.

    Yields the addition, and a list that holds the result once the block has ended well. With
    `as_published` the set's own splits stay as they are, also where they share pictures.

    Raises `InputError` for a set that is there already without `force`, and for a folder that is
    no dataset folder; `DataError` where nothing was added; `ResourceError` if the disk fails.
    """
    out = out.resolve()
    sets = _sets(out)
    rows = list(_rows(out)) if (out / SUMMARY).is_file() else []
    own = out / "images" / name
    if not force and (name in sets or own.exists() or any(row.set == name for row in rows)):
        raise InputError(
            f"{out} holds the set {name!r} already.", "Add --force to replace it in there."
        )
    results: list[Prepared] = []
    with atomic_folder(out, force=True, marker=SUMMARY) as folder:
        addition = Addition(name, folder, source)
        for row in (rows := [row for row in rows if row.set != name]):
            image = row.data["image"]
            addition.know(row, addition.sums.get(image) or file_sha256(out / image))
        yield addition, results
        if out.exists():
            carry_over(out, folder, without={own, *(out / file for file in _WRITTEN)})
        for split, asked in addition.questions.items():
            rows += [_Row(name, split, data) for data in asked]
        rows += [_Row(name, None, data) for data in addition.labels]
        if not any(row.set == name for row in rows):
            raise DataError("No question and no label was found.", "Check what was given.")
        published = {each for each, told in sets.items() if told.get("as_published")} - {name}
        if as_published:
            published.add(name)
        rows, left_out = _apart(rows, addition.sums, published)
        _write(folder, rows)
        counts = {each: _counts(rows, each) for each in sorted({*sets, name})}
        results.append(Prepared(out, left_out=left_out, **counts[name]))
        summary = {
            each: told | {"as_published": each in published} for each, told in counts.items()
        }
        text = json.dumps({"sets": summary}, indent=1)
        (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Row:
    """A line of one of the files; `split` is None for a label, whose line says it."""

    set: str
    split: Split | None
    data: Row

    @property
    def held(self) -> int:
        """The place of its split in `_ORDER`."""
        return _ORDER.index(self.split or self.data["split"])


_Rows = list[_Row]


def _known(row: Mapping[str, str | None]) -> Row:
    return {key: value for key, value in row.items() if value is not None}


def _sets(out: Path) -> dict[str, Any]:
    """The sets that a folder holds; none where it is no dataset folder."""
    file = out / SUMMARY
    if not file.is_file():
        return {}
    data = parse_json(read_text(file), str(file))
    sets = data.get("sets") if isinstance(data, dict) else None
    if not isinstance(sets, dict) or not all(isinstance(told, dict) for told in sets.values()):
        raise DataError(f"{file} is of an earlier version.", "Choose another folder.")
    return sets


def _rows(folder: Path) -> Iterator[_Row]:
    names: dict[str, Split | None] = {name: split for split, name in _FILES.items()}
    for name, split in (names | {LABELS_FILE: None}).items():
        file = folder / name
        lines = json_lines(read_text(file), file) if file.exists() else ()
        for number, record in enumerate(lines, start=1):
            set_of, image = _place(record, folder)
            data = dict(record.value) | {"image": image}
            if split is None:
                record.require("modality", form="labels")
                given = record.choice("split", SPLITS) if record.optional("split") else "train"
                data |= {"modality": record.text("modality"), "split": given}
            else:
                record.require("question", "answer", form="questions")
                data |= {"id": record.optional("id") or str(number)}
            yield _Row(set_of, split, data)


def _place(record: Record, folder: Path) -> tuple[str, str]:
    """The set that a line's picture is of, and its path in the folder."""
    record.require("image", form="questions")
    image = safe_name(record.text("image"), record.where, "Correct the line.")
    parts = image.split("/")
    if len(parts) < 3 or parts[0] != "images" or not (folder / image).is_file():
        raise DataError(
            f"{record.where}: 'image' is no picture in images/SET/.",
            "Correct the line, or take it out and add the picture with: medmoe-edge data",
        )
    return parts[1], image


def _apart(rows: _Rows, sums: Mapping[str, str], published: set[str]) -> tuple[_Rows, int]:
    """The rows without those that a held-out split forbids, and how many questions went.

    A picture is known by its bytes, a patient by what the set calls them. Labels move to the split
    that holds their picture or patient; questions of another split are left out.
    """

    def keys(row: _Row) -> Iterator[Hashable]:
        yield sums[row.data["image"]]
        if row.data.get("patient") is not None:
            yield row.set, str(row.data["patient"])

    strongest: Counter[Hashable] = Counter()
    changed = True
    while changed:  # a patient ties pictures together, and a picture patients
        changed = False
        for row in rows:
            held = max(row.held, *(strongest[key] for key in keys(row)))
            for key in keys(row):
                if strongest[key] < held:
                    strongest[key], changed = held, True
    kept, left_out = [], 0
    for row in rows:
        held = strongest[next(keys(row))]
        if row.split is None:
            kept.append(_Row(row.set, None, row.data | {"split": _ORDER[held]}))
        elif row.held == held or row.set in published:
            kept.append(row)
        else:
            left_out += 1
    return kept, left_out


def _write(folder: Path, rows: Iterable[_Row]) -> None:
    """The question files and the labels; ids that two sets share are told apart."""
    unique = UniqueIds()
    lines: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        data = row.data
        if row.split is not None:
            data = data | {"id": unique(data["id"])}
        name = LABELS_FILE if row.split is None else _FILES[row.split]
        lines[name].append(json.dumps(data, ensure_ascii=False))
    for name, text in lines.items():
        (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")


def _counts(rows: Iterable[_Row], name: str) -> dict[str, Any]:
    mine = [row for row in rows if row.set == name]
    questions = Counter(row.split for row in mine if row.split)
    labels = [row.data for row in mine if row.split is None]
    return {
        "questions": {split: questions[split] for split in _ORDER if questions[split]},
        "labels": dict(Counter(data["split"] for data in labels)),
        "images": len({row.data["image"] for row in mine}),
        "modalities": dict(sorted(Counter(data["modality"] for data in labels).items())),
    }


Header = Callable[[Path], tuple[bool, str | None, str | None]]
"""Whether a DICOM file is an image, its modality, and a name for its patient that tells nothing."""

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
SUFFIXES = (*_RASTER, *_DICOM, ".nii", ".nii.gz")


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
    where: str  # as errors name it
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
    What cannot be opened, or is DICOM without an image, is left out, with a warning.

    Raises `DataError` for pictures of unknown modality, a bad table and where there is none,
    `InputError` as `adding`.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist.", "Check the path.")
    if unknown := next((each for each in options.levels if each not in LEVELS), None):
        raise InputError(f"There is no level {unknown!r}.", f"Use: {', '.join(LEVELS)}.")
    found = list(_in_folder(source, options) if source.is_dir() else _in_table(source))
    read = [_completed(each, options, header) for each in found if _opens(each.file)]
    found = [each for each in read if each is not None]
    if left := len(read) - len(found):
        logger.warning("%d DICOM objects without an image (reports, plans ...) are left out.", left)
    if not found:
        raise DataError(f"{source} holds no picture that can be read.", "Check the folder or file.")
    unknown_images = [each for each in found if each.modality is None]
    if unknown_images:
        raise DataError(
            f"{source}: of {len(unknown_images)} images the modality is not known, "
            f"that of {unknown_images[0].where} among them.",
            "Name sub-folders or a column after it, or add --modality.",
        )
    name = set_name(options.name or source.stem)
    with adding(name, source, out, force=force) as (addition, prepared):
        for each in _split(found, addition):
            addition.label(
                each.where,
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
    for file in files_below(folder):
        if not (file.name.lower().endswith(SUFFIXES) or _is_dicom(file)):
            continue
        relative = file.relative_to(folder)
        levels = list(relative.parts[:-1])
        given: dict[str, str] = {}
        if "split" not in options.levels:
            place = next((n for n, part in enumerate(levels) if part.lower() in SPLITS), None)
            if place is not None:
                given["split"] = levels.pop(place)
        # what sub-folders mean where nobody said so; what holds for all images has no level
        usual = _BY_DEPTH.get(min(len(levels), 3), ())
        if options.modality is not None:
            usual = {0: (), 1: ("finding",)}.get(len(levels), ("body", "finding"))
        given |= dict(zip(options.levels or usual, levels, strict=False))
        given.pop("-", None)
        name = safe_name(relative.as_posix(), str(folder))
        yield _Found(file, name, repr(name), **given)


def _is_dicom(file: Path) -> bool:
    """By its suffix or its mark: archives name their files as they like."""
    if file.name.lower().endswith(_DICOM):
        return True
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _in_table(file: Path) -> Iterator[_Found]:
    text = read_text(file)
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = _columns(reader.fieldnames or (), file)
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        what = f"{file}, line {reader.reader.line_num}: this is no CSV ({error})."
        raise DataError(what, "Look for a quotation mark that is not closed.") from error
    for number, row in rows:
        values = {key: (row[column] or "").strip() for key, column in columns.items()}
        if any(row.get(None) or ()):  # else a label would end before its first delimiter
            hint = f"Put what has a {delimiter!r} in it between quotes."
            raise DataError(f"{file}, line {number} has more cells than columns.", hint)
        if not values["image"]:
            raise DataError(f"{file}, line {number} names no image.", "Fill it in.")
        path = file.parent / PurePosixPath(values.pop("image").replace("\\", "/"))
        names = (path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES))
        image = next((each for each in names if each.is_file()), None)
        if image is None:
            raise DataError(f"{file}, line {number}: there is no such image.", "Check the path.")
        known = {key: value for key, value in values.items() if value}
        mark = hashlib.sha256(str(image.resolve()).encode()).hexdigest()[:8]
        yield _Found(image, f"{mark}-{image.name}", f"line {number}", **known)


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


def _opens(file: Path) -> bool:
    if not file.name.lower().endswith(_RASTER):
        return True
    try:
        with Picture.open(file):
            return True
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError):
        logger.warning("A picture cannot be opened and is left out (%s).", file.suffix.lower())
        return False


def _completed(found: _Found, options: LabelOptions, header: Header) -> _Found | None:
    """With what holds for all, and what DICOM says of itself; None where that is no image."""
    modality, patient = found.modality, found.patient
    if _is_dicom(found.file):
        with contextlib.suppress(ImageError):  # whoever reads the picture will hear why
            holds, said, whose = header(found.file)
            if not holds:
                return None
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


def _split(found: list[_Found], addition: Addition) -> list[_Found]:
    """With a split for each: one patient, or one picture, is one group."""
    sums = [file_sha256(each.file) for each in found]
    groups = [each.patient or digest for each, digest in zip(found, sums, strict=True)]
    strata: dict[Hashable, Hashable] = {}
    for each, group in zip(found, groups, strict=True):
        if each.split is None:
            strata.setdefault(group, (each.modality, each.finding))
    splits = addition.splits(strata, zip(groups, sums, strict=True))
    sizes = Counter(each.split for each in found)
    if sizes[None] not in (0, len(found)):
        logger.warning("%d images name no split and were given one.", sizes[None])
    return [
        each if each.split else replace(each, split=splits[group])
        for each, group in zip(found, groups, strict=True)
    ]
