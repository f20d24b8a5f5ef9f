"""The deployable folder: graphs, weights, tokenizer and a manifest that vouches for them.

    manifest.json    format, model configuration, quantisation, source, licence, every file's hash
    tokenizer.json
    embedding.npy    token embeddings [V, D], mapped rather than loaded
    vision.onnx      pixels [1, 3, S, S] -> image tokens [1, N, D]         (+ vision.data)
    decoder.onnx     one step of the decoder, KV cache written in place    (+ decoder.data)

The same checkpoint and options give the same bytes. Nothing in a bundle is ever unpickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import BundleError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
REQUIRED = ("format_version", "name", "config", "quantisation", "files", "source", "licence")
NOTICE = "Research demonstration, not a medical device: never base a clinical decision on it."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `sha256` is the manifest's own hash and so stands for the whole folder."""

    folder: Path
    manifest: Mapping[str, Any]
    config: ModelConfig
    sha256: str

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Self:
        """Read the manifest and, with `verify`, check size and hash of every file.

        Raises `BundleError` for anything missing, damaged, changed or of another version.
        """
        text = _read(folder / MANIFEST)
        manifest = _parse(folder, text)
        config = ModelConfig.from_json(manifest["config"], f"{MANIFEST} config")
        bundle = cls(folder, manifest, config, hashlib.sha256(text).hexdigest())
        if verify:
            for name in manifest["files"]:
                bundle._check_file(name)
        return bundle

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.manifest["name"])

    def path(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        if name not in self.manifest["files"]:
            raise BundleError(f"{self.folder} has no {name}.", "Export the model again.")
        return self.folder / name

    def _check_file(self, name: str) -> None:
        path, entry = self.folder / name, self.manifest["files"][name]
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                intact = size == entry["bytes"] and _sha256(file) == entry["sha256"]
        except OSError as error:
            raise BundleError(
                f"{path} cannot be read ({error.strerror}).", "Copy or export the bundle again."
            ) from error
        if not intact:
            raise BundleError(
                f"{path} was changed or is incomplete: it does not match the manifest.",
                "Copy or export the bundle again.",
            )


def write_manifest(folder: Path, contents: Mapping[str, Any]) -> None:
    """Hash every file of `folder` and write the manifest, the last file of a new bundle."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(file)}
    manifest = {"format_version": FORMAT_VERSION, **contents, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}).",
            "Give a bundle folder, made by: medmoe-edge export",
        ) from error


def _parse(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
        complete = all(key in manifest for key in REQUIRED)
        entries = [(e["bytes"], e["sha256"]) for e in manifest["files"].values()]
        plain = all("/" not in name and name not in (".", "..") for name in manifest["files"])
        sound = complete and plain and all(isinstance(size, int) for size, _ in entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        version, sound = FORMAT_VERSION, False
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{folder} is a bundle of format {version!r}, this version reads {FORMAT_VERSION}.",
            "Export the checkpoint again with this version.",
        )
    if not sound:
        raise BundleError(f"{folder / MANIFEST} is damaged.", "Copy or export the bundle again.")
    return dict(manifest)


def _sha256(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
