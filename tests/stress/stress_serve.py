"""Clients with an image each ask a service of its own process, nano's; others stall beside them.

    PYTHONPATH=.:tests/helpers:tests/unit:tests/service \
        python tests/stress/stress_serve.py [CLIENTS] [SECONDS] [QUEUE] [STALLED]

First undisturbed, then beside the stalled, of whom one half never ends a request's head and the
other never sends the body that it announced. Every client has an address of its own (127.0.x.y),
as it would in a department. Whoever hears 429 waits as long as it was told to; any other status
than 200 fails. `taken` counts from a request to its answer, `waited` from the first try.
"""

import asyncio
import collections
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from command_line import ROOT
from PIL import Image as Pillow
from test_serve_live import served

ASK = {"question": "Is there effusion?"}
RATIO = 3.0  # of the late answers beside the stalled to those without
HEAD = (
    b"POST /v1/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
)


def pictures(count: int) -> list[bytes]:
    """So many different pictures: the scan, shifted."""
    with Pillow.open(ROOT / "scan.png") as scan:
        pixels = np.asarray(scan)
    found = []
    for shift in range(count):
        file = io.BytesIO()
        Pillow.fromarray(np.roll(pixels, shift, 1)).save(file, "PNG")
        found.append(file.getvalue())
    return found


class Load:
    """What the clients met: the seconds of each answer, the count of each status."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.until = url, time.monotonic() + seconds
        self.taken: list[float] = []
        self.waited: list[float] = []
        self.statuses = collections.Counter[int]()
        self.stalled = 0

    async def client(self, number: int, picture: bytes) -> None:
        """Ask until the time is over."""
        own = httpx.AsyncHTTPTransport(local_address=f"127.0.1.{number + 1}")
        async with httpx.AsyncClient(base_url=self.url, transport=own, timeout=180) as client:
            first = time.monotonic()
            while (begun := time.monotonic()) < self.until:
                answer = await client.post("/v1/ask", data=ASK, files={"image": picture})
                self.statuses[answer.status_code] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(float(answer.headers["Retry-After"]))
                    continue
                now = time.monotonic()
                self.taken.append(now - begun)
                self.waited.append(now - first)
                first = now

    async def staller(self, number: int) -> None:
        """Hold a connection that goes nowhere, and take the next when it is closed."""
        place, sent = urlsplit(self.url), HEAD if number % 2 else HEAD[:20]
        while time.monotonic() < self.until:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(
                    place.hostname, place.port, local_addr=(f"127.0.2.{number + 1}", 0)
                )
                self.stalled += 1
                writer.write(sent)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(self.until - time.monotonic(), 0)):
                        await reader.read()
                writer.close()

    async def all(self, clients: int, stalled: int) -> None:
        """So many at once."""
        asking = [self.client(*each) for each in enumerate(pictures(clients))]
        await asyncio.gather(*asking, *map(self.staller, range(stalled)))


async def watch(process: int, memory: list[int]) -> None:
    """Bytes that the service has in memory, once a second."""
    while True:
        status = Path(f"/proc/{process}/status").read_text()
        memory.append(int(status.split("VmRSS:")[1].split()[0]) * 1024)
        await asyncio.sleep(1)


async def stress(
    url: str, process: int, clients: int, seconds: float, stalled: int = 0
) -> dict[str, Any]:
    """Figures of a load: seconds, bytes, counts."""
    load, memory = Load(url, seconds), list[int]()
    watching = asyncio.create_task(watch(process, memory))
    await load.all(clients, stalled)
    watching.cancel()
    assert set(load.statuses) <= {200, 429}, load.statuses
    third = len(memory) // 3
    return {
        "statuses": dict(load.statuses),
        "stalled_connections": load.stalled,
        "answers_per_second": len(load.taken) / seconds,
        "taken_p50_p99": np.percentile(load.taken, [50, 99]).round(3).tolist(),
        "waited_p50_p99": np.percentile(load.waited, [50, 99]).round(3).tolist(),
        "memory_of_thirds": [max(memory[part * third :][:third]) for part in range(3)],
        "load_average": os.getloadavg()[0],
    }


def measure(clients: int, seconds: float, queue: int, stalled: int) -> dict[str, Any]:
    """Undisturbed and beside the stalled, one after the other, on one service."""
    with (
        tempfile.TemporaryDirectory() as folder,
        served("--queue", str(queue), log=Path(folder) / "log") as (process, url),
    ):
        alone = asyncio.run(stress(url, process.pid, clients, seconds))
        beside = asyncio.run(stress(url, process.pid, clients, seconds, stalled))
    ratios = {
        name: beside[f"{name}_p50_p99"][1] / alone[f"{name}_p50_p99"][1]
        for name in ("taken", "waited")
    }
    return {"undisturbed": alone, "beside_stalled": beside, "ratio_of_p99": ratios}


if __name__ == "__main__":
    given = [*map(int, sys.argv[1:]), *(32, 60, 8, 16)[len(sys.argv) - 1 :]]
    found = measure(*given)
    print(json.dumps(found, indent=2))
    assert max(found["ratio_of_p99"].values()) <= RATIO
