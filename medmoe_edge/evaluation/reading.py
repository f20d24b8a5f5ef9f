"""A model over images and questions, with what it computes on the way open to view."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmoe_edge.errors import InputError
from medmoe_edge.image.loading import Image, preprocess
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Cache, Floats, Runtime


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
        self.finite = True

    def view(self, image: Image, questions: Sequence[list[int]]) -> View:
        """Prefill an image, with room for the longest of its questions and its answer."""
        pixels = preprocess(image, self.runtime.config.vision)
        features = self._checked(self.runtime.encode_image(pixels))
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
        logits, router_logits = self._ask(view, question)
        tokens, rows = self._greedy(logits, view.cache, self.limit)
        return Reply(tokens, np.stack(rows), router_logits)

    def follow(self, view: View, question: list[int], answer: Sequence[int]) -> Reply:
        """Be led along `answer` `[P]`, whatever the model itself would have said.

        The logits are those along `answer`; the tokens are the model's own greedy answer.
        """
        logits, router_logits = self._ask(view, question)
        rows = [logits, *(self._next(token, view.cache) for token in answer[:-1])]
        own = tuple(answer)
        for place, (token, row) in enumerate(zip(answer, rows, strict=True)):
            if row.argmax() != token:  # from here on it goes its own way
                view.cache.length = view.length + len(question) + place
                own = own[:place] + self._greedy(row, view.cache, self.limit - place)[0]
                break
        return Reply(own, np.stack(rows), router_logits)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer that tokens spell."""
        end = self.runtime.config.decoder.eos_token_id
        return self.tokenizer.decode([token for token in tokens if token != end])

    def _ask(self, view: View, question: list[int]) -> tuple[Floats, Floats]:
        view.cache.length = view.length  # forget the question before
        step = self.runtime.step(self.runtime.embed(question), view.cache)
        return self._checked(step.logits), self._checked(step.router_logits)

    def _greedy(
        self, logits: Floats, cache: Cache, limit: int
    ) -> tuple[tuple[int, ...], list[Floats]]:
        tokens, rows = [int(logits.argmax())], [logits]
        while tokens[-1] != self.runtime.config.decoder.eos_token_id and len(tokens) < limit:
            rows.append(self._next(tokens[-1], cache))
            tokens.append(int(rows[-1].argmax()))
        return tuple(tokens), rows

    def _next(self, token: int, cache: Cache) -> Floats:
        return self._checked(self.runtime.step(self.runtime.embed([token]), cache).logits)

    def _checked(self, values: Floats) -> Floats:
        if np.isfinite(values).all():
            return values
        self.finite = False
        return np.zeros_like(values)
