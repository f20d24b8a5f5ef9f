"""int8 weights, one scale per output channel, symmetric."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def quantise_per_channel(weight: Floats, axis: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Round `weight` to int8 with one scale for each index of `axis`.

    Returns the integers, shaped as `weight`, and the scales `[weight.shape[axis]]` such that
    `integers * scales` is nearest to `weight`. The range is -127..127, so that zero is exact and
    negation symmetric. A channel of zeros gets scale 1. All weights must be finite.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    peak = np.abs(weight).max(axis=others)
    smallest = np.finfo(np.float32).tiny  # below it lie subnormals, and a scale of zero
    scale = np.where(peak > 0, np.maximum(peak / 127, smallest), 1).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    integers = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127)
    return integers.astype(np.int8), scale
