"""What should be known of a bundle's answers on this processor.

Bundles of this version keep `Format.pair_bound` in every int8 weight per channel, and say so in
their manifest: their sums are exact everywhere. Others are looked at, but only on processors that
saturate. They run as they are. An exact way would cost more than a new export: weights split in two
take twice the memory and time, and ONNX Runtime's own option (`session.x64quantprecision`) misses
weights that the branches of an `If` take from outside, so that whole and paged graphs would answer
differently.
"""

import logging
from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.machine import cpu_features_here
from medmoe_edge.bundle.weights import int8_products
from medmoe_edge.calibration.quantisers import PAIR_BOUND
from medmoe_edge.errors import Notice
from medmoe_edge.runtimes.arithmetic import int8_arithmetic

AT_ONCE = 2**22  # bytes of a weight looked at in one piece

logger = logging.getLogger(__name__)


def load_notices(bundle: Bundle) -> tuple[Notice, ...]:
    """What answers on the CPU are to warn of; it is logged too."""
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
