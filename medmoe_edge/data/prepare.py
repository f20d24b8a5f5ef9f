"""Official downloads of SLAKE, VQA-RAD and PathVQA -> our JSONL and images.

SLAKE (Liu et al. 2021): `imgs/xmlabN/source.jpg`, train.json, validate.json, test.json; English
and Chinese. VQA-RAD (Lau et al. 2018): "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder/".
PathVQA (He et al. 2020): its own questions are pickles, which are never opened; the Hugging Face
parquet files (image, question, answer) are read instead, or the same lists saved as JSON.
"""

import hashlib
import importlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medmoe_edge.atomic import atomic_folder
from medmoe_edge.data.datasets import ANSWER_TYPES, Record, Split, UniqueIds, parse_json
from medmoe_edge.data.download import Download, safe_name
from medmoe_edge.errors import DataError, MissingDependencyError

Dataset = Literal["slake", "vqa-rad", "pathvqa"]

_MODALITIES = {"ct": "ct", "mri": "mri", "x-ray": "xray"}
_ORGANS = {"head": "head", "chest": "chest", "abd": "abdomen"}
_SPLIT_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validate", "validation", "val"),
    "test": ("test",),
}

SUMMARY = "dataset.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What was written: the folder, the questions per split, and the images."""

    folder: Path
    questions: dict[Split, int]
    images: int


def prepare(dataset: Dataset, source: Path, out: Path, *, force: bool = False) -> Prepared:
    """Turn a downloaded folder or zip into `out`: train/val/test.jsonl, `images/`, dataset.json.

    Splits are the official ones (VQA-RAD has no val, and its train and test share images); images
    are copied byte for byte. `out` appears only when complete; an existing one is refused, and
    with `force` replaced if it is an earlier result.

    Raises `DataError` for a download that is incomplete, damaged or not what `dataset` says,
    `MissingDependencyError` for parquet files without pyarrow, `ResourceError` if the disk fails.
    """
    out = out.resolve()
    with Download(source) as download, atomic_folder(out, force=force, marker=SUMMARY) as folder:
        writer = _Writer(folder, download)
        _READERS[dataset](download, writer)
        prepared = Prepared(out, writer.finish(), writer.images)
        summary = {"dataset": dataset, "questions": prepared.questions, "images": prepared.images}
        (folder / SUMMARY).write_text(json.dumps(summary) + "\n", encoding="utf-8")
        return prepared


class _Writer:
    """Collects questions and copies images into a folder that nobody else sees yet."""

    def __init__(self, folder: Path, download: Download) -> None:
        self.folder = folder
        self.questions: dict[Split, list[dict[str, str | None]]] = {
            "train": [],
            "val": [],
            "test": [],
        }
        self._download = download
        self._unique = UniqueIds()
        self._copied: set[str] = set()
        self._missing: set[str] = set()

    @property
    def images(self) -> int:
        return len(self._copied)

    def add(self, split: Split, *, id: str, **fields: str | None) -> None:
        """Add one question; the keyword arguments are the fields of `Example`."""
        self.questions[split].append({"id": self._unique(id), **fields})

    def copy(self, name: str, member: str) -> str:
        """Copy an image of the download to `images/name`, once; gives that path back."""
        found = self._download.find(member)
        if found is None:
            self._missing.add(name)
        elif name not in self._copied:
            self.write(name, self._download.read(found))
        return f"images/{name}"

    def write(self, name: str, content: bytes) -> str:
        """Write an image to `images/name`, once; gives that path back."""
        if name not in self._copied:
            path = self.folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self._copied.add(name)
        return f"images/{name}"

    def finish(self) -> dict[Split, int]:
        """Write the question files; gives the number of questions per split that has any."""
        source = self._download.source
        if self._missing:
            raise DataError(
                f"{source} lacks {len(self._missing)} images that its questions are about, "
                f"{min(self._missing)} among them.",
                "Download the images too, or again.",
            )
        counts: dict[Split, int] = {
            split: len(lines) for split, lines in self.questions.items() if lines
        }
        if not counts:
            raise DataError(f"{source} holds no questions.", "Check that it is this dataset.")
        for split in counts:
            lines = (json.dumps(line, ensure_ascii=False) for line in self.questions[split])
            text = "\n".join(lines) + "\n"
            (self.folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return counts


def _slake(download: Download, writer: _Writer) -> None:
    for split, names in _SPLIT_FILES.items():
        for record in _json_records(download, *(f"{name}.json" for name in names)):
            if record.text("q_lang") != "en":
                continue
            name = record.text("img_name")
            writer.add(
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
        writer.add(
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


def _pathvqa(download: Download, writer: _Writer) -> None:
    parquet = download.names(".parquet")
    for name in parquet:
        _pathvqa_parquet(download, name, writer)
    if not parquet:
        _pathvqa_json(download, writer)


def _pathvqa_parquet(download: Download, name: str, writer: _Writer) -> None:
    split = _split_of(name)
    for number, row in enumerate(_parquet_rows(download.path(name)), start=1):
        record = Record(row, f"{name}, row {number}")
        image = record["image"]
        content = image.get("bytes") if isinstance(image, dict) else None
        if not isinstance(content, bytes) or not content:
            raise DataError(f"{record.where} has no image.", "Download the file again.")
        # Each row repeats its image; equal bytes become one file.
        kind = "png" if content.startswith(b"\x89PNG") else "jpg"
        image_name = f"{hashlib.sha256(content).hexdigest()[:16]}.{kind}"
        _add_pathvqa(writer, split, writer.write(image_name, content), record)


def _pathvqa_json(download: Download, writer: _Writer) -> None:
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
            _add_pathvqa(writer, split, writer.copy(name, name), record)


def _add_pathvqa(writer: _Writer, split: Split, image: str, record: Record) -> None:
    answer = record.text("answer", empty=True)
    writer.add(
        split,
        id=f"pathvqa-{split}-{len(writer.questions[split]) + 1}",
        image=image,
        modality="pathology",
        body=None,
        question=record.text("question"),
        answer=answer,
        # The download has no answer types; as in LLaVA-Med, yes and no are the closed answers.
        answer_type="CLOSED" if answer.lower() in ("yes", "no") else "OPEN",
        content=None,
        source="pathvqa",
    )


_READERS: dict[Dataset, Callable[[Download, _Writer], None]] = {
    "slake": _slake,
    "vqa-rad": _vqa_rad,
    "pathvqa": _pathvqa,
}


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
    for split, names in _SPLIT_FILES.items():
        if path.parent.name in names or re.split(r"\W", path.name)[0] in names:
            return split
    raise DataError(f"{parquet} does not tell its split.", "Keep the download's own file names.")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "train") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file.",
            "Download it again; in a clone, fetch it first with: git lfs pull",
        ) from error
