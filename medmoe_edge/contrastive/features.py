"""Many images held against the same texts, some at a time: regions are too large to keep."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medmoe_edge.contrastive.similarity import similarity
from medmoe_edge.contrastive.texts import TextCache
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.runtimes.contrastive import Floats, ModalityRuntime

AT_ONCE = 8

Done = Callable[[int, int], None]  # how many of how many


class Compared(NamedTuple):
    """`similarities` `[N, T]` of images and texts, and `router_logits` `[N, E]`."""

    similarities: Floats
    router_logits: Floats


def compare(
    runtime: ModalityRuntime,
    images: Sequence[Path],
    texts: Sequence[str],
    done: Done = lambda *_: None,
) -> Compared:
    """Every image with every text; `done` hears how many of the images have been looked at."""
    read = TextCache(runtime).encode(texts)
    similarities, logits = [], []
    for start in range(0, len(images), AT_ONCE):
        chosen = images[start : start + AT_ONCE]
        pixels = [preprocess(load_image(path), runtime.config.vision) for path in chosen]
        seen = runtime.encode_images(np.concatenate(pixels))
        similarities.append(similarity(seen, read))
        logits.append(seen.router_logits)
        done(start + len(chosen), len(images))
    return Compared(np.concatenate(similarities), np.concatenate(logits))
