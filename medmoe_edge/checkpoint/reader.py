"""Checkpoints in the official Med-MoE folder layout, read one tensor at a time.

    config.json, tokenizer.json, model.safetensors.index.json, model-0000x-of-0000y.safetensors

Every tensor's name and shape is checked against the configuration from the shards' headers,
before any data is touched.

A checkpoint can be cut to the experts of some modalities: it is then read like any other, with the
same hash. The router stays whole: probabilities are over all of its rows, so that a token whose
expert is there is computed as before, to the bit; others go to the best expert that is there, with
the little that it counts; and images of other modalities are still recognised.

It can also be given fewer image tokens than it has (`VisionConfig.pool`): none of its weights
depends on how many there are.

With one expert left, that and the meta expert can be merged into one feed-forward, whose hidden
channels are those of both side by side. It is exact where the expert counts fully (g = 1), as it
does in a router of that one row; what this changes, a verification measures.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medmoe_edge.checkpoint.config import model_config
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
    check_filled,
    check_none_missing,
    files_sha256,
    has_adapter,
    no_weights,
    read_headers,
    read_json,
    weight_files,
    write_checkpoint,
    wrong_shape,
)
from medmoe_edge.checkpoint.tokenizer import FAST_FILE, FoundTokenizer, find_tokenizer
from medmoe_edge.config import ModelConfig, VisionConfig
from medmoe_edge.errors import CheckpointError, ConfigError, InputError, Notice, did_you_mean

__all__ = ["Checkpoint", "as_checkpoint", "import_router", "read_checkpoint", "write_checkpoint"]

LAST = ("down", "fc2")  # of a feed-forward's matrices


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """A parameter of feed-forwards side by side: along `axis`, or their sum where it is None."""

    checkpoint: "Checkpoint"
    parts: tuple[str, ...]
    axis: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """The parameter; the checkpoint's own are read one after the other."""
        parts = [self.checkpoint.tensor(name) for name in self.parts]
        if self.axis is None:
            return torch.stack(parts).float().sum(0)
        return torch.cat(parts, self.axis)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Some rows of it, copied."""
        return self.read()[start:stop].clone()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint; iterating yields `(our name, tensor)`, each read when it is reached.

    Attributes:
        folder: Its files.
        config: Of the model.
        tokenizer_file: In the form of the `tokenizers` library, if it has that.
        names: Our parameter names, with shape, dtype and place.
        twins: Those that the official code stored a second time under a tied name.
        warnings: Where its authors' own code would compute something else.
        whole: The checkpoint as it was read, where this one has fewer experts or image tokens.
    """

    folder: Path
    config: ModelConfig
    tokenizer_file: Path | None
    names: Mapping[str, "StoredTensor | MergedTensor"]
    twins: Mapping[str, StoredTensor]
    warnings: tuple[Notice, ...] = ()
    whole: "Checkpoint | None" = None

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
        if not is_router(name):
            check_filled(name, tensor)
        if name in self.twins and not torch.equal(tensor, self.twins[name].read()):
            raise CheckpointError(
                f"{name} and {self.twins[name].key} differ, but are one module.",
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
        """SHA-256 of the folder's `config.json` and weights by name; read once, with `sha256`."""
        files = self._hashes.files.items()  # a tower elsewhere may have files of the same names
        return {path.name: found for path, found in files if path.parent == self.folder}

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """The parameters that lie in files as they are, by name: all but merged ones."""
        return {
            name: tensor for name, tensor in self.names.items() if isinstance(tensor, StoredTensor)
        }

    @functools.cached_property
    def _hashes(self) -> Hashes:
        if self.whole is not None:
            return self.whole._hashes
        shards = {tensor.file for tensor in self.stored.values()}
        return files_sha256(shards | {self.folder / "config.json"})


def read_checkpoint(folder: Path, *, vision_tower: Path | None = None) -> Checkpoint:
    """Open an official folder (current or legacy layout); no tensor data is read yet.

    Args:
        folder: With weights and `config.json`.
        vision_tower: A folder with a `CLIPVisionModel` to use instead of the stored tower or of the
            path in `config.json`.

    Raises:
        CheckpointError: The files are missing, damaged, or not those of the configuration.
        ConfigError: The configuration cannot be used.
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
    generation = folder / "generation_config.json"
    generation_data = read_json(generation) if generation.exists() else {}
    data = _with_generation(data, generation_data)
    config = model_config(data, {key: tensor.shape for key, tensor in stored.items()}, tower_data)
    if tower_data is not None:
        _check_processor(Path(str(path)) / "preprocessor_config.json", config.vision)
    _check_processor(folder / "preprocessor_config.json", config.vision)
    names, twins = _match(config, stored)
    tokenizer = folder / FAST_FILE
    if tokenizer.exists():
        check_file(tokenizer)
    adapter = Notice(
        "adapter_not_applied",
        "The checkpoint's folder holds a LoRA adapter beside the weights: it is not applied.",
    )
    told = (
        _dropped_tokens(data, config),
        adapter if has_adapter(folder) else None,
        _not_generated(generation_data),
    )
    return Checkpoint(
        folder,
        config,
        tokenizer if tokenizer.exists() else None,
        names,
        twins,
        warnings=tuple(filter(None, told)),
    )


def as_checkpoint(checkpoint: Path | Checkpoint) -> Checkpoint:
    """Open a folder as `read_checkpoint` does; what is open already serves all steps as it is."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)


def cut_checkpoint(
    whole: Checkpoint, modalities: Sequence[str], *, merge: bool = False
) -> Checkpoint:
    """The checkpoint with the experts of some modalities alone.

    Args:
        whole: A checkpoint that says which modality each expert serves.
        modalities: Whose experts stay; they keep their order in the model.
        merge: Make one feed-forward of the only expert and the meta expert.

    Returns:
        What reads like a checkpoint, of the same hash; nothing of it is on the disk.

    Raises:
        InputError: A modality is unknown, nothing would change, or the experts that would be left
            are too few to choose among or cannot be merged.
    """
    config = cut_config(whole.config, modalities, merge=merge)
    moe, before = config.moe, whole.config.moe
    assert moe is not None
    assert before is not None
    numbers = [before.expert_names.index(name) for name in moe.expert_names]
    names: dict[str, StoredTensor | MergedTensor] = {}
    for name, tensor in whole.names.items():
        own, is_expert, rest = name.partition(".ffn.experts.")
        number, _, part = rest.partition(".")
        if is_expert and int(number) not in numbers:
            continue
        if is_expert and merge:
            parts = (name, f"{own}.ffn.meta.{part}")[: 1 + moe.meta_expert]
            names[f"{own}.ffn.merged.{part}"] = _merged(whole, parts)
        elif is_expert:
            names[f"{own}.ffn.experts.{numbers.index(int(number))}.{part}"] = tensor
        elif not (merge and ".ffn.meta." in name):
            names[name] = tensor
    twins = {name: tensor for name, tensor in whole.twins.items() if name in names}
    origin = whole.whole or whole
    return dataclasses.replace(whole, config=config, names=names, twins=twins, whole=origin)


def with_tokens(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The checkpoint with so many image tokens; raises `InputError` where it cannot have them."""
    config = checkpoint.config
    config = dataclasses.replace(config, vision=config.vision.with_tokens(count))
    origin = checkpoint.whole or checkpoint
    return dataclasses.replace(checkpoint, config=config, whole=origin)


def cut_config(
    config: ModelConfig, modalities: Sequence[str], *, merge: bool = False
) -> ModelConfig:
    """The configuration of `cut_checkpoint`, whose errors it raises."""
    moe = config.moe
    if moe is None or not moe.expert_names:
        raise InputError(
            "The model does not say which expert serves which modality.",
            "Leave --modality out: all of it is exported.",
        )
    for name in modalities:
        if name not in moe.expert_names:
            known = ", ".join(moe.expert_names)
            hint = did_you_mean(name, moe.expert_names)
            raise InputError(f"The model has no expert for {name!r}.", f"{hint}It has: {known}.")
    kept = tuple(name for name in moe.expert_names if name in modalities)
    left_out = len(kept) < moe.num_experts
    if not kept or not (left_out or merge):
        raise InputError(
            "No modality was named." if not kept else "All of the model's experts would stay.",
            f"Name some of: {', '.join(moe.expert_names)}.",
        )
    if len(kept) < moe.top_k:
        raise InputError(
            f"The model asks {moe.top_k} experts about each token, and {len(kept)} would be left.",
            "Keep one modality more.",
        )
    if merge and (len(kept) > 1 or moe.use_residual):
        raise InputError(
            "An expert that does not count fully for every token cannot be merged."
            if len(kept) == 1
            else f"{len(kept)} experts would be left, and one alone can be merged.",
            "Leave --merge out.",
        )
    cut = dataclasses.replace(
        moe,
        num_experts=len(kept),
        expert_names=kept,
        router_names=moe.expert_names if left_out else (),
        merged=merge,
    )
    return dataclasses.replace(config, moe=cut)


def cut_like(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The reference of a model: its checkpoint, with the experts and image tokens that it has.

    None are merged.
    """
    whole, moe = checkpoint.whole or checkpoint, config.moe
    cut = whole
    if moe is not None and moe.left_out and whole.config.moe is not None:
        cut = cut_checkpoint(whole, moe.expert_names)
    if config.vision.pool == whole.config.vision.pool:
        return cut
    vision = dataclasses.replace(whole.config.vision, pool=config.vision.pool)
    return with_tokens(cut, vision.image_tokens)


def with_all_tokens(checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint with the image tokens that it was read with; None where it has them."""
    whole = checkpoint.whole
    if whole is None or whole.config.vision == checkpoint.config.vision:
        return None
    return with_tokens(checkpoint, whole.config.vision.image_tokens)


def _merged(whole: Checkpoint, parts: tuple[str, ...]) -> MergedTensor:
    """Of a feed-forward's first matrices and biases the rows, of its last matrix the columns."""
    first = whole.names[parts[0]]
    matrix, kind = parts[0].split(".")[-2:]
    last = matrix in LAST
    axis = (1 if kind == "weight" else None) if last else 0
    shape = list(first.shape)
    if axis is not None:
        shape[axis] *= len(parts)
    dtype = torch.float32 if axis is None else first.dtype
    return MergedTensor(whole, parts, axis, tuple(shape), dtype)


def _with_generation(data: dict[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the end tokens of generation_config.json, by which transformers ends."""
    given = (source.get("eos_token_id") for source in (data, generation))
    both = [None if ids == [] else ids for ids in given]
    own, ends = (each if isinstance(each, list) else [each] for each in both)
    if own == [None]:
        return {**data, "eos_token_id": both[1]}
    if ends == [None]:
        return data
    if any(end not in ends for end in own):
        raise ConfigError(
            f"config.json has eos_token_id = {both[0]!r}, generation_config.json {both[1]!r}.",
            "Set both to the tokenizer's end-of-text token.",
        )
    return {**data, "eos_token_id": own + [end for end in ends if end not in own]}


def _dropped_tokens(data: Mapping[str, Any], config: ModelConfig) -> Notice | None:
    """What to say of a checkpoint of MoE-LLaVA whose own code drops tokens, None where it does not.

    Its gate, DeepSpeed's, gives each expert room for `tokens x k x eval_capacity_factor / experts`
    in inference too, and what finds none skips the experts. Med-MoE's own gate has no such bound.
    """
    moe, block = config.moe, data.get("moe")
    if moe is None or moe.meta_expert or not isinstance(block, Mapping):
        return None
    factor = block.get("eval_capacity_factor")
    if not isinstance(factor, int | float) or factor * moe.top_k >= moe.num_experts:
        return None
    return Notice(
        "tokens_dropped_elsewhere",
        f"config.json has moe.eval_capacity_factor = {factor}: MoE-LLaVA's own code would drop "
        "tokens whose expert is full. Here none is dropped, so answers may differ from it.",
    )


# What in a generation_config.json makes transformers choose other tokens, with other values.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("min_length", "min_new_tokens", "diversity_penalty", "penalty_alpha"), 0),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "constraints")),
    **dict.fromkeys(("sequence_bias", "force_words_ids", "stop_strings", "watermarking_config")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "dola_layers")),
    "exponential_decay_length_penalty": None,
}


def _not_generated(generation: Mapping[str, Any]) -> Notice | None:
    """What to say of a generation_config.json by which transformers would choose other tokens."""
    other = [
        key
        for key, neutral in _NEUTRAL.items()
        if generation.get(key) not in (None, [], {}, neutral)
    ]
    told = ", ".join(f"{key} = {generation[key]!r:.60}" for key in other)
    if not told:
        return None
    return Notice(
        "generation_not_applied",
        f"generation_config.json has {told}: not applied here, "
        "so answers may differ from those of the checkpoint's own code.",
    )


def split_fused(headers: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensors that are read, one for each of ours; see `checkpoint.keys`."""
    stored: dict[str, StoredTensor] = {}
    for key, tensor in headers.items():
        if is_unread(key):
            continue
        if FUSED in key and tensor.shape and tensor.shape[0] % 3 == 0:
            owner, part = key.rsplit(".", 1)
            stored |= {f"{owner}.{name}.{part}": third for name, third in tensor.parts("qkv")}
        else:
            stored[without_qwen(key)] = tensor
    return stored


def _read_tower(path: object) -> tuple[dict[str, StoredTensor], dict[str, object]]:
    """The tensors of a separate CLIP folder under their official names, and its `config.json`."""
    if not isinstance(path, str | Path) or not os.path.isdir(path):  # also of a name beyond limits
        elsewhere = f"{str(path)!r} is not a folder here" if path else "names no folder with one"
        raise CheckpointError(
            f"The checkpoint holds no vision tower, and {elsewhere}.",
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


def _check_processor(file: Path, vision: VisionConfig) -> None:
    """Raise `ConfigError` where a tower's own processor normalises pixels in another way."""
    data = read_json(file) if file.exists() else {}
    for key, used in (("image_mean", vision.pixel_mean), ("image_std", vision.pixel_std)):
        own = [round(value / 255, 8) for value in used]
        if data.get(key) not in (None, own):
            raise ConfigError(
                f"{file} has {key} = {data[key]!r}, and this tower would be read with {own}.",
                "Use the tower that the checkpoint was trained with, and its own files.",
            )


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
                "Convert it to the names of transformers' PhiForCausalLM: q_proj, k_proj, v_proj."
                if any(".Wqkv." in each for each in stored)
                else "Use the config.json that belongs to these weights.",
            )
        if tensor.shape != expected[name]:
            raise wrong_shape(key, tensor.shape, expected[name])
        if tied_name(key) != key and tied_name(key) in stored:
            twins[name] = tensor
        else:
            names[name] = tensor
    check_none_missing(key for key, name in ours.items() if name not in names)
    return names, twins


def import_router(path: Path) -> dict[str, torch.Tensor]:
    """Read an official router file, without unpickling arbitrary objects.

    Args:
        path: `phi_router.pth` or `stablelm_router.pth`, written by `torch.save`, which hold
            `fc1.weight` and `fc1.bias`.

    Returns:
        `weight` `[E, D]` and `bias` `[E]`, fp32.

    Raises:
        CheckpointError: The file is something else, or cannot be read.
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
