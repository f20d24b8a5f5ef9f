"""The three phases of Med-MoE's training and what each minimises, over one loop."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.models.decoder import MoE
from medmoe_edge.models.med_moe import MedMoE, Output
from medmoe_edge.training.data import (
    IGNORED,
    IMAGE_ID,
    SHARED,
    UNKNOWN,
    Batch,
    Batches,
    Conversation,
)
from medmoe_edge.training.loop import Loader, Session, fit
from medmoe_edge.training.questions import Asking, Facts
from medmoe_edge.training.recipe import PhaseConfig, Recipe
from medmoe_edge.training.router import (
    best_experts,
    few_of_each,
    fit_in_place,
    fit_router,
    install,
    kept_router,
    pooled_features,
)
from medmoe_edge.training.tower import Seen

ROUTER = "router.safetensors"


@dataclass(frozen=True)
class Scores:
    """Per-turn exactness under teacher forcing and per-image modality guesses.

    Greedy decoding gives the reference answer exactly when every teacher-forced token is the
    most likely one, so `exact` is the exact-match rate without decoding.
    """

    exact: Tensor  # bool, one per turn
    modality: Tensor | None  # index per image; None while there is no router


class Objective(nn.Module):
    """Wraps the model so that one forward gives the loss (which is what DDP needs).

    While the model is dense, `router` is a head beside it, trained as a modality classifier on the
    feed-forward inputs of the layers that will hold experts, averaged over layers and tokens.
    """

    def __init__(self, model: MedMoE, router: nn.Linear | None, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.router, self.layers = model, router, layers
        self.router_weight = 0.0
        self.label_smoothing = 0.0

    def weigh(self, phase: PhaseConfig) -> None:
        """Weigh the parts of the loss as a phase says."""
        self.router_weight = phase.router_weight
        self.label_smoothing = phase.label_smoothing

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        output = answered(self.model, batch)
        counted = batch.text.labels != IGNORED
        logits = self.model.head(output.hidden[counted])
        loss = cross_entropy(
            logits.float(), batch.text.labels[counted], label_smoothing=self.label_smoothing
        )
        known = batch.modality != UNKNOWN
        if self.router_weight and known.any():
            routed = sum(
                cross_entropy(self._modality_logits(output, where)[known], batch.modality[known])
                for where in self._pools(batch)
            )
            loss = loss + self.router_weight * routed / 2  # the mean of the two pools
        return loss

    @torch.no_grad()
    def scores(self, batch: Batch) -> Scores:
        """How well a batch is answered and its modalities recognised."""
        output = answered(self.model, batch)
        labels, segments = batch.text.labels, batch.text.segments
        right = self.model.head(output.hidden).argmax(-1) == labels
        exact = [
            right[row, (segments[row] == segment) & (labels[row] != IGNORED)].all()
            for row in range(len(labels))
            for segment in range(1, int(segments[row].max()) + 1)
        ]
        if self.router is None and self.model.config.moe is None:
            return Scores(torch.stack(exact), None)
        images = self._pools(batch)[0]
        return Scores(torch.stack(exact), self._modality_logits(output, images).argmax(-1))

    def _pools(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which tokens are averaged: those of the image, and those of the turns after it."""
        return batch.text.ids == IMAGE_ID, batch.text.segments > SHARED

    def _modality_logits(self, output: Output, where: Tensor) -> Tensor:
        weights = where.float() / where.sum(-1, keepdim=True)  # [B, S]
        pooled = [
            torch.einsum("bs,bsd->bd", weights, output.ffn_inputs[layer].float())
            for layer in self.layers
        ]
        mean = torch.stack(pooled).mean(0)  # [B, D]
        if self.router is not None:
            return self.router(mean)  # type: ignore[no-any-return]
        return self.model.moe_layer(self.layers[0]).router_logits(mean)


def answered(model: MedMoE, batch: Batch) -> Output:
    """A pass over a packed batch, each turn's answer given to it."""
    ids = batch.text.ids
    images = model.encode_image(batch.pixels, batch.pool)
    embeds = model.embed(ids.clamp_min(0)).to(images.dtype)
    embeds = embeds.masked_scatter((ids == IMAGE_ID)[..., None], images)
    output: Output = model(embeds, positions=batch.text.positions, mask=batch.text.mask())
    return output


@dataclass(frozen=True)
class Corpus:
    """All training text: captions for phase 1, questions and classification for phases 2 and 3."""

    captions: list[Conversation]
    questions: list[Conversation]
    classification: list[Conversation]
    validation: list[Conversation]
    known: Sequence[Facts] = ()
    asking: Asking | None = None  # makes questions of what is known; None: classification does
    seen: Sequence[Seen] = ()  # what a tower can be taught to see, and that by which it is judged
    seen_held_out: Sequence[Seen] = ()
    border: Sequence[Facts] = ()  # of images that no phase learns from

    def asked(self, order: random.Random, phase: PhaseConfig) -> list[Conversation]:
        """An epoch's questions about facts; images that none is about are left out."""
        assert self.asking is not None
        turns = self.asking.epoch(order, phase.asked_share, phase.labelled_share)
        return [
            Conversation(facts.image, facts.modality, tuple(own), facts.source, made=True)
            for facts, own in zip(self.asking.known, turns, strict=True)
            if own
        ]

    @property
    def everything(self) -> list[Conversation]:
        """What is learned from."""
        return [*self.captions, *self.questions, *self.classification]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that what is learned from names, in the order of their names."""
        return tuple(sorted({each.modality for each in self.everything if each.modality}))


def align(
    model: MedMoE, corpus: Corpus, phase: PhaseConfig, batches: Batches, session: Session
) -> None:
    """Phase 1, in place: captions teach the projector the decoder's language.

    A decoder that starts from nothing, as nano's, learns here too: its recipe says so. A model with
    experts already is aligned with them.
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
    recipe: Recipe,
    batches: Batches,
    session: Session,
) -> nn.Linear | None:
    """Phase 2, in place: instructions, and beside them the router, where the recipe says so.

    It learns as a modality classifier. None where it is fitted later, or stays as it is.
    """
    router = None
    if model.config.moe is not None and recipe.experts_from == "instruction":
        tie_routers(model)  # one classifier, which learns with the experts that it feeds
    elif recipe.router == "joint" and not keeps_router(model, moe, corpus):
        router = nn.Linear(model.config.decoder.hidden_size, moe.num_experts, bias=moe.router_bias)
    objective = Objective(model, router, moe.layers)
    fit_instructions("instruction", objective, corpus, recipe.instruction, batches, session)
    if model.config.moe is not None:
        untie_routers(model)
    return router


def tie_routers(model: MedMoE) -> None:
    """Let all layers with experts have one router, that of the first."""
    first = model.moe_layer(model.config.moe_layers[0]).router
    for layer in model.config.moe_layers:
        model.moe_layer(layer).router = first


def untie_routers(model: MedMoE) -> None:
    """Give each layer a router of its own again, with the weights that it has."""
    for layer in model.config.moe_layers:
        moe = model.moe_layer(layer)
        moe.router = copy.deepcopy(moe.router)


def route(
    model: MedMoE,
    router: nn.Linear | None,
    config: ModelConfig,
    corpus: Corpus,
    batches: Batches,
    session: Session,
) -> MedMoE:
    """The model of phase 3, in place: with experts, and with the router of phase 2 in each layer.

    Where phase 2 gave none it is fitted to images of known modality; a model that has routers keeps
    them where the data is of some of its modalities alone, or says none.
    """
    moe = config.moe
    assert moe is not None
    if keeps_router(model, moe, corpus):
        return model
    device = session.accelerator.device
    with session.accelerator.main_process_first():
        file = session.folder / ROUTER
        known = few_of_each([*corpus.classification, *corpus.questions])
        fitted = router is None and not file.exists()
        if fitted:
            session.say("Fitting the router to images of known modality.")
            features = pooled_features(model.to(device), moe.layers, batches, known)
            router = fit_router(features, moe.num_experts, bias=moe.router_bias)
        elif router is None:
            router = kept_router(file, None)
        if model.config.moe is None:
            model = upcycle(model, router, config)
        install(model, router)
        if fitted:
            kept = kept_router(file, fit_in_place(model.to(device), batches, known))
            install(model, kept)
    return model


def keeps_router(model: MedMoE, moe: MoEConfig, corpus: Corpus) -> bool:
    """Whether the data cannot teach a router: no modality is named, or only some of the model's."""
    named = set(corpus.modalities)
    return model.config.moe is not None and (not named or named < set(moe.expert_names))


def expand(model: MedMoE, config: ModelConfig, corpus: Corpus, batches: Batches) -> MedMoE:
    """A model of `config` from one with other experts: each starts as the one that it suits.

    That is the expert of the same name, or else the one that the model's own router sends most
    images of the modality to. Meta experts stay; routers too where the experts are the same.
    """
    old, new = model.config.moe, config.moe
    assert old is not None
    assert new is not None
    model.config = config
    if old.expert_names == new.expert_names and old.num_experts == new.num_experts:
        if old.top_k != new.top_k:
            for layer in new.layers:
                model.moe_layer(layer).top_k = new.top_k
        return model
    shown = few_of_each([*corpus.classification, *corpus.questions])
    model.config = replace(config, moe=old)
    features = pooled_features(model, old.layers, batches, shown)
    suited = best_experts(model, features, new.num_experts)
    model.config = config
    source = [
        old.expert_names.index(name) if name in old.expert_names else suited[index]
        for index, name in enumerate(new.expert_names)
    ]
    for layer in new.layers:
        moe = model.moe_layer(layer)
        router = nn.Linear(config.decoder.hidden_size, new.num_experts, bias=new.router_bias)
        with torch.no_grad():
            router.weight.copy_(moe.router.weight[source])
            if moe.router.bias is not None:
                router.bias.copy_(moe.router.bias[source])
        moe.experts = nn.ModuleList(copy.deepcopy(moe.experts[index]) for index in source)
        moe.router, moe.top_k = router, new.top_k
    return model


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
        order = random.Random(f"{session.seed} {epoch} labels")
        if corpus.asking is not None:
            drawn = corpus.asked(order, phase)
        else:
            count = int(len(corpus.classification) * phase.labelled_share)
            drawn = order.sample(corpus.classification, count)
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
            if modality != UNKNOWN and scores.modality is not None:
                guess = int(scores.modality[row]) == modality
                hits.setdefault("modality", []).append(guess)
        at += len(moved.modality)
    return {name: round(sum(values) / len(values), 4) for name, values in hits.items()}
