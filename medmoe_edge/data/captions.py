"""Captions and boxes for MedMoE: what an image shows, and where.

The images carry no free text: captions are made of labels and answered questions. A caption is a
list of phrases, the first of which names body part and modality; each other one is something to be
seen. What is absent, or is knowledge about an organ and not to be seen, gives no phrase.

    Does the picture contain liver?               Yes                liver
    What diseases are included in the picture?    Brain Tumor, Edema brain tumor | edema
    Where is the liver?                           Upper Left         liver upper left
    Can effusion be observed on the left lung?    Yes                effusion left lung
    Is the lung healthy?                          No                 abnormal lung
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medmoe_edge.data.datasets import Example, LabelledImage, Record, parse_json, read_text
from medmoe_edge.errors import DataError

NAMES = {
    "ct": "CT",
    "mri": "MRI",
    "xray": "X-Ray",
    "pathology": "Pathology",
    "ultrasound": "Ultrasound",
    "fundus": "Fundus",
    "oct": "OCT",
    "pet": "PET",
    "spect": "SPECT",
    "dermoscopy": "Dermoscopy",
    "endoscopy": "Endoscopy",
    "mammography": "Mammography",
}  # modality -> as an answer; others are answered as the data names them

# SLAKE's names of body parts, where they are not words that people use; its lungs are chests
_BODIES = {
    "lung": "chest",
    "chest_lung": "chest",
    "chest_heart": "chest",
    "chest_mediastinal": "chest",
    "brain_tissue": "brain",
    "brain_face": "head",
}
_SPELLING = {"brian": "brain", "spine cord": "spinal cord"}
_HERE = r"(?: (?:in|on) (?:this|the) (?:image|picture|film|x-ray))?"
_ARE = r"(?:is/are|are/is|is|are)"

_PRESENT = [  # questions whose yes says that something is there
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"does the picture contain (?P<what>(?!the |any )[\w ]+)",
        rf"does the (?P<what>[\w ]+?) (?:appear|exist){_HERE}",
        r"does the patient have (?:an? )?(?P<what>(?!any )[\w ]+)",
        rf"can (?P<what>[\w ]+) be observed(?: on the (?P<where>[\w ]+?))?{_HERE}",
        rf"{_ARE} there (?:evidence of )?(?:an? )?(?P<what>(?!any |no |organs |abnormalit)[\w ]+?)"
        rf"(?: in the patient's (?P<where>[\w ]+?))?(?: present)?{_HERE}",
    )
]
_STATE = re.compile(  # questions whether an organ is well
    rf"(?:{_ARE}|does) the (?P<what>(?!.*\bnot\b)[\w ]+?) "
    rf"(?:look )?(?P<state>healthy|normal|abnormal|unhealthy){_HERE}",
    re.IGNORECASE,
)
_WHERE = re.compile(
    rf"where {_ARE} the (?P<what>(?!abnormalit)[\w ]+?)"
    rf"(?: located| existing)?(?: in the (?:lung|brain))?(?: of this image)?(?: located)?{_HERE}",
    re.IGNORECASE,
)
_LISTED = re.compile(  # questions whose answers are things to be seen
    r"what diseases? .*|what is the (?:main|largest) organ .*|what organ is .*"
    r"|what is the (?:\w+most )?organ (?:on|in|located) .*|.*\bplane\b.*",
    re.IGNORECASE,
)
_WEIGHTING = re.compile(r"t[12]")  # an answer that names nothing else
_NOTHING = {"", "none", "not seen", "0", "no"}


@dataclass(frozen=True)
class Captioned:
    """An image, the phrases that describe it and, where known, its modality."""

    image: Path
    phrases: tuple[str, ...]
    modality: str | None
    source: str

    @property
    def caption(self) -> str:
        """The phrases as one text."""
        return ", ".join(self.phrases)


def label_captions(labelled: Iterable[LabelledImage]) -> list[Captioned]:
    """Body part and modality, and the finding, in the order of the labels."""
    return [
        Captioned(
            item.image,
            tuple(filter(None, (_view(item.body, item.modality), _tidy(item.finding)))),
            item.modality,
            item.source,
        )
        for item in labelled
    ]


def fact_captions(examples: Iterable[Example]) -> list[Captioned]:
    """One caption an image from all the questions about it, in order of first appearance.

    An image of which nothing is known, not even the body part, is left out.
    """
    phrases: dict[Path, dict[str, None]] = {}  # in order, each once
    first: dict[Path, Example] = {}
    for example in examples:
        if example.image not in phrases:
            first[example.image] = example
            body = (example.body or "").lower()
            view = _view(_BODIES.get(body, body), example.modality)
            phrases[example.image] = {view: None} if view else {}
        phrases[example.image] |= dict.fromkeys(facts(example.question, example.answer))
    return [
        Captioned(image, tuple(known), first[image].modality, first[image].source)
        for image, known in phrases.items()
        if known
    ]


def facts(question: str, answer: str) -> Iterator[str]:
    """The phrases that one answered question gives; often none."""
    asked = " ".join(question.split()).rstrip("? ")
    said = _tidy(answer)
    if found := _STATE.fullmatch(asked):
        if said in ("yes", "no") and found["what"].lower() not in ("image", "picture"):
            well = (found["state"].lower() in ("healthy", "normal")) == (said == "yes")
            yield f"{'normal' if well else 'abnormal'} {_tidy(found['what'])}"
    elif found := next(filter(None, (pattern.fullmatch(asked) for pattern in _PRESENT)), None):
        if said == "yes":
            where = found.groupdict().get("where")
            yield " ".join(_tidy(part) for part in (found["what"], where) if part)
    elif said in _NOTHING or said == "yes":
        if said == "none" and asked.lower().startswith("what disease"):
            yield "no finding"
    elif found := _WHERE.fullmatch(asked):
        yield f"{_tidy(found['what'])} {said}"
    elif _WEIGHTING.fullmatch(said):
        yield f"{said} weighted"
    elif _LISTED.fullmatch(asked):
        yield from (_tidy(part) for part in re.split(r",| and ", said) if part.strip())


def body_name(body: str) -> str:
    """A part of the body as people call it; SLAKE's names have others."""
    lower = body.strip().lower()
    return _BODIES.get(lower, lower).replace("_", " ")


def _view(body: str, modality: str | None) -> str:
    spoken = NAMES.get(modality, modality) if modality else ""
    return _tidy(f"{body} {spoken}")


def _tidy(text: str) -> str:
    """Lower case, single spaces, no full stop, no article, and the usual spelling."""
    words = " ".join(text.lower().split()).rstrip(".").removeprefix("the ")
    return _SPELLING.get(words, words)


Box = tuple[float, float, float, float]  # x, y, width, height in pixels


@dataclass(frozen=True)
class GroundedPhrase:
    """A phrase and the boxes around what it names in an image."""

    image: Path
    phrase: str
    boxes: tuple[Box, ...]

    def holds(self, x: float, y: float) -> bool:
        """Whether the point (x, y) lies in one of the boxes."""
        return any(
            left <= x < left + width and top <= y < top + height
            for left, top, width, height in self.boxes
        )

    def mask(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        """True for the pixels `[H, W]` whose centre lies in a box."""
        rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
        mask = np.zeros((height, width), np.bool_)
        for x, y, wide, high in self.boxes:
            across = (x <= columns) & (columns < x + wide)
            mask |= ((y <= rows) & (rows < y + high))[:, None] & across
        return mask

    def within(self, left: float, top: float, scale: float) -> "GroundedPhrase":
        """The same in a part of the image that begins at (left, top) and is enlarged by `scale`."""
        boxes = (
            (scale * (x - left), scale * (y - top), scale * width, scale * height)
            for x, y, width, height in self.boxes
        )
        return replace(self, boxes=tuple(boxes))


def read_grounded(file: Path, images: Iterable[Path]) -> list[GroundedPhrase]:
    """The boxes drawn on `images`, by label in lower case; `file` names images from its folder.

    Raises `DataError` for a file of another form.
    """
    everything = Record(parse_json(read_text(file), str(file)), str(file)).value
    wanted = set(images)
    return [
        GroundedPhrase(file.parent / name, phrase, tuple(boxes))
        for name, drawn in everything.items()
        if file.parent / name in wanted
        for phrase, boxes in _grouped(drawn, f"{file}, {name!r}").items()
    ]


def _grouped(drawn: object, where: str) -> Mapping[str, list[Box]]:
    if not isinstance(drawn, list):
        raise DataError(f"{where} is no list of boxes.", "Check the file's structure.")
    grouped: dict[str, list[Box]] = {}
    for item in drawn:
        record = Record(item, where)
        box = record["xywh"]
        if not (isinstance(box, list) and len(box) == 4 and {int, float} >= set(map(type, box))):
            what = f"{record.where}: a box is not four numbers."
            raise DataError(what, "Give x, y, width, height.")
        x, y, width, height = box
        grouped.setdefault(record.text("label").lower(), []).append((x, y, width, height))
    return grouped
