"""Named configurations: the published sizes, nano, and tiny ones for tests."""

from dataclasses import replace

from medmoe_edge.checkpoint_vision import CLIP_L_14_336, CLIP_MEAN, CLIP_STD
from medmoe_edge.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig

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
