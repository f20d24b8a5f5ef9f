"""Questions that verification reads: what calibration draws, and what travels with bundles."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image as Picture

from medmoe_edge.calibration.data import BUILTIN, read_calibration
from medmoe_edge.calibration.samples import Sample
from medmoe_edge.data.datasets import Example
from medmoe_edge.errors import MissingDependencyError
from medmoe_edge.evaluation.recording import QUESTIONS
from medmoe_edge.image.loading import Image

TRAVELLING = "travelling"  # a folder for parts of its pictures

logger = logging.getLogger(__name__)


def as_examples(samples: Iterable[Sample], folder: Path) -> Iterator[Example]:
    """Samples as the questions that verification reads; parts of files are written to `folder`."""
    cut: dict[object, Path] = {}
    for sample in samples:
        image = sample.image
        if sample.frame is not None or sample.field is not None:
            image = cut.setdefault(sample.picture, folder / f"{len(cut)}.png")
            if not image.exists():
                Picture.fromarray(sample.load().pixels).save(image)
        yield Example(
            id=sample.id,
            image=image,
            question=sample.question,
            answer=sample.answer,
            answer_type=sample.answer_type,
            modality=sample.modality,
            body=None,
            content=None,
            source="calibration",
        )


def travelling(folder: Path) -> list[Example]:
    """Questions that travel with a bundle, for `verify --quick`; parts of files go to `folder`.

    They are about public pictures of installed packages: a user's own may be of patients. None
    where those packages are absent.
    """
    folder.mkdir(exist_ok=True)
    return list(as_examples(_public(), folder))


def travelling_pictures() -> list[Callable[[], Image]]:
    """The pictures of those questions."""
    return [sample.load for sample in {sample.picture: sample for sample in _public()}.values()]


def _public() -> list[Sample]:
    try:
        return read_calibration(BUILTIN).draw(QUESTIONS)
    except MissingDependencyError as error:
        logger.warning("The bundle will not carry inputs for a quick verification: %s", error.what)
        return []
