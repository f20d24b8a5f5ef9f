"""Named configurations, and random checkpoints made from them."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from medmoe_edge.checkpoint import write_checkpoint
from medmoe_edge.checkpoint_keys import Shape, expected_parameters
from medmoe_edge.checkpoint_vision import CLIP_L_14_336, CLIP_MEAN, CLIP_STD
from medmoe_edge.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from medmoe_edge.errors import InputError

_TINY_TOWER = VisionConfig(
    kind="clip",
    image_size=28,
    feature_size=16,
    pixel_mean=CLIP_MEAN,
    pixel_std=CLIP_STD,
    layers=2,
    heads=2,
    intermediate_size=32,
    patch_size=14,
)

_TINY = ModelConfig(
    vision=_TINY_TOWER,
    decoder=DecoderConfig(
        kind="stablelm",
        hidden_size=64,
        layers=3,
        heads=2,
        intermediate_size=64,
        vocab_size=256,
        rotary_fraction=0.5,
        max_positions=512,
    ),
    moe=MoEConfig(layers=(0, 2)),
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": _TINY,
    "tiny-phi": replace(_TINY, decoder=replace(_TINY.decoder, kind="phi")),
    # the embedded model; what is learned belongs to training/recipes/nano.json
    "nano": ModelConfig(
        vision=VisionConfig(
            kind="efficientnet-lite",
            image_size=256,
            feature_size=832,
            pixel_mean=(127.0, 127.0, 127.0),
            pixel_std=(128.0, 128.0, 128.0),
            variant="lite2",
        ),
        decoder=DecoderConfig(
            kind="stablelm",
            hidden_size=256,
            layers=6,
            heads=4,
            intermediate_size=512,
            vocab_size=2560,
            rotary_fraction=0.25,
            max_positions=1024,
        ),
        moe=MoEConfig(layers=(0, 2, 4), expert_names=("mri", "ct", "pathology", "xray")),
    ),
    "med-moe-stablelm-1.6b": ModelConfig(
        vision=CLIP_L_14_336,
        decoder=DecoderConfig(
            kind="stablelm",
            hidden_size=2048,
            layers=24,
            heads=32,
            intermediate_size=5632,
            vocab_size=100352,
            rotary_fraction=0.25,
            max_positions=4096,
            bos_token_id=100257,
            eos_token_id=100257,
        ),
        moe=MoEConfig(layers=tuple(range(0, 24, 2))),
    ),
    "med-moe-phi2-2.7b": ModelConfig(
        vision=CLIP_L_14_336,
        decoder=DecoderConfig(
            kind="phi",
            hidden_size=2560,
            layers=32,
            heads=32,
            intermediate_size=10240,
            vocab_size=51200,
            rotary_fraction=0.4,
            max_positions=2048,
            bos_token_id=50256,
            eos_token_id=50256,
        ),
        moe=MoEConfig(layers=tuple(range(0, 32, 2))),
    ),
}

WEIGHT_STD = 0.02
_CHUNK = 2**22  # values drawn at a time: bounds the fp32 scratch memory


def initialise(preset: str, out: Path, seed: int = 0, force: bool = False) -> None:
    """Write a random checkpoint of a preset in the official layout, one tensor in memory.

    Norms are ones and zeros, everything else is normal with standard deviation 0.02. Each tensor
    depends on the seed and its name alone; the router is one for all layers, as in the official
    checkpoints.
    """
    if preset not in PRESETS:
        raise InputError(f"There is no preset {preset!r}.", f"Use one of: {', '.join(PRESETS)}.")
    config = PRESETS[preset]
    write_checkpoint(out, config, random_tensors(config, seed), force=force)


def random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of `config` in bf16, routers in fp32, as `initialise` writes them."""
    for name, shape in expected_parameters(config).items():
        yield name, _random(name, shape, seed)


def _random(name: str, shape: Shape, seed: int) -> torch.Tensor:
    module, _, part = name.rpartition(".")
    if "norm" in module.rpartition(".")[-1]:  # norm, input_norm, norm1
        return torch.full(shape, float(part == "weight"), dtype=torch.bfloat16)
    router = module.endswith(".router")
    source = f"router.{part}" if router else name
    digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    tensor = torch.empty(shape, dtype=torch.float32 if router else torch.bfloat16)
    flat = tensor.view(-1)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        chunk.copy_(torch.randn(len(chunk), generator=generator) * WEIGHT_STD)
    return tensor
