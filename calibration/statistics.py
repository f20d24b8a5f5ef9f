"""What calibration measured: statistics of activations, the routing profile, the coverage.

A statistics file is one `.safetensors` with JSON in its `__metadata__`. At full size its Hessians
are gigabytes, so they are read one input at a time.

Observed are the inputs of matrices; those that share one know it by one name:

decoder.layers.N.attention.in       of q, k and v          (after the norm)
decoder.layers.N.attention.mixed    of out
decoder.layers.N.ffn.in, .hidden    of gate and up, or fc1; of down, or fc2 (a dense layer)
decoder.layers.N.ffn.experts.E.in   the same of one expert, which sees only its own tokens,
decoder.layers.N.ffn.meta.in        and of the meta expert, which sees all; `.hidden` likewise
decoder.head.in                     of the head
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from medmoe_edge._types import Floats
from medmoe_edge.atomic import Spec, spec_of, write_tensors
from medmoe_edge.calibration.coverage import ExpertCoverage
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.errors import CheckpointError, DataError

Array = npt.NDArray[Any]

_INPUTS = {
    **dict.fromkeys(("q", "k", "v", "gate", "up", "fc1"), "in"),
    **dict.fromkeys(("down", "fc2"), "hidden"),
    "out": "mixed",
}
_EXPERT = re.compile(r"decoder\.layers\.(\d+)\.ffn\.experts\.(\d+)\.")


def input_of(weight: str) -> str | None:
    """The name of what a decoder matrix multiplies; None for routers and the rest."""
    owner, _, matrix = weight.removesuffix(".weight").rpartition(".")
    if weight == "decoder.head.weight":
        return "decoder.head.in"
    if not owner.startswith("decoder.layers.") or matrix not in _INPUTS:
        return None
    return f"{owner}.{_INPUTS[matrix]}"


def expert_of(name: str) -> tuple[int, int] | None:
    """Decoder layer and index of the routed expert that a weight or an input belongs to."""
    match = _EXPERT.match(name)
    return (int(match[1]), int(match[2])) if match else None


@dataclass
class InputStatistics:
    """Of one input, an activation `[T, K]` that enters one or several matrices.

    The two expectations weigh a borrowed row less than one of the expert's own.

    Attributes:
        minimum: Of each channel, `[K]`.
        maximum: The same.
        mean_square: E[x²], `[K]`.
        hessian: E[x xᵀ], `[K, K]`, where wanted.
        tokens: Rows of its own.
        borrowed: Rows that the router sent elsewhere.
        weight: Of all rows together.
    """

    minimum: Floats
    maximum: Floats
    mean_square: Floats
    hessian: Floats | None
    tokens: int = 0
    borrowed: int = 0
    weight: float = 0.0

    @classmethod
    def empty(cls, width: int, *, hessian: bool) -> "InputStatistics":
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

    def merge(self, other: "InputStatistics") -> None:
        """Add what another pass saw of the same input."""
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
    ) -> "InputStatistics":
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


__all__ = ["InputStatistics", "Source", "Statistics", "StatisticsFiles", "write_statistics"]

FORMAT = "medmoe-edge calibration statistics 1"
_AGAIN = "Make it again: medmoe-edge calibrate CHECKPOINT --data DATA -o STATS."


class StatisticsFiles(Mapping[str, InputStatistics]):
    """Statistics by input, out of one or several files, read and merged when asked for.

    Attributes:
        paths: The files.
        contents: The JSON of each.
        specs: Type and shape of each array, by input and key.

    Raises:
        DataError: A file is damaged or something else, also found in reading one.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.contents: list[dict[str, Any]] = []
        self.specs: dict[str, Spec] = {}
        self._files: dict[str, list[int]] = {}  # input -> which files have it
        for index, path in enumerate(self.paths):
            with _reading(path) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DataError(f"{path} holds no calibration statistics.", _AGAIN)
                self.contents.append(json.loads(metadata["content"]))
                for name in self.contents[-1]["sites"]:
                    self._files.setdefault(name, []).append(index)
                for key in file.keys():  # noqa: SIM118 -- not a mapping
                    part = file.get_slice(key)
                    self.specs[key] = (part.get_dtype(), tuple(part.get_shape()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> InputStatistics:
        first, *others = self._files[name]
        statistics = self._read(first, name)
        for index in others:
            statistics.merge(self._read(index, name))
        return statistics

    def counts(self, name: str) -> list[Any]:
        """Tokens, borrowed tokens and weight, without reading the arrays."""
        found = [self.contents[index]["sites"][name] for index in self._files[name]]
        return [sum(column) for column in zip(*found, strict=True)]

    def _read(self, index: int, name: str) -> InputStatistics:
        with _reading(self.paths[index]) as file:
            prefix = f"{name}/"
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            arrays = {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
            return InputStatistics.from_arrays(arrays, *self.contents[index]["sites"][name])


def write_statistics(
    path: Path,
    inputs: Mapping[str, InputStatistics],
    content: Mapping[str, Any],
    *,
    force: bool = False,
) -> None:
    """Write a statistics file, whole or not at all.

    Args:
        path: The file.
        inputs: Statistics by input; of `StatisticsFiles` one is in memory at a time.
        content: What is kept beside them, as JSON.
        force: Whether to replace what is already there.

    Raises:
        InputError: The file exists.
        ResourceError: The disk does not take it.
    """
    if isinstance(inputs, StatisticsFiles):
        specs, counts = inputs.specs, {name: inputs.counts(name) for name in inputs}
    else:
        specs = {key: spec_of(array) for key, array in _named_arrays(inputs)}
        counts = {name: [one.tokens, one.borrowed, one.weight] for name, one in inputs.items()}
    metadata = {"format": FORMAT, "content": json.dumps({**content, "sites": counts})}
    write_tensors(path, specs, _named_arrays(inputs), metadata, force=force)


def _named_arrays(inputs: Mapping[str, InputStatistics]) -> Iterator[tuple[str, Array]]:
    for name in inputs:
        yield from ((f"{name}/{key}", array) for key, array in inputs[name].arrays().items())


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        if not path.exists():
            raise DataError(f"{path} does not exist.", _AGAIN) from error
        raise DataError(f"{path} is truncated or no statistics.", _AGAIN) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged.", _AGAIN) from error


@dataclass(frozen=True)
class Source:
    """The calibration data: its name and hash, the `Sample.sha256` of those drawn from it, and how
    many of its images could not be read. No file name or id is kept: they may name patients.

    `labelled_by` counts the samples drawn by who told their modality: the list, DICOM, the folder
    or the model's own router.
    """

    name: str
    sha256: str
    drawn: tuple[str, ...] = ()
    skipped: int = 0
    labelled_by: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Source":
        """Read what `dataclasses.asdict` gave; raises `KeyError` or `TypeError`."""
        labelled = {str(by): int(count) for by, count in data.get("labelled_by", {}).items()}
        drawn = tuple(data["drawn"])
        return cls(data["name"], data["sha256"], drawn, int(data["skipped"]), labelled)


@dataclass(frozen=True)
class Statistics:
    """What `medmoe-edge calibrate` writes.

    Attributes:
        checkpoint_sha256: Whose statistics they are.
        source: The data.
        routing: Which experts the tokens of each modality chose.
        coverage: What each expert saw.
        inputs: Statistics by input, read when asked for.
    """

    checkpoint_sha256: str
    source: Source
    routing: RoutingProfile
    coverage: tuple[ExpertCoverage, ...]
    inputs: Mapping[str, InputStatistics]

    @property
    def samples(self) -> dict[str, int]:
        """Samples of each modality."""
        return dict(zip(self.routing.modalities, self.routing.requests.tolist(), strict=True))

    def get(self, name: str) -> InputStatistics | None:
        """What a quantiser may trust of an input; None where nothing came or its expert is to be
        quantised data-free.
        """
        data_free = {record.pair for record in self.coverage if record.status == "data-free"}
        trusted = name in self.inputs and expert_of(name) not in data_free
        return self.inputs[name] if trusted else None

    def summary(self) -> dict[str, Any]:
        """What a manifest keeps, as plain JSON: data, routing profile and coverage."""
        return {
            "data": self.source.name,
            "sha256": self.source.sha256,
            "samples": self.samples,
            "skipped": self.source.skipped,
            "labelled_by": dict(self.source.labelled_by),
            "routing": self.routing.to_json(),
            "coverage": [record.to_json() for record in self.coverage],
        }

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write one file, whole or not at all; raises as `write_tensors` does."""
        content = {
            "checkpoint_sha256": self.checkpoint_sha256,
            "source": dataclasses.asdict(self.source),
            "routing": self.routing.to_json(),
            "coverage": [record.to_json() for record in self.coverage],
        }
        write_statistics(path, self.inputs, content, force=force)

    @classmethod
    def open(cls, path: Path) -> "Statistics":
        """Open a file; raises `DataError` for one that is missing, damaged or something else."""
        inputs = StatisticsFiles([path])
        content = inputs.contents[0]
        try:
            return cls(
                str(content["checkpoint_sha256"]),
                Source.from_json(content["source"]),
                RoutingProfile.from_json(content["routing"]),
                tuple(map(ExpertCoverage.from_json, content["coverage"])),
                inputs,
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged.", _AGAIN) from error

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `DataError` unless they are this checkpoint's."""
        if self.checkpoint_sha256 != checkpoint.sha256():
            raise DataError(
                f"These statistics were made for another checkpoint than {checkpoint.folder}.",
                "Calibrate this one: medmoe-edge calibrate CHECKPOINT --data DATA -o STATS.",
            )
