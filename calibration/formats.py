"""How a quantised weight is stored, and what it stands for.

Matrices are `[N, K]` here, output channels first, as checkpoints store them; a group is `group`
neighbours along K that share one scale.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import ConfigError

Floats = npt.NDArray[np.float32]
PAIR_BOUND = 128  # the largest with 255 * PAIR_BOUND < 2^15
SCALE_BITS = {True: 16, False: 32}  # grouped scales are kept in fp16, those of channels in fp32


@dataclass(frozen=True)
class Format:
    """`bits` per weight; one scale per `group` weights of a row, or per row (None)."""

    bits: int
    group: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or (self.group is not None and self.group < 1):
            raise ConfigError(
                f"{self.bits} bits in groups of {self.group} is no format.", "Use 2 to 8 bits."
            )

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer; symmetric int8 leaves -128 out, so that it can negate."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return (-half + (self.bits == 8), half - 1)

    @property
    def pair_bound(self) -> int | None:
        """Largest magnitude of the sum of integers 2i and 2i + 1 of a row; None: any is allowed.

        8-bit rows with one scale each run as W8A8 `DynamicQuantizeMatMul`. On processors without
        VNNI (AVX2, AVX-512) its kernel multiplies unsigned 8-bit activations by signed 8-bit
        weights with `vpmaddubsw`, which adds the products of two neighbours along K in 16 bits
        *with saturation*. The largest activation is 255, so the sum is exact for any activations
        if and only if 255 * |w_2i + w_2i+1| < 2^15, that is <= 128; integers of opposite signs
        cannot exceed it. Elsewhere (VNNI, AMX, NEON, SSE) sums are wider, and nothing is lost.
        """
        return PAIR_BOUND if self.bits == 8 and self.group is None and self.symmetric else None

    def groups(self, width: int) -> int:
        """Scales per row of `width` weights; raises `ConfigError` where groups do not fit."""
        if self.group is None:
            return 1
        if width % self.group:
            raise ConfigError(
                f"Rows of {width} weights do not divide into groups of {self.group}.",
                "Choose a group size that divides every matrix, such as 32.",
            )
        return width // self.group

    def bits_per_weight(self, width: int) -> float:
        """Stored bits per weight in rows of `width`, scales and zero points included."""
        per_group = SCALE_BITS[self.group is not None] + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.groups(width) / width


@dataclass(frozen=True)
class Quantised:
    """`(integers - zero) * scale` stands for the weight.

    `integers` `[N, K]` are int8 (symmetric) or uint8, `scale` `[N, G]` finite and positive or
    negative, never 0, exact in fp16 where the format has groups; `zero` `[N, G]` uint8, None where
    symmetric.
    """

    format: Format
    integers: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scale: Floats
    zero: npt.NDArray[np.uint8] | None = None

    def dequantise(self) -> Floats:
        """The weight it stands for, `[N, K]`."""
        rows, width = self.integers.shape
        grouped = self.integers.reshape(rows, self.scale.shape[1], -1).astype(np.float32)
        if self.zero is not None:
            grouped -= self.zero[..., None]
        return (grouped * self.scale[..., None]).reshape(rows, width)
