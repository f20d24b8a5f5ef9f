"""Which objects are asked about: what is set aside, which slices of a series are chosen, the vote.

Set aside is what shows nothing to ask about (reports, plans, presentation states), localizers, what
this program made itself, and what no question fits. It is received, counted and told of.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom.presentation import AllStoragePresentationContexts
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import register_uid

from medmoe_edge.bedside.listen.config import Configuration, Series
from medmoe_edge.bedside.listen.evidence import MAKER, is_ours
from medmoe_edge.bedside.listen.header import (
    NO_ISSUER,
    PERSON,
    body_parts_of,
    hashed,
    modality_of,
    patient_of,
    shared_of,
    text_of,
    uid_of,
)
from medmoe_edge.bedside.listen.schema import Membership, Slice
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import Notice

ASIDE = {  # the reasons, for people
    "own_result": "was made by this program",
    "no_pixels": "has no pixels",
    "kind": "is of a kind that is asked about only where a question names its modality",
    "localizer": "is a localizer",
    "burned_in": "is a secondary capture marked as showing text",
    "no_question": "fits no question",
    "for_processing": "is for processing, and is there for presentation too",
    "twice": "is there twice",
}
# Pictures of screens and paper, and pixels that are no picture: asked about only by name.
BY_NAME = {"OT", "SR", "SC", "SEG", "RTDOSE", "REG", "DOC", "KO", "PR"}
NO_PICTURE = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.30")  # SEG, parametric map
OF_OTHERS = "Of a picture that gave another answer: {0}"  # what is said of it
OF_THE_SERIES = {"slices", "no_key_image", "patient_differs"}  # what may become so, or no longer
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and, with a dot, those of several frames
PLAIN_UID = re.compile(r"[0-9.]{1,64}")
REJECTIONS = {"113001", "113037", "113038", "113039"}  # titles of key objects, CID 7011
# Classes of the storage service whose objects are made of pixels. Those of other kinds (reports,
# waveforms, presentation states, plans ...) are taken and set aside, so that whole studies may be
# sent: senders give a study up at the first object that is refused.
WORDS = ("Image Storage", "Image Storage - For", "Parametric Map", "Segmentation", "RT Dose")
NOT_PIXELS = ("Presentation State", "Surface", "Spectroscopy", "Raw Data")
# Classes that the standard has withdrawn, and that old devices still send.
RETIRED = (
    *("1.2.840.10008.5.1.1.29", "1.2.840.10008.5.1.1.30"),  # hardcopies
    *("1.2.840.10008.5.1.4.1.1.3", "1.2.840.10008.5.1.4.1.1.6"),  # ultrasound
    "1.2.840.10008.5.1.4.1.1.5",  # nuclear medicine
    "1.2.840.10008.5.1.4.1.1.12.3",  # bi-plane angiography
    *("1.2.840.10008.5.1.4.1.1.77.1", "1.2.840.10008.5.1.4.1.1.77.2"),  # visible light, on trial
)
MAX_PRIVATE = 1000  # classes of makers' own, over the life of the process
_registered: set[str] = set()


def classes_with_pixels() -> list[str]:
    """The UIDs of the storage classes whose objects may be asked about."""
    current = [
        uid
        for uid in _storage_classes()
        if any(word in UID(uid).name for word in WORDS)
        and not any(word in UID(uid).name for word in NOT_PIXELS)
    ]
    return [*current, *(uid for uid in RETIRED if register(uid))]


def classes_set_aside() -> list[str]:
    """The UIDs of the storage classes that are taken, and of which nothing is asked."""
    return sorted(set(_storage_classes()) - set(classes_with_pixels()))


def _storage_classes() -> list[str]:
    contexts = [context.abstract_syntax for context in AllStoragePresentationContexts]
    return [str(uid) for uid in contexts if uid is not None]


def register(uid: str) -> bool:
    """Have pynetdicom take a class for one of the storage service; not of any number of them."""
    if uid not in _registered and len(_registered) < MAX_PRIVATE:
        _registered.add(uid)
        register_uid(uid, f"Storage{uid.replace('.', '_')}", StorageServiceClass)
    return uid in _registered


def aside(dataset: Dataset, has_pixels: bool, configuration: Configuration | None) -> str:
    """Why nothing is asked of an object, a key of `ASIDE`; empty where something may be.

    Without a `configuration` all questions fit every image, and none names a modality.
    """
    modality = modality_of(dataset)
    sop_class = uid_of(dataset, "SOPClassUID")
    uids = (uid_of(dataset, each) for each in ("SOPInstanceUID", "SeriesInstanceUID"))
    if any(map(is_ours, uids)) or text_of(dataset, "Manufacturer").value == MAKER:
        return "own_result"
    if not has_pixels:
        return "no_pixels"
    is_named = configuration is not None and configuration.names(modality)
    if (modality in BY_NAME or sop_class in NO_PICTURE) and not is_named:
        return "kind"
    if "LOCALIZER" in text_of(dataset, "ImageType").value.upper().split("\\"):
        return "localizer"
    is_capture = f"{sop_class}.".startswith(f"{SECONDARY_CAPTURE}.")
    is_marked = text_of(dataset, "BurnedInAnnotation").value.upper() == "YES"
    if is_capture and is_marked and not (configuration and configuration.allow_burned_in):
        return "burned_in"
    if configuration and not configuration.questions_for(modality, body_parts_of(dataset)):
        return "no_question"
    return ""


def membership_of(dataset: Dataset) -> Membership:
    """Where an object belongs, from a header that `check_uids` has accepted."""
    values = shared_of(dataset)
    uids = [uid_of(dataset, keyword) for keyword in ("StudyInstanceUID", "SeriesInstanceUID")]
    class_name = UID(uid_of(dataset, "SOPClassUID")).name
    said = f"{text_of(dataset, 'PresentationIntentType').value} {class_name}".upper()
    view = [
        text_of(dataset, keyword).value.upper()
        for keyword in ("Modality", "Laterality", "ImageLaterality", "ViewPosition")
    ]
    return Membership(
        series=hashed(*uids, *patient_of(values)),
        any_issuer=hashed(*uids, *patient_of(values | NO_ISSUER)),
        position=_position(dataset),
        instance=_number(dataset, "InstanceNumber"),
        intent=next(
            (each for each in ("processing", "presentation") if f"FOR {each.upper()}" in said), ""
        ),
        view=hashed(*view, ",".join(sorted(body_parts_of(dataset)))),
        expected=max(0, _number(dataset, "NumberOfSeriesRelatedInstances") or 0),
    )


def key_objects(dataset: Dataset) -> list[str]:
    """The SOP Instance UIDs that a key object names as of interest, hashed as an origin's are."""
    if modality_of(dataset) != "KO":
        return []
    try:
        titles = dataset.get("ConceptNameCodeSequence") or ()
        if any(str(title.get("CodeValue", "")) in REJECTIONS for title in titles):
            return []
        return [
            hashed(str(reference.get("ReferencedSOPInstanceUID", "")))
            for item in dataset.get("ContentSequence") or ()
            for reference in item.get("ReferencedSOPSequence") or ()
        ]
    except Exception:  # pydicom raises nearly anything on damaged values
        return []


@dataclass(frozen=True)
class Selection:
    """The slices to ask, of how many, and what was left out for which reason."""

    slices: tuple[Slice, ...]
    of: int
    notices: tuple[Notice, ...] = ()


def chosen(slices: Sequence[Slice], marked: set[str], series: Series) -> Selection:
    """The slices of a series to ask: in their order in space, else by number, else as they came."""
    ordered = _ordered(slices)
    count = len(ordered)
    notices = []
    match series.slices:
        case "all":
            picked, how = ordered, "all"
        case "every":
            picked, how = ordered[min(series.every, count) // 2 :: series.every], "one in several"
        case "key" if marked:
            picked, how = [each for each in ordered if each.key in marked], "the key images"
        case _:
            picked, how = ordered[(count - 1) // 2 :][:1], "the middle one"
    if series.slices == "key" and not marked and count > 1:
        what = "No key image of the series is known: its middle slice was asked."
        notices.append(Notice("no_key_image", what))
    if count > len(picked):
        what = f"Of the {count} slices of the series {len(picked)} was asked: {how}."
        notices.append(Notice("slices", what if len(picked) == 1 else what.replace("was", "were")))
    return Selection(tuple(picked), count, tuple(notices))


def of_one_person(persons: Iterable[str]) -> tuple[Notice, ...]:
    """A notice where the objects of a series, each with its `Origin.person`, are of one number and
    contradict each other.
    """
    said = zip(*(each.split(",") for each in persons if each), strict=True)
    names = [name for name, each in zip(PERSON, said, strict=False) if len({*each} - {""}) > 1]
    if not names:
        return ()
    what = f"The objects of the series differ in {', '.join(names)}: look whose images they are."
    return (Notice("patient_differs", what),)


def chosen_frames(count: int, series: Series) -> list[int]:
    """Which frames of an object of `count` to ask, from 0, as slices of a series are chosen."""
    if series.slices == "all":
        return list(range(count))
    if series.slices == "every":
        return list(range(min(series.every, count) // 2, count, series.every))
    return [(count - 1) // 2]


class Vote(NamedTuple):
    """Which slice says what all say with most confidence, what that is, and whether all say it."""

    best: str
    answer: Answer
    agreed: bool


def voted(answers: Mapping[str, Answer]) -> Vote:
    """What slices say together to a question.

    The answer that most slices give, compared without case and the last stop; of equally many the
    more confident. Its probabilities are the means of theirs. It is unsure where any slice is, and
    has the notices of them all, since all were looked at: of each code once, and what only slices
    with another answer have says that it is about these.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for key, answer in answers.items():
        groups[answer.text.strip().rstrip(".").casefold()].append(key)
    mean = {
        text: float(np.mean([answers[key].confidence for key in keys]))
        for text, keys in groups.items()
    }
    winner = max(groups, key=lambda text: (len(groups[text]), mean[text]))
    best = max(groups[winner], key=lambda key: answers[key].confidence)
    notices = {notice.code: notice for notice in answers[best].warnings}
    for key in groups[winner]:
        for notice in answers[key].warnings:
            notices.setdefault(notice.code, notice)
    for notice in (notice for answer in answers.values() for notice in answer.warnings):
        notices.setdefault(notice.code, Notice(notice.code, OF_OTHERS.format(notice.message)))
    if len(answers) > 1:
        what = f"{len(groups[winner])} of {len(answers)} pictures gave this answer."
        others = len(answers) - len(groups[winner])
        if others:
            what += f" {others} gave others: look at them all."
        notices["vote"] = Notice("vote", what)
    won = [answers[key] for key in groups[winner]]
    found = replace(
        answers[best],
        confidence=mean[winner],
        complete=all(each.complete for each in won),
        stopped=next((each.stopped for each in won if each.stopped), None),
        unsure=any(each.unsure for each in answers.values()),
        refusals=_means([each.refusals for each in won]),
        probabilities=_means([each.probabilities or {} for each in won]) or None,
        warnings=tuple(notices.values()),
    )
    return Vote(best, found, len(groups) == 1)


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure that all have."""
    return {
        name: float(np.mean([each[name] for each in found]))
        for name in found[0]
        if all(name in each for each in found)
    }


def _ordered(slices: Sequence[Slice]) -> list[Slice]:
    """`slices` come as they were received."""
    if all(each.position is not None for each in slices):
        return sorted(slices, key=lambda each: (each.position or 0.0, each.instance or 0))
    if all(each.instance is not None for each in slices):
        return sorted(slices, key=lambda each: each.instance or 0)
    return list(slices)


def _position(dataset: Dataset) -> float | None:
    """Along the normal of the plane, PS3.3 C.7.6.2.1.1."""
    place = _floats(dataset, "ImagePositionPatient")
    directions = _floats(dataset, "ImageOrientationPatient")
    if len(place) != 3 or len(directions) != 6:
        return None
    along = float(np.dot(place, np.cross(directions[:3], directions[3:])))
    return round(along, 3) if np.isfinite(along) else None


def _floats(dataset: Dataset, keyword: str) -> list[float]:
    try:
        return [float(each) for each in text_of(dataset, keyword).value.split("\\")]
    except ValueError:
        return []


def _number(dataset: Dataset, keyword: str) -> int | None:
    try:
        found = int(text_of(dataset, keyword).value)
    except ValueError:
        return None
    return found if abs(found) < 2**31 else None


def reasons(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """What was set aside, in words, and how many."""
    for name, count in counts.items():
        yield ASIDE.get(name, name.replace("_", " ")), count


def is_private(uid: str) -> bool:
    """Whether a class is a maker's own, and not of the standard (PS3.5 annex A and B)."""
    return not uid.startswith("1.2.840.10008.") and bool(PLAIN_UID.fullmatch(uid))


def shown_uid(uid: str | None) -> str:
    """The name of a class or encoding, or its UID; what is none might be anything."""
    text = str(uid)
    return UID(text).name if PLAIN_UID.fullmatch(text) else "one without a valid UID"
