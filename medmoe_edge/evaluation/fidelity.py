"""How faithfully a model reproduces another: both read the same images and the same questions.

`record` lets the reference answer once; `compare` holds any number of candidates against it. Per
question the candidate is led along the reference's answer, so that the distributions of every
position can be compared, and then left to give its own.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Counting, Floats, no_counting
from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.data.datasets import Example, by_image, owner_of
from medmoe_edge.errors import DataError, InputError, ModelError
from medmoe_edge.evaluation.metrics import (
    Accuracy,
    Answers,
    Divergence,
    Fidelity,
    Flips,
    Reduction,
    Routing,
    Share,
    Vision,
    bootstrap_interval,
    exact_match,
)
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import (
    LEAST,
    Cache,
    Decoding,
    Runtime,
    Step,
    chosen_experts,
    greedy,
    log_softmax,
    own_logits,
)


@dataclass(frozen=True)
class View:
    """An image, prefilled behind the system prompt: its questions start from `cache`.

    `features` `[N, D]` are its image tokens, `router_logits` `[S, M, E]` those of the whole prefix.
    """

    features: Floats
    router_logits: Floats
    cache: Cache
    length: int


@dataclass(frozen=True)
class Reply:
    """A question's greedy answer: `tokens` `[P]`, the end token included where it was reached.

    `logits` `[P, V]` are those each token was chosen from, or should have been chosen from;
    `router_logits` `[S, M, E]` those of the question's tokens.
    """

    tokens: tuple[int, ...]
    logits: Floats
    router_logits: Floats


class Reader:
    """Reads with one runtime. What is not finite counts as zeros, and `finite` remembers it."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, max_new_tokens: int) -> None:
        tokenizer.check_vocabulary(runtime.config.decoder.vocab_size)
        self.runtime, self.tokenizer, self.limit = runtime, tokenizer, max_new_tokens
        self.decoding = Decoding.of(runtime.config, tokenizer)
        self.finite = True

    def see(self, image: Image) -> Floats:
        """An image's tokens `[N, D]`."""
        return self.runtime.encode_image(preprocess(image, self.runtime.config.vision))

    def view(self, features: Floats, questions: Sequence[list[int]]) -> View:
        """Prefill image tokens, with room for the longest of the questions and its answer."""
        features = self._checked(features)
        prefix = self.tokenizer.prefix_ids()
        length = len(prefix) + len(features)
        needed = length + max(map(len, questions)) + self.limit
        room = self.runtime.config.decoder.max_positions
        if needed > room:
            raise InputError(
                f"Image, question and answer need {needed} positions, the model has {room}.",
                "Leave the longest questions out.",
            )
        cache = self.runtime.new_cache(needed)
        step = self.runtime.step(np.concatenate((self.runtime.embed(prefix), features)), cache)
        return View(features, self._checked(step.router_logits), cache, length)

    def answer(self, view: View, question: list[int]) -> Reply:
        """Decode greedily."""
        step = self._ask(view, question)
        tokens, rows = self._greedy(step, view.cache)
        return Reply(tokens, np.stack(rows), step.router_logits)

    def follow(self, view: View, question: list[int], answer: Sequence[int]) -> Reply:
        """Be led along `answer` `[P]`, whatever the model itself would have said.

        The logits are those along `answer`; the tokens are the model's own greedy answer.
        """
        first = self._ask(view, question)
        steps = [first, *(self._next(token, view.cache) for token in answer[:-1])]
        own = tuple(answer)
        for place, (token, step) in enumerate(zip(answer, steps, strict=True)):
            if self.decoding.choose(step.logits) != token:  # from here on it goes its own way
                view.cache.length = view.length + len(question) + place
                own = own[:place] + self._greedy(step, view.cache, own[:place])[0]
                break
        return Reply(own, np.stack([step.logits for step in steps]), first.router_logits)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer that tokens spell, as `Engine` tells it."""
        return self.tokenizer.decode(list(self.decoding.kept(tokens)))

    def _ask(self, view: View, question: list[int]) -> Step:
        view.cache.length = view.length  # forget the question before
        return self._step(question, view.cache)

    def _greedy(
        self, step: Step, cache: Cache, before: Sequence[int] = ()
    ) -> tuple[tuple[int, ...], list[Floats]]:
        """The further tokens of an answer, those of a loop that ends it included."""
        take, limit = partial(self._next, cache=cache), self.limit - len(before)
        decoded = list(greedy(step, take, self.decoding, limit=limit, before=before))
        return tuple(each.token for each in decoded), [each.step.logits for each in decoded]

    def _next(self, token: int, cache: Cache) -> Step:
        return self._step([token], cache)

    def _step(self, ids: list[int], cache: Cache) -> Step:
        """A step with logits as `Engine` chooses from them."""
        step = self.runtime.step(self.runtime.embed(ids), cache)
        logits = self.tokenizer.only_tokens(self._checked(step.logits))
        return Step(logits, self._checked(step.router_logits))

    def _checked(self, values: Floats) -> Floats:
        if np.isfinite(values).all():
            return values
        self.finite = False
        return np.zeros_like(values)


class Routed(NamedTuple):
    """How some tokens were routed; `flips` counts those sent to other experts, per MoE layer."""

    modality: str
    tokens: int
    flips: npt.NDArray[np.int64]  # [M]
    squared_difference: npt.NDArray[np.float64]  # [M]
    squared_reference: npt.NDArray[np.float64]  # [M]


def routed(reference: Floats, found: Floats, top_k: int, modality: str) -> Routed:
    """Compare the router logits `[S, M, E]` of the same tokens."""
    differs = (_chosen(reference, top_k) != _chosen(found, top_k)).any(-1)  # [S, M]
    expected = reference.astype(np.float64)
    squares = ((found - expected) ** 2).sum((0, 2)), (expected**2).sum((0, 2))
    return Routed(modality, len(reference), differs.sum(0), *squares)


def _routed(
    reference: Floats, found: Floats, moe: MoEConfig | None, modality: str
) -> Iterable[Routed]:
    """Among the experts that are there; nothing of a dense model."""
    if moe is not None:
        yield routed(own_logits(reference, moe), own_logits(found, moe), moe.top_k, modality)


def routing(parts: Sequence[Routed], layers: Sequence[int]) -> Routing:
    """The figures over all tokens; `layers` are the decoder's indices of the M layers."""
    flips = np.sum([part.flips for part in parts], axis=0)  # [M]
    tokens = sum(part.tokens for part in parts)
    difference = np.sum([part.squared_difference for part in parts], axis=0)
    reference = np.sum([part.squared_reference for part in parts], axis=0)
    by_modality = {}
    for modality in sorted({part.modality for part in parts}):
        group = [part for part in parts if part.modality == modality]
        total = sum(part.tokens for part in group) * len(layers)
        by_modality[modality] = Share.of(sum(int(part.flips.sum()) for part in group), total)
    return Routing(
        flips=Share.of(int(flips.sum()), tokens * len(layers)),
        by_layer={
            layer: Share.of(int(count), tokens) for layer, count in zip(layers, flips, strict=True)
        },
        by_modality=by_modality,
        error_by_layer={
            layer: relative_error(*squares)
            for layer, *squares in zip(layers, difference, reference, strict=True)
        },
    )


def relative_error(squared_difference: float, squared_reference: float) -> float:
    """The norm of a difference over the norm of what should have been there."""
    return math.sqrt(squared_difference / max(squared_reference, 1e-30))


def _chosen(router_logits: Floats, top_k: int) -> npt.NDArray[np.int64]:
    """The chosen experts in order of their index, `[S, M, K]`."""
    return np.sort(chosen_experts(router_logits, top_k), axis=-1)


T = TypeVar("T")
Rows = slice | npt.NDArray[np.int64]
MAX_NEW_TOKENS = 32
UNKNOWN = "unknown"


class RecordedImage(NamedTuple):
    """Image tokens `[N, D]` and router logits `[S, M, E]`, of all rows or of those named."""

    features: Floats
    router_logits: Floats
    tokens: Rows = slice(None)
    positions: Rows = slice(None)


class RecordedQuestion(NamedTuple):
    """An answer's tokens `[P]`, the log-probabilities they were chosen by, and the routing.

    `log_probabilities` are those of all tokens `[P, V]`, or of those in `likeliest` `[P, K]` with
    that of all others together behind them `[P, K + 1]`; in fp16 KL errs by less than 1e-6. Where
    they are exact, they are the logits.
    """

    tokens: tuple[int, ...]
    log_probabilities: npt.NDArray[np.floating[Any]]
    router_logits: Floats  # [S, M, E]
    likeliest: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Recording:
    """What the reference computed and answered.

    Attributes:
        config: Of the reference.
        tokenizer: Of the questions.
        max_new_tokens: Where answers were cut off.
        examples: The questions about each image.
        images: What was made of each image.
        questions: What was answered, by the question's id.
        load: Reads an image by its key.
        whole: What the checkpoint answered with all its image tokens, where this has fewer.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    max_new_tokens: int
    examples: Mapping[Path, Sequence[Example]]
    images: Mapping[Path, RecordedImage]
    questions: Mapping[str, RecordedQuestion]
    load: Callable[[Path], Image] = load_image
    whole: "Recording | None" = None

    def about(self, examples: Sequence[Example]) -> "Recording":
        """The part of it that is about some of its questions."""
        groups = by_image(examples)
        images = {image: self.images[image] for image in groups}
        questions = {example.id: self.questions[example.id] for example in examples}
        return replace(self, examples=groups, images=images, questions=questions, whole=None)


def record(
    reference: Runtime,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    load: Callable[[Path], Image] = load_image,
    tokens: Callable[[Path], Floats | None] | None = None,
    exact: bool = False,
    progress: Counting = no_counting,
) -> Recording:
    """Let the reference answer every question.

    Args:
        reference: What the candidates are to reproduce.
        tokenizer: Its own.
        examples: The questions.
        max_new_tokens: Where answers are cut off.
        load: Reads images, here and to compare.
        tokens: Gives the image tokens `[N, D]` that the reference's tower has made before, or None.
        exact: Keep logits as they are, which takes twice the memory.
        progress: Told of the images done and the images in all.

    Raises:
        DataError: There are no examples, or an id is used twice.
        ModelError: The reference's output is not finite.
        InputError: An image or a question cannot be used.
    """
    if not examples:
        raise DataError("There are no questions to compare on.", "Give at least one.")
    if len({example.id for example in examples}) < len(examples):
        raise DataError("Two questions share an id.", "Give every question an id of its own.")
    reader = Reader(reference, tokenizer, max_new_tokens)
    groups = by_image(examples)
    images: dict[Path, RecordedImage] = {}
    questions: dict[str, RecordedQuestion] = {}
    for done, (image, group) in enumerate(groups.items(), start=1):
        ids = [tokenizer.question_ids(example.question) for example in group]
        features = tokens(image) if tokens else None
        view = reader.view(reader.see(load(image)) if features is None else features, ids)
        images[image] = RecordedImage(view.features, view.router_logits)
        for example, question in zip(group, ids, strict=True):
            reply = reader.answer(view, question)
            kept: npt.NDArray[np.floating[Any]] = reply.logits
            if not exact:
                kept = log_softmax(reply.logits).clip(-6e4).astype(np.float16)
            questions[example.id] = RecordedQuestion(reply.tokens, kept, reply.router_logits)
        if not reader.finite:
            raise ModelError(
                "The reference model's output is not finite.",
                "Its training diverged: use an earlier checkpoint.",
            )
        progress(done, len(groups))
    return Recording(reference.config, tokenizer, max_new_tokens, groups, images, questions, load)


def follow(
    recording: Recording, reader: Reader, progress: Counting
) -> Iterator[tuple[Path, View, Iterator[tuple[Example, list[int], Reply]]]]:
    """Lead a candidate along every recorded answer; of each image what it saw, and its replies.

    Those are made when they are asked for, which must be before the next image.
    """
    for done, (image, group) in enumerate(recording.examples.items(), start=1):
        ids = [recording.tokenizer.question_ids(example.question) for example in group]
        view = reader.view(reader.see(recording.load(image)), ids)
        pairs = zip(group, ids, strict=True)
        answers = recording.questions
        yield image, view, ((e, q, reader.follow(view, q, answers[e.id].tokens)) for e, q in pairs)
        progress(done, len(recording.examples))


def compare(
    recording: Recording, candidate: Runtime, *, progress: Counting = no_counting
) -> Fidelity:
    """Hold a candidate against the recorded reference.

    Args:
        recording: What `record` gave.
        candidate: Of the same configuration.
        progress: Told of the images done and the images in all.

    Raises:
        ModelError: It is another model.
    """
    if candidate.config != recording.config:
        raise ModelError(
            "The two models are of different make.", "Compare a model with its own checkpoint."
        )
    reader = Reader(candidate, recording.tokenizer, recording.max_new_tokens)
    seen, said, said_of_whole = [], [], []
    routes: list[Routed] = []
    moe = recording.config.moe
    for image, view, replies in follow(recording, reader, progress):
        reference = recording.images[image]
        seen.append(_seen(reference.features, view.features[reference.tokens]))
        modality = recording.examples[image][0].modality or UNKNOWN
        found = view.router_logits[reference.positions]
        routes += _routed(reference.router_logits, found, moe, modality)
        for example, question, reply in replies:
            expected = recording.questions[example.id]
            said.append(_said(example, expected, reply, reader))
            routes += _routed(expected.router_logits, reply.router_logits, moe, modality)
            if recording.whole is not None:  # whose positions and routing are other ones
                expected = recording.whole.questions[example.id]
                reply = reader.follow(view, question, expected.tokens)
                said_of_whole.append(_said(example, expected, reply, reader))
    return Fidelity(
        questions=len(said),
        images=len(seen),
        overall=_answers(said),
        by_modality=_grouped(said, "modality", _answers),
        by_answer_type=_grouped(said, "answer_type", _answers),
        routing=routing(routes, recording.config.moe_layers) if moe else None,
        vision=_vision(seen),
        finite=reader.finite,
        reduction=_reduction(recording.whole, said_of_whole),
    )


def likeliest(
    logits: npt.NDArray[Any], tokens: npt.NDArray[np.int32] | None
) -> npt.NDArray[np.float64]:
    """Log-probabilities `[P, K + 1]` of the tokens `[P, K]`, and behind them of all others.

    Without `tokens`, those of all `[P, V]`. Merging outcomes can only lower a KL divergence.
    """
    whole = log_softmax(logits)
    if tokens is None:
        return whole
    others = whole.copy()
    np.put_along_axis(others, tokens, -np.inf, -1)
    rest = np.log(np.maximum(np.exp(others).sum(-1, keepdims=True), LEAST))
    return np.concatenate((np.take_along_axis(whole, tokens, -1), rest), -1)


def squares(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> tuple[float, float]:
    """The squared norms of a difference and of what should have been there."""
    exact = expected.astype(np.float64)
    return float(((found - exact) ** 2).sum()), float((exact**2).sum())


class _Seen(NamedTuple):
    cosine: float
    squared_difference: float
    squared_reference: float


def _seen(reference: Floats, features: Floats) -> _Seen:
    expected, found = reference.astype(np.float64), features.astype(np.float64)
    norms = np.linalg.norm(expected, axis=-1) * np.linalg.norm(found, axis=-1)
    cosines = (expected * found).sum(-1) / np.maximum(norms, 1e-30)  # [N]
    return _Seen(float(cosines.mean()), *squares(found, expected))


def _vision(seen: list[_Seen]) -> Vision:
    cosine, difference, reference = np.array(seen).T
    return Vision(
        cosine_mean=float(cosine.mean()),
        cosine_interval=bootstrap_interval(cosine, np.arange(len(cosine))),
        cosine_min=float(cosine.min()),
        relative_error=relative_error(difference.sum(), reference.sum()),
    )


class _Said(NamedTuple):
    example: Example
    same: bool
    tokens_agree: npt.NDArray[np.bool_]  # [P]
    kl: npt.NDArray[np.float64]  # [P]
    reference_right: bool
    candidate_right: bool


def _said(example: Example, expected: RecordedQuestion, reply: Reply, reader: Reader) -> _Said:
    texts = reader.text(expected.tokens), reader.text(reply.tokens)
    reference = log_softmax(expected.log_probabilities)
    gaps = np.exp(reference) * (reference - likeliest(reply.logits, expected.likeliest))
    return _Said(
        example,
        texts[0] == texts[1],
        reader.decoding.choose(reply.logits) == np.array(expected.tokens),
        np.maximum(gaps.sum(-1), 0.0),  # rounding may leave it a hair below
        exact_match(texts[0], example.answer),
        exact_match(texts[1], example.answer),
    )


def _grouped(
    said: list[_Said], attribute: str, figures: Callable[[list[_Said]], T]
) -> dict[str, T]:
    groups: dict[str, list[_Said]] = defaultdict(list)
    for part in said:
        groups[getattr(part.example, attribute) or UNKNOWN].append(part)
    return {name: figures(group) for name, group in sorted(groups.items())}


def _reduction(whole: Recording | None, said: list[_Said]) -> Reduction | None:
    if whole is None:
        return None
    return Reduction(
        image_tokens=whole.config.vision.image_tokens,
        answers=_answers(said),
        flips=_flips(said),
        by_modality=_grouped(said, "modality", _flips),
        by_answer_type=_grouped(said, "answer_type", _flips),
    )


def _flips(said: list[_Said]) -> Flips:
    known = [part for part in said if part.example.answer]
    return Flips(
        Share.of(sum(not part.same for part in said), len(said)),
        lost=sum(part.reference_right and not part.candidate_right for part in known),
        gained=sum(part.candidate_right and not part.reference_right for part in known),
    )


def _answers(said: list[_Said]) -> Answers:
    agree = np.concatenate([part.tokens_agree for part in said])
    kl = np.concatenate([part.kl for part in said])
    return Answers(
        n=len(said),
        answer_agreement=Share.of(sum(part.same for part in said), len(said)),
        token_agreement=Share.of(int(agree.sum()), len(agree)),
        kl=Divergence(float(kl.mean()), float(np.quantile(kl, 0.99)), float(kl.max())),
        accuracy=_accuracy([part for part in said if part.example.answer]),
    )


def _accuracy(said: list[_Said]) -> Accuracy | None:
    if not said:
        return None
    reference = np.array([part.reference_right for part in said], np.float64)
    candidate = np.array([part.candidate_right for part in said], np.float64)
    difference = candidate - reference
    return Accuracy(
        n=len(said),
        reference=float(reference.mean()),
        candidate=float(candidate.mean()),
        difference=float(difference.mean()),
        interval=bootstrap_interval(difference, [owner_of(part.example) for part in said]),
    )
