"""A bundle that is asked about images of several modalities, its experts paged or resident.

Weights of a real model's shapes that know of no modality send every image to the same experts, or
to all of them. For these routing is synthetic: each token's embedding gets a direction that all
routers read as one expert: the modality's, or, of a given share of the tokens, any other's. All
else of the work is what it would be; answers mean nothing, and are compared with each other only.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_edge._types import Doubles, Floats, there
from medmoe_edge.bench.backends import NEW_TOKENS, QUESTION
from medmoe_edge.bench.measurement import seconds
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.recorded import float_weights
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.data.datasets import Example, read_examples
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.engine.loading import proven
from medmoe_edge.errors import DataError
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.ort.paged import PagedOrtRuntime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

VARIANTS = 8  # questions of a modality
STRENGTH = 10.0  # root mean square of a direction: of random tokens it is 0.02, of all layers 5
REQUESTS = 1000  # tokens of the profile that stand for one request


@dataclass(frozen=True)
class Asking:
    """What a bundle is asked.

    Attributes:
        data: A file of questions, by their images' modality; None for noise, whose routing is
            synthetic.
        follow: Of noise, the share of the tokens that go to the modality's expert.
        drop_pages: Keep no expert in the page cache, so that loads wait for storage.
    """

    data: str | None = None
    follow: float = 1.0
    drop_pages: bool = False

    def modalities(self, bundle: Bundle) -> int:
        """How many there are; raises `DataError` for a file that has not two."""
        if self.data is not None:
            return len(by_modality(Path(self.data)))
        return there(bundle.config.moe).num_experts


def by_modality(file: Path) -> list[list[Example]]:
    """The first questions of each modality, in alphabetical order; images are looked for.

    Raises `DataError` for a file with fewer than two modalities.
    """
    groups: dict[str, list[Example]] = {}
    for example in read_examples(file, check_images=True):
        group = groups.setdefault(example.modality or "", [])
        if len(group) < VARIANTS and all(example.image != other.image for other in group):
            group.append(example)
    groups.pop("", None)
    if len(groups) < 2:
        raise DataError(
            f"{file} has images of fewer than two modalities.",
            "Give questions with a `modality`, of two at least.",
        )
    return [groups[name] for name in sorted(groups)]


class Session:
    """An engine and what it is asked; it has answered once when it is made.

    `budget` is in bytes, or None for all experts in memory.
    """

    def __init__(self, path: Path, budget: int | None, prefetch: bool, asking: Asking) -> None:
        self._groups = by_modality(Path(asking.data)) if asking.data is not None else []
        if budget is None and self._groups:
            self.engine = load(path)
        else:
            self.engine = _engine(Bundle.open(path), budget, prefetch, asking)
        self.ask(0, 0)  # sessions are opened by their first use

    def ask(self, modality: int, number: int) -> dict[str, Any]:
        """One answer, plain JSON values: `answer` and `confidence`, `seconds`, and its `paging`.

        `share` is that of the routed tokens which the expert with the most of them got.
        """
        runtime = self.engine.runtime
        if isinstance(runtime, SyntheticRuntime):
            runtime.modality = modality
        image, question = self._question(modality, number)
        answers = []
        taken = seconds(
            lambda: answers.append(self.engine.ask(image, question, max_new_tokens=NEW_TOKENS))
        )
        (answer,) = answers
        return {
            "seconds": taken,
            "answer": answer.text,
            "confidence": answer.confidence,
            "share": max(answer.experts.values()),
            "paging": answer.paging,
        }

    def _question(self, modality: int, number: int) -> tuple[Image, str]:
        if self._groups:
            group = self._groups[modality]
            example = group[number % len(group)]
            return load_image(example.image), example.question
        side = self.engine.config.vision.image_size
        generator = np.random.default_rng((modality, number % VARIANTS))
        return Image.from_array(generator.integers(0, 256, (side, side), np.uint8)), QUESTION


class SyntheticRuntime(OrtRuntime):
    """Sends a share `follow` of the tokens to the expert numbered `modality`."""

    directions: Floats  # [E, D], set before the first question, like `follow`
    follow = 1.0
    modality = 0
    _generator: np.random.Generator

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]` that follow the modality."""
        self._generator = np.random.default_rng(self.modality)  # the same for the same question
        tokens = super().encode_image(pixels)
        return tokens + self._towards(len(tokens))

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]` that follow the modality."""
        return super().embed(ids) + self._towards(len(ids))

    def _towards(self, tokens: int) -> Floats:
        experts, draw = len(self.directions), self._generator
        strays = draw.random(tokens) >= self.follow
        others = draw.integers(1, experts, tokens)
        chosen = np.where(strays, (self.modality + others) % experts, self.modality)
        return np.asarray(self.directions[chosen])


class SyntheticPagedRuntime(PagedOrtRuntime, SyntheticRuntime):
    """The same with paged experts, which are predicted from the image tokens."""


def with_synthetic_profile(bundle: Bundle, follow: float) -> Bundle:
    """The bundle with the routing profile that calibration would find under such routing."""
    moe = there(bundle.config.moe)
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


def directions(bundle: Bundle) -> Floats:
    """For each expert, what adds to its score in all layers' routers at once; `[E, D]`."""
    config, moe = bundle.config, there(bundle.config.moe)
    rows, parallel = moe.router_rows, config.decoder.parallel
    weights = {
        name: array
        for name, array in float_weights(bundle.path("decoder.onnx"))
        if name.endswith(("ffn.router.weight", "norm.weight"))
    }
    total: Doubles = np.zeros((rows, config.decoder.hidden_size))
    for layer in config.moe_layers:
        own = f"decoder.layers.{layer}."
        router = weights[f"{own}ffn.router.weight"].reshape(-1, rows)  # [D, R]
        norm = weights[f"{own}{'input' if parallel else 'post'}_norm.weight"]  # [D]
        scored = (norm[:, None] * (router - router.mean(-1, keepdims=True))).T
        total += scored / np.linalg.norm(scored, axis=-1, keepdims=True)
    scale = STRENGTH / np.sqrt(np.square(total).mean(-1, keepdims=True))
    scaled = np.asarray(total * scale, np.float32)
    return scaled if moe.own_rows is None else scaled[list(moe.own_rows)]


def _engine(bundle: Bundle, budget: int | None, prefetch: bool, asking: Asking) -> Engine:
    """An engine with a paged runtime, or with synthetic routing, or with both."""
    synthetic = asking.data is None
    if synthetic:
        bundle = with_synthetic_profile(bundle, asking.follow)
    runtime: OrtRuntime
    if budget is None:
        runtime = SyntheticRuntime(bundle)
    else:
        kind = SyntheticPagedRuntime if synthetic else PagedOrtRuntime
        runtime = kind(bundle, budget, drop_pages=asking.drop_pages, prefetch=prefetch)
    if isinstance(runtime, SyntheticRuntime):
        runtime.directions, runtime.follow = directions(bundle), asking.follow
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    return Engine(runtime, tokenizer, bundle.name, bundle.sha256, proven(bundle))
