"""Where yes ends and no begins: the output's rows for both, fitted to films never learned from.

A model knows the images that it learned from by heart, those of a rare finding most of all. Of any
other image it then finds that it is none of these, and says no, though it puts the images in the
right order. So after the phases the head's two rows are fitted once more, by a logistic regression
on the last hidden states, with images that were kept for it. Source of the idea, refitting the last
layer alone on data kept for it: Kirichenko et al., https://arxiv.org/abs/2204.02937.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from medmoe_edge.data.datasets import NO_SCAN, Finding
from medmoe_edge.errors import DataError
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.training.data import IGNORED, Batches, Conversation, Item
from medmoe_edge.training.loop import Session
from medmoe_edge.training.phases import answered
from medmoe_edge.training.questions import Asking, Facts, phrase_book
from medmoe_edge.training.recipe import BorderConfig

WORDINGS = 4  # of the question about each finding of an image, and as many of its negation
KEEP = 0.1  # what a change of another question's margin costs, by its square
STEPS = 100
MOST = 2000  # images of each kind that are read: a hundred questions each, 2 GB of states of 2,048
TURNS = 32  # of an image that are read at once: an image can have a hundred
YES, NO = "Yes", "No"


@dataclass(frozen=True)
class _Read:
    """What the head reads where `N` questions are to be answered yes or no.

    `states` are the normed hidden states `[N, D]`, `margin` `[N]` is the head's logit of yes less
    that of no there, and `yes` `[N]` what is right.
    """

    states: Tensor
    margin: Tensor
    yes: Tensor

    def balanced(self, weights: Tensor, change: Tensor) -> float:
        """The share answered rightly, 0 to 1, after a change `[D]` of the margin's direction."""
        right = ((self.margin + self.states @ change) > 0) == (self.yes > 0)
        return float((weights * right).mean())


def set_aside(
    findings: Sequence[Finding], share: float, learned: Collection[Path | str | None] = ()
) -> tuple[list[Finding], list[Finding]]:
    """Of what is to train on, the findings of a `share` of the patients; and all others.

    A patient's name decides, so that more data never moves one to the other side. Patients are
    never kept of whom something else is `learned`: images, by file, or patients, by name.
    """
    kept: list[Finding] = []
    others: list[Finding] = []
    told = {*learned} - {None}
    known = {_patient(item) for item in findings if told & {item.image, item.patient}}
    for item in findings:
        name = hashlib.sha256(f"border {_patient(item)}".encode()).digest()
        chosen = item.split == "train" and item.modality != NO_SCAN
        chosen = chosen and int.from_bytes(name[:4], "big") < share * 2**32
        chosen = chosen and _patient(item) not in known
        (kept if chosen else others).append(item)
    return kept, others


def _patient(item: Finding) -> str:
    return item.patient or item.image.name


def border_findings(kept: Iterable[Facts]) -> frozenset[str]:
    """Findings, of those that there are wordings for, that some kept images show and some do not.

    From those that all of them show the border would only move to yes. Raises `DataError` for none.
    """
    facts = list(kept)
    shown = frozenset[str]().union(*(each.present for each in facts))
    missing = frozenset[str]().union(*(each.absent for each in facts))
    found = shown & missing & frozenset[str](phrase_book()["findings"])
    if not found:
        raise DataError(
            "The recipe fits a border between yes and no, and of the images kept for it "
            f"({len(facts)}) none shows a finding that another is known not to show.",
            "Give a file of findings with negatives, keep a larger share of its patients, or leave "
            "border out of the recipe.",
        )
    return found


def border_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """The first tokens of yes and of no; raises `DataError` where one cannot tell the answer."""
    yes, no = (tokenizer.answer_ids(word)[:1] for word in (YES, NO))
    if not yes or not no or yes == no:
        raise DataError(
            f"The tokenizer begins {YES} and {NO} with the same token, so that no border between "
            "them can be fitted.",
            "Teach both: set phrases to true, or leave border out of the recipe.",
        )
    return yes[0], no[0]


def fit_border(
    model: MedMoE,
    asking: Asking,
    others: Sequence[Conversation],
    config: BorderConfig,
    batches: Batches,
    session: Session,
) -> None:
    """Change the head's rows of yes and no, in place, by as much as the kept images ask for.

    Args:
        model: After its phases.
        asking: Makes questions about the findings of the images that were kept, which
            `border_findings` has seen.
        others: Whose questions that are answered yes or no are to be answered as before.
        config: How much the rows may change.
        batches: Makes the input.
        session: Tells what is done.
    """
    order = random.Random(f"{session.seed} border")
    asked, groups = _about_findings(asking, order)
    images = len({each.image for each in asked})
    session.say(f"Fitting the border between yes and no to {images} kept images.")
    model.eval()
    yes, no = border_tokens(batches.tokenizer)
    found = _read(model, asked, batches, (yes, no))
    kept = _read(model, _drawn(_yes_or_no(others), order), batches, (yes, no))
    weights = _weights(groups, found.yes)
    change = _fitted(found, weights, kept, config.penalty)
    with torch.no_grad():
        head = model.decoder.head.weight
        head[yes] += (change / 2).to(head)
        head[no] -= (change / 2).to(head)
    before, after = (found.balanced(weights, each) for each in (0 * change, change))
    session.say(
        f"Border between yes and no: {before:.1%} of {len(groups)} questions about {images} "
        f"kept images were answered rightly, now {after:.1%}."
    )
    if len(kept.margin):
        turned = (kept.margin > 0) != (kept.margin + kept.states @ change > 0)
        session.say(
            f"Of {len(turned)} other questions {turned.float().mean():.1%} are answered otherwise."
        )


def _about_findings(asking: Asking, order: random.Random) -> tuple[list[Conversation], list[str]]:
    """Conversations, and of each of their turns what it asks."""
    conversations, groups = [], []
    names = border_findings(asking.known)
    telling = [each for each in asking.known if names & (each.present | each.absent)]
    for facts in _drawn(telling, order):
        turns = asking.about_findings(facts, names, WORDINGS, order)
        own = tuple(turn for _, turn in turns)
        conversations.append(Conversation(facts.image, facts.modality, own, facts.source))
        groups += [group for group, _ in turns]
    return conversations, groups


def _drawn(items: list[Item], order: random.Random) -> list[Item]:
    """All of them, or as many as are read."""
    return items if len(items) <= MOST else order.sample(items, MOST)


def _yes_or_no(conversations: Sequence[Conversation]) -> list[Conversation]:
    chosen = [
        replace(each, turns=tuple(turn for turn in each.turns if turn[1] in (YES, NO)))
        for each in conversations
    ]
    return [each for each in chosen if each.turns]


@torch.no_grad()
def _read(
    model: MedMoE, conversations: Sequence[Conversation], batches: Batches, tokens: tuple[int, int]
) -> _Read:
    """Every conversation's turns, which must be answered yes or no, in order."""
    head = model.decoder.head.weight
    states, yes = [torch.zeros(0, head.shape[1])], [torch.zeros(0)]
    parts = [
        replace(each, turns=each.turns[start : start + TURNS])
        for each in conversations
        for start in range(0, len(each.turns), TURNS)
    ]
    for batch in batches.plain(parts, size=8):
        moved = batch.to(head.device)
        output, labels = answered(model, moved), moved.text.labels
        # the first label of each turn is at its question's last token
        before = torch.roll(labels, 1, 1) == IGNORED
        begins = before | (torch.roll(moved.text.segments, 1, 1) != moved.text.segments)
        first = begins & (labels != IGNORED)
        states.append(output.hidden[first].float().cpu())
        yes.append((labels[first] == tokens[0]).float().cpu())
    rows = head[list(tokens)].float().cpu()
    joined = torch.cat(states)
    return _Read(joined, joined @ (rows[0] - rows[1]), torch.cat(yes))


def _weights(groups: Sequence[str], yes: Tensor) -> Tensor:
    """`[N]`, of mean 1: yes and no weigh the same in every group, and every group the same."""
    keys = list(zip(groups, yes.tolist(), strict=True))
    counts = Counter(keys)
    weights = torch.tensor([1 / counts[key] for key in keys])
    return weights / weights.mean()


def _fitted(found: _Read, weights: Tensor, kept: _Read, penalty: float) -> Tensor:
    """The change `[D]` of least weighted log loss, with the penalties of what else it does."""
    change = torch.zeros(found.states.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([change], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimiser.zero_grad()
        margin = found.margin + found.states @ change
        value = weights * binary_cross_entropy_with_logits(margin, found.yes, reduction="none")
        total = value.mean() + penalty * change.square().sum()
        if len(kept.margin):
            total = total + KEEP * (kept.states @ change).square().mean()
        total.backward()  # type: ignore[no-untyped-call]
        return float(total.detach())

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return change.detach()
