"""The bundle of a MedMoE.

manifest.json    as of every bundle, and `scores`: how similarities become scores
tokenizer.json
image.onnx       pixels [1, 3, S, S] -> regions, pooled, router_logits     (+ image.data)
text.onnx        ids, words, seen -> word_features, pooled, mask           (+ text.data)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medmoe_edge.bundle.bundle import MANIFEST, AnyBundle
from medmoe_edge.config import Config
from medmoe_edge.config_contrastive import ModalityConfig, Scores


@dataclass(frozen=True)
class ModalityGates(Config):
    """What a verification must find, all 0 to 1: the least agreement with the checkpoint.

    The agreements are shares of images; the cosines are means over images, of their pooled features
    and of all their regions, and over texts.
    """

    modality_agreement: float
    zero_shot_agreement: float
    pooled_cosine: float
    region_cosine: float
    text_cosine: float


DEFAULT_GATES: dict[str, ModalityGates] = {
    "fp32": ModalityGates(0.999, 0.999, 0.9999, 0.9999, 0.9999),
    "int8": ModalityGates(0.995, 0.98, 0.995, 0.99, 0.995),
}


@dataclass(frozen=True)
class ModalityBundle(AnyBundle[ModalityConfig]):
    """An opened bundle of a MedMoE."""

    kind = "modality-moe"

    @classmethod
    def _read_config(cls, data: Mapping[str, Any]) -> ModalityConfig:
        return ModalityConfig.from_json(data, f"{MANIFEST} config")

    @property
    def scores(self) -> Scores:
        """How similarities become scores; raises `ConfigError`."""
        return Scores.from_json(self.manifest.get("scores", {}), f"{MANIFEST} scores")

    @property
    def gates(self) -> ModalityGates:
        """What a verification must find; raises `ConfigError` where none are recorded."""
        return ModalityGates.from_json(self.manifest.get("gates", {}), f"{MANIFEST} gates")
