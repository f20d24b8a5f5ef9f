"""What people have -> a dataset folder: official downloads, lists of questions, labelled images.

SLAKE (Liu et al. 2021): `imgs/xmlabN/source.jpg`, train.json, validate.json, test.json; English
and Chinese. VQA-RAD (Lau et al. 2018): "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder/".
PathVQA (He et al. 2020): its own questions are pickles, which are never opened; the same lists
saved as JSON are read. Of all three the parquet files of Hugging Face are read (image, question,
answer; further columns where they are).

A download is a folder, a zip or a folder with zips in it, seen as one list of files. Names come
from strangers: nothing is extracted, and a file is read only when asked for by name; whoever writes
it elsewhere first passes the name through `safe_name`.
"""

import hashlib
import logging
import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from medmoe_edge.atomic import file_sha256
from medmoe_edge.data.datasets import (
    ANSWER_TYPES,
    SPLITS,
    Record,
    Split,
    answer_type,
    modality_name,
    parse_json,
    read_examples,
    safe_name,
    set_name,
)
from medmoe_edge.data.folder import Addition, Prepared, adding
from medmoe_edge.errors import DataError, InputError, needs, of_machine

Dataset = Literal["slake", "vqa-rad", "pathvqa"]

LANGUAGES: dict[Dataset, tuple[str, ...]] = {
    "slake": ("en", "zh"),
    "vqa-rad": ("en",),
    "pathvqa": ("en",),
}
_MODALITIES = {"ct": "ct", "mri": "mri", "x-ray": "xray"}
_ORGANS = {"head": "head", "chest": "chest", "abd": "abdomen"}
_SPLIT_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validate", "validation", "val"),
    "test": ("test",),
}

logger = logging.getLogger(__name__)
_MAX_FILES = 100_000  # PathVQA has 5,000 images; far more means the wrong folder was given
_MAX_BYTES = 1 << 28  # of one file; the largest that official downloads need has some megabytes


class Download:
    """Context manager over `source`; hidden files and Mac resource forks are passed over.

    Raises `DataError` where `source` is neither folder nor zip, is damaged or is far too large.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._open = ExitStack()
        self._files: dict[str, Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        self._by_last_part: dict[str, list[str]] = defaultdict(list)

    def __enter__(self) -> Self:
        if self.source.is_dir():
            for parent, _, names in os.walk(self.source):
                for path in (Path(parent, name) for name in names):
                    if not path.is_file():  # a device or a pipe would never end
                        continue
                    if path.parent == self.source and path.suffix.lower() == ".zip":
                        self._add_zip(path)
                    else:
                        self._add(path.relative_to(self.source).as_posix(), path)
        elif self.source.is_file():
            self._add_zip(self.source)
        else:
            raise DataError(f"{self.source} does not exist.", "Check the path.")
        for name in sorted(self._files, key=lambda name: (name.count("/"), name)):
            self._by_last_part[PurePosixPath(name).name].append(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def names(self, suffix: str) -> list[str]:
        """All files whose name ends with `suffix`, sorted."""
        return sorted(name for name in self._files if name.endswith(suffix))

    def find(self, name: str) -> str | None:
        """The file with this relative name in the outermost folder that has one."""
        candidates = self._by_last_part.get(PurePosixPath(name).name, [])
        return next((one for one in candidates if f"/{one}".endswith(f"/{name}")), None)

    def read(self, name: str) -> bytes:
        """The content of a file from `names` or `find`."""
        entry = self._files[name]
        where = f"{self.source}: {name}"
        size = entry.stat().st_size if isinstance(entry, Path) else entry[1].file_size
        if size > _MAX_BYTES:
            raise DataError(f"{where} is too large.", "Check that this is the official download.")
        try:
            return entry.read_bytes() if isinstance(entry, Path) else entry[0].read(entry[1])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            damaged = DataError(f"{where} is damaged.", "Download it again.")
            raise (of_machine(where, error) or damaged) from error
        except (RuntimeError, NotImplementedError) as error:  # encrypted, exotic compression
            raise DataError(f"{where} cannot be unpacked.", "Unpack the zip yourself.") from error

    def path(self, name: str) -> Path:
        """Where a file lies on the disk; one inside a zip raises `DataError`."""
        entry = self._files[name]
        if not isinstance(entry, Path):
            raise DataError(f"{self.source}: {name} is inside a zip.", "Unpack the zip first.")
        return entry

    def _add_zip(self, path: Path) -> None:
        try:
            archive = self._open.enter_context(zipfile.ZipFile(path))
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a readable zip.", "Give the downloaded folder or zip, complete."
            ) from error
        for member in archive.infolist():
            if not member.is_dir():
                self._add(member.filename, (archive, member))

    def _add(self, name: str, entry: Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]) -> None:
        if any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
            return
        self._files[name] = entry
        if len(self._files) > _MAX_FILES:
            raise DataError(
                f"{self.source} holds more than {_MAX_FILES} files.", "Give the dataset's folder."
            )


def prepare(
    dataset: Dataset,
    source: Path,
    out: Path,
    *,
    languages: Sequence[str] = ("en",),
    as_published: bool = False,
    force: bool = False,
) -> Prepared:
    """Add a downloaded folder or zip to the dataset folder `out`; see `folder.adding`.

    Splits are the official ones; images are copied byte for byte. VQA-RAD has no val, and its
    train and test share images: what is asked about those in train is left out, unless its splits
    are kept `as_published`. `out` changes only when all is complete.

    Raises `DataError` for a download that is incomplete, damaged or not what `dataset` says,
    `InputError` for a language that it does not have and as `adding`, `MissingDependencyError` for
    parquet files without pyarrow, `ResourceError` if the disk fails.
    """
    for language in languages:
        if language not in LANGUAGES[dataset]:
            raise InputError(
                f"{dataset} has no questions in {language!r}.",
                f"It has: {', '.join(LANGUAGES[dataset])}.",
            )
    with (
        Download(source) as download,
        adding(dataset.replace("-", "_"), source, out, force=force, as_published=as_published) as (
            addition,
            prepared,
        ),
    ):
        writer = _Writer(addition, download, tuple(languages))
        if parquet := download.names(".parquet"):
            for file in parquet:
                _parquet(file, download, writer, pathology=dataset == "pathvqa")
        else:
            _READERS[dataset](download, writer)
        writer.finish()
    return prepared[0]


def add_questions(
    source: Path,
    out: Path,
    *,
    name: str | None = None,
    split: Split | None = None,
    force: bool = False,
) -> Prepared:
    """Add a list of questions, in either form of `read_examples`, with its images.

    Without `split`, a tenth of the patients (or pictures, where none is named) each is held out to
    validate and to test on; pictures that the folder holds already keep their split. `name` is the
    set's, by default the file's. Raises `DataError` as `read_examples` does.
    """
    examples = read_examples(source, check_images=True)
    images = {example.image for example in examples}
    sums = {image: file_sha256(image) for image in images}
    groups = {example.id: example.patient or sums[example.image] for example in examples}
    name = set_name(name or source.stem)
    with adding(name, source, out, force=force) as (addition, prepared):
        pairs = [(groups[example.id], sums[example.image]) for example in examples]
        splits = addition.splits(dict.fromkeys(groups.values()), pairs)
        for example in examples:
            mark = sums[example.image]
            image = f"{mark[:16]}{''.join(example.image.suffixes[-2:])}"
            addition.ask(
                split or splits[groups[example.id]],
                id=example.id,
                image=addition.write(image, example.image.read_bytes()),
                question=example.question,
                answer=example.answer,
                answer_type=example.answer_type,
                modality=example.modality,
                body=example.body,
                content=example.content,
                source=name if example.source == source.stem else example.source,
                patient=example.patient,
            )
    return prepared[0]


class _Writer:
    """Copies the questions and images of a download into a set."""

    def __init__(self, addition: Addition, download: Download, languages: tuple[str, ...]) -> None:
        self.addition, self.languages = addition, languages
        self._download = download
        self._missing: set[str] = set()

    def copy(self, name: str, member: str) -> str:
        """Copy an image of the download, once; gives its path in the folder back."""
        found = self._download.find(member)
        if found is None:
            self._missing.add(name)
            return f"images/{self.addition.name}/{name}"
        content = b"" if name in self.addition.copied else self._download.read(found)
        return self.addition.write(name, content)

    def finish(self) -> None:
        """Raise `DataError` where images are missing, or there is no question at all."""
        source = self._download.source
        if self._missing:
            raise DataError(
                f"{source} lacks {len(self._missing)} images that its questions are about, "
                f"{min(self._missing)} among them.",
                "Download the images too, or again.",
            )
        if not any(self.addition.questions.values()):
            raise DataError(f"{source} holds no questions.", "Check that it is this dataset.")


def _slake(download: Download, writer: _Writer) -> None:
    for split, names in _SPLIT_FILES.items():
        for record in _json_records(download, *(f"{name}.json" for name in names)):
            if record.text("q_lang") not in writer.languages:
                continue
            name = record.text("img_name")
            writer.addition.ask(
                split,
                id=f"slake-{record.text('qid')}",
                image=writer.copy(safe_name(name, record.where), f"imgs/{name}"),
                modality=record.choice("modality", _MODALITIES),
                body=record.text("location"),
                question=record.text("question"),
                answer=record.text("answer", empty=True),
                answer_type=record.choice("answer_type", ANSWER_TYPES),
                content=record.text("content_type"),
                source="slake",
            )


def _vqa_rad(download: Download, writer: _Writer) -> None:
    for record in _json_records(download, "VQA_RAD Dataset Public.json"):
        name = record.text("image_name")
        writer.addition.ask(
            "test" if record.text("phrase_type").startswith("test_") else "train",
            id=f"rad-{record.text('qid')}",
            image=writer.copy(safe_name(name, record.where), name),
            modality=None,
            body=record.choice("image_organ", _ORGANS),
            question=record.text("question"),
            answer=record.text("answer", empty=True),
            answer_type=record.choice("answer_type", ANSWER_TYPES),
            content=record.text("question_type"),
            source="vqa_rad",
        )


def _parquet(name: str, download: Download, writer: _Writer, *, pathology: bool) -> None:
    """One file of a dataset on Hugging Face; each row repeats its image."""
    split, addition = _split_of(name), writer.addition
    for number, row in enumerate(_parquet_rows(download.path(name)), start=1):
        record = Record(row, f"{name}, row {number}")
        language = _first(record, "q_lang", "lang", "language") or "en"
        if language.lower() not in writer.languages:
            continue
        image = record["image"]
        content = image.get("bytes") if isinstance(image, dict) else None
        if not isinstance(content, bytes) or not content:
            raise DataError(f"{record.where} has no image.", "Download the file again.")
        # equal bytes become one file
        kind = "png" if content.startswith(b"\x89PNG") else "jpg"
        answer = record.text("answer", empty=True)
        modality = "pathology" if pathology else record.optional("modality")
        addition.ask(
            split,
            id=f"{addition.name}-{split}-{len(addition.questions[split]) + 1}",
            image=addition.write(f"{hashlib.sha256(content).hexdigest()[:16]}.{kind}", content),
            modality=modality_name(modality) if modality else None,
            body=_first(record, "location", "image_organ", "body"),
            question=record.text("question"),
            answer=answer,
            answer_type=answer_type(record, answer),
            content=_first(record, "content_type", "question_type", "content"),
            source=addition.name,
        )


def _first(record: Record, *keys: str) -> str | None:
    return next((found for key in keys if (found := record.optional(key))), None)


def _pathvqa(download: Download, writer: _Writer) -> None:
    if not download.names("_qa.json") and download.names(".pkl"):
        raise DataError(
            f"{download.source} holds PathVQA's questions as pickles, which can run code when "
            "opened and are never read here.",
            "Download the parquet files of flaviagiammarino/path-vqa from Hugging Face, or save "
            "each list as train_qa.json, val_qa.json, test_qa.json beside its pickle.",
        )
    for split, names in _SPLIT_FILES.items():
        for record in _json_records(download, *(f"{name}_qa.json" for name in names)):
            if "conversations" in record.value:
                raise DataError(
                    f"{record.where} is in the form of the official Med-MoE code.",
                    "It needs no preparation: give the file to train or eval as it is.",
                )
            name = safe_name(f"{record.text('image')}.jpg", record.where)
            answer = record.text("answer", empty=True)
            writer.addition.ask(
                split,
                id=f"pathvqa-{split}-{len(writer.addition.questions[split]) + 1}",
                image=writer.copy(name, name),
                modality="pathology",
                question=record.text("question"),
                answer=answer,
                # The download has no answer types; yes and no are the closed answers.
                answer_type=answer_type(record, answer),
                source="pathvqa",
            )


_READERS = {"slake": _slake, "vqa-rad": _vqa_rad, "pathvqa": _pathvqa}


def _json_records(download: Download, *names: str) -> Iterator[Record]:
    """The objects of the JSON list with the first of these names; none where all are absent."""
    found = next((found for name in names if (found := download.find(name))), None)
    if found is None:
        logger.warning("%s has no %s", download.source, names[0])
        return
    try:
        text = download.read(found).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{found} is not UTF-8 text.", "Download it again.") from error
    values = parse_json(text, found)
    if not isinstance(values, list):
        raise DataError(f"{found} is not a JSON list.", "Check that it is this dataset.")
    for number, value in enumerate(values, start=1):
        yield Record(value, f"{found}, item {number}")


def _split_of(parquet: str) -> Split:
    """From data/train-00000-of-00007.parquet or, as Hugging Face converts, train/0000.parquet."""
    path = PurePosixPath(parquet)
    for name in (path.parent.name, re.split(r"\W", path.name)[0]):
        if name in SPLITS:
            return SPLITS[name]
    raise DataError(f"{parquet} does not tell its split.", "Keep the download's own file names.")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with needs("train"):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file.",
            "Download it again; in a clone, fetch it first with: git lfs pull",
        ) from error
