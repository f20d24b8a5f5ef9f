"""Pictures decoded in another process: the same as here, the same errors, and an end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bombs import deflated_dicom
from dicom_files import made
from PIL import Image as Pillow
from pydicom import dcmwrite

from medmoe_edge.errors import ImageError, ResourceError
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.worker import Bounds, held, read_apart, read_for_display, warm_up

GREY = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "Jane.png"
    Pillow.fromarray(GREY).save(path, dpi=(100, 200))
    return path


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    path = tmp_path / "scan.dcm"
    values = (GREY.astype(np.int16) * 4) - 300
    dcmwrite(path, made(values, Modality="CT"), enforce_file_format=True)
    return path


def test_it_is_the_same_picture(scan: Path, dicom: Path) -> None:
    warm_up()
    for path in (scan, dicom):
        here = load_image(path)
        for source in (path, path.read_bytes()):
            there = read_apart(source)
            np.testing.assert_array_equal(there.pixels, here.pixels)
            assert not there.pixels.flags.writeable
            for name in ("modality", "window", "spacing", "frames", "notices"):
                assert getattr(there, name) == getattr(here, name)


def test_values_come_with_a_grey_dicom_frame(scan: Path, dicom: Path) -> None:
    found = read_for_display(dicom.read_bytes())
    image, behind = found.image, found.values
    assert behind is not None
    assert not behind.inverted
    np.testing.assert_array_equal(behind.values, GREY.astype(float) * 4 - 300)
    np.testing.assert_array_equal(image.pixels, load_image(dicom).pixels)
    assert read_for_display(scan).values is None


def test_frames_of_one_upload_are_read_by_its_path_without_a_name(dicom: Path) -> None:
    with held(dicom.read_bytes()) as path:
        assert read_for_display(path).values is not None
        with pytest.raises(ImageError, match=r"^The image has "):
            read_for_display(path, 7)
    assert not path.exists()


def test_errors_are_the_same(scan: Path, tmp_path: Path) -> None:
    for source, frame in ((scan, 4), (tmp_path / "missing.png", None), (tmp_path, None)):
        with pytest.raises(ImageError) as here:
            load_image(source, frame=frame)
        with pytest.raises(ImageError) as there:
            read_apart(source, frame)
        assert type(there.value) is type(here.value)
        assert str(there.value) == str(here.value)
        assert there.value.remedy == here.value.remedy
    with pytest.raises(ImageError, match=r"^The image is cut off"):
        read_apart(scan.read_bytes()[:100])
    with pytest.raises(ImageError, match="limit of 100 pixels"):
        read_apart(scan, bounds=Bounds(pixels=100))


def children() -> list[int]:
    """The processes that decode for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text("ascii").rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid() and b"medmoe_edge.image.worker" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_one_that_was_ended_is_replaced(scan: Path) -> None:
    read_apart(scan)
    before = children()
    for process in before:
        os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}/exe").exists() for process in before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert read_apart(scan).frames == 1
    assert set(children()) - set(before)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_it_ends_with_the_one_that_started_it(scan: Path) -> None:
    code = (
        "import os, signal, subprocess, sys\n"
        "from medmoe_edge.image import worker\n"
        "from pathlib import Path\n"
        "worker.read_apart(Path(sys.argv[1]))\n"
        "places = worker._POOL._places.queue\n"
        "print(*(place._process.pid for place in places if place), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(scan)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (process,) = map(int, ended.stdout.split())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process")
def test_trouble_of_the_machine_is_not_the_file_s(scan: Path) -> None:
    import resource

    refused: list[str] = []
    read_apart(scan)
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for allowed in range(4, 12):  # files that it may open, from none on
        for process in children():
            resource.prlimit(process, resource.RLIMIT_NOFILE, (allowed, hard))
        try:
            read_apart(scan)
        except ResourceError as error:
            refused.append(error.what)
        for process in children():
            resource.prlimit(process, resource.RLIMIT_NOFILE, (limit, hard))
    assert refused
    assert set(refused) == {"The image cannot be used now: too many open files."}
    assert read_apart(scan).frames == 1


def test_what_takes_too_long_is_refused_and_the_next_is_read(scan: Path) -> None:
    bomb = deflated_dicom(2000, 2000, 536)
    with pytest.raises(ImageError, match=r"takes longer to decode than the limit of 0.2 s"):
        read_apart(bomb, bounds=Bounds(seconds=0.2))
    assert read_apart(scan).frames == 1
