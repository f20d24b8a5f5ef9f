"""Named configurations: the published sizes, nano, and tiny ones for tests."""

from dataclasses import replace

from medmoe_edge.checkpoint.config import (
    CLIP_L_14_336,
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP_SO400M_14_384,
)
from medmoe_edge.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from medmoe_edge.config_contrastive import BertConfig, ModalityConfig, SwinConfig

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

# 3 x 3 patches of 12 of the 40 pixels' side, the first of which is dropped
_TINY_SIGLIP = replace(
    SIGLIP_SO400M_14_384,
    image_size=40,
    feature_size=16,
    layers=2,
    heads=2,
    intermediate_size=32,
    patch_size=12,
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
            vocab_size=3072,
            rotary_fraction=0.25,
            max_positions=1024,
        ),
        moe=MoEConfig(
            layers=(0, 2, 4),
            num_experts=6,
            expert_names=("mri", "ct", "pathology", "xray", "ultrasound", "fundus"),
        ),
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


def _moe_llava(vision: VisionConfig, decoder: DecoderConfig) -> ModelConfig:
    """MoE-LLaVA-*-4e (arXiv 2401.15947): two of four experts in every second layer, no meta."""
    layers = tuple(range(0, decoder.layers, 2))
    moe = MoEConfig(layers=layers, top_k=2, meta_expert=False, router_bias=False)
    return ModelConfig(vision, decoder, moe)


_QWEN = DecoderConfig(
    kind="qwen",
    hidden_size=2048,
    layers=24,
    heads=16,
    intermediate_size=5504,
    vocab_size=151936,
    rotary_fraction=1.0,
    norm_eps=1e-6,
    max_positions=8192,
    eos_token_id=151643,
)
_STABLELM = PRESETS["med-moe-stablelm-1.6b"].decoder
_PHI = PRESETS["med-moe-phi2-2.7b"].decoder
PRESETS |= {
    "tiny-qwen": _moe_llava(_TINY_SIGLIP, replace(_TINY.decoder, kind="qwen", norm_eps=1e-6)),
    "moe-llava-stablelm-1.6b": _moe_llava(CLIP_L_14_336, _STABLELM),
    "moe-llava-stablelm-1.6b-384": _moe_llava(SIGLIP_SO400M_14_384, _STABLELM),
    "moe-llava-phi2-2.7b": _moe_llava(CLIP_L_14_336, _PHI),
    "moe-llava-phi2-2.7b-384": _moe_llava(SIGLIP_SO400M_14_384, _PHI),
    "moe-llava-qwen-1.8b": _moe_llava(CLIP_L_14_336, _QWEN),
}

# ImageNet's normalisation, that of the published Swin towers
_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)

# image-text alignment: another type of model, so a table of its own
MODALITY_PRESETS: dict[str, ModalityConfig] = {
    "modality-tiny": ModalityConfig(
        vision=SwinConfig(
            image_size=32,
            patch_size=4,
            embed_size=8,
            depths=(2, 2),
            heads=(2, 2),
            window_size=4,
            pixel_mean=_IMAGENET_MEAN,
            pixel_std=_IMAGENET_STD,
        ),
        text=BertConfig(
            vocab_size=64,
            hidden_size=16,
            layers=4,
            heads=2,
            intermediate_size=32,
            max_positions=32,
        ),
    ),
    # the embedded model: patches of 8 pixels, and three scales of 28, 14 and 7 positions a side
    "modality-nano": ModalityConfig(
        vision=SwinConfig(
            image_size=224,
            patch_size=8,
            embed_size=64,
            depths=(2, 6, 2),
            heads=(2, 4, 8),
            window_size=7,
            pixel_mean=(127.5, 127.5, 127.5),
            pixel_std=(127.5, 127.5, 127.5),
        ),
        text=BertConfig(
            vocab_size=2048,
            hidden_size=256,
            layers=4,
            heads=4,
            intermediate_size=1024,
            max_positions=64,
            max_pieces=64,
        ),
    ),
    # the paper's: Swin-T, and the shapes of Bio_ClinicalBERT
    "medmoe-swin-t": ModalityConfig(
        vision=SwinConfig(
            image_size=224,
            patch_size=4,
            embed_size=96,
            depths=(2, 2, 6, 2),
            heads=(3, 6, 12, 24),
            window_size=7,
            pixel_mean=_IMAGENET_MEAN,
            pixel_std=_IMAGENET_STD,
        ),
        text=BertConfig(
            vocab_size=28996,
            hidden_size=768,
            layers=12,
            heads=12,
            intermediate_size=3072,
        ),
    ),
}
