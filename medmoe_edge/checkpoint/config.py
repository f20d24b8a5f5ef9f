"""The official folder's `config.json` <-> `ModelConfig`, and which vision tower it means.

The official file is MoE-LLaVA's: transformers' Phi or StableLM keys, `mm_*` keys and a `moe`
block. What it cannot say lies in one block of our own, `medmoe_edge`: the vision tower where it
is not CLIP ViT-L/14-336, whether there are meta experts and router biases, the experts' names, and
the tokens that refuse an answer. The tower is read from that and from the shapes of its tensors.
Values that this implementation would compute wrongly are refused; keys nobody knows are refused
too.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from medmoe_edge.checkpoint.keys import CLIP_PREFIX, TOWER_PREFIX, Shape
from medmoe_edge.config import (
    MOST,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    Refusal,
    VisionConfig,
    unknown_key,
)
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
CLIP_HEAD_SIZE, CLIP_FEATURES = 64, 1024  # of OpenAI's towers all, and of the widest

SIGLIP_MEAN = SIGLIP_STD = (127.5, 127.5, 127.5)
SIGLIP_SO400M_14_384 = VisionConfig(
    kind="siglip",
    image_size=384,
    feature_size=1152,
    pixel_mean=SIGLIP_MEAN,
    pixel_std=SIGLIP_STD,
    layers=27,
    heads=16,
    intermediate_size=4304,
    patch_size=14,
)
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}  # by features, of every published SigLIP tower
_SIGLIP_SIZES = {(27, 14): 384}
_LAYERS = {768: 12, 1024: 24, 1152: 27, 1280: 32}  # by features, of every published tower
# activation, and the normalisation of the pixels
_TOWERS = {
    "clip": ("quick_gelu", CLIP_MEAN, CLIP_STD),
    "siglip": ("gelu_pytorch_tanh", SIGLIP_MEAN, SIGLIP_STD),
}


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
        told = {
            "image_aspect_ratio": "pad" if vision.pad_to_square else "square",
            "mm_vision_select_feature": vision.select_feature,
            "mm_vision_select_layer": vision.select_layer,
        }
        if other := {key: data[key] for key in told if data.get(key, told[key]) != told[key]}:
            raise ConfigError(
                f"config.json has {other}, and its medmoe_edge.vision says otherwise.",
                "They say the same: change both.",
            )
    else:
        vision = _transformer(data, shapes, tower, aspect == "pad")
    sizes = (vision.image_size, vision.patch_size, vision.feature_size)
    if not all(0 < size <= 2**16 for size in sizes) or not 0 <= vision.layers <= _MOST:
        raise ConfigError("The vision tower has an impossible size.", "Correct its config.json.")
    if data.get("mm_hidden_size", vision.feature_size) != vision.feature_size:
        raise ConfigError(
            f"config.json has mm_hidden_size = {data['mm_hidden_size']!r}, "
            f"the vision tower yields {vision.feature_size} features.",
            "Use the vision tower that the checkpoint was trained with.",
        )
    return vision


def _transformer(
    data: Json, shapes: Mapping[str, Shape], tower: Json | None, pad_to_square: bool
) -> VisionConfig:
    """A tower's sizes from its tensors' shapes; CLIP has a class token, SigLIP has none."""
    try:
        rows, size = shapes[CLIP_PREFIX + "embeddings.position_embedding.weight"]
        patch = shapes[CLIP_PREFIX + "embeddings.patch_embedding.weight"][-1]
        intermediate, _ = shapes[CLIP_PREFIX + "encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"The tensors under {TOWER_PREFIX} are not a CLIP or SigLIP vision transformer.",
            "Give one with --vision-tower, or describe the tower in config.json's medmoe_edge.",
        ) from error
    clip = CLIP_PREFIX + "embeddings.class_embedding" in shapes
    activation, mean, std = _TOWERS["clip" if clip else "siglip"]
    tower_keys = [key for key in shapes if key.startswith(CLIP_PREFIX)]
    stored = sum(key.endswith(".layer_norm1.weight") for key in tower_keys)
    described = (tower or {}).get("vision_config", tower) or {}
    if not isinstance(described, Mapping):
        raise ConfigError(
            "The tower's config.json vision_config must be an object.", "Check the file."
        )
    feature = data.get("mm_vision_select_feature", "patch")
    heads = described.get("num_attention_heads", _heads(data, size, clip))
    if heads is None or not (clip or pad_to_square):
        raise ConfigError(
            f"The {'CLIP' if clip else 'SigLIP'} tower of {size} features has an unknown number of "
            "heads, or is SigLIP and images are not padded, which its own processor would distort.",
            "Give the tower's folder with --vision-tower; for SigLIP set image_aspect_ratio 'pad'.",
        )
    if clip:
        _check_fixed(data, {"mm_vision_select_feature": ("patch",)})
    if described.get("hidden_act", activation) != activation:
        raise ConfigError(
            f"The vision tower has hidden_act = {described['hidden_act']!r}.",
            f"Of its kind only towers with {activation!r} are implemented.",
        )
    grid = math.isqrt(rows - 1 if clip else rows)
    return VisionConfig.from_json(
        {
            "kind": "clip" if clip else "siglip",
            "image_size": _image_size(grid, patch, described),
            "feature_size": size,
            "pixel_mean": mean,
            "pixel_std": std,
            "pad_to_square": pad_to_square,
            "layers": described.get("num_hidden_layers", _LAYERS.get(size, stored)),
            "heads": heads,
            "intermediate_size": intermediate,
            "patch_size": patch,
            "select_layer": data.get("mm_vision_select_layer", CLIP_L_14_336.select_layer),
            "select_feature": feature,
        },
        "vision tower",
    )


def _heads(data: Json, size: int, clip: bool) -> int | None:
    """Of a tower that nothing describes: OpenAI's or SigLIP's, but not LAION's nor a wider CLIP."""
    named = str(data.get("mm_image_tower") or data.get("mm_vision_tower")).lower()
    if clip and ("laion" in named or size > CLIP_FEATURES):
        return None
    return max(1, size // CLIP_HEAD_SIZE) if clip else SIGLIP_HEADS.get(size)


def _image_size(grid: int, patch: int, described: Json) -> Any:
    """The tower's own, which need not be a whole number of patches: SigLIP's 384 is 27.4 of 14."""
    size = described.get("image_size", _SIGLIP_SIZES.get((grid, patch), grid * patch))
    return size if isinstance(size, int) and size // patch == grid else grid * patch


# model_type -> decoder kind, whether it may hold experts, architecture
Kind = Literal["phi", "stablelm", "qwen"]
_MODEL_TYPES: dict[str, tuple[Kind, bool, str]] = {
    "moe_llava_phi": ("phi", True, "MoELLaVAPhiForCausalLM"),
    "moe_llava_stablelm": ("stablelm", True, "MoELLaVAStablelmForCausalLM"),
    "moe_llava_qwen": ("qwen", True, "MoELLaVAQWenForCausalLM"),
    "llava_phi": ("phi", False, "LlavaPhiForCausalLM"),
    "llava_stablelm": ("stablelm", False, "LlavaStablelmForCausalLM"),
    "llava_qwen": ("qwen", False, "LlavaQWenForCausalLM"),
}
_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_ROPE = ("rope_parameters.partial_rotary_factor", "rope_parameters.rope_theta")  # transformers 5
# What is read under more than one name: ours is the first of them that the file has.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_attention_heads": ("num_attention_heads", "num_heads"),  # StableLM's early code
    "rotary_fraction": (*("partial_rotary_factor", "rope_pct", "rotary_pct"), _ROPE[0]),
    "rope_theta": ("rope_theta", "rotary_emb_base", _ROPE[1]),
    "norm_eps": ("layer_norm_eps", "norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
}
_READ = {
    *_SIZES,
    *(name for names in _NAMES.values() for name in names),
    *("model_type", "moe", "medmoe_edge", "num_hidden_layers", "image_aspect_ratio"),
    *("rope_parameters", "num_key_value_heads", "kv_channels"),
    *("max_position_embeddings", "seq_length", "bos_token_id", "eos_token_id"),
    *("mm_hidden_size", "mm_image_tower", "mm_vision_tower", "mm_vision_select_layer"),
    "mm_vision_select_feature",
}
# Values other than these would be computed wrongly, so they are refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (False,),
    "qk_layernorm": (False,),
    "rope_scaling": (None,),
    "rotary_scaling_factor": (None, 1),
    "quantization_config": (None,),
    "use_parallel_residual": (False,),
    "use_qkv_bias": (True,),
    "no_bias": (True,),
    "scale_attn_weights": (True,),
    "use_cache_quantization": (False,),
    "repetition_penalty": (None, 1),
    "image_projector_type": ("mlp2x_gelu",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False,),
    "mm_use_x_start_end": (False,),
}
_ACTIVATIONS = {"phi": ("gelu_new", "gelu_pytorch_tanh"), "stablelm": ("silu",), "qwen": ("silu",)}
# Keys that do not change what the model answers, and why.
_IGNORED: dict[str, str] = {
    "what the file is and who wrote it": """_name_or_path _commit_hash architectures auto_map
        transformers_version tokenizer_class problem_type id2label label2id return_dict""",
    "how transformers runs it; the results are the same": """_attn_implementation
        _attn_implementation_autoset attn_implementation chunk_size_feed_forward dtype torch_dtype
        flash_attn flash_rotary fused_dense use_bfloat16 use_flash_attn use_cache use_cache_kernel
        softmax_in_fp32 bf16 fp16 fp32 onnx_safe pretraining_tp output_attentions
        output_hidden_states is_decoder is_encoder_decoder pruned_heads torchscript
        low_cpu_mem_usage pad_vocab_size_multiple""",
    "beyond the trained positions only, which are not used": "use_dynamic_ntk use_logn_attn",
    "dropout and initialisation: of training": """attention_dropout attn_pdrop attn_dropout_prob
        embd_pdrop emb_dropout_prob hidden_dropout resid_pdrop initializer_range""",
    "which parts were trained, and how": """freeze_mm_mlp_adapter lora lora_alpha lora_r
        lora_dropout lora_bias lora_enable mm_projector_lr only_lora_ffn tune_mm_mlp_adapter
        unfreeze_mm_vision_tower freeze_backbone freeze_mm_vision_resampler
        tune_mm_vision_resampler""",
    "the prompt is ours, and nothing is padded": """pad_token_id mm_use_im_patch_token
        mm_patch_merge_type tokenizer_model_max_length tokenizer_padding_side max_sequence_length
        image_grid_pinpoints""",
    "answers are greedy": """do_sample temperature top_p top_k num_beams max_length max_new_tokens
        typical_p early_stopping length_penalty""",
    "videos are not read": """mm_video_tower use_mm_proj video_global_proj video_projector_type
        video_spatial_proj video_temproal_proj""",
}
_IGNORED_KEYS = frozenset(key for keys in _IGNORED.values() for key in keys.split())
_MOE_READ = {"moe_enable", "moe_mode", "moe_layers_idx", "num_experts", "top_k_experts"}
_MOE_READ |= {"use_residual", "eval_capacity_factor"}
_MOE_IGNORED = {"ep_size", "capacity_factor", "min_capacity"}
_MOE_IGNORED |= {"router_aux_loss_coef", "train_modules"}
_OWN_READ = {"vision", "meta_expert", "router_bias", "expert_names", "refusals"}
_MOE_MODES = ("sparse", "dense", "first_half", "second_half", "custom")

# What an official config.json without `eos_token_id` leaves to the tokenizer: <|endoftext|>.
_DEFAULT_EOS = {"phi": 50256, "stablelm": 100257, "qwen": 151643}
_DEFAULT_ROTARY = {"phi": 0.5, "stablelm": 0.25, "qwen": 1.0}
_DEFAULT_POSITIONS = {"phi": 2048, "stablelm": 4096, "qwen": 8192}
_DEFAULT_EPS = {"phi": 1e-5, "stablelm": 1e-5, "qwen": 1e-6}
_MOST = 1024  # layers or experts: a bound against absurd files, not on models


def model_config(data: Json, shapes: Mapping[str, Shape], tower: Json | None = None) -> ModelConfig:
    """The configuration that `config.json` and the stored tensors' official names describe.

    `shapes` tell what `config.json` leaves open: the CLIP tower's sizes, and whether it is a
    Med-MoE or a MoE-LLaVA. `tower` is a separate vision tower's own `config.json`.
    Raises `ConfigError`, or `CheckpointError` where tensors and configuration disagree.
    """
    _check_keys(data, {*_READ, *_FIXED, *_IGNORED_KEYS, "hidden_act"}, "config.json")
    model_type = _choice(data, "model_type", _MODEL_TYPES)
    kind, may_have_experts, _ = _MODEL_TYPES[model_type]
    _check_fixed(data, {**_FIXED, "hidden_act": _ACTIVATIONS[kind]})
    own = data.get("medmoe_edge", {})
    _check_keys(own, _OWN_READ, "config.json medmoe_edge")
    block = data.get("moe") if may_have_experts else None
    decoder = _decoder(data, kind)
    return ModelConfig(
        vision=vision_config(data, own, shapes, tower),
        decoder=decoder,
        moe=_moe(block, own, decoder.layers, shapes) if block else None,
        refusals=_refusals(own.get("refusals", {})),
    )


def official_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` of the official layout; `model_config` reads the same configuration back."""
    decoder, vision, moe = config.decoder, config.vision, config.moe
    model_type = ("moe_llava_" if moe else "llava_") + decoder.kind
    rotary, theta, epsilon = _STYLES[decoder.kind]
    ends = decoder.end_tokens
    data: dict[str, Any] = {
        "architectures": [_MODEL_TYPES[model_type][2]],
        "model_type": model_type,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.heads,
        "intermediate_size": decoder.intermediate_size * _branches(decoder.kind),
        "vocab_size": decoder.vocab_size,
        "hidden_act": _ACTIVATIONS[decoder.kind][0],
        rotary: decoder.rotary_fraction,
        theta: decoder.rope_theta,
        epsilon: decoder.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "image_aspect_ratio": "pad" if vision.pad_to_square else "square",
        "image_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.feature_size,
        "mm_image_tower": "openai/clip-vit-large-patch14-336" if is_standard(vision) else None,
        "mm_vision_select_feature": vision.select_feature,
        "mm_vision_select_layer": vision.select_layer,
    }
    if decoder.kind == "stablelm":
        data["use_qkv_bias"] = True
    elif decoder.kind == "qwen":
        data |= {"no_bias": True, "kv_channels": decoder.head_size}
        data["seq_length"] = decoder.max_positions
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
    if moe:
        own |= {"meta_expert": moe.meta_expert, "router_bias": moe.router_bias}
    if moe and moe.expert_names:
        own["expert_names"] = list(moe.expert_names)
    if config.refusals:
        own["refusals"] = {refusal.code: refusal.token for refusal in config.refusals}
    if own:
        data["medmoe_edge"] = own
    return data


def _refusals(data: Any) -> tuple[Refusal, ...]:
    """The block's `refusals`: an object of codes and the tokens that stand for them."""
    where = "config.json medmoe_edge.refusals"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be an object.", "Check the file's structure.")
    return tuple(
        Refusal.from_json({"code": code, "token": token}, where) for code, token in data.items()
    )


def _check_keys(data: Any, known: set[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be an object.", "Check the file's structure.")
    for key in data:
        if key not in known:
            raise unknown_key(key, known, where)


def _check_fixed(data: Json, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in fixed.items():
        if key in data and data[key] not in allowed:
            raise _not_implemented(key, data[key], allowed)


def _not_implemented(key: str, value: Any, allowed: tuple[Any, ...]) -> ConfigError:
    names = " or ".join(repr(each) for each in allowed)
    return ConfigError(
        f"config.json has {key} = {value!r}, which is not implemented.",
        f"Only {names} is; this is not a checkpoint that Med-MoE's code wrote.",
    )


def _choice(data: Json, key: str, allowed: Iterable[str]) -> str:
    value = data.get(key)
    if value not in tuple(allowed):
        raise ConfigError(
            f"config.json has {key} = {value!r}.", f"Use one of: {', '.join(allowed)}."
        )
    return str(value)


def _count(data: Json, key: str, most: int = MOST) -> int:
    """A positive integer that must be there."""
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(
            f"config.json has {key} = {value!r}.", f"It must be a number from 1 to {most}."
        )
    return value


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


# What the official configurations call the rotary share, the rotary base and the norms' epsilon.
_STYLES = {
    "phi": ("partial_rotary_factor", "rope_theta", "layer_norm_eps"),
    "stablelm": ("rope_pct", "rope_theta", "norm_eps"),
    "qwen": ("rotary_pct", "rotary_emb_base", "layer_norm_epsilon"),
}


def _branches(kind: Kind) -> int:
    """Qwen's `intermediate_size` counts both of the matrices that read a feed-forward's input."""
    return 2 if kind == "qwen" else 1


def _named(data: Json, name: str) -> Any:
    """A value that goes under more than one key; raises `ConfigError` where they disagree."""
    found = {key: data[key] for key in _NAMES[name] if data.get(key) is not None}
    if any(value != _first(*found.values()) for value in found.values()):
        told = ", ".join(f"{key} = {value!r}" for key, value in found.items())
        raise ConfigError(f"config.json has {told}.", "They are the same: keep the right one.")
    return _first(*found.values())


def _decoder(data: Json, kind: Kind) -> DecoderConfig:
    rope = data.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
        raise ConfigError(f"config.json has rope_parameters = {rope!r}.", "Only 'default' works.")
    _check_keys(rope, {"rope_type", "rope_theta", "partial_rotary_factor"}, "rope_parameters")
    data = {**data, **{f"rope_parameters.{key}": value for key, value in rope.items()}}
    data["num_attention_heads"] = _named(data, "num_attention_heads")
    hidden, heads, intermediate, vocabulary = (_count(data, key) for key in _SIZES)
    layers = _count(data, "num_hidden_layers", _MOST)
    if hidden % heads or data.get("num_key_value_heads") not in (None, heads):
        raise ConfigError(
            f"config.json has hidden_size = {hidden}, num_attention_heads = {heads}, "
            f"num_key_value_heads = {data.get('num_key_value_heads')!r}.",
            "Heads must divide the hidden size, and every head needs its own keys and values.",
        )
    if data.get("kv_channels") not in (None, hidden // heads) or intermediate % _branches(kind):
        raise ConfigError(
            f"config.json has kv_channels = {data.get('kv_channels')!r} and "
            f"intermediate_size = {intermediate}.",
            "Heads must share the hidden size out, and Qwen's intermediate_size be even.",
        )
    fraction = _first(_named(data, "rotary_fraction"), _DEFAULT_ROTARY[kind])
    ends = _first(data.get("eos_token_id"), _DEFAULT_EOS[kind])
    ends = ends if isinstance(ends, list) and ends else [ends]
    decoder = DecoderConfig.from_json(
        {
            "kind": kind,
            "hidden_size": hidden,
            "layers": layers,
            "heads": heads,
            "intermediate_size": intermediate // _branches(kind),
            "vocab_size": vocabulary,
            "rotary_fraction": fraction,
            "rope_theta": _first(_named(data, "rope_theta"), 10000.0),
            "norm_eps": _first(_named(data, "norm_eps"), _DEFAULT_EPS[kind]),
            "max_positions": _positions(data, kind),
            "bos_token_id": data.get("bos_token_id"),
            "eos_token_id": ends[0],
            "more_eos_token_ids": ends[1:],
        },
        "config.json",
    )
    if any(end not in range(vocabulary) for end in decoder.end_tokens):
        raise ConfigError(
            f"config.json has eos_token_id = {data.get('eos_token_id')!r} and "
            f"vocab_size = {vocabulary}.",
            "Set eos_token_id to the tokenizer's end-of-text token.",
        )
    return decoder


def _positions(data: Json, kind: Kind) -> Any:
    """Trained positions; behind them Qwen computes otherwise (dynamic NTK, logn attention)."""
    positions = data.get("max_position_embeddings", _DEFAULT_POSITIONS[kind])
    trained = data.get("seq_length", positions)
    whole = isinstance(positions, int) and isinstance(trained, int)
    return min(positions, trained) if whole else positions


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
    # Med-MoE has both meta experts and router biases, MoE-LLaVA neither: of either the other is
    # expected too, so that a folder that lost one of them all is no model without it.
    med_moe = any(".mlp.meta_moe." in key or key.endswith(".gate.wg.bias") for key in shapes)
    return MoEConfig.from_json(
        {
            "layers": layers,
            "num_experts": _count({"num_experts": counts[0]}, "num_experts", _MOST),
            "top_k": _count(block, "top_k_experts"),
            "use_residual": residual,
            "meta_expert": own.get("meta_expert", med_moe),
            "router_bias": own.get("router_bias", med_moe),
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
