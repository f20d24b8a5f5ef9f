"""What `.ci/sbom` runs: lock.txt, torch and the embedded models as a CycloneDX document."""

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclonedx.model import (
    ExternalReference,
    ExternalReferenceType,
    HashAlgorithm,
    HashType,
    Property,
    XsUri,
)
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "medmoe_edge" / "embedded"
MODELS = ("nano", "modality-nano")
CARDS = {"nano": "docs/reference/nano.md", "modality-nano": "docs/reference/modality-nano.md"}
OURS = "medmoe-edge"  # the prefix of our properties


def version_of(name: str, text: str, pattern: str) -> str:
    """A version that a file of the project states; it ends here where none is."""
    found = re.search(pattern, text)
    if found is None:
        sys.exit(f"{name} states no version.")
    return found[1]


def packages() -> Iterator[Component]:
    """Every package of lock.txt, with the hashes of all files that may be installed of it."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "lock.txt").read_text("utf-8"))
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        stated, *hashes = line.split(" --hash=sha256:")
        found = Requirement(stated)
        version = str(found.specifier).removeprefix("==")
        files = ExternalReference(
            type=ExternalReferenceType.DISTRIBUTION,
            url=XsUri(f"https://pypi.org/project/{found.name}/{version}/"),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=each.strip()) for each in hashes],
        )
        yield Component(
            name=found.name,
            version=version,
            bom_ref=f"{found.name}=={version}",
            purl=PackageURL("pypi", None, found.name, version),
            description=f"Only where {found.marker}" if found.marker else "",
            external_references=[files],
        )


def torch() -> Component:
    """It is in no lock: the version is the one that CI installs."""
    version = version_of(".ci/run", (ROOT / ".ci/run").read_text("utf-8"), r"torch==([\d.]+)")
    return Component(
        name="torch",
        version=version,
        bom_ref="torch",
        purl=PackageURL("pypi", None, "torch", version),
        description="Not in lock.txt: every platform has a build of its own, with CUDA or without.",
    )


def models(version: str) -> Iterator[Component]:
    """The embedded models, each as a bundle and as the checkpoint that it was made from."""
    for name in MODELS:
        for form in ("bundle", "checkpoint"):
            folder = EMBEDDED / f"{name}-{form}"
            yield Component(
                name=f"{name}-{form}",
                version=version,
                type=ComponentType.MACHINE_LEARNING_MODEL,
                bom_ref=f"{name}-{form}",
                description="Research demonstration, not a medical device.",
                licenses=[DisjunctiveLicense(name="research use only, see the model card")],
                external_references=[
                    ExternalReference(type=ExternalReferenceType.MODEL_CARD, url=XsUri(CARDS[name]))
                ],
                components=list(files(folder)),
                properties=list(facts(folder)),
            )


def files(folder: Path) -> Iterator[Component]:
    """A model's files with their hashes."""
    for path in sorted(folder.iterdir()):
        place = path.relative_to(ROOT).as_posix()
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        yield Component(
            name=place,
            type=ComponentType.FILE,
            bom_ref=place,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
        )


def facts(folder: Path) -> Iterator[Property]:
    """What a bundle's manifest says of its origin and its verification."""
    path = folder / "manifest.json"
    if not path.exists():
        return
    manifest = json.loads(path.read_text("utf-8"))
    record = manifest.get("verification") or {}
    told = {
        "precision": manifest["quantisation"]["precision"],
        "checkpoint_sha256": manifest["source"]["checkpoint_sha256"],
        "verification_passed": json.dumps(record.get("passed")),
        "verified": record.get("when", ""),
    }
    for name, value in told.items():
        yield Property(name=f"{OURS}:{name}", value=str(value))


def serial_number(document: dict[str, Any]) -> str:
    """From all that a document without one says: the same has the same, and nothing else has."""
    said = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{OURS} {said}").urn


def main(output: Path) -> None:
    """Write the document, unless it breaks the standard's schema."""
    text = (ROOT / "medmoe_edge/_version.py").read_text("utf-8")
    version = version_of("medmoe_edge/_version.py", text, r'__version__ = "([^"]+)"')
    bom = Bom(components=[*packages(), torch(), *models(version)])
    bom.metadata.component = Component(
        name=OURS,
        version=version,
        type=ComponentType.APPLICATION,
        bom_ref=OURS,
        licenses=[DisjunctiveLicense(id="Apache-2.0")],
    )
    bom.register_dependency(bom.metadata.component, bom.components)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["metadata"]["timestamp"]  # the same bytes each time
    del document["serialNumber"]  # made by chance
    document["serialNumber"] = serial_number(document)
    written = json.dumps(document, indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(written):
        sys.exit(f"The document breaks the schema: {error}")
    output.write_text(written + "\n", "utf-8")
    print(f"{output}: {len(bom.components):,} components")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
