"""What Med-MoE trains on: random views of images, and conversations packed into sequences.

Views are small rotations, scalings, shifts and changes of light. There is no mirroring: left and
right are what many questions are about. Captions and instructions are built from labels, since the
images carry no free text.

A packed sequence is `prefix, image tokens, turn 1, turn 2, ...`. Every turn sees the prefix, the
image and itself, never another turn, and its positions continue from the image: the model computes
exactly what it would on separate sequences, but the image is processed once.
"""

import hashlib
import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import DataLoader, Dataset

from medmoe_edge.atomic import file_sha256
from medmoe_edge.config import ModelConfig, VisionConfig
from medmoe_edge.config_contrastive import SwinConfig
from medmoe_edge.data.captions import NAMES
from medmoe_edge.data.datasets import (
    NO_SCAN,
    Example,
    Finding,
    LabelledImage,
    by_image,
    owner_of,
)
from medmoe_edge.errors import ConfigError, DataError
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.models.med_moe import EfficientNetLite
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.training.loop import Loader
from medmoe_edge.training.questions import reworded, vary_question

logger = logging.getLogger(__name__)
ROTATION = math.radians(12)
SCALE = 0.15
SHIFT = 0.08
LIGHT = 0.2
HEAD = 2**16  # bytes of files of one size that are compared before all of them are


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised pixels `[B, 3, S, S]` (roughly -1 to 1), each image changed on its own.

    Further channels, such as masks, are moved with the first three and keep their values.
    """
    moved, batch = _moved(pixels, generator), len(pixels)
    contrast = 1 + _uniform(LIGHT, generator, batch, 1, 1, 1)
    brightness = _uniform(LIGHT / 2, generator, batch, 1, 1, 1)
    moved[:, :3] = moved[:, :3] * contrast + brightness
    return moved


def augment_features(features: Tensor, generator: torch.Generator) -> Tensor:
    """What a tower's front saw, `[B, C, h, w]`: moved as images are, each channel made stronger.

    Each image is changed on its own, and each of its channels by up to `LIGHT`.
    """
    gain = 1 + _uniform(LIGHT, generator, *features.shape[:2], 1, 1)
    return _moved(features, generator) * gain


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """`[B, C, h, w]`, each turned, scaled and shifted a little."""
    batch = len(images)
    angle = _uniform(ROTATION, generator, batch)
    zoom = 1 + _uniform(SCALE, generator, batch)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = _uniform(SHIFT, generator, batch, 2)
    rows = (torch.stack((cos, -sin, shift[:, 0]), -1), torch.stack((sin, cos, shift[:, 1]), -1))
    grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def _uniform(limit: float, generator: torch.Generator, *shape: int) -> Tensor:
    return (torch.rand(*shape, generator=generator) * 2 - 1) * limit


Item = TypeVar("Item")


def same_pictures(images: Iterable[Path]) -> dict[Path, Hashable]:
    """What tells the pictures of files apart: their sizes, else their heads, else all bytes."""
    known: dict[Path, Hashable] = {image: image.stat().st_size for image in dict.fromkeys(images)}
    for finer in (_head_sha256, file_sha256):
        same = Counter(known.values())
        known = {
            image: key if same[key] == 1 else (key, finer(image)) for image, key in known.items()
        }
    return known


def _head_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(HEAD)).hexdigest()


def check_pictures(
    learned: Iterable[Example | LabelledImage | Finding],
    held_out: Iterable[Example | LabelledImage | Finding],
) -> dict[Path, Hashable]:
    """Raise `DataError` for a picture of two modalities; warn of what is learned and held out too.

    That are pictures and patients. Returns what tells all apart, whatever their files are called.
    """
    first, second = list(learned), list(held_out)
    known = same_pictures(each.image for each in (*first, *second))
    said: dict[Hashable, tuple[str, Path]] = {}
    for each in filter(lambda each: each.modality, (*first, *second)):
        modality, elsewhere = said.setdefault(known[each.image], (each.modality or "", each.image))
        if modality != each.modality:
            raise DataError(
                f"The picture {each.image} is labelled {each.modality}, and {modality} as "
                f"{elsewhere}.",
                "A picture is of one modality: keep the right label.",
            )

    def keys(each: Example | LabelledImage | Finding) -> Iterator[Hashable]:
        yield known[each.image]
        if each.patient:
            yield owner_of(each)

    own = {key: each.image for each in first for key in keys(each)}
    both = {key: own[key] for each in second for key in keys(each) if key in own}
    if both:
        logger.warning(
            "%d pictures or patients are learned from and held out too (%s is one): what is "
            "measured on these says nothing of others. medmoe-edge data keeps them apart.",
            len(both),
            next(iter(both.values())),
        )
    return known


KEPT_BYTES = 2 * 10**9  # of decoded images, and of views
PLAIN = -1
SLIPS = 0.05  # of the questions have a typing error, where a recipe says phrases
BATCHES_SORTED = 4
REWORDED = 0.6  # of the questions of question files, where a recipe says so


class Pictures:
    """Images as a tower's input; decoded ones are kept, up to `KEPT_BYTES`, for later epochs."""

    def __init__(self, vision: VisionConfig | SwinConfig) -> None:
        self.vision = vision
        self._pixels: dict[Path, Tensor] = {}
        self._room = KEPT_BYTES

    def stack(self, paths: Iterable[Path]) -> Tensor:
        """Normalised pixels `[B, 3, S, S]`."""
        return torch.stack([self._load(path) for path in paths]).float()

    def _load(self, path: Path) -> Tensor:
        if path in self._pixels:
            return self._pixels[path]
        pixels = torch.from_numpy(preprocess(load_image(path), self.vision)[0]).half()
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._pixels[path] = pixels
        return pixels


class Views:
    """What the frozen front of a tower sees of images, in a few views of each, computed once.

    A tower's first stages take most of the time that an image costs; where they do not learn, an
    epoch takes the view whose turn it is. View `PLAIN` is the image unchanged.
    """

    def __init__(self, tower: EfficientNetLite, pictures: Pictures, count: int, seed: int) -> None:
        self.tower, self.pictures, self.count, self.seed = tower, pictures, count, seed
        self._kept: dict[tuple[Path, int], Tensor] = {}
        self._room = KEPT_BYTES

    @torch.no_grad()
    def stack(self, paths: Sequence[Path], view: int) -> Tensor:
        """`[B, C, h, w]`, as `EfficientNetLite.front` gives it."""
        absent = [path for path in dict.fromkeys(paths) if (path, view) not in self._kept]
        fresh: dict[Path, Tensor] = {}
        if absent:
            pixels = self.pictures.stack(absent)
            if view != PLAIN:
                views = [
                    augment(image[None], seeded(f"{self.seed} {path.name} {view}"))
                    for image, path in zip(pixels, absent, strict=True)
                ]
                pixels = torch.cat(views)
            device = next(self.tower.parameters()).device
            pixels = pixels.to(device, memory_format=torch.channels_last)
            seen = self.tower.front(pixels).cpu().half()
            fresh = dict(zip(absent, seen, strict=True))
            for path, features in fresh.items():
                if features.nbytes <= self._room:
                    self._room -= features.nbytes
                    self._kept[path, view] = features
        chosen = (fresh[path] if path in fresh else self._kept[path, view] for path in paths)
        return torch.stack(list(chosen)).float()


def seeded(seed: str) -> torch.Generator:
    """A generator whose numbers follow from a text alone."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


class Listed(Dataset[Item]):
    """A list, as torch's loader wants it."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


@dataclass(frozen=True)
class Conversation:
    """An image, its modality where known, and `(question, answer)` turns.

    No turn sees another.
    """

    image: Path
    modality: str | None
    turns: tuple[tuple[str, str], ...]
    source: str
    made: bool = False  # of facts, in many wordings already


def from_examples(examples: Iterable[Example]) -> list[Conversation]:
    """Group questions by image, in order of first appearance."""
    return [
        Conversation(
            image,
            turns[0].modality,
            tuple((turn.question, tidy_answer(turn.answer)) for turn in turns),
            turns[0].source,
        )
        for image, turns in by_image(examples).items()
    ]


def instructions(labelled: Iterable[LabelledImage]) -> list[Conversation]:
    """Classification posed as questions, in the wording of the VQA sets."""
    asked = (
        (
            image,
            (
                ("What modality is used to take this image?", _spoken(image.modality)),
                ("Which part of the body does this image belong to?", tidy_answer(image.body)),
                ("What is the finding in this image?", tidy_answer(image.finding)),
            ),
        )
        for image in labelled
    )
    return [
        Conversation(
            image.image,
            image.modality,
            tuple((question, answer) for question, answer in turns if answer),
            image.source,
        )
        for image, turns in asked
    ]


def as_labelled(findings: Iterable[Finding]) -> list[LabelledImage]:
    """Scans with findings as images with one label, which joins what is present."""
    return [
        LabelledImage(
            *(item.image, item.modality, item.body, ", ".join(item.present)),
            *(item.source, item.split),
        )
        for item in findings
        if item.modality != NO_SCAN
    ]


def captions(labelled: Iterable[LabelledImage], examples: Iterable[Example]) -> list[Conversation]:
    """Image-caption pairs: what the image is and, where a label says so, what it shows."""
    pairs = [(item.image, item.modality, item.body, item.finding, item.source) for item in labelled]
    pairs += [
        (item.image, item.modality, item.body.lower(), "", item.source)
        for item in {example.image: example for example in examples}.values()
        if item.modality and item.body
    ]
    return [
        Conversation(
            image,
            modality,
            (("Describe this image.", _caption(modality, body, finding)),),
            source,
        )
        for image, modality, body, finding, source in pairs
    ]


def _caption(modality: str, body: str, finding: str) -> str:
    shown = f"{_spoken(modality)} of the {body}" if body else _spoken(modality)
    return f"{shown}: {finding}" if finding else shown


def tidy_answer(answer: str) -> str:
    """One spelling per answer: single spaces, no full stop, a capital first letter."""
    text = " ".join(answer.split()).rstrip(".")
    return text[:1].upper() + text[1:]


def _spoken(modality: str) -> str:
    return NAMES.get(modality, modality)


IMAGE_ID = -200  # where an image token stands, as in the official code
IGNORED = -100  # a label that does not count
SHARED, PADDING = 0, -1  # segments: what every turn sees, and what nobody sees


@dataclass(frozen=True)
class Packed:
    """Text of a batch: `ids`, `positions`, `segments` and next-token `labels`, all `[B, S]`."""

    ids: Tensor
    positions: Tensor
    segments: Tensor
    labels: Tensor

    def mask(self) -> Tensor:
        """Visibility `[B, 1, S, S]`: causal, within the own turn or into the shared prefix."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        causal = torch.ones(query.shape[1], key.shape[2], dtype=torch.bool, device=query.device)
        visible = ((key == query) | (key == SHARED)) & causal.tril()
        return visible[:, None]


Turn = tuple[list[int], list[int]]  # question ids, answer ids with the end token


def encode_turn(
    tokenizer: Tokenizer, question: str, answer: str, end: int, refusals: Mapping[str, int]
) -> Turn:
    """Token ids of one turn; an answer that is one of the `refusals` is their token alone."""
    refused = refusals.get(answer)
    ids = tokenizer.answer_ids(answer) if refused is None else [refused]
    return tokenizer.question_ids(question), [*ids, end]


def pack(prefix: list[int], image_tokens: int, batch: Sequence[Sequence[Turn]]) -> Packed:
    """Pack each image's turns behind the shared prefix and pad to the longest."""
    rows = [_pack_one(prefix, image_tokens, turns) for turns in batch]
    width = max(len(row) for row in rows)
    fill = (0, 0, PADDING, IGNORED)
    columns = torch.tensor([row + [fill] * (width - len(row)) for row in rows])  # [B, S, 4]
    ids, positions, segments, labels = columns.unbind(-1)
    return Packed(ids, positions, segments, labels)


def _pack_one(
    prefix: list[int], image_tokens: int, turns: Sequence[Turn]
) -> list[tuple[int, int, int, int]]:
    shared = [*prefix, *[IMAGE_ID] * image_tokens]
    row = [(token, place, SHARED, IGNORED) for place, token in enumerate(shared)]
    for segment, (question, answer) in enumerate(turns, start=1):
        tokens = question + answer[:-1]
        labels = [IGNORED] * (len(question) - 1) + answer  # each place predicts the next token
        row += [
            (token, len(shared) + place, segment, label)
            for place, (token, label) in enumerate(zip(tokens, labels, strict=True))
        ]
    return row


UNKNOWN = -1  # modality index of an image whose modality no expert serves


@dataclass(frozen=True)
class Batch:
    """What enters the tower, the packed text, and each image's modality index `[B]`.

    `pixels` are `[B, 3, S, S]`, or what the tower's front made of them, `[B, C, h, w]`. `pool` is
    the side of the squares of image tokens that are averaged.
    """

    pixels: Tensor
    text: Packed
    modality: Tensor
    pool: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        text = Packed(*(tensor.to(device) for tensor in vars(self.text).values()))
        return Batch(self.pixels.to(device), text, self.modality.to(device), self.pool)


class Batches:
    """Makes the batches of an epoch."""

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, modalities: Sequence[str], seed: int
    ) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.modalities = list(modalities)
        self.prefix = tokenizer.prefix_ids()
        ids = tokenizer.ids_of(config.refusals)
        self.refusals = {each.token: ids[each.code] for each in config.refusals}
        self.pictures = Pictures(config.vision)
        self.views: Views | None = None
        self.reword = False
        self.moved = False
        self.pools: Sequence[int] = (config.vision.pool,)  # of which a batch of training takes one

    def take_pools(self, pools: Sequence[int]) -> None:
        """From now on average squares of one of these sides in each batch of training.

        Raises `ConfigError` for a side that does not divide the tower's features, and where the
        model's own is none of them: it would not learn what its answers are read from.
        """
        for pool in pools:
            replace(self.config.vision, pool=pool)  # refused here, not at its first batch
        if (own := self.config.vision.pool) not in pools:
            raise ConfigError(
                f"The recipe's pools {list(pools)} lack {own}, with which the model answers.",
                f"Add {own} to them.",
            )
        self.pools = pools

    def keep_views(self, tower: EfficientNetLite, count: int) -> None:
        """From now on take `count` views of each image, through the frozen front of `tower`."""
        self.views = Views(tower, self.pictures, count, self.seed)

    def images(self, paths: Sequence[Path], epoch: int | None) -> Tensor:
        """What enters the tower: changed at random for an epoch of training, plain for None.

        The same seed and epoch give the same, so a resumed run repeats an unbroken one.
        """
        names = " ".join(path.name for path in paths)
        if self.views is not None:
            seen = self.views.stack(paths, PLAIN if epoch is None else epoch % self.views.count)
            if epoch is None or not self.moved:
                return seen
            return augment_features(seen, seeded(f"{self.seed} {epoch} {names} moved"))
        pixels = self.pictures.stack(paths)
        if epoch is not None:
            pixels = augment(pixels, seeded(f"{self.seed} {epoch} {names}"))
        return pixels.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU

    def plain(self, conversations: Sequence[Conversation], size: int) -> Loader:
        """Every conversation in order, unchanged: for validation."""
        return DataLoader(
            Listed(conversations), size, collate_fn=lambda chosen: self.collate(chosen, None)
        )

    def shuffled(
        self, conversations: Sequence[Conversation], size: int, max_turns: int, epoch: int
    ) -> Loader:
        """An epoch for training: shuffled, augmented, at most `max_turns` turns an image.

        The same seed and epoch give the same batches, so a resumed run repeats an unbroken one.
        """
        order = random.Random(f"{self.seed} {epoch}")
        chosen = [
            replace(conversation, turns=self._some_turns(conversation, max_turns, order))
            for conversation in order.sample(conversations, len(conversations))
        ]
        chosen = _alike_together(chosen, size, order)
        return DataLoader(Listed(chosen), size, collate_fn=lambda items: self.collate(items, epoch))

    def collate(self, items: Sequence[Conversation], epoch: int | None) -> Batch:
        """Images, packed text and modality indices of some conversations."""
        pixels = self.images([item.image for item in items], epoch)
        end = self.config.decoder.eos_token_id
        turns = [
            [
                encode_turn(self.tokenizer, question, answer, end, self.refusals)
                for question, answer in item.turns
            ]
            for item in items
        ]
        pool = self.config.vision.pool
        if epoch is not None:
            names = " ".join(item.image.name for item in items)
            pool = random.Random(f"{self.seed} {epoch} {names} pool").choice(self.pools)
        text = pack(self.prefix, replace(self.config.vision, pool=pool).image_tokens, turns)
        modality = torch.tensor([self.modality_index(item.modality) for item in items])
        return Batch(pixels, text, modality, pool)

    def modality_index(self, name: str | None) -> int:
        """The expert of a modality; `UNKNOWN` where none is for it."""
        return self.modalities.index(name) if name in self.modalities else UNKNOWN

    def _some_turns(
        self, conversation: Conversation, limit: int, order: random.Random
    ) -> tuple[tuple[str, str], ...]:
        turns = order.sample(conversation.turns, min(limit, len(conversation.turns)))
        if self.reword and not conversation.made:
            turns = [
                (reworded(question, order) if order.random() < REWORDED else question, answer)
                for question, answer in turns
            ]
        slips = SLIPS if self.reword else 0.0
        return tuple((vary_question(question, order, slips), answer) for question, answer in turns)


def _alike_together(
    shuffled: Sequence[Conversation], size: int, order: random.Random
) -> list[Conversation]:
    """Of every few batches those with as many turns in one: less padding is computed."""
    window = size * BATCHES_SORTED
    found: list[Conversation] = []
    for start in range(0, len(shuffled), window):
        part = sorted(shuffled[start : start + window], key=lambda each: len(each.turns))
        batches = [part[at : at + size] for at in range(0, len(part), size)]
        order.shuffle(batches)
        # a batch that is not full would shift all that follow it
        batches.sort(key=lambda batch: len(batch) < size)
        found += itertools.chain.from_iterable(batches)
    return found
