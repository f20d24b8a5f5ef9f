"""What calibration draws, as the questions that verification reads."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image as Picture

from medmoe_edge.calibration.samples import Sample
from medmoe_edge.data.datasets import Example


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
