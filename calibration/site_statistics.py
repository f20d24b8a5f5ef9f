"""Activation statistics of one site, gathered batch by batch and merged."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from medmoe_edge.calibration.ranges import Histogram
from medmoe_edge.calibration.tensor_file import Array

Floats = npt.NDArray[np.float32]


@dataclass
class SiteStatistics:
    """Of one site, an activation `[T, K]` that enters one or several matrices.

    Per channel `minimum`, `maximum` and `mean_square` E[x²] `[K]`; the `histogram` of all values;
    `hessian` E[x xᵀ] `[K, K]` where wanted. `tokens` and `borrowed` count rows; the two
    expectations weigh a borrowed row less than a row of the site's own, and `weight` is the total.
    """

    minimum: Floats
    maximum: Floats
    mean_square: Floats
    histogram: Histogram
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
            Histogram(),
            np.zeros((width, width), np.float32) if hessian else None,
        )

    @property
    def absmax(self) -> Floats:
        """Largest magnitude of each channel, `[K]`."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    def update(self, x: Floats, weights: Floats | None = None) -> None:
        """Add tokens `[T, K]`, T > 0 and all finite; with `weights` `[T]` they are borrowed."""
        added = len(x) if weights is None else float(weights.sum(dtype=np.float64))
        self.tokens += len(x) if weights is None else 0
        self.borrowed += 0 if weights is None else len(x)
        self.weight += added
        np.minimum(self.minimum, x.min(0), out=self.minimum)
        np.maximum(self.maximum, x.max(0), out=self.maximum)
        self.histogram.update(x)
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
        self.histogram.merge(other.histogram)
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
        arrays |= {f"histogram.{key}": array for key, array in self.histogram.to_arrays().items()}
        return arrays if self.hessian is None else {**arrays, "hessian": self.hessian}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array], tokens: int, borrowed: int, weight: float
    ) -> "SiteStatistics":
        """Read what `arrays` gave; raises `ValueError` where it cannot be that."""
        parts = {key: array for key, array in arrays.items() if not key.startswith("histogram.")}
        width = len(parts["minimum"])
        for key, array in parts.items():
            shape = (width, width) if key == "hessian" else (width,)
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{key} {array.shape}")
        histogram = Histogram.from_arrays(
            {k.removeprefix("histogram."): a for k, a in arrays.items() if k not in parts}
        )
        return cls(
            parts["minimum"],
            parts["maximum"],
            parts["mean_square"],
            histogram,
            parts.get("hessian"),
            int(tokens),
            int(borrowed),
            float(weight),
        )
