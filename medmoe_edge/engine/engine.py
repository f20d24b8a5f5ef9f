"""ask(): an image and questions in, answers out, over any runtime; and where the time went."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.config import Confidence, Device, RuntimeName, is_yes_and_no
from medmoe_edge.engine.answer import (
    Answer,
    Asked,
    Choices,
    Clock,
    Draft,
    doubts,
    other_modality,
    reasons,
    timings,
)
from medmoe_edge.engine.loading import (
    REFERENCE,
    MemoryChoice,
    OneAtATime,
    Paging,
    Proven,
    describe,
    open_model,
)
from medmoe_edge.engine.prefix_cache import LastPrefix, Prefix, PrefixCache, cache_folder
from medmoe_edge.errors import InputError, MedMoEError, Notice, check_all
from medmoe_edge.image.inputs import ImageLike, as_image
from medmoe_edge.image.loading import preprocess, seen_picture
from medmoe_edge.image.pixels import Pixels, unlike_label
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import (
    Cache,
    Decoding,
    Paged,
    Runtime,
    Step,
    Warns,
    chosen_experts,
    greedy,
    log_probability,
    log_softmax,
    own_logits,
)
from medmoe_edge.runtimes.paging.pager import Budget

Counts = npt.NDArray[np.int64]
Range = tuple[float, float]
MAX_NEW_TOKENS = 32
ROOM = 64  # positions, whole multiples of which are kept free behind a prefix


def load(
    model: str | os.PathLike[str] = "nano",
    *,
    runtime: RuntimeName = "auto",
    device: Device = "auto",
    memory_budget: Budget | None = None,
    drop_pages: bool = False,
    prefix_cache: str | os.PathLike[str] | None = None,
    allow_repetition: bool = False,
) -> "Engine":
    """Load a Med-MoE to ask; arguments and errors are those of `medmoe_edge.load`."""
    folder = None if prefix_cache is None else cache_folder(prefix_cache)
    paging = Paging(memory_budget, drop_pages)
    loaded = open_model(model, runtime, device, paging, keeps_prefixes=folder is not None)
    kept = None if folder is None else PrefixCache(folder, loaded.sha256, loaded.runtime)
    return Engine(**loaded._asdict(), prefixes=kept, allow_repetition=allow_repetition)


class Engine(OneAtATime):
    """A loaded model that answers questions about images.

    Every method may be called from any thread; requests are computed one at a time. `with` closes
    it, which gives its memory back.

    `proven` is what is known of a bundle's fidelity, None of a checkpoint; `verification` says it
    in a word: "passed", "not decided", "failed" or "not measured", of a checkpoint "reference".
    `warnings` are of the model, and part of every answer's. `thresholds` say by its code how likely
    a refusal must be to count (`answer.REFUSED` where nothing does); `fitted` makes an answer's
    confidence of its probability, and without it the one is the other. An answer ends where it
    begins to repeat itself, unless `allow_repetition`: see `runtimes.base.looping`. `memory` is
    what a memory budget of "auto" came to, else None.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        name: str,
        sha256: str,
        proven: Proven | None = None,
        prefixes: LastPrefix | None = None,
        warnings: tuple[Notice, ...] = (),
        thresholds: Mapping[str, float] | None = None,
        fitted: Confidence | None = None,
        memory: MemoryChoice | None = None,
        *,
        allow_repetition: bool = False,
    ) -> None:
        super().__init__()
        self.runtime: Runtime = runtime
        self.tokenizer, self.prefixes = tokenizer, prefixes
        self.name, self.sha256, self.proven = name, sha256, proven
        self.verification: str = proven.status if proven else REFERENCE
        self.config = runtime.config
        of_runtime = runtime.warnings if isinstance(runtime, Warns) else ()
        self.warnings = (*warnings, *tokenizer.warnings, *of_runtime)
        tokenizer.check_vocabulary(self.config.decoder.vocab_size)
        self.decoding = Decoding.of(self.config, tokenizer, allow_repetition=allow_repetition)
        self.thresholds, self.fitted = thresholds or {}, fitted
        self.memory = memory

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The modality each expert serves, in order; empty where that is not known."""
        return self.config.moe.expert_names if self.config.moe else ()

    def ask(
        self,
        image: ImageLike,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        choices: Choices | None = None,
        frame: int | None = None,
        value_range: Range | None = None,
    ) -> Answer:
        """Answer one question.

        Args:
            image: A path, bytes, a file opened for bytes, a PIL image, a NumPy array `[H, W]` or
                `[H, W, 3]`, a pydicom `Dataset`, a NIfTI image of nibabel, or an `Image`.
            question: At most 10,000 characters.
            max_new_tokens: The longest answer, in tokens.
            choices: The answers that may be given, such as `["yes", "no"]`: the likeliest is
                the text, and `probabilities` has them all. None: any answer.
            frame: Which frame or slice of several, from 0; None is the middle one.
            value_range: Of an array, the values shown black and white; needed unless it is uint8,
                or grey uint16, which is shown as a 16-bit PNG is.

        Returns:
            The answer; the same input gives the same one.

        Raises:
            InputError: The image, the question or a choice cannot be used, or the engine is closed.
            ModelError: The model computed NaN or infinite values.
        """
        if not isinstance(question, str):
            raise InputError("question is not one text.", "For several, use ask_all.")
        return self.ask_all(
            image,
            [question],
            max_new_tokens=max_new_tokens,
            choices=choices,
            frame=frame,
            value_range=value_range,
        )[0]

    def ask_all(
        self,
        image: ImageLike,
        questions: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        choices: Choices | None = None,
        frame: int | None = None,
        value_range: Range | None = None,
    ) -> list[Answer]:
        """Answer several questions, each by itself; the image is processed once for all.

        Args:
            image: As of `ask`.
            questions: Any number, in a list.
            max_new_tokens: The longest answer to each, in tokens.
            choices: As of `ask`, for every question; or by question, in a mapping.
            frame: As of `ask`.
            value_range: As of `ask`.

        Returns:
            One answer for each question, in their order.

        Raises:
            InputError: The image, a question or a choice cannot be used, or the engine is closed.
            ModelError: The model computed NaN or infinite values.
        """
        told = self.ask_stream(
            image,
            questions,
            max_new_tokens=max_new_tokens,
            choices=choices,
            frame=frame,
            value_range=value_range,
        )
        return [item for item in told if isinstance(item, Answer)]

    def ask_images(
        self,
        images: Iterable[ImageLike],
        questions: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        choices: Choices | None = None,
        value_range: Range | None = None,
    ) -> list[list[Answer]]:
        """Answer the same questions about several images, of which one is in memory at a time.

        Args:
            images: Any number, each as of `ask`.
            questions: As of `ask_all`.
            max_new_tokens: The longest answer to each, in tokens.
            choices: As of `ask`, for every question; or by question, in a mapping.
            value_range: As of `ask`, the same for all.

        Returns:
            For each image in its turn, one answer for each question.

        Raises:
            InputError: An image (it says which, from 1), a question or a choice cannot be used.
            ModelError: The model computed NaN or infinite values.
        """
        if isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Iterable):
            raise InputError("images is one image, and a list is meant.", "Write [image].")
        found = []
        for number, image in enumerate(images, start=1):
            try:
                answers = self.ask_all(
                    image,
                    questions,
                    max_new_tokens=max_new_tokens,
                    choices=choices,
                    value_range=value_range,
                )
            except MedMoEError as error:
                error.what = f"Image {number}: {error.what}"
                error.args = (f"{error.what} {error.remedy}",)
                raise
            found.append(answers)
        return found

    async def ask_async(
        self,
        image: ImageLike,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        choices: Choices | None = None,
        frame: int | None = None,
        value_range: Range | None = None,
    ) -> Answer:
        """Answer one question in another thread, so that the event loop goes on meanwhile.

        Requests to one engine are computed one after the other. One that is cancelled is computed
        to its end, and its answer dropped.

        Args:
            image: As of `ask`, like all others and the errors.
            question: One text.
        """
        import asyncio  # which asking without it need not pay for

        return await asyncio.to_thread(
            self.ask,
            image,
            question,
            max_new_tokens=max_new_tokens,
            choices=choices,
            frame=frame,
            value_range=value_range,
        )

    def ask_stream(
        self,
        image: ImageLike,
        questions: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        choices: Choices | None = None,
        frame: int | None = None,
        value_range: Range | None = None,
        alternatives: int | None = None,
    ) -> Iterator[str | Answer]:
        """Answer several questions, telling each answer while it is made.

        Nothing is computed ahead: who stops iterating stops the model. Other requests wait until
        the iterator has ended or is closed.

        Args:
            image: As of `ask`.
            questions: Any number, in a list.
            max_new_tokens: The longest answer to each, in tokens.
            choices: As of `ask`, for every question; or by question, in a mapping.
            frame: As of `ask`.
            value_range: As of `ask`.
            alternatives: Tell each token with its log-probability, and so many of the most likely
                ones at its place: every piece of a token is then a `Piece`.

        Yields:
            For each question in turn, pieces of the answer's text, one for each token, some of them
            empty, and then the `Answer`; joined, the pieces are its text.

        Raises:
            InputError: The image, a question or a choice cannot be used, or the engine is closed.
            ModelError: The model computed NaN or infinite values.
        """
        if isinstance(questions, str) or not isinstance(questions, Iterable):
            raise InputError(
                "questions is one text, and a list is meant.", "Write [question], or use ask."
            )
        check_all(max_new_tokens=(max_new_tokens, int), alternatives=(alternatives, int | None))
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}.", "Allow at least one.")
        questions = list(questions)
        if isinstance(choices, Mapping) and (stray := [q for q in choices if q not in questions]):
            raise InputError(
                f"There are choices for {min(map(str, stray))!r}, which is no question here.",
                'A mapping is by question: {question: ["yes", "no"]}.',
            )
        with self.one_at_a_time():
            asked = [Asked.of(question, choices, self.tokenizer) for question in questions]
            room = max((each.positions(max_new_tokens) for each in asked), default=max_new_tokens)
            prefix = self._prefill(image, frame, room, value_range)
            for index, each in enumerate(asked):
                yield from self._answer(
                    *(each, prefix, max_new_tokens), first=index == 0, alternatives=alternatives
                )

    def seen(
        self,
        image: ImageLike,
        *,
        frame: int | None = None,
        value_range: Range | None = None,
    ) -> Pixels:
        """Exactly what the model sees of an image, as a picture `[S, S, 3]` of S x S pixels.

        It is what enters the vision tower, before its values are normalised: decoded, in the
        file's window, padded or cropped to a square and scaled to the model's resolution.

        Args:
            image: As of `ask`.
            frame: Which one of several the file holds, from 0.
            value_range: The values of an array that are black and white.

        Raises:
            ImageError: The image cannot be read.
        """
        return seen_picture(
            as_image(image, frame=frame, value_range=value_range), self.config.vision
        ).pixels

    def prompt_tokens(self, question: str) -> int:
        """Count the tokens of a prompt.

        Returns:
            The positions that an image and this question take in the KV cache.

        Raises:
            InputError: The question cannot be used.
        """
        before, after = self.tokenizer.prefix_ids(), self.tokenizer.question_ids(question)
        return len(before) + self.config.vision.image_tokens + len(after)

    def modality(
        self,
        image: ImageLike,
        *,
        frame: int | None = None,
        value_range: Range | None = None,
    ) -> str | None:
        """Read an image's modality by the router, without a question.

        Returns:
            One of `expert_names`, or of the modalities whose experts were left out; None where
            these are unknown.

        Raises:
            InputError: The image cannot be used.
        """
        with self.one_at_a_time():
            return self._prefill(image, frame, 0, value_range).modality

    def _release(self) -> None:
        super()._release()
        self.prefixes = None

    def _prefill(
        self, image: ImageLike, frame: int | None, room: int, value_range: Range | None
    ) -> Prefix:
        ids = self.tokenizer.prefix_ids()
        length = len(ids) + self.config.vision.image_tokens
        self._check_length(length + room)
        if self.prefixes is not None:  # a longer question about the image may follow
            most = self.config.decoder.max_positions - length
            room = min(-(-room // ROOM) * ROOM, most)
        clock = Clock()
        picture = as_image(image, frame=frame, value_range=value_range)
        pixels = preprocess(picture, self.config.vision)
        clock.lap("image")
        if self.prefixes is None:
            prefix = self._compute(pixels, ids, length + room, clock)
        else:
            prefix = self._fetch(self.prefixes, pixels, ids, length + room, clock)
        clock.lap("prefix")
        other = other_modality(self.config.moe, prefix.modality)
        found = (*other, *picture.notices, *unlike_label(picture.labels, prefix.modality))
        return replace(prefix, seconds={"vision": 0.0, **clock.laps}, warnings=found)

    def _compute(self, pixels: Floats, ids: list[int], capacity: int, clock: Clock) -> Prefix:
        image_tokens = self.runtime.encode_image(pixels)
        self._check_finite(image_tokens)
        clock.lap("vision")
        embeds = np.concatenate((self.runtime.embed(ids), image_tokens))
        cache = self.runtime.new_cache(capacity)
        step = self._step(embeds, cache)
        modality = self._modality(step.router_logits[len(ids) :])
        return Prefix(cache, cache.length, modality, self._chosen([step.router_logits]))

    def _fetch(
        self, prefixes: LastPrefix, pixels: Floats, ids: list[int], capacity: int, clock: Clock
    ) -> Prefix:
        key = prefixes.key(pixels, ids)
        length = len(ids) + self.config.vision.image_tokens
        prefix = prefixes.find(key, length, capacity)
        if prefix is None:
            prefix = self._compute(pixels, ids, capacity, clock)
            prefixes.keep(key, prefix)
        return prefix

    def _answer(
        self, asked: Asked, prefix: Prefix, limit: int, *, first: bool, alternatives: int | None
    ) -> Iterator[str | Answer]:
        clock = Clock()
        cache = prefix.cache
        cache.length = prefix.length  # forget the question before
        first_step = self._step(self.runtime.embed(asked.ids), cache)
        clock.lap("question")
        refused = self._refused(first_step)
        routed = [first_step.router_logits]
        draft = Draft(self.tokenizer, self.decoding, alternatives)
        probabilities = None
        if asked.choices:
            score = partial(self._score, first_step, cache)
            probabilities, steps = draft.choose(asked.choices, score)
            if self.fitted is not None:
                probabilities = self.fitted.among(probabilities)
            routed += [step.router_logits for step in steps]
        else:
            take = partial(self._next, cache)
            for chosen in greedy(first_step, take, self.decoding, limit=limit):
                if chosen.step is not first_step:
                    routed.append(chosen.step.router_logits)
                yield from draft.take(chosen)
        clock.lap("decode")
        yield draft.rest()
        confidence, known = self._confidence(draft, probabilities, refused)
        enough = self.fitted is None or not known or confidence >= self.fitted.threshold
        doubted = doubts(refused, self.thresholds, draft, enough=enough)
        warnings = (*doubted, *self.warnings, *prefix.warnings)
        yield Answer(
            question=asked.question,
            text=draft.text,
            confidence=confidence,
            confidence_kind="calibrated" if known else "raw",
            modality=prefix.modality,
            experts=self._shares(prefix.experts + self._chosen(routed)),
            timings=timings(
                prefix.seconds, clock.laps, len(draft.tokens), first=first, reused=prefix.reused
            ),
            model=describe(self.name, self.sha256, self.proven, self.runtime.name),
            complete=draft.stopped == "end",
            paging=self.runtime.paging() if isinstance(self.runtime, Paged) else None,
            warnings=warnings,
            unsure=bool(reasons(warnings)),
            stopped=None if draft.stopped == "end" else draft.stopped,
            refusals=refused,
            probabilities=probabilities,
        )

    def _confidence(
        self, draft: Draft, among: Mapping[str, float] | None, refused: Mapping[str, float]
    ) -> tuple[float, bool]:
        """An answer's confidence, and whether that is the chance that it is right."""
        if among is not None:  # one of the choices is right, as far as there is an answer
            known = self.fitted is not None and is_yes_and_no(among)
            return among[draft.text] * max(1 - sum(refused.values()), 0.0), known
        probability = math.exp(draft.log_probability)
        if self.fitted is None:
            return probability, False
        return self.fitted.chance(draft.text, probability), True

    def _score(self, step: Step, cache: Cache, tokens: list[int]) -> tuple[float, list[Step]]:
        """The log-probability of these tokens and an end, from the question's step on."""
        start, take = cache.length, partial(self._next, cache)
        found = log_probability(step, take, tokens, self.decoding.ends)
        cache.length = start
        return found

    def _next(self, cache: Cache, token: int) -> Step:
        return self._step(self.runtime.embed([token]), cache)

    def _refused(self, step: Step) -> dict[str, float]:
        """How likely each refusal is in the place of an answer, by its code."""
        if not self.decoding.never:
            return {}
        likely = np.exp(log_softmax(step.logits)[list(self.decoding.never)])
        return dict(zip(self.config.codes, map(float, likely), strict=True))

    def _step(self, embeds: Floats, cache: Cache) -> Step:
        step = self.runtime.step(embeds, cache)
        self._check_finite(step.logits, step.router_logits)
        return step._replace(logits=self.tokenizer.only_tokens(step.logits))

    def _check_finite(self, *arrays: Floats) -> None:
        if not all(np.isfinite(array).all() for array in arrays):
            raise self.not_finite()

    def _check_length(self, positions: int) -> None:
        limit = self.config.decoder.max_positions
        if positions > limit:
            raise InputError(
                f"Image, question and answer need {positions} positions, the model has {limit}.",
                "Ask a shorter question or allow fewer new tokens.",
            )

    def _modality(self, image_logits: Floats) -> str | None:
        names = self.config.moe.modalities if self.config.moe else ()
        return names[int(image_logits.mean((0, 1)).argmax())] if names else None

    def _chosen(self, routed: Sequence[Floats]) -> Counts:
        """How often each expert was chosen in the steps of these router logits; `[E]`."""
        if self.config.moe is None:
            return np.zeros(0, np.int64)
        own = own_logits(np.concatenate(routed), self.config.moe)
        chosen = chosen_experts(own, self.config.moe.top_k)
        return np.bincount(chosen.ravel(), minlength=self.config.moe.num_experts)

    def _shares(self, counts: Counts) -> dict[str, float]:
        names = self.expert_names or tuple(f"expert-{index}" for index in range(len(counts)))
        total = max(int(counts.sum()), 1)
        return {name: int(count) / total for name, count in zip(names, counts, strict=True)}
