"""Recordings that travel with bundles: a few inputs, and what the fp32 checkpoint made of them.

Of each image the square that the tower sees, as PNG; of Med-MoE per image some image tokens and the
routing of some positions, per question the answer, the likeliest tokens at each of its positions
and the routing. Of a MedMoE per image what `Seen` holds, of some regions.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle, ModalityBundle
from medmoe_edge.bundle.recorded import Recorded
from medmoe_edge.config import VisionConfig
from medmoe_edge.config_contrastive import SwinConfig
from medmoe_edge.data.datasets import Example
from medmoe_edge.errors import BundleError, of_machine
from medmoe_edge.evaluation.fidelity import (
    MAX_NEW_TOKENS,
    RecordedImage,
    RecordedQuestion,
    Recording,
    likeliest,
)
from medmoe_edge.image.loading import seen_picture
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer

T = TypeVar("T")
Arrays = Mapping[str, npt.NDArray[Any]]
QUESTIONS = 64
TOKENS, POSITIONS, REGIONS = 8, 128, 16  # kept of an image
LIKELIEST = 16  # tokens at each position of an answer


class Seen(NamedTuple):
    """What is compared of one image: chosen modality and phrase, pooled `[D]`, regions `[R, D]`."""

    modality: int
    best: int
    pooled: Floats
    regions: Floats

    @property
    def finite(self) -> bool:
        """Whether its features are."""
        return bool(np.isfinite(self.pooled).all() and np.isfinite(self.regions).all())


def pack_recording(recording: Recording, kl_limit: float) -> tuple[dict[str, Any], Arrays]:
    """A recording as JSON values and arrays; `kl_limit` is what a bundle's mean KL may be."""
    keys = list(recording.images)
    pictures = [recording.load(key) for key in keys]
    tokens = _some(recording.config.vision.image_tokens, TOKENS)
    positions = _some(len(recording.images[keys[0]].router_logits), POSITIONS)
    questions, said, likely, chances, routes = [], [], [], [], []
    for index, key in enumerate(keys):
        for example in recording.examples[key]:
            found = recording.questions[example.id]
            order = np.argsort(-found.log_probabilities, -1, kind="stable")
            top = order[:, :LIKELIEST].astype(np.int32)
            said.append(found.tokens)
            likely.append(top)
            chances.append(likeliest(found.log_probabilities, top))
            routes.append(found.router_logits)
            questions.append(
                {
                    "image": index,
                    "question": example.question,
                    "answer_type": example.answer_type,
                    "modality": example.modality,
                    "tokens": len(found.tokens),
                    "positions": len(found.router_logits),
                }
            )
    images = [recording.images[key] for key in keys]
    sizes, content = _as_png(pictures, recording.config.vision)
    about = {"pictures": sizes, "questions": questions, "limits": {"kl": kl_limit}}
    return about, {
        "pictures": content,
        "features": np.stack([image.features[tokens] for image in images]).astype(np.float16),
        "prefixes": np.stack([image.router_logits[positions] for image in images]),
        "answers": np.concatenate(said).astype(np.int32),
        "likeliest": np.concatenate(likely),
        "log_probabilities": np.concatenate(chances).astype(np.float32),
        "routes": np.concatenate(routes).astype(np.float32),
    }


def unpack_recording(bundle: Bundle, recorded: Recorded) -> tuple[Recording, float]:
    """The recording of a bundle and its limit of KL; raises `BundleError` for a damaged one."""
    return _checked(bundle, partial(_unpack, bundle, recorded))


def pack_seen(
    seen: Sequence[Seen], images: Sequence[Image], words: Floats, vision: SwinConfig
) -> tuple[dict[str, Any], Arrays]:
    """What a MedMoE saw, and the features of the phrases' words `[T, D]`."""
    regions = _some(len(seen[0].regions), REGIONS)
    sizes, content = _as_png(images, vision)
    about = {
        "pictures": sizes,
        "modalities": [one.modality for one in seen],
        "best": [one.best for one in seen],
    }
    return about, {
        "pictures": content,
        "pooled": np.stack([one.pooled for one in seen]).astype(np.float32),
        "regions": np.stack([one.regions[regions] for one in seen]).astype(np.float16),
        "words": words.astype(np.float16),
    }


def unpack_seen(
    bundle: ModalityBundle, recorded: Recorded
) -> tuple[list[tuple[Image, Seen]], npt.NDArray[np.int64], Floats]:
    """Images with what was seen in them, which regions those are, and the words' features.

    Raises `BundleError` for a damaged recording.
    """
    return _checked(bundle, partial(_unpack_seen, bundle, recorded))


def _unpack(bundle: Bundle, recorded: Recorded) -> tuple[Recording, float]:
    config, arrays, about = bundle.config, recorded.arrays, recorded.about
    pictures = _pictures(recorded, config.vision)
    prefix = len(Tokenizer.from_file(bundle.path("tokenizer.json")).prefix_ids())
    tokens = _some(config.vision.image_tokens, TOKENS)
    positions = _some(prefix + config.vision.image_tokens, POSITIONS)
    moe = config.moe
    shape = (len(moe.layers), moe.router_rows) if moe else (0, 0)
    images: dict[Any, RecordedImage] = {}
    examples: dict[Any, list[Example]] = {}
    questions: dict[str, RecordedQuestion] = {}
    for index, (key, _) in enumerate(pictures.items()):
        features = _shaped(arrays["features"][index], len(tokens), config.decoder.hidden_size)
        routed = _shaped(arrays["prefixes"][index], len(positions), *shape)
        images[key] = RecordedImage(features, routed, tokens, positions)
        examples[key] = []
    keys, answered, asked = list(images), 0, 0
    for number, question in enumerate(about["questions"]):
        key, name = keys[question["image"]], str(number)
        here = slice(answered, answered := answered + question["tokens"])
        routes = slice(asked, asked := asked + question["positions"])
        examples[key].append(_example(name, key, question))
        questions[name] = RecordedQuestion(
            tuple(map(int, arrays["answers"][here])),
            arrays["log_probabilities"][here],
            _shaped(arrays["routes"][routes], question["positions"], *shape),
            arrays["likeliest"][here],
        )
    recording = Recording(
        config,
        Tokenizer.from_file(bundle.path("tokenizer.json")),
        MAX_NEW_TOKENS,
        {key: group for key, group in examples.items() if group},
        images,
        questions,
        pictures.__getitem__,
    )
    limit = float(about["limits"]["kl"])
    if not (recording.examples and math.isfinite(limit)):
        raise ValueError("nothing to ask")
    return recording, limit


def _example(name: str, image: Path, question: Mapping[str, Any]) -> Example:
    return Example(
        id=name,
        image=image,
        question=question["question"],
        answer="",
        answer_type=question["answer_type"],
        modality=question["modality"],
        body=None,
        content=None,
        source="recorded",
    )


def _unpack_seen(
    bundle: ModalityBundle, recorded: Recorded
) -> tuple[list[tuple[Image, Seen]], npt.NDArray[np.int64], Floats]:
    vision, about, arrays = bundle.config.vision, recorded.about, recorded.arrays
    pictures = list(_pictures(recorded, vision).values())
    regions = _some(bundle.config.grid**2, REGIONS)
    parts = (about["modalities"], about["best"], arrays["pooled"], arrays["regions"])
    size = bundle.config.size
    seen = [
        Seen(int(modality), int(best), _shaped(pooled, size), _shaped(some, len(regions), size))
        for modality, best, pooled, some in zip(*parts, strict=True)
    ]
    return list(zip(pictures, seen, strict=True)), regions, _shaped(arrays["words"], -1, size)


def _some(count: int, most: int) -> npt.NDArray[np.int64]:
    """Up to `most` of `count` places, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _shaped(array: npt.NDArray[Any], *shape: int) -> Floats:
    if shape[0] >= 0 and array.shape != shape:
        raise ValueError("of another shape")
    return array.astype(np.float32).reshape(shape)


def _as_png(
    images: Sequence[Image], vision: VisionConfig | SwinConfig
) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """The squares that the tower sees, one after the other, and the bytes of each."""
    files = []
    for image in images:
        pixels, file = seen_picture(image, vision).pixels, io.BytesIO()
        grey = bool((pixels == pixels[..., :1]).all())
        Pillow.fromarray(pixels[..., 0] if grey else pixels).save(file, "PNG", optimize=True)
        files.append(file.getvalue())
    return list(map(len, files)), np.frombuffer(b"".join(files), np.uint8)


def _pictures(recorded: Recorded, vision: VisionConfig | SwinConfig) -> dict[Path, Image]:
    content, images, at = recorded.arrays["pictures"].tobytes(), {}, 0
    side = vision.image_size
    for index, size in enumerate(recorded.about["pictures"]):
        with Pillow.open(io.BytesIO(content[at : at + size]), formats=["PNG"]) as picture:
            if picture.size != (side, side):
                raise ValueError("of another size")
            images[Path(f"{index}.png")] = Image.from_array(np.asarray(picture.convert("RGB")))
        at += size
    return images


def _checked(bundle: Bundle | ModalityBundle, unpack: Callable[[], T]) -> T:
    try:
        return unpack()
    except (ValueError, LookupError, TypeError, OSError, Pillow.DecompressionBombError) as error:
        what = f"The recorded inputs of {bundle.folder}"
        damaged = f"{what} are damaged ({type(error).__name__})."
        again = BundleError(damaged, "Copy or export the bundle again.")
        raise (of_machine(what, error) or again) from error
