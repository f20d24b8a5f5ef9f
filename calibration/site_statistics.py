"""Activation statistics of one site, gathered batch by batch and merged."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from medmoe_edge.calibration.tensor_file import Array
from medmoe_edge.errors import CheckpointError

Floats = npt.NDArray[np.float32]


@dataclass
class SiteStatistics:
    """Of one site, an activation `[T, K]` that enters one or several matrices.

    Per channel `minimum`, `maximum` and `mean_square` E[x²] `[K]`;
    `hessian` E[x xᵀ] `[K, K]` where wanted. `tokens` and `borrowed` count rows; the two
    expectations weigh a borrowed row less than a row of the site's own, and `weight` is the total.
    """

    minimum: Floats
    maximum: Floats
    mean_square: Floats
    hessian: Floats | None
    tokens: int = 0
    borrowed: int = 0
    weight: float = 0.0

    @classmethod
    def empty(cls, width: int, *, hessian: bool) -> "SiteStatistics":
        """Of `width` channels, before any token."""
        return cls(
            np.full(width, np.inf, np.float32),
            np.full(width, -np.inf, np.float32),
            np.zeros(width, np.float32),
            np.zeros((width, width), np.float32) if hessian else None,
        )

    @property
    def absmax(self) -> Floats:
        """Largest magnitude of each channel, `[K]`."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    def update(self, x: Floats, weights: Floats | None = None) -> None:
        """Add tokens `[T, K]`, T > 0; with `weights` `[T]` they are borrowed.

        Raises `CheckpointError` for an activation that is NaN or infinite.
        """
        low, high = x.min(0), x.max(0)
        if not np.isfinite(low + high).all():
            raise CheckpointError(
                "An activation became NaN or infinite during calibration.",
                "Check the checkpoint, or calibrate it in fp32.",
            )
        added = len(x) if weights is None else float(weights.sum(dtype=np.float64))
        self.tokens += len(x) if weights is None else 0
        self.borrowed += 0 if weights is None else len(x)
        self.weight += added
        np.minimum(self.minimum, low, out=self.minimum)
        np.maximum(self.maximum, high, out=self.maximum)
        scaled = x if weights is None else x * np.sqrt(weights)[:, None]
        kept = 1 - added / self.weight
        self.mean_square *= np.float32(kept)
        self.mean_square += (np.square(scaled).sum(0) / self.weight).astype(np.float32)
        if self.hessian is not None:  # in place: it may be hundreds of megabytes
            rows = torch.from_numpy(scaled)
            torch.from_numpy(self.hessian).addmm_(rows.T, rows, beta=kept, alpha=1 / self.weight)

    def merge(self, other: "SiteStatistics") -> None:
        """Add what another pass saw of the same site."""
        self.tokens += other.tokens
        self.borrowed += other.borrowed
        self.weight += other.weight
        share = other.weight / self.weight
        np.minimum(self.minimum, other.minimum, out=self.minimum)
        np.maximum(self.maximum, other.maximum, out=self.maximum)
        torch.from_numpy(self.mean_square).lerp_(torch.from_numpy(other.mean_square), share)
        if self.hessian is not None and other.hessian is not None:
            torch.from_numpy(self.hessian).lerp_(torch.from_numpy(other.hessian), share)

    def arrays(self) -> dict[str, Array]:
        """Everything but the counts."""
        arrays: dict[str, Array] = {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "mean_square": self.mean_square,
        }
        return arrays if self.hessian is None else {**arrays, "hessian": self.hessian}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array], tokens: int, borrowed: int, weight: float
    ) -> "SiteStatistics":
        """Read what `arrays` gave; raises `ValueError` where it cannot be that."""
        # Files of version 0.1 hold a histogram, too, which nothing reads.
        parts = {key: array for key, array in arrays.items() if not key.startswith("histogram.")}
        width = len(parts["minimum"])
        for key, array in parts.items():
            shape = (width, width) if key == "hessian" else (width,)
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{key} {array.shape}")
        return cls(
            parts["minimum"],
            parts["maximum"],
            parts["mean_square"],
            parts.get("hessian"),
            int(tokens),
            int(borrowed),
            float(weight),
        )
