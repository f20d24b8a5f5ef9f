"""`medmoe-edge train --model modality-moe`: images and captions in, a checkpoint out."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress

from medmoe_edge.atomic import atomic_file
from medmoe_edge.checkpoint.contrastive import write_modality_checkpoint
from medmoe_edge.config_scores import SCORES
from medmoe_edge.contrastive.boxes import Place, read_places
from medmoe_edge.contrastive.fitting import fit_scores
from medmoe_edge.contrastive.loading import open_checkpoint
from medmoe_edge.contrastive.tasks import Task, best_prompts, zero_shot_tasks
from medmoe_edge.contrastive.text import ModalityTokenizer
from medmoe_edge.data.captions import Captioned, fact_captions, label_captions
from medmoe_edge.data.datasets import LabelledImage, read_examples, read_labels
from medmoe_edge.errors import DataError
from medmoe_edge.models.bert import TextFeatures
from medmoe_edge.models.contrastive import ImageFeatures
from medmoe_edge.models.contrastive_similarity import similarity
from medmoe_edge.presets_random import random_modality_model
from medmoe_edge.training.contrastive_batches import ModalityBatches
from medmoe_edge.training.contrastive_objective import ModalityObjective
from medmoe_edge.training.contrastive_recipe import ModalityRecipe
from medmoe_edge.training.contrastive_vocabulary import train_word_pieces
from medmoe_edge.training.loop import Loader, Session, fit

AT_ONCE = 32  # images to validate on


@dataclass(frozen=True)
class ModalityCorpus:
    """What is learned, what is held out of it, and the labelled images to validate on.

    `places` are the boxes on images that are learned.
    """

    captioned: list[Captioned]
    places: list[Place]
    held_out: list[LabelledImage]
    validation: list[LabelledImage]


def train_modality(recipe: ModalityRecipe, data: Path, out: Path, progress: Progress) -> Path:
    """Run a recipe; returns the checkpoint folder `out/checkpoint`.

    The state is saved in `out` after every epoch, so a second call goes on where the first was
    interrupted. Runs under `accelerate launch` unchanged.
    """
    config = recipe.model_config()
    corpus = read_modality_corpus(recipe, data)
    session = Session.begin(out, recipe.seed, progress)
    texts = [item.caption for item in corpus.captioned]
    tokenizer_file = session.once(
        "tokenizer.json", lambda file: train_word_pieces(texts, config.text.vocab_size, file)
    )
    batches = ModalityBatches(
        config,
        ModalityTokenizer.from_file(tokenizer_file, config.text),
        corpus.places,
        recipe.seed,
    )
    objective = ModalityObjective(random_modality_model(config, recipe.seed))
    schedule = recipe.schedule

    def epoch_batches(epoch: int) -> Loader:
        return batches.shuffled(corpus.captioned, schedule.batch_images, epoch)

    def validate(trained: ModalityObjective) -> dict[str, float]:
        return validation_scores(trained, corpus.validation, batches)

    fit("alignment", objective, schedule, epoch_batches, validate, session)
    folder = out / "checkpoint"
    if session.accelerator.is_main_process:
        write_modality_checkpoint(
            folder, objective.model, tokenizer_file=tokenizer_file, force=True
        )
        scores = fit_scores(open_checkpoint(folder).runtime, corpus.held_out)
        with atomic_file(folder / SCORES) as file:
            file.write(json.dumps(scores.to_json(), indent=2).encode() + b"\n")
    return folder


def read_modality_corpus(recipe: ModalityRecipe, data: Path) -> ModalityCorpus:
    """The images that a recipe names, from the data folder.

    Raises `DataError` also where what is held out has nothing to fit scores on.
    """
    labelled = read_labels(data / recipe.labels)
    learned, held_out = hold_out([i for i in labelled if i.split == "train"], recipe.hold_out)
    if not zero_shot_tasks(held_out):
        raise DataError(
            f"Of every {recipe.hold_out} labelled images of a finding one is held out, and these "
            "do not have two findings of one kind of image.",
            "Label more images, or set hold_out lower.",
        )
    facts = fact_captions(read_examples(data / recipe.questions))
    captioned = [*label_captions(learned), *facts]
    images = [item.image for item in captioned]
    return ModalityCorpus(
        captioned,
        read_places(data / recipe.boxes, images) if recipe.boxes else [],
        held_out,
        [item for item in labelled if item.split != "train"],
    )


def hold_out(
    labelled: Sequence[LabelledImage], every: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """All but each `every`th image of each modality, body and finding, and those."""
    groups: dict[tuple[str, ...], list[LabelledImage]] = defaultdict(list)
    for item in labelled:
        groups[item.modality, item.body, item.finding].append(item)
    learned = [i for group in groups.values() for at, i in enumerate(group, 1) if at % every]
    return learned, [i for group in groups.values() for i in group[every - 1 :: every]]


@torch.no_grad()
def validation_scores(
    objective: ModalityObjective,
    labelled: Sequence[LabelledImage],
    batches: ModalityBatches,
) -> dict[str, float]:
    """How many modalities are recognised and, for each task, findings told apart; 0 to 1."""
    tasks = zero_shot_tasks(labelled)
    scores, right = {}, []
    for task in tasks:
        images, similarities = _compare(objective, task, batches)
        guessed = best_prompts(similarities, task).argmax(1)
        scores[task.name] = round(float((guessed == task.answers).mean()), 4)
        known = [batches.modalities.index(item.modality) for item in task.images]
        right += (images.argmax(1) == known).tolist()
    return {"modality": round(float(np.mean(right)), 4)} | scores if right else {}


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
