"""The queue between requests and the models."""

import asyncio
import threading
import time
import weakref
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial

import pytest

from medmoe_edge.bedside.serve.errors import Refusal
from medmoe_edge.bedside.serve.work import RequestSlots, Worker


class Picture:
    """Something large."""


def test_who_is_cancelled_holds_no_upload_while_the_worker_is_busy() -> None:
    worker, go_on = Worker(), threading.Event()

    def busy() -> Generator[str, None, None]:
        assert go_on.wait(20)
        yield "done"

    def look_at(picture: Picture) -> Generator[str, None, None]:
        yield str(picture)

    async def asked() -> None:
        picture = Picture()
        held = weakref.ref(picture)
        with ExitStack() as running:
            first = worker.do(busy, running, "ward", 20)
            with ExitStack() as waiting:
                worker.do(partial(look_at, picture), waiting, "ward", 20)
                del picture
                assert held() is not None
            assert held() is None
            go_on.set()
            assert [item async for item in first] == ["done"]

    worker.start()
    asyncio.run(asked())
    worker.stop(20)
    assert not worker.is_alive


def test_clients_take_turns() -> None:
    worker, go_on, done = Worker(), threading.Event(), list[str]()

    def job(name: str) -> Generator[str, None, None]:
        assert go_on.wait(20)
        done.append(name)
        yield name

    async def asked() -> None:
        with ExitStack() as running:
            for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
                last = worker.do(partial(job, name), running, client=name[0], seconds=20)
            worker.start()
            go_on.set()
            assert [item async for item in last] == ["b2"]
            await asyncio.to_thread(worker.stop, 20)

    asyncio.run(asked())
    assert done == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_slots_are_refused_and_given_back() -> None:
    slots = RequestSlots(1)
    with slots.take("ward"), pytest.raises(Refusal) as refused, slots.take("ward"):
        pass
    assert refused.value.status_code == 429
    with pytest.raises(ZeroDivisionError), slots.take("ward"):
        raise ZeroDivisionError
    with slots.take("ward"):
        assert slots.taken == 1


def test_who_was_refused_first_is_told_to_come_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    slots = RequestSlots(2)

    def told(client: str) -> int:
        with pytest.raises(Refusal) as refused:
            slots.check(client)
        return int((refused.value.headers or {})["Retry-After"])

    with slots.take("ward"):
        now[0] += 41  # an answer takes 9 s on average: a slot is free every 4.5 s
    with slots.take("ward"), slots.take("ward"), slots.take("pacs"):
        assert [told(client) for client in ("a", "b", "c", "a")] == [5, 9, 14, 5]
        assert told("c") == 14
        now[0] += 19  # b has not come back, nor has a
        assert told("c") == 5


def test_nobody_takes_all_slots() -> None:
    slots = RequestSlots(2)
    with slots.take("ward"), slots.take("ward"):
        with pytest.raises(Refusal):
            slots.check("ward")
        with slots.take("pacs"), pytest.raises(Refusal):
            slots.check("another")
    assert slots.taken == 0
