"""The queue between requests and the models."""

import asyncio
import threading
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
            first = worker.do(busy, running, seconds=20)
            with ExitStack() as waiting:
                worker.do(partial(look_at, picture), waiting, seconds=20)
                del picture
                assert held() is not None
            assert held() is None
            go_on.set()
            assert [item async for item in first] == ["done"]

    worker.start()
    asyncio.run(asked())
    worker.stop(20)
    assert not worker.is_alive


def test_places_are_refused_and_given_back() -> None:
    slots = RequestSlots(1)
    with slots.take(), pytest.raises(Refusal) as refused, slots.take():
        pass
    assert refused.value.status_code == 429
    with pytest.raises(ZeroDivisionError), slots.take():
        raise ZeroDivisionError
    with slots.take():
        assert slots.taken == 1
