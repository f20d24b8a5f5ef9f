"""How this processor adds the products of 8-bit integers in ONNX Runtime: exactly or not.

Signed weights times unsigned activations go through `vpmaddubsw` on processors with AVX2 or AVX-512
and without VNNI; it adds two neighbouring products in 16 bits, which saturates at 32,767. A model
of one `DynamicQuantizeMatMul` with the largest products there are shows it.
"""

from functools import cache

import numpy as np
import onnxruntime as ort

from medmoe_edge.bundle.machine import Arithmetic

WIDTH, CHANNELS = 8, 16
LARGEST = 127  # of an int8 weight; activations of one size are quantised to 255


@cache
def int8_arithmetic() -> Arithmetic:
    """ "exact", or "saturating" where 2 * 255 * 127 does not come out."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_model(), options, ["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"a": np.ones((1, WIDTH), np.float32)})
    right = np.allclose(found, WIDTH * LARGEST, rtol=1e-3)
    return "exact" if right else "saturating"


def _model() -> bytes:
    """The model as protobuf: the base install has no library that writes it (onnx.proto)."""
    weights = np.full((WIDTH, CHANNELS), LARGEST, np.int8).tobytes()
    node = b"".join(_field(1, name) for name in (b"a", b"b", b"s"))
    node += _field(2, b"y") + _field(4, b"DynamicQuantizeMatMul") + _field(7, b"com.microsoft")
    stored = _number(1, WIDTH) + _number(1, CHANNELS) + _number(2, 3) + _field(8, b"b")
    scale = _number(2, 1) + _field(8, b"s") + _field(9, np.float32(1).tobytes())
    graph = _field(1, node) + _field(2, b"probe")
    graph += _field(5, stored + _field(9, weights)) + _field(5, scale)
    graph += _field(11, _tensor(b"a", WIDTH)) + _field(12, _tensor(b"y", CHANNELS))
    opsets = (_number(2, 21), _field(1, b"com.microsoft") + _number(2, 1))
    return _number(1, 10) + _field(7, graph) + b"".join(_field(8, opset) for opset in opsets)


def _tensor(name: bytes, size: int) -> bytes:
    """A float value `[1, size]`."""
    shape = _field(1, _number(1, 1)) + _field(1, _number(1, size))
    return _field(1, name) + _field(2, _field(1, _number(1, 1) + _field(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
