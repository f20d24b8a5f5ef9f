"""Parameter names: what a configuration implies, and what the official folder calls them.

This is the only place that renames keys. Renaming goes one way, from our names to the official
ones; reading inverts the resulting table, so the two directions cannot disagree.

    decoder.layers.0.ffn.experts.2.up.weight
    model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.2.up_proj.weight

Qwen's own modelling keeps the decoder under `transformer.` and q, k and v as one matrix, `c_attn`.
Both are undone as the headers are read (`split_fused`) and done again as a folder is written
(`Fused`), so that everywhere between each matrix has a name of its own:

    decoder.layers.0.attention.q.weight
    transformer.h.0.attn.c_attn.q.weight    the first third of transformer.h.0.attn.c_attn.weight

Source of the official names: the checkpoints of Med-MoE and MoE-LLaVA (GitHub
`jiangsongtao/Med-MoE`, `PKU-YuanGroup/MoE-LLaVA`) and of transformers' `CLIPVisionModel` and
`SiglipVisionModel`.
"""

from collections.abc import Iterable, Iterator

from medmoe_edge.config import DecoderConfig, ModelConfig, VisionConfig
from medmoe_edge.errors import CheckpointError, ConfigError, needs

Shape = tuple[int, ...]

TOWER_PREFIX = "model.image_tower.image_tower."
PROJECTOR_PREFIX = "model.mm_projector.image_spatial_proj."
CLIP_PREFIX = TOWER_PREFIX + "vision_model."

# Each dot-separated part of a name is looked up on its own; parts not listed stay as they are.
_CLIP_PARTS = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",  # the misspelling is the official name
    "post_norm": "post_layernorm",
    "layers": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention": "self_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_DECODER_PARTS = {
    "embed": "embed_tokens",
    "input_norm": "input_layernorm",
    "attention": "self_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "ffn": "mlp",
    "router": "deepspeed_moe.gate.wg",
    "experts": "deepspeed_moe.experts.deepspeed_experts",
    "meta": "meta_moe",
}
_KIND_PARTS = {
    "phi": {"norm": "final_layernorm", "out": "dense"},
    "stablelm": {
        "post_norm": "post_attention_layernorm",
        "out": "o_proj",
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
    },
    "qwen": {
        "embed": "wte",
        "layers": "h",
        "input_norm": "ln_1",
        "post_norm": "ln_2",
        "attention": "attn",
        **{part: f"c_attn.{part}" for part in "qkv"},
        "out": "c_proj",
        "gate": "w2",
        "up": "w1",
        "down": "c_proj",
        "norm": "ln_f",
    },
}
_MODEL, _QWEN_MODEL = "model.", "transformer."
_BESIDE_DECODER = ("image_tower.", "mm_projector.", "video_tower.")
FUSED = ".attn.c_attn."


def official_name(name: str, config: ModelConfig) -> str:
    """The official folder's key of our parameter `name`."""
    module, rest = name.split(".", 1)
    if module == "projector":
        return PROJECTOR_PREFIX + rest
    if module == "vision" and config.vision.kind == "efficientnet-lite":
        return TOWER_PREFIX + rest
    if module == "vision":
        return CLIP_PREFIX + _translate(rest, _CLIP_PARTS)
    if rest == "head.weight":
        return "lm_head.weight"
    model = _QWEN_MODEL if config.decoder.kind == "qwen" else _MODEL
    return model + _translate(rest, _DECODER_PARTS | _KIND_PARTS[config.decoder.kind])


def without_qwen(key: str) -> str:
    """A stored key with the tower and the projector where the other models have them."""
    rest = key.removeprefix(_QWEN_MODEL)
    return _MODEL + rest if rest != key and rest.startswith(_BESIDE_DECODER) else key


def with_qwen(key: str, config: ModelConfig) -> str:
    """The key under which a folder of this model stores what is `key` to us."""
    if config.decoder.kind == "qwen" and key.removeprefix(_MODEL).startswith(_BESIDE_DECODER):
        return _QWEN_MODEL + key.removeprefix(_MODEL)
    return key


# What trainers put around a module; PEFT, DDP, DeepSpeed, FSDP, torch.compile and Lightning.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")
_ANCHORS = ("model.embed_tokens.weight", "transformer.wte.weight")


def official_keys(stored: Iterable[str]) -> dict[str, str]:
    """Stored keys -> official ones: without what trainers put before or between their parts.

    A prefix such as `base_model.model.` or `module.` is seen at the embeddings, and taken from all
    keys. Raises `CheckpointError` for adapters that are not merged, and where two keys become one.
    """
    plain: dict[str, str] = {}
    for key in stored:
        if ".lora_" in key or ".modules_to_save." in key:
            raise CheckpointError(
                f"The weights hold LoRA adapters that are not merged ({key}).",
                "Merge them before saving: model = model.merge_and_unload(); "
                "model.save_pretrained(FOLDER, safe_serialization=True).",
            )
        name = key
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        plain[key] = name
    pairs = ((name, anchor) for name in plain.values() for anchor in _ANCHORS)
    found = (name.removesuffix(anchor) for name, anchor in pairs if name.endswith("." + anchor))
    prefix = next(found, "")
    plain = {key: name.removeprefix(prefix) for key, name in plain.items()}
    if len(set(plain.values())) < len(plain):
        raise CheckpointError(
            f"The weights hold a tensor twice, with {prefix or 'a wrapper'!r} and without.",
            "Save the model once more, from its innermost module.",
        )
    return plain


def tied_name(key: str) -> str:
    """The official code keeps one module as both `mlp.mlp` and `mlp.meta_moe`: the latter key."""
    layers = ("model.layers.", "transformer.h.")
    return key.replace(".mlp.mlp.", ".mlp.meta_moe.") if key.startswith(layers) else key


# Constants that older versions of transformers stored as integers.
INTEGERS = ("position_ids", "relative_position_index")


def is_unread(key: str) -> bool:
    """Whether `key` is no parameter of what is computed here.

    Constants that older versions stored, and the pooling head of a SigLIP tower.
    """
    constants = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.logn_tensor", *INTEGERS)
    return key.endswith(constants) or ".vision_model.head." in key


def is_router(name: str) -> bool:
    """Whether our `name` is a router's weight or bias, kept in fp32."""
    return ".ffn.router." in name


def expected_parameters(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter that `config` implies: our name -> shape, linear weights `[out, in]`.

    Raises `MissingDependencyError` for an EfficientNet-lite tower where torch is not installed.
    """
    size = config.decoder.hidden_size
    towers = {"clip": _clip, "siglip": _siglip, "efficientnet-lite": _efficientnet_lite}
    return {
        **dict(towers[config.vision.kind](config.vision)),
        **dict(_linear("projector.0", size, config.vision.feature_size)),
        **dict(_linear("projector.2", size, size)),
        **decoder_parameters(config),
    }


def decoder_parameters(config: ModelConfig) -> dict[str, Shape]:
    """The language part of `expected_parameters`; needs no torch."""
    return dict(_decoder(config))


def _translate(name: str, parts: dict[str, str]) -> str:
    return ".".join(parts.get(part, part) for part in name.split("."))


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(
    name: str, size: int, parts: tuple[str, ...] = ("weight", "bias")
) -> Iterator[tuple[str, Shape]]:
    for part in parts:
        yield f"{name}.{part}", (size,)


def _clip(config: VisionConfig) -> Iterator[tuple[str, Shape]]:
    size, patch = config.feature_size, config.patch_size
    yield "vision.class_embedding", (size,)
    yield "vision.patch_embedding.weight", (size, 3, patch, patch)
    yield "vision.position_embedding.weight", (1 + config.features, size)
    yield from _norm("vision.pre_norm", size)
    yield from _tower_layers(config)


def _siglip(config: VisionConfig) -> Iterator[tuple[str, Shape]]:
    size, patch = config.feature_size, config.patch_size
    yield "vision.patch_embedding.weight", (size, 3, patch, patch)
    yield "vision.patch_embedding.bias", (size,)
    yield "vision.position_embedding.weight", (config.grid**2, size)
    yield from _tower_layers(config)


def _tower_layers(config: VisionConfig) -> Iterator[tuple[str, Shape]]:
    size = config.feature_size
    for index in range(config.layers):
        layer = f"vision.layers.{index}"
        yield from _norm(f"{layer}.norm1", size)
        yield from _norm(f"{layer}.norm2", size)
        for part in "q", "k", "v", "out":
            yield from _linear(f"{layer}.attention.{part}", size, size)
        yield from _linear(f"{layer}.fc1", config.intermediate_size, size)
        yield from _linear(f"{layer}.fc2", size, config.intermediate_size)
    yield from _norm("vision.post_norm", size)


def _efficientnet_lite(config: VisionConfig) -> Iterator[tuple[str, Shape]]:
    with needs("export"):
        import torch

        from medmoe_edge.models.med_moe import VARIANTS, EfficientNetLite
    if config.variant not in VARIANTS:
        raise ConfigError(
            f"vision.variant is {config.variant!r}.", f"Use one of: {', '.join(VARIANTS)}."
        )
    with torch.device("meta"):
        tower = EfficientNetLite(config)
    for name, tensor in tower.state_dict().items():
        yield f"vision.{name}", tuple(tensor.shape)


def _decoder(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    decoder = config.decoder
    size, phi, norm = decoder.hidden_size, decoder.kind == "phi", decoder.norm_parameters
    yield "decoder.embed.weight", (decoder.vocab_size, size)
    yield "decoder.head.weight", (decoder.vocab_size, size)
    yield from _norm("decoder.norm", size, norm)
    for index in range(decoder.layers):
        layer = f"decoder.layers.{index}"
        yield from _norm(f"{layer}.input_norm", size, norm)
        if not decoder.parallel:
            yield from _norm(f"{layer}.post_norm", size, norm)
        for part in "q", "k", "v":
            yield from _linear(f"{layer}.attention.{part}", size, size)
        yield from _linear(f"{layer}.attention.out", size, size, bias=phi)
        if index in config.moe_layers:
            yield from _moe(f"{layer}.ffn", config)
        else:
            yield from _ffn(f"{layer}.ffn", decoder)


def _moe(name: str, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    moe, size = config.moe, config.decoder.hidden_size
    assert moe is not None
    yield from _linear(f"{name}.router", moe.router_rows, size, bias=moe.router_bias)
    if moe.merged:
        yield from _ffn(f"{name}.merged", config.merged_decoder)
        return
    for expert in range(moe.num_experts):
        yield from _ffn(f"{name}.experts.{expert}", config.decoder)
    if moe.meta_expert:
        yield from _ffn(f"{name}.meta", config.decoder)
    if moe.use_residual:
        yield from _linear(f"{name}.coefficient", 2, size)


def _ffn(name: str, decoder: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    size, middle = decoder.hidden_size, decoder.intermediate_size
    if decoder.kind == "phi":
        yield from _linear(f"{name}.fc1", middle, size)
        yield from _linear(f"{name}.fc2", size, middle)
    else:
        yield from _linear(f"{name}.gate", middle, size, bias=False)
        yield from _linear(f"{name}.up", middle, size, bias=False)
        yield from _linear(f"{name}.down", size, middle, bias=False)
