"""The prefix cache: the same bits with and without, and nothing that a bad folder could spoil."""

import errno
import io
import json
import logging
import os
import shutil
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import ROOT, Run, two_lines
from hypothesis import given
from hypothesis import strategies as st
from test_engine import QUESTIONS, random_image, told

from medmoe_edge.bundle.bundle import Bundle, Target, write_derived_manifest
from medmoe_edge.config import MoEConfig
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.engine.prefix_cache import (
    STALE,
    Prefix,
    PrefixCache,
    cache_folder,
    most_bytes,
    processor_key,
    read_prefix,
    write_prefix,
)
from medmoe_edge.errors import InputError
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.base import PortableCache, Runtime
from medmoe_edge.runtimes.ort.runtime import OrtCache

Make = Callable[..., Path]
MOE = MoEConfig(layers=(0, 2), expert_names=("mri", "ct", "pathology", "xray"))
CONFIG = replace(PRESETS["tiny"], moe=MOE)
LENGTH = 3


class Caches:
    """The part of a runtime that a prefix cache uses."""

    name, config = "caches", CONFIG

    def __init__(self) -> None:
        self.dtype: type[np.generic] = np.float32

    def new_cache(self, capacity: int) -> OrtCache:
        return OrtCache(self.config.decoder, capacity, self.dtype, "cpu")


def prefixes(folder: Path, limit: int = 10**9) -> PrefixCache:
    runtime: Any = Caches()
    return PrefixCache(folder, "model", runtime, limit)


def prefix(seed: int = 0) -> Prefix:
    """Of `LENGTH` random positions in a cache of two more."""
    runtime, decoder = Caches(), CONFIG.decoder
    cache = runtime.new_cache(LENGTH + 2)
    shape = (2 * decoder.layers, decoder.heads, LENGTH, decoder.head_size)
    cache.fill(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    return Prefix(cache, LENGTH, "ct", np.array([1, 2, 3, seed]))


def bits(cache: Any) -> list[bytes]:
    assert isinstance(cache, PortableCache)
    return [array.tobytes() for array in cache.arrays()]


def name(number: int) -> str:
    """A key."""
    return f"{number:064x}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return cache_folder(tmp_path / "parent" / "kept")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of `prefix()` by the name 0."""
    folder = tmp_path_factory.mktemp("content")
    prefixes(folder).keep(name(0), prefix())
    return (folder / f"{name(0)}.npz").read_bytes()


def no_tower(pixels: Any) -> Any:
    raise AssertionError("the image was processed again")


# --- answers ----------------------------------------------------------------------------------


@pytest.fixture(params=["fp32", "int8", "paged", "torch", "torch bundle"])
def opened(
    request: pytest.FixtureRequest, tiny_bundle: Make, tiny_checkpoint: Make
) -> Callable[..., Engine]:
    """Loads a model."""
    bundle = tiny_bundle("fp32" if request.param == "fp32" else "int8")
    cases: dict[str, tuple[Path, dict[str, Any]]] = {
        "paged": (bundle, {"memory_budget": "60%"}),
        "torch": (tiny_checkpoint(), {}),
        "torch bundle": (bundle, {"runtime": "torch"}),
    }
    model, options = cases.get(request.param, (bundle, {}))
    return lambda **more: load(model, **options, **more)


def test_answers_are_the_same_with_and_without(
    opened: Callable[..., Engine], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = random_image()

    def ask(engine: Engine, new: int = 5) -> list[dict[str, Any]]:
        answers = engine.ask_all(image, QUESTIONS, max_new_tokens=new)
        reused.append([answer.timings.prefix_reused for answer in answers])
        times.append(answers[0].timings)
        return [told(answer) | {"paging": None} for answer in answers]

    reused: list[list[bool]] = []
    times: list[Any] = []
    expected = ask(opened())
    first = opened(prefix_cache=folder)
    assert ask(first) == expected
    assert reused == [[False, True, True]] * 2
    assert times[-1].vision > 0
    monkeypatch.setattr(type(first.runtime), "encode_image", lambda _, pixels: no_tower(pixels))
    assert ask(first) == expected  # from memory
    second = opened(prefix_cache=folder)
    assert ask(second) == expected  # from the file
    assert second.modality(image) == expected[0]["modality"]
    assert reused[2:] == [[True] * 3] * 2
    for time_ in times[2:]:
        assert time_.vision == 0
        assert time_.first_token == pytest.approx(time_.image + time_.prefix + time_.question)
    with pytest.raises(AssertionError, match="again"):
        second.ask(random_image(1), "Where?")


def test_a_longer_answer_finds_room(
    tiny_bundle: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = tiny_bundle("int8"), random_image()
    engine = load(model, prefix_cache=folder)
    engine.ask(image, "Where?", max_new_tokens=1)
    monkeypatch.setattr(engine.runtime, "encode_image", no_tower)
    longer = engine.ask(image, "Where?", max_new_tokens=40)
    assert told(longer) == told(load(model).ask(image, "Where?", max_new_tokens=40))


def test_nothing_is_kept_unasked(tiny_bundle: Make) -> None:
    engine, image = load(tiny_bundle("fp32")), random_image()
    assert [engine.ask(image, "Where?").timings.prefix_reused for _ in range(2)] == [False] * 2


def test_the_command_line_keeps_it(run: Run, scan: Path, tiny_bundle: Make) -> None:
    command = ["ask", scan.name, "Where?", "--model", str(tiny_bundle("int8")), "--json"]
    plain, *kept = (
        json.loads(result.stdout)["answers"][0]
        for result in (
            run(*command),
            run(*command, "--prefix-cache", "kept"),
            run(*command, "--prefix-cache", "kept"),
        )
    )
    assert [answer["timings"]["prefix_reused"] for answer in kept] == [False, True]
    for answer in (plain, *kept):
        del answer["timings"]
    assert kept == [plain, plain]


# --- what is refused --------------------------------------------------------------------------


def test_a_folder_that_cannot_be_is_refused_before_anything_runs(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/below", "x" * 300):
        with pytest.raises(InputError, match="cannot be the prefix cache"):
            load("no such model", prefix_cache=bad)
        result = run("ask", str(ROOT / "scan.png"), "Where?", "--prefix-cache", bad)
        assert result.exit_code == 2
        assert "cannot be the prefix cache" in two_lines(result)[0]


def test_engines_for_a_gpu_have_none(tiny_bundle: Make, folder: Path, tmp_path: Path) -> None:
    portable = Bundle.open(tiny_bundle("fp32"))
    shutil.copytree(portable.folder, tmp_path / "bundle")
    (tmp_path / "bundle" / "manifest.json").unlink()
    target = Target("tensorrt-rtx", "fp16", "sm89", "1.5", 512, 128)
    write_derived_manifest(tmp_path / "bundle", portable, target, {})
    with pytest.raises(InputError, match="cache is not kept"):
        load(tmp_path / "bundle", prefix_cache=folder)


# --- the file ---------------------------------------------------------------------------------


def test_what_is_found_is_what_was_kept(folder: Path) -> None:
    kept = prefix(7)
    kept.cache.length = LENGTH + 2  # a question and its answer
    prefixes(folder).keep(name(1), kept)
    found = prefixes(folder).find(name(1), LENGTH, 11)
    assert found is not None
    assert (found.cache.capacity, found.length, found.cache.length) == (11, LENGTH, LENGTH)
    assert (found.modality, found.experts.tolist(), found.reused) == ("ct", [1, 2, 3, 7], True)
    assert bits(found.cache) == bits(kept.cache)
    assert prefixes(folder).find(name(2), LENGTH, 11) is None
    with np.load(folder / f"{name(1)}.npz", allow_pickle=False) as file:  # numpy's own format
        assert file["3"].tobytes() == bits(kept.cache)[3]


def test_its_size_is_that_of_the_prefix(content: bytes) -> None:
    exact = sum(map(len, bits(prefix().cache)))
    bound = most_bytes(LENGTH, Caches().new_cache(1), CONFIG.decoder)
    assert exact < len(content) < bound < exact + 100_000


def test_a_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    length = 4000
    shape = (2 * CONFIG.decoder.layers, SHAPE[0], length, SHAPE[2])
    cache = Caches().new_cache(length)
    part = np.zeros(shape[1:], np.float32).nbytes
    cache.fill(np.ones(shape, np.float32))
    again = Caches().new_cache(length)
    tracemalloc.start()
    try:
        with (tmp_path / "file").open("wb") as file:
            write_prefix(file, name(0), Prefix(cache, length, None, np.zeros(4, np.int64)))
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        read_prefix(tmp_path / "file", name(0), length, again, CONFIG)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert part < read < 5 * part
    assert written < 4 * part
    assert bits(again) == bits(cache)


def test_it_is_its_owners_alone_and_tells_nothing(folder: Path) -> None:
    old = os.umask(0)
    try:
        made = cache_folder(folder / "made")
        prefixes(made).keep(name(1), prefix())
    finally:
        os.umask(old)
    assert made.stat().st_mode & 0o777 == 0o700
    (file,) = made.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_key_is_of_all_that_decides(folder: Path) -> None:
    pixels, ids = np.zeros((1, 3, 4, 4), np.float32), [1, 2]
    other: Any = SimpleNamespace(name="other", config=CONFIG)
    runtime: Runtime = prefixes(folder).runtime
    keys = [
        prefixes(folder).key(pixels, ids),
        prefixes(folder).key(np.nextafter(pixels, np.float32(1)), ids),
        prefixes(folder).key(pixels, [1, 2, 2]),
        PrefixCache(folder, "another", runtime).key(pixels, ids),
        PrefixCache(folder, "model", other).key(pixels, ids),
    ]
    assert len(set(keys)) == len(keys)
    assert prefixes(folder / "elsewhere").key(pixels.copy(), ids) == keys[0]


def test_the_cpu_is_known_by_its_instructions(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: A\ncpu MHz\t: 1\nflags\t: sse avx\n" * 2)
    assert processor_key(info) == "flags\t: sse avx model name\t: A"
    assert processor_key(tmp_path / "none")


# --- damage -----------------------------------------------------------------------------------


def zipped(parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    return file.getvalue()


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {part: archive.read(part) for part in archive.namelist()}


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_part(content: bytes, part: str, data: bytes) -> bytes:
    """The same with another part, whose checksum is right."""
    return zipped(unzipped(content) | {part: data})


def about(content: bytes, **changes: Any) -> bytes:
    told = json.loads(unzipped(content)["about.json"]) | changes
    return with_part(content, "about.json", json.dumps(told).encode())


def layer(content: bytes, array: Any) -> bytes:
    return with_part(content, "2.npy", npy(array))


SHAPE = (CONFIG.decoder.heads, LENGTH, CONFIG.decoder.head_size)
SOUND = np.zeros(SHAPE, np.float32)
HUGE = npy(SOUND).replace(str(SHAPE).encode() + b", }", b"(999999999,)}")
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0" * 300_000,
    "text": lambda content: b"not an archive",
    "pickle": lambda content: b"\x80\x04K\x01.",
    "compressed": lambda content: zipped(unzipped(content), zipfile.ZIP_DEFLATED),
    "older": lambda content: about(content, version=0),
    "foreign": lambda content: about(content, format="another"),
    "another's key": lambda content: about(content, key=name(9)),
    "another library": lambda content: about(content, origin="onnxruntime 0.1 cpu"),
    "modality": lambda content: about(content, modality="ultrasound"),
    "experts": lambda content: about(content, experts=[1, 2]),
    "counts": lambda content: about(content, experts=["1", -2, 3.5, None]),
    "no json": lambda content: with_part(content, "about.json", b"{"),
    "no object": lambda content: with_part(content, "about.json", b"[" * 9999),
    "missing": lambda content: zipped(dict(list(unzipped(content).items())[:-1])),
    "one more": lambda content: with_part(content, "6.npy", npy(SOUND)),
    "shape": lambda content: layer(content, SOUND[:1]),
    "type": lambda content: layer(content, SOUND.astype(np.float16)),
    "objects": lambda content: layer(content, np.full(SHAPE, None)),
    "huge": lambda content: with_part(content, "2.npy", HUGE),
    "trailing": lambda content: with_part(content, "2.npy", npy(SOUND) + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_anew(
    damage: str, content: bytes, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / f"{name(0)}.npz"
    path.write_bytes(DAMAGE[damage](content))
    cache = prefixes(folder)
    assert cache.find(name(0), LENGTH, LENGTH) is None
    assert cache.find(name(0), LENGTH, LENGTH) is None
    (record,) = caplog.records  # one for both
    assert record.levelno == logging.WARNING
    assert name(0)[:8] not in record.getMessage()
    assert str(folder) not in record.getMessage()
    cache.keep(name(0), prefix())
    assert prefixes(folder).find(name(0), LENGTH, LENGTH) is not None


@given(data=st.data())
def test_a_flipped_bit_is_found_or_does_no_harm(
    data: st.DataObject, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    at = data.draw(
        st.integers(0, len(content) - 1) | st.integers(len(content) - 1200, len(content) - 1)
    )
    damaged = bytearray(content)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    folder = tmp_path_factory.getbasetemp()
    (folder / "flipped").write_bytes(damaged)
    try:
        found = read_prefix(folder / "flipped", name(0), LENGTH, Caches().new_cache(3), CONFIG)
    except Exception:  # as read_prefix says
        return
    assert (found.modality, found.experts.tolist()) == ("ct", [1, 2, 3, 0])
    assert bits(found.cache) == bits(prefix().cache)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_opened(
    make: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(folder / f"{name(0)}.npz")
    assert prefixes(folder).find(name(0), LENGTH, LENGTH) is None
    prefixes(folder).keep(name(0), prefix())  # a folder cannot be replaced
    assert 1 <= len(caplog.records) <= 2


# --- the folder -------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(folder: Path, content: bytes) -> None:
    size = most_bytes(LENGTH, Caches().new_cache(1), CONFIG.decoder)
    limit = 2 * len(content) + size
    for number in range(3):
        prefixes(folder, limit).keep(name(number), prefix(number))
        os.utime(folder / f"{name(number)}.npz", (number, number))
    foreign = folder / "theirs.npz"
    foreign.write_bytes(bytes(10 * limit))
    assert prefixes(folder, limit).find(name(0), LENGTH, LENGTH) is not None  # now recent
    prefixes(folder, limit).keep(name(3), prefix(3))
    left = {path.name for path in folder.iterdir()}
    assert left == {foreign.name, *(f"{name(number)}.npz" for number in (0, 2, 3))}


def test_what_killed_processes_left_is_removed(folder: Path) -> None:
    old, young = (folder / f".{name(0)}.npz.0123456{digit}.part" for digit in range(2))
    for path in (old, young):
        path.write_bytes(b"patient")
    stale = time.time() - STALE - 1
    os.utime(old, (stale, stale))
    prefixes(folder).keep(name(1), prefix())
    assert not old.exists()
    assert young.exists()


def test_one_that_outgrows_all_is_not_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefixes(folder, limit=1000).keep(name(0), prefix())
    assert list(folder.iterdir()) == []
    assert "outgrows" in caplog.text


def test_a_full_disk_costs_one_warning(
    tiny_bundle: Make,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    engine = load(tiny_bundle("fp32"), prefix_cache=folder)
    caplog.clear()
    for seed in range(2):
        answer = engine.ask(random_image(seed), "Where?", max_new_tokens=2)
        assert not answer.timings.prefix_reused
    assert engine.ask(random_image(1), "Where?", max_new_tokens=2).timings.prefix_reused  # memory
    warnings = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert warnings == ["The prefix cache cannot be written (No space left on device)."]
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_gone_costs_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = prefixes(folder)
    shutil.rmtree(folder)
    for number in range(2):
        assert cache.find(name(number), LENGTH, LENGTH) is None
        cache.keep(name(number), prefix())
    assert len(caplog.records) == 1


def test_many_at_once_do_each_other_no_harm(
    folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    limit = len(content) + most_bytes(LENGTH, Caches().new_cache(1), CONFIG.decoder)  # two
    expected = [bits(prefix(number).cache) for number in range(4)]
    outcomes: list[bool] = []

    def work(offset: int) -> None:
        for turn in range(12):
            number = (turn + offset) % 4
            cache = prefixes(folder, limit)
            found = cache.find(name(number), LENGTH, LENGTH)
            outcomes.append(found is None or bits(found.cache) == expected[number])
            if found is None:
                cache.keep(name(number), prefix(number))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 48
    assert caplog.records == []
    assert not list(folder.glob("*.part"))
