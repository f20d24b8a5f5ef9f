"""Calibration data: which questions about which images a model is calibrated on.

A source is put into a fixed shuffled order once, and samples are drawn from it evenly over the
modalities. Images are decoded as they are drawn; those that cannot be are skipped and listed.
"""

import hashlib
import logging
import os
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medmoe_edge.calibration.samples import (
    Sample,
    builtin_samples,
    file_samples,
    folder_samples,
    printable,
)
from medmoe_edge.errors import DataError, ImageError, InputError

__all__ = ["BUILTIN", "CalibrationData", "Sample", "Skipped", "read_calibration"]

BUILTIN = "builtin"
MAX_UNREADABLE = 0.05  # of the images decoded
FEW = 20  # images; of fewer, no share is taken unless there are no more

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, by its file's name alone, and the reason."""

    image: str
    reason: str


@dataclass
class CalibrationData:
    """A whole source; `skipped` grows as unreadable images are met.

    `samples` stand in the order in which they are drawn: every picture's first question before any
    picture's second. `sha256` is over ids, questions, answers, modalities and the names and sizes
    of the files, wherever they lie and whatever the seed.
    """

    name: str
    samples: tuple[Sample, ...]
    sha256: str
    skipped: list[Skipped] = field(default_factory=list)
    _readable: dict[object, bool] = field(default_factory=dict, repr=False)  # by picture

    def draw(
        self,
        count: int,
        *,
        modalities: Collection[str] | None = None,
        exclude: Iterable[Sample] = (),
    ) -> list[Sample]:
        """The next `count` samples outside `exclude`, one of each modality in turn.

        A modality that is used up drops out; fewer are returned if there are no more. Samples
        without a modality take their turn last, and none where `modalities` are given.

        Raises `DataError` where more than 5% of the images cannot be read.
        """
        taken = {sample.id for sample in exclude}
        allowed = None if modalities is None else {name.lower() for name in modalities}
        strata: dict[str | None, deque[Sample]] = {}
        for sample in self.samples:
            if (allowed is None or sample.modality in allowed) and sample.id not in taken:
                strata.setdefault(sample.modality, deque()).append(sample)
        turns = deque(strata[key] for key in sorted(strata, key=lambda key: (key is None, key)))
        drawn: list[Sample] = []
        known = len(self.skipped)
        while turns and len(drawn) < count:
            stratum = turns.popleft()
            while stratum:
                sample = stratum.popleft()
                if self._is_readable(sample, missing=count - len(drawn)):
                    drawn.append(sample)
                    turns.append(stratum)
                    break
        self._check_readable(missing=0)
        if skipped := len(self.skipped) - known:
            logger.warning("Skipped images that cannot be read: %d.", skipped)
        return drawn

    def _is_readable(self, sample: Sample, missing: int) -> bool:
        if sample.picture not in self._readable:
            try:
                sample.load()
                self._readable[sample.picture] = True
            except ImageError as error:
                self._readable[sample.picture] = False
                self.skipped.append(Skipped(printable(sample.image.name), error.what))
                logger.info("Skipped: %s", error.what)  # names of files may be those of patients
                self._check_readable(missing)
        return self._readable[sample.picture]

    def _check_readable(self, missing: int) -> None:
        """Raise `DataError` if too many are unreadable, were all that is `missing` yet readable.

        The share is one of 20 images at least, or of all there are: before so many are decoded,
        one bad image says little.
        """
        decoded, bad = len(self._readable), len(self.skipped)
        pictures = len({sample.picture for sample in self.samples})
        if bad > MAX_UNREADABLE * min(pictures, max(decoded + missing, FEW)):
            raise DataError(
                f"{bad} of {decoded} images of {self.name!r} cannot be read, more than "
                f"{MAX_UNREADABLE:.0%}: {self.skipped[0].reason}",
                "Remove or replace the images that cannot be read.",
            )


def read_calibration(
    source: str | Path, *, known_modalities: Sequence[str] = (), seed: int = 0
) -> CalibrationData:
    """Read a folder of images, a JSONL file of questions, or the named set "builtin".

    A folder's images get the questions of `samples.QUESTIONS`. A `Path` is never a set's name. The
    order depends only on the ids (a folder's are paths within it) and the `seed`.

    Raises `InputError` where there is no such source, `DataError` where it is empty or malformed
    or where it names modalities, but none of `known_modalities`.
    """
    path = Path(source)
    if source == BUILTIN:
        name, samples = BUILTIN, list(builtin_samples())
    elif os.path.isdir(source):
        name, samples = path.resolve().name, list(folder_samples(path))
    elif os.path.isfile(source):
        name, samples = path.name, list(file_samples(path))
    else:
        raise InputError(
            f"There is no calibration data {str(source)!r}.",
            f"Give a folder of images, a JSONL file of questions, or a set's name: {BUILTIN}.",
        )
    if not samples:
        raise DataError(f"{name!r} holds no image.", "Give PNG, JPEG, TIFF, DICOM or NIfTI files.")
    _check_modalities(name, samples, known_modalities)
    return CalibrationData(printable(name), _in_order(samples, seed), _fingerprint(samples))


def _check_modalities(name: str, samples: Iterable[Sample], known: Sequence[str]) -> None:
    labels = {sample.modality for sample in samples if sample.modality}
    if known and labels and labels.isdisjoint(name.lower() for name in known):
        raise DataError(
            f"{name!r} names modalities that the model does not know: "
            f"{', '.join(sorted(labels)[:5])}.",
            f"Use: {', '.join(known)}; or leave them out.",
        )


def _in_order(samples: Iterable[Sample], seed: int) -> tuple[Sample, ...]:
    def shuffled(sample: Sample) -> bytes:
        return hashlib.sha256(f"{seed} {sample.id}".encode()).digest()

    asked: Counter[object] = Counter()
    rounds: list[tuple[int, Sample]] = []
    for sample in sorted(samples, key=shuffled):
        rounds.append((asked[sample.picture], sample))
        asked[sample.picture] += 1
    return tuple(sample for _, sample in sorted(rounds, key=lambda turn: turn[0]))


def _fingerprint(samples: Collection[Sample]) -> str:
    sizes = {image: _size(image) for image in {sample.image for sample in samples}}
    lines = (
        (s.id, s.question, s.answer, s.modality, printable(s.image.name), sizes[s.image])
        for s in samples
    )
    return hashlib.sha256("\n".join(sorted(map(repr, lines))).encode()).hexdigest()


def _size(image: Path) -> int:
    try:
        return image.stat().st_size
    except (OSError, ValueError):  # absent; or no path at all
        return -1
