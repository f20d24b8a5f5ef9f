"""Small uploads that unpack to gigabytes: refused or bounded, and nobody else waits for it.

All of them, with the service's own bounds: `python tests/service/test_bombs.py`.
"""

import sys
import threading
import time

import httpx
import pytest
from bombs import BOMBS, SLOW_BOMBS, Watch, deflated_dicom, small_png
from serving import StandIn, live, png, upload

from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.errors import ImageError
from medmoe_edge.image.pixels import Image
from medmoe_edge.image.worker import Bounds, read_apart

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds memory")
ASK = {"question": "Is there effusion?"}
REFUSED = (
    *("limit of", "more than is allowed", "cut off or damaged", "another size", "colours"),
    *("is cut off", "takes longer", "more memory", "no picture does"),
)


def outcome(data: bytes, bounds: Bounds) -> tuple[str, float, int]:
    """What becomes of an upload, in how many seconds, with how much memory in MiB."""
    read_apart(small_png())  # so that there is a process
    with Watch() as watch:
        started = time.monotonic()
        try:
            told = str(read_apart(data, bounds=bounds).pixels.shape)
        except ImageError as error:
            told = str(error)
        seconds = time.monotonic() - started
        time.sleep(0.02)
    return told, seconds, watch.peak


@linux
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_more_than_it_may(name: str) -> None:
    told, seconds, peak = outcome(BOMBS[name](), Bounds(megabytes=400, seconds=1.5))
    assert any(words in told for words in REFUSED), told
    assert seconds < 5  # also where other tests run beside
    assert 0 < peak < 420
    assert read_apart(png()).pixels.shape == (8, 8, 3)  # the next one is read


@linux
def test_others_are_answered_meanwhile() -> None:
    """One client sends a bomb to every door; another asks, and is shown its picture."""
    bomb = deflated_dicom(2000, 2000, 536)  # 4 MB, which inflate to 4 GB
    refused: list[tuple[int, str, float]] = []

    def attack(url: str, path: str, data: dict[str, str]) -> None:
        started = time.monotonic()
        with httpx.Client(base_url=url, timeout=30) as client:
            answer = client.post(path, data=data, files=upload(bomb))
            error = answer.json()["error"]
            refused.append((answer.status_code, error["code"], time.monotonic() - started))

    limits = Limits(decoding_seconds=2, decoding_megabytes=300)
    with live(StandIn(), limits=limits) as url, httpx.Client(base_url=url, timeout=30) as client:
        assert client.post("/v1/ask", data=ASK, files=upload()).status_code == 200
        for path, data in (("/v1/ask", ASK), ("/v1/picture", {})):
            attacker = threading.Thread(target=attack, args=(url, path, data))
            with Watch() as watch:
                attacker.start()
                answers = 0
                while attacker.is_alive():
                    assert client.post("/v1/ask", data=ASK, files=upload()).status_code == 200
                    answers += attacker.is_alive()
                    assert client.post("/v1/picture", files=upload()).status_code == 200
                attacker.join()
            assert answers > 0
            assert watch.peak < 420  # of all that the process has ever held
    assert [(status, code) for status, code, _ in refused] == [(400, "bad_image")] * 2
    assert max(seconds for *_, seconds in refused) < 20


def test_the_limit_of_the_service_is_the_one_that_is_named() -> None:
    with (
        live(StandIn(), limits=Limits(pixels=1000)) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        for path, data in (("/v1/ask", ASK), ("/v1/picture", {})):
            answer = client.post(path, data=data, files=upload(png(40, 50)))
            assert answer.status_code == 400
            assert "limit of 1,000 pixels" in answer.json()["error"]["message"]
            assert client.post(path, data=data, files=upload(png(20, 50))).status_code == 200


def test_a_picture_is_the_same_apart() -> None:
    image = read_apart(png(30, 20))
    assert isinstance(image, Image)
    assert image.pixels.shape == (20, 30, 3)
    assert not image.pixels.flags.writeable
    assert [notice.code for notice in image.notices] == ["no_contrast"]


if __name__ == "__main__":
    for name, make in (BOMBS | SLOW_BOMBS).items():
        data = make()
        told, seconds, peak = outcome(data, Bounds())
        print(f"{name:38} {len(data) / 1000:8.1f} kB {seconds:5.2f} s {peak:4} MiB  {told[:100]}")
