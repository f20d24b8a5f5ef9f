"""The official folder layout: what is written is read back, and what is damaged is refused."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_files import ENDLESS, forbid_opening
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PhiConfig,
    PhiForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from medmoe_edge.atomic import MOST_TEXT
from medmoe_edge.checkpoint.config import CLIP_L_14_336, model_config, official_config
from medmoe_edge.checkpoint.keys import expected_parameters, official_name
from medmoe_edge.checkpoint.reader import import_router, read_checkpoint, write_checkpoint
from medmoe_edge.checkpoint.tensors import StoredTensor
from medmoe_edge.config import DecoderConfig, ModelConfig, MoEConfig
from medmoe_edge.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ResourceError,
)
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.initialise import random_tensors

TINY = {"stablelm": PRESETS["tiny"], "phi": PRESETS["tiny-phi"]}
KINDS = pytest.mark.parametrize("kind", ["stablelm", "phi"])


def with_moe(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def write(folder: Path, config: ModelConfig, **options: Any) -> Path:
    write_checkpoint(folder, config, random_tensors(config, 0), **options)
    return folder


def edit_config(folder: Path, block: str | None = None, **changes: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    (data[block] if block else data).update(changes)
    path.write_text(json.dumps(data))


@contextlib.contextmanager
def edit_tensors(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Stored tensors as a dict to change; saved as the folder's single file."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= {key: value.clone() for key, value in load_file(shard).items()}
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    yield tensors
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", TINY["stablelm"])


# --- round trips ------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("shard_bytes", [2**28, 8192])
def test_round_trip_is_bit_exact(tmp_path: Path, kind: str, shard_bytes: int) -> None:
    config = TINY[kind]
    checkpoint = read_checkpoint(write(tmp_path / "out", config, shard_bytes=shard_bytes))
    assert checkpoint.config == config
    given_tensors = dict(random_tensors(config, 0))
    read = dict(checkpoint)
    assert read.keys() == given_tensors.keys()
    for name, tensor in given_tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    MedMoE(config).load_state_dict(read)
    shards = sorted(path.name for path in checkpoint.folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert (len(shards) > 1) == (shard_bytes == 8192)
    modes = {path.stat().st_mode for path in checkpoint.folder.iterdir()}
    assert len(modes) == 1, "who may read one of the files may read all"


@KINDS
def test_the_written_names_are_the_official_ones(tmp_path: Path, kind: str) -> None:
    """Against transformers' own models; the MoE names as the official checkpoints spell them."""
    config = TINY[kind]
    with edit_tensors(write(tmp_path / "out", config)) as tensors:
        keys = set(tensors)
    language = {"phi": phi_keys, "stablelm": stablelm_keys}[kind](config.decoder)
    ffn = {key for key in language if key.startswith(("model.layers.0.mlp", "model.layers.2.mlp"))}
    assert language - ffn <= keys
    moe = "model.layers.2.mlp.deepspeed_moe"
    for key in (key.removeprefix("model.layers.2.mlp.") for key in ffn if ".2.mlp" in key):
        assert f"{moe}.experts.deepspeed_experts.3.{key}" in keys
        assert f"model.layers.2.mlp.meta_moe.{key}" in keys
    assert {f"{moe}.gate.wg.weight", f"{moe}.gate.wg.bias"} <= keys
    assert "model.mm_projector.image_spatial_proj.2.bias" in keys
    tower = {key.removeprefix("vision_model.") for key in clip(config).state_dict()}
    prefix = "model.image_tower.image_tower.vision_model."
    assert {key for key in keys if key.startswith(prefix)} == {prefix + key for key in tower}
    counted = len(tower) + 4 + len(language - ffn) + 2 * (5 * len(ffn) // 2 + 2)
    assert len(keys) == counted


@pytest.mark.parametrize(
    ("kind", "ours", "official"),
    [
        ("phi", "decoder.embed.weight", "model.embed_tokens.weight"),
        ("phi", "decoder.head.weight", "lm_head.weight"),
        ("phi", "decoder.norm.bias", "model.final_layernorm.bias"),
        ("phi", "decoder.layers.1.attention.out.bias", "model.layers.1.self_attn.dense.bias"),
        ("phi", "decoder.layers.1.ffn.fc1.weight", "model.layers.1.mlp.fc1.weight"),
        ("phi", "decoder.layers.1.ffn.fc2.weight", "model.layers.1.mlp.fc2.weight"),
        ("stablelm", "decoder.norm.weight", "model.norm.weight"),
        ("stablelm", "decoder.layers.1.input_norm.bias", "model.layers.1.input_layernorm.bias"),
        ("stablelm", "decoder.layers.1.attention.q.bias", "model.layers.1.self_attn.q_proj.bias"),
        ("stablelm", "decoder.layers.1.attention.k.bias", "model.layers.1.self_attn.k_proj.bias"),
        ("stablelm", "decoder.layers.1.attention.v.bias", "model.layers.1.self_attn.v_proj.bias"),
        ("stablelm", "decoder.layers.1.ffn.gate.weight", "model.layers.1.mlp.gate_proj.weight"),
        ("stablelm", "decoder.layers.1.ffn.up.weight", "model.layers.1.mlp.up_proj.weight"),
        ("stablelm", "decoder.layers.1.ffn.down.weight", "model.layers.1.mlp.down_proj.weight"),
        (
            "stablelm",
            "decoder.layers.1.post_norm.bias",
            "model.layers.1.post_attention_layernorm.bias",
        ),
        ("phi", "projector.0.weight", "model.mm_projector.image_spatial_proj.0.weight"),
        (
            "phi",
            "vision.layers.1.norm2.weight",
            "model.image_tower.image_tower.vision_model.encoder.layers.1.layer_norm2.weight",
        ),
        (
            "phi",
            "vision.layers.1.attention.k.bias",
            "model.image_tower.image_tower.vision_model.encoder.layers.1.self_attn.k_proj.bias",
        ),
    ],
)
def test_each_name_means_its_own_tensor(kind: str, ours: str, official: str) -> None:
    """Swapped names of equal shape would survive every other test."""
    assert official_name(ours, TINY[kind]) == official


def phi_keys(decoder: DecoderConfig) -> set[str]:
    config = PhiConfig(**transformers_sizes(decoder))
    return set(PhiForCausalLM(config).state_dict()) - {"lm_head.bias"}


def stablelm_keys(decoder: DecoderConfig) -> set[str]:
    config = StableLmConfig(**transformers_sizes(decoder), use_qkv_bias=True)
    return set(StableLmForCausalLM(config).state_dict())


def transformers_sizes(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.heads,
        "intermediate_size": decoder.intermediate_size,
        "vocab_size": decoder.vocab_size,
    }


def clip(config: ModelConfig, **changes: Any) -> CLIPVisionModel:
    vision = config.vision
    sizes = {
        "hidden_size": vision.feature_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    return CLIPVisionModel(CLIPVisionConfig(**{**sizes, **changes}))


def test_a_dense_model_round_trips(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY["phi"], moe=None)
    assert read_checkpoint(write(tmp_path / "out", config)).config == config


def test_tensors_keep_the_asked_type_and_routers_fp32(tmp_path: Path) -> None:
    config = TINY["stablelm"]
    names = read_checkpoint(write(tmp_path / "out", config, dtype=torch.float16)).names
    routers = {name for name in names if ".router." in name}
    assert len(routers) == 4
    assert {names[name].dtype for name in routers} == {torch.float32}
    assert {names[name].dtype for name in names.keys() - routers} == {torch.float16}


def test_tokenizer_and_hash(tmp_path: Path) -> None:
    tokenizer = tmp_path / "some.json"
    tokenizer.write_text("{}")
    first = read_checkpoint(write(tmp_path / "a", TINY["phi"], tokenizer_file=tokenizer))
    assert first.tokenizer_file is not None
    assert first.tokenizer_file.read_text() == "{}"
    same = read_checkpoint(write(tmp_path / "b", TINY["phi"]))
    assert same.tokenizer_file is None
    assert first.sha256() == same.sha256()
    with edit_tensors(same.folder) as tensors:
        tensors["lm_head.weight"][0, 0] += 1
    assert read_checkpoint(same.folder).sha256() != first.sha256()


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small models of every structure."""
    base = TINY[draw(st.sampled_from(["stablelm", "phi"]))]
    layers = draw(st.integers(1, 12))
    decoder = dataclasses.replace(
        base.decoder,
        layers=layers,
        max_positions=draw(st.integers(1, 9999)),
        rotary_fraction=draw(st.sampled_from([0.25, 0.4, 0.5, 1.0])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        bos_token_id=draw(st.none() | st.integers(0, 255)),
        eos_token_id=draw(st.integers(0, 255)),
    )
    vision = draw(st.sampled_from([base.vision, PRESETS["nano"].vision, STANDARD_TOWER]))
    meta = draw(st.booleans())
    moe = MoEConfig(
        layers=tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1)))),
        num_experts=draw(st.integers(2, 11)),
        top_k=draw(st.integers(1, 2)),
        meta_expert=meta,
        use_residual=meta and draw(st.booleans()),
        router_bias=draw(st.booleans()),
    )
    return ModelConfig(vision, decoder, draw(st.sampled_from([moe, None])))


STANDARD_TOWER = PRESETS["med-moe-phi2-2.7b"].vision


@settings(max_examples=25, deadline=None)
@given(configs())
def test_renaming_is_a_bijection_and_config_json_is_lossless(config: ModelConfig) -> None:
    expected = expected_parameters(config)
    official = {official_name(name, config): shape for name, shape in expected.items()}
    assert len(official) == len(expected)
    data = json.loads(json.dumps(official_config(config, "bfloat16")))
    assert model_config(data, official) == config
    with torch.device("meta"):
        model = MedMoE(config)
    assert expected == {name: tuple(value.shape) for name, value in model.state_dict().items()}


# --- what others wrote ------------------------------------------------------------------------

# Keys as in the published config.json files of MoE-LLaVA, sizes of the tiny presets.
OFFICIAL: dict[str, dict[str, Any]] = {
    "stablelm": {
        "_name_or_path": "./checkpoints/llavastablelm-2b-other",
        "architectures": ["MoELLaVAStablelmForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_stablelm_epoch.StableLMEpochConfig"},
        "bos_token_id": 100,
        "eos_token_id": 100,
        "hidden_act": "silu",
        "model_type": "moe_llava_stablelm",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-05,
        "rope_pct": 0.25,
        "rope_theta": 10000,
        "use_qkv_bias": True,
    },
    "phi": {
        "architectures": ["MoELLaVAPhiForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "embd_pdrop": 0.0,
        "eos_token_id": 7,
        "hidden_act": "gelu_new",
        "model_type": "moe_llava_phi",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-05,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
}
OFFICIAL_COMMON: dict[str, Any] = {
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "image_projector_type": "mlp2x_gelu",
    "initializer_range": 0.02,
    "mm_hidden_size": 16,
    "mm_image_tower": "/home/somebody/openai/clip-vit-large-patch14-336",
    "mm_projector_lr": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_video_tower": None,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "moe": {
        "capacity_factor": 1.5,
        "ep_size": 1,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "moe_enable": True,
        "moe_layers_idx": [0, 2],
        "moe_mode": "sparse",
        "num_experts": [4, 4],
        "router_aux_loss_coef": 0.01,
        "top_k_experts": 2,
        "train_modules": ["gate_proj", "up_proj", "down_proj", "wg"],
        "use_residual": False,
    },
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0",
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
    "use_mm_proj": True,
    "video_global_proj": False,
    "video_projector_type": "linear",
    "video_spatial_proj": False,
    "video_temproal_proj": False,
}


@KINDS
def test_a_published_config_is_understood(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "out", TINY[kind])
    sizes = transformers_sizes(TINY[kind].decoder)
    data = {**OFFICIAL_COMMON, **OFFICIAL[kind], **sizes}
    (folder / "config.json").write_text(json.dumps(data))
    with edit_tensors(folder) as tensors:  # buffers that old transformers versions stored
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    config = read_checkpoint(folder).config
    assert config.decoder.kind == kind
    assert config.decoder.rotary_fraction == {"stablelm": 0.25, "phi": 0.4}[kind]
    assert config.decoder.max_positions == {"stablelm": 4096, "phi": 2048}[kind]
    assert config.decoder.eos_token_id == {"stablelm": 100, "phi": 7}[kind]
    assert config.moe == MoEConfig(layers=(0, 2), top_k=2)
    # CLIP's sizes come from the tensors; head size 64 cannot be seen and is assumed.
    assert config.vision == dataclasses.replace(TINY[kind].vision, heads=1)
    assert config.vision.pad_to_square


def test_a_null_end_token_means_the_tokenizers(tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY["phi"], decoder=dataclasses.replace(TINY["phi"].decoder, vocab_size=51200)
    )
    folder = write(tmp_path / "out", config)
    edit_config(folder, eos_token_id=None)
    assert read_checkpoint(folder).config.decoder.eos_token_id == 50256


def test_transformers_5_rope_parameters(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    del data["rope_pct"], data["rope_theta"]
    data["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
    }
    (folder / "config.json").write_text(json.dumps(data))
    decoder = read_checkpoint(folder).config.decoder
    assert (decoder.rotary_fraction, decoder.rope_theta) == (0.5, 500.0)
    edit_config(folder, rope_theta=500)
    assert read_checkpoint(folder).config.decoder == decoder
    for wrong, message in (
        ({"type": "linear", "factor": 4.0}, "unknown key 'type'"),
        ({"full_attention": {"rope_type": "linear"}}, "unknown key 'full_attention'"),
        ({"rope_theta": 10000.0}, r"rope_parameters\.rope_theta = 10000"),
        ({"rope_type": "yarn"}, "Only 'default'"),
    ):
        edit_config(folder, rope_parameters={**data["rope_parameters"], **wrong})
        with pytest.raises(ConfigError, match=message):
            read_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [{"image_aspect_ratio": "square"}, {"mm_vision_select_layer": -1}],
)
def test_a_tower_that_is_described_twice_is_described_alike(
    folder: Path, changes: dict[str, Any]
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match="says otherwise"):
        read_checkpoint(folder)


META, BIAS = ".meta_moe.", ".gate.wg.bias"


def without(folder: Path, *parts: str, ours: bool = False) -> Path:
    """The folder without all tensors of some names and, unless it is `ours`, as others write it."""
    with edit_tensors(folder) as tensors:
        for key in [key for key in tensors if any(part in key for part in parts)]:
            del tensors[key]
    if not ours:
        data = json.loads((folder / "config.json").read_text())
        for key in ("meta_expert", "router_bias"):
            del data["medmoe_edge"][key]
        (folder / "config.json").write_text(json.dumps(data))
    return folder


@KINDS
def test_the_legacy_layout_has_neither_meta_expert_nor_router_bias(
    tmp_path: Path, kind: str
) -> None:
    checkpoint = read_checkpoint(without(write(tmp_path / "out", TINY[kind]), META, BIAS))
    legacy = with_moe(TINY[kind], meta_expert=False, router_bias=False)
    assert checkpoint.config == legacy
    write_checkpoint(tmp_path / "again", legacy, checkpoint)
    assert read_checkpoint(tmp_path / "again").config == legacy


@pytest.mark.parametrize(
    ("lost", "ours", "message"),
    [
        ([META], False, r"6 tensors are missing: model\.layers\.N\.mlp\.meta_moe\.\w+_proj"),
        ([BIAS], False, r"2 tensors are missing: .*\.gate\.wg\.bias"),
        ([META, BIAS], True, r"8 tensors are missing: .*\.gate\.wg\.bias, .*\.meta_moe\."),
        ([".gate.wg."], False, "missing: .*gate"),
        ([".deepspeed_experts."], False, "missing: .*experts"),
        ([".self_attn.q_proj.bias"], False, "missing: .*q_proj"),
        ([".mm_projector."], False, "missing: .*spatial_proj"),
        (["lm_head."], False, "lm_head"),
    ],
)
def test_a_kind_of_tensors_that_is_missing_everywhere_is_missing(
    tmp_path: Path, lost: list[str], ours: bool, message: str
) -> None:
    """A folder that lost all of a kind is no model that has none of it."""
    folder = without(write(tmp_path / "out", TINY["stablelm"]), *lost, ours=ours)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(("meta", "bias"), [(True, False), (False, True)])
def test_a_mixture_of_both_papers_says_so_in_its_configuration(
    tmp_path: Path, meta: bool, bias: bool
) -> None:
    config = with_moe(TINY["phi"], meta_expert=meta, router_bias=bias)
    assert read_checkpoint(write(tmp_path / "out", config)).config == config
    with pytest.raises(CheckpointError, match="missing"):
        read_checkpoint(without(tmp_path / "out"))


def test_other_ends_and_other_choices_of_tokens_are_not_passed_over(folder: Path) -> None:
    """By generation_config.json transformers ends an answer, and chooses its tokens."""
    end = read_checkpoint(folder).config.decoder.eos_token_id
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [end + 1, end], "temperature": 0.2}))
    read = read_checkpoint(folder)
    assert read.config.decoder.end_tokens == (end, end + 1)
    assert read.warnings == ()
    neutral: dict[str, Any] = {"num_beams": 1, "diversity_penalty": 0.0, "stop_strings": None}
    neutral["sequence_bias"] = {}
    generation.write_text(json.dumps({"eos_token_id": [], "bad_words_ids": [], **neutral}))
    read = read_checkpoint(folder)
    assert (read.config.decoder.end_tokens, read.warnings) == ((end,), ())
    for key, value in {
        "repetition_penalty": 1.2,
        "num_beams": 4,
        "encoder_no_repeat_ngram_size": 3,
        "stop_strings": ["\n"],
        "forced_eos_token_id": 2,
        "guidance_scale": 1.5,
        "penalty_alpha": 0.6,
    }.items():
        generation.write_text(json.dumps({key: value}))
        (notice,) = read_checkpoint(folder).warnings
        assert notice.code == "generation_not_applied"
        assert f"{key} = {value!r}" in notice.message
    generation.write_text(json.dumps({"eos_token_id": end + 1}))
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_checkpoint(folder)


def test_names_of_phis_first_modelling_are_to_be_converted(tmp_path: Path) -> None:
    with edit_tensors(write(tmp_path / "out", TINY["phi"])) as tensors:
        attention = "model.layers.0.self_attn."
        parts = [tensors.pop(f"{attention}{part}_proj.weight") for part in "qkv"]
        tensors["transformer.h.0.mixer.Wqkv.weight"] = torch.cat(parts)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "out")
    assert "Convert it to the names of transformers' PhiForCausalLM" in caught.value.remedy


def test_a_tower_whose_last_layers_are_missing_is_refused(towerless: Path, tmp_path: Path) -> None:
    """One layer less, and the features would be those of another layer."""
    clip(TINY["stablelm"]).save_pretrained(tmp_path / "tower")
    read_checkpoint(towerless, vision_tower=tmp_path / "tower")
    weights = tmp_path / "tower" / "model.safetensors"
    kept = {key: value for key, value in load_file(weights).items() if ".layers.1." not in key}
    save_file(kept, weights)
    with pytest.raises(CheckpointError, match=r"missing: .*encoder\.layers\.N"):
        read_checkpoint(towerless, vision_tower=tmp_path / "tower")


def test_a_published_tower_has_as_many_layers_as_it_was_published_with() -> None:
    standard = dataclasses.replace(PRESETS["med-moe-phi2-2.7b"], moe=None)
    data = official_config(standard, "bfloat16")
    named = {official_name(name, standard): s for name, s in expected_parameters(standard).items()}
    assert model_config(data, named) == standard
    shorter = {key: shape for key, shape in named.items() if ".encoder.layers.23." not in key}
    assert len(shorter) == len(named) - 16
    assert model_config(data, shorter).vision.layers == 24, "and its tensors will be missed"


@pytest.mark.parametrize(
    ("size", "name"), [(1280, None), (1024, "laion/CLIP-ViT-L-14-laion2B-s32B-b82K")]
)
def test_the_heads_of_a_tower_that_is_not_openais_are_not_guessed(
    size: int, name: str | None
) -> None:
    """LAION's ViT-H has 16 heads of 80 channels, and its ViT-L another activation."""
    standard = dataclasses.replace(PRESETS["med-moe-phi2-2.7b"], moe=None)
    vision = dataclasses.replace(standard.vision, feature_size=size, heads=16)
    config = dataclasses.replace(standard, vision=vision)
    data = official_config(standard, "bfloat16") | {"mm_hidden_size": size, "mm_image_tower": name}
    named = {official_name(name, config): s for name, s in expected_parameters(config).items()}
    with pytest.raises(ConfigError, match="unknown number of heads") as caught:
        model_config(data, named)
    assert "--vision-tower" in caught.value.remedy
    described = {"num_attention_heads": 16, "num_hidden_layers": 24, "hidden_act": "quick_gelu"}
    assert model_config(data, named, described).vision.heads == 16
    with pytest.raises(ConfigError, match="'gelu'"):
        model_config(data, named, {**described, "hidden_act": "gelu"})


@pytest.mark.parametrize("stored", ["meta_moe", "mlp", "both"])
def test_the_residual_branch_and_the_meta_expert_are_one(tmp_path: Path, stored: str) -> None:
    config = with_moe(TINY["stablelm"], use_residual=True)
    folder = write(tmp_path / "out", config)
    with edit_tensors(folder) as tensors:
        for key in [key for key in tensors if ".meta_moe." in key]:
            tensors[key.replace(".meta_moe.", ".mlp.")] = tensors[key].clone()
        for key in [key for key in tensors if f".{stored}." not in key]:
            if stored != "both" and (".meta_moe." in key or ".mlp.mlp." in key):
                del tensors[key]
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config == config
    given_tensors = dict(random_tensors(config, 0))
    assert all(torch.equal(value, given_tensors[name]) for name, value in checkpoint)


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", with_moe(TINY["stablelm"], use_residual=True))
    key = "model.layers.2.mlp.meta_moe.up_proj.weight"
    with edit_tensors(folder) as tensors:
        tensors[key.replace("meta_moe", "mlp")] = tensors[key] + 1
    checkpoint = read_checkpoint(folder)
    with pytest.raises(CheckpointError, match="differ"):
        checkpoint.tensor("decoder.layers.2.ffn.meta.up.weight")


@pytest.mark.parametrize("residual", [True, False])
def test_use_residual_must_agree_with_the_tensors(tmp_path: Path, residual: bool) -> None:
    folder = write(tmp_path / "out", with_moe(TINY["phi"], use_residual=residual))
    edit_config(folder, "moe", use_residual=not residual)
    with pytest.raises(CheckpointError, match="use_residual"):
        read_checkpoint(folder)


def test_a_shared_router_first_read_by_calibration_can_still_be_loaded(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    with torch.inference_mode():
        assert checkpoint.shared_router
    model = MedMoE(checkpoint.config)
    model.load_state_dict({name: tensor.float() for name, tensor in checkpoint}, assign=True)


def test_routers_are_recognised_as_shared(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.shared_router
    routers = [checkpoint.tensor(f"decoder.layers.{n}.ffn.router.weight") for n in (0, 2)]
    assert routers[0] is routers[1]
    with edit_tensors(folder) as tensors:
        tensors["model.layers.2.mlp.deepspeed_moe.gate.wg.bias"][3] += 1e-6
    assert not read_checkpoint(folder).shared_router


# --- a vision tower elsewhere -----------------------------------------------------------------


@pytest.fixture
def towerless(folder: Path) -> Path:
    with edit_tensors(folder) as tensors:
        for key in [key for key in tensors if ".image_tower." in key]:
            del tensors[key]
    data = json.loads((folder / "config.json").read_text())
    del data["medmoe_edge"]
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("named_by", ["argument", "config.json"])
def test_the_tower_may_lie_elsewhere(towerless: Path, tmp_path: Path, named_by: str) -> None:
    tower = clip(TINY["stablelm"])
    tower.save_pretrained(tmp_path / "tower")
    edit_config(towerless, mm_image_tower=str(tmp_path / "tower"))
    override = tmp_path / "tower"
    if named_by == "argument":
        edit_config(towerless, mm_image_tower="/a/strangers/path")
    checkpoint = read_checkpoint(
        towerless, vision_tower=override if named_by == "argument" else None
    )
    assert checkpoint.config == TINY["stablelm"]
    state = {key.removeprefix("vision_model."): value for key, value in tower.state_dict().items()}
    ours = checkpoint.tensor("vision.layers.1.attention.v.weight")
    assert torch.equal(ours, state["encoder.layers.1.self_attn.v_proj.weight"])
    ours = checkpoint.tensor("vision.position_embedding.weight")
    assert torch.equal(ours, state["embeddings.position_embedding.weight"])


@pytest.mark.parametrize("path", ["/a/strangers/path", "a" * 5000, "a\0b", None])
def test_a_tower_that_is_nowhere_names_the_option(towerless: Path, path: str | None) -> None:
    edit_config(towerless, mm_image_tower=path)
    with pytest.raises(CheckpointError, match="--vision-tower"):
        read_checkpoint(towerless)


def test_a_towers_files_are_not_taken_for_the_checkpoints(towerless: Path, tmp_path: Path) -> None:
    """What a `pull` recorded is compared by name, and both have a model.safetensors."""
    clip(TINY["stablelm"]).save_pretrained(tmp_path / "z-tower")
    found = read_checkpoint(towerless, vision_tower=tmp_path / "z-tower").file_hashes()
    names = ("config.json", "model.safetensors")
    assert found == {n: hashlib.sha256((towerless / n).read_bytes()).hexdigest() for n in names}


def test_a_tower_whose_description_is_no_object_is_refused(towerless: Path, tmp_path: Path) -> None:
    clip(TINY["stablelm"]).save_pretrained(tmp_path / "tower")
    edit_config(tmp_path / "tower", vision_config="large")
    with pytest.raises(ConfigError, match="vision_config must be an object"):
        read_checkpoint(towerless, vision_tower=tmp_path / "tower")


def test_a_tower_whose_tensor_is_a_scalar_is_refused(towerless: Path, tmp_path: Path) -> None:
    clip(TINY["stablelm"]).save_pretrained(tmp_path / "tower")
    with edit_tensors(tmp_path / "tower") as tensors:
        (key,) = (key for key in tensors if key.endswith("patch_embedding.weight"))
        tensors[key] = torch.ones(())
    with pytest.raises(CheckpointError, match="not a CLIP"):
        read_checkpoint(towerless, vision_tower=tmp_path / "tower")


@pytest.mark.parametrize("rows", [None, 194])
def test_a_fused_matrix_that_has_no_thirds_is_refused(tmp_path: Path, rows: int | None) -> None:
    """What is left over of 194 rows would be passed over."""
    folder = write(tmp_path / "out", PRESETS["tiny-qwen"])
    with edit_tensors(folder) as tensors:
        key = "transformer.h.0.attn.c_attn.weight"
        tensors[key] = torch.ones(()) if rows is None else torch.ones(rows, 64)
    with pytest.raises(CheckpointError, match="c_attn"):
        read_checkpoint(folder)


def test_the_residual_of_moe_llava_is_not_taken_for_med_moes(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", with_moe(TINY["stablelm"], use_residual=True))
    with edit_tensors(folder) as tensors:
        for key in [key for key in tensors if META in key]:
            tensors[key.replace(META, ".mlp.")] = tensors.pop(key)
    without(folder, BIAS)
    with pytest.raises(ConfigError, match="not implemented"):
        read_checkpoint(folder)


def test_a_tower_with_another_activation_is_refused(towerless: Path, tmp_path: Path) -> None:
    clip(TINY["stablelm"], hidden_act="gelu").save_pretrained(tmp_path / "tower")
    with pytest.raises(ConfigError, match="quick_gelu"):
        read_checkpoint(towerless, vision_tower=tmp_path / "tower")


def test_a_tower_that_normalises_otherwise_is_refused(towerless: Path, tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    clip(TINY["stablelm"]).save_pretrained(tower)
    processor: dict[str, Any] = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (tower / "preprocessor_config.json").write_text(json.dumps(processor))
    assert read_checkpoint(towerless, vision_tower=tower).config == TINY["stablelm"]
    for mean in ([0.5, 0.5, 0.5], "grey"):
        changed = json.dumps({**processor, "image_mean": mean})
        (tower / "preprocessor_config.json").write_text(changed)
        with pytest.raises(ConfigError, match="image_mean"):
            read_checkpoint(towerless, vision_tower=tower)


def test_a_checkpoint_that_normalises_otherwise_is_refused(folder: Path) -> None:
    processor = folder / "preprocessor_config.json"
    processor.write_text(json.dumps({"image_mean": [0.48145466, 0.4578275, 0.40821073]}))
    read_checkpoint(folder)
    processor.write_text(json.dumps({"image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(ConfigError, match="image_std"):
        read_checkpoint(folder)


def test_integers_that_older_versions_stored_are_passed_over(
    towerless: Path, tmp_path: Path
) -> None:
    tower = tmp_path / "tower"
    clip(TINY["stablelm"]).save_pretrained(tower)
    weights = load_file(tower / "model.safetensors")
    vision = {f"vision_model.{key.removeprefix('vision_model.')}": weights[key] for key in weights}
    names = (f"{part}_model.embeddings.position_ids" for part in ("text", "vision"))
    own = {name: torch.arange(5)[None] for name in names}
    save_file(vision | own, tower / "model.safetensors")
    read_checkpoint(towerless, vision_tower=tower)
    with edit_tensors(towerless) as tensors:
        for key, value in (vision | own).items():
            if key.startswith("vision_model."):
                tensors[f"model.image_tower.image_tower.{key}"] = value
    assert read_checkpoint(towerless).config.vision.layers == 2


def test_a_tower_of_another_width_is_refused(towerless: Path, tmp_path: Path) -> None:
    clip(TINY["stablelm"], hidden_size=32).save_pretrained(tmp_path / "tower")
    with pytest.raises(ConfigError, match="mm_hidden_size"):
        read_checkpoint(towerless, vision_tower=tmp_path / "tower")


# --- configurations that are refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle_type": 1}, "Did you mean 'model_type'"),
        ({"model_type": "llava"}, "moe_llava_phi"),
        ({"use_parallel_residual": True}, "use_parallel_residual"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"use_qkv_bias": False}, "use_qkv_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"image_projector_type": "linear"}, "mlp2x_gelu"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
        ({"mm_hidden_size": 999}, "mm_hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"eos_token_id": 256}, "eos_token_id"),
        ({"rope_pct": 1.5}, "rotary_fraction"),
        ({"partial_rotary_factor": 1e300, "rope_pct": None}, "rotary_fraction"),
        ({"max_position_embeddings": 10**30}, "max_positions"),
        ({"moe": [1]}, "moe"),
        ({"medmoe_edge": {"visoin": {}}}, "Did you mean 'vision'"),
        ({"medmoe_edge": {"vision": {"kind": "clip"}}}, "image_size"),
        *(
            ({"medmoe_edge": {"vision": CLIP_L_14_336.to_json() | changes}}, message)
            for changes, message in (
                ({"heads": 0}, "vision.heads 0"),
                ({"heads": 10**30}, "vision.heads"),
                ({"pixel_mean": []}, "pixel_mean"),
                ({"pixel_std": [1, 1, 0]}, "pixel_std"),
                ({"pixel_std": [1, 1, math.nan]}, "pixel_std"),
            )
        ),
    ],
)
def test_impossible_configurations_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_mode": "alternate"}, "moe_mode"),
        ({"top_k_expert": 1}, "Did you mean 'top_k_experts'"),
        ({"top_k_experts": 3}, "top_k"),
        ({"num_experts": [4, 3]}, "num_experts"),
        ({"num_experts": None}, "num_experts"),
        ({"moe_layers_idx": [0, 3]}, "moe_layers_idx"),
        ({"moe_layers_idx": "all"}, "moe_layers_idx"),
    ],
)
def test_impossible_moe_blocks_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, "moe", **changes)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize("second", ["ct", "", "mri\x1b[31m"])
def test_experts_have_names_of_their_own(folder: Path, second: str) -> None:
    """Shares are by name: of two of one name, one would be lost."""
    edit_config(folder, "medmoe_edge", expert_names=["ct", second, "xray", "pathology"])
    with pytest.raises(ConfigError, match="expert_names"):
        read_checkpoint(folder)


def test_layers_follow_the_mode_where_they_are_not_listed(folder: Path) -> None:
    edit_config(folder, "moe", moe_layers_idx=None, moe_mode="sparse")
    assert read_checkpoint(folder).config.moe_layers == (0, 2)


# --- files that are damaged -------------------------------------------------------------------

SHARD = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_recognised(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git-LFS"):
        read_checkpoint(folder)


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    (folder / SHARD).rename(folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="pickled"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json"])
def test_a_file_that_may_not_be_read_is_not_to_be_downloaded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    forbid_opening(monkeypatch, name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be opened: permission") as caught:
        read_checkpoint(folder)
    assert caught.value.remedy == "Check the path and its permissions."


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("make", ENDLESS)
def test_what_would_never_be_read_to_its_end_is_refused(
    folder: Path, make: Callable[[Path], None], name: str
) -> None:
    """A pipe that nobody writes to would be waited for."""
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be opened: it is no regular"):
        read_checkpoint(folder)


def test_json_that_is_too_large_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("ab") as file:
        file.truncate(MOST_TEXT + 1)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be .* 64 million bytes"):
        read_checkpoint(folder)


def test_a_missing_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_shard_is_named(folder: Path, keep: int) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=SHARD):
        read_checkpoint(folder)


def test_a_file_that_was_never_filled_is_refused(folder: Path) -> None:
    """Its header and its size are right: room was made for all of it, and then the copy ended."""
    key = "model.layers.2.self_attn.v_proj.weight"
    with edit_tensors(folder) as tensors:
        tensors["model.layers.1.self_attn.o_proj.weight"].zero_()  # a layer that adds nothing
        tensors[key][1:] = 0
    assert len(list(read_checkpoint(folder))) > 100
    with edit_tensors(folder) as tensors:
        tensors[key].zero_()
    with pytest.raises(CheckpointError, match=r"attention\.v\.weight is all zeros"):
        list(read_checkpoint(folder))


def test_a_download_that_aria2_did_not_end_is_refused(folder: Path) -> None:
    """It makes room first, and its segments leave holes anywhere."""
    (shard,) = folder.glob("*.safetensors")
    control = shard.with_name(f"{shard.name}.aria2")
    control.touch()
    with pytest.raises(CheckpointError, match="not downloaded whole"):
        read_checkpoint(folder)
    control.unlink()
    read_checkpoint(folder)


def test_what_zero_3_did_not_gather_is_refused(folder: Path) -> None:
    with edit_tensors(folder) as tensors:
        for key in tensors:
            tensors[key] = torch.empty(0)
    with pytest.raises(CheckpointError, match="is empty") as caught:
        read_checkpoint(folder)
    assert "zero_to_fp32.py" in caught.value.remedy


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100_000])
def test_broken_json_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../x"}}]
)
def test_a_broken_index_is_refused(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_checkpoint(folder)


def test_an_index_that_names_no_possible_file(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "a\0b"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names the shard"):
        read_checkpoint(folder)


def test_an_index_that_promises_too_much(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = SHARD
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.extra"):
        read_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(256, 64)}, folder / "other.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "other.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="two shards"):
        read_checkpoint(folder)


def test_tensors_must_be_those_of_the_configuration(folder: Path) -> None:
    with edit_tensors(folder) as tensors:
        head = tensors.pop("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"The tensor lm_head\.weight is missing\."):
        read_checkpoint(folder)
    with edit_tensors(folder) as tensors:
        tensors["lm_head.weight"] = head[:200].clone()
    with pytest.raises(CheckpointError, match=r"lm_head.*\[200, 64\].*\[256, 64\]"):
        read_checkpoint(folder)
    with edit_tensors(folder) as tensors:
        tensors |= {"lm_head.weight": head, "lm_head.bias": torch.zeros(256)}
    with pytest.raises(CheckpointError, match=r"lm_head\.bias \[256\]"):
        read_checkpoint(folder)


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    """transformers reads the single file, and the index names others."""
    save_file({"lm_head.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="two sets of weights"):
        read_checkpoint(folder)


def test_a_quantised_tensor_is_refused(folder: Path) -> None:
    with edit_tensors(folder) as tensors:
        tensors["lm_head.weight"] = torch.zeros(256, 64, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="I8"):
        read_checkpoint(folder)


def test_opening_reads_no_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: StoredTensor) -> torch.Tensor:
        raise AssertionError(self.key)

    monkeypatch.setattr(StoredTensor, "read", fail)
    assert len(read_checkpoint(folder).names) == len(expected_parameters(TINY["stablelm"]))


# --- writing ----------------------------------------------------------------------------------


def broken(config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    for index, pair in enumerate(random_tensors(config, 0)):
        if index == 50:
            raise KeyboardInterrupt
        yield pair


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    config = TINY["phi"]
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", config, broken(config), shard_bytes=4096)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_leaves_the_old_one(folder: Path) -> None:
    before = read_checkpoint(folder).sha256()
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, TINY["phi"], broken(TINY["phi"]), force=True)
    assert read_checkpoint(folder).sha256() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_killed_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from medmoe_edge.checkpoint.reader import write_checkpoint\n"
        "from medmoe_edge.presets import PRESETS\n"
        "from medmoe_edge.training.initialise import random_tensors\n"
        "def tensors():\n"
        "    for index, pair in enumerate(random_tensors(PRESETS['tiny'], 0)):\n"
        "        if index == 50: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield pair\n"
        "write_checkpoint(sys.argv[1], PRESETS['tiny'], tensors(), shard_bytes=4096)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    write(tmp_path / "out", TINY["stablelm"])  # what is left does not stand in the way


def test_the_given_tensors_must_be_all_and_only_the_parameters(tmp_path: Path) -> None:
    config = TINY["stablelm"]
    tensors = list(random_tensors(config, 0))
    wrong = {
        "was not given": tensors[:-1],
        "twice": [*tensors, tensors[0]],
        "no parameter": [("decoder.extra", torch.zeros(1)), *tensors],
        "shape": [(tensors[0][0], torch.zeros(3)), *tensors[1:]],
    }
    for message, given_tensors in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(tmp_path / "out", config, given_tensors)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_forced(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--force"):
        write(folder, TINY["phi"])
    write(folder, TINY["phi"], force=True)
    assert read_checkpoint(folder).config == TINY["phi"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match=r"holds no config\.json, so it will not be replaced"):
        write(precious, TINY["phi"], force=True)
    assert (precious / "thesis.txt").exists()


def test_a_full_disk_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="needs"):
        write(tmp_path / "out", TINY["phi"])
    assert list(tmp_path.iterdir()) == []


# --- what trainers write ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "base_model.model.{}",
        "_orig_mod.{}",
        "model.{}",
        "module.base_model.model._fsdp_wrapped_module.{}",
    ],
)
def test_the_prefixes_of_trainers_are_taken_off(folder: Path, wrapped: str) -> None:
    plain = dict(read_checkpoint(folder))
    with edit_tensors(folder) as tensors:
        for key in list(tensors):
            tensors[wrapped.format(key)] = tensors.pop(key)
    for name, tensor in read_checkpoint(folder):
        assert torch.equal(tensor, plain[name])


def test_the_prefixes_of_trainers_are_taken_off_qwens_own_names(tmp_path: Path) -> None:
    qwen = dataclasses.replace(TINY["stablelm"].decoder, kind="qwen", rotary_fraction=1.0)
    folder = write(tmp_path / "out", dataclasses.replace(TINY["stablelm"], decoder=qwen))
    plain = dict(read_checkpoint(folder))
    with edit_tensors(folder) as tensors:
        for key in list(tensors):
            tensors[f"base_model.model.{key}"] = tensors.pop(key)
    for name, tensor in read_checkpoint(folder):
        assert torch.equal(tensor, plain[name])


def test_wrappers_inside_a_key_are_taken_out(folder: Path) -> None:
    with edit_tensors(folder) as tensors:
        for key in [key for key in tensors if ".self_attn.q_proj." in key]:
            inner = key.replace("q_proj.", "q_proj.base_layer.").replace(
                ".layers.0.", ".layers.0._checkpoint_wrapped_module."
            )
            tensors[inner] = tensors.pop(key)
    read_checkpoint(folder)


def test_a_tensor_with_and_without_its_prefix_is_refused(folder: Path) -> None:
    with edit_tensors(folder) as tensors:
        for key in list(tensors):
            tensors["module." + key] = tensors[key].clone()
    with pytest.raises(CheckpointError, match="twice"):
        read_checkpoint(folder)


def test_adapters_that_are_not_merged_are_refused(folder: Path) -> None:
    with edit_tensors(folder) as tensors:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match="not merged") as caught:
        read_checkpoint(folder)
    assert "merge_and_unload" in caught.value.remedy


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "weights.safetensors"])
def test_weights_without_an_index_are_found(folder: Path, name: str) -> None:
    with edit_tensors(folder):
        pass
    (folder / "model.safetensors").rename(folder / name)
    (folder / "non_lora_trainables.bin").write_bytes(b"")  # what trainers leave after a merge too
    assert read_checkpoint(folder).warnings == ()
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    read = read_checkpoint(folder)
    assert len(list(read)) > 50
    assert [notice.code for notice in read.warnings] == ["adapter_not_applied"]
    (folder / name).rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


LEFT = {
    "adapter_model.safetensors": ("LoRA adapter without its base", "merge_and_unload"),
    "non_lora_trainables.bin": ("LoRA adapter without its base", "merge_and_unload"),
    "mm_projector.bin": ("a projector alone", "a later phase"),
    "manifest.json": ("is a bundle", "what it was exported from"),
    "zero_to_fp32.py": ("DeepSpeed", "zero_to_fp32.py . OUT"),
    "__0_0.distcp": ("FSDP", "merge-weights"),
    "phi.gguf": ("GGUF", "made from"),
    "pytorch_model.bin": ("pickled", "save_file"),
    "last.ckpt": ("pickled", "save_file"),
    "notes.txt": ("no model.safetensors", "Download"),
    "checkpoint-500/config.json": ("no model.safetensors", "checkpoint-500"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_used_has_a_remedy_that_fits(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    what, remedy = LEFT[name]
    with pytest.raises(CheckpointError, match=what) as caught:
        read_checkpoint(tmp_path)
    assert remedy in caught.value.remedy


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    told = {"base_model_name_or_path": "microsoft/phi-2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="LoRA") as caught:
        read_checkpoint(tmp_path)
    assert "into microsoft/phi-2 first" in caught.value.remedy


# --- router files -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "router."])
def test_a_router_file_is_imported(tmp_path: Path, prefix: str) -> None:
    router = {"fc1.weight": torch.randn(4, 32), "fc1.bias": torch.randn(4)}
    saved = {prefix + key: value for key, value in router.items()}
    torch.save(saved, tmp_path / "router.pth")
    read = import_router(tmp_path / "router.pth")
    assert torch.equal(read["weight"], router["fc1.weight"])
    assert torch.equal(read["bias"], router["fc1.bias"])


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("content", ["pickle", "torch", "text", "empty", "keys", "shape", "lfs"])
def test_a_bad_router_file_is_refused(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "router.pth"
    if content == "pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    elif content == "torch":
        torch.save({"fc1.weight": Hostile()}, path)
    elif content == "keys":
        torch.save({"fc1.weight": torch.zeros(4, 32)}, path)
    elif content == "shape":
        torch.save({"fc1.weight": torch.zeros(4, 32), "fc1.bias": torch.zeros(5)}, path)
    else:
        lfs = "version https://git-lfs.github.com/spec/v1\n"
        path.write_text({"text": "no router", "empty": "", "lfs": lfs}[content])
    with pytest.raises(CheckpointError, match="LFS" if content == "lfs" else "router"):
        import_router(path)
    assert not (tmp_path / "ran").exists()
