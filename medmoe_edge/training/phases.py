"""The three phases of Med-MoE's training, each a function over the same loop."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.models.decoder import MoE
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.training.data import UNKNOWN, Batches, Conversation
from medmoe_edge.training.loop import Loader, Session, fit
from medmoe_edge.training.objective import Objective
from medmoe_edge.training.recipe import PhaseConfig


@dataclass(frozen=True)
class Corpus:
    """All training text: captions for phase 1, questions and classification for phases 2 and 3."""

    captions: list[Conversation]
    questions: list[Conversation]
    classification: list[Conversation]
    validation: list[Conversation]


def align(
    model: MedMoE, corpus: Corpus, phase: PhaseConfig, batches: Batches, session: Session
) -> None:
    """Phase 1, in place: captions teach the projector the decoder's language.

    A decoder that starts from nothing, as nano's, learns here too: its recipe says so.
    """

    def epoch_batches(epoch: int) -> Loader:
        return batches.shuffled(corpus.captions, phase.batch_images, phase.max_turns, epoch)

    objective = Objective(model, None, ())
    objective.weigh(phase)
    fit("alignment", objective, phase, epoch_batches, lambda _: {}, session)


def instruct(
    model: MedMoE,
    moe: MoEConfig,
    corpus: Corpus,
    phase: PhaseConfig,
    batches: Batches,
    session: Session,
) -> nn.Linear:
    """Phase 2, in place: instructions, and beside them the router as a modality classifier."""
    size = model.config.decoder.hidden_size
    router = nn.Linear(size, moe.num_experts, bias=moe.router_bias)
    objective = Objective(model, router, moe.layers)
    fit_instructions("instruction", objective, corpus, phase, batches, session)
    return router


def specialise(
    model: MedMoE, corpus: Corpus, phase: PhaseConfig, batches: Batches, session: Session
) -> None:
    """Phase 3, in place: the experts and the meta expert learn, the router is frozen."""
    objective = Objective(model, None, model.config.moe_layers)
    fit_instructions("moe", objective, corpus, phase, batches, session)


def upcycle(dense: MedMoE, router: nn.Linear, config: ModelConfig) -> MedMoE:
    """The model of phase 3, in place: experts and meta expert are copies of the dense feed-forward.

    Sparse upcycling, https://arxiv.org/abs/2212.05055; the same router goes into every MoE layer.
    """
    assert config.moe is not None
    for index in config.moe.layers:
        layer = dense.decoder.layers[index]
        moe = MoE(
            config.moe,
            config.decoder.hidden_size,
            partial(copy.deepcopy, layer.get_submodule("ffn")),
        )
        moe.router.load_state_dict(router.state_dict())
        layer.ffn = moe
    dense.config = config
    return dense


def fit_instructions(
    name: str,
    objective: Objective,
    corpus: Corpus,
    phase: PhaseConfig,
    batches: Batches,
    session: Session,
) -> None:
    """What phases 2 and 3 share, in place: all questions and a draw of the labelled images."""

    def epoch_batches(epoch: int) -> Loader:
        drawn = random.Random(f"{session.seed} {epoch} labels").sample(
            corpus.classification, int(len(corpus.classification) * phase.labelled_share)
        )
        chosen = [*corpus.questions, *drawn]
        return batches.shuffled(chosen, phase.batch_images, phase.max_turns, epoch)

    def validate(trained: Objective) -> dict[str, float]:
        return validation_scores(trained, corpus.validation, batches, session)

    objective.weigh(phase)
    fit(name, objective, phase, epoch_batches, validate, session)


def validation_scores(
    objective: Objective, conversations: Sequence[Conversation], batches: Batches, session: Session
) -> dict[str, float]:
    """Exact match per source and router accuracy, under teacher forcing; 0 to 1."""
    hits: dict[str, list[bool]] = {}
    at = 0
    for batch in batches.plain(conversations, size=16):
        moved = batch.to(session.accelerator.device)
        with session.accelerator.autocast():
            scores = objective.scores(moved)
        exact = iter(scores.exact.tolist())
        for row, modality in enumerate(moved.modality.tolist()):
            conversation = conversations[at + row]
            turns = hits.setdefault(conversation.source, [])
            turns += [next(exact) for _ in conversation.turns]
            if modality != UNKNOWN:
                guess = int(scores.modality[row]) == modality
                hits.setdefault("modality", []).append(guess)
        at += len(moved.modality)
    return {name: round(sum(values) / len(values), 4) for name, values in hits.items()}
