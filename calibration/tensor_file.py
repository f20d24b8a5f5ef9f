"""A safetensors file written one tensor at a time, whole or not at all.

The library's own writer wants all tensors in memory, and a model's Hessians are gigabytes.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import InputError, ResourceError

Array = npt.NDArray[Any]
Spec = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, and shape
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def spec_of(array: Array) -> Spec:
    """What the file's header says of an array."""
    return _NAMES[array.dtype], array.shape


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Array]],
    metadata: Mapping[str, str],
    *,
    force: bool = False,
) -> None:
    """Write `tensors`, which come in any order and one at a time, each as `specs` announced it.

    Raises `InputError` for an existing file without `force`, and `ResourceError` where the disk
    does not take it.
    """
    refuse_existing(path, force=force)
    header, places = _layout(specs, metadata)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with writing(path):
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(header)
                for name, array in tensors:
                    if spec_of(array) != specs[name]:
                        raise ValueError(f"{name} is {spec_of(array)}, not {specs[name]}")
                    file.seek(len(header) + places.pop(name))
                    file.write(np.ascontiguousarray(array).data)
            if places:
                raise ValueError(f"{next(iter(places))} was not given")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise `InputError` unless a file may be written to `path`."""
    if path.exists() and not force:
        raise InputError(f"{path} exists already.", "Choose another name, or pass --force.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into `ResourceError`."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written ({error.strerror or error}).",
            "Free some space, check its permissions, or write elsewhere.",
        ) from error


def _layout(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header with its length, and each tensor's offset behind it; wide types come first."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name)):
        dtype, shape = specs[name]
        places[name], end = end, end + DTYPES[dtype].itemsize * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [places[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
