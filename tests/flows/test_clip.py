"""The CLIP tower against transformers' `CLIPVisionModel`, on random weights in fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from medmoe_edge.config import VisionConfig
from medmoe_edge.models.med_moe import ClipTower, SiglipTower
from medmoe_edge.presets import PRESETS

LAYERS = 3
# ours -> transformers', part by part; what is not listed is called the same
NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",
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


def config_of(select_layer: int) -> VisionConfig:
    tiny = PRESETS["tiny"].vision
    return replace(tiny, image_size=42, layers=LAYERS, select_layer=select_layer)


def reference() -> nn.Module:
    config = config_of(-2)
    torch.manual_seed(0)
    model: nn.Module = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.feature_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=LAYERS,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="quick_gelu",
        )
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def their_name(name: str) -> str:
    return ".".join(NAMES.get(part, part) for part in name.split("."))


@torch.no_grad()
@pytest.mark.parametrize("select_layer", [-1, -2, -3, -4, 0, 2])
def test_patch_features_of_the_selected_layer(select_layer: int) -> None:
    theirs = reference()
    copied = {
        name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()
    }
    ours = ClipTower(config_of(select_layer)).eval()
    ours.load_state_dict({name: copied.pop(their_name(name)) for name in ours.state_dict()})
    assert not copied, "transformers has weights that ours lack"

    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    states = theirs(pixels, output_hidden_states=True).hidden_states
    expected = states[select_layer][:, 1:]  # without the class token
    assert expected.shape == (2, 9, 16)
    torch.testing.assert_close(ours(pixels), expected, atol=1e-4, rtol=0.0)
    others = [state[:, 1:] for state in states if state is not states[select_layer]]
    assert all((other - expected).abs().max() > 1e-2 for other in others)


@torch.no_grad()
@pytest.mark.parametrize(("feature", "first"), [("patch", 1), ("cls_patch", 0)])
def test_siglip_loses_its_first_patch_as_moe_llava_has_it(feature: Any, first: int) -> None:
    config = replace(PRESETS["tiny-qwen"].vision, select_feature=feature)
    torch.manual_seed(0)
    theirs: nn.Module = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.feature_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            vision_use_head=False,
        )
    )
    theirs.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    copied = {
        name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()
    }
    ours = SiglipTower(config).eval()
    ours.load_state_dict({name: copied.pop(their_name(name)) for name in ours.state_dict()})
    assert not copied, "transformers has weights that ours lack"
    pixels = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, first:]
    assert expected.shape == (2, config.image_tokens, 16)
    torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=0.0)
