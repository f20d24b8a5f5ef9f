"""The Swin tower against transformers' `SwinModel`, on random weights in fp32."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import SwinConfig as TheirConfig
from transformers import SwinModel

from medmoe_edge.checkpoint.contrastive import swin_name
from medmoe_edge.config_contrastive import SwinConfig
from medmoe_edge.models.swin import SwinTower, join_windows, split_windows
from medmoe_edge.presets import MODALITY_PRESETS

TINY = MODALITY_PRESETS["modality-tiny"].vision


def theirs(config: SwinConfig) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = SwinModel(
        TheirConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_size,
            depths=list(config.depths),
            num_heads=list(config.heads),
            window_size=config.window_size,
            mlp_ratio=config.mlp_ratio,
            layer_norm_eps=config.norm_eps,
        )
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        TINY,  # a shifted stage, then one that a single window covers
        replace(TINY, image_size=64, depths=(2, 1, 2), heads=(1, 2, 4)),
        replace(TINY, image_size=56, window_size=3),  # grids 14 and 7, padded to windows of 3
        replace(TINY, image_size=42, patch_size=2, window_size=5),  # 21, padded to merge
        replace(TINY, depths=(3,), heads=(4,), mlp_ratio=2, norm_eps=1e-3),
    ],
    ids=["plain", "three stages", "padded", "odd", "one stage"],
)
def test_every_scale_and_the_last_state(config: SwinConfig, tmp_path: Path) -> None:
    reference = theirs(config)
    reference.save_pretrained(tmp_path)  # type: ignore[operator]
    ours, weights = SwinTower(config), load_file(tmp_path / "model.safetensors")
    ours.load_state_dict({name: weights[swin_name(name)] for name in ours.state_dict()})
    size = config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))

    expected = reference(pixels, output_hidden_states=True)
    pyramid = ours(pixels)

    assert tuple(scale.shape[1] for scale in pyramid.scales) == config.grids
    for scale, state in zip(pyramid.scales, expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(scale.flatten(1, 2), state, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        pyramid.last.flatten(1, 2), expected.last_hidden_state, atol=1e-4, rtol=1e-5
    )


def test_the_published_shape_has_the_published_scales() -> None:
    config = MODALITY_PRESETS["medmoe-swin-t"].vision
    shapes = [(grid**2, size) for grid, size in zip(config.grids, config.channels, strict=True)]
    assert shapes == [(3136, 96), (784, 192), (196, 384), (49, 768)]
    with torch.device("meta"):
        tower = SwinTower(config)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 27_519_354


def test_windows_are_split_and_joined() -> None:
    x = torch.arange(2 * 6 * 6 * 2).view(2, 6, 6, 2)
    windows = split_windows(x, 3)
    assert windows.shape == (8, 9, 2)
    assert torch.equal(windows[1, 4], x[0, 1, 4])  # the centre of the first image's second window
    assert torch.equal(join_windows(windows, 3, 6), x)
