"""Routing that follows the modality, for weights that know of none.

Random weights of a real model's shapes send every image to the same experts, or to all of them.
Here each token's embedding gets a direction that all routers read as one expert: the modality's,
or, of a given share of the tokens, any other's. All else of the work is what it would be; answers
mean nothing, and are compared with each other only.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.weights import float_weights
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.runtimes.ort.paged import PagedOrtRuntime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

Floats = npt.NDArray[np.float32]
STRENGTH = 10.0  # root mean square of a direction: of random tokens it is 0.02, of all layers 5
REQUESTS = 1000  # tokens of the profile that stand for one request


class SteeredRuntime(OrtRuntime):
    """Sends tokens to the expert numbered `modality`; set by `steer` before the first question."""

    directions: Floats  # [E, D]
    follow = 1.0
    modality = 0
    _generator: np.random.Generator

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to steered image tokens `[N, D]`."""
        self._generator = np.random.default_rng(self.modality)  # the same for the same question
        tokens = super().encode_image(pixels)
        return tokens + self._towards(len(tokens))

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to steered embeddings `[S, D]`."""
        return super().embed(ids) + self._towards(len(ids))

    def _towards(self, tokens: int) -> Floats:
        experts, draw = len(self.directions), self._generator
        strays = draw.random(tokens) >= self.follow
        others = draw.integers(1, experts, tokens)
        chosen = np.where(strays, (self.modality + others) % experts, self.modality)
        return np.asarray(self.directions[chosen])


class SteeredPagedRuntime(PagedOrtRuntime, SteeredRuntime):
    """The same with paged experts, which are predicted from the steered image tokens."""


def steered_bundle(bundle: Bundle, follow: float) -> Bundle:
    """The bundle with the routing profile that calibration would find under such steering."""
    moe = bundle.config.moe
    assert moe is not None
    count, layers = moe.num_experts, len(moe.layers)
    stray = (1 - follow) / max(count - 1, 1)
    shares = np.full((count, count), stray) + (follow - stray) * np.eye(count)  # [E, modalities]
    profile = RoutingProfile(
        tuple(f"modality {number}" for number in range(count)),
        bundle.config.moe_layers,
        np.tile(np.rint(REQUESTS * shares).astype(np.int64), (layers, 1, 1)),
        np.ones(count, np.int64),
        np.full(layers, count * (count if follow < 1 else 1)),
    )
    calibration = {"calibration": {"routing": profile.to_json()}}
    return dataclasses.replace(bundle, manifest={**bundle.manifest, **calibration})


def steer(runtime: SteeredRuntime, follow: float) -> None:
    """Set it up: a share `follow` of the tokens goes where their image's modality does."""
    runtime.directions, runtime.follow = directions(runtime.bundle), follow


def directions(bundle: Bundle) -> Floats:
    """For each expert, what adds to its score in all layers' routers at once; `[E, D]`."""
    config = bundle.config
    assert config.moe is not None
    experts, phi = config.moe.num_experts, config.decoder.kind == "phi"
    weights: dict[str, npt.NDArray[Any]] = {
        name: array
        for name, array in float_weights(bundle.path("decoder.onnx"))
        if name.endswith(("ffn.router.weight", "norm.weight"))
    }
    total = np.zeros((experts, config.decoder.hidden_size))
    for layer in config.moe_layers:
        own = f"decoder.layers.{layer}."
        router = weights[f"{own}ffn.router.weight"].reshape(-1, experts)  # [D, E]
        norm = weights[f"{own}{'input' if phi else 'post'}_norm.weight"]  # [D]
        scored = (norm[:, None] * (router - router.mean(-1, keepdims=True))).T
        total += scored / np.linalg.norm(scored, axis=-1, keepdims=True)
    scale = STRENGTH / np.sqrt(np.square(total).mean(-1, keepdims=True))
    return np.asarray(total * scale, np.float32)
