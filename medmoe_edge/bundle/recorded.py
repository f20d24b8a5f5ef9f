"""What travels with a bundle so that it can be proven anywhere, without its checkpoint.

    recorded-HASH.npz    signature   marks of the checkpoint's matrices (`Signature`)
                         about       JSON: inputs in words, the reference's answers, limits
                         others      arrays: inputs as pictures, and what the reference computed

Uncompressed it has at most 64 MB; it holds plain arrays, and nothing in it is ever unpickled. Its
name changes with its content, so that a bundle whose record is renewed is whole at every moment.

A bundle's weights are found by its graphs, which say where they lie. These are read as what they
are, protobuf, because the base install has ONNX Runtime alone, which does not show weights (wire
format: protobuf.dev, encoding; field numbers: onnx.proto).
"""

import hashlib
import io
import itertools
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import AnyBundle, AnyBundleT, Bundle, write_verification
from medmoe_edge.config import Config
from medmoe_edge.errors import BundleError, ConfigError, of_machine

INLINE_BYTES = 1024  # smaller tensors lie in the graph itself: shapes, scalars, short biases
NODE, GRAPH, INITIALIZER = 1, 7, 5  # of a graph; of a model; of a graph
INPUT, OP_TYPE, ATTRIBUTE, SUBGRAPH = 1, 4, 5, 6  # of a node; of an attribute
DIMS, DATA_TYPE, FLOAT_DATA, NAME, RAW_DATA, EXTERNAL_DATA = 1, 2, 4, 8, 9, 13  # of a tensor
KEY, VALUE = 1, 2  # of an entry of its external data

FLOATS: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}
Array = npt.NDArray[Any]
Stored = tuple[Array, Array | None]  # a matrix and its scales
INTEGERS: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint8), 3: np.dtype(np.int8)}


def sweep_weights(bundle: Bundle) -> list[str]:
    """Names of weights of a checked bundle that are not finite, and of scales that hold a 0."""
    table = np.load(bundle.path("embedding.npy"), mmap_mode="r", allow_pickle=False)
    graphs = (float_weights(bundle.path(f"{name}.onnx")) for name in ("vision", "decoder"))
    weights = itertools.chain([("embedding", table)], *graphs)
    return [name for name, array in weights if not _sound(name, array)]


def check_scales(bundle: Bundle) -> None:
    """Raise `BundleError` for scales that are not finite or 0; cheap enough for every load."""
    graphs = (float_weights(bundle.path(f"{name}.onnx")) for name in ("vision", "decoder"))
    for name, array in itertools.chain(*graphs):
        if name.endswith(".scale") and not _sound(name, array):
            raise BundleError(
                f"{bundle.folder} has scales that cannot be, in {name}.",
                "Export the checkpoint again, or check it with: medmoe-edge verify",
            )


def float_weights(graph: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Name and values, flat, of every float initializer of an ONNX file; external ones mapped."""
    yield from ((name, array.ravel()) for name, array in _initializers(graph, FLOATS))


def stored_weights(graph: Path, *, external: bool = True) -> Iterator[tuple[str, Array]]:
    """Every initializer of floats or of 8-bit integers, in its shape; `external` ones mapped."""
    yield from _initializers(graph, FLOATS | INTEGERS, external=external)


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
    graph: Path, dtypes: Mapping[int, np.dtype[Any]], *, external: bool = True
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
        if entries and not external:
            continue
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
    return bool(np.isfinite(array).all() and (array.all() or not name.endswith(".scale")))


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


AT_MOST = 400_000  # marks of a kind in a file, each of two bytes
OF_ONE = 16_384  # norms of one matrix, while they are collected
STEPS = 256  # in an octave
LEAST = 1e-24  # of a squared norm: weights of nothing

FLOAT = 32  # bits of a weight that is stored as a float, whether of 32 bits or of 16

# By bits of a weight: how far rounding may move norms, in octaves, and a matrix, relatively. Where
# the export says so, a matrix up to twice that and a norm up to `MOST_MOVED`, as GPTQ moves them.
MOVED = {8: 0.02, 4: 0.15}
ROUNDED = {FLOAT: 0.01, 8: 0.05, 4: 0.15, 3: 0.6, 2: 0.9}
MOST_MOVED, ROOM = 0.9, 0.05  # octaves; together short of 1, by which one scale, doubled, moves it

# Matrices that decide who runs, or that only some tokens meet: marked also where they are floats.
ROUTED = re.compile(
    r"(.*\.)?(router|coefficient|meta|experts\.\d+)\.(.+\.)?(weight|delta(\.[ab])?)"
)

PACKED, GROUP_SCALE, SCALE = ".packed", ".groups.scale", ".scale"
DELTA = ".delta"  # in the name of what an expert's matrix adds to the meta expert's
FUSED, PARTS = ".attention.qkv.", "qkv"  # stored as one matrix


@dataclass(frozen=True)
class MarkedMatrix(Config):
    """A matrix `[rows, columns]`: its bits, the scales of a row, how many neighbouring norms and
    sums stand as one, and how far its own rounding moved it, relatively, and a norm, in octaves.
    """

    name: str
    rows: int
    columns: int
    bits: int
    groups: int
    norm_block: int = 1
    sum_block: int = 1
    rounding: float = 0.0
    moved: float = 0.0

    @property
    def error(self) -> float:
        """How far the stored matrix may be from the checkpoint's, relatively."""
        usual = ROUNDED.get(self.bits, 1.0)
        return min(max(usual, 1.5 * self.rounding), 2 * usual)  # few sums stand for it

    @property
    def norms(self) -> int:
        """How many norms are kept."""
        return -(-self.rows * self.groups // self.norm_block)

    @property
    def sums(self) -> int:
        """How many sums are kept."""
        return -(-self.rows // self.sum_block)

    @property
    def tolerance(self) -> float:
        """How far a norm may be off, in octaves: half of what doubling one of its scales does, but
        at least what rounding does. Where that is more, one scale alone is not seen.
        """
        rounding = max(MOVED.get(self.bits, 0.5), min(self.moved, MOST_MOVED) + ROOM)
        return max(_doubled(self.norm_block) / 2, rounding)

    def sees(self, scales: int) -> bool:
        """Whether one of so many stored scales, doubled, is seen by itself, whatever rounding did:
        in int8 up to 52 scales to a norm, in int4 up to 5, of weights as large as their neighbours.
        """
        behind = self.norm_block * scales / (self.rows * self.groups)
        return _doubled(behind) - MOVED.get(self.bits, 0.5) >= self.tolerance


def _doubled(scales: float) -> float:
    """How far a norm over so many scales moves, in octaves, where one of them is doubled."""
    return float(np.log2(1 + 3 / scales)) / 2


@dataclass(frozen=True)
class Marks:
    """Of one matrix: squared norms `[N, G]` of the weights behind each scale, and sums `[N]`."""

    squares: Floats
    sums: Floats

    @classmethod
    def of(cls, rows: Floats, groups: int) -> Self:
        """Of weights `[n, K]`, each row in so many groups."""
        parts = rows.reshape(len(rows), groups, -1)
        return cls(np.einsum("ngk,ngk->ng", parts, parts), rows @ signs(rows.shape[1]))

    @classmethod
    def of_stored(cls, matrix: MarkedMatrix, integers: Array, scale: Array | None) -> Self:
        """Of a stored matrix, whose groups may have been cut smaller when it was packed."""
        if scale is None:
            return cls.of(np.ascontiguousarray(integers.T.astype(np.float32)), 1)
        width, factor = matrix.columns, scale.astype(np.float32)
        if integers.dtype == np.int8:  # [K, N]
            weights = integers.astype(np.float32)
            squares = np.einsum("kn,kn->n", weights, weights) * factor**2
            return cls(squares[:, None], (signs(width) @ weights) * factor)
        bits = integers.size * 8 // (matrix.rows * width)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        unpacked = (integers.reshape(matrix.rows, -1, 1) >> shifts) & np.uint8(2**bits - 1)
        weights = unpacked.reshape(matrix.rows, factor.size // matrix.rows, -1).astype(np.float32)
        weights -= 2 ** (bits - 1)  # where MatMulNBits has its zero
        weights *= factor.reshape(matrix.rows, -1, 1)
        return cls.of(weights.reshape(matrix.rows, width), matrix.groups)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Of a matrix whose blocks of rows these are."""
        squares = np.concatenate([part.squares for part in parts])
        return cls(squares, np.concatenate([part.sums for part in parts]))


@dataclass(frozen=True)
class Signature:
    """The marks of a checkpoint: norms in octaves, 256 steps each, and sums, of all matrices."""

    matrices: tuple[MarkedMatrix, ...]
    norms: npt.NDArray[np.int16]
    sums: npt.NDArray[np.float16]

    def each(self) -> Iterator[tuple[MarkedMatrix, Array, Array]]:
        """Every matrix with its norms, in octaves, and its sums."""
        norm = total = 0
        for matrix in self.matrices:
            norms = self.norms[norm : norm + matrix.norms].astype(np.float64) / STEPS
            sums = self.sums[total : total + matrix.sums].astype(np.float64)
            norm, total = norm + matrix.norms, total + matrix.sums
            yield matrix, norms, sums


class SignatureMaker:
    """Collects marks while a checkpoint is exported."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[MarkedMatrix, Marks, Marks]] = {}

    def keep(self, name: str, bits: int, columns: int, own: Marks, stored: Marks) -> None:
        """The marks of a matrix of so many columns, and of what is stored of it."""
        rows, groups = own.squares.shape
        block = -(-rows * groups // OF_ONE)
        matrix = MarkedMatrix(name, rows, columns, bits, groups, block)
        one, two = (replace(m, squares=blocks(m.squares.ravel(), block)) for m in (own, stored))
        self._found[name] = matrix, one, two

    def signature(self) -> Signature:
        """Of all that was kept."""
        found = list(self._found.values())
        norm_block = max(-(-sum(len(own.squares) for _, own, _ in found) // AT_MOST), 1)
        sum_block = max(-(-sum(len(own.sums) for _, own, _ in found) // AT_MOST), 1)
        matrices, norms, totals = [], [np.zeros(0, np.int16)], [np.zeros(0, np.float16)]
        for matrix, *both in found:
            block = matrix.norm_block * norm_block
            levels, stored = (octaves(blocks(each.squares, norm_block)) for each in both)
            sums, theirs = (blocks(each.sums, sum_block) for each in both)
            error, moved = sums_error(theirs - sums, levels), float(np.abs(stored - levels).max())
            matrix = replace(matrix, rounding=round(error, 3), moved=round(moved, 3))
            matrices.append(replace(matrix, norm_block=block, sum_block=sum_block))
            norms.append(np.rint(STEPS * levels).astype(np.int16))
            totals.append(sums.astype(np.float16))
        return Signature(tuple(matrices), np.concatenate(norms), np.concatenate(totals))


def sums_error(gap: Array, norms: Array) -> float:
    """A matrix's relative error by the gap of its sums; norms in octaves."""
    return float(np.sqrt((gap**2).sum() / max((4.0**norms).sum(), LEAST)))  # E (w r)^2 = |w|^2


def stored_matrices(bundle: AnyBundle[Any]) -> Iterator[tuple[str, Stored]]:
    """Every matrix of the bundle's graphs that has marks, under the checkpoint's names; not copied.

    Integers with scales, both as stored: `[K, N]` of int8 and `[N]`, or packed `[N, G, n]` of uint8
    and `[N, G]`. Floats `[K, N]`, of routers and experts alone, with None.
    """
    for graph in ("vision.onnx", "decoder.onnx", "image.onnx", "text.onnx"):
        if graph not in bundle.manifest["files"]:
            continue
        held = dict(stored_weights(bundle.path(graph)))
        for name, array in held.items():
            stem = name.removesuffix(PACKED)
            ending = SCALE if stem == name else GROUP_SCALE
            if (scale := held.get(stem + ending)) is None:
                if is_routed(name, array.shape) and array.dtype.kind == "f":
                    yield name, (array, None)
                continue
            if FUSED not in stem:
                yield stem, (array, scale)
                continue
            axis = 1 if ending == SCALE else 0
            pairs = zip(np.split(array, 3, axis), np.split(scale, 3), strict=True)
            for part, pair in zip(PARTS, pairs, strict=True):
                yield stem.replace(FUSED, f".attention.{part}."), pair


def is_routed(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is a matrix of a router or an expert, which has marks as floats, too."""
    return len(shape) == 2 and ROUTED.fullmatch(name) is not None


def signs(count: int) -> Floats:
    """+1 and -1 in the order of Thue and Morse, which no layout of weights follows."""
    odd = np.bitwise_count(np.arange(count, dtype=np.uint64)) & 1
    return (1 - 2 * odd.astype(np.float32)).astype(np.float32)


def blocks(values: Array, block: int) -> Array:
    """Sums over `block` neighbours."""
    return np.add.reduceat(values, np.arange(0, len(values), block))


def octaves(squares: Array) -> Array:
    """Norms as logarithms of base 2."""
    logarithms: Array = np.log2(np.maximum(squares.astype(np.float64), LEAST)) / 2
    return logarithms


RECORDED = re.compile(r"recorded-[0-9a-f]{8}\.npz")
MOST = 2**26  # bytes of all arrays
ABOUT, MATRICES = "about", "matrices"
REMEDY = "Copy or export the bundle again."


@dataclass(frozen=True)
class Recorded:
    """The signature, None where it was never made; JSON values and arrays of recorded inputs."""

    signature: Signature | None
    about: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def pack(self) -> tuple[str, bytes]:
        """The file's name and content; the same content gives the same bytes."""
        about: dict[str, Any] = {ABOUT: dict(self.about), MATRICES: None}
        arrays = dict(self.arrays)
        if self.signature is not None:
            about[MATRICES] = [matrix.to_json() for matrix in self.signature.matrices]
            arrays |= {"norms": self.signature.norms, "sums": self.signature.sums}
        arrays[ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        content = file.getvalue()
        return f"recorded-{hashlib.sha256(content).hexdigest()[:8]}.npz", content


def write_recorded(folder: Path, recorded: Recorded) -> None:
    """Put it into the folder of a new bundle, which has no manifest yet."""
    name, content = recorded.pack()
    (folder / name).write_bytes(content)


def renew_recorded(bundle: AnyBundleT, recorded: Recorded, record: Mapping[str, Any]) -> AnyBundleT:
    """Put new recorded inputs in the place of a bundle's own, and `record` into its manifest.

    The bundle is whole at every moment. Raises `ResourceError` where it cannot be written.
    """
    old = recorded_file(bundle)
    name, content = recorded.pack()
    made = write_verification(bundle, record, {name: content}, without=old)
    if old not in (None, name):
        (bundle.folder / str(old)).unlink(missing_ok=True)
    return made


def recorded_file(bundle: AnyBundle[Any]) -> str | None:
    """The name of the bundle's recorded file; None of a bundle that has none."""
    return next(filter(RECORDED.fullmatch, bundle.manifest["files"]), None)


def signature_of(bundle: AnyBundle[Any]) -> Signature | None:
    """The marks that a bundle carries, if any; raises `BundleError` for a damaged file."""
    return None if recorded_file(bundle) is None else read_recorded(bundle).signature


def read_recorded(bundle: AnyBundle[Any]) -> Recorded:
    """What travels with a bundle; raises `BundleError` where nothing does, or it is damaged."""
    name = recorded_file(bundle)
    if name is None:
        raise BundleError(
            f"{bundle.folder} carries no recorded inputs: an earlier version exported it.",
            "Export it again, or add them: medmoe-edge verify BUNDLE --against CHECKPOINT --record",
        )
    path = bundle.path(name)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST:
                raise BundleError(f"{path} holds more than {MOST:,} bytes.", REMEDY)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        about = json.loads(arrays.pop(ABOUT).tobytes())
        signature = None
        if about[MATRICES] is not None:
            matrices = tuple(MarkedMatrix.from_json(m, f"{path} matrix") for m in about[MATRICES])
            signature = Signature(matrices, arrays.pop("norms"), arrays.pop("sums"))
        return Recorded(signature, dict(about[ABOUT]), arrays)
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError),
        *(zipfile.BadZipFile, RecursionError, ConfigError),
    ) as error:
        damaged = BundleError(f"{path} is damaged ({type(error).__name__}).", REMEDY)
        raise (of_machine(str(path), error) or damaged) from error
