"""Engines built before, kept under the hash of all that they were built from.

A file is named `KEY-SHA256.engine`: its name vouches for its content, so one that was damaged is
seen, removed and built again.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import platformdirs

from medmoe_edge.atomic import atomic_file
from medmoe_edge.errors import ModelError

KEPT = 16  # engines; those used least recently go first

logger = logging.getLogger(__name__)


class EngineCache:
    """A folder of engines, by default in the user's own cache."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or platformdirs.user_cache_path("medmoe-edge") / "engines"

    def fetch(self, key: str, out: Path) -> bool:
        """Copy the engine of a key to `out`, whole or not at all; False where there is none."""
        for path in self.folder.glob(f"{key}-*.engine"):
            if sha256(path) != path.stem.partition("-")[2]:
                path.unlink(missing_ok=True)
                continue
            with path.open("rb") as source, atomic_file(out) as file:
                shutil.copyfileobj(source, file, 2**20)
            os.utime(path)  # used now
            return True
        return False

    def keep(self, key: str, engine: Path) -> None:
        """Put a copy of an engine into the cache, and remove what is too much.

        Where the cache cannot be written, that is logged: the engine itself is none the worse.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (
                engine.open("rb") as source,
                atomic_file(self.folder / f"{key}-{sha256(engine)}.engine") as file,
            ):
                shutil.copyfileobj(source, file, 2**20)
            by_age = sorted(self.folder.glob("*.engine"), key=lambda path: path.stat().st_mtime_ns)
            for path in by_age[:-KEPT]:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("The engine is not kept in %s (%s).", self.folder, error.strerror)


def engine_key(graph: Path, settings: Any) -> str:
    """The hash of a graph with its weights and of `settings` (JSON: GPU, profiles, version)."""
    parts = [json.dumps(settings, sort_keys=True), *map(sha256, graph_files(graph))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def graph_files(graph: Path) -> Sequence[Path]:
    """The ONNX file and the files of its weights; raises `ModelError` if one cannot be read."""
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's errors share no base with those of the file system
        raise ModelError(f"{graph} is no ONNX graph.", "Export the model again.") from error
    locations = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [graph, *(graph.parent / name for name in sorted(locations))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{graph} lacks its weights, {missing[0]}.", "Copy or export the whole folder again."
        )
    return files


def sha256(path: Path) -> str:
    """A file's hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
