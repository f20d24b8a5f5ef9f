"""A bundle opens only if it is what was exported; every damage is told in one line."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_files import ENDLESS, forbid_opening

from medmoe_edge.bundle import trust
from medmoe_edge.bundle.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    SEAL,
    Bundle,
    _seal,
    model_kind,
    write_manifest,
    write_verification,
)
from medmoe_edge.errors import BundleError, ModelError, ResourceError
from medmoe_edge.presets import PRESETS
from medmoe_edge.prompt import Tokenizer

CONTENTS: dict[str, Any] = {
    "name": "tiny",
    "config": PRESETS["tiny"].to_json(),
    "quantisation": {"precision": "fp32"},
    "source": {},
    "licence": "none",
}
FILES = {"decoder.onnx": b"graph", "decoder.data": bytes(5000), "tokenizer.json": b"{}"}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, CONTENTS | changes)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "bundle")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def opened(folder: Path) -> Bundle | str:
    """The bundle, or how it was refused; any other exception is a fault."""
    try:
        return Bundle.open(folder)
    except ModelError as error:
        return str(error)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_bundle_opens(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.name == "tiny"
    assert bundle.config == PRESETS["tiny"]
    assert bundle.path("decoder.onnx") == folder / "decoder.onnx"
    assert bundle.sha256 == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert bundle.manifest["format_version"] == FORMAT_VERSION
    assert bundle.manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in FILES.items()
    }
    with pytest.raises(BundleError, match=r"no vision\.onnx"):
        bundle.path("vision.onnx")


def test_the_manifest_depends_on_the_contents_alone(folder: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again")
    assert (again / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "flipped", "folder"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        changed = {"truncated": content[:-1], "longer": content + b"\0", "flipped": flipped}
        path.write_bytes(changed[damage])
    refused(folder, name)
    assert Bundle.open(folder, verify=False).name == "tiny"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"null", b'"text"', b"{}", b"\xff\xfe{", b"\x80\x04pickle."),
        *(b"[" * 100_000, b"9" * 10_000, b'{"format_version": 1}', b'{"format_version": "1"}'),
        *(b'{"format_version": [2]}', b'{"format_version": 1, "files": []}', b'{"files": {}}'),
    ],
)
def test_a_damaged_manifest_is_told(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    refused(folder, "damaged")


@pytest.mark.parametrize("version", [0, 2, 10**9, 1.5])
def test_another_format_version_is_told(folder: Path, version: float) -> None:
    edit(folder, lambda manifest: manifest.update(format_version=version))
    refused(
        folder, "damaged" if version == 1.5 else rf"format {version}\b.* reads {FORMAT_VERSION}"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["config"]["decoder"].update(layers=2),
        lambda manifest: manifest["files"]["decoder.onnx"].update(bytes=6),
        lambda manifest: manifest["files"].pop("decoder.data"),
        lambda manifest: manifest.update(name="another"),
        lambda manifest: manifest.update(intended_use="diagnosis"),
        lambda manifest: manifest.pop("seal"),
    ],
)
def test_an_edited_manifest_is_told(
    folder: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(folder, change)
    refused(folder, "edited")


@pytest.mark.parametrize("passed", [True, False])
def test_a_verification_is_kept_in_the_manifest(folder: Path, passed: bool) -> None:
    before = Bundle.open(folder)
    assert (before.verification, before.proof) == (None, "not measured")
    record = {"passed": passed, "figures": {"share": 0.1 + 0.2}}
    after = write_verification(before, record)
    assert Bundle.open(folder) == after
    assert after.verification == record
    assert after.proof == ("passed" if passed else "failed")
    assert after.sha256 == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert after.manifest["files"] == before.manifest["files"]
    assert write_verification(after, {"passed": True}).verification == {"passed": True}
    edit(folder, lambda manifest: manifest["verification"].update(passed=False))
    refused(folder, "edited")


def test_a_file_changed_after_verification_is_told(folder: Path) -> None:
    write_verification(Bundle.open(folder), {"passed": True})
    (folder / "decoder.data").write_bytes(bytes(4999) + b"1")
    refused(folder, r"decoder\.data")


@pytest.mark.parametrize("record", [None, [], "passed", {}, {"passed": 1}, {"passed": "true"}])
def test_a_sealed_verification_of_another_form_is_damage(folder: Path, record: Any) -> None:
    write(folder, verification=record)
    refused(folder, "damaged")


def test_a_verification_that_cannot_be_written_leaves_the_old_manifest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(folder)
    content = (folder / MANIFEST).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_verification(bundle, {"passed": True})
    assert (folder / MANIFEST).read_bytes() == content
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *FILES}


@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_not_to_be_exported_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    forbid_opening(monkeypatch, name)
    refused(folder, rf"{name} cannot be opened: permission denied. Check the path and its perm")


@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.json"])
@pytest.mark.parametrize("make", ENDLESS)
def test_what_would_never_be_read_to_its_end_is_refused(
    folder: Path, make: Callable[[Path], None], name: str
) -> None:
    """A pipe that nobody writes to would be waited for."""
    (folder / name).unlink()
    make(folder / name)
    what = "cannot be opened: it is no regular file" if name == MANIFEST else "was changed"
    refused(folder, rf"{name} {what}")
    with pytest.raises(ModelError, match=r"no regular file|The tokenizer tokenizer\.json cannot"):
        model_kind(folder) if name == MANIFEST else Tokenizer.from_file(folder / name)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    refused(tmp_path, "manifest.json cannot be read")
    refused(tmp_path / "absent", "manifest.json cannot be read")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "manifest.json cannot be read")
    (tmp_path / MANIFEST).mkdir()
    refused(tmp_path, "manifest.json cannot be read")


def seal(folder: Path, files: dict[str, Any]) -> None:
    """Write a manifest with a valid seal, as an attacker would."""
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, **CONTENTS, "files": files}
    manifest[SEAL] = _seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "C:", "a\0b"),
        *("a\nb", "\ud800", "é", "a" * 10 + "/"),
    ],
)
def test_a_file_name_leads_nowhere_else(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    seal(folder, {name: entry})
    refused(folder, "damaged")
    (folder / "secret").write_bytes(b"secret")
    seal(folder, {"secret": entry})
    assert Bundle.open(folder).path("secret").read_bytes() == b"secret"


@pytest.mark.parametrize(
    "entry", [None, {}, [], 5, {"bytes": "5", "sha256": ""}, {"bytes": 5, "sha256": None}]
)
def test_a_file_entry_of_another_form_is_damage(folder: Path, entry: Any) -> None:
    seal(folder, {"decoder.onnx": entry})
    refused(folder, "damaged")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2**16), byte=st.binary(min_size=0, max_size=3), drop=st.integers(0, 3))
def test_any_changed_byte_of_the_manifest_is_told(
    folder: Path, place: int, byte: bytes, drop: int
) -> None:
    original = write(folder).joinpath(MANIFEST).read_bytes()
    place %= len(original)
    content = original[:place] + byte + original[place + drop :]
    (folder / MANIFEST).write_bytes(content)
    result = opened(folder)
    if isinstance(result, Bundle):  # white space, or the same bytes
        assert result.manifest == json.loads(original)
    else:
        assert "\n" not in result


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.sampled_from(["vision", "decoder", "moe", "config"]), data=st.data(), value=JSON)
def test_a_sealed_but_impossible_configuration_is_a_model_error(
    tmp_path: Path, part: str, data: st.DataObject, value: Any
) -> None:
    config = PRESETS["tiny"].to_json()
    inner = config if part == "config" else config[part]
    inner[data.draw(st.sampled_from(sorted(inner)))] = value
    folder = write(tmp_path / "bundle", config=config)
    result = opened(folder)
    if isinstance(result, Bundle):
        assert result.config.to_json() == config
    else:
        assert "\n" not in result


def test_a_large_file_is_hashed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "LARGE", 5000)
    monkeypatch.setattr(trust, "SETTLED", 0)
    hashed: list[str] = []

    def digest(file: Any, algorithm: str) -> Any:
        hashed.append(Path(file.name).name)
        return real(file, algorithm)

    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", digest)
    Bundle.open(folder)
    assert sorted(hashed) == sorted(FILES)
    Bundle.open(folder)
    assert hashed.count("decoder.data") == 1
    assert hashed.count("decoder.onnx") == 2
    (folder / "decoder.data").write_bytes(bytes(4999) + b"1")
    refused(folder, r"decoder\.data was changed")
