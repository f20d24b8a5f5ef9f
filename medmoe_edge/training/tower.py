"""Before the three phases: the vision tower learns to see what the data says of its images.

An ImageNet tower tells dogs from cats, not a film with effusion from one without; a decoder that
learns beside it finds the words first and does not look. So the tower is first taught by itself,
with one linear output for each thing that is known of many images: findings, modality, part of the
body, and the answers to questions that are asked of many images. The outputs are then dropped, but
for their directions, with which the projector begins.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from medmoe_edge.data.datasets import Example
from medmoe_edge.evaluation.findings import area_under_curve
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.training.data import Batches, Listed, tidy_answer
from medmoe_edge.training.loop import Loader, Session, fit
from medmoe_edge.training.questions import Facts
from medmoe_edge.training.recipe import PhaseConfig

FINDING = "finding "  # begins the names of findings among the things to be seen
FEWEST = 8  # images that show a thing, or it is not taught
FEWEST_ASKED = 12  # images of which a question is asked, or its answers are not taught
IMPLIED_WEIGHT = 0.4  # of "not labelled" beside "stated absent"
MOST_WEIGHT = 2.5  # of a rare thing where it is present


@dataclass(frozen=True)
class Seen:
    """What is known of an image: `known[thing]` is 1 where it is there, else 0, and its weight.

    One that is `labelled` alone is drawn less often, by the phase's `labelled_share`.
    """

    image: Path
    known: dict[str, tuple[float, float]]
    labelled: bool = False


def what_is_seen(facts: Sequence[Facts], examples: Sequence[Example]) -> list[Seen]:
    """Findings, modality, part of the body and answers to frequent questions, for each image."""
    modalities = sorted({each.modality for each in facts if each.modality})
    bodies = sorted({each.body for each in facts if each.body})
    answers = _frequent_answers(examples)
    found: dict[Path, Seen] = {}
    for each in facts:
        known = dict(answers.get(each.image, {}))
        if each.modality:
            known |= {
                f"modality {name}": (float(name == each.modality), 1.0) for name in modalities
            }
        if each.body:
            known |= {f"body {name}": (float(name == each.body), 1.0) for name in bodies}
        known |= {f"{FINDING}{name}": (0.0, IMPLIED_WEIGHT) for name in each.implied}
        known |= {f"{FINDING}{name}": (0.0, 1.0) for name in each.absent}
        known |= {f"{FINDING}{name}": (1.0, 1.0) for name in each.present}
        if (earlier := found.get(each.image)) is not None:  # an image may be in several files
            known = earlier.known | known
        alone = each.labelled and (earlier is None or earlier.labelled)
        found[each.image] = Seen(each.image, known, alone)
    return list(found.values())


def _frequent_answers(
    examples: Sequence[Example],
) -> dict[Path, dict[str, tuple[float, float]]]:
    """By image, the answers to questions that are asked of many images."""
    answers: dict[str, dict[Path, str]] = defaultdict(dict)
    for example in examples:
        asked = example.question.strip().rstrip("?. ").lower()
        answers[asked][example.image] = tidy_answer(example.answer).lower()
    known: dict[Path, dict[str, tuple[float, float]]] = defaultdict(dict)
    for question, by_image in answers.items():
        counts = Counter(by_image.values())
        options = [answer for answer, count in counts.items() if count >= FEWEST // 2]
        if len(by_image) < FEWEST_ASKED or len(counts) < 2:
            continue
        for image, answer in by_image.items():
            for option in options:
                known[image][f"{question} {option}"] = (float(answer == option), 1.0)
    return known


@dataclass(frozen=True)
class SeenBatch:
    """`pixels` as of `Batch`; whether each thing is there, `[B, T]`, and the weight of that."""

    pixels: Tensor
    target: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> "SeenBatch":
        """The same batch on `device`."""
        return SeenBatch(self.pixels.to(device), self.target.to(device), self.weight.to(device))


class Sight(nn.Module):
    """The tower with its outputs; one forward gives the loss of a batch.

    An output is the sum of two linear ones: of the mean of the image tokens, for what is
    everywhere, and a soft maximum over them, for what is in one place.
    """

    rarity: Tensor

    def __init__(self, model: MedMoE, things: Sequence[str], rarity: Tensor) -> None:
        super().__init__()
        self.model = model
        size = model.config.vision.feature_size
        self.everywhere = nn.Linear(size, len(things))
        self.somewhere = nn.Linear(size, len(things))
        self.drop = nn.Dropout()
        self.register_buffer("rarity", rarity, persistent=False)
        for layer in (self.everywhere, self.somewhere):
            nn.init.normal_(layer.weight, std=0.01)

    def logits(self, pixels: Tensor) -> Tensor:
        """`[B, T]`."""
        tokens = self.drop(self.model.vision(pixels))  # [B, N, C]
        highest = torch.logsumexp(self.somewhere(tokens), 1) - math.log(tokens.shape[1])
        return self.everywhere(tokens.mean(1)) + highest  # type: ignore[no-any-return]

    def forward(self, batch: SeenBatch) -> Tensor:
        """The mean loss of what is known, a scalar."""
        loss = binary_cross_entropy_with_logits(
            self.logits(batch.pixels),
            batch.target,
            batch.weight,
            pos_weight=self.rarity,
            reduction="sum",
        )
        return loss / batch.weight.sum().clamp_min(1)


def teach_tower(
    model: MedMoE,
    learned: Sequence[Seen],
    held_out: Sequence[Seen],
    phase: PhaseConfig,
    batches: Batches,
    session: Session,
    *,
    new_projector: bool,
) -> None:
    """Teach the tower in place; goes on where an interrupted run left off.

    Args:
        model: Whose tower learns, as far as `phase.train` says.
        learned: What is known of the images to learn from.
        held_out: Of others, by which progress is told.
        phase: How long and how fast; 0 epochs leave the tower as it is.
        batches: Makes the images.
        session: The run.
        new_projector: Whether the projector knows nothing yet, and may begin with what the tower
            has learned.
    """
    if not phase.epochs:
        return
    counts = Counter(name for each in learned for name, (there, _) in each.known.items() if there)
    asked = Counter(name for each in learned for name in each.known)
    things = sorted(
        name for name, count in counts.items() if count >= FEWEST and count < asked[name]
    )
    rare = [((asked[name] - counts[name]) / counts[name]) ** 0.5 for name in things]
    torch.manual_seed(session.seed)
    sight = Sight(model, things, torch.tensor(rare).clamp(0.5, MOST_WEIGHT))

    def loader(chosen: Sequence[Seen], epoch: int | None) -> Loader:
        def collate(items: Sequence[Seen]) -> SeenBatch:
            return _collate(items, things, batches, epoch)

        return DataLoader(Listed(chosen), phase.batch_images, collate_fn=collate)

    def epoch_batches(epoch: int) -> Loader:
        order = random.Random(f"{session.seed} {epoch} tower")
        labelled = [each for each in learned if each.labelled]
        chosen = [each for each in learned if not each.labelled]
        chosen += order.sample(labelled, int(len(labelled) * phase.labelled_share))
        order.shuffle(chosen)
        return loader(chosen, epoch)

    def validate(trained: Sight) -> dict[str, float]:
        return _areas(trained, things, loader(held_out, None), session) if held_out else {}

    fit("tower", sight, phase, epoch_batches, validate, session)
    if new_projector:
        _hand_over(sight, things, counts)


@torch.no_grad()
def _hand_over(sight: Sight, things: Sequence[str], counts: Mapping[str, int]) -> None:
    """Let half of the projector's first layer begin as the outputs: the decoder need not find them.

    Findings come first, then what is known of most images.
    """
    first = sight.model.projector[0]
    assert isinstance(first, nn.Linear)
    order = sorted(
        range(len(things)), key=lambda at: (not things[at].startswith(FINDING), -counts[things[at]])
    )
    for row, at in enumerate(order[: first.out_features // 2]):
        direction = sight.everywhere.weight[at] + sight.somewhere.weight[at]
        first.weight[row] = direction / direction.norm()
        first.bias[row] = 0.0


def _collate(
    items: Sequence[Seen], things: Sequence[str], batches: Batches, epoch: int | None
) -> SeenBatch:
    known = [[item.known.get(name, (0.0, 0.0)) for name in things] for item in items]
    target, weight = torch.tensor(known).unbind(-1)
    return SeenBatch(batches.images([item.image for item in items], epoch), target, weight)


@torch.no_grad()
def _areas(
    trained: Sight, things: Sequence[str], held_out: Loader, session: Session
) -> dict[str, float]:
    """The area under the ROC curve of each finding that ten images or more show, and their mean."""
    logits, targets, weights = [], [], []
    for batch in held_out:
        moved = batch.to(session.accelerator.device)
        with session.accelerator.autocast():
            logits.append(trained.logits(moved.pixels).float().cpu().numpy())
        targets.append(batch.target.numpy())
        weights.append(batch.weight.numpy())
    score, target, weight = (np.concatenate(each) for each in (logits, targets, weights))
    areas = {}
    for index, name in enumerate(things):
        sure = weight[:, index] == 1
        there = target[sure, index] > 0
        if name.startswith(FINDING) and there.sum() >= 10 and (~there).sum() >= 10:
            areas[name.removeprefix(FINDING)] = round(
                area_under_curve(score[sure, index], there), 4
            )
    return {"mean": round(float(np.mean(list(areas.values()))), 4), **areas} if areas else {}
