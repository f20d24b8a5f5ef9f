"""A result as FHIR: a transaction of DiagnosticReport, Observation and Device, in R4 or R5.

Preliminary, as nobody has verified it. Each resource carries an identifier and is only created
where the server has none with it, so that the transaction may be sent twice. The patient, study and
order are named by their identifiers alone, in the systems that the configuration names; a result
without a patient's number is not written, as nobody could tell whose it is. Validated as R4B (4.3),
which leaves these resources as R4 has them, and as R5.
"""

import json
import uuid
from typing import Any, Literal

from fhir.resources.bundle import Bundle
from fhir.resources.R4B.bundle import Bundle as BundleR4B

from medmoe_edge._version import __version__
from medmoe_edge.bedside.listen.config import Identifiers
from medmoe_edge.bedside.listen.evidence import NAMESPACE, Result, device_uid

Version = Literal["R4", "R5"]
Resource = dict[str, Any]
DICOM = "urn:dicom:uid"
WARNINGS = f"urn:uuid:{uuid.uuid5(NAMESPACE, 'warnings')}"  # the system of the warnings' codes
RADIOLOGY = {"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RAD"}
IMAGING = {
    "system": "http://terminology.hl7.org/CodeSystem/observation-category",
    "code": "imaging",
}
ACCESSION = {"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}
NO_SYSTEMS = Identifiers()
REPORT = {"system": "http://loinc.org", "code": "18748-4", "display": "Diagnostic imaging study"}


def fhir(result: Result, version: Version, systems: Identifiers = NO_SYSTEMS) -> bytes:
    """The transaction as JSON; raises pydantic's `ValidationError` if it were not FHIR.

    Args:
        result: What is reported; its patient must have a number.
        version: Of FHIR.
        systems: Of the identifiers.
    """
    named = {**_subject(result, systems), **_order(result, systems), **_effective(result)}
    entries = [
        _device(result, version),
        _observation(result, named),
        _report(result, version, named, systems),
    ]
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
        condition = entry["request"]["ifNoneExist"]
        url = f"{resource['resourceType']}?{condition}"
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
                "code": {"text": "Model's own probability of its answer"},
                "valueQuantity": {
                    "value": round(answer.confidence, 6),
                    "system": "http://unitsofmeasure.org",
                    "code": "1",
                },
            },
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
    if answer.text:
        return observation | {"valueString": answer.shown}
    return observation | {"dataAbsentReason": {"text": "The model gave no answer."}}


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
    if issuer := values["IssuerOfPatientID"]:
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
    if not number:
        return []
    identifier: Resource = {"type": {"coding": [ACCESSION]}, "value": number}
    return [identifier | ({"system": systems.accession} if systems.accession else {})]


def _effective(result: Result) -> Resource:
    """The time of the image, not of the answer; nothing where the image does not say."""
    return {"effectiveDateTime": result.evidence.taken} if result.evidence.taken else {}
