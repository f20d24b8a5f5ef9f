"""The vision tower of a checkpoint: which one it is, read from `config.json` and tensor shapes."""

import math
from collections.abc import Mapping
from typing import Any

from medmoe_edge.checkpoint.keys import CLIP_PREFIX, TOWER_PREFIX, Shape
from medmoe_edge.config import VisionConfig
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
