"""MedMoE loaded and at work: which modality, which label, and where; over any runtime."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import MANIFEST, ModalityBundle, model_kind
from medmoe_edge.bundle.trust import check_checkpoint
from medmoe_edge.config_contrastive import ModalityConfig, Scores, read_scores
from medmoe_edge.contrastive.features import (
    Classification,
    Location,
    Reading,
    TextCache,
    entropy,
    evidence,
    region_map,
    similarity,
    unit,
)
from medmoe_edge.contrastive.text import ModalityTokenizer
from medmoe_edge.embedded import bundle_path, checkpoint_path
from medmoe_edge.engine.answer import Clock
from medmoe_edge.engine.loading import REFERENCE, OneAtATime, Proven, describe, proven, warnings_of
from medmoe_edge.errors import (
    InputError,
    ModelError,
    Notice,
    checked,
    needs,
)
from medmoe_edge.image.inputs import ImageLike, as_image
from medmoe_edge.image.loading import preprocess, seen_square
from medmoe_edge.image.pixels import Image, unlike_label
from medmoe_edge.runtimes.base import log_softmax
from medmoe_edge.runtimes.contrastive import ImageFeatures, ModalityRuntime, TextFeatures

RuntimeName = Literal["auto", "onnxruntime", "torch"]


class Loaded(NamedTuple):
    """What an engine is made of; `proven` is None of a checkpoint."""

    runtime: ModalityRuntime
    name: str
    sha256: str
    proven: Proven | None
    scores: Scores


def load_modality(
    model: str | os.PathLike[str] = "modality-nano", *, runtime: RuntimeName = "auto"
) -> "ModalityEngine":
    """Load a MedMoE; a bundle whose verification failed is loaded with a warning.

    Args:
        model: An embedded model's name, a bundle's folder, or (with torch) a checkpoint's.
        runtime: What runs it; "auto": ONNX Runtime for a bundle, PyTorch for a checkpoint.

    Raises:
        ModelError: The model cannot be used.
        ResourceError: An optional package is missing.
    """
    model = os.fspath(model)
    folder = checkpoint_path(model) if runtime == "torch" else bundle_path(model)
    if (folder / MANIFEST).exists():
        return ModalityEngine(*_open_bundle(ModalityBundle.open(folder), runtime))
    if model_kind(folder) != ModalityBundle.kind:
        raise ModelError(
            f"{folder} is no bundle or checkpoint of a {ModalityBundle.kind} model.",
            "Use modality-nano, or a model that was trained with: train --model modality-moe",
        )
    if runtime == "onnxruntime":
        raise ModelError(
            f"{folder} is a checkpoint, which ONNX Runtime does not run.",
            "Export it first: medmoe-edge export CHECKPOINT",
        )
    check_checkpoint(folder)
    return ModalityEngine(*open_checkpoint(folder))


def open_bundle(bundle: ModalityBundle) -> ModalityRuntime:
    """The runtime of a bundle; raises `BundleError` for one that holds engines."""
    bundle.check_portable()
    from medmoe_edge.runtimes.contrastive import ModalityOrtRuntime

    reader = _reader(bundle.path("tokenizer.json"), bundle.config)
    return ModalityOrtRuntime(bundle, reader)


def open_checkpoint(folder: Path, *, as_published: bool = False) -> Loaded:
    """A checkpoint on torch; raises `ModelError` and `MissingDependencyError`.

    `as_published` as of `read_modality_checkpoint`.
    """
    with needs("export"):
        from medmoe_edge.checkpoint.contrastive import modality_sha256, read_modality_checkpoint
        from medmoe_edge.runtimes.torch.eager import ModalityTorchRuntime
    model = read_modality_checkpoint(folder, as_published=as_published)
    runtime = ModalityTorchRuntime(model, _reader(folder / "tokenizer.json", model.config))
    name, sha256 = folder.resolve().name, modality_sha256(folder)
    return Loaded(runtime, name, sha256, None, read_scores(folder))


def _open_bundle(bundle: ModalityBundle, runtime: RuntimeName) -> Loaded:
    if runtime == "torch":
        raise ModelError(
            f"{bundle.folder} is a bundle, and torch runs checkpoints.",
            "Leave --runtime out, or give the checkpoint.",
        )
    loaded = open_bundle(bundle)
    return Loaded(loaded, bundle.name, bundle.sha256, proven(bundle), bundle.scores)


def _reader(path: Path, config: ModalityConfig) -> ModalityTokenizer:
    return ModalityTokenizer.from_file(path, config.text, as_published=config.as_published)


AT_ONCE = 256  # texts compared: `[words, regions]` of so many stay below 100 MB


class ModalityEngine(OneAtATime):
    """A loaded MedMoE, that classifies and locates.

    Images and `value_range` are what `Engine.ask` takes. Threads, `with`, `close`, `proven` and
    `verification` are as of an `Engine`.
    """

    def __init__(
        self,
        runtime: ModalityRuntime,
        name: str,
        sha256: str,
        proven: Proven | None = None,
        scores: Scores | None = None,
    ) -> None:
        super().__init__()
        self.runtime: ModalityRuntime = runtime
        self.config = runtime.config
        self.name, self.sha256, self.proven = name, sha256, proven
        self.verification: str = proven.status if proven else REFERENCE
        self.scores = scores or Scores()
        self.texts = TextCache(runtime)
        self._of_model = (*warnings_of(name, proven), *self.scores.warnings)
        self._runs_on = runtime.name  # told of a result also where the engine was closed meanwhile

    def read(
        self,
        image: ImageLike,
        *,
        frame: int | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> Reading:
        """Tell an image's modality, as the router sees it.

        Args:
            image: A path, an `Image`, or an array.
            frame: Which one of several the file holds, from 0.
            value_range: The values of an array that are black and white.

        Returns:
            The modality and the probability of each.

        Raises:
            ImageError: The image cannot be read.
            ModelError: The model's output is not finite.
        """
        clock = Clock()
        picture, features = self._look(image, frame, clock, value_range)
        reading = self._reading(features, clock)
        return dataclasses.replace(reading, warnings=self._warnings(picture, reading))

    def classify(
        self,
        image: ImageLike,
        labels: Sequence[str],
        *,
        prompts: Mapping[str, Sequence[str]] | None = None,
        frame: int | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> Classification:
        """Score labels, of which one is taken to be right; a label given twice counts once.

        Args:
            image: As of `read`, as are `frame` and `value_range`.
            labels: At least one.
            prompts: Phrases for a label, which is as similar as the most similar of them; by
                default the label itself.
            frame: As of `read`.
            value_range: As of `read`.

        Returns:
            A score of each label, which add up to 1, and its similarity, the best first.

        Raises:
            InputError: There is no label, or one or the image cannot be used, or is too long.
        """
        if isinstance(labels, str):
            raise InputError(
                "labels is one text, and a list is meant.", 'Write ["pneumonia", "no finding"].'
            )
        given = checked(prompts, Mapping | None, "prompts") or {}
        wanted = _asked(checked(labels, Iterable, "labels"), given)
        clock = Clock()
        picture, features = self._look(image, frame, clock, value_range)
        phrases = [phrase for own in wanted.values() for phrase in own]
        texts = self._encode(phrases)
        clock.lap("text")
        parts = (slice(start, start + AT_ONCE) for start in range(0, len(phrases), AT_ONCE))
        found = np.concatenate([self._similarity(features, texts.some(part)) for part in parts])
        counts = np.array([len(own) for own in wanted.values()])
        best = np.maximum.reduceat(found, np.cumsum(counts) - counts)  # [labels]
        scores = np.exp(log_softmax(self.scores.temperature * best))
        clock.lap("compare")
        order = np.argsort(-scores, kind="stable")
        names = list(wanted)
        reading = self._reading(features, clock)
        return Classification(
            scores={names[at]: float(scores[at]) for at in order},
            similarities={names[at]: float(best[at]) for at in order},
            reading=reading,
            timings=_timings(clock),
            model=self._model,
            warnings=self._warnings(picture, reading),
        )

    def locate(
        self,
        image: ImageLike,
        phrase: str,
        *,
        frame: int | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> Location:
        """Tell where a phrase lies in an image.

        Args:
            image: As of `read`, as are `frame` and `value_range`.
            phrase: One text of words.
            frame: As of `read`.
            value_range: As of `read`.

        Returns:
            A map over the image's pixels `[H, W]`, its peak `(x, y)`, and the similarity.

        Raises:
            InputError: The phrase or the image cannot be used, or the phrase is too long.
        """
        if not isinstance(phrase, str):
            raise InputError("phrase is not one text.", "Look for one at a time.")
        phrase = _cleaned(phrase)
        clock = Clock()
        picture, features = self._look(image, frame, clock, value_range)
        texts = self._encode([phrase])
        clock.lap("text")
        grid = region_map(features.regions[0], texts.words[0], texts.mask[0])  # [h, w]
        heat = self._over_picture(grid, picture)
        y, x = np.unravel_index(int(heat.argmax()), heat.shape)
        fit = float(self._similarity(features, texts)[0])
        clock.lap("compare")
        reading = self._reading(features, clock)
        return Location(
            phrase=phrase,
            heat=heat,
            peak=(int(x), int(y)),
            similarity=fit,
            reading=reading,
            timings=_timings(clock),
            model=self._model,
            warnings=self._warnings(picture, reading),
        )

    def _similarity(self, features: ImageFeatures, texts: TextFeatures) -> Floats:
        """Of one image, `[T]`."""
        found: Floats = similarity(features, texts, as_published=self.config.as_published)[0]
        return found

    def embed_image(self, image: ImageLike, *, frame: int | None = None) -> Floats:
        """Give an image's unit vector.

        Args:
            image: As of `read`.
            frame: As of `read`.

        Returns:
            `[D]`, of length 1: its product with that of a text is their similarity.

        Raises:
            ImageError: The image cannot be read.
        """
        _, features = self._look(image, frame, Clock())
        return unit(features.pooled[0])

    def embed_images(self, pixels: Floats) -> ImageFeatures:
        """Features of images that `image.preprocess` prepared, `[B, 3, S, S]`."""
        with self.one_at_a_time():
            features = self.runtime.encode_images(pixels)
        if not all(np.isfinite(array).all() for array in features):
            raise self.not_finite()
        return features

    def embed_text(self, text: str) -> Floats:
        """Give a text's unit vector.

        Args:
            text: At least one word.

        Returns:
            `[D]`, of length 1.

        Raises:
            InputError: The text has no word, or more than the model reads.
        """
        return unit(self._encode([_cleaned(text)]).pooled[0])

    def reading(self, features: ImageFeatures) -> Reading:
        """The router's view of one image `[1, ...]` whose features are known already."""
        return self._reading(features, Clock())

    def _look(
        self,
        image: ImageLike,
        frame: int | None,
        clock: Clock,
        value_range: tuple[float, float] | None = None,
    ) -> tuple[Image, ImageFeatures]:
        picture = as_image(image, frame=frame, value_range=value_range)
        pixels = preprocess(picture, self.config.vision)
        clock.lap("image")
        features = self.embed_images(pixels)
        clock.lap("vision")
        return picture, features

    def _release(self) -> None:
        super()._release()
        del self.texts

    def _encode(self, phrases: Sequence[str]) -> TextFeatures:
        with self.one_at_a_time():
            self.runtime.check_whole(phrases)
            features = self.texts.encode(phrases)
        if not (np.isfinite(features.words).all() and np.isfinite(features.pooled).all()):
            raise self.not_finite()
        return features

    def _reading(self, features: ImageFeatures, clock: Clock) -> Reading:
        logits, limits = features.router_logits[0], self.scores
        probabilities = np.exp(log_softmax(logits))
        unsure, seen = float(entropy(logits)), float(evidence(logits))
        order = np.argsort(-probabilities, kind="stable")
        names = self.config.modalities
        return Reading(
            modality=names[order[0]],
            probabilities={names[at]: float(probabilities[at]) for at in order},
            entropy=unsure,
            unfamiliar=unsure > limits.entropy_limit or seen < limits.evidence_limit,
            timings=_timings(clock),
            model=self._model,
        )

    def _over_picture(self, grid: Floats, picture: Image) -> Floats:
        """A map `[h, w]` over the square that was seen, as `[H, W]` over the picture; bilinear.

        Where only the middle was seen, what lies beyond is as its edge.
        """
        left, top, side = seen_square(picture, self.config.vision)
        height, width = picture.pixels.shape[:2]
        return _stretched(_stretched(grid, 0, height, top, side), 1, width, left, side)

    @property
    def _model(self) -> dict[str, Any]:
        return describe(self.name, self.sha256, self.proven, self._runs_on)

    def _warnings(self, picture: Image, reading: Reading) -> tuple[Notice, ...]:
        unlike = unlike_label(picture.labels, reading.modality)
        return (*self._of_model, *picture.notices, *unlike)


def _timings(clock: Clock) -> dict[str, float]:
    return {**clock.laps, "total": sum(clock.laps.values())}


def _asked(
    labels: Sequence[str], prompts: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """What each label is compared by, cleaned and checked."""
    own = {
        _cleaned(label): tuple(
            map(_cleaned, checked(texts, Sequence[str], f"prompts of {label!r}"))
        )
        for label, texts in prompts.items()
    }
    wanted = {name: own.get(name, (name,)) for name in map(_cleaned, labels)}
    if not wanted:
        raise InputError("There are no labels.", "Give two or more to choose from.")
    if stray := next((name for name in own if name not in wanted), None):
        raise InputError(f"There are prompts for {stray!r}, which is no label.", "Add the label.")
    if empty := next((name for name, texts in wanted.items() if not texts), None):
        raise InputError(
            f"The label {empty!r} has an empty list of prompts.",
            "Give at least one, or leave it out to use the label itself.",
        )
    return wanted


def _cleaned(text: str) -> str:
    text = checked(text, str, "A text").strip()
    if not text:
        raise InputError("A text is empty.", "Write words, such as: pleural effusion.")
    return text


def _stretched(values: Floats, axis: int, count: int, start: float, side: float) -> Floats:
    """Cells over `side` pixels from `start` on, as `count` pixels from 0 on, linear in between."""
    cells = values.shape[axis]
    at = ((np.arange(count, dtype=np.float32) + 0.5 - start) / side * cells - 0.5).clip(
        0, cells - 1
    )
    low = at.astype(np.intp)
    high = np.minimum(low + 1, cells - 1)
    share = np.expand_dims(at - low, 1 - axis).astype(np.float32)
    found: Floats = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return found
