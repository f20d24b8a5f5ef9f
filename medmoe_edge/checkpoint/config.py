"""The official folder's `config.json` <-> `ModelConfig`, and which vision tower it means.

The official file is MoE-LLaVA's: transformers' Phi or StableLM keys, `mm_*` keys and a `moe`
block. What it cannot say lies in one block of our own, `medmoe_edge`: the vision tower where it
is not CLIP ViT-L/14-336, and the experts' names. The tower is read from that and from the shapes of
its tensors. Values that this implementation would compute wrongly are refused; keys nobody knows
are refused too.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from medmoe_edge.checkpoint.keys import CLIP_PREFIX, TOWER_PREFIX, Shape
from medmoe_edge.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig, unknown_key
from medmoe_edge.errors import CheckpointError, ConfigError

Json = Mapping[str, Any]

# CLIP's normalisation (OpenAI's preprocessor_config.json), on the 0..255 scale
CLIP_MEAN = tuple(255 * mean for mean in (0.48145466, 0.4578275, 0.40821073))
CLIP_STD = tuple(255 * std for std in (0.26862954, 0.26130258, 0.27577711))
CLIP_L_14_336 = VisionConfig(
    kind="clip",
    image_size=336,
    feature_size=1024,
    pixel_mean=CLIP_MEAN,
    pixel_std=CLIP_STD,
    layers=24,
    heads=16,
    intermediate_size=4096,
    patch_size=14,
)
CLIP_HEAD_SIZE = 64  # of every published CLIP tower


def is_standard(vision: VisionConfig) -> bool:
    """Whether the tower is the official one, which needs no description of our own."""
    # padding and the selected layer have official keys of their own
    own = {"pad_to_square": vision.pad_to_square, "select_layer": vision.select_layer}
    return vision.to_json() == {**CLIP_L_14_336.to_json(), **own}


def vision_config(
    data: Json, own: Json, shapes: Mapping[str, Shape], tower: Json | None
) -> VisionConfig:
    """The tower that our own block describes, else CLIP with the sizes of its tensors.

    `data` is `config.json`, `own` its block `medmoe_edge`, `tower` the `config.json` of a tower
    that lies in a folder of its own; `shapes` are the stored tensors' by official name.
    """
    aspect = data.get("image_aspect_ratio", "square")
    if aspect not in ("pad", "square"):
        raise ConfigError(
            f"config.json has image_aspect_ratio = {aspect!r}.", "Use 'pad' or 'square'."
        )
    if "vision" in own:
        vision = VisionConfig.from_json(own["vision"], "config.json medmoe_edge.vision")
        sizes = (vision.image_size, vision.patch_size, vision.feature_size)
        if not all(0 < size <= 2**16 for size in sizes) or not 0 <= vision.layers <= 1024:
            raise ConfigError("medmoe_edge.vision has an impossible size.", "Correct config.json.")
    else:
        vision = _clip(data, shapes, tower, aspect == "pad")
    if data.get("mm_hidden_size", vision.feature_size) != vision.feature_size:
        raise ConfigError(
            f"config.json has mm_hidden_size = {data['mm_hidden_size']!r}, "
            f"the vision tower yields {vision.feature_size} features.",
            "Use the vision tower that the checkpoint was trained with.",
        )
    return vision


def _clip(
    data: Json, shapes: Mapping[str, Shape], tower: Json | None, pad_to_square: bool
) -> VisionConfig:
    """CLIP's sizes from its tensors' shapes; the head count is not visible in them."""
    try:
        rows, size = shapes[CLIP_PREFIX + "embeddings.position_embedding.weight"]
        patch = shapes[CLIP_PREFIX + "embeddings.patch_embedding.weight"][-1]
        intermediate, _ = shapes[CLIP_PREFIX + "encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"The tensors under {TOWER_PREFIX} are not a CLIP vision transformer.",
            "Give one with --vision-tower, or describe the tower in config.json's medmoe_edge.",
        ) from error
    grid = math.isqrt(rows - 1)
    norms = (key for key in shapes if key.startswith(CLIP_PREFIX))
    described = (tower or {}).get("vision_config", tower) or {}
    activation = described.get("hidden_act", "quick_gelu")
    if activation != "quick_gelu":
        raise ConfigError(
            f"The vision tower has hidden_act = {activation!r}.",
            "Only OpenAI's CLIP towers ('quick_gelu') are implemented.",
        )
    return VisionConfig.from_json(
        {
            "kind": "clip",
            "image_size": grid * patch,
            "feature_size": size,
            "pixel_mean": CLIP_MEAN,
            "pixel_std": CLIP_STD,
            "pad_to_square": pad_to_square,
            "layers": sum(key.endswith(".layer_norm1.weight") for key in norms),
            "heads": described.get("num_attention_heads", max(1, size // CLIP_HEAD_SIZE)),
            "intermediate_size": intermediate,
            "patch_size": patch,
            "select_layer": data.get("mm_vision_select_layer", CLIP_L_14_336.select_layer),
        },
        "vision tower",
    )


# model_type -> decoder kind, whether it may hold experts, architecture
_MODEL_TYPES: dict[str, tuple[Literal["phi", "stablelm"], bool, str]] = {
    "moe_llava_phi": ("phi", True, "MoELLaVAPhiForCausalLM"),
    "moe_llava_stablelm": ("stablelm", True, "MoELLaVAStablelmForCausalLM"),
    "llava_phi": ("phi", False, "LlavaPhiForCausalLM"),
    "llava_stablelm": ("stablelm", False, "LlavaStablelmForCausalLM"),
}
_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_READ = {
    *_SIZES,
    *("model_type", "moe", "medmoe_edge", "num_hidden_layers", "image_aspect_ratio"),
    *("rope_parameters", "rope_theta"),
    *("partial_rotary_factor", "rope_pct", "layer_norm_eps", "norm_eps", "num_key_value_heads"),
    *("max_position_embeddings", "bos_token_id", "eos_token_id"),
    *("mm_hidden_size", "mm_image_tower", "mm_vision_tower", "mm_vision_select_layer"),
}
# Values other than these would be computed wrongly, so they are refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (False,),
    "qk_layernorm": (False,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "use_parallel_residual": (False,),
    "use_qkv_bias": (True,),
    "image_projector_type": ("mlp2x_gelu",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
}
_ACTIVATIONS = {"phi": ("gelu_new", "gelu_pytorch_tanh"), "stablelm": ("silu",)}
# Keys that do not change what the model computes in inference.
_IGNORED = frozenset(
    # SIM905: one name per line would fill a page
    """
    _name_or_path _attn_implementation _attn_implementation_autoset _commit_hash architectures
    attention_dropout attn_pdrop auto_map chunk_size_feed_forward dtype embd_pdrop flash_attn
    flash_rotary freeze_mm_mlp_adapter fused_dense hidden_dropout id2label initializer_range
    is_decoder is_encoder_decoder label2id lora mm_patch_merge_type mm_projector_lr
    mm_use_im_patch_token mm_video_tower only_lora_ffn output_attentions output_hidden_states
    pad_token_id pad_vocab_size_multiple pretraining_tp problem_type resid_pdrop return_dict
    tokenizer_model_max_length tokenizer_padding_side torch_dtype transformers_version
    tune_mm_mlp_adapter use_bfloat16 use_cache use_flash_attn use_mm_proj
    video_global_proj video_projector_type video_spatial_proj video_temproal_proj
    """.split()  # noqa: SIM905
)
_MOE_READ = {"moe_enable", "moe_mode", "moe_layers_idx", "num_experts", "top_k_experts"}
_MOE_READ |= {"use_residual"}
_MOE_IGNORED = {"ep_size", "capacity_factor", "eval_capacity_factor", "min_capacity"}
_MOE_IGNORED |= {"router_aux_loss_coef", "train_modules"}
_MOE_MODES = ("sparse", "dense", "first_half", "second_half", "custom")

# What an official config.json without `eos_token_id` leaves to the tokenizer: <|endoftext|>.
_DEFAULT_EOS = {"phi": 50256, "stablelm": 100257}
_DEFAULT_ROTARY = {"phi": 0.5, "stablelm": 0.25}
_DEFAULT_POSITIONS = {"phi": 2048, "stablelm": 4096}
_MOST = 1024  # layers or experts: a bound against absurd files, not on models


def model_config(data: Json, shapes: Mapping[str, Shape], tower: Json | None = None) -> ModelConfig:
    """The configuration that `config.json` and the stored tensors' official names describe.

    `shapes` tell what `config.json` leaves open: the CLIP tower's sizes, and whether there are
    meta experts and router biases. `tower` is a separate vision tower's own `config.json`.
    Raises `ConfigError`, or `CheckpointError` where tensors and configuration disagree.
    """
    _check_keys(data, {*_READ, *_FIXED, *_IGNORED, "hidden_act"}, "config.json")
    model_type = _choice(data, "model_type", _MODEL_TYPES)
    kind, may_have_experts, _ = _MODEL_TYPES[model_type]
    _check_fixed(data, {**_FIXED, "hidden_act": _ACTIVATIONS[kind]})
    own = data.get("medmoe_edge", {})
    _check_keys(own, {"vision", "expert_names"}, "config.json medmoe_edge")
    block = data.get("moe") if may_have_experts else None
    decoder = _decoder(data, kind)
    return ModelConfig(
        vision=vision_config(data, own, shapes, tower),
        decoder=decoder,
        moe=_moe(block, own, decoder.layers, shapes) if block else None,
    )


def official_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` of the official layout; `model_config` reads the same configuration back."""
    decoder, vision, moe = config.decoder, config.vision, config.moe
    model_type = ("moe_llava_" if moe else "llava_") + decoder.kind
    phi = decoder.kind == "phi"
    data: dict[str, Any] = {
        "architectures": [_MODEL_TYPES[model_type][2]],
        "model_type": model_type,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.heads,
        "intermediate_size": decoder.intermediate_size,
        "vocab_size": decoder.vocab_size,
        "hidden_act": _ACTIVATIONS[decoder.kind][0],
        "partial_rotary_factor" if phi else "rope_pct": decoder.rotary_fraction,
        "rope_theta": decoder.rope_theta,
        "layer_norm_eps" if phi else "norm_eps": decoder.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": decoder.eos_token_id,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "image_aspect_ratio": "pad" if vision.pad_to_square else "square",
        "image_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.feature_size,
        "mm_image_tower": "openai/clip-vit-large-patch14-336" if is_standard(vision) else None,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": vision.select_layer,
    }
    if not phi:
        data["use_qkv_bias"] = True
    if moe:
        data["moe"] = {
            "moe_enable": True,
            "moe_mode": "custom",
            "moe_layers_idx": list(moe.layers),
            "num_experts": [moe.num_experts] * len(moe.layers),
            "top_k_experts": moe.top_k,
            "ep_size": 1,
            # what the official training sets; no token is ever dropped in inference
            "capacity_factor": 4,
            "eval_capacity_factor": 4,
            "min_capacity": 0,
            "use_residual": moe.use_residual,
            "router_aux_loss_coef": 0.0,
            "train_modules": [],
        }
    own: dict[str, Any] = {} if is_standard(vision) else {"vision": vision.to_json()}
    if moe and moe.expert_names:
        own["expert_names"] = list(moe.expert_names)
    if own:
        data["medmoe_edge"] = own
    return data


def _check_keys(data: Any, known: set[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be an object.", "Check the file's structure.")
    for key in data:
        if key not in known:
            raise unknown_key(key, known, where)


def _check_fixed(data: Json, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in fixed.items():
        if key in data and data[key] not in allowed:
            names = " or ".join(repr(value) for value in allowed)
            raise ConfigError(
                f"config.json has {key} = {data[key]!r}, which is not implemented.",
                f"Only {names} is; this is not a checkpoint that Med-MoE's code wrote.",
            )


def _choice(data: Json, key: str, allowed: Iterable[str]) -> str:
    value = data.get(key)
    if value not in tuple(allowed):
        raise ConfigError(
            f"config.json has {key} = {value!r}.", f"Use one of: {', '.join(allowed)}."
        )
    return str(value)


def _count(data: Json, key: str, most: int = 2**24) -> int:
    """A positive integer that must be there."""
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(
            f"config.json has {key} = {value!r}.", f"It must be a number from 1 to {most}."
        )
    return value


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _decoder(data: Json, kind: Literal["phi", "stablelm"]) -> DecoderConfig:
    hidden, heads, intermediate, vocabulary = (_count(data, key) for key in _SIZES)
    layers = _count(data, "num_hidden_layers", _MOST)
    if hidden % heads or data.get("num_key_value_heads") not in (None, heads):
        raise ConfigError(
            f"config.json has hidden_size = {hidden}, num_attention_heads = {heads}, "
            f"num_key_value_heads = {data.get('num_key_value_heads')!r}.",
            "Heads must divide the hidden size, and every head needs its own keys and values.",
        )
    rope = data.get("rope_parameters") or {}  # where transformers 5 keeps the next two
    if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
        raise ConfigError(f"config.json has rope_parameters = {rope!r}.", "Only 'default' works.")
    fraction = _first(
        data.get("partial_rotary_factor"),
        data.get("rope_pct"),
        rope.get("partial_rotary_factor"),
        _DEFAULT_ROTARY[kind],
    )
    decoder = DecoderConfig.from_json(
        {
            "kind": kind,
            "hidden_size": hidden,
            "layers": layers,
            "heads": heads,
            "intermediate_size": intermediate,
            "vocab_size": vocabulary,
            "rotary_fraction": fraction,
            "rope_theta": _first(data.get("rope_theta"), rope.get("rope_theta"), 10000.0),
            "norm_eps": _first(data.get("layer_norm_eps"), data.get("norm_eps"), 1e-5),
            "max_positions": data.get("max_position_embeddings", _DEFAULT_POSITIONS[kind]),
            "bos_token_id": data.get("bos_token_id"),
            "eos_token_id": _first(data.get("eos_token_id"), _DEFAULT_EOS[kind]),
        },
        "config.json",
    )
    if decoder.eos_token_id not in range(vocabulary):
        raise ConfigError(
            f"config.json has eos_token_id = {data.get('eos_token_id')!r} and "
            f"vocab_size = {vocabulary}.",
            "Set eos_token_id to the tokenizer's end-of-text token.",
        )
    return decoder


def _moe(
    block: Any, own: Json, decoder_layers: int, shapes: Mapping[str, Shape]
) -> MoEConfig | None:
    _check_keys(block, _MOE_READ | _MOE_IGNORED, "config.json moe")
    if not block.get("moe_enable", True):
        return None
    layers = _moe_layers(block, decoder_layers)
    counts = block.get("num_experts")
    counts = counts if isinstance(counts, list) else [counts]
    if len({str(count) for count in counts}) != 1:
        raise ConfigError(
            f"config.json moe has num_experts = {counts!r}.",
            "Layers with different numbers of experts are not implemented.",
        )
    residual = block.get("use_residual", False)
    stored_residual = any(".mlp.coefficient." in key for key in shapes)
    if residual is not stored_residual:
        raise CheckpointError(
            f"config.json has moe.use_residual = {residual!r}, but the tensors "
            f"{'include' if stored_residual else 'lack'} `mlp.coefficient`.",
            "Set use_residual to what the checkpoint was trained with.",
        )
    router_bias = any(key.endswith(".gate.wg.bias") for key in shapes)
    meta = any(".mlp.meta_moe." in key for key in shapes)
    # The residual branch and the meta expert are one module; either name may have been dropped.
    meta = meta or (router_bias and any(".mlp.mlp." in key for key in shapes))
    return MoEConfig.from_json(
        {
            "layers": layers,
            "num_experts": _count({"num_experts": counts[0]}, "num_experts", _MOST),
            "top_k": _count(block, "top_k_experts"),
            "use_residual": residual,
            "meta_expert": meta,
            "router_bias": router_bias,
            "expert_names": own.get("expert_names", ()),
        },
        "config.json moe",
    )


def _moe_layers(block: Json, layers: int) -> list[int]:
    mode, every = block.get("moe_mode", "sparse"), list(range(layers))
    if mode not in _MOE_MODES:
        raise ConfigError(
            f"config.json moe has moe_mode = {mode!r}.", f"Use one of: {', '.join(_MOE_MODES)}."
        )
    chosen = block.get("moe_layers_idx")
    if chosen is None and mode != "custom":
        half = layers // 2
        modes = {"sparse": every[::2], "dense": every}
        return (modes | {"first_half": every[:half], "second_half": every[half:]})[mode]
    if not isinstance(chosen, list) or not chosen or any(layer not in every for layer in chosen):
        raise ConfigError(
            f"config.json moe has moe_layers_idx = {chosen!r}.",
            f"It must list layers between 0 and {layers - 1}.",
        )
    return sorted(set(chosen))
