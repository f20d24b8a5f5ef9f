"""Tokens that an expert may borrow: those which the router nearly sent to it."""

import torch
from torch import Tensor


class Neighbours:
    """The `count` tokens nearest to being `expert`'s, kept while a layer's tokens stream by.

    Nearest are, of the tokens that did not choose it, those to which the router gave it the
    highest probability; of equal ones, the earlier. A token weighs `p_expert / p_first choice`,
    above 0 and at most 1.
    """

    def __init__(self, expert: int, count: int) -> None:
        self.expert, self.count = expert, count
        self.tokens = torch.empty(0, 0)  # [n, D]
        self.weights = torch.empty(0)  # [n]
        self._probabilities = torch.empty(0)  # [n]

    def offer(self, tokens: Tensor, probabilities: Tensor, chosen: Tensor) -> None:
        """Consider tokens `[T, D]` with router probabilities `[T, E]` and choices `[T, K]`."""
        own = probabilities[:, self.expert]
        free = torch.where((chosen != self.expert).all(-1) & (own > 0))[0]
        best = torch.cat((self._probabilities, own[free])).argsort(descending=True, stable=True)
        best = best[: self.count]
        weights = own[free] / probabilities[free].amax(-1)
        known = self.tokens if len(self.tokens) else tokens[:0]
        self.tokens = torch.cat((known, tokens[free]))[best]
        self.weights = torch.cat((self.weights, weights))[best]
        self._probabilities = torch.cat((self._probabilities, own[free]))[best]
