"""What a model made of an image, as a file: the KV cache of system prompt and image, bit for bit.

    about.json    format, version, key, origin, modality, experts
    0.npy, ...    keys and values of each layer in turn, [H, length, head_size]

They stand uncompressed in a ZIP archive, which is numpy's own .npz: it needs no further package, is
written and read a layer at a time, and has a CRC-32 of each part. (safetensors writes from a copy
of everything, and maps what it reads: a file that shrinks meanwhile would end the process.)
"""

import json
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.errors import Notice
from medmoe_edge.runtimes.base import Cache, CacheArray, PortableCache

FORMAT, VERSION = "medmoe-edge prefix", 1
ABOUT = "about.json"
OVERHEAD = 1024  # bytes of an archive and its headers for each part, at most
ABOUT_BYTES = 64 * OVERHEAD


@dataclass(frozen=True)
class Prefix:
    """System prompt and image, prefilled: every question about the image starts from here.

    `experts` `[E]` counts how often each was chosen, over tokens and layers; `reused` is one that
    was fetched, not computed; `seconds` tell what the one or the other took, by part. `warnings`
    are of the file at hand and not kept: the same picture may lie in another file.
    """

    cache: Cache
    length: int
    modality: str | None
    experts: npt.NDArray[np.int64]
    reused: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[Notice, ...] = ()


def write_prefix(file: IO[bytes], key: str, prefix: Prefix) -> None:
    """Write a prefix, under a `key` that it must be read by."""
    cache = portable(prefix.cache)
    cache.length = prefix.length  # forget the last question
    about = _about(key, cache) | {"modality": prefix.modality, "experts": prefix.experts.tolist()}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(ABOUT, json.dumps(about))
        for index, array in enumerate(cache.arrays()):
            with archive.open(f"{index}.npy", "w") as part:
                np.lib.format.write_array(part, array, allow_pickle=False)


def read_prefix(
    path: Path, key: str, length: int, cache: PortableCache, config: ModelConfig
) -> Prefix:
    """Read the prefix of `length` positions into `cache`.

    Nothing is taken from the file unless it is as expected. Raises nearly anything where it is not,
    as zipfile and numpy do; the cache may then be filled in part.
    """
    status = path.stat()
    _expect(stat.S_ISREG(status.st_mode))  # opening a pipe might never end
    _expect(status.st_size <= most_bytes(length, cache, config.decoder))
    parts = [f"{index}.npy" for index in range(2 * config.decoder.layers)]
    with zipfile.ZipFile(path) as archive:
        _expect(archive.namelist() == [ABOUT, *parts])
        _expect(all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist()))
        about = json.loads(archive.read(ABOUT))
        modality, experts = about.pop("modality"), about.pop("experts")
        _expect(about == _about(key, cache))
        names, count = (config.moe.expert_names, config.moe.num_experts) if config.moe else ((), 0)
        _expect(modality is None or modality in names)
        _expect(len(experts) == count and all(type(n) is int and n >= 0 for n in experts))
        shape = (config.decoder.heads, length, config.decoder.head_size)
        cache.fill(_arrays(archive, parts, shape, cache.dtype))
    return Prefix(cache, length, modality, np.array(experts, np.int64), reused=True)


def most_bytes(length: int, cache: PortableCache, decoder: DecoderConfig) -> int:
    """More than the file of `length` positions has."""
    part = decoder.heads * length * decoder.head_size * cache.dtype.itemsize
    return 2 * decoder.layers * (part + OVERHEAD) + ABOUT_BYTES


def portable(cache: Cache) -> PortableCache:
    """The same cache, of a runtime that `load` has found to have such ones."""
    assert isinstance(cache, PortableCache)
    return cache


def _about(key: str, cache: PortableCache) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "key": key, "origin": cache.origin}


def _arrays(
    archive: zipfile.ZipFile, parts: list[str], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[CacheArray]:
    for name in parts:
        with archive.open(name) as part:
            array = np.lib.format.read_array(part, allow_pickle=False)
            _expect(array.shape == shape and array.dtype == dtype)
            _expect(not part.read(1))  # at the end, the checksum has been compared
        yield array


def _expect(sound: bool) -> None:
    if not sound:
        raise ValueError("the file is not what it should be")
