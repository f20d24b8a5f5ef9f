"""A batch on a Ray cluster of several processes of this machine, one of which is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ROOT
from listen_process import study
from PIL import Image as Pillow
from pyarrow import parquet
from pydicom import dcmwrite

from medmoe_edge.bedside.batch.inputs import journal_path
from medmoe_edge.bedside.batch.run import Recipe
from medmoe_edge.bundle.trust import TRUSTED_KEYS
from medmoe_edge.errors import InputError, ResourceError

IMAGES = 62  # by themselves, and with the series four parts, for two workers
SERIES, SLICES = 2, 3
ITEMS, FILES = IMAGES + SERIES, IMAGES + SERIES * SLICES
QUESTION = "Is there effusion?"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Images that look alike to no one, a text among them, and two series of slices."""
    folder = tmp_path / "scans"
    folder.mkdir()
    shades = np.random.default_rng(1).integers(0, 256, (IMAGES, 8, 8), np.uint8)
    for number, shade in enumerate(shades):
        Pillow.fromarray(shade).save(folder / f"{number:03}.png")
    (folder / "040.png").write_text("no image")
    for number in range(SERIES * SLICES):
        series, place = divmod(number, SLICES)
        uid = f"1.2.826.0.4711.{series + 1}.3.{place}"
        dataset = study(series + 1, SOPInstanceUID=uid, InstanceNumber=place)
        dcmwrite(folder / f"slice{place}{series}.dcm", dataset, enforce_file_format=True)
    (tmp_path / "questions.txt").write_text(QUESTION)
    return folder


def command(scans: Path, name: str, *more: str) -> list[str]:
    ask = ["batch", str(scans), "--questions", str(scans.parent / "questions.txt")]
    ask += ["-o", str(scans.parent / name), "--max-new-tokens", "4", "--series", "all", "--json"]
    return [sys.executable, str(ROOT / "cli.py"), *ask, *more]


def workers_of(ancestor: int) -> list[int]:
    """The processes under one that Ray has named after what works in them."""
    parents: dict[int, int] = {}
    workers = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(stat[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                workers.append(int(folder.name))
        except OSError:  # it has just ended
            continue

    def is_below(process: int) -> bool:
        while process in parents and process != ancestor:
            process = parents[process]
        return process == ancestor

    return [worker for worker in workers if is_below(worker)]


def answers(output: Path) -> list[tuple[object, ...]]:
    names = ["image_number", "image", "question", "answer", "confidence", "experts", "error"]
    names += ["slices", "slices_of", "warnings"]
    table = parquet.read_table(output, columns=names)
    return [tuple(row.values()) for row in table.to_pylist()]


def test_workers_are_never_without_the_keys_that_were_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'medmoe-edge[ray]'")
    from medmoe_edge.bedside.batch.cluster import OnRay

    joined: list[dict[str, Any]] = []

    def join(_address: str, **options: Any) -> None:
        joined.append(options)
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(ray, "init", join)
    monkeypatch.setenv(TRUSTED_KEYS, "")
    with pytest.raises(InputError, match=f"{TRUSTED_KEYS} is set, but empty"):
        OnRay("local", Recipe()).__enter__()
    assert not joined
    monkeypatch.setenv(TRUSTED_KEYS, str(tmp_path / "keys.pem"))
    with pytest.raises(ResourceError, match="Ray cannot be started on this machine"):
        OnRay("local", Recipe()).__enter__()
    assert len(joined) == 2, "a slow machine's second start is faster"
    for options in joined:
        assert options["runtime_env"]["env_vars"] == {TRUSTED_KEYS: str(tmp_path / "keys.pem")}


@pytest.mark.timeout(600)  # seconds; a cluster's dozen processes each import Ray and the engine
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers' processes in /proc")
def test_a_killed_worker_costs_nothing(scans: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'medmoe-edge[ray]'")
    subprocess.run(command(scans, "here.parquet"), check=True, capture_output=True, timeout=120)
    kept = Path(f"{journal_path(tmp_path / 'ray.parquet')}-wal")
    with subprocess.Popen(
        command(scans, "ray.parquet", "--ray", "local", "--workers", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as batch:
        try:
            begun, end = 0, time.monotonic() + 270
            killed: int | None = None
            while killed is None and batch.poll() is None and time.monotonic() < end:
                size = kept.stat().st_size if kept.exists() else 0
                begun = begun or size  # what the empty journal takes
                workers = workers_of(batch.pid)
                if size > begun and workers:
                    killed = workers[0]
                    os.kill(killed, signal.SIGKILL)
                time.sleep(0.01)
            told, errors = batch.communicate(timeout=180)
        finally:
            batch.kill()
    assert killed is not None, errors
    assert batch.returncode == 0, errors
    report = json.loads(told)
    assert (report["images"], report["series"]) == (FILES, ITEMS)
    assert (report["rows"], report["errors"]) == (ITEMS, 1)
    found = answers(tmp_path / "ray.parquet")
    assert [row[0] for row in found] == list(range(ITEMS))
    assert [row[-2] for row in found if row[-2]] == [SLICES] * SERIES
    assert found == answers(tmp_path / "here.parquet")
