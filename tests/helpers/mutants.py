"""Verified bundles to damage on disk: weights changed in every graph, and sealed again."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image

from medmoe_edge.bundle.bundle import MANIFEST, Gates, write_manifest
from medmoe_edge.data.datasets import Example
from medmoe_edge.evaluation.verify import Data, verify

Array = npt.NDArray[Any]
PRECISIONS = ("int8", "int4", "fp32")
# Random models lose much in 8 bits: here the weights and the KL are to judge.
LENIENT = Gates(answer_agreement=0.0, accuracy_drop=1.0, routing_flips=1.0, vision_cosine=0.0)


def questions_about_noise(
    folder: Path, shapes: Sequence[tuple[int, ...]], texts: Sequence[str]
) -> list[Example]:
    """Every question about a picture of each shape; their files go to `folder`."""
    generator = np.random.default_rng(0)
    files = [folder / f"{index}.png" for index in range(len(shapes))]
    for file, shape in zip(files, shapes, strict=True):
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(file)
    rest: tuple[Any, ...] = ("no", "CLOSED", "ct", None, None, "test")
    return [Example(f"{text}{file.name}", file, text, *rest) for text in texts for file in files]


def verified_bundles(
    tiny_bundle: Callable[[str], Path], checkpoint: Path, examples: list[Example], root: Path
) -> dict[str, Path]:
    """A bundle of each precision with its record, and with inputs for `verify --quick`."""
    folders = {}
    for precision in PRECISIONS:
        folder = root / precision
        shutil.copytree(tiny_bundle(precision), folder)
        reseal(folder, gates=LENIENT.to_json())
        found = verify(folder, checkpoint, Data("questions", examples), inputs=examples)
        assert found.recorded
        folders[precision] = folder
    return folders


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
