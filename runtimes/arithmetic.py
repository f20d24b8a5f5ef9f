"""How this processor adds the products of 8-bit integers in ONNX Runtime: exactly or not.

Signed weights times unsigned activations go through `vpmaddubsw` on processors with AVX2 or AVX-512
and without VNNI; it adds two neighbouring products in 16 bits, which saturates at 32,767. A model
of one `DynamicQuantizeMatMul` with the largest products there are shows it.
"""

import logging
from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.machine import Arithmetic, cpu_features_here
from medmoe_edge.bundle.recorded import int8_products
from medmoe_edge.calibration.quantisers import PAIR_BOUND
from medmoe_edge.errors import Notice

WIDTH, CHANNELS = 8, 16
LARGEST = 127  # of an int8 weight; activations of one size are quantised to 255
# What every session is told, so that all processors answer alike. Where an Arm processor has SME,
# KleidiAI's `DynamicQuantizeMatMul` gives each token a scale of its own; its 4-bit kernels quantise
# whole rows of activations instead of blocks.
SAME_EVERYWHERE = ("mlas.disable_kleidiai", "1")


@cache
def int8_arithmetic() -> Arithmetic:
    """ "exact", or "saturating" where 2 * 255 * 127 does not come out."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(*SAME_EVERYWHERE)
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


AT_ONCE = 2**22  # bytes of a weight looked at in one piece

logger = logging.getLogger(__name__)


def load_notices(bundle: Bundle) -> tuple[Notice, ...]:
    """What answers on the CPU are to warn of; it is logged too.

    Bundles from before `Format.pair_bound` run as they are. An exact way would cost more than a new
    export: weights split in two take twice the memory and time, and ONNX Runtime's own option
    (`session.x64quantprecision`) misses weights that the branches of an `If` take from outside, so
    that whole and paged graphs would answer differently.
    """
    _tell_of_slow_processor()
    found = []
    if int8_arithmetic() == "saturating" and not keeps_pair_bound(bundle):
        what = (
            "This processor, which has no VNNI, cannot add the int8 products of "
            f"{bundle.name} exactly: answers may differ from the original model's. Export it again "
            "with this version of medmoe-edge, whose int8 is exact on every processor."
        )
        found.append(Notice("int8_saturates", what))
    for notice in found:
        logger.warning("%s", notice.message)
    return tuple(found)


def keeps_pair_bound(bundle: Bundle) -> bool:
    """Whether its int8 products are exact on every processor: by its manifest, else its weights.

    Reading stops at the first pair beyond the bound, which weights rounded without it have soon.
    """
    quantisation = bundle.manifest.get("quantisation")
    if isinstance(quantisation, dict) and quantisation.get("pair_bound") == PAIR_BOUND:
        return True
    products = int8_products(bundle.path("decoder.onnx"))
    return all(pairs_within(weight) for _, weight in products)


def pairs_within(weight: npt.NDArray[np.int8], bound: int = PAIR_BOUND) -> bool:
    """Whether no stored neighbours 2i, 2i + 1 along K of `[K, N]` sum to more than the bound."""
    paired = weight[: len(weight) // 2 * 2]
    step = 2 * max(AT_ONCE // (2 * max(weight.shape[1], 1)), 1)
    return all(
        np.abs(np.add(block[::2], block[1::2], dtype=np.int16)).max(initial=0) <= bound
        for block in (paired[start : start + step] for start in range(0, len(paired), step))
    )


def slow_processor(features: Mapping[str, bool]) -> str | None:
    """What to say of a processor of these features (`cpu_features`); None if nothing."""
    if features.get("AVX2") is False:
        return "This processor has no AVX2: answers are exact, but slow."
    return None


@cache
def _tell_of_slow_processor() -> None:
    """Once a process: answers are right there, so that they carry no warning."""
    if told := slow_processor(cpu_features_here()):
        logger.warning(told)
