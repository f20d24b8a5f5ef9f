"""`--memory-budget auto`: what is free, by kernel and control groups, and what is made of it."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_engine import random_image
from typer.testing import Result

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.machine import available_memory
from medmoe_edge.embedded import bundle_path
from medmoe_edge.engine import loading
from medmoe_edge.engine.engine import load
from medmoe_edge.engine.loading import MemoryChoice, choose_memory
from medmoe_edge.errors import InputError, ResourceError
from medmoe_edge.runtimes.ort.paged import OrtExpertStore
from medmoe_edge.runtimes.paging.pager import ExpertPager

Make = Callable[..., Path]
PLENTY = 10**12


# --- what is free -------------------------------------------------------------------------------


def system(folder: Path, membership: str, files: dict[str, str]) -> Path:
    """A folder with the files of proc and sys; 8,000,000 kB are available to the kernel."""
    meminfo = "MemTotal: 16000000 kB\nMemFree: 100 kB\nMemAvailable:    8000000 kB\n"
    for name, text in {
        "proc/meminfo": meminfo,
        "proc/self/cgroup": membership,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_without_a_limit_the_kernel_tells(tmp_path: Path) -> None:
    files = {"memory.max": "max\n", "memory.current": "5000\n"}
    assert available_memory(system(tmp_path, "0::/\n", files)) == 8_000_000 * 1024


def test_of_a_group_its_files_count_as_free(tmp_path: Path) -> None:
    files = {
        "memory.max": "5000000\n",
        "memory.current": "4000000\n",
        "memory.stat": "anon 1000000\ninactive_file 2500000\nactive_file 500000\n",
    }
    assert available_memory(system(tmp_path, "0::/\n", files)) == 5_000_000 - 1_500_000


def test_the_tightest_of_all_groups_around_counts(tmp_path: Path) -> None:
    files = {
        "memory.max": "max\n",
        "a/memory.max": "900000\n",
        "a/memory.current": "300000\n",
        "a/b/memory.max": "max\n",
        "a/b/memory.high": "700000\n",
        "a/b/memory.current": "200000\n",
    }
    assert available_memory(system(tmp_path, "0::/a/b\n", files)) == 500_000
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("400000\n")
    assert available_memory(tmp_path) == 100_000
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("1000\n")  # less than it holds
    assert available_memory(tmp_path) == 0


def test_inside_a_container_the_hosts_path_leads_nowhere(tmp_path: Path) -> None:
    files = {"memory.max": "600000\n", "memory.current": "100000\n"}
    assert available_memory(system(tmp_path, "0::/docker/0123\n", files)) == 500_000


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "9000\n",
        "memory/a/memory.limit_in_bytes": "800000\n",
        "memory/a/memory.usage_in_bytes": "700000\n",
        "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 300000\n",
    }
    membership = "4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n"
    assert available_memory(system(tmp_path, membership, files)) == 400_000


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


# --- what is made of it -------------------------------------------------------------------------


def least_of(bundle: Bundle) -> int:
    """The least memory that the model runs in, as the refusal tells it, in bytes."""
    low, high = 0, 10**9
    while low < high:
        middle = (low + high) // 2
        try:
            choose_memory(bundle, middle)
            high = middle
        except ResourceError:
            low = middle + 1
    return low


def nano() -> Bundle:
    """Of a tiny model, sessions would take more than its experts."""
    return Bundle.open(bundle_path("nano"))


def test_the_choice_follows_free_memory() -> None:
    bundle = nano()
    whole = choose_memory(bundle, PLENTY)
    assert whole.budget is None
    assert choose_memory(bundle, whole.needed).budget is None
    paged = choose_memory(bundle, whole.needed - 1)
    assert paged.budget is not None
    least = least_of(bundle)
    tightest = choose_memory(bundle, least)
    assert tightest.budget is not None
    assert tightest.budget < paged.budget
    for choice in (paged, tightest):
        assert choice.needed <= choice.free
    step = 1000  # of memory more is a thousand bytes more for experts
    more = choose_memory(bundle, least + step).budget
    assert more == tightest.budget + step
    store = OrtExpertStore(bundle)
    ExpertPager(tightest.budget).open(store, 1)  # it takes it
    with pytest.raises(InputError, match="too small"):
        ExpertPager(tightest.budget - 1).open(store, 1)


@pytest.mark.parametrize("tiny", [False, True])
def test_too_little_is_refused_with_the_least_that_works(tiny_bundle: Make, tiny: bool) -> None:
    bundle = Bundle.open(tiny_bundle("int8")) if tiny else nano()
    least = least_of(bundle)
    with pytest.raises(ResourceError) as caught:
        choose_memory(bundle, least - 1)
    told = re.search(r"takes at least ([\d,]+) bytes of memory", str(caught.value))
    assert told, caught.value
    assert int(told[1].replace(",", "")) == least


def test_a_dense_model_is_resident_or_refused(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("fp32", dense=True))
    assert choose_memory(bundle, PLENTY).budget is None
    with pytest.raises(ResourceError, match="takes at least"):
        choose_memory(bundle, 1000)


def free(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda: count)


def test_answers_are_the_same_however_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, image = nano().folder, random_image()
    needed = choose_memory(nano(), PLENTY).needed
    free(monkeypatch, PLENTY)
    resident = load(folder, memory_budget="auto", drop_pages=True)
    assert resident.memory == MemoryChoice(None, PLENTY, needed)
    free(monkeypatch, needed - 1)
    paged = load(folder, memory_budget=" Auto ")
    assert paged.memory is not None
    whole, part = (engine.ask(image, "Where?") for engine in (resident, paged))
    assert whole.paging is None
    assert part.paging is not None
    assert part.paging["budget"] == paged.memory.budget
    assert (part.text, part.confidence) == (whole.text, whole.confidence)
    assert load(folder).memory is None


def test_what_it_cannot_decide_is_refused(
    tiny_bundle: Make, tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="auto looks at this machine"):
        load(tiny_bundle("int8"), memory_budget="auto", runtime="torch")
    with pytest.raises(InputError, match="is a checkpoint"):
        load(tiny_checkpoint(), memory_budget="auto")
    free(monkeypatch, None)
    with pytest.raises(ResourceError, match="does not tell"):
        load(tiny_bundle("int8"), memory_budget="auto")


def test_the_command_line_says_it_in_one_line(
    tiny_bundle: Make, scan: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ["ask", str(scan), "Where?", "--model", str(tiny_bundle("int8"))]
    free(monkeypatch, 2 * 10**9)
    done = run(*ask, "--memory-budget", "auto", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["memory"]["mode"] == "resident"
    assert sum("2.00 GB free memory" in line for line in done.stderr.splitlines()) == 1
    assert "free memory" not in run("-q", *ask, "--memory-budget", "auto").stderr
    assert "memory" not in json.loads(run(*ask, "--json").stdout)
    free(monkeypatch, 10**5)
    refused = run(*ask, "--memory-budget", "auto")
    assert refused.exit_code == 5
    assert "100,000 are free" in refused.stderr


# --- glibc's heaps ------------------------------------------------------------------------------

HEAPS = """
import ctypes, sys, threading
from medmoe_edge.bundle.machine import keep_one_heap

def allocate():
    libc.malloc(1000)
    started.wait()

keep_one_heap()
libc, started = ctypes.CDLL(None), threading.Barrier(4)
libc.fopen.restype = ctypes.c_void_p
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, ctypes.c_void_p(file))
libc.fclose(ctypes.c_void_p(file))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such heaps")
@pytest.mark.parametrize(
    ("environment", "one"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "8"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}, False),
    ],
)
def test_threads_share_a_heap_unless_the_environment_says_otherwise(
    tmp_path: Path, environment: dict[str, str], *, one: bool
) -> None:
    names = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", HEAPS, str(tmp_path / "heaps.xml")]
    subprocess.run(command, env=kept | environment, check=True)
    heaps = (tmp_path / "heaps.xml").read_text().count("<heap ")
    assert (heaps == 1) == one
