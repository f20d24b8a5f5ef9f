"""The routing profile: which experts the tokens of each modality reach. Needs no torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Doubles, Floats
from medmoe_edge.errors import DataError

Counts = npt.NDArray[np.int64]
UNKNOWN = "unknown"  # the modality of an image that carries no label


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Counts over requests (an image with a question), for M layers with E experts each.

    `tokens` `[M, E, modalities]` counts each expert that a token chose, so k = 2 counts a token
    twice; `requests` `[modalities]`; `distinct` `[M]` sums over requests how many experts of the
    layer the request's tokens chose. `layers` are indices of decoder layers.
    """

    modalities: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: Counts
    requests: Counts
    distinct: Counts

    @classmethod
    def empty(
        cls, modalities: Sequence[str], layers: Sequence[int], experts: int
    ) -> "RoutingProfile":
        """The requests of these modalities, one each, before any token is routed."""
        requests = Counter(modalities)
        names = tuple(sorted(requests))
        return cls(
            names,
            tuple(layers),
            np.zeros((len(layers), experts, len(names)), np.int64),
            np.array([requests[name] for name in names], np.int64),
            np.zeros(len(layers), np.int64),
        )

    def record(self, layer: int, modality: str, chosen: npt.NDArray[Any]) -> None:
        """Count the experts `chosen` `[T, K]` by one request's tokens in decoder layer `layer`."""
        counts = np.bincount(chosen.ravel(), minlength=self.experts)
        row = self.layers.index(layer)
        self.tokens[row, :, self.modalities.index(modality)] += counts
        self.distinct[row] += np.count_nonzero(counts)

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return int(self.tokens.shape[1])

    @property
    def union(self) -> Doubles:
        """Distinct experts per request and layer, the mean over requests; `[M]`."""
        return self.distinct / max(int(self.requests.sum()), 1)

    def of(self, modality: str) -> tuple[Counts, int]:
        """Tokens `[M, E]` and requests of one modality; zeros where it never came."""
        if modality not in self.modalities:
            return np.zeros(self.tokens.shape[:2], np.int64), 0
        column = self.modalities.index(modality)
        return self.tokens[:, :, column], int(self.requests[column])

    def probability(self, modality: str) -> Floats:
        """P(expert | modality) `[M, E]`: shares of the modality's choices, zeros without any."""
        tokens, _ = self.of(modality)
        total = np.maximum(tokens.sum(-1, keepdims=True), 1)
        return np.asarray(tokens / total, np.float32)

    def merge(self, other: "RoutingProfile") -> "RoutingProfile":
        """Both profiles' requests, which must be of the same layers and experts."""
        if self.layers != other.layers or self.experts != other.experts:
            raise ValueError("profiles of different models do not merge")
        names = tuple(sorted({*self.modalities, *other.modalities}))
        both = [(self.of(name), other.of(name)) for name in names]
        return RoutingProfile(
            names,
            self.layers,
            np.stack([mine[0] + theirs[0] for mine, theirs in both], axis=-1),
            np.array([mine[1] + theirs[1] for mine, theirs in both], np.int64),
            self.distinct + other.distinct,
        )

    def stack(self, other: "RoutingProfile") -> "RoutingProfile":
        """The same requests' profile in further layers."""
        return RoutingProfile(
            self.modalities,
            self.layers + other.layers,
            np.concatenate((self.tokens, other.tokens)),
            self.requests,
            np.concatenate((self.distinct, other.distinct)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as the manifest keeps them; `union` is the mean per layer."""
        return {
            "modalities": list(self.modalities),
            "layers": list(self.layers),
            "experts": self.experts,
            "tokens": self.tokens.tolist(),
            "requests": self.requests.tolist(),
            "union": self.union.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RoutingProfile":
        """Read what `to_json` gave; raises `DataError` for anything else."""
        try:
            modalities, layers = (
                tuple(map(str, data["modalities"])),
                tuple(map(int, data["layers"])),
            )
            shape = (len(layers), int(data["experts"]), len(modalities))
            requests = np.array(data["requests"], np.int64).reshape(len(modalities))
            union = np.array(data["union"], np.float64).reshape(len(layers))
            distinct = np.rint(union * requests.sum()).astype(np.int64)
            tokens = np.array(data["tokens"], np.int64).reshape(shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError("The routing profile is malformed.", "Calibrate again.") from error
        return cls(modalities, layers, tokens, requests, distinct)
