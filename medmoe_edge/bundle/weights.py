"""Every float weight of a bundle read and looked at: is it finite, and no scale zero?

The graphs say where their weights lie. They are read as what they are, protobuf, because the base
install has ONNX Runtime alone, which does not show weights (wire format: protobuf.dev, encoding;
field numbers: onnx.proto).
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import BundleError

NODE, GRAPH, INITIALIZER = 1, 7, 5  # of a graph; of a model; of a graph
INPUT, OP_TYPE, ATTRIBUTE, SUBGRAPH = 1, 4, 5, 6  # of a node; of an attribute
DIMS, DATA_TYPE, FLOAT_DATA, NAME, RAW_DATA, EXTERNAL_DATA = 1, 2, 4, 8, 9, 13  # of a tensor
KEY, VALUE = 1, 2  # of an entry of its external data
FLOATS: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}
INTEGERS: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint8), 3: np.dtype(np.int8)}


def sweep_weights(bundle: Bundle) -> list[str]:
    """Names of the float weights that are not finite, and of the scales (`*.scale`) that hold a 0.

    The bundle's hashes must have been checked.
    """
    table = np.load(bundle.path("embedding.npy"), mmap_mode="r", allow_pickle=False)
    graphs = (float_weights(bundle.path(f"{name}.onnx")) for name in ("vision", "decoder"))
    weights = itertools.chain([("embedding", table)], *graphs)
    return [name for name, array in weights if not _sound(name, array)]


def check_scales(bundle: Bundle) -> None:
    """Raise `BundleError` for scales that are not finite or 0: answers would be garbage, silently.

    Cheap enough for every load: there is one scale for many weights.
    """
    graphs = (float_weights(bundle.path(f"{name}.onnx")) for name in ("vision", "decoder"))
    for name, array in itertools.chain(*graphs):
        if name.endswith(".scale") and not _sound(name, array):
            raise BundleError(
                f"{bundle.folder} has scales that cannot be, in {name}.",
                "Export the checkpoint again, or check it with: medmoe-edge verify",
            )


def float_weights(graph: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Name and values, flat, of every float initializer of an ONNX file; external ones mapped."""
    for name, array in _initializers(graph, FLOATS):
        yield name, array.ravel()


def stored_weights(graph: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every initializer of floats or of 8-bit integers, in its shape; external ones mapped."""
    yield from _initializers(graph, FLOATS | INTEGERS)


def int8_products(graph: Path) -> Iterator[tuple[str, npt.NDArray[np.int8]]]:
    """Name and values `[K, N]` of every signed weight that a `DynamicQuantizeMatMul` reads."""
    model = dict(_fields(memoryview(graph.read_bytes())))
    read = set(_read_by("DynamicQuantizeMatMul", model[GRAPH]))
    for name, array in _initializers(graph, {3: INTEGERS[3]}):
        if name in read:
            yield name, array


def _read_by(op_type: str, graph: memoryview) -> Iterator[str]:
    """The names of the second inputs of all such nodes, also in branches."""
    for number, node in _fields(graph):
        if number != NODE:
            continue
        inputs = [bytes(value).decode() for key, value in _fields(node) if key == INPUT]
        if bytes(dict(_fields(node)).get(OP_TYPE, b"")).decode() == op_type:
            yield inputs[1]
        for key, attribute in _fields(node):
            if key == ATTRIBUTE and (branch := dict(_fields(attribute)).get(SUBGRAPH)):
                yield from _read_by(op_type, branch)


def _initializers(
    graph: Path, dtypes: Mapping[int, np.dtype[Any]]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    model = dict(_fields(memoryview(graph.read_bytes())))
    files: dict[str, npt.NDArray[np.uint8]] = {}
    for number, tensor in _fields(model[GRAPH]):
        if number != INITIALIZER:
            continue
        parts = dict(_fields(tensor))
        if (dtype := dtypes.get(parts[DATA_TYPE])) is None:
            continue
        shape = [size for key, size in _fields(tensor) if key == DIMS]
        entries = [dict(_fields(part)) for key, part in _fields(tensor) if key == EXTERNAL_DATA]
        name = bytes(parts[NAME]).decode()
        if entries:
            place = {bytes(e[KEY]).decode(): bytes(e[VALUE]).decode() for e in entries}
            file, start = place["location"], int(place["offset"])
            if file not in files:
                files[file] = np.memmap(graph.with_name(file), np.uint8, "r")
            values = files[file][start : start + int(place["length"])].view(dtype)
        else:
            values = np.frombuffer(parts.get(RAW_DATA) or parts.get(FLOAT_DATA, b""), dtype)
        yield name, values.reshape(shape)


def _sound(name: str, array: npt.NDArray[Any]) -> bool:
    zero = name.endswith(".scale") and not array.all()
    return not zero and bool(np.isfinite(array).all())


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: integers as such, the rest as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[kind]
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer in groups of seven bits, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
