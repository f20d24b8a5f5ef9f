"""How many bytes the kernels read of the experts, against the bytes of those that were chosen.

    python -m medmoe_edge.kernels.traffic

prints the roofline of docs/plugin.md: one token that takes one expert and the meta expert. Decode
is bound by bytes: 2 operations a weight, where GPUs do hundreds for a byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medmoe_edge.kernels.variant import Tile, Variant, of_both_models

BANDWIDTHS = {"Orin": 204.8, "Thor": 273, "RTX 4090": 1008, "H100": 3350}  # GB/s, data sheets
BYTES = {"*i8": 1, "*u8": 1, "*fp16": 2, "*bf16": 2, "*fp32": 4}


@dataclass(frozen=True)
class Traffic:
    """Of one launch, in bytes: `weights` read, and `chosen`, what the chosen experts hold.

    A block of slots reads its expert once, so the two differ only where an expert has more slots
    than a block. `activations` are rows of x, read again for every block of channels, and the
    result; the few words of indices that a program reads are left out.
    """

    weights: int
    chosen: int
    activations: int

    @property
    def ratio(self) -> float:
        """All that is moved over the bytes of the chosen experts; 1 is the least there can be."""
        return (self.weights + self.activations) / self.chosen


def traffic(variant: Variant, tile: Tile, counts: Sequence[int]) -> Traffic:
    """What one launch moves when the experts have these numbers of slots."""
    each = expert_bytes(variant)
    blocks = [math.ceil(count / tile.m) for count in counts]
    products = len(variant.parts) // 2 if variant.activation == "swiglu" else 1
    reads = products * variant.columns(tile) * variant.width
    return Traffic(
        weights=each * sum(blocks),
        chosen=each * sum(1 for count in counts if count),
        activations=2 * sum(counts) * (reads + variant.channels),
    )


def expert_bytes(variant: Variant) -> int:
    """The bytes of one expert's parts for this kernel."""
    width, channels, group = variant.width, variant.channels, variant.group
    values = {
        "": width * channels if group is None else width * channels // 2,
        "scale": channels if group is None else width // group * channels,
        "bias": channels,
    }
    pointers = variant.pointers()["weights"][: len(variant.parts)]
    return sum(
        values[part.partition(".")[2]] * BYTES[kind]
        for part, kind in zip(variant.parts, pointers, strict=True)
    )


def main() -> None:
    """Print the table."""
    print(
        f"| kernel | weights | MB chosen | moved / chosen | {' | '.join(BANDWIDTHS)} |\n"
        f"|---|---|---|---|{'---|' * len(BANDWIDTHS)}"
    )
    for variant in of_both_models():
        moved = traffic(variant, variant.tiles[0], (1, 0, 0, 0, 1))
        least = [f"{moved.chosen / speed / 1e3:.1f}" for speed in BANDWIDTHS.values()]
        cells = f"{moved.chosen / 1e6:.1f} | {moved.ratio:.3f} | {' | '.join(least)}"
        print(f"| {variant} | {cells} |")


if __name__ == "__main__":
    main()
