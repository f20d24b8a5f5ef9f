"""What a proof would notice: a bundle damaged on purpose, and what its answers tell of it.

A model whose experts are nearly alike answers the same with two of them exchanged; then no question
can show that an expert was damaged, and only the marks of its weights (`bundle/recorded.py`) can.
So an export measures once what four kinds of damage do to a few of the questions it is verified on:

    exchange    two experts of a layer take each other's place
    meta        the meta expert stands in the place of an expert
    scale       one quantisation scale is twice what it was
    router      one expert's row of a router is zero

All are done to the expert that most tokens reach, where damage should show if it shows anywhere.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Counting, Floats, there
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.recorded import DELTA, stored_weights
from medmoe_edge.config import Config, ModelConfig, MoEConfig
from medmoe_edge.data.datasets import Example
from medmoe_edge.evaluation.fidelity import Recording, compare, record
from medmoe_edge.evaluation.gates import judge
from medmoe_edge.evaluation.metrics import Share
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import chosen_experts, own_logits
from medmoe_edge.runtimes.ort.runtime import DECODER, OrtRuntime

Kind = Literal["exchange", "meta", "scale", "router"]
Array = npt.NDArray[Any]
Weights = Mapping[str, Array]
QUESTIONS = 6  # each asked again of every damaged model
SCALES = (".groups.scale", ".scale")
WHOLE = ("exchange", "meta")  # kinds that put another expert in an expert's place


@dataclass(frozen=True)
class Mutation(Config):
    """One damage, to the expert `owner`, such as `decoder.layers.2.ffn.experts.1`.

    `other` is the expert, or meta expert, that an exchange or a replacement takes weights from.
    """

    kind: Kind
    owner: str
    other: str = ""

    def __str__(self) -> str:
        return {
            "exchange": f"exchanging {self.owner} and {self.other}",
            "meta": f"{self.other} in the place of {self.owner}",
            "scale": f"doubling a scale of {self.owner}",
            "router": f"zeroing the router's row of {self.owner}",
        }[self.kind]


@dataclass(frozen=True)
class Effect(Config):
    """What a mutation changed, held against the bundle as it is.

    Of a Med-MoE: `answers` that read otherwise, `routing` of tokens x layers to other experts, the
    mean `kl` in nats. Of a MedMoE: images with another nearest phrase and with another modality,
    and the mean `cosine` of their regions. `seen`: a gate of answers, routing, KL or features would
    fail for it.
    """

    mutation: Mutation
    answers: Share
    routing: Share
    seen: bool
    kl: float | None = None
    cosine: float | None = None

    def __str__(self) -> str:
        measured = f"KL {self.kl:.2g}" if self.kl is not None else f"cosine {self.cosine:.4f}"
        changed = f"{self.answers.count} of {self.answers.total} answers"
        return f"{self.mutation} changes {changed} ({measured})"


@dataclass(frozen=True)
class Mutations(Config):
    """The effects of all mutations that a bundle's weights allow."""

    effects: tuple[Effect, ...]

    @property
    def unseen(self) -> tuple[Effect, ...]:
        """Those of whole experts that no gate of answers would notice."""
        return tuple(
            effect for effect in self.effects if effect.mutation.kind in WHOLE and not effect.seen
        )

    @property
    def summary(self) -> str:
        """What the proof can see by its answers and what it cannot, as far as it was tried."""
        seen = [effect for effect in self.effects if effect.seen]
        parts = [effect for effect in self.effects if effect.mutation.kind not in WHOLE]
        told = []
        if len(parts) == len(self.effects):
            told.append(
                "Whether this proof would notice another expert in an expert's place was not "
                "measured: it has no other of the same form."
            )
        if self.unseen:
            told.append(
                "By what it answers this proof cannot see expert damage, only by the marks of its "
                f"weights: {_listed(self.unseen)}."
            )
        if seen:
            told.append(f"This proof would notice damage to an expert: {_listed(seen)}.")
        if missed := [effect for effect in parts if not effect.seen]:
            told.append(f"It would not notice by its answers: {_listed(missed)}.")
        return " ".join(told)


def _listed(effects: Sequence[Effect]) -> str:
    return "; ".join(map(str, effects))


def mutated_weights(
    weights: Weights, mutation: Mutation, moe: MoEConfig | None = None
) -> dict[str, Array] | None:
    """The weights of a graph that a mutation changes, by name, as it leaves them.

    Args:
        weights: The graph's own, as stored: `medmoe_edge.bundle.recorded.stored_weights`.
        mutation: What is to be done.
        moe: The model's experts: of one that is cut to some modalities the router has rows for the
            others, too. None: a MedMoE, which has a row for each expert.

    Returns:
        Arrays of the same shapes and types; None where these weights do not allow it: experts of
        different sizes or formats, no meta expert, no scales.
    """
    own = _parts(weights, mutation.owner)
    if mutation.kind == "scale":
        name = next((name for name in reversed(own) if name.endswith(SCALES)), None)
        if name is None:
            return None
        scales = own[name].copy()
        scales.flat[np.abs(scales.astype(np.float32)).argmax()] *= 2
        return {name: scales}
    if mutation.kind == "router":
        return _without_row(weights, mutation.owner, moe)
    other = _parts(weights, mutation.other)
    if mutation.kind == "meta" and any(DELTA in name for name in own):
        return _without_deltas(own)
    pairs = {
        name: (array, other.get(mutation.other + name.removeprefix(mutation.owner)))
        for name, array in own.items()
    }
    if not own or len(own) != len(other):
        return None
    made: dict[str, Array] = {}
    for name, (mine, theirs) in pairs.items():
        if theirs is None or (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return None
        made[name] = theirs
        if mutation.kind == "exchange":
            made[mutation.other + name.removeprefix(mutation.owner)] = mine
    return made


def mutations_of(
    weights: Weights, tokens: Mapping[str, Sequence[int]], moe: MoEConfig | None = None
) -> Iterator[Mutation]:
    """One mutation of each kind that the weights allow, of the expert that most tokens reach.

    Args:
        weights: Of the graph, as stored.
        tokens: How many tokens each expert got, by the prefix of the layer's experts, such as
            `decoder.layers.2.ffn.`; empty for a model whose experts have no layers.
        moe: As of `mutated_weights`.
    """
    layer, counts = max(tokens.items(), key=lambda item: max(item[1]))
    first, *others = np.argsort(-np.asarray(counts), kind="stable").tolist()
    owner = f"{layer}experts.{first}"
    candidates = [
        *(Mutation("exchange", owner, f"{layer}experts.{second}") for second in others[:1]),
        Mutation("meta", owner, f"{layer}meta"),
        Mutation("scale", owner),
        Mutation("router", owner),
    ]
    for mutation in candidates:
        if mutated_weights(weights, mutation, moe) is not None:
            yield mutation


def measure_mutations(
    whole: OrtRuntime,
    examples: Sequence[Example],
    load: Callable[[Path], Image],
    kl_limit: float,
    progress: Counting,
) -> Mutations | None:
    """What each mutation changes in the answers to a few of the questions; None without experts.

    Args:
        whole: Runs a portable bundle; it is not changed, the damaged weights are in memory alone.
        examples: Questions to draw from, of all modalities in turn.
        load: Reads their images.
        kl_limit: The mean KL at which the gate of `verify --quick` fails.
        progress: Called with the models asked and all of them.
    """
    bundle, moe = whole.bundle, whole.config.moe
    if moe is None or moe.merged:
        return None
    weights = dict(stored_weights(bundle.path(DECODER)))
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    expected = record(whole, tokenizer, few(examples), load=cache(load))
    seen = cache(lambda pixels: whole.encode_image(_pixels(pixels, bundle.config)))
    found = list(mutations_of(weights, _tokens(expected), moe))
    effects = []
    for done, mutation in enumerate(found):
        progress(done, len(found))
        replaced = there(mutated_weights(weights, mutation, moe))
        fidelity = compare(expected, _Damaged(bundle, replaced, seen))
        overall, routing = fidelity.overall, there(fidelity.routing)
        changed = overall.n - overall.answer_agreement.count
        kl = overall.kl.mean
        failed = not all(gate.passed for gate in judge(fidelity, bundle.gates))
        answers = Share.of(changed, overall.n)
        effects.append(Effect(mutation, answers, routing.flips, failed or kl > kl_limit, kl))
    return Mutations(tuple(effects))


def few(examples: Iterable[Example]) -> list[Example]:
    """Some questions about different images, of each modality in turn."""
    groups: dict[str | None, dict[Path, Example]] = defaultdict(dict)
    for example in examples:
        groups[example.modality].setdefault(example.image, example)
    turns = [list(group.values()) for group in groups.values()]
    longest = max(map(len, turns))
    ordered = [group[turn] for turn in range(longest) for group in turns if turn < len(group)]
    return ordered[:QUESTIONS]


class _Damaged(OrtRuntime):
    """A bundle's decoder with some weights replaced; the image's tokens come from the whole one."""

    def __init__(self, bundle: Bundle, replaced: Weights, seen: Callable[[bytes], Floats]) -> None:
        super().__init__(bundle, replaced)
        self._seen = seen

    def encode_image(self, pixels: Floats) -> Floats:
        """Of each image once, for all models."""
        return self._seen(pixels.tobytes())


def _pixels(content: bytes, config: ModelConfig) -> Floats:
    side = config.vision.image_size
    return np.frombuffer(content, np.float32).reshape(1, 3, side, side)


def _tokens(recording: Recording) -> dict[str, list[int]]:
    """How many tokens each expert got, by the prefix of its layer."""
    config, moe = recording.config, there(recording.config.moe)
    routed = [part.router_logits for part in recording.images.values()]
    routed += [part.router_logits for part in recording.questions.values()]
    own = own_logits(np.concatenate(routed), moe)
    chosen = chosen_experts(own, moe.top_k)  # [S, M, K]
    return {
        f"decoder.layers.{layer}.ffn.": np.bincount(
            chosen[:, place].ravel(), minlength=moe.num_experts
        ).tolist()
        for place, layer in enumerate(config.moe_layers)
    }


def _parts(weights: Weights, owner: str) -> dict[str, Array]:
    return {name: array for name, array in weights.items() if name.startswith(f"{owner}.")}


def _without_deltas(own: Weights) -> dict[str, Array]:
    """An expert that adds nothing to the meta expert; biases, which are kept whole, are its own."""
    deltas = {name: array for name, array in own.items() if DELTA in name}
    scales = {name: array for name, array in deltas.items() if name.endswith(SCALES)}
    return {name: np.zeros_like(array) for name, array in (scales or deltas).items()}


def _without_row(weights: Weights, owner: str, moe: MoEConfig | None) -> dict[str, Array] | None:
    """The router that chooses among an expert and its neighbours, without that expert's row."""
    layer, _, index = owner.rpartition("experts.")
    row = int(index)
    if moe is None:
        neighbours = f"{layer}experts."
        names = (name.removeprefix(neighbours) for name in weights if name.startswith(neighbours))
        rows = len({name.partition(".")[0] for name in names})
    else:
        rows, row = moe.router_rows, (moe.own_rows or range(moe.num_experts))[row]
    made = {}
    for name in _parts(weights, f"{layer}router"):
        array = weights[name]
        axis = next((axis for axis in (-1, 0) if array.shape[axis] == rows), None)
        if axis is None:
            continue  # a hidden layer of it
        made[name] = array.copy()
        np.moveaxis(made[name], axis, 0)[row] = 0
    return made or None
