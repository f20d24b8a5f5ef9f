"""A result as HL7 has it: a FHIR transaction, R4 or R5, or a message of version 2 (ORU^R01).

Preliminary, as nobody has verified it; the patient, study and order are named by their identifiers.
A result without a patient's number is not written, as nobody could tell whose it is.

The transaction is of DiagnosticReport, Observation and Device, each created only where the server
has none with its identifier: it may be sent twice. Validated as R4B (4.3), which leaves these as R4
has them, and as R5. The message is of version 2.5.1, in UTF-8, with the same control ID each time.
"""

import datetime
import json
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from fhir.resources.bundle import Bundle
from fhir.resources.R4B.bundle import Bundle as BundleR4B

from medmoe_edge._version import __version__
from medmoe_edge.bedside.listen.config import Code, Identifiers
from medmoe_edge.bedside.listen.evidence import CERTAINTY, ISSUER, NAMESPACE, Result, device_uid
from medmoe_edge.bedside.listen.header import UNIVERSAL_ISSUER, text_of

Version = Literal["R4", "R5"]
Resource = dict[str, Any]
DICOM = "urn:dicom:uid"
WARNINGS = f"urn:uuid:{uuid.uuid5(NAMESPACE, 'warnings')}"  # the system of the warnings' codes
TERMINOLOGY = "http://terminology.hl7.org/CodeSystem"
RADIOLOGY = {"system": f"{TERMINOLOGY}/v2-0074", "code": "RAD"}
IMAGING = {"system": f"{TERMINOLOGY}/observation-category", "code": "imaging"}
ACCESSION = {"system": f"{TERMINOLOGY}/v2-0203", "code": "ACSN"}
NO_SYSTEMS = Identifiers()
REPORT = {"system": "http://loinc.org", "code": "18748-4", "display": "Diagnostic imaging study"}
SYSTEMS = {  # of the schemes' designators, PS3.16 table 8-1
    "SCT": "http://snomed.info/sct",
    "RADLEX": "http://radlex.org",
    "LN": "http://loinc.org",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
}


def fhir(result: Result, version: Version, systems: Identifiers = NO_SYSTEMS) -> bytes:
    """The transaction as JSON, about a patient who must have a number.

    Raises pydantic's `ValidationError` if it were not FHIR.
    """
    named = {**_subject(result, systems), **_order(result, systems), **_effective(result)}
    report = _report(result, version, named, systems)
    entries = [_device(result, version), _observation(result, named), report]
    bundle = {
        "resourceType": "Bundle",
        "type": "transaction",
        "entry": [_entry(result, resource) for resource in entries],
    }
    valid = (BundleR4B if version == "R4" else Bundle).model_validate(bundle)
    return valid.model_dump_json().encode()


def withdrawn(transaction: bytes) -> bytes:
    """The transaction that withdraws what an earlier one created: `entered-in-error`, by update."""
    bundle = json.loads(transaction)
    for entry in bundle["entry"]:
        resource = entry["resource"]
        if resource["resourceType"] == "Device":
            continue
        resource["status"] = "entered-in-error"
        url = f"{resource['resourceType']}?{entry['request']['ifNoneExist']}"
        entry["request"] = {"method": "PUT", "url": url}
    return json.dumps(bundle).encode()


def _entry(result: Result, resource: Resource) -> Resource:
    kind = resource["resourceType"]
    identifier = resource["identifier"][0]
    condition = f"identifier={identifier['system']}|{identifier['value']}"
    return {
        "fullUrl": f"urn:uuid:{result.uuid(kind)}",
        "resource": resource,
        "request": {"method": "POST", "url": kind, "ifNoneExist": condition},
    }


def _device(result: Result, version: Version) -> Resource:
    model = result.answer.model
    device: Resource = {
        "resourceType": "Device",
        "identifier": [_uid(device_uid(result.answer))],  # one for all answers of a model
        "status": "active",
        "version": [
            {"type": {"text": "medmoe-edge"}, "value": __version__},
            {"type": {"text": "SHA-256 of the model"}, "value": model["sha256"]},
        ],
        "note": [{"text": result.answer.notice}],
    }
    if version == "R4":
        device["deviceName"] = [{"name": model["name"], "type": "model-name"}]
        return device
    device["name"] = [{"value": model["name"], "type": "registered-name"}]
    return device


def _observation(result: Result, named: Resource) -> Resource:
    answer = result.answer
    observation: Resource = {
        "resourceType": "Observation",
        "identifier": [_uid(result.uid("Observation"))],
        "status": "preliminary",
        "category": [{"coding": [IMAGING]}],
        "code": {"text": answer.question},
        **_site(result),
        **named,
        "issued": result.when,
        "device": {"reference": f"urn:uuid:{result.uuid('Device')}"},
        "focus": [
            {"identifier": _uid(each.uid), "display": "The image"} for each in result.sources
        ],
        "derivedFrom": [_study(result)],
        "note": [{"text": text} for text in (*_warnings(result), answer.notice)],
        "component": [
            {
                "code": _concept(result.confidence.meaning, result.confidence),
                "valueQuantity": {
                    "value": round(answer.confidence, 6),
                    "system": "http://unitsofmeasure.org",
                    "code": "1",
                },
            },
            *_certainty(result),
            *(
                {
                    "code": {"text": "Warning"},
                    "valueCodeableConcept": {
                        "coding": [{"system": WARNINGS, "code": notice.code}],
                        "text": notice.message,
                    },
                }
                for notice in answer.warnings
            ),
        ],
    }
    if result.coded is not None:
        finding = result.coded.finding
        observation["code"] = _concept(answer.question, finding.code, *finding.same)
        value = _concept(answer.shown, result.coded.presence)
        return observation | {"valueCodeableConcept": value}
    if answer.text.strip():
        return observation | {"valueString": answer.shown}
    return observation | {"dataAbsentReason": {"text": "The model gave no answer."}}


def _site(result: Result) -> Resource:
    """Where the finding is looked for."""
    site = result.coded and result.coded.finding.site
    return {"bodySite": _concept(site.meaning, site)} if site else {}


def _certainty(result: Result) -> list[Resource]:
    found = result.coded and result.coded.certainty
    if not found:
        return []
    name = _concept(CERTAINTY.meaning, CERTAINTY)
    return [{"code": name, "valueCodeableConcept": _concept(found.meaning, found)}]


def _concept(text: str, *codes: Code) -> Resource:
    """In words and in codes; a code of an unknown scheme has no system."""
    coding = [
        ({"system": SYSTEMS[code.scheme]} if code.scheme in SYSTEMS else {})
        | {"code": code.value, "display": code.meaning}
        for code in codes
    ]
    return {"coding": coding, "text": text}


def _report(result: Result, version: Version, named: Resource, systems: Identifiers) -> Resource:
    answer = result.answer
    study = "imagingStudy" if version == "R4" else "study"
    return {
        "resourceType": "DiagnosticReport",
        "identifier": [_uid(result.uid("DiagnosticReport")), *_accession(result, systems)],
        "status": "preliminary",
        "category": [{"coding": [RADIOLOGY]}],
        "code": {"coding": [REPORT]},
        **named,
        "issued": result.when,
        study: [_study(result)],
        "result": [{"reference": f"urn:uuid:{result.uuid('Observation')}"}],
        "conclusion": "\n".join(
            (
                *_warnings(result),
                f"{answer.question} {answer.shown}",
                answer.notice,
            )
        ),
    }


def _warnings(result: Result) -> list[str]:
    return [f"Warning: {notice.message}" for notice in result.answer.warnings]


def _uid(uid: str) -> dict[str, str]:
    return {"system": DICOM, "value": f"urn:oid:{uid}"}


def _study(result: Result) -> Resource:
    uid = str(result.evidence.header.StudyInstanceUID)
    return {"type": "ImagingStudy", "identifier": _uid(uid)}


def _subject(result: Result, systems: Identifiers) -> Resource:
    """The patient by number."""
    values = result.evidence.values
    identifier: Resource = {"value": values["PatientID"]}
    if systems.patient:
        identifier["system"] = systems.patient
    if issuer := values["IssuerOfPatientID"].strip() or values[UNIVERSAL_ISSUER].strip():
        identifier["assigner"] = {"display": issuer}
    return {"subject": {"type": "Patient", "identifier": identifier}}


def _order(result: Result, systems: Identifiers) -> Resource:
    """The order, by the accession number that it was given."""
    orders = [
        {"type": "ServiceRequest", "identifier": identifier}
        for identifier in _accession(result, systems)
    ]
    return {"basedOn": orders} if orders else {}


def _accession(result: Result, systems: Identifiers) -> list[Resource]:
    number = result.evidence.values["AccessionNumber"]
    if not number.strip():
        return []
    identifier: Resource = {"type": {"coding": [ACCESSION]}, "value": number}
    return [identifier | ({"system": systems.accession} if systems.accession else {})]


def _effective(result: Result) -> Resource:
    """The time of the image, not of the answer; nothing where the image does not say."""
    return {"effectiveDateTime": result.evidence.taken} if result.evidence.taken else {}


CONTROLS = (*range(0x20), 0x7F)  # two of them end a segment or, in MLLP, the message
FIELDS = str.maketrans(
    {
        **{code: f"\\X{code:02X}\\" for code in CONTROLS},
        "\\": "\\E\\",
        "|": "\\F\\",
        "^": "\\S\\",
        "&": "\\T\\",
        "~": "\\R\\",
        "\n": "\\.br\\",
    }
)  # the escapes of section 2.7
LOCAL, LONGEST_ID = "99MEDMOE", 20  # characters of MSH-10


def oru(result: Result, ae_title: str) -> bytes:
    """The result as ORU^R01 of HL7 2.5.1, with statuses that say that nobody has verified it.

    Its patient must have a number. The node of `ae_title` is the sending facility; who receives it
    is `addressed` later.
    """
    values, answer = result.evidence.values, result.answer
    when, taken = _moment(result.when), _moment(result.evidence.taken)
    groups = filter(None, values["PatientName"].split("="))  # letters, ideographs, phonetic
    family, given, middle, prefix, suffix = [*next(groups, "").split("^"), *[""] * 5][:5]
    number = result.uuid("hl7-v2").replace("-", "")[-LONGEST_ID:]
    report = f"{REPORT['code']}^{REPORT['display']}^LN"
    order = escaped(values["AccessionNumber"])
    header = result.evidence.header
    kind = text_of(header[ISSUER][0], "UniversalEntityIDType").value if ISSUER in header else ""
    said = (values["IssuerOfPatientID"], values[UNIVERSAL_ISSUER], kind)
    issuer = "&".join(map(escaped, said)).rstrip("&")  # HD, section 2.A.33
    identifier = escaped(values["PatientID"]) + (f"^^^{issuer}" if issuer else "")
    name = "^".join(map(escaped, (family, given, middle, suffix, prefix))).rstrip("^")
    person = f"{name}||{escaped(values['PatientBirthDate'])}|{escaped(values['PatientSex'])}"
    lines = [
        f"MSH|^~\\&|medmoe-edge|{escaped(ae_title)}|||{when}||ORU^R01^ORU_R01|{number}|P|2.5.1"
        "||||||UNICODE UTF-8",
        f"PID|1||{identifier}||{person}",
        f"OBR|1||{order or number}|{report}|||{taken}|||||||||||{order}||||{when}||RAD|R",
    ]
    told = Counter[str]()
    for place, (kind, name, value) in enumerate(_observations(result), start=1):
        told[name] += 1
        which = f"{number[-8:]}.{told[name]}"  # of an order, two of one name and number are one
        lines.append(f"OBX|{place}|{kind}|{name}|{which}|{value}||||||R|||{taken}|||||")
    lines.append(f"NTE|1|L|{escaped(answer.notice)}")
    return "".join(f"{line.rstrip('|')}\r" for line in lines).encode("utf-8", "replace")


def addressed(message: bytes, application: str, facility: str) -> bytes:
    """A message to an application of a facility."""
    fields = message.decode().split("|")
    fields[4:6] = [escaped(application), escaped(facility)]
    return "|".join(fields).encode()


def oru_withdrawn(message: bytes) -> bytes:
    """The message that says that an earlier one was sent for the wrong object (status `W`)."""
    lines = []
    for line in message.decode().split("\r"):
        fields = line.split("|")
        if fields[0] == "OBX":
            fields[11] = "W"
        if fields[0] == "MSH":
            fields[9] = f"{fields[9][:-1]}W"
        lines.append("|".join(fields))
    return "\r".join(lines).encode()


def escaped(text: str) -> str:
    """A text as a field of version 2, without control characters; none is lost, nor a line."""
    return text.replace("\r\n", "\n").translate(FIELDS)


def _moment(when: str) -> str:
    """A time or date of ISO 8601 as version 2 has it, with its offset from UTC."""
    if "T" not in when:
        return when.replace("-", "")
    return datetime.datetime.fromisoformat(when).strftime("%Y%m%d%H%M%S%z")


def _observations(result: Result) -> Iterator[tuple[str, str, str]]:
    """Of each OBX its type, name and value."""
    answer = result.answer
    yield "ST", "110180^Study Instance UID^DCM", str(result.evidence.header.StudyInstanceUID)
    yield "TX", f"question^Question^{LOCAL}", escaped(answer.question)
    yield "TX", "121071^Finding^DCM", escaped(answer.shown)
    if result.coded is not None:
        finding = result.coded.finding
        yield "CWE", _element(finding.code, *finding.same[:1]), _element(result.coded.presence)
        if result.coded.certainty is not None:
            yield "CWE", _element(CERTAINTY), _element(result.coded.certainty)
    yield "NM", _element(result.confidence), f"{answer.confidence:.6g}"
    for notice in answer.warnings:
        yield "TX", f"warning^Warning^{LOCAL}", escaped(f"{notice.message} ({notice.code})")
    model = f"{answer.model['name']}, medmoe-edge {__version__}, sha256={answer.model['sha256']}"
    yield "TX", "111001^Algorithm Name^DCM", escaped(model)


def _element(*codes: Code) -> str:
    """A coded element: one code, and perhaps another for the same."""
    return "^".join(
        escaped(part) for each in codes for part in (each.value, each.meaning, each.scheme)
    )
