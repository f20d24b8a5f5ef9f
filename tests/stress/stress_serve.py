"""So many clients at once ask a service of its own process, nano's, as fast as they get answers.

    python tests/stress/stress_serve.py [CLIENTS] [SECONDS] [QUEUE]

Whoever hears 429 waits as long as it was told to. Any other status than 200 fails.
"""

import asyncio
import collections
import json
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from command_line import ROOT
from test_serve_live import served

IMAGE = (ROOT / "scan.png").read_bytes()
ASK = {"question": "Is there effusion?"}


class Load:
    """What the clients met: the seconds of each answer, the count of each status."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.until = url, time.monotonic() + seconds
        self.taken: list[float] = []
        self.statuses = collections.Counter[int]()

    async def client(self) -> None:
        """Ask until the time is over."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=120) as client:
            while (begun := time.monotonic()) < self.until:
                answer = await client.post("/v1/ask", data=ASK, files={"image": IMAGE})
                self.statuses[answer.status_code] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(float(answer.headers["Retry-After"]))
                elif answer.status_code == 200:
                    self.taken.append(time.monotonic() - begun)

    async def clients(self, count: int) -> None:
        """So many at once."""
        await asyncio.gather(*(self.client() for _ in range(count)))


async def watch(process: int, memory: list[int]) -> None:
    """Bytes that the service has in memory, once a second."""
    while True:
        status = Path(f"/proc/{process}/status").read_text()
        memory.append(int(status.split("VmRSS:")[1].split()[0]) * 1024)
        await asyncio.sleep(1)


async def stress(url: str, process: int, clients: int, seconds: float) -> dict[str, object]:
    """Figures of a load: seconds, bytes, counts."""
    load, memory = Load(url, seconds), list[int]()
    watching = asyncio.create_task(watch(process, memory))
    await load.clients(clients)
    watching.cancel()
    assert set(load.statuses) <= {200, 429}, load.statuses
    median, late = np.percentile(load.taken, [50, 99])
    third = len(memory) // 3
    return {
        "statuses": dict(load.statuses),
        "answers_per_second": len(load.taken) / seconds,
        "p50": median,
        "p99": late,
        "memory_of_thirds": [max(memory[part * third :][:third]) for part in range(3)],
    }


if __name__ == "__main__":
    clients, seconds, queue = [*map(int, sys.argv[1:]), *(32, 60, 8)[len(sys.argv) - 1 :]]
    with (
        tempfile.TemporaryDirectory() as folder,
        served("--queue", str(queue), log=Path(folder) / "log") as (process, url),
    ):
        print(json.dumps(asyncio.run(stress(url, process.pid, clients, seconds)), indent=2))
