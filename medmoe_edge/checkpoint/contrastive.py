"""Checkpoints of MedMoE: config.json, tokenizer.json, and fp32 by our parameter names in
model.safetensors.index.json, model-0000x-of-0000y.safetensors or a single model.safetensors.

A model under the names of the authors' repository (GitHub `shivangchopra11/MedMoE`, which
holds no weights) is read beside a config.json of ours, once the `state_dict` of its Lightning
checkpoint is saved as safetensors. Nothing is ever unpickled.

    experts.0.projections.1.weight     image_encoder.model.moe.experts.0.proj_convs.1.0.weight
    experts.0.attention_in.weight      image_encoder.model.moe.experts.0.attn_proj.0.weight
    router.2.bias                      image_encoder.model.moe.router.2.bias
    vision., text.                     image_encoder.model.model., text_encoder.model.

Source of the official names: transformers' `SwinModel` and `BertModel` as saved, and that
repository.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from medmoe_edge.checkpoint.tensors import (
    INDEX_FILE,
    StoredTensor,
    check_filled,
    check_none_missing,
    files_sha256,
    read_headers,
    read_json,
    write_folder,
    wrong_shape,
)
from medmoe_edge.config import unknown_key
from medmoe_edge.config_contrastive import SCORES, ModalityConfig
from medmoe_edge.errors import CheckpointError
from medmoe_edge.models.contrastive import ModalityMoE

MODEL_TYPE = "modality-moe"
# Of config.json itself; the last ones say what the file is and who wrote it, and change nothing.
_KEYS = ("model_type", "config", "architectures", "torch_dtype", "dtype", "transformers_version")
SHARD_BYTES = 16 * 2**20  # what ships inside the package lies in files of less than 25 MB

_ATTENTION = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
}
_SWIN_TOP = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "patch_norm": "embeddings.norm",
    "norm": "layernorm",
}
_SWIN_BLOCK = _ATTENTION | {
    "attention": "attention.self.relative_position_bias_table",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_BERT_TOP = {
    "word_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "type_embedding": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
_BERT_LAYER = {name.removeprefix("attention."): key for name, key in _ATTENTION.items()} | {
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_PUBLISHED = ".moe.experts.0.proj_convs."
# what the authors' module holds and never computes with
_BESIDE = (
    "image_encoder.global_embedder.",
    "image_encoder.local_embedder.",
    "text_encoder.model.pooler.",
)
# constants that older versions stored, and what only pre-training needs
_UNUSED = ("relative_position_index", "position_ids", "mask_token")


def swin_name(name: str) -> str:
    """The hub's key of a `SwinTower` parameter."""
    top, rest = name.split(".", 1)
    if top == "merges":
        index, rest = rest.split(".", 1)
        return f"encoder.layers.{index}.downsample.{rest}"
    if top == "stages":
        stage, block, rest = rest.split(".", 2)
        module, _, part = rest.rpartition(".")
        inside = f"encoder.layers.{stage}.blocks.{block}.{_SWIN_BLOCK[module]}"
        return inside if part == "offset_bias" else f"{inside}.{part}"
    return f"{_SWIN_TOP[top]}.{rest}"


def bert_name(name: str) -> str:
    """The hub's key of a `BertTower` parameter."""
    module, _, part = name.rpartition(".")
    if module.startswith("layers."):
        _, index, inner = module.split(".")
        return f"encoder.layer.{index}.{_BERT_LAYER[inner]}.{part}"
    return f"{_BERT_TOP[module]}.{part}"


def write_modality_checkpoint(
    folder: Path,
    model: ModalityMoE,
    *,
    tokenizer_file: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> None:
    """Write config, weights and tokenizer; `folder` appears whole or not at all.

    A shard holds `shard_bytes`, or one tensor that is larger. Raises `InputError` for an existing
    folder (with `force`, one that is no checkpoint) and `ResourceError` where the disk does not
    take it.
    """
    state = model.state_dict()
    write_folder(
        folder,
        {"model_type": MODEL_TYPE, "config": model.config.to_json()},
        ((name, tensor.detach().cpu().float().contiguous()) for name, tensor in state.items()),
        sum(tensor.numel() * torch.float32.itemsize for tensor in state.values()),
        tokenizer_file=tokenizer_file,
        shard_bytes=shard_bytes,
        force=force,
    )


def published_name(name: str) -> str:
    """The authors' key of one of our parameters."""
    top, rest = name.split(".", 1)
    if top == "vision":
        return f"image_encoder.model.model.{swin_name(rest)}"
    if top == "text":
        return f"text_encoder.model.{bert_name(rest)}"
    if top == "router":
        return f"image_encoder.model.moe.router.{rest}"
    index, module, part = rest.split(".", 2)
    inside = {"attention_in": "attn_proj.0.", "attention_out": "attn_proj.2."}.get(module, "")
    if module == "projections":
        scale, part = part.split(".")
        inside = f"proj_convs.{scale}.0."
    return f"image_encoder.model.moe.experts.{index}.{inside}{part}"


def read_modality_checkpoint(folder: Path, *, as_published: bool = False) -> ModalityMoE:
    """The model of one of our folders, in fp32 and ready to be asked; the names may be theirs.

    `as_published` has it compute what the authors' code does, whatever config.json says. Raises
    what `match_checkpoint` does; sizes are compared before any memory is taken.
    """
    config, matched = match_checkpoint(folder, as_published=as_published)
    model = ModalityMoE(config)
    _copy(model, matched)
    return model.eval()


def match_checkpoint(
    folder: Path, *, as_published: bool = False
) -> tuple[ModalityConfig, dict[str, StoredTensor]]:
    """A folder's configuration, and all of its tensors by our names; no tensor is read.

    Raises `ConfigError`, or `CheckpointError` where they are not those of the configuration.
    """
    folder = Path(folder)
    data = read_json(folder / "config.json")
    if data.get("model_type") != MODEL_TYPE or "config" not in data:
        raise CheckpointError(
            f"{folder} is no checkpoint of a {MODEL_TYPE} model.",
            "Give the folder that training or init wrote.",
        )
    for key in data:
        if key not in _KEYS:
            raise unknown_key(key, _KEYS, "config.json, outside of its block config,")
    config = ModalityConfig.from_json(data["config"], "config.json config")
    if as_published:
        config = dataclasses.replace(config, as_published=True)
    stored = read_headers(folder)
    rename: Callable[[str], str] = str
    if any(_PUBLISHED in key for key in stored):
        stored, rename = _published(stored), published_name
    with torch.device("meta"):
        matched = _match(ModalityMoE(config), stored, rename)
    surplus = stored.keys() - set(map(rename, matched))
    if surplus:
        raise _surplus(min(surplus))
    return config, matched


def _published(headers: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What is read of the authors' tensors, without the module that held the model.

    A convolution over single positions `[D, C, 1]` is a linear map `[D, C]`.
    """
    stored = {}
    for key, tensor in headers.items():
        name = key.removeprefix("model.")
        if name.endswith(_UNUSED) or name.startswith(_BESIDE):
            continue
        shape = tensor.shape[:-1] if ".proj_convs." in name and tensor.shape[1:] else tensor.shape
        stored[_modern(name)] = dataclasses.replace(tensor, shape=shape)
    return stored


def modality_sha256(folder: Path) -> str:
    """The hash over those files of a checkpoint, by name, that decide what it says."""
    besides = (folder / name for name in ("config.json", INDEX_FILE, "tokenizer.json", SCORES))
    weights = {stored.file for stored in read_headers(folder).values()}
    return files_sha256(weights | {path for path in besides if path.exists()}).total


def _modern(key: str) -> str:
    """Early BERT checkpoints call a norm's weight and bias `gamma` and `beta`."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _match(
    module: nn.Module, stored: Mapping[str, StoredTensor], rename: Callable[[str], str]
) -> dict[str, StoredTensor]:
    """Our names -> stored tensors; raises unless each is there in its shape."""
    matched = {}
    expected = module.state_dict()
    check_none_missing(key for key in map(rename, expected) if key not in stored)
    for name, tensor in expected.items():
        key, shape = rename(name), tuple(tensor.shape)
        if stored[key].shape != shape:
            raise wrong_shape(stored[key].key, stored[key].shape, shape)
        matched[name] = stored[key]
    return matched


def _copy(module: nn.Module, matched: Mapping[str, StoredTensor]) -> None:
    tensors: dict[str, Tensor] = {
        name: stored.read().view(stored.shape) for name, stored in matched.items()
    }
    for name, tensor in tensors.items():
        check_filled(name, tensor)
    module.load_state_dict(tensors)


def _surplus(key: str) -> CheckpointError:
    return CheckpointError(
        f"The tensor {key} has no place in this configuration.",
        "Use the configuration that belongs to these weights.",
    )
