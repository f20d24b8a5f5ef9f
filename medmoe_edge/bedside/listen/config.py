"""The configuration of the DICOM node: who may send, what is asked of what, where answers go.

A file `listen.toml` (or the same as JSON):

    ae_title = "MEDMOE"
    folder = "/var/lib/medmoe-edge/listen"
    documents = ["comprehensive-3d-sr", "basic-text-sr"]

    [[peers]]                      # who may send; nobody else is let in
    ae_title = "CR_ROOM_1"
    hosts = ["10.1.2.3"]           # from these addresses; left out: from any

    [[questions]]                  # of an image, all that fit it are asked
    modalities = ["CR", "DX"]      # Modality (0008,0060); left out: any
    body_parts = ["CHEST"]         # or another word for it, or a SNOMED CT code; left out: any
    ask = ["Is there a pleural effusion?"]

    [series]                       # one result for each series
    quiet = 10                     # seconds without a new object, after which it is complete
    slices = "middle"              # which are asked: middle, key, every or all

    [[dicom]]                      # the DICOM documents are sent here by C-STORE
    ae_title = "PACS"
    host = "10.1.2.9"
    port = 104

    [[fhir]]                       # and a FHIR transaction is posted here
    url = "https://fhir.example.org/r4"
    version = "R4"
"""

import json
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from medmoe_edge.bedside.listen.header import body_parts
from medmoe_edge.engine.answer import choices_of, given_choices
from medmoe_edge.errors import InputError, unreadable

Document = Literal[
    "picture", "comprehensive-3d-sr", "basic-text-sr", "heat-map", "fhir-r4", "fhir-r5"
]

# PS3.5, table 6.2-1: no control characters, no backslash, not only spaces; ASCII by default.
AETitle = Annotated[str, pydantic.Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]
Port = Annotated[int, pydantic.Field(ge=1, le=65535)]
Question = Annotated[str, pydantic.Field(min_length=1, max_length=1000, pattern=r"\S")]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Peer(_Part):
    """An application that may send; `hosts` are its addresses as numbers, any where left out."""

    ae_title: AETitle
    hosts: tuple[pydantic.IPvAnyAddress, ...] = ()


class Questions(_Part):
    """What is asked of images of these modalities and body parts.

    `choices` are the answers that may be given to each; left out, any.
    """

    modalities: tuple[str, ...] = ()
    body_parts: tuple[str, ...] = ()
    ask: tuple[Question, ...] = pydantic.Field(min_length=1)
    choices: tuple[str, ...] | None = None

    def fit(self, modality: str, parts: Collection[str]) -> bool:
        """Whether they are asked of such an image; `parts` are by `header.body_parts`."""
        wanted = [body_parts(each) for each in self.body_parts]
        return _among(modality, self.modalities) and (
            not wanted or any(each and each <= set(parts) for each in wanted)
        )


class Series(_Part):
    """How objects are brought together, and which of a series are asked.

    A series is complete when nothing of it has come for `quiet` seconds, or as soon as it has
    `expected` objects that may be asked about (0: as many instances as the objects say, if they
    do, with those that are set aside). `slices` are the middle one, those that key objects of the
    study name, `every` so-many-th, or all; several answers are brought together by a vote. For
    `linger` seconds after its result a series' images are kept, so that a late object is answered
    together with the others.
    """

    quiet: float = pydantic.Field(default=10.0, ge=0)
    expected: int = pydantic.Field(default=0, ge=0)
    slices: Literal["middle", "key", "every", "all"] = "middle"
    every: int = pydantic.Field(default=10, ge=1)
    linger: float = pydantic.Field(default=600.0, ge=0)


class Identifiers(_Part):
    """The systems (URIs) of the identifiers in FHIR documents; left out: none is given."""

    patient: str | None = pydantic.Field(default=None, min_length=1)
    accession: str | None = pydantic.Field(default=None, min_length=1)


class DicomDestination(_Part):
    """A node that the DICOM documents are sent to."""

    ae_title: AETitle
    host: str = pydantic.Field(min_length=1)
    port: Port

    @property
    def name(self) -> str:
        """By which the queue knows it."""
        return f"dicom://{self.ae_title}@{self.host}:{self.port}"

    @property
    def shown(self) -> str:
        """For a log."""
        return self.name


class FhirDestination(_Part):
    """A FHIR server's base URL; `token_file` holds a bearer token."""

    url: pydantic.HttpUrl
    version: Literal["R4", "R5"]
    token_file: Path | None = None

    @property
    def name(self) -> str:
        """By which the queue knows it."""
        return str(self.url)

    @property
    def shown(self) -> str:
        """For a log: without what is secret in a URL."""
        return f"{self.url.scheme}://{self.url.host}:{self.url.port}{self.url.path or ''}"


Destination = DicomDestination | FhirDestination


class Configuration(_Part):
    """All of it. Sizes in millions of bytes.

    `folder` holds what was received until it is answered (for good with `keep_images`), the queue,
    the documents and, unless `audit` names another file, the audit log. `reserve_mb` of the disk
    stay free: what would not fit is refused. `allow_burned_in` also takes pixels marked as showing
    text. `heat_map_model` is what draws the document "heat-map"; "picture" is a Secondary Capture
    of exactly what the model saw, to which the reports then refer. With `yes_no`, questions that
    ask for yes or no are answered with one of them; with `allow_repetition`, an answer that repeats
    itself goes on.
    """

    ae_title: AETitle = "MEDMOE"
    host: str = "127.0.0.1"
    port: int = pydantic.Field(11112, ge=0, le=65535)  # 0: any that is free
    folder: Path
    model: str = "nano"
    memory_budget: str | None = None
    drop_pages: bool = False
    max_new_tokens: int = pydantic.Field(32, ge=1)
    allow_repetition: bool = False
    yes_no: bool = True
    heat_map_model: str = "modality-nano"
    peers: tuple[Peer, ...] = pydantic.Field(min_length=1)
    questions: tuple[Questions, ...] = pydantic.Field(min_length=1)
    documents: tuple[Document, ...] = ("comprehensive-3d-sr",)
    dicom: tuple[DicomDestination, ...] = ()
    fhir: tuple[FhirDestination, ...] = ()
    series: Series = Series()
    identifiers: Identifiers = Identifiers()
    audit: Path | None = None
    reserve_mb: int = pydantic.Field(1000, ge=0)
    max_object_mb: int = pydantic.Field(1000, ge=1)
    max_associations: int = pydantic.Field(10, ge=1)
    timeout: float = pydantic.Field(30.0, gt=0, description="seconds a peer may keep silent")
    allow_burned_in: bool = False
    keep_images: bool = False

    @property
    def destinations(self) -> tuple[Destination, ...]:
        """All of them."""
        return (*self.dicom, *self.fhir)

    @property
    def all_documents(self) -> tuple[Document, ...]:
        """The documents to write: those named, and those that a destination takes."""
        needed: list[Document] = list(self.documents)
        for server in self.fhir:
            needed.append("fhir-r4" if server.version == "R4" else "fhir-r5")
        return tuple(dict.fromkeys(needed))

    def questions_for(self, modality: str, parts: Collection[str]) -> tuple[str, ...]:
        """What is asked of an image, each once; `parts` are by `header.body_parts`."""
        fitting = [part.ask for part in self.questions if part.fit(modality, parts)]
        return tuple(dict.fromkeys(question for ask in fitting for question in ask))

    def choices_for(self, questions: Collection[str]) -> dict[str, Sequence[str]]:
        """The answers that may be given to questions, by question; those of the rest are free."""
        named = {
            question: part.choices
            for part in reversed(self.questions)
            for question in part.ask
            if part.choices is not None
        }
        found = given_choices(questions, self.yes_no)
        return found | {each: named[each] for each in questions if each in named}

    def names(self, modality: str) -> bool:
        """Whether a question names the modality."""
        return any(part.modalities and _among(modality, part.modalities) for part in self.questions)


def load_configuration(path: Path) -> Configuration:
    """Read a configuration; relative paths in it are from its folder.

    Raises `InputError` that names the first wrong entry, or choices that cannot be chosen from.
    """
    try:
        text = path.read_text("utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InputError(*unreadable(f"The configuration {path}", error)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The configuration is not {'JSON' if path.suffix == '.json' else 'TOML'}.",
            str(error) or "Correct it.",
        ) from error
    try:
        found = Configuration.model_validate(values)
    except pydantic.ValidationError as error:
        raise _explained(error) from error
    for part in found.questions:
        choices_of(part.choices, "")
    home = path.parent.resolve()
    places = {"folder": home / found.folder, "audit": found.audit and home / found.audit}
    return found.model_copy(update=places)


def _explained(error: pydantic.ValidationError) -> InputError:
    first: Any = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    if first["type"] == "extra_forbidden":
        return InputError(f"The configuration has an unknown entry: {place}.", "Correct its name.")
    return InputError(f"The configuration is wrong at {place}.", f"{first['msg']}.")


def _among(value: str, wanted: Collection[str]) -> bool:
    return not wanted or value.strip().upper() in {each.strip().upper() for each in wanted}
