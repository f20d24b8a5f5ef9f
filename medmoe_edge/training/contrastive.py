"""`medmoe-edge train modality-nano`: images and captions in, a checkpoint of a MedMoE out.

A run is one phase; it minimises the losses of `models/contrastive.py`.

Its BERT starts from nothing, with a small WordPiece vocabulary trained on the captions.
"""

import hashlib
import json
import os
import random
import string
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from rich.progress import Progress
from tokenizers import models, trainers
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader

from medmoe_edge.atomic import atomic_file, check_apart, check_target
from medmoe_edge.checkpoint.contrastive import write_modality_checkpoint
from medmoe_edge.config import Config
from medmoe_edge.config_contrastive import SCORES, ModalityConfig
from medmoe_edge.contrastive.engine import open_checkpoint
from medmoe_edge.contrastive.evaluate import Task, best_prompts, fit_scores, zero_shot_tasks
from medmoe_edge.contrastive.text import MARKS, UNKNOWN, ModalityTokenizer, splitting, word_pieces
from medmoe_edge.data.captions import (
    Captioned,
    GroundedPhrase,
    fact_captions,
    label_captions,
    read_grounded,
)
from medmoe_edge.data.datasets import (
    BOXES_FILES,
    LABELS_FILE,
    LabelledImage,
    owner_of,
    questions_of,
    read_examples,
    read_labels,
)
from medmoe_edge.errors import ConfigError, DataError, InputError
from medmoe_edge.image.loading import load_image, seen_square
from medmoe_edge.models.contrastive import (
    GROUNDING_WEIGHT,
    UNLABELLED,
    ImageFeatures,
    ModalityMoE,
    TextFeatures,
    grounding_loss,
    losses,
    similarity,
)
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.training.data import (
    Listed,
    Pictures,
    augment,
    check_pictures,
)
from medmoe_edge.training.initialise import random_modality_model
from medmoe_edge.training.loop import Loader, Session, fit
from medmoe_edge.training.recipe import (
    PrecisionChoice,
    Schedule,
    about,
    recipe_json,
    recipe_of,
)
from medmoe_edge.training.report import PRECISION, Planned, TrainOptions, begin_run

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
    """An image, the phrases that are said of it, the text that says them, and one with boxes."""

    image: Captioned
    said: tuple[str, ...]
    text: str
    boxed: GroundedPhrase | None = None


class ModalityBatches:
    """Makes the batches of an epoch."""

    def __init__(
        self,
        config: ModalityConfig,
        tokenizer: ModalityTokenizer,
        grounded: Iterable[GroundedPhrase],
        seed: int,
    ) -> None:
        self.vision, self.tokenizer, self.seed = config.vision, tokenizer, seed
        self.modalities = list(config.modalities)
        self.pictures = Pictures(config.vision)
        self._grounded = defaultdict(list)
        for boxed in grounded:
            self._grounded[boxed.image].append(boxed)
        self._masks: dict[GroundedPhrase, Tensor] = {}

    def shuffled(self, captioned: Sequence[Captioned], size: int, epoch: int) -> Loader:
        """An epoch: shuffled, augmented, other phrases each time, the last partial batch left out.

        The same seed and epoch give the same batches, so a resumed run repeats an unbroken one.
        """
        order = random.Random(f"{self.seed} {epoch}")
        told = []
        for item in order.sample(captioned, len(captioned)):
            grounded = self._grounded.get(item.image)
            boxed = order.choice(grounded) if grounded else None
            told.append(Told(item, *some_phrases(item.phrases, order), boxed))
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
        masks = torch.stack([self._mask(item.boxed) for item in told])[:, None].float()
        moved = augment(torch.cat((pixels, masks), 1), noise)
        return ModalityBatch(
            moved[:, :3],
            self._read([item.text for item in told]),
            _fits(told),
            torch.tensor([self.modality_index(item.image.modality) for item in told]),
            self._grounding(told, moved[:, 3:]),
        )

    def _grounding(self, told: Sequence[Told], masks: Tensor) -> Grounding | None:
        shares = avg_pool2d(masks, self.vision.patch_size)[:, 0]  # [B, h, w], 0 to 1
        covered = shares.sum((1, 2))
        phrases = {
            row: item.boxed.phrase
            for row, item in enumerate(told)
            if item.boxed and covered[row] > IN_SIGHT
        }
        if not phrases:
            return None
        rows = torch.tensor(list(phrases))
        boxes = shares[rows] / covered[rows, None, None]
        return Grounding(rows, self._read(list(phrases.values())), boxes)

    def _mask(self, boxed: GroundedPhrase | None) -> Tensor:
        side = self.vision.image_size
        if boxed is None:
            return torch.zeros(side, side, dtype=torch.bool)
        if boxed not in self._masks:
            left, top, square = seen_square(load_image(boxed.image), self.vision)
            mask = boxed.within(left, top, side / square).mask(side, side)
            self._masks[boxed] = torch.from_numpy(mask)
        return self._masks[boxed]

    def _read(self, texts: Sequence[str]) -> Texts:
        return Texts(*(torch.from_numpy(part) for part in self.tokenizer.encode(texts)))

    def modality_index(self, name: str | None) -> int:
        """The class of a modality; `UNLABELLED` for none of the model's."""
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


@dataclass(frozen=True)
class ModalityRecipe(Config):
    """Which model, which data (relative to the data folder), how long.

    `shared_expert` trains the model without experts. Each `hold_out`th patient of a finding (of few
    patients, image) is kept from training: scores are fitted on these. With `boxes` around what
    phrases name, maps are taught where it is; those on other images are not looked at.
    """

    preset: str = about("the model's shape, by the name of a preset")
    seed: int = about("of the first weights and of all draws")
    schedule: Schedule = about("the one phase")
    precision: PrecisionChoice = about(
        "of the products: auto takes what this processor does fastest", "auto"
    )
    questions: str | None = about("that give captions; left out, train.jsonl", None)
    labels: str | None = about("of images; left out, labels.jsonl", None)
    boxes: str | None = about("around what phrases name; left out, boxes.json", None)
    shared_expert: bool = about("train the model without experts", False)
    hold_out: int = about(
        "each so many-th patient of a finding (of few patients, image) is kept to fit scores on", 20
    )

    def __post_init__(self) -> None:
        if self.hold_out < 2:
            raise ConfigError(
                f"The recipe's hold_out is {self.hold_out}.",
                "Use 2 or more: each so many-th patient or image is not learned from.",
            )

    def model_config(self) -> ModalityConfig:
        """What is trained; raises `DataError` for a preset that is no MedMoE."""
        if self.preset not in MODALITY_PRESETS:
            raise DataError(
                f"The recipe's preset {self.preset!r} is no MedMoE.",
                f"Use one of: {', '.join(MODALITY_PRESETS)}.",
            )
        return replace(MODALITY_PRESETS[self.preset], shared_expert=self.shared_expert)


def read_modality_recipe(name_or_path: str) -> ModalityRecipe:
    """A MedMoE recipe that ships with the package, by name, or a TOML or JSON file."""
    return recipe_of(ModalityRecipe, name_or_path)


def is_modality_recipe(name_or_path: str) -> bool:
    """Whether a recipe's preset is a MedMoE; raises `DataError` where it cannot be read."""
    return recipe_json(name_or_path).get("preset") in MODALITY_PRESETS


POOLED = 2  # regions a side that the local loss sees as one: a quarter of the work, as good


class ModalityObjective(nn.Module):
    """Wraps the model so that one forward gives the loss (which is what DDP needs)."""

    def __init__(self, model: ModalityMoE) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ModalityBatch) -> Tensor:
        """The loss of a batch, a scalar."""
        images = self.model.encode_image(batch.pixels)
        texts = self.model.encode_text(*batch.texts)
        loss = losses(coarser(images), texts, batch.fits, batch.modality).total
        if found := batch.grounding:
            phrases = self.model.encode_text(*found.texts)
            grounding = grounding_loss(images.regions[found.rows], phrases, found.boxes)
            loss = loss + GROUNDING_WEIGHT * grounding
        return loss


def coarser(images: ImageFeatures) -> ImageFeatures:
    """The mean of each square of neighbouring regions; a grid too small for it stays."""
    regions = images.regions
    if regions.shape[1] < 2 * POOLED:
        return images
    return images._replace(
        regions=avg_pool2d(regions.permute(0, 3, 1, 2), POOLED).permute(0, 2, 3, 1)
    )


AT_ONCE = 32  # images to validate on


@dataclass(frozen=True)
class ModalityCorpus:
    """What is learned, what is held out of it, and the labelled images to validate on.

    `grounded` are phrases with boxes on images that are learned.
    """

    captioned: list[Captioned]
    grounded: list[GroundedPhrase]
    held_out: list[LabelledImage]
    validation: list[LabelledImage]


def train_modality(
    recipe: ModalityRecipe,
    data: Path,
    out: Path,
    progress: Progress,
    options: TrainOptions | None = None,
) -> Path:
    """Run a recipe on a dataset folder; returns the checkpoint folder `out/checkpoint`.

    The state is saved in `out` after every epoch, so a second call goes on where the first was
    interrupted. Runs under `accelerate launch` unchanged. Raises `InputError` where
    `out/checkpoint` is something else and for options that it does not have, `DataError` for data
    that cannot be used, or others than the run was begun with.
    """
    options = options or TrainOptions()
    if options.base or options.lora_rank or options.vision_tower:
        raise InputError(
            "A modality-moe model starts from nothing, with a tower of its own and no adapters.",
            "Leave --from, --lora and --vision-tower out.",
        )
    folder = out / "checkpoint"
    check_target(folder, force=True, marker="config.json")  # refused here, not after training
    check_apart(folder, around=(data,))
    config = recipe.model_config()
    corpus = read_modality_corpus(recipe, data)
    with PartialState().main_process_first():
        told = {"recipe": recipe.to_json(), "data": _digest(corpus)}
        begin_run(out, told, ("alignment",), ("tokenizer.json", PRECISION))
    precision = options.precision or recipe.precision
    session = Session.begin(
        out, recipe.seed, progress, precision, options.say, tensorboard=options.tensorboard
    )
    session.report.plan([Planned("alignment", recipe.schedule.epochs, len(corpus.captioned))])
    texts = [item.caption for item in corpus.captioned]
    tokenizer_file = session.once(
        "tokenizer.json", lambda file: train_word_pieces(texts, config.text.vocab_size, file)
    )
    batches = ModalityBatches(
        config,
        ModalityTokenizer.from_file(tokenizer_file, config.text),
        corpus.grounded,
        recipe.seed,
    )
    objective = ModalityObjective(random_modality_model(config, recipe.seed))
    schedule = recipe.schedule

    def epoch_batches(epoch: int) -> Loader:
        return batches.shuffled(corpus.captioned, schedule.batch_images, epoch)

    def validate(trained: ModalityObjective) -> dict[str, float]:
        return validation_scores(trained, corpus.validation, batches)

    fit("alignment", objective, schedule, epoch_batches, validate, session)
    if session.accelerator.is_main_process:
        write_modality_checkpoint(
            folder, objective.model, tokenizer_file=tokenizer_file, force=True
        )
        scores = fit_scores(open_checkpoint(folder).runtime, corpus.held_out)
        with atomic_file(folder / SCORES) as file:
            file.write(json.dumps(scores.to_json(), indent=2).encode() + b"\n")
    session.report.close()
    return folder


def read_modality_corpus(recipe: ModalityRecipe, data: Path) -> ModalityCorpus:
    """The images that a recipe names, from the data folder.

    No picture or patient is learned and held out, but where `hold_out` goes by images.
    Raises `DataError` also where what is held out has nothing to fit scores on.
    """
    labelled = read_labels(data / (recipe.labels or LABELS_FILE), check_images=True)
    learned, held_out = hold_out([i for i in labelled if i.split == "train"], recipe.hold_out)
    if not zero_shot_tasks(held_out):
        raise DataError(
            f"Of every {recipe.hold_out} labelled images of a finding one is held out, and these "
            "do not have two findings of one kind of image.",
            "Label more images, or set hold_out lower.",
        )
    questions = data / recipe.questions if recipe.questions else questions_of(data, "train")
    examples = read_examples(questions, check_images=True) if questions else []
    validation = [item for item in labelled if item.split != "train"]
    known = check_pictures([*learned, *held_out, *examples], validation)
    apart: set[Hashable] = {known[item.image] for item in (*held_out, *validation)}
    apart |= set(map(owner_of, held_out)) - set(map(owner_of, learned))
    apart |= set(map(owner_of, validation))
    facts = fact_captions(
        each for each in examples if not apart & {known[each.image], owner_of(each)}
    )
    captioned = [*label_captions(learned), *facts]
    images = [item.image for item in captioned]
    drawn = [data / recipe.boxes] if recipe.boxes else [data / name for name in BOXES_FILES]
    boxes = next((file for file in drawn if recipe.boxes or file.is_file()), None)
    return ModalityCorpus(
        captioned,
        read_grounded(boxes, images) if boxes else [],
        held_out,
        validation,
    )


def _digest(corpus: ModalityCorpus) -> str:
    """A hash of what is learned from and fitted to: the names of images, and what is known."""
    told: list[Captioned | GroundedPhrase | LabelledImage]
    told = [*corpus.captioned, *corpus.grounded, *corpus.held_out]
    digest = hashlib.sha256()
    for item in told:
        digest.update(f"{vars(item) | {'image': item.image.name}}\n".encode())
    return digest.hexdigest()


def hold_out(
    labelled: Sequence[LabelledImage], every: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """All but each `every`th patient of each modality, body and finding, and those.

    A patient's images are held out together; one that names no patient counts as one. Of a finding
    with fewer patients but enough images it is each `every`th image. None is held out whole: where
    the patients of other findings would take all of it, it is by images too, however few.
    """
    groups: dict[tuple[str, ...], list[LabelledImage]] = defaultdict(list)
    for item in labelled:
        groups[item.modality, item.body, item.finding].append(item)
    owners = {name: list(dict.fromkeys(map(owner_of, group))) for name, group in groups.items()}
    held = {owner for own in owners.values() for owner in own[every - 1 :: every]}
    apart: tuple[list[LabelledImage], list[LabelledImage]] = ([], [])
    for name, group in groups.items():
        by_image = len(owners[name]) < every <= len(group) or held.issuperset(owners[name])
        for number, item in enumerate(group, start=1):
            apart[number % every == 0 if by_image else owner_of(item) in held].append(item)
    return apart


@torch.no_grad()
def validation_scores(
    objective: ModalityObjective,
    labelled: Sequence[LabelledImage],
    batches: ModalityBatches,
) -> dict[str, float]:
    """How many modalities are recognised and, for each task, findings told apart; 0 to 1.

    Images of a modality that the model does not have count for the findings alone.
    """
    tasks = zero_shot_tasks(labelled)
    scores, right = {}, []
    for task in tasks:
        images, similarities = _compare(objective, task, batches)
        guessed = best_prompts(similarities, task).argmax(1)
        scores[task.name] = round(float((guessed == task.answers).mean()), 4)
        labels = np.array([batches.modality_index(item.modality) for item in task.images])
        right += (images.argmax(1) == labels)[labels != UNLABELLED].tolist()
    return ({"modality": round(float(np.mean(right)), 4)} if right else {}) | scores


def _compare(
    objective: ModalityObjective, task: Task, batches: ModalityBatches
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    model = objective.model
    device = next(model.parameters()).device
    pieces = batches.tokenizer.encode(task.texts)
    texts: TextFeatures = model.encode_text(*(torch.from_numpy(part).to(device) for part in pieces))
    logits, similarities = [], []
    for start in range(0, len(task.images), AT_ONCE):
        chosen = task.images[start : start + AT_ONCE]
        pixels = batches.pictures.stack(item.image for item in chosen)
        images: ImageFeatures = model.encode_image(pixels.to(device))
        logits.append(images.router_logits.cpu())
        similarities.append(similarity(images, texts).cpu())
    return torch.cat(logits).numpy(), torch.cat(similarities).numpy()
