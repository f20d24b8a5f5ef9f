"""What an archive holds that is most like a text or an image."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, Literal

from medmoe_edge.archive.archive import Archive, Hit
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.results import Reading
from medmoe_edge.contrastive.similarity import unit
from medmoe_edge.errors import ImageError, InputError
from medmoe_edge.image.loading import load_image, preprocess

IMAGE_NAMES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".nii", ".nii.gz")


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """The `hits` for a query, the best first, of `entries` images below `folder`.

    `kind` says what the query was taken for; `reading` is the router's view of a query image, None
    for a text. Similarities are cosines: only their order tells something, and the first hit of a
    query that nothing fits is a first hit too.
    """

    query: str
    kind: Literal["text", "image"]
    hits: tuple[Hit, ...]
    entries: int
    index: str
    folder: str
    reading: Reading | None
    seconds: float
    model: dict[str, str]
    notice: str = NOTICE

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object."""
        return dataclasses.asdict(self)


def retrieve(
    query: str, index: str | os.PathLike[str], engine: ModalityEngine, k: int = 10
) -> Retrieval:
    """The `k` images of an index most like a query: an image, if there is such a file, or a text.

    Raises `InputError` as `Archive` does, for a text without a word, and for a query that is named
    like an image file where there is none; `ImageError` for a file that is no image.
    """
    started = time.perf_counter()
    if k < 1:
        raise InputError(f"{k} images were asked for.", "Ask for at least one.")
    with Archive(index, engine.sha256) as archive:
        reading = None
        if is_image(query):
            features = engine.embed_images(preprocess(load_image(query), engine.config.vision))
            vector, reading = unit(features.pooled[0]), engine.reading(features)
        else:
            vector = engine.embed_text(query)
        return Retrieval(
            query=query,
            kind="image" if reading else "text",
            hits=tuple(archive.search(vector, k)),
            entries=len(archive),
            index=str(index),
            folder=archive.root,
            reading=reading,
            seconds=time.perf_counter() - started,
            model={"name": engine.name, "sha256": engine.sha256},
        )


def is_image(query: str) -> bool:
    """Whether a query is the path of a file; raises `ImageError` where it only looks like one."""
    try:
        if Path(query).is_file():
            return True
    except (OSError, ValueError):  # too long for a path
        return False
    if query.lower().endswith(IMAGE_NAMES):
        raise ImageError("There is no such image file.", "Check its path, or ask in words.")
    return False
