"""The bill of materials names every locked package and every file of the embedded models."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_lock import entries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sbom(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `.ci/sbom` writes, in this environment."""
    pytest.importorskip("cyclonedx", reason="needs cyclonedx-python-lib, of the extra dev")
    output = tmp_path_factory.mktemp("sbom") / "bom.json"
    command = [sys.executable, str(ROOT / ".ci/sbom.py"), str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    found: dict[str, Any] = json.loads(output.read_text("utf-8"))
    return found


def test_every_locked_package_is_named_with_its_hashes(sbom: dict[str, Any]) -> None:
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    packages = [each for each in sbom["components"] if each["type"] == "library"]
    named = {}
    for each in packages:
        references = each.get("externalReferences", ())
        contents = {found["content"] for part in references for found in part.get("hashes", ())}
        named[each["name"], each["version"]] = contents
    for entry, hashes in entries():
        known = named[entry.name, str(entry.specifier).removeprefix("==")]
        assert known == {one.strip().removeprefix("sha256:") for one in hashes}, entry.name
    assert {name for name, _ in named} - {entry.name for entry, _ in entries()} == {"torch"}


def test_every_file_of_the_embedded_models_is_named(sbom: dict[str, Any]) -> None:
    models = [each for each in sbom["components"] if each["type"] == "machine-learning-model"]
    named = {
        part["name"]: part["hashes"][0]["content"] for each in models for part in each["components"]
    }
    folder = ROOT / "medmoe_edge" / "embedded"
    files = [path for path in folder.glob("*/*") if path.parent.name != "__pycache__"]
    assert named == {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_the_same_gives_the_same_bytes_and_other_weights_another_serial_number(
    tmp_path: Path,
) -> None:
    pytest.importorskip("cyclonedx", reason="needs cyclonedx-python-lib, of the extra dev")
    for name in (".ci/run", ".ci/sbom.py", "medmoe_edge/_version.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    packages = re.split(r"^(?=\w)", (ROOT / "lock.txt").read_text("utf-8"), flags=re.MULTILINE)
    (tmp_path / "lock.txt").write_text("".join(packages[:4]), "utf-8")  # the schema takes its time
    embedded = tmp_path / "medmoe_edge" / "embedded"
    for folder in (ROOT / "medmoe_edge" / "embedded").glob("*-*"):
        for path in folder.iterdir():  # small files in place of the weights
            (embedded / folder.name).mkdir(parents=True, exist_ok=True)
            text = path.read_bytes() if path.name == "manifest.json" else b"small"
            (embedded / folder.name / path.name).write_bytes(text)

    def written(seed: int) -> bytes:
        output = tmp_path / "bom.json"
        command = [sys.executable, str(tmp_path / ".ci/sbom.py"), str(output)]
        env = os.environ | {"PYTHONHASHSEED": str(seed)}
        subprocess.run(command, check=True, capture_output=True, timeout=250, env=env)
        return output.read_bytes()

    first = written(1)
    assert written(2) == first
    weights = embedded / "nano-bundle" / "decoder.data"
    weights.write_bytes(b"other")
    serial, other = (json.loads(text)["serialNumber"] for text in (first, written(1)))
    assert serial != other
    assert serial.startswith("urn:uuid:")


def test_the_document_is_of_this_release(sbom: dict[str, Any]) -> None:
    from medmoe_edge._version import __version__

    about = sbom["metadata"]["component"]
    assert (about["name"], about["version"]) == ("medmoe-edge", __version__)
    needed = {each["ref"]: set(each.get("dependsOn", ())) for each in sbom["dependencies"]}
    assert needed[about["bom-ref"]] == {each["bom-ref"] for each in sbom["components"]}
    workflow = (ROOT / ".github/workflows/release.yml").read_text("utf-8")
    assert ".ci/sbom dist/" in workflow
