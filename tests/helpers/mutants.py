"""Bundles damaged on disk: weights changed in every graph that holds them, and sealed again."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medmoe_edge.bundle.bundle import MANIFEST, write_manifest

Array = npt.NDArray[Any]


def write_weights(folder: Path, weights: Mapping[str, Array]) -> None:
    """Put `weights` in the place of those of their names, also where experts are paged."""
    manifest = json.loads((folder / MANIFEST).read_text())
    paging = manifest.get("paging") or {"experts": {}}
    for path, owner in _graphs(folder, paging["experts"]):
        model = onnx.load(path, load_external_data=False)
        changed = False
        for tensor in model.graph.initializer:
            array = weights.get(owner + tensor.name)
            if array is None:
                continue
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                tensor.raw_data, changed = array.tobytes(), True
            elif not owner:
                place = {entry.key: entry.value for entry in tensor.external_data}
                with (folder / place["location"]).open("r+b") as file:
                    file.seek(int(place["offset"]))
                    file.write(np.ascontiguousarray(array).tobytes())
        if changed:
            path.write_bytes(model.SerializeToString())
    for owner, expert in paging["experts"].items():
        start, size = manifest["experts"][owner]
        content = (folder / "decoder.data").read_bytes()[start : start + size]
        expert["sha256"] = hashlib.sha256(content).hexdigest()
    reseal(folder, paging=manifest.get("paging") and paging)


def reseal(folder: Path, **changes: Any) -> None:
    """New hashes and a new seal: only numbers can tell what was changed. None takes a key away."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest = {key: value for key, value in manifest.items() if value is not None}
    for key in ("files", "seal", "format_version"):
        del manifest[key]
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest)


def _graphs(folder: Path, experts: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Graphs with what their weights' names lack: those of one expert say only its parts."""
    for path in sorted(folder.glob("*.onnx")):
        if not path.name.startswith("expert."):
            yield path, ""
    for owner, expert in experts.items():
        yield folder / expert["graph"], f"{owner}."
