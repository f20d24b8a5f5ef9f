"""One request's routing, as the pager of a model hears of it: expected, then seen."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.runtimes.base import Floats
from medmoe_edge.runtimes.paging.pager import PagedExperts
from medmoe_edge.runtimes.paging.profile import RoutingPrediction
from medmoe_edge.runtimes.paging.report import paging_report
from medmoe_edge.runtimes.paging.store import Counts, Expert

LEAST_SHARE = 0.01  # of a layer's tokens, below which an expert is not read ahead
Ahead = Literal["expected", "all", "none"]


class RequestRouting:
    """Tells a pager which experts the request is expected to use, and reports what came of it.

    A request begins with its image; until the first one the calibration's mean is expected, and
    nothing of a bundle that was not calibrated. `ahead` says who is loaded before they are needed:
    those who are "expected" to get more than an equal share, layer by layer, "all" or "none".

    Of those expected to get less, the kernel reads the bytes ahead, no more. Loading them ahead too
    was measured on nano, at half the experts' bytes: each makes room of one that is needed as much,
    and takes a core from the vision tower or the prefill. Requests took 1.2 times as long.
    """

    def __init__(
        self, bundle: Bundle, experts: PagedExperts[Any], ahead: Ahead = "expected"
    ) -> None:
        assert bundle.config.moe is not None
        self._moe, self._experts, self._ahead = bundle.config.moe, experts, ahead
        self._prediction = RoutingPrediction.of(bundle)
        self._tokens = self._none()  # since the last report
        self._routed = self._none()  # since the image
        self._shares = np.zeros(self._tokens.shape, np.float32)  # predicted
        self._predicted: set[Expert] | None = None
        if self._prediction is not None:
            self._predict(self._prediction.unseen)
        elif ahead == "all":
            self._experts.prefetch(self._experts.store.sizes)

    def begin(self, image_tokens: Floats) -> None:
        """A request begins, about an image with these projected tokens `[N, D]`."""
        self._routed = self._none()
        if self._prediction is not None:
            self._predict(self._prediction.of_image(image_tokens))

    def expected(self) -> list[Expert]:
        """The experts that are predicted to get more than an equal share, best first, that fit."""
        return [e for e in self._experts.most_worth() if e in (self._predicted or ())]

    def ran(self, chosen: npt.NDArray[np.int64]) -> None:
        """The experts `[S, M, K]` of a step's tokens: what ran corrects what was predicted."""
        counts = (chosen[..., None] == np.arange(self._moe.num_experts)).sum((0, 2))  # [M, E]
        self._tokens += counts
        self._routed += counts
        routed = self._routed / np.maximum(self._routed.sum(-1, keepdims=True), 1)
        self._expect(self._shares + routed)

    def report(self, budget: int, counts: Counts) -> dict[str, Any]:
        """What ran since the last one or the image; what was expected of it is not loaded now."""
        if self._ahead != "all":
            self._experts.prefetch(())
        tokens, self._tokens = self._tokens, self._none()
        return paging_report(budget, counts, tokens, self._moe.layers, self._predicted)

    def _predict(self, shares: Floats) -> None:
        self._shares = shares
        self._expect(shares)
        above = np.argwhere(shares > 1 / self._moe.num_experts)
        self._predicted = {(int(layer), int(expert)) for layer, expert in above}
        if self._ahead == "none":
            return
        others = self._experts.store.sizes if self._ahead == "all" else ()
        self._experts.prefetch(dict.fromkeys((*sorted(self.expected()), *others)))
        some = np.argwhere(shares > LEAST_SHARE)
        self._experts.announce((int(layer), int(expert)) for layer, expert in some)

    def _expect(self, shares: Floats) -> None:
        """Say what share of each layer's tokens the experts will get, `[M, E]`."""
        self._experts.expect({(int(m), int(e)): float(p) for (m, e), p in np.ndenumerate(shares)})

    def _none(self) -> npt.NDArray[np.int64]:
        return np.zeros((len(self._moe.layers), self._moe.num_experts), np.int64)
