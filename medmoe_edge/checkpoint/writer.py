"""Writing a checkpoint folder, streamed and atomic; of a Med-MoE in the official layout.

Memory holds no more than one shard; the finished folder is renamed into place.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from medmoe_edge.atomic import atomic_folder
from medmoe_edge.checkpoint.config import official_config
from medmoe_edge.checkpoint.keys import (
    FUSED,
    Shape,
    expected_parameters,
    is_router,
    official_name,
    with_qwen,
)
from medmoe_edge.checkpoint.tensors import INDEX_FILE, check_file
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import CheckpointError, ResourceError, shown_bytes

SHARD_BYTES = 256 * 2**20


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tokenizer_file: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype = torch.bfloat16,
    force: bool = False,
) -> None:
    """Write `(our name, tensor)` pairs, in any order, as an official folder.

    Memory holds one shard: `shard_bytes`, or the largest tensor where that is more. Routers stay
    fp32. `folder` appears whole or not at all; with `force` it replaces another checkpoint.
    Raises `InputError` for an existing folder, `ResourceError` for a full disk, and
    `CheckpointError` unless the tensors are exactly those of `config`.
    """
    expected = expected_parameters(config)
    write_folder(
        folder,
        official_config(config, str(dtype).removeprefix("torch.")),
        _fused(_checked(config, expected, tensors, dtype)),
        sum(math.prod(shape) * _stored(n, dtype).itemsize for n, shape in expected.items()),
        tokenizer_file=tokenizer_file,
        shard_bytes=shard_bytes,
        force=force,
    )


def write_folder(
    folder: Path,
    config: Mapping[str, object],
    tensors: Iterable[tuple[str, torch.Tensor]],
    size: int,
    *,
    tokenizer_file: Path | None,
    shard_bytes: int,
    force: bool,
) -> None:
    """Write `config.json`, shards with their index and the tokenizer, as `write_checkpoint` does.

    `tensors` come as they are stored: by their stored names, contiguous, on the CPU, together
    `size` bytes.
    """
    if tokenizer_file:
        check_file(tokenizer_file)
    with atomic_folder(Path(folder), force=force, marker="config.json") as temporary:
        _check_space(temporary, size)
        shards = _write_shards(temporary, tensors, shard_bytes)
        index: dict[str, str] = {}
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            (temporary / str(number)).rename(temporary / name)
            index |= dict.fromkeys(keys, name)
        _write_json(temporary / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": index})
        _write_json(temporary / "config.json", config)
        if tokenizer_file:
            shutil.copyfile(tokenizer_file, temporary / "tokenizer.json")


def wrong_shape(key: str, shape: Shape, expected: Shape) -> CheckpointError:
    """The error for a tensor that does not fit its configuration."""
    return CheckpointError(
        f"{key} has the shape {list(shape)}, the configuration asks for {list(expected)}.",
        "Use the config.json that belongs to these weights.",
    )


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if is_router(name) else dtype


def _checked(
    config: ModelConfig,
    expected: Mapping[str, Shape],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and contiguous CPU copies as stored; raises unless all of `expected` come."""
    missing = dict(expected)
    for name, tensor in tensors:
        if name not in missing:
            raise CheckpointError(
                f"{name} is no parameter of this configuration, or came twice.", "Check the model."
            )
        key, shape = official_name(name, config), missing.pop(name)
        if tensor.shape != shape:
            raise wrong_shape(key, tuple(tensor.shape), shape)
        # Layers may share a router, and safetensors refuses tensors that share memory.
        copy = is_router(name)
        key = with_qwen(key, config)
        yield key, tensor.detach().to("cpu", _stored(name, dtype), copy=copy).contiguous()
    if missing:
        raise CheckpointError(f"{next(iter(missing))} was not given.", "Write every parameter.")


def _fused(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """q, k and v as the one tensor that Qwen's folders hold; see `checkpoint.keys`."""
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors:
        if FUSED not in key:
            yield key, tensor
            continue
        owner, name, part = key.rsplit(".", 2)
        parts = waiting.setdefault(f"{owner}.{part}", {})
        parts[name] = tensor
        if len(parts) == 3:
            del waiting[f"{owner}.{part}"]
            yield f"{owner}.{part}", torch.cat([parts[name] for name in "qkv"])


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> list[list[str]]:
    """Write shards into files 1, 2, ...; return the names in each."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        shards.append(list(shard))
        try:
            save_file(shard, folder / str(len(shards)), metadata={"format": "pt"})
        except SafetensorError as error:  # its own class also for a full disk
            raise OSError(str(error)) from error
        shard.clear()

    for key, tensor in tensors:
        filled = sum(other.nbytes for other in shard.values())
        if shard and filled + tensor.nbytes > shard_bytes:
            flush()
        shard[key] = tensor
    flush()
    return shards


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ResourceError(
            f"The checkpoint needs {shown_bytes(size)}, {folder.parent} has {shown_bytes(free)}.",
            "Free some space, or write elsewhere.",
        )
