"""What a contrastive model trains on: captioned images, which text fits which image, and where.

Its BERT starts from nothing, with a small WordPiece vocabulary trained on the captions.
"""

import os
import random
import string
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import models, trainers
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader

from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.contrastive.text import MARKS, UNKNOWN, ModalityTokenizer, splitting, word_pieces
from medmoe_edge.data.captions import Captioned
from medmoe_edge.data.datasets import Place
from medmoe_edge.image.loading import load_image, seen_square
from medmoe_edge.models.contrastive import UNLABELLED
from medmoe_edge.training.data import Listed, Pictures, augment
from medmoe_edge.training.loop import Loader

_LETTERS = string.ascii_lowercase + string.digits
# Given to the trainer beforehand, or it numbers the pieces within words in another order each time
# and breaks ties by that.
_BASE = [*MARKS, *string.punctuation, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]


def train_word_pieces(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Write `tokenizer.json`: lower case, no accents, the marks around a text; id 0 is padding.

    Any text in Latin letters can be encoded, also words that training never showed. The same texts
    give the same file.
    """
    trained = splitting(models.WordPiece(unk_token=UNKNOWN))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=_BASE, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    backend = word_pieces(trained.get_vocab())
    partial = path.with_suffix(".partial")
    backend.save(str(partial))
    os.replace(partial, path)


VIEW_ALONE = 0.1  # how often a text says only what kind of image it is
FORMS = ("{view}, {seen}", "{seen}, {view}", "{view} showing {seen}", "{seen} on {view}")
IN_SIGHT = 0.2  # regions: of a box of which less is left by an augmentation nothing is learned


class Texts(NamedTuple):
    """What the text tower reads: `ids`, `words` and `seen` `[B, P]` as `Pieces`."""

    ids: Tensor
    words: Tensor
    seen: Tensor

    def to(self, device: torch.device) -> "Texts":
        """The same texts on `device`."""
        return Texts(*(part.to(device) for part in self))


class Grounding(NamedTuple):
    """G phrases and where they are: `boxes` `[G, h, w]`, each of sum 1, in the images `rows`."""

    rows: Tensor
    texts: Texts
    boxes: Tensor

    def to(self, device: torch.device) -> "Grounding":
        """The same on `device`."""
        return Grounding(self.rows.to(device), self.texts.to(device), self.boxes.to(device))


@dataclass(frozen=True)
class ModalityBatch:
    """B images `pixels` `[B, 3, S, S]` and B texts: row i of each belong together.

    `fits` `[B, B]` is True where the text of the column says nothing that is not known of the
    image of the row; `modality` `[B]` is an index or `UNLABELLED`.
    """

    pixels: Tensor
    texts: Texts
    fits: Tensor
    modality: Tensor
    grounding: Grounding | None

    def to(self, device: torch.device) -> "ModalityBatch":
        """The same batch on `device`."""
        return ModalityBatch(
            self.pixels.to(device),
            self.texts.to(device),
            self.fits.to(device),
            self.modality.to(device),
            self.grounding.to(device) if self.grounding else None,
        )


@dataclass(frozen=True)
class Told:
    """An image, the phrases that are said of it, the text that says them, and a place in it."""

    image: Captioned
    said: tuple[str, ...]
    text: str
    place: Place | None = None


class ModalityBatches:
    """Makes the batches of an epoch."""

    def __init__(
        self,
        config: ModalityConfig,
        tokenizer: ModalityTokenizer,
        places: Iterable[Place],
        seed: int,
    ) -> None:
        self.vision, self.tokenizer, self.seed = config.vision, tokenizer, seed
        self.modalities = list(config.modalities)
        self.pictures = Pictures(config.vision)
        self._places = defaultdict(list)
        for place in places:
            self._places[place.image].append(place)
        self._masks: dict[Place, Tensor] = {}

    def shuffled(self, captioned: Sequence[Captioned], size: int, epoch: int) -> Loader:
        """An epoch: shuffled, augmented, other phrases each time, the last partial batch left out.

        The same seed and epoch give the same batches, so a resumed run repeats an unbroken one.
        """
        order = random.Random(f"{self.seed} {epoch}")
        told = []
        for item in order.sample(captioned, len(captioned)):
            places = self._places.get(item.image)
            place = order.choice(places) if places else None
            told.append(Told(item, *some_phrases(item.phrases, order), place))
        noise = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        return DataLoader(
            Listed(told),
            size,
            collate_fn=lambda items: self.collate(items, noise),
            drop_last=len(told) > size,
        )

    def collate(self, told: Sequence[Told], noise: torch.Generator) -> ModalityBatch:
        """The batch of some images and what is said of them."""
        pixels = self.pictures.stack(item.image.image for item in told)
        masks = torch.stack([self._mask(item.place) for item in told])[:, None].float()
        moved = augment(torch.cat((pixels, masks), 1), noise)
        return ModalityBatch(
            moved[:, :3],
            self._read([item.text for item in told]),
            _fits(told),
            torch.tensor([self._modality(item.image.modality) for item in told]),
            self._grounding(told, moved[:, 3:]),
        )

    def _grounding(self, told: Sequence[Told], masks: Tensor) -> Grounding | None:
        shares = avg_pool2d(masks, self.vision.patch_size)[:, 0]  # [B, h, w], 0 to 1
        covered = shares.sum((1, 2))
        phrases = {
            row: item.place.phrase
            for row, item in enumerate(told)
            if item.place and covered[row] > IN_SIGHT
        }
        if not phrases:
            return None
        rows = torch.tensor(list(phrases))
        boxes = shares[rows] / covered[rows, None, None]
        return Grounding(rows, self._read(list(phrases.values())), boxes)

    def _mask(self, place: Place | None) -> Tensor:
        side = self.vision.image_size
        if place is None:
            return torch.zeros(side, side, dtype=torch.bool)
        if place not in self._masks:
            left, top, square = seen_square(load_image(place.image), self.vision)
            mask = place.within(left, top, side / square).mask(side, side)
            self._masks[place] = torch.from_numpy(mask)
        return self._masks[place]

    def _read(self, texts: Sequence[str]) -> Texts:
        return Texts(*(torch.from_numpy(part) for part in self.tokenizer.encode(texts)))

    def _modality(self, name: str | None) -> int:
        return self.modalities.index(name) if name in self.modalities else UNLABELLED


def some_phrases(phrases: Sequence[str], order: random.Random) -> tuple[tuple[str, ...], str]:
    """Some of a caption's phrases, and a text that says them as people do.

    The first phrase, body and modality, is said half of the time, so that a finding alone is
    understood; the others are drawn, one to all of them, in any order.
    """
    view, *others = phrases
    if not others or order.random() < VIEW_ALONE:
        return (view,), view
    chosen = tuple(order.sample(others, order.randint(1, len(others))))
    seen = ", ".join(chosen)
    if order.random() < 0.5:
        return chosen, seen
    return (view, *chosen), order.choice(FORMS).format(view=view, seen=seen)


def _fits(told: Sequence[Told]) -> Tensor:
    known = [set(item.image.phrases) for item in told]
    return torch.tensor([[facts.issuperset(item.said) for item in told] for facts in known])
