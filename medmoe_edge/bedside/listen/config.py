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

    [[findings]]                   # what a question asks for, in codes
    ask = ["Is there a pleural effusion?"]           # yes: it is there, no: it is not
    code = ["60046008", "SCT", "Pleural effusion"]
    site = ["3120008", "SCT", "Pleural structure"]

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

Also `[[stow]]` and `[[hl7]]` as destinations, `[[sources]]` to fetch studies from, `[tls]` for the
node's port and `[http]` for its figures, its health and STOW-RS.
"""

import json
import socket
import ssl
import tomllib
import urllib.parse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import pydantic

from medmoe_edge._types import once
from medmoe_edge.bedside.listen.header import body_parts
from medmoe_edge.bedside.serve.settings import is_loopback, no_password, plain_address
from medmoe_edge.engine.answer import choices_of, given_choices
from medmoe_edge.errors import InputError, ResourceError, is_host, unreadable

Document = Literal[
    "picture", "comprehensive-3d-sr", "basic-text-sr", "heat-map", "fhir-r4", "fhir-r5", "hl7-v2"
]

# PS3.5, table 6.2-1: no control characters, no backslash, not only spaces; ASCII by default.
AETitle = Annotated[str, pydantic.Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]
Whole = Annotated[int, pydantic.Strict()]  # else true would be 1
Seconds = Annotated[float, pydantic.Strict(), pydantic.Field(ge=0, le=366 * 86_400)]
Port = Annotated[Whole, pydantic.Field(ge=1, le=65535)]
Question = Annotated[str, pydantic.Field(min_length=1, max_length=1000, pattern=r"\S")]


def _from_home(path: Path, info: pydantic.ValidationInfo) -> Path:
    """From the configuration's folder, not from where the node is started."""
    return Path((info.context or {}).get("home", "")) / path


def _named(path: object) -> object:
    if path == "":
        raise ValueError("it is empty, which would mean the configuration's folder")
    return path


def _host(name: str) -> str:
    if not is_host(name):
        raise ValueError(f"{name!r} is no name or address of a host")
    return name


Host = Annotated[str, pydantic.AfterValidator(_host)]
Address = Annotated[pydantic.IPvAnyAddress, pydantic.AfterValidator(plain_address)]
File = Annotated[Path, pydantic.BeforeValidator(_named), pydantic.AfterValidator(_from_home)]
# Those of BCP 195 (RFC 9325, 4.2) that OpenSSL has below TLS 1.3, whose own are all good.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Peer(_Part):
    """An application that may send; `hosts` are its addresses as numbers, any where left out."""

    ae_title: AETitle
    hosts: tuple[Address, ...] = pydantic.Field((), min_length=1)


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


class Code(NamedTuple):
    """A coded concept (PS3.3, 8.8): its value, its scheme's designator, its meaning in words."""

    value: Annotated[str, pydantic.Field(pattern=r"^[!-\[\]-~]{1,16}$")]
    scheme: Annotated[str, pydantic.Field(pattern=r"^[!-\[\]-~]{1,16}$")]
    meaning: Annotated[str, pydantic.Field(pattern=r"^[^\\\x00-\x1f]{1,64}$")]


class Finding(_Part):
    """What questions ask for the presence of: "yes" says that it is there, "no" that it is not.

    `ask` are the very questions, as none can be understood from its words ("Is the effusion
    smaller?"). `same` are codes of other schemes for the same, `site` is where it is.
    """

    ask: tuple[Question, ...] = pydantic.Field(min_length=1)
    code: Code
    same: tuple[Code, ...] = ()
    site: Code | None = None


class Certainty(_Part):
    """From which confidence of an answer on its finding is coded as probable, or at all.

    That is the chance that the answer is right where the bundle is calibrated, and else the model's
    own probability of its words. Nothing is ever coded as certain. Below `possible` it is
    undetermined whether a finding is there.
    """

    probable: pydantic.StrictFloat = pydantic.Field(default=0.9, ge=0, le=1)
    possible: pydantic.StrictFloat = pydantic.Field(default=0.5, ge=0, le=1)


class Series(_Part):
    """How objects are brought together, and which of a series are asked.

    A series is complete when nothing of it has come for `quiet` seconds, or as soon as it has
    `expected` objects that may be asked about (0: as many instances as the objects say, if they
    do, with those that are set aside). `slices` are the middle one, those that key objects of the
    study name, `every` so-many-th, or all; several answers are brought together by a vote. Images
    are kept for `linger` seconds after the result, to answer a late object together with them.
    """

    quiet: Seconds = 10.0
    expected: Whole = pydantic.Field(default=0, ge=0)
    slices: Literal["middle", "key", "every", "all"] = "middle"
    every: Whole = pydantic.Field(default=10, ge=1)
    linger: Seconds = 600.0


class Identifiers(_Part):
    """The systems (URIs) of the identifiers in FHIR documents; left out: none is given."""

    patient: str | None = pydantic.Field(default=None, min_length=1)
    accession: str | None = pydantic.Field(default=None, min_length=1)


class _ServerContext(ssl.SSLContext):
    """Shakes hands when it first reads: a silent client must not hold up those that come after."""

    def wrap_socket(self, sock: socket.socket, *args: Any, **options: Any) -> ssl.SSLSocket:
        """As the base class does, but for the handshake."""
        return super().wrap_socket(sock, *args, **options | {"do_handshake_on_connect": False})


class Tls(_Part):
    """Files in PEM: this node's certificate and key, and the authority that the others' are from.

    TLS 1.2 and 1.3 with the ciphers of BCP 195 (PS3.15, B.12 and B.13). Without an authority a
    server is trusted as this machine trusts it, and no certificate is asked of clients.
    """

    certificate: File | None = None
    key: File | None = None
    authority: File | None = None

    def client(self) -> ssl.SSLContext:
        """For calling others; raises `InputError` for files of no use."""
        return self._prepared(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def server(self) -> ssl.SSLContext:
        """For being called; raises `InputError` for files of no use."""
        return self._prepared(_ServerContext(ssl.PROTOCOL_TLS_SERVER))

    def _prepared(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        try:
            if self.authority is not None:
                context.load_verify_locations(self.authority)
                context.verify_mode = ssl.CERT_REQUIRED  # of clients too
            elif context.protocol == ssl.PROTOCOL_TLS_CLIENT:
                context.load_default_certs()
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password=no_password)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The certificates under tls cannot be used ({type(error).__name__}).",
                "Give PEM files that belong together, the key without a password.",
            ) from error
        return context


def without_secrets(name: str) -> str:
    """A destination's name as others may see it: its URL without user, password and query."""
    if not name.startswith(("http", "stow+http")):
        return name
    parts = urllib.parse.urlsplit(name)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


class _Remote(_Part):
    """Whoever is called."""

    tls: Tls | None = None

    @property
    def name(self) -> str:
        """By which the queue knows it."""
        raise NotImplementedError

    @property
    def shown(self) -> str:
        """For a log and for figures: its name without what is secret in a URL."""
        return without_secrets(self.name)


class _Node(_Remote):
    host: Host
    port: Port


class DicomDestination(_Node):
    """A node that the DICOM documents are sent to.

    With `commitment` it is asked to say that it keeps them (Storage Commitment), which it does in
    an association of its own: it must be among the peers.
    """

    ae_title: AETitle
    commitment: bool = False

    @property
    def name(self) -> str:
        return f"dicom://{self.ae_title}@{self.host}:{self.port}"


class _Web(_Remote):
    """A server's base URL; `token_file` holds a bearer token."""

    url: pydantic.HttpUrl
    token_file: File | None = None

    @pydantic.model_validator(mode="after")
    def _has_a_host_and_keeps_its_token(self) -> Self:
        _host(self.url.host or "")
        if self.token_file and self.url.scheme == "http" and not is_loopback(self.url.host or ""):
            raise ValueError("A token would cross the network unencrypted: write https.")
        return self

    @property
    def name(self) -> str:
        return str(self.url)

    def headers(self) -> dict[str, str]:
        """With the token, if there is one; raises `ResourceError` where it is not there now."""
        if self.token_file is None:
            return {}
        try:
            token = self.token_file.read_text("utf-8").strip()
        except OSError as error:
            raise ResourceError(*unreadable("its token_file", error)) from error
        return {"Authorization": f"Bearer {token}"}


class FhirDestination(_Web):
    """A FHIR server that transactions are posted to."""

    version: Literal["R4", "R5"]


class StowDestination(_Web):
    """A DICOMweb server that the DICOM documents are sent to by STOW-RS.

    Its name in the queue begins otherwise than a FHIR server's at the same address.
    """

    @property
    def name(self) -> str:
        return f"stow+{self.url}"


class Hl7Destination(_Node):
    """Who takes messages of HL7 version 2 by MLLP; `application` and `facility` go into MSH."""

    application: str = ""
    facility: str = ""

    @property
    def name(self) -> str:
        return f"mllp://{self.host}:{self.port}"


Destination = DicomDestination | StowDestination | FhirDestination | Hl7Destination


class DicomSource(_Node):
    """A node that studies are fetched from: by C-MOVE, which has it send them here, or C-GET."""

    ae_title: AETitle
    retrieve: Literal["move", "get"] = "move"

    @property
    def name(self) -> str:
        return self.ae_title


class WebSource(_Web):
    """A DICOMweb server that studies are fetched from by QIDO-RS and WADO-RS."""


Source = DicomSource | WebSource


class Log(_Part):
    """A file for the log in place of stderr: `keep` old ones beside it, each of `max_mb`."""

    file: File
    max_mb: Whole = pydantic.Field(10, ge=1)
    keep: Whole = pydantic.Field(5, ge=1)


class Http(_Part):
    """The node's own HTTP port: its figures, its health, and STOW-RS at `/studies`.

    `token_file` is as of `serve`. Others than this machine need a token and TLS.
    """

    host: Host = "127.0.0.1"
    port: Whole = pydantic.Field(11180, ge=0, le=65535)
    token_file: File | None = None
    tls: Tls | None = None

    @pydantic.model_validator(mode="after")
    def _others_need_a_token(self) -> Self:
        if not self.is_local and (self.token_file is None or self.tls is None):
            raise ValueError("Others than this machine can reach it: give token_file and tls.")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


class Configuration(_Part):
    """All of it. Sizes in millions of bytes.

    `folder` holds what was received until it is answered (for good with `keep_images`), the queue,
    the documents and, unless `audit` names another file, the audit log. `reserve_mb` of the disk
    stay free, and the folder never holds more than `quota_mb`: what would not fit is refused.
    Documents that were sent or are sent nowhere, and images that are kept, go after `keep_days`.
    `allow_burned_in` also takes pixels marked as showing text. `heat_map_model` is what draws the
    document "heat-map"; "picture" is a Secondary Capture of exactly what the model saw, to which
    the reports then refer.
    With `yes_no`, questions that ask for yes or no are answered with one of them; with
    `allow_repetition`, an answer that repeats itself goes on.
    """

    ae_title: AETitle = "MEDMOE"
    host: Host = "127.0.0.1"
    port: Whole = pydantic.Field(11112, ge=0, le=65535)  # 0: any that is free
    tls: Tls | None = None
    http: Http | None = None
    folder: File
    model: str = "nano"
    memory_budget: str | None = None
    drop_pages: bool = False
    max_new_tokens: Whole = pydantic.Field(32, ge=1)
    allow_repetition: bool = False
    yes_no: bool = True
    heat_map_model: str = "modality-nano"
    peers: tuple[Peer, ...] = pydantic.Field(min_length=1)
    questions: tuple[Questions, ...] = pydantic.Field(min_length=1)
    findings: tuple[Finding, ...] = ()
    certainty: Certainty = Certainty()
    documents: tuple[Document, ...] = ("comprehensive-3d-sr",)
    dicom: tuple[DicomDestination, ...] = ()
    stow: tuple[StowDestination, ...] = ()
    fhir: tuple[FhirDestination, ...] = ()
    hl7: tuple[Hl7Destination, ...] = ()
    sources: tuple[Source, ...] = ()
    series: Series = Series()
    identifiers: Identifiers = Identifiers()
    audit: File | None = None
    log: Log | None = None
    reserve_mb: Whole = pydantic.Field(1000, ge=0)
    quota_mb: Whole = pydantic.Field(0, ge=0)  # 0: none
    keep_days: Whole = pydantic.Field(0, ge=0)  # 0: for good
    max_object_mb: Whole = pydantic.Field(1000, ge=1)
    max_associations: Whole = pydantic.Field(10, ge=1)
    timeout: Seconds = pydantic.Field(30.0, gt=0, le=86_400)  # that a peer may keep silent
    allow_burned_in: bool = False
    keep_images: bool = False

    @pydantic.model_validator(mode="after")
    def _findings_are_asked(self) -> Self:
        asked = {question for part in self.questions for question in part.ask}
        coded = [question for finding in self.findings for question in finding.ask]
        for question in coded:
            if question not in asked:
                raise ValueError(f"A finding is of a question that is not asked: {question!r}")
            if coded.count(question) > 1:
                raise ValueError(f"A question is of two findings: {question!r}")
        return self

    @pydantic.model_validator(mode="after")
    def _who_commits_may_call(self) -> Self:
        peers = {peer.ae_title for peer in self.peers}
        for node in self.dicom:
            if node.commitment and node.ae_title not in peers:
                raise ValueError(
                    f"{node.ae_title} is asked for storage commitment, and its answer is an "
                    "association of its own: name it under peers too"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _each_has_a_name_of_its_own(self) -> Self:
        """By which the queue knows a destination, and a person a source."""
        for names in ([d.name for d in self.destinations], [s.shown for s in self.sources]):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{without_secrets(name)} is there twice: name it once")
        return self

    @property
    def audit_log(self) -> Path:
        """Where every answer is logged."""
        return self.audit or self.folder / "audit.jsonl"

    def finding(self, question: str) -> Finding | None:
        """What a question asks for the presence of, if that has a code."""
        return next((each for each in self.findings if question in each.ask), None)

    def source(self, name: str) -> Source:
        """The source of that name, or the first where it is empty; raises `InputError`."""
        for source in self.sources:
            if name in ("", source.shown):
                return source
        known = ", ".join(each.shown for each in self.sources)
        if not known:
            raise InputError("No source of studies is configured.", "Name one under [[sources]].")
        raise InputError("No source of studies has that name.", f"Configured: {known}.")

    @property
    def destinations(self) -> tuple[Destination, ...]:
        """All of them."""
        return (*self.dicom, *self.stow, *self.fhir, *self.hl7)

    @property
    def committing(self) -> frozenset[str]:
        """The names of those that are asked to say that they keep what they have."""
        return frozenset(node.name for node in self.dicom if node.commitment)

    @property
    def all_documents(self) -> tuple[Document, ...]:
        """The documents to write: those named, and those that a destination takes."""
        needed: list[Document] = list(self.documents)
        needed += ["fhir-r4" if each.version == "R4" else "fhir-r5" for each in self.fhir]
        if self.hl7:
            needed.append("hl7-v2")
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
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = path.read_text("utf-8-sig")
        values = json.loads(text, object_pairs_hook=once) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise InputError(*unreadable(f"The configuration {path}", error)) from error
    except (ValueError, RecursionError) as error:
        what = f"The configuration is not {kind}."
        raise InputError(what, str(error) or "Correct it.") from error
    try:
        found = Configuration.model_validate(values, context={"home": path.parent.resolve()})
    except pydantic.ValidationError as error:
        raise _explained(error) from error
    for part in found.questions:
        choices_of(part.choices, "")
    return found


def _explained(error: pydantic.ValidationError) -> InputError:
    first: Any = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    if first["type"] == "extra_forbidden":
        return InputError(f"The configuration has an unknown entry: {place}.", "Correct its name.")
    return InputError(f"The configuration is wrong at {place}.", f"{first['msg']}.")


def _among(value: str, wanted: Collection[str]) -> bool:
    return not wanted or value.strip().upper() in {each.strip().upper() for each in wanted}
