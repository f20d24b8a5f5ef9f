"""What a model made of images, kept for later questions about them: `load(prefix_cache="DIR")`.

Answers are bit for bit the same with and without. What is kept derives from patients' images and is
as confidential: files are for their owner alone (0600), in a folder that is made so (0700), and
named by hashes that tell nothing to those who do not have the image.

What a model made of an image, as a file: the KV cache of system prompt and image, bit for bit.

    about.json    format, version, key, origin, modality, experts
    0.npy, ...    keys and values of each layer in turn, [H, length, head_size]

They stand uncompressed in a ZIP archive, which is numpy's own .npz: it needs no further package, is
written and read a layer at a time, and has a CRC-32 of each part. (safetensors writes from a copy
of everything, and maps what it reads: a file that shrinks meanwhile would end the process.)
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import stat
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_file
from medmoe_edge.bundle.machine import CPU_INFO
from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.errors import InputError, Notice, checked
from medmoe_edge.runtimes.base import Cache, CacheArray, PortableCache, Runtime

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
        names, count = (config.moe.modalities, config.moe.num_experts) if config.moe else ((), 0)
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


LIMIT = 2 * 10**9  # bytes of all files together
FILE = re.compile(r"\.?[0-9a-f]{64}\.npz(\.[0-9a-f]{8}\.part)?")  # whole, or being written
STALE = 3600  # seconds after which nobody is writing any more

logger = logging.getLogger(__name__)


class LastPrefix:
    """The last image's prefix in memory: questions about an image follow upon each other.

    `model` is the bundle's or checkpoint's hash, `runtime` what runs it.
    """

    def __init__(self, model: str, runtime: Runtime) -> None:
        self.runtime = runtime
        self._computed_by = [__version__, model, runtime.name, processor_key()]
        self._last: tuple[str, Prefix] | None = None

    def key(self, pixels: Floats, ids: list[int]) -> str:
        """The hash of all that decides: version, model, runtime, CPU, tokens and pixels.

        The library's version and device stand in the file, and are compared when it is read.
        """
        digest = hashlib.sha256(json.dumps([*self._computed_by, ids]).encode())
        digest.update(pixels.tobytes())
        return digest.hexdigest()

    def find(self, key: str, length: int, capacity: int) -> Prefix | None:
        """The prefix of `length` positions in a cache of at least `capacity`; None if unknown."""
        if self._last is not None:
            known, prefix = self._last
            if known == key and prefix.cache.capacity >= capacity:
                return prefix
        self._last = None  # its memory is free for another
        return None

    def keep(self, key: str, prefix: Prefix) -> None:
        """Keep a prefix that was computed."""
        self._last = key, replace(prefix, reused=True)


class PrefixCache(LastPrefix):
    """The last image's prefix in memory, and as many as `limit` bytes hold in a folder.

    In memory only the last: each prefix takes as much as an expert or two, and the system keeps the
    files of the others in what memory is free. Several processes may share the folder; the least
    recently used file goes first. Whatever is wrong with it, questions are answered: what cannot be
    read is computed, what cannot be written is not kept, and a warning is logged once.
    """

    def __init__(self, folder: Path, model: str, runtime: Runtime, limit: int = LIMIT) -> None:
        super().__init__(model, runtime)
        self.folder, self.limit = folder, limit
        self._warned: set[str] = set()

    def find(self, key: str, length: int, capacity: int) -> Prefix | None:
        """The prefix of `length` positions in a cache of at least `capacity`; None if unknown."""
        prefix = super().find(key, length, capacity)
        if prefix is not None:
            return prefix
        path = self._path(key)
        if not os.path.exists(path):  # Path's own raises where the folder may not be entered
            return None
        cache = portable(self.runtime.new_cache(capacity))
        try:
            prefix = read_prefix(path, key, length, cache, self.runtime.config)
        except FileNotFoundError:  # another process has just removed it
            return None
        except Exception as error:  # see read_prefix
            logger.debug("%s", type(error).__name__)
            self._warn("An entry of the prefix cache is damaged or outdated, and is made anew.")
            return None
        with contextlib.suppress(OSError):  # of a folder that can only be read
            os.utime(path)
        self._last = key, prefix
        return prefix

    def keep(self, key: str, prefix: Prefix) -> None:
        """Keep a prefix that was computed."""
        super().keep(key, prefix)
        decoder = self.runtime.config.decoder
        size = most_bytes(prefix.length, portable(prefix.cache), decoder)
        if size > self.limit:
            self._warn("One image's prefix outgrows the whole prefix cache, and is not kept.")
            return
        try:
            self._make_room(size)
            with atomic_file(self._path(key)) as file:
                Path(file.name).chmod(0o600)
                write_prefix(file, key, prefix)
        except OSError as error:
            self._warn(f"The prefix cache cannot be written ({error.strerror}).")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files, and what killed processes have left of theirs."""
        whole = []
        for path in self.folder.iterdir():
            match = FILE.fullmatch(path.name)
            if match is None:
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # another process has just removed it
                continue
            if match[1] is None:
                whole.append((status.st_mtime_ns, status.st_size, path))
            elif time.time() - status.st_mtime > STALE:
                path.unlink(missing_ok=True)
        total = size + sum(entry[1] for entry in whole)
        for _, freed, path in sorted(whole):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= freed

    def _warn(self, message: str) -> None:
        """Once, and without a name: it could tell of a patient."""
        if message not in self._warned:
            logger.warning("%s", message)
        self._warned.add(message)


def cache_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if need be; raises `InputError` where it is none."""
    folder: Path = checked(path, Path, "prefix_cache")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be the prefix cache ({error.strerror}).",
            "Name a folder of your own, or one that can be made.",
        ) from error
    return folder


def processor_key(info: Path = CPU_INFO) -> str:
    """What libraries choose their kernels by: processor and instruction sets, as Linux has them."""
    names = ("model name", "flags", "CPU part", "Features")
    try:
        lines = info.read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(names)}))
