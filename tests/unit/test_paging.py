"""The expert pager with stores that only pretend: what is loaded, released, waited for, counted."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.errors import BundleError, InputError
from medmoe_edge.runtimes.paging.pager import Counts, Expert, ExpertPager, PagedExperts
from medmoe_edge.runtimes.paging.prediction import budget_bytes, paging_report

PATIENCE = 10.0  # seconds until a test that waits for a thread gives up


def name(expert: Expert) -> str:
    return f"{expert[0]}.{expert[1]}"


class FakeStore:
    """Experts of ten bytes; loading takes five more. It notices whatever must never happen."""

    def __init__(self, layers: int = 3, experts: int = 4, limit: int = 10**9) -> None:
        self.sizes = {(m, e): 10 for m in range(layers) for e in range(experts)}
        self.stored = dict.fromkeys(self.sizes, 7)
        self.scratch = 5
        self.limit = limit
        self.resident: set[Expert] = set()
        self.log: list[str] = []
        self.broken: dict[Expert, BaseException] = {}
        self.before: Callable[[Expert], None] = lambda expert: None
        self._lock = threading.Lock()
        self._loading = 0

    def announce(self, experts: Any) -> None:
        self.log.append(f"announced {len(experts)}")

    def load(self, expert: Expert) -> str:
        with self._lock:
            self._loading += 1
            assert self._loading == 1
            assert expert not in self.resident
            assert 10 * len(self.resident) + 10 + self.scratch <= self.limit
        try:
            self.before(expert)
            if expert in self.broken:
                raise self.broken[expert]
        finally:
            with self._lock:
                self._loading -= 1
        with self._lock:
            self.resident.add(expert)
            self.log.append(f"load {name(expert)}")
        return name(expert)

    def release(self, value: str) -> None:
        layer, expert = map(int, value.split("."))
        with self._lock:
            self.resident.remove((layer, expert))
            self.log.append(f"release {value}")


def paged(slots: int, store: FakeStore | None = None) -> tuple[FakeStore, PagedExperts[str]]:
    """A pager with room for so many experts."""
    store = store or FakeStore()
    store.limit = 10 * slots + store.scratch
    return store, ExpertPager(store.limit).open(store, 1)


def touch(experts: PagedExperts[Any], *wanted: Expert) -> None:
    with experts.use(*wanted) as values:
        assert values == list(map(name, wanted))


@contextmanager
def elsewhere(work: Callable[[], None]) -> Iterator[None]:
    """Runs in another thread meanwhile, and must have ended well afterwards."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert failures == []


def settle(experts: PagedExperts[Any]) -> None:
    """Until nothing is fetched ahead any more."""
    while True:
        last = not experts._wishes
        experts.pager.ahead.submit(lambda: None).result(PATIENCE)
        if last:
            return


# --- what stays -------------------------------------------------------------------------------


def test_an_expert_is_loaded_once_and_the_oldest_goes() -> None:
    store, experts = paged(2)
    for wanted in ((0, 0), (0, 1), (0, 0), (0, 2), (0, 0), (0, 1)):
        touch(experts, wanted)
    assert store.log == [
        *("load 0.0", "load 0.1", "release 0.1", "load 0.2"),
        *("release 0.2", "load 0.1"),
    ]
    counts = experts.counts
    assert (counts.hits, counts.late, counts.misses) == (2, 0, 4)
    assert (counts.loads, counts.bytes_read) == (4, 28)
    assert counts.stall > 0


def test_who_is_worth_most_stays_however_long_it_was_not_used() -> None:
    store, experts = paged(2)
    experts.expect({(0, 0): 0.9, (1, 0): 0.1, (2, 0): 0.2})
    for wanted in ((0, 0), (1, 0), (2, 0), (1, 0), (1, 1), (2, 0)):
        touch(experts, wanted)
        assert (0, 0) in store.resident
    experts.expect({(2, 0): 1.0})  # another image
    touch(experts, (1, 1))
    assert store.resident == {(2, 0), (1, 1)}


def test_several_are_pinned_together_and_never_released_while_in_use() -> None:
    store, experts = paged(2)
    with experts.use((0, 0), (0, 1)) as values:
        assert values == ["0.0", "0.1"]
        started = threading.Event()

        def other() -> None:
            started.set()
            touch(experts, (1, 0))

        thread = threading.Thread(target=other)
        thread.start()
        started.wait(PATIENCE)
        thread.join(0.05)
        assert thread.is_alive()  # it waits
        assert store.resident == {(0, 0), (0, 1)}
    thread.join(PATIENCE)
    assert (1, 0) in store.resident


# --- ahead of need ----------------------------------------------------------------------------


def test_wishes_come_in_order_and_stop_at_what_is_worth_as_much() -> None:
    store, experts = paged(2)
    experts.expect({(0, 0): 0.5, (0, 1): 0.3, (1, 0): 0.3, (1, 1): 0.4})
    experts.prefetch([(0, 0), (0, 1), (1, 0), (1, 1)])
    settle(experts)
    assert store.log == [
        *("announced 4", "load 0.0", "load 0.1", "release 0.1", "load 1.1"),
    ]  # (1, 0) is worth no more than (0, 1)
    assert (experts.counts.misses, experts.counts.loads) == (0, 3)
    touch(experts, (0, 0))
    assert experts.counts.hits == 1
    experts.prefetch([(0, 0)])
    assert store.log[-1] == "load 1.1"  # nothing to announce


def test_the_best_that_fit_are_those_to_wish_for() -> None:
    _, experts = paged(2)
    assert experts.most_worth() == []
    experts.expect({(0, 0): 0.1, (2, 3): 0.7, (1, 1): 0.6})
    assert experts.most_worth() == [(2, 3), (1, 1)]


def test_a_request_waits_for_what_is_on_its_way() -> None:
    store, experts = paged(1)
    loading, go = threading.Event(), threading.Event()

    def hold(expert: Expert) -> None:
        loading.set()
        assert go.wait(PATIENCE)

    store.before = hold
    experts.expect({(0, 0): 1.0})
    experts.prefetch([(0, 0)])
    assert loading.wait(PATIENCE)
    with elsewhere(lambda: touch(experts, (0, 0))):
        while not experts.counts.late:
            pass
        go.set()
    assert store.log[1:] == ["load 0.0"]


def test_what_is_on_its_way_is_not_evicted() -> None:
    store, experts = paged(1)
    loading, go = threading.Event(), threading.Event()

    def hold(expert: Expert) -> None:
        if expert == (0, 0):
            loading.set()
            assert go.wait(PATIENCE)

    store.before = hold
    experts.expect({(0, 0): 1.0})
    experts.prefetch([(0, 0)])
    assert loading.wait(PATIENCE)
    with elsewhere(lambda: touch(experts, (0, 1))):
        while not experts.counts.misses:
            pass
        assert store.resident == set()
        go.set()
    assert store.log[1:] == ["load 0.0", "release 0.0", "load 0.1"]


def test_who_is_waited_for_goes_before_wishes() -> None:
    store, experts = paged(4)
    loading, go = threading.Event(), threading.Event()

    def hold(expert: Expert) -> None:
        if expert == (0, 0):
            loading.set()
            assert go.wait(PATIENCE)

    store.before = hold
    experts.expect({(0, 0): 0.4, (0, 1): 0.3, (0, 2): 0.2})
    experts.prefetch([(0, 0), (0, 1), (0, 2)])
    assert loading.wait(PATIENCE)
    with elsewhere(lambda: touch(experts, (1, 3))):
        while not experts.pager.urgent:
            pass
        go.set()
    settle(experts)
    assert store.log[1:] == ["load 0.0", "load 1.3", "load 0.1", "load 0.2"]


def test_wishes_taken_back_are_not_fetched() -> None:
    store, experts = paged(4)
    loading, go = threading.Event(), threading.Event()

    def hold(expert: Expert) -> None:
        loading.set()
        assert go.wait(PATIENCE)

    store.before = hold
    experts.expect({(0, 0): 0.4, (0, 1): 0.3})
    experts.prefetch([(0, 0), (0, 1)])
    assert loading.wait(PATIENCE)
    experts.prefetch(())
    go.set()
    settle(experts)
    assert store.resident == {(0, 0)}


# --- what fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BundleError("damaged", "copy"), KeyboardInterrupt()])
def test_a_load_that_fails_leaves_nothing_and_can_be_tried_again(error: BaseException) -> None:
    store, experts = paged(1)
    store.broken[0, 1] = error
    touch(experts, (0, 0))
    for _ in range(3):
        with pytest.raises(type(error)), experts.use((0, 1)):
            pass
        assert (experts.pager.used, experts.pager.slots) == (0, {})
    store.broken.clear()
    touch(experts, (0, 1))


def test_of_two_the_second_fails_and_the_first_stays() -> None:
    store, experts = paged(2)
    store.broken[0, 1] = BundleError("damaged", "copy")
    with pytest.raises(BundleError), experts.use((0, 0), (0, 1)):
        pass
    assert store.resident == {(0, 0)}
    assert experts.pager.used == 10


def test_a_wish_that_fails_is_met_by_who_needs_it() -> None:
    store, experts = paged(2)
    store.broken[0, 0] = BundleError("damaged", "copy")
    experts.expect({(0, 0): 1.0, (0, 1): 0.5})
    experts.prefetch([(0, 0), (0, 1)])
    settle(experts)
    assert store.resident == {(0, 1)}
    with pytest.raises(BundleError), experts.use((0, 0)):
        pass


def test_a_waiting_request_tries_itself_when_another_s_load_fails() -> None:
    store, experts = paged(1)
    loading, go = threading.Event(), threading.Event()
    tries: list[Expert] = []

    def first_fails(expert: Expert) -> None:
        tries.append(expert)
        if len(tries) == 1:
            loading.set()
            assert go.wait(PATIENCE)
            raise BundleError("read error", "again")

    store.before = first_fails

    def failing() -> None:
        with pytest.raises(BundleError), experts.use((0, 0)):
            pass

    with elsewhere(failing):
        assert loading.wait(PATIENCE)
        with elsewhere(lambda: touch(experts, (0, 0))):
            while not experts.counts.late:
                pass
            go.set()
    assert tries == [(0, 0)] * 2


def test_a_budget_below_the_least_is_refused_with_the_least() -> None:
    store = FakeStore()
    with pytest.raises(InputError, match="take 25 bytes"):
        ExpertPager(24).open(store, 2)
    assert ExpertPager(25).open(store, 2).pager.capacity == 20


# --- several at once --------------------------------------------------------------------------


def test_two_models_share_one_budget() -> None:
    pager = ExpertPager(25)
    stores = [FakeStore(), FakeStore()]
    first, second = (pager.open(store, 1) for store in stores)
    touch(first, (0, 0))
    touch(second, (0, 0))
    touch(second, (0, 1))
    assert [store.resident for store in stores] == [set(), {(0, 0), (0, 1)}]
    second.close()
    assert pager.used == 0
    touch(first, (0, 0))


def test_loading_one_model_leaves_room_for_a_layer_of_the_others() -> None:
    """Else a request to the first one would wait for ever."""
    pager = ExpertPager(25)
    first, heavy = pager.open(FakeStore(), 2), FakeStore()
    heavy.scratch = 6
    with pytest.raises(InputError, match="take 26 bytes"):
        pager.open(heavy, 1)
    with elsewhere(lambda: touch(first, (0, 0), (0, 1))):
        pass
    first.close()
    assert pager.open(heavy, 1).pager.capacity == 19


def test_closing_waits_for_a_load_that_fails() -> None:
    store, experts = paged(2)
    loading, go = threading.Event(), threading.Event()

    def wait(_: Expert) -> None:
        loading.set()
        assert go.wait(PATIENCE)

    touch(experts, (0, 0))
    store.before, store.broken[0, 1] = wait, BundleError("It is damaged.", "Copy it again.")
    experts.expect({(0, 1): 1.0})
    experts.prefetch([(0, 1)])
    assert loading.wait(PATIENCE)
    with elsewhere(experts.close):
        while not experts.pager.changed._waiters:  # type: ignore[attr-defined]
            pass
        go.set()
    assert store.resident == set()
    assert experts.pager.used == 0


def test_what_is_not_loaded_yet_when_python_ends_is_not_waited_for() -> None:
    """It ends a pool first, and then waits for what its threads do."""
    store, experts = paged(4)
    loading, go = threading.Event(), threading.Event()

    def wait(_: Expert) -> None:
        loading.set()
        assert go.wait(PATIENCE)

    store.before = wait
    experts.expect(dict.fromkeys(store.sizes, 1.0))
    experts.prefetch([(0, 0), (0, 1), (0, 2), (0, 3)])
    assert loading.wait(PATIENCE)
    with elsewhere(experts.pager.ahead.shutdown):
        while not experts.pager.ahead._shutdown:
            pass
        go.set()
    assert store.resident == {(0, 0)}
    touch(experts, (0, 1))


def test_two_requests_share_what_they_both_need() -> None:
    store, experts = paged(1)
    together = threading.Barrier(2, timeout=PATIENCE)

    def request() -> None:
        with experts.use((0, 0)) as values:
            together.wait()  # both are inside
            assert values == ["0.0"]

    with elsewhere(request):
        request()
    assert store.log == ["load 0.0"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("use"), st.integers(0, 2), st.integers(0, 3)),
            st.tuples(st.just("expect"), st.integers(0, 2), st.integers(0, 3)),
        ),
        max_size=60,
    ),
    st.integers(1, 6),
)
def test_it_keeps_what_a_naive_cache_would(script: list[Any], slots: int) -> None:
    """The model: a list, oldest first, and whoever is worth most."""
    store, experts = paged(slots)
    worth: dict[Expert, float] = {}
    cache: list[Expert] = []
    for verb, layer, number in script:
        expert = (layer, number)
        if verb == "expect":
            worth = {expert: 0.75, (layer, (number + 1) % 4): 0.25}
            experts.expect(worth)
            continue
        hits = experts.counts.hits
        touch(experts, expert)
        assert experts.counts.hits - hits == (expert in cache)
        if expert in cache:
            cache.remove(expert)
        elif len(cache) == slots:
            cache.remove(min(cache, key=lambda key: (worth.get(key, 0.0), cache.index(key))))
        cache.append(expert)
        assert store.resident == set(cache)


def test_hundreds_of_requests_from_many_threads_stay_inside_the_budget() -> None:
    store, experts = paged(3)  # whose store notices

    def requests(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(150):
            layer, number = generator.integers(0, 3), generator.integers(0, 4)
            wanted = [(int(layer), int(number)), (int(layer), int(number + 1) % 4)]
            if generator.random() < 0.2:
                experts.expect({expert: float(generator.random()) for expert in store.sizes})
                experts.prefetch(experts.most_worth())
            touch(experts, *wanted[: generator.integers(1, 3)])

    with elsewhere(lambda: requests(1)), elsewhere(lambda: requests(2)):
        requests(3)
    settle(experts)
    assert experts.pager.used == 10 * len(store.resident) <= 30
    experts.close()
    assert store.resident == set()


# --- what is said of it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("1500MB", 1_500_000_000), ("1.5 GB", 1_500_000_000), ("2GiB", 2 * 2**30)),
        *(("64 kib", 65536), ("100b", 100), ("50%", 400), ("12.5 %", 100), ("200%", 1600)),
        ("9" * 400 + "b", int("9" * 400)),  # more than a float holds
    ],
)
def test_a_budget_is_bytes_or_a_share(text: str, size: int) -> None:
    assert budget_bytes(text, 800) == size


@pytest.mark.parametrize("text", ["", "half", "1500", "-5MB", "10 MB/s", "5TB", "%", "1e3MB"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(InputError, match="is no memory budget"):
        budget_bytes(text, 800)


def test_the_report_says_how_good_the_prediction_was_against_chance() -> None:
    tokens = np.array([[6, 2, 0, 0], [0, 0, 0, 8]], np.int64)
    counts = Counts(hits=1, late=0, misses=2, loads=2, bytes_read=14, stall=0.5)
    report = paging_report(100, counts, tokens, (0, 2), {(0, 0), (1, 3), (1, 0)})
    assert report == {
        "budget": 100,
        "experts": {"0": [0, 1], "2": [3]},
        **{"hits": 1, "late": 0, "misses": 2, "loads": 2, "bytes_read": 14, "stall": 0.5},
        "prediction": {
            "precision": 2 / 3,
            "recall": 2 / 3,
            "chance": 3 / 8,
            "tokens": 14 / 16,
            "tokens_chance": 3 / 8,
            "gain": (14 / 16) / (3 / 8),
        },
    }
    assert paging_report(1, Counts(), tokens, (0, 2), None)["prediction"] is None
