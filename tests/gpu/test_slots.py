"""Expert slots and replay on the CPU's memory, with experts whose bytes tell who they are."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paging import PATIENCE, elsewhere, settle

from medmoe_edge._types import Floats
from medmoe_edge.errors import BundleError, InputError, ResourceError
from medmoe_edge.runtimes.base import Step
from medmoe_edge.runtimes.paging.pager import Bytes, Expert
from medmoe_edge.runtimes.slots.slots import (
    ABSENT,
    Chosen,
    CpuBuffer,
    CpuMemory,
    DeviceMemory,
    Event,
    ExpertSlots,
    Kind,
    Replay,
    SlotPools,
    Table,
    first_fault,
    next_try,
    slot_count,
)

BOTH = pytest.mark.parametrize("unified", [True, False])


class FakeSource:
    """Experts of eight bytes and more, all of one value."""

    def __init__(self, layers: int = 3, experts: int = 4) -> None:
        self.sizes = {(m, e): 8 + e for m in range(layers) for e in range(experts)}
        self.announced: list[Expert] = []
        self.log: list[Expert] = []
        self.broken: set[Expert] = set()

    def announce(self, experts: Iterable[Expert]) -> None:
        self.announced += experts

    def read(self, expert: Expert, *parts: Bytes) -> None:
        (into,) = parts
        if expert in self.broken:
            raise BundleError("damaged", "copy")
        self.log.append(expert)
        into[: self.sizes[expert]] = value(expert)


def value(expert: Expert) -> int:
    return 1 + 10 * expert[0] + expert[1]


class Copying(CpuMemory):
    """A memory of its own, whose copies can be held up or fail, and whose compute can last."""

    def __init__(self) -> None:
        super().__init__(unified=False)
        self.before: Callable[[], Any] = lambda: None
        self.interrupted = False
        self.computing = threading.Event()
        self.computing.set()

    def send(self, source: Bytes, address: int) -> Event:
        self.queue(self.before)
        event = super().send(source, address)
        return Interrupted() if self.interrupted else event

    def synchronise(self) -> None:
        assert self.computing.wait(PATIENCE)


class Interrupted:
    """Somebody pressed Ctrl-C while they waited."""

    def wait(self) -> None:
        raise KeyboardInterrupt


def slots_of(
    count: int, memory: DeviceMemory | None = None, source: FakeSource | None = None
) -> ExpertSlots:
    source = source or FakeSource()
    size = max(source.sizes.values())
    pools = SlotPools(memory or CpuMemory(), [Kind("experts", "uint8", (size,), size)])
    return ExpertSlots(source, pools, count, (3, 4))


def slot_of(slots: ExpertSlots, number: int) -> Bytes:
    """What lies in a slot."""
    (pool,) = slots.store.pools.pools
    array: Bytes = pool.array if isinstance(pool, CpuBuffer) else pool
    row: Bytes = array.reshape(slots.count, -1)[number]
    return row


def check(slots: ExpertSlots, table: Table) -> list[Expert]:
    """What the table names is there; returns whom it names."""
    named = [(int(m), int(e)) for m, e in np.argwhere(table != ABSENT)]
    assert len({int(table[expert]) for expert in named}) == len(named) <= slots.count
    for expert in named:
        size = slots.store.stored[expert]
        assert (slot_of(slots, int(table[expert]))[:size] == value(expert)).all()
    return named


# --- slots ------------------------------------------------------------------------------------


@BOTH
@given(
    st.lists(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=6), max_size=20),
    st.integers(1, 12),
)
def test_the_table_names_who_is_held_and_their_bytes_are_there(
    unified: bool, script: list[set[Expert]], count: int
) -> None:
    slots = slots_of(count, CpuMemory(unified=unified))
    before: set[Expert] = set()
    for wanted in map(sorted, script):
        with slots.hold(wanted) as table:
            named = set(check(slots, table))
        assert set(wanted[:count]) <= named
        assert len(named) == min(count, len(before | named))  # and whoever is there besides
        before = named


def test_who_is_worth_most_stays() -> None:
    slots = slots_of(2)
    slots.experts.expect({(0, 1): 0.9})
    for wanted in ((0, 1), (1, 1), (2, 2), (1, 1)):
        with slots.hold([wanted]) as table:
            assert (0, 1) in check(slots, table)


def test_a_memory_of_its_own_is_copied_to_from_the_host_and_read_once() -> None:
    source = FakeSource()
    slots = slots_of(1, CpuMemory(unified=False), source)
    for _ in range(3):
        for wanted in ((0, 0), (1, 2)):
            with slots.hold([wanted]) as table:
                assert check(slots, table) == [wanted]
    assert source.log == [(0, 0), (1, 2)]
    assert slots.store.host_bytes == 8 + 10
    assert slots.experts.counts.loads == 6
    slots.experts.announce([(0, 0), (1, 2), (2, 0)])
    assert source.announced == [(2, 0)]


def test_of_unified_memory_nothing_is_kept_or_copied_on_the_host() -> None:
    class Unified(CpuMemory):
        def send(self, source: Bytes, address: int) -> Event:
            raise AssertionError("nothing is copied")

    source = FakeSource()
    slots = slots_of(1, Unified(), source)
    for wanted in ((0, 0), (1, 2), (0, 0)):
        with slots.hold([wanted]) as table:
            assert check(slots, table) == [wanted]
    assert source.log == [(0, 0), (1, 2), (0, 0)]
    assert slots.store.host_bytes == 0


def test_what_is_being_copied_is_not_evicted() -> None:
    memory = Copying()
    copying, go = threading.Event(), threading.Event()

    def hold_up() -> None:
        copying.set()
        assert go.wait(PATIENCE)

    memory.before = hold_up
    slots = slots_of(1, memory)
    slots.experts.expect({(0, 0): 1.0})
    slots.experts.prefetch([(0, 0)])
    assert copying.wait(PATIENCE)

    def other() -> None:
        with slots.hold([(2, 3)]) as table:
            assert check(slots, table) == [(2, 3)]

    with elsewhere(other):
        while not slots.experts.counts.misses:
            pass
        assert set(slots.experts.pager.slots) == {slots.experts.key((0, 0))}
        go.set()
    settle(slots.experts)


def test_a_slot_whose_copy_was_given_up_goes_to_the_next_one_safely() -> None:
    memory = Copying()
    slots = slots_of(1, memory)
    go = threading.Event()
    memory.before = lambda: go.wait(PATIENCE)
    memory.interrupted = True
    with pytest.raises(KeyboardInterrupt), slots.hold([(0, 0)]):
        pass
    memory.interrupted = False  # the copy is still on its way into the only slot
    with elsewhere(go.set), slots.hold([(2, 3)]) as table:
        assert check(slots, table) == [(2, 3)]


def test_no_slot_is_written_while_it_is_computed_from() -> None:
    memory = Copying()
    slots = slots_of(1, memory)
    memory.computing.clear()
    let_go = threading.Event()

    def computes() -> None:
        with slots.hold([(0, 0)]):
            let_go.set()

    def needs_the_slot() -> None:
        with slots.hold([(1, 1)]) as table:
            check(slots, table)

    with elsewhere(computes):
        assert let_go.wait(PATIENCE)
        with elsewhere(needs_the_slot):
            while slots.experts.counts.misses != 2:
                pass
            assert (slot_of(slots, 0)[:8] == value((0, 0))).all()
            memory.computing.set()
    assert (slot_of(slots, 0)[:9] == value((1, 1))).all()


@BOTH
def test_a_load_that_fails_fails_its_request_and_no_other(unified: bool) -> None:
    source, memory = FakeSource(), CpuMemory(unified=unified)
    slots = slots_of(2, memory, source)
    source.broken = {(0, 1)}
    for _ in range(3):
        with pytest.raises(BundleError), slots.hold([(0, 0), (0, 1)]):
            pass
        with slots.hold([(1, 0), (1, 1)]) as table:
            assert check(slots, table) == [(1, 0), (1, 1)]
    source.broken.clear()
    with slots.hold([(0, 0), (0, 1)]) as table:
        assert check(slots, table) == [(0, 0), (0, 1)]


def test_a_copy_that_fails_does_too() -> None:
    class Failing(CpuMemory):
        fail = True

        def send(self, source: Bytes, address: int) -> Event:
            return self.queue(broken) if self.fail else super().send(source, address)

    def broken() -> None:
        raise OSError("the copy failed")

    memory = Failing(unified=False)
    slots = slots_of(1, memory)
    for _ in range(3):
        with pytest.raises(OSError, match="the copy failed"), slots.hold([(0, 0)]):
            pass
    assert slots.experts.pager.used == 0
    memory.fail = False
    with slots.hold([(0, 0)]) as table:
        assert check(slots, table) == [(0, 0)]


def test_a_budget_says_how_many_slots_or_the_least_that_works() -> None:
    assert [slot_count(budget, 11, 12, 3) for budget in (33, 43, 44, 10**9)] == [3, 3, 4, 12]
    with pytest.raises(InputError, match="take 33 bytes: allow as many"):
        slot_count(32, 11, 12, 3)


# --- replay -----------------------------------------------------------------------------------


class FakeCache:
    """For each layer and position a number, whatever was there before."""

    def __init__(self, capacity: int = 64) -> None:
        self.length, self.capacity = 0, capacity
        self.states = np.full((3, capacity), -1, np.int64)


class FakeModel:
    """Tokens are numbers. Layer by layer, what a token is follows from a hash of what it and all
    before it were, and of the bytes of its experts: one wrong byte, and all that follows differs.
    """

    def __init__(self, slots: ExpertSlots, top_k: int = 1, seed: int = 0) -> None:
        self.slots, self.top_k, self.seed = slots, top_k, seed
        self.noise = np.random.default_rng(seed)

    def run(self, embeds: Floats, cache: Any, table: Table | None) -> tuple[Step, Chosen]:
        """With a table, or as a resident model."""
        begin, end = cache.length, cache.length + len(embeds)
        states = [int(token) for token in embeds[:, 0]]
        chosen = np.zeros((len(embeds), 3, self.top_k), np.int64)
        for layer in range(3):
            cache.states[layer, begin:end] = states
            for at in range(len(embeds)):
                seen = cache.states[layer, : begin + at + 1].tolist()  # attention
                mixed = hash((self.seed, layer, *seen))
                order = np.random.default_rng(abs(mixed)).permutation(4)
                chosen[at, layer] = order[: self.top_k]
                bytes_ = [self._byte((layer, int(expert)), table) for expert in chosen[at, layer]]
                states[at] = hash((mixed, *bytes_)) % 2**20
        cache.length = end
        routing = np.zeros((len(embeds), *self.slots.shape), np.float32)
        return Step(np.array(states[-1:], np.float32), routing), chosen

    def _byte(self, expert: Expert, table: Table | None) -> int:
        if table is None:
            return value(expert)
        if table[expert] == ABSENT:
            return int(self.noise.integers(256))  # as misleading as can be, and never twice alike
        return int(slot_of(self.slots, int(table[expert]))[0])


def replayed(model: FakeModel, embeds: Floats, cache: FakeCache, replay: Replay) -> None:
    """A step is what a resident model computes."""
    other = FakeCache()
    other.length, other.states = cache.length, cache.states.copy()
    wanted, chosen = model.run(embeds, other, None)
    found = replay.step(embeds, cache)
    assert np.array_equal(found.step.logits, wanted.logits)
    assert found.step.router_logits.shape == (len(embeds), 3, 4)
    assert np.array_equal(found.chosen, chosen)
    assert cache.length == other.length
    assert np.array_equal(cache.states[:, : cache.length], other.states[:, : cache.length])


def tokens(count: int, first: int = 0) -> Floats:
    return np.arange(first, first + count, dtype=np.float32)[:, None]


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2]), st.integers(0, 8), st.lists(st.integers(1, 9))
)
@settings(max_examples=40)
def test_replays_end_at_what_a_resident_model_computes(
    seed: int, top_k: int, more: int, lengths: list[int]
) -> None:
    slots = slots_of(min(3 * top_k + more, 12))
    model, cache = FakeModel(slots, top_k, seed), FakeCache()
    replay = Replay(slots, model.run)
    for length in lengths[:5]:
        replayed(model, tokens(length, seed), cache, replay)
    counts = replay.counts
    assert counts.runs <= (3 + 1) * counts.parts  # M + 1
    assert counts.runs >= counts.parts >= len(lengths[:5])


def test_a_step_whose_experts_are_there_runs_once() -> None:
    slots = slots_of(12)
    model, replay = FakeModel(slots), Replay(slots, FakeModel(slots).run)
    replayed(model, tokens(5), FakeCache(), replay)
    first = (replay.counts.runs, replay.counts.faults)
    replayed(model, tokens(5), FakeCache(), replay)
    assert (replay.counts.runs, replay.counts.faults) == (first[0] + 1, first[1])
    assert replay.counts.parts == 2
    assert replay.counts.hits > 0
    assert first[1] > 0


def test_what_is_expected_is_there_in_the_first_run() -> None:
    slots = slots_of(12)
    model = FakeModel(slots)
    replay = Replay(slots, model.run)
    replay.step(tokens(5), FakeCache(), list(slots.store.sizes))
    assert (replay.counts.runs, replay.counts.faults) == (1, 0)


def test_a_step_that_fails_leaves_the_cache_and_the_next_one_succeeds() -> None:
    source = FakeSource()
    slots = slots_of(3, source=source)
    model, cache = FakeModel(slots), FakeCache()
    replay = Replay(slots, model.run)
    replayed(model, tokens(2), cache, replay)
    source.broken = set(source.sizes)
    with pytest.raises(BundleError):
        replay.step(tokens(9, 2), cache)  # parts of it may have been done
    assert cache.length == 2
    source.broken.clear()
    replayed(model, tokens(9, 2), cache, replay)


def test_a_device_that_does_not_compute_the_same_twice_is_said() -> None:
    slots = slots_of(3)
    turns = iter(range(100))

    def fickle(embeds: Floats, cache: Any, table: Table) -> tuple[Step, Chosen]:
        chosen = np.zeros((1, 3, 1), np.int64)
        chosen[0, 0, 0] = next(turns) % 4
        return Step(np.zeros(1, np.float32), np.zeros((1, 3, 4), np.float32)), chosen

    slots.experts.expect({(1, 0): 0.5, (2, 0): 0.5})
    with pytest.raises(ResourceError, match="chose other experts"):
        Replay(slots, fickle).step(tokens(1), FakeCache())


@BOTH
def test_requests_from_several_threads_share_the_slots(unified: bool) -> None:
    slots = slots_of(4, CpuMemory(unified=unified))

    def request(seed: int) -> None:
        model, cache = FakeModel(slots, seed=seed), FakeCache()
        replay = Replay(slots, model.run)
        for length in (5, 1, 1, 3, 1, 1):
            replayed(model, tokens(length, seed), cache, replay)

    with elsewhere(lambda: request(1)), elsewhere(lambda: request(2)):
        request(3)


@given(st.data())
def test_the_next_try_has_the_longest_beginning_that_fits(data: st.DataObject) -> None:
    top_k = data.draw(st.sampled_from([1, 2]))
    token = st.lists(st.permutations(range(4)), min_size=3, max_size=3)
    drawn = data.draw(st.lists(token, min_size=1, max_size=6))
    chosen: Chosen = np.array(drawn)[:, :, :top_k]
    layer, room = data.draw(st.integers(0, 2)), data.draw(st.integers(3 * top_k, 12))
    length, wanted = next_try(chosen, layer, 4, room)
    assert length == max(
        n for n in range(1, len(chosen) + 1) if len(used(chosen[:n], layer)) <= room
    )
    assert used(chosen[:length], layer) <= set(wanted[:room])
    guesses = set(wanted) - used(chosen, layer)
    assert guesses == used(chosen[:length], 2) - used(chosen[:length], layer)


def used(chosen: Chosen, last: int) -> set[Expert]:
    return {
        (layer, int(expert))
        for token in chosen
        for layer in range(last + 1)
        for expert in token[layer]
    }


def test_the_first_fault_is_the_first_layer_with_an_absent_expert() -> None:
    table = np.full((3, 4), ABSENT, np.int32)
    table[0, 1], table[1, 2], table[2, 3] = 5, 0, 1
    right: npt.NDArray[np.int64] = np.array([[[1], [2], [3]]] * 2)
    assert first_fault(right, table) is None
    wrong = right.copy()
    wrong[1, 1:] = 0
    assert first_fault(wrong, table) == 1
