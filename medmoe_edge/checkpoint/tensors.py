"""The files of a checkpoint folder: JSON and safetensors shards, checked before they are trusted.

Only headers are read here; a tensor's data is mapped when it is asked for. Nothing is unpickled.

A folder is written streamed and atomically, a Med-MoE in the official layout: memory holds no more
than one shard, and the finished folder is renamed into place.
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from medmoe_edge.atomic import atomic_folder, check_regular, read_small
from medmoe_edge.checkpoint.config import official_config
from medmoe_edge.checkpoint.keys import (
    FUSED,
    INTEGERS,
    Shape,
    expected_parameters,
    is_router,
    official_name,
    with_qwen,
)
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import CheckpointError, ResourceError, of_file, shown_bytes

INDEX_FILE = "model.safetensors.index.json"

SINGLE_FILE = "model.safetensors"

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_DOWNLOAD = "Download the checkpoint again."


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its shard's header says about it.

    It may be some rows of what is stored under its key, from the row `first` on.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int | None = None

    def read(self) -> torch.Tensor:
        """The tensor, mapped from its shard: memory is touched as the tensor is used."""
        if self.first is not None:
            return self.rows(0, self.shape[0])
        with _open(self.file) as shard:
            tensor: torch.Tensor = shard.get_tensor(self.key)
        return tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A copy of some rows, for tensors that are too large to hold at once."""
        first = self.first or 0
        with _open(self.file) as shard:
            tensor: torch.Tensor = shard.get_slice(self.key)[first + start : first + stop]
        return tensor

    def parts(self, names: str) -> Iterator[tuple[str, "StoredTensor"]]:
        """What is stored as one, in as many equal parts as there are letters in `names`."""
        height = self.shape[0] // len(names)
        for index, name in enumerate(names):
            shape = (height, *self.shape[1:])
            yield name, dataclasses.replace(self, shape=shape, first=index * height)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` where there is none."""
    check_file(path)
    try:
        data = json.loads(read_small(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        damaged = CheckpointError(f"{path} is not valid JSON.", _DOWNLOAD)
        raise of_file(str(path), error, damaged) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object.", _DOWNLOAD)
    return data


def check_file(path: Path) -> None:
    """Raise unless `path` is a file and not a Git-LFS pointer in its place."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        missing = CheckpointError(f"{path} is missing or unreadable.", _DOWNLOAD)
        raise of_file(str(path), error, missing) from error
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a Git-LFS pointer, not the file itself.",
            "Run `git lfs install && git lfs pull` in that folder, or download the file.",
        )
    if path.with_name(f"{path.name}.aria2").exists():
        raise CheckpointError(
            f"{path} is not downloaded whole: aria2 left {path.name}.aria2 beside it.",
            "Run that download again: it goes on where it was.",
        )


# Matrices that may be zero on purpose: a layer whose last ones are adds nothing.
_SILENT = ("out.weight", "down.weight", "fc2.weight")


def check_filled(name: str, tensor: torch.Tensor) -> None:
    """Raise `CheckpointError` for a weight of zeros alone: its file was never filled.

    Whoever copies or downloads may make room for a whole file first, and then break off.
    """
    weighs = name.endswith(".weight") and not name.endswith(_SILENT)
    if weighs and not (tensor[:1].any() or tensor.any()):
        raise CheckpointError(
            f"The tensor {name} is all zeros, as where a copy or a download broke off.", _DOWNLOAD
        )


class Hashes(NamedTuple):
    """SHA-256 over some files, their names included, and of each by its path."""

    total: str
    files: Mapping[Path, str]


def files_sha256(files: Iterable[Path]) -> Hashes:
    """Read and hash some files, in order of their paths."""
    total, each = hashlib.sha256(), {}
    for path in sorted(files):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        total.update(f"{path.name}\0".encode())
        total.update(digest.digest())
        each[path] = digest.hexdigest()
    return Hashes(total.hexdigest(), each)


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's shards by its stored name, from the headers alone."""
    stored: dict[str, StoredTensor] = {}
    index = _read_index(folder)
    for name in sorted(set(index.values())) or weight_files(folder):
        for tensor in _read_header(folder / name):
            if tensor.key in stored:
                raise CheckpointError(
                    f"{tensor.key} is in two shards, {stored[tensor.key].file.name} and {name}.",
                    "Remove the shard that does not belong to this checkpoint.",
                )
            stored[tensor.key] = tensor
    for key, name in index.items():
        if key not in stored or stored[key].file.name != name:
            raise CheckpointError(f"{INDEX_FILE} promises {key} in {name}: absent.", _DOWNLOAD)
    return stored


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard; empty where the folder holds a single file."""
    if not (folder / INDEX_FILE).exists():
        if not weight_files(folder):
            raise no_weights(folder)
        return {}
    index = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map.", _DOWNLOAD)
    for name in index.values():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{folder / INDEX_FILE} names the shard {name!r}.", _DOWNLOAD)
    if SINGLE_FILE not in index.values() and (folder / SINGLE_FILE).exists():
        raise CheckpointError(
            f"{folder} holds two sets of weights: {SINGLE_FILE}, and what {INDEX_FILE} names.",
            "Remove the set that is not meant.",
        )
    return index


def weight_files(folder: Path) -> list[str]:
    """The files of weights that a folder without an index holds; empty where there are none.

    That is the single file, or all shards of a set, or the only safetensors file whatever its name;
    adapters are none.
    """
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    names = [file.name for file in sorted(folder.glob("*.safetensors"))]
    names = [name for name in names if not name.startswith(("adapter_", "non_lora_"))]
    shards = [(name, found) for name in names if (found := _SHARD.fullmatch(name))]
    if shards and len(shards) == int(shards[0][1]["count"]):
        return [name for name, _ in shards]
    return names if len(names) == 1 and not shards else []


def no_weights(folder: Path) -> CheckpointError:
    """The error for a folder without weights that are read, with the remedy for what it holds."""
    what, remedy = next(
        (
            (what, remedy)
            for patterns, what, remedy in _TRAINERS
            if any(any(folder.glob(pattern)) for pattern in patterns)
        ),
        (f"has no {SINGLE_FILE} and no {INDEX_FILE}.", _DOWNLOAD),
    )
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner and "LoRA" not in what:
        what, remedy = what, f"Give the folder of the checkpoint itself: {folder / inner[-1]}"
    if base := _adapter_base(folder):
        remedy = remedy.replace("BASE", base)
    return CheckpointError(f"{folder} {what}", remedy)


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter, which is no part of the weights."""
    return any(any(folder.glob(pattern)) for pattern in _ADAPTER)


def _adapter_base(folder: Path) -> str | None:
    """The base model that an adapter names, if it is a name that can be shown."""
    try:
        data = json.loads(read_small(folder / "adapter_config.json"))
        base = data["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return base if isinstance(base, str) and base.isprintable() and 0 < len(base) < 200 else None


_SHARD = re.compile(r".*-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

_CONVERT = (
    "Convert it in a sandbox: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
    "'model.safetensors')."
)

_ADAPTER = ("adapter_config.json", "adapter_model.*")

# What is no checkpoint, mostly what trainers leave: patterns of files, what it is, what to do.
_TRAINERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("manifest.json",), "is a bundle, not a checkpoint.", "Give what it was exported from."),
    (
        (*_ADAPTER, "non_lora_trainables.bin"),
        "holds a LoRA adapter without its base.",
        "Merge it into BASE first, with the trainer's merge script or peft's merge_and_unload(), "
        "and save that with save_pretrained(..., safe_serialization=True).",
    ),
    (
        ("mm_projector.bin", "*/mm_projector.bin"),
        "holds a projector alone, what the first phase of training writes.",
        "Give the checkpoint of a later phase, or save projector and language model in one.",
    ),
    (
        ("zero_to_fp32.py", "global_step*", "*_optim_states.pt"),
        "holds the parts of a DeepSpeed run.",
        "Join them first: python zero_to_fp32.py . OUT --safe_serialization",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp_*"),
        "holds the parts of an FSDP run.",
        "Join them first: accelerate merge-weights FOLDER OUT",
    ),
    (
        ("*.gguf",),
        "holds a GGUF file, which is converted and quantised.",
        "Give the checkpoint that it was made from.",
    ),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "holds only pickled weights (.bin, .pt), which are never loaded: "
        "a pickle may run any code.",
        f"Get the safetensors files. {_CONVERT}",
    ),
)


def _read_header(path: Path) -> Iterator[StoredTensor]:
    check_file(path)
    with _open(path) as shard:
        for key in shard.keys():  # noqa: SIM118 -- not a mapping
            view = shard.get_slice(key)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            if dtype not in DTYPES and not key.endswith(INTEGERS):
                raise CheckpointError(
                    f"{key} in {path} has the type {dtype}.",
                    f"Only {', '.join(DTYPES)} are read; take the unquantised checkpoint.",
                )
            if 0 in shape:
                raise CheckpointError(
                    f"{key} in {path} is empty, as where DeepSpeed's ZeRO-3 gathered nothing.",
                    "Join its parts: python zero_to_fp32.py . OUT --safe_serialization; or train "
                    "with stage3_gather_16bit_weights_on_model_save.",
                )
            yield StoredTensor(path, key, shape, DTYPES.get(dtype, torch.int64))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        what = f"{path} is truncated or not a safetensors file ({error})."
        raise of_file(str(path), error, CheckpointError(what, _DOWNLOAD)) from error


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


def check_none_missing(keys: Iterable[str]) -> None:
    """Raise `CheckpointError` for tensors that the configuration asks for and no shard holds."""
    missing = list(keys)
    if not missing:
        return
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", key) for key in missing))
    named = ", ".join(kinds[:6]) + (", ..." if len(kinds) > 6 else "")
    raise CheckpointError(
        f"The tensor {missing[0]} is missing."
        if len(missing) == 1
        else f"{len(missing)} tensors are missing: {named}.",
        "Check that all shards are there and that config.json belongs to them.",
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
            save_shard(shard, folder / str(len(shards)))
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


def save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a shard that whoever may read the other files can read: safetensors' own is private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ResourceError(
            f"The checkpoint needs {shown_bytes(size)}, {folder.parent} has {shown_bytes(free)}.",
            "Free some space, or write elsewhere.",
        )
