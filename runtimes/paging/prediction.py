"""Which experts a request will need, as an image's router scores tell; and how that came true.

Calibration counted, for each modality, the tokens that every expert got (`RoutingProfile`). The
image's tokens, as the projector gives them, are put before the first router: that costs one small
product and comes before the decoder starts, though attention has not mixed them yet. The modality
whose shares in that layer are nearest to theirs stands for the image, and its profile for what all
layers will do. On nano the expert that it names first gets 66% of a request's tokens, two get 84%
(the best possible: 71 and 87%; a mean over modalities: 36 and 61%); weighing all modalities by
their likelihood, or asking for the modality of the strongest expert's name, is no better.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.recorded import float_weights
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.errors import InputError
from medmoe_edge.runtimes.paging.pager import Counts, Expert, PagedExperts


@dataclass(frozen=True, eq=False)
class RoutingPrediction:
    """Predicts shares `[M, E]` of each layer's tokens that its experts get.

    `shares` `[modalities, M, E]` are the profile's, `prior` `[modalities]` how often each came.
    """

    shares: Floats
    prior: Floats
    norm: tuple[Floats, Floats | None]
    norm_eps: float
    router: tuple[Floats, Floats]
    rows: tuple[int, ...] | None = None  # of the router, where experts were left out

    @classmethod
    def of(cls, bundle: Bundle) -> "RoutingPrediction | None":
        """From the profile in the manifest and the first router; None of an uncalibrated bundle."""
        calibration = bundle.manifest.get("calibration") or {}
        config = bundle.config
        if config.moe is None or "routing" not in calibration:
            return None
        profile = RoutingProfile.from_json(calibration["routing"])
        if profile.layers != config.moe_layers or not profile.requests.sum():
            return None
        shares = np.stack([profile.probability(name) for name in profile.modalities])
        prior = np.asarray(profile.requests / profile.requests.sum(), np.float32)
        return cls(shares, prior, *_first_router(bundle), rows=config.moe.own_rows)

    @property
    def unseen(self) -> Floats:
        """Shares `[M, E]` of an image that was not looked at yet."""
        return np.asarray(np.tensordot(self.prior, self.shares, 1), np.float32)

    def of_image(self, tokens: Floats) -> Floats:
        """Shares `[M, E]` for the projected tokens `[N, D]` of an image."""
        weight, bias = self.norm
        if bias is not None:  # LayerNorm; without a bias it is RMSNorm
            tokens = tokens - tokens.mean(-1, keepdims=True)
        square = np.square(tokens).mean(-1, keepdims=True)
        normed = tokens / np.sqrt(square + self.norm_eps) * weight
        if bias is not None:
            normed = normed + bias
        matrix, offset = self.router
        logits = normed @ matrix + offset
        if self.rows is not None:
            logits = logits[:, list(self.rows)]
        chosen = logits.argmax(-1)
        seen = np.bincount(chosen, minlength=self.shares.shape[-1]) / len(tokens)
        nearest = np.square(self.shares[:, 0] - seen).sum(-1).argmin()
        return np.asarray(self.shares[nearest])


def _first_router(
    bundle: Bundle,
) -> tuple[tuple[Floats, Floats | None], float, tuple[Floats, Floats]]:
    """The norm before the first router, and the router `[D, E]` with its bias `[E]`."""
    config = bundle.config
    own = f"decoder.layers.{config.moe_layers[0]}."
    norm = f"{own}{'input_norm' if config.decoder.parallel else 'post_norm'}."
    names = [f"{norm}weight", f"{norm}bias", f"{own}ffn.router.weight", f"{own}ffn.router.bias"]
    found: dict[str, Any] = {
        name: np.array(values, np.float32)
        for name, values in float_weights(bundle.path("decoder.onnx"))
        if name in names
    }
    weight, bias, matrix, offset = (found.get(name) for name in names)
    experts = there(config.moe).router_rows
    zeros = np.zeros(experts, np.float32)
    router = there(matrix).reshape(-1, experts), zeros if offset is None else offset
    return (there(weight), bias), config.decoder.norm_eps, router


UNITS: dict[str, int] = {
    **{unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb"))},
    **{unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib"), 1)},
}
FORM = re.compile(r"(\d{1,999}(?:\.\d{1,999})?) ?(%|[a-z]+)", re.ASCII | re.IGNORECASE)


def budget_bytes(text: str, experts: int) -> int:
    """The budget in bytes, for a model whose routed experts take `experts` bytes in memory.

    Raises `InputError` for what is no budget.
    """
    found = FORM.fullmatch(text.strip())
    unit = found[2].lower() if found else ""
    if found is None or (unit != "%" and unit not in UNITS):
        raise InputError(
            f"{text!r} is no memory budget.",
            "Write bytes, as 1500MB or 2GiB, or a share of all experts, as 50%.",
        )
    whole = Fraction(experts, 100) if unit == "%" else UNITS[unit]
    return math.floor(Fraction(found[1]) * whole)


Tokens = npt.NDArray[np.int64]


def paging_report(
    budget: int,
    counts: Counts,
    tokens: Tokens,
    layers: Iterable[int],
    predicted: set[Expert] | None,
) -> dict[str, Any]:
    """The `paging` of an answer, plain JSON values.

    `tokens` `[M, E]` counts the tokens that each expert of the decoder's `layers` got. `experts`
    are those that ran, by layer; see `Counts` for hits, late, misses and stall. `prediction` is
    None where nothing was predicted.
    """
    ran = {(int(row), int(expert)) for row, expert in np.argwhere(tokens)}
    return {
        "budget": budget,
        "experts": {
            str(layer): [int(expert) for expert in np.flatnonzero(row)]
            for layer, row in zip(layers, tokens, strict=True)
        },
        "hits": counts.hits,
        "late": counts.late,
        "misses": counts.misses,
        "loads": counts.loads,
        "bytes_read": counts.bytes_read,
        "stall": counts.stall,
        "prediction": None if predicted is None else _quality(predicted, ran, tokens),
    }


def _quality(predicted: set[Expert], ran: set[Expert], tokens: Tokens) -> dict[str, float]:
    """How good it was to expect the experts `predicted`, and how good that is by chance.

    `precision` is the share of them that ran, and `chance` what as many drawn blindly would reach,
    which with four experts to a layer is a lot; `recall` the share of those that ran; `tokens` the
    share of routed tokens that they got, `tokens_chance` as above. `gain` is `tokens` over that.
    """
    right = len(predicted & ran)
    share = sum(int(tokens[expert]) for expert in predicted) / max(int(tokens.sum()), 1)
    chance = len(predicted) / tokens.size
    return {
        "precision": right / max(len(predicted), 1),
        "recall": right / max(len(ran), 1),
        "chance": len(ran) / tokens.size,
        "tokens": share,
        "tokens_chance": chance,
        "gain": share / chance if chance else 0.0,
    }


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
        self._moe, self._experts, self._ahead = there(bundle.config.moe), experts, ahead
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
