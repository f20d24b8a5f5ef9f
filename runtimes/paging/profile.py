"""What an image's router scores say of the experts that its request will need.

Calibration counted, for each modality, the tokens that every expert got (`RoutingProfile`). The
image's tokens, as the projector gives them, are put before the first router: that costs one small
product and comes before the decoder starts, though attention has not mixed them yet. The modality
whose shares in that layer are nearest to theirs stands for the image, and its profile for what all
layers will do. On nano the expert that it names first gets 66% of a request's tokens, two get 84%
(the best possible: 71 and 87%; a mean over modalities: 36 and 61%); weighing all modalities by
their likelihood, or asking for the modality of the strongest expert's name, is no better.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.weights import float_weights
from medmoe_edge.calibration.routing import RoutingProfile

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RoutingPrediction:
    """Predicts shares `[M, E]` of each layer's tokens that its experts get.

    `shares` `[modalities, M, E]` are the profile's, `prior` `[modalities]` how often each came.
    """

    shares: Floats
    prior: Floats
    norm: tuple[Floats, Floats]
    norm_eps: float
    router: tuple[Floats, Floats]

    @classmethod
    def of(cls, bundle: Bundle) -> "RoutingPrediction | None":
        """From the profile in the manifest and the first router; None of an uncalibrated bundle."""
        calibration = bundle.manifest.get("calibration") or {}
        config = bundle.config
        if config.moe is None or "routing" not in calibration:
            return None
        profile = RoutingProfile.from_json(calibration["routing"])
        if profile.layers != config.moe_layers or not profile.requests.sum():
            return None
        shares = np.stack([profile.probability(name) for name in profile.modalities])
        prior = np.asarray(profile.requests / profile.requests.sum(), np.float32)
        return cls(shares, prior, *_first_router(bundle))

    @property
    def unseen(self) -> Floats:
        """Shares `[M, E]` of an image that was not looked at yet."""
        return np.asarray(np.tensordot(self.prior, self.shares, 1), np.float32)

    def of_image(self, tokens: Floats) -> Floats:
        """Shares `[M, E]` for the projected tokens `[N, D]` of an image."""
        weight, bias = self.norm
        mean, variance = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
        normed = (tokens - mean) / np.sqrt(variance + self.norm_eps) * weight + bias
        matrix, offset = self.router
        chosen = (normed @ matrix + offset).argmax(-1)
        seen = np.bincount(chosen, minlength=matrix.shape[1]) / len(tokens)
        nearest = np.square(self.shares[:, 0] - seen).sum(-1).argmin()
        return np.asarray(self.shares[nearest])


def _first_router(bundle: Bundle) -> tuple[tuple[Floats, Floats], float, tuple[Floats, Floats]]:
    """The norm before the first router, and the router `[D, E]` with its bias `[E]`."""
    config = bundle.config
    assert config.moe is not None
    own = f"decoder.layers.{config.moe_layers[0]}."
    norm = "input_norm" if config.decoder.kind == "phi" else "post_norm"  # phi's block is parallel
    names = [f"{own}{norm}.weight", f"{own}{norm}.bias", f"{own}ffn.router.weight"]
    names += [f"{own}ffn.router.bias"] * config.moe.router_bias
    found: dict[str, Any] = {
        name: np.array(values, np.float32)
        for name, values in float_weights(bundle.path("decoder.onnx"))
        if name in names
    }
    weight, bias, matrix, *offset = (found[name] for name in names)
    experts = config.moe.num_experts
    zeros = np.zeros(experts, np.float32)
    return (
        (weight, bias),
        config.decoder.norm_eps,
        (
            matrix.reshape(-1, experts),
            offset[0] if offset else zeros,
        ),
    )
