"""Damaged image files: whatever is done to one, it is read or refused, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmoe_edge.errors import ImageError, ResourceError
from medmoe_edge.image.loading import load_image


def check_damaged(
    path: Path, data: bytes, edits: Sequence[tuple[int, int]], cut: int | None
) -> None:
    """Write `data`, cut off and with `(place, byte)` edits, to `path` and read it."""
    damaged = bytearray(data[:cut])
    for at, value in edits:
        damaged[at % len(damaged)] = value
    path.write_bytes(damaged)
    try:
        pixels = load_image(path).pixels
    except (ImageError, ResourceError):
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
