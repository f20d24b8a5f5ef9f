"""Checkpoints in the official Med-MoE folder layout, read one tensor at a time.

    config.json, tokenizer.json, model.safetensors.index.json, model-0000x-of-0000y.safetensors

Every tensor's name and shape is checked against the configuration from the shards' headers,
before any data is touched.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from medmoe_edge.checkpoint.config import dropped_tokens, model_config
from medmoe_edge.checkpoint.keys import (
    CLIP_PREFIX,
    FUSED,
    TOWER_PREFIX,
    expected_parameters,
    is_router,
    is_unread,
    official_keys,
    official_name,
    tied_name,
    without_qwen,
)
from medmoe_edge.checkpoint.tensors import (
    INDEX_FILE,
    Hashes,
    StoredTensor,
    check_file,
    files_sha256,
    no_weights,
    read_headers,
    read_json,
    weight_files,
    write_checkpoint,
    wrong_shape,
)
from medmoe_edge.checkpoint.tokenizer import FAST_FILE, FoundTokenizer, find_tokenizer
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import CheckpointError, Notice

__all__ = ["Checkpoint", "as_checkpoint", "import_router", "read_checkpoint", "write_checkpoint"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint; iterating yields `(our name, tensor)`, each read when it is reached.

    `names` maps our parameter names to shape, dtype and place; `twins` those that the official
    code stored a second time under a tied name. `warnings` say where its authors' own code would
    compute something else.
    """

    folder: Path
    config: ModelConfig
    tokenizer_file: Path | None
    names: Mapping[str, StoredTensor]
    twins: Mapping[str, StoredTensor]
    warnings: tuple[Notice, ...] = ()

    @functools.cached_property
    def tokenizer(self) -> FoundTokenizer:
        """Its tokenizer, in whichever form; raises `CheckpointError` unless it fits the weights."""
        found = find_tokenizer(self.folder)
        found.check(self.config.decoder)
        found.tokenizer.ids_of(self.config.refusals)
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """One parameter as stored; a router that all layers share is the same tensor for all."""
        if is_router(name) and self.shared_router:
            return self._shared_router[name.rsplit(".", 1)[1]]
        tensor = self.names[name].read()
        if name in self.twins and not torch.equal(tensor, self.twins[name].read()):
            raise CheckpointError(
                f"{self.names[name].key} and {self.twins[name].key} differ, but are one module.",
                "This is not a checkpoint that Med-MoE's code wrote.",
            )
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of one parameter, copied: the rest is never in memory."""
        if name in self.twins or (is_router(name) and self.shared_router):
            return self.tensor(name)[start:stop]
        return self.names[name].rows(start, stop)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self.tensor(name)) for name in self.names)

    @property
    def shared_router(self) -> bool:
        """Whether every MoE layer holds the same router, as in the official checkpoints."""
        return bool(self._shared_router)

    @functools.cached_property
    def _shared_router(self) -> dict[str, torch.Tensor]:
        """`weight` and `bias` of the router common to all layers; empty where they differ."""
        shared: dict[str, torch.Tensor] = {}
        # It is kept, and may be loaded into a model later, which takes no inference tensors.
        with torch.inference_mode(False):
            for name in filter(is_router, self.names):
                part, tensor = name.rsplit(".", 1)[1], self.names[name].read()
                if not torch.equal(shared.setdefault(part, tensor), tensor):
                    return {}
            return {part: tensor.clone() for part, tensor in shared.items()}

    def sha256(self) -> str:
        """Hash over `config.json` and every weight file, in order of their names; read once."""
        return self._hashes.total

    def file_hashes(self) -> Mapping[str, str]:
        """SHA-256 of `config.json` and every weight file by name; read once, with `sha256`."""
        return self._hashes.files

    @functools.cached_property
    def _hashes(self) -> Hashes:
        shards = {stored.file for stored in self.names.values()}
        return files_sha256(shards | {self.folder / "config.json"})


def read_checkpoint(folder: Path, *, vision_tower: Path | None = None) -> Checkpoint:
    """Open an official folder (current or legacy layout); no tensor data is read yet.

    `vision_tower` is a folder with a `CLIPVisionModel` to use instead of the stored tower or of
    the path in `config.json`. Raises `CheckpointError` or `ConfigError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.", "Give the checkpoint's folder.")
    if not ((folder / INDEX_FILE).exists() or weight_files(folder)):
        raise no_weights(folder)
    data = read_json(folder / "config.json")
    headers = read_headers(folder)
    official = official_keys(headers)
    stored = split_fused({official[key]: tensor for key, tensor in headers.items()})
    tower_data = None
    if vision_tower or not any(key.startswith(TOWER_PREFIX) for key in stored):
        path = vision_tower or data.get("mm_image_tower") or data.get("mm_vision_tower")
        tower, tower_data = _read_tower(path)
        stored = {key: value for key, value in stored.items() if not key.startswith(TOWER_PREFIX)}
        stored |= tower
    data = _with_generation(folder, data)
    config = model_config(data, {key: tensor.shape for key, tensor in stored.items()}, tower_data)
    names, twins = _match(config, stored)
    tokenizer = folder / FAST_FILE
    if tokenizer.exists():
        check_file(tokenizer)
    notice = dropped_tokens(data, config)
    return Checkpoint(
        folder,
        config,
        tokenizer if tokenizer.exists() else None,
        names,
        twins,
        warnings=(notice,) if notice else (),
    )


def as_checkpoint(checkpoint: Path | Checkpoint, *, vision_tower: Path | None = None) -> Checkpoint:
    """A checkpoint that is open already, or else its folder opened as `read_checkpoint` does.

    What is handed on open is read and hashed once, however many steps need it.
    """
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return read_checkpoint(checkpoint, vision_tower=vision_tower)


def _with_generation(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """config.json with the end token of generation_config.json, where it names none itself."""
    file = folder / "generation_config.json"
    if data.get("eos_token_id") is not None or not file.exists():
        return data
    return {**data, "eos_token_id": read_json(file).get("eos_token_id")}


def split_fused(headers: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensors that are read, one for each of ours; see `checkpoint.keys`."""
    stored: dict[str, StoredTensor] = {}
    for key, tensor in headers.items():
        if is_unread(key):
            continue
        if FUSED in key:
            owner, part = key.rsplit(".", 1)
            stored |= {f"{owner}.{name}.{part}": third for name, third in tensor.parts("qkv")}
        else:
            stored[without_qwen(key)] = tensor
    return stored


def _read_tower(path: object) -> tuple[dict[str, StoredTensor], dict[str, object]]:
    """The tensors of a separate CLIP folder under their official names, and its `config.json`."""
    if not isinstance(path, str | Path) or not Path(path).is_dir():
        raise CheckpointError(
            f"The checkpoint holds no vision tower, and {str(path)!r} is not a folder here.",
            "Pass --vision-tower FOLDER with openai/clip-vit-large-patch14-336 as safetensors.",
        )
    folder = Path(path)
    tower = {}
    for key, tensor in read_headers(folder).items():
        # CLIPModel holds a text tower too; transformers 5 leaves the prefix out
        if key.startswith(("vision_model.", "embeddings.", "encoder.", "pre_", "post_", "head.")):
            tower[CLIP_PREFIX + key.removeprefix("vision_model.")] = tensor
    tower = {key: tensor for key, tensor in tower.items() if not is_unread(key)}
    config = folder / "config.json"
    return tower, read_json(config) if config.exists() else {}


def _match(
    config: ModelConfig, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Our names -> stored tensors, and the tied duplicates; raises unless all agree in shape."""
    expected = expected_parameters(config)
    ours = {official_name(name, config): name for name in expected}
    names: dict[str, StoredTensor] = {}
    twins: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name = ours.get(tied_name(key))
        if name is None:
            raise CheckpointError(
                f"{tensor.file.name} has the tensor {key} {list(tensor.shape)}, "
                "for which config.json leaves no place.",
                "Use the config.json that belongs to these weights.",
            )
        if tensor.shape != expected[name]:
            raise wrong_shape(key, tensor.shape, expected[name])
        if tied_name(key) != key and tied_name(key) in stored:
            twins[name] = tensor
        else:
            names[name] = tensor
    for key, name in ours.items():
        if name not in names:
            raise CheckpointError(
                f"The tensor {key} {list(expected[name])} is missing.",
                "Check that all shards are there and that config.json belongs to them.",
            )
    return names, twins


def import_router(path: Path) -> dict[str, torch.Tensor]:
    """`weight` `[E, D]` and `bias` `[E]`, fp32, of an official router file.

    `phi_router.pth` and `stablelm_router.pth` hold `fc1.weight` and `fc1.bias`, written by
    `torch.save`; they are read without unpickling arbitrary objects.
    """
    path = Path(path)
    check_file(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file makes the restricted unpickler raise anything
        raise CheckpointError(
            f"{path} is not a plain file of tensors.", "Use the official router file."
        ) from error
    data = data if isinstance(data, dict) else {}
    # a trainer may have put its wrapper's name before `fc1`
    names = [key for key in data if isinstance(key, str) and f".{key}".endswith(".fc1.weight")]
    weight = data[names[0]] if len(names) == 1 else None
    bias = data.get(f"{names[0].removesuffix('weight')}bias") if len(names) == 1 else None
    if not (
        isinstance(weight, torch.Tensor)
        and isinstance(bias, torch.Tensor)
        and weight.ndim == 2
        and bias.shape == weight.shape[:1]
    ):
        raise CheckpointError(
            f"{path} holds no fc1.weight [E, D] with fc1.bias [E].", "Use the official router file."
        )
    return {"weight": weight.float(), "bias": bias.float()}
