"""Another user of the machine reads nothing of a patient, whatever the umask was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import ROOT
from listen_process import PEER, send, study, wait_for

NOBODY = "65534"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("setpriv"),
    reason="needs Linux, root and setpriv to look as another user",
)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter: pytest's own are root's alone, and would prove nothing."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def readable(folder: Path) -> set[str]:
    """The files and folders below one that the other user can read, by their own look."""
    found = {""}
    for kind in ("f", "d"):
        look = ["find", str(folder), "-mindepth", "1", "-type", kind, "-readable", "-print"]
        other = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
        done = subprocess.run([*other, *look], capture_output=True, text=True, check=False)
        found |= set(done.stdout.splitlines())
    return found - {""}


@contextmanager
def running(place: Path, *arguments: str) -> Iterator[dict[str, Any]]:
    """A service of the command line, under the most careless umask; gives what it said."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments, "--json"]
    with subprocess.Popen(
        command,
        umask=0,
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()


def environment(place: Path) -> dict[str, str]:
    homes = {f"XDG_{name}_HOME": str(place / name.lower()) for name in ("CACHE", "STATE")}
    return os.environ | homes | {"OMP_NUM_THREADS": "1"}


def run(place: Path, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    subprocess.run(
        command, umask=0, cwd=place, env=environment(place), check=True, capture_output=True
    )


def test_the_other_user_would_see_what_is_open(place: Path) -> None:
    (place / "open").write_text("anything")
    (place / "open").chmod(0o644)
    (place / "closed").write_text("anything")
    (place / "closed").chmod(0o600)
    assert readable(place) == {str(place / "open")}


def test_the_node_shows_nothing(place: Path) -> None:
    folder = place / "node"
    folder.mkdir()
    folder.chmod(0o777)  # whoever made it
    settings = {
        "folder": str(folder),
        "port": 0,
        "reserve_mb": 0,
        "peers": [{"ae_title": PEER}],
        "questions": [{"ask": ["Is there effusion?"]}],
        "series": {"quiet": 1, "linger": 1000},
        "documents": ["picture", "comprehensive-3d-sr", "basic-text-sr"],
    }
    config = place / "listen.json"
    config.write_text(json.dumps(settings))
    config.chmod(0o600)
    with running(place, "listen", "--config", str(config)) as told:
        assert send(told["port"], study(1)) == [0]
        wait_for(lambda: list(folder.rglob("*basic-text-sr.dcm")) != [], 120)
        assert list(folder.rglob("*-wal")), "the queue is open"
        assert readable(place) == set()
    names = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".dcm", ".sqlite", ".jsonl"} <= names
    assert readable(place) == set()


def test_the_service_shows_nothing(place: Path) -> None:
    audit = place / "audit.jsonl"
    with running(place, "serve", "--port", "0", "--audit", str(audit)) as told:
        files = {"image": ("scan.png", (ROOT / "scan.png").read_bytes())}
        asked = {"question": "Is there effusion?"}
        with httpx.Client(base_url=told["url"], trust_env=False, timeout=120) as client:
            assert client.post("/v1/ask", data=asked, files=files).status_code == 200
        assert audit.stat().st_size > 0
        assert list((place / "state").rglob("*.json")), "the head in a second place"
        assert readable(place) - {str(place / "state"), str(place / "cache")} == set()


def test_what_is_kept_of_images_shows_nothing(place: Path) -> None:
    scans = place / "scans"
    scans.mkdir(mode=0o700)
    shutil.copy(ROOT / "scan.png", scans)
    (scans / "scan.png").chmod(0o600)
    run(place, "ask", "scans/scan.png", "Is it?", "--prefix-cache", "prefixes")
    run(place, "index", "scans", "-o", "images.index")
    kept = [path for path in place.rglob("*") if path.is_file()]
    assert any("prefixes" in path.parts for path in kept)
    assert any("images.index" in path.parts for path in kept)
    seen = {Path(path).relative_to(place).parts[0] for path in readable(place)}
    assert seen <= {"cache", "state"}  # of models, not of patients
