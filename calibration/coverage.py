"""The expert coverage contract: no expert is calibrated on tokens that it never sees in use.

Every (layer, expert) needs `floor` routed tokens, and some of its own modality where
`MoEConfig.expert_names` says which that is. One that is short

1. draws more samples from the modalities that feed it, at most `EXTRA_ROUNDS` times;
2. borrows the tokens nearest to being its own (`Neighbours`), weighted down, at most
   half its floor, if it has seen its own modality;
3. or else is quantised data-free, alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.errors import DataError, Told, VerificationError

Status = Literal["covered", "drew more", "borrowed", "data-free"]
Pair = tuple[int, int]  # decoder layer and expert
MINIMUM_TOKENS = 256
HESSIAN_MULTIPLE = 2  # tokens per input channel: fewer leave the Hessian far from its mean
EXTRA_ROUNDS = 2


@dataclass(frozen=True)
class ExpertCoverage(Told):
    """What one expert saw; `own_modality_tokens` is None where its modality is not known."""

    layer: int
    expert: int
    tokens: int
    needed: int
    own_modality_tokens: int | None
    borrowed: int = 0
    status: Status = "covered"

    @property
    def pair(self) -> Pair:
        """Decoder layer and expert."""
        return self.layer, self.expert

    @property
    def short(self) -> bool:
        """Whether the contract is not met."""
        return self.tokens + self.borrowed < self.needed or self.own_modality_tokens == 0

    @property
    def may_borrow(self) -> int:
        """Tokens that would fill it up; 0 where borrowing is not allowed or would not help."""
        missing = self.needed - self.tokens
        allowed = self.own_modality_tokens != 0 and missing <= self.needed // 2
        return max(missing, 0) if allowed else 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ExpertCoverage":
        """Read what `to_json` gave; raises `DataError` for anything else."""
        if not isinstance(data, Mapping) or set(data) != {field.name for field in fields(cls)}:
            raise DataError("A coverage record is malformed.", "Calibrate again.")
        return cls(**data)


def floor(width: int, *, hessians: bool, multiple: float = HESSIAN_MULTIPLE) -> int:
    """Routed tokens that an expert with inputs of `width` channels needs."""
    return max(MINIMUM_TOKENS, math.ceil(multiple * width)) if hessians else MINIMUM_TOKENS


def assess(
    profile: RoutingProfile, expert_names: Sequence[str], needed: int
) -> tuple[ExpertCoverage, ...]:
    """How every (layer, expert) stands; the contract's shortfalls are those that are `short`."""
    own = [profile.of(name)[0] for name in expert_names]
    return tuple(
        ExpertCoverage(
            layer,
            expert,
            int(profile.tokens[row, expert].sum()),
            needed,
            int(own[expert][row, expert]) if own else None,
        )
        for row, layer in enumerate(profile.layers)
        for expert in range(profile.experts)
    )


def samples_to_draw(
    shortfalls: Sequence[ExpertCoverage], profile: RoutingProfile, expert_names: Sequence[str]
) -> dict[str, int]:
    """How many more samples of which modality would fill the shortfalls, by the profile so far.

    Each expert asks its own modality and, if it lacks tokens, the one that sends it most per
    request.
    """
    wanted: dict[str, int] = {}
    for short in shortfalls:
        row = profile.layers.index(short.layer)
        rates = {
            name: float(tokens[row, short.expert]) / max(requests, 1)
            for name in profile.modalities
            for tokens, requests in [profile.of(name)]
        }  # tokens per request: P(expert | modality) times the tokens of a request
        feeders: set[str] = set()
        if short.tokens < short.needed and any(rates.values()):
            feeders.add(max(rates, key=lambda name: rates[name]))
        own = expert_names[short.expert] if expert_names else None
        if own is not None and (short.own_modality_tokens == 0 or rates.get(own, 0) > 0):
            feeders.add(own)
        missing = max(short.needed - short.tokens, 1)
        for name in feeders:
            count = math.ceil(missing / len(feeders) / max(rates.get(name, 0.0), 1.0))
            wanted[name] = max(wanted.get(name, 0), count)
    return wanted


def settle(
    first: Sequence[ExpertCoverage],
    last: Sequence[ExpertCoverage],
    borrowed: Mapping[Pair, int],
) -> tuple[ExpertCoverage, ...]:
    """The final records, from those before and after drawing more and from what was borrowed."""
    return tuple(
        _settled(before, replace(after, borrowed=borrowed.get(after.pair, 0)))
        for before, after in zip(first, last, strict=True)
    )


def _settled(before: ExpertCoverage, after: ExpertCoverage) -> ExpertCoverage:
    if after.short:
        return replace(after, status="data-free")
    if after.borrowed:
        return replace(after, status="borrowed")
    return replace(after, status="drew more" if before.short else "covered")


def check_covered(coverage: Sequence[ExpertCoverage], expert_names: Sequence[str]) -> None:
    """Raise `VerificationError` for experts that had to borrow tokens or go data-free."""
    made_do = [record for record in coverage if record.status in ("borrowed", "data-free")]
    if made_do:
        raise refusal(made_do, expert_names)


def refusal(shortfalls: Sequence[ExpertCoverage], expert_names: Sequence[str]) -> VerificationError:
    """The error that names the experts which broke the contract under `--strict`."""
    named = "; ".join(shown(short, expert_names) for short in shortfalls)
    return VerificationError(
        f"Calibration did not reach every expert: {named}.",
        "Give more images of these modalities, or leave --strict out.",
    )


def shown(record: ExpertCoverage, expert_names: Sequence[str]) -> str:
    """One expert and what it saw, for people."""
    name = f"{expert_names[record.expert]} " if expert_names else ""
    lack = ", none of its own modality" if record.own_modality_tokens == 0 else ""
    return (
        f"layer {record.layer} {name}(expert {record.expert}: "
        f"{record.tokens} of {record.needed} tokens{lack})"
    )


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
