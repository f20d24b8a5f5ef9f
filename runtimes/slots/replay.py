"""Whole steps over expert slots, replayed until every expert that they chose was there.

A step is run with a table of the experts present (`slots.py`). Afterwards the experts that it chose
are compared with the table. One that was absent is a fault: the step is run again with it. That is
harmless, for a step writes the same cache positions again, and the cache's length counts it only
when it was right.

Why that ends. Say the first fault is in layer f. All layers before had their experts, so the input
of layer f and its choice are those of a resident model. The next run holds what was chosen up to
layer f, so its first fault comes later: a step of M layers with experts runs at most M + 1 times.
What later layers chose on top of a fault is only a guess, but mostly a good one: it is fetched too,
as far as there is room.

Where the tokens of a step need more experts than there are slots, as a prefill may, the step is cut
to its longest beginning that needs no more, and goes on after it in the same way. A single token
needs at most M * k, which is the least number of slots. Tokens do not look ahead, so those that are
left choose as before, and the count of runs holds for a part too, unless rounding in another number
of rows tips a choice; then it holds from that cut on, and there are fewer cuts than tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import ResourceError
from medmoe_edge.runtimes.base import Cache, Step
from medmoe_edge.runtimes.paging.pager import Counts, Expert, ExpertFile
from medmoe_edge.runtimes.paging.prediction import RequestRouting, budget_bytes
from medmoe_edge.runtimes.slots.slots import ABSENT, ExpertSlots, SlotPools, Table, slot_count

Chosen = npt.NDArray[np.int64]  # [S, M, K]
Run = Callable[[Floats, Cache, Table], tuple[Step, Chosen]]
"""Runs `[S, D]` embeddings as `Runtime.step` does, and says which experts it chose.

Experts whose entry in the table is -1 may give anything.
"""


@dataclass
class ReplayCounts:
    """What it took to run steps.

    `runs` were made of the `parts` that steps were cut into. Of the experts that a part needed,
    `hits` were there in its first run and `faults` were not.
    """

    parts: int = 0
    runs: int = 0
    hits: int = 0
    faults: int = 0


class Replay:
    """Runs steps over slots, one at a time."""

    def __init__(self, slots: ExpertSlots, run: Run) -> None:
        self.slots, self._run = slots, run
        self.counts = ReplayCounts()

    def step(self, embeds: Floats, cache: Cache, expected: Sequence[Expert] = ()) -> "Replayed":
        """One step of a `Runtime`, which begins with the experts `expected`.

        Raises what fetching an expert raises; the cache is then as it was.
        """
        begin, steps, chosen = cache.length, [], []
        done, length = 0, len(embeds)
        try:
            while done < len(embeds):
                step, own = self._part(embeds[done : done + length], cache, expected)
                steps.append(step)
                chosen.append(own)
                done += len(own)
                # once cut, longer parts are tried with care: one that is too long costs a run
                length, expected = 2 * len(own), ()
        except BaseException:
            cache.length = begin
            raise
        routing = np.concatenate([step.router_logits for step in steps])
        return Replayed(Step(steps[-1].logits, routing), np.concatenate(chosen))

    def _part(self, embeds: Floats, cache: Cache, wanted: Sequence[Expert]) -> tuple[Step, Chosen]:
        """The step of the longest beginning of `embeds` whose experts fit into the slots."""
        begin, last, there = cache.length, -1, None
        while True:
            self.counts.runs += 1
            with self.slots.hold(wanted) as table:
                step, chosen = self._run(embeds, cache, table)
            there = table if there is None else there
            layer = first_fault(chosen, table)
            if layer is None:
                self._count(chosen, there)
                return step, chosen
            cache.length = begin
            length, wanted = next_try(chosen, layer, self.slots.shape[1], self.slots.count)
            if length < len(embeds):
                embeds, last = embeds[:length], -1
            elif layer > last:
                last = layer
            else:
                raise ResourceError(
                    "A step that was run again chose other experts than before.",
                    "This device does not compute the same twice: leave the memory budget out.",
                )

    def _count(self, chosen: Chosen, there: Table) -> None:
        needed = np.zeros(there.shape, np.bool_)
        needed[np.arange(len(there))[:, None], chosen] = True
        self.counts.parts += 1
        self.counts.hits += int((needed & (there != ABSENT)).sum())
        self.counts.faults += int((needed & (there == ABSENT)).sum())


class Replayed(NamedTuple):
    """A step, and the experts that its tokens chose, `[S, M, K]`."""

    step: Step
    chosen: Chosen


def first_fault(chosen: Chosen, table: Table) -> int | None:
    """The first layer that chose an expert which the table says was absent."""
    slots = table[np.arange(len(table))[:, None], chosen]  # [S, M, K]
    layers = np.flatnonzero((slots == ABSENT).any((0, 2)))
    return int(layers[0]) if len(layers) else None


def next_try(chosen: Chosen, layer: int, experts: int, room: int) -> tuple[int, list[Expert]]:
    """How many tokens to run again after a first fault in `layer`, and with which experts.

    The tokens are the most whose experts up to that layer fit into `room` slots. Those experts come
    first, then what the tokens seem to need in later layers, most tokens first.
    """
    uses = chosen[..., None] == np.arange(experts)  # [S, M, K, E]
    uses = uses.any(2)  # [S, M, E]
    first = np.where(uses.any(0), uses.argmax(0), len(uses))  # the first token to use each
    certain = _named(first[: layer + 1] < len(uses))
    certain.sort(key=lambda expert: first[expert])
    length = len(uses) if len(certain) <= room else int(first[certain[room]])
    tokens = uses[:length].sum(0)
    guesses = [expert for expert in _named(tokens > 0) if expert[0] > layer]
    guesses.sort(key=lambda expert: tokens[expert], reverse=True)
    return length, [*certain[:room], *guesses]


def _named(mask: npt.NDArray[np.bool_]) -> list[Expert]:
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(mask)]


class SlotRequests:
    """The slots of a bundle's experts in `pools`, and the steps that `run` makes over them.

    The budget is in bytes, or text: "1500MB", "50%". Raises `InputError` for one that is too small,
    `ResourceError` where the device has not as much, and `BundleError` for a bundle that cannot be
    paged.
    """

    def __init__(
        self, bundle: Bundle, file: ExpertFile, pools: SlotPools, budget: int | str, run: Run
    ) -> None:
        moe = bundle.config.moe
        assert moe is not None
        if isinstance(budget, str):
            budget = budget_bytes(budget, len(file.sizes) * pools.slot_bytes)
        count = slot_count(
            budget, pools.slot_bytes, len(file.sizes), least=len(moe.layers) * moe.top_k
        )
        self.slots = ExpertSlots(file, pools, count, (len(moe.layers), moe.num_experts))
        self.routing = RequestRouting(bundle, self.slots.experts)
        self.replay = Replay(self.slots, run)
        self._expected: Sequence[Expert] = ()

    def begin(self, encode_image: Callable[[Floats], Floats], pixels: Floats) -> Floats:
        """A request begins, about an image; returns its projected tokens `[N, D]`."""
        self.report()  # what came before belongs to no answer
        tokens = encode_image(pixels)
        self.routing.begin(tokens)
        self._expected = self.routing.expected()
        return tokens

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """A step of the runtime.

        Raises what reading an expert raises; the cache is then as it was.
        """
        step, chosen = self.replay.step(embeds, cache, self._expected)
        self._expected = ()
        self.routing.ran(chosen)
        return step

    def report(self) -> dict[str, Any]:
        """What ran since the last one or the image; fetches nothing more ahead.

        A miss is an expert for which a step was run again; `replays` counts these runs.
        """
        experts = self.slots.experts
        counts, experts.counts = experts.counts, Counts()
        replay, self.replay.counts = self.replay.counts, ReplayCounts()
        counts = replace(counts, hits=replay.hits, late=0, misses=replay.faults)
        report = self.routing.report(experts.pager.budget, counts)
        return {**report, "replays": replay.runs - replay.parts}
