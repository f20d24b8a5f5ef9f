"""One question about one calibration picture, and the questions that a bedside device asks."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medmoe_edge.data.datasets import AnswerType
from medmoe_edge.image.loading import Image, load_image

Field = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of a picture, in pixels."""

# In the words of SLAKE and VQA-RAD, which Med-MoE is trained on.
QUESTIONS: tuple[tuple[str, AnswerType], ...] = (
    ("What modality is used to take this image?", "OPEN"),
    ("What is the scanning plane of this image?", "OPEN"),
    ("Which part of the body does this image belong to?", "OPEN"),
    ("What is the main organ in the image?", "OPEN"),
    ("Are there abnormalities in this image?", "CLOSED"),
    ("Where is the abnormality in this image?", "OPEN"),
    ("What diseases are included in the picture?", "OPEN"),
    ("Is there a pleural effusion?", "CLOSED"),
    ("Is there a fracture?", "CLOSED"),
)


@dataclass(frozen=True)
class Sample:
    """One question about one picture; `answer` may be empty, `modality` unknown.

    The picture is a file's, or one `frame` of several, or a `field` cut out of it.
    """

    id: str
    image: Path
    question: str
    answer: str
    modality: str | None
    answer_type: AnswerType
    frame: int | None = None
    field: Field | None = None

    @property
    def picture(self) -> tuple[Path, int | None, Field | None]:
        """What it looks at: the same for all questions about one picture."""
        return self.image, self.frame, self.field

    @property
    def sha256(self) -> str:
        """The hash of its id, for what is written down: the id may name a patient."""
        return hashlib.sha256(self.id.encode()).hexdigest()

    def load(self) -> Image:
        """Decode its picture; the errors of `medmoe_edge.image.loading.load_image`."""
        image = load_image(self.image, frame=self.frame)
        if self.field is None:
            return image
        left, top, right, bottom = self.field
        return Image.from_array(image.pixels[top:bottom, left:right])


def ask_about(
    name: str,
    image: Path,
    modality: str | None,
    *,
    frame: int | None = None,
    field: Field | None = None,
) -> Iterator[Sample]:
    """The bedside questions about one picture, whose ids start with `name`."""
    for number, (question, answer_type) in enumerate(QUESTIONS, start=1):
        identity = f"{name}?{number}"
        yield Sample(identity, image, question, "", modality, answer_type, frame, field)
