"""Real peers of the DICOM node: programs of DCMTK and dicom3tools, and Orthanc."""

import contextlib
import json
import os
import shutil
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from listen_process import free_port

PLUGINS = "/usr/share/orthanc/plugins"


def tool(name: str) -> str:
    """The program on this machine; pynetdicom's of the same name, in this environment, is none."""
    own = os.path.realpath(sysconfig.get_path("scripts"))
    others = [each for each in os.get_exec_path() if os.path.realpath(each) != own]
    path = shutil.which(name, path=os.pathsep.join(others))
    if path is None:
        pytest.skip(f"needs {name} (Debian: dcmtk, dicom3tools or orthanc)")
    return path


def call(*command: str) -> str:
    """What a command says on stdout; it must end well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def orthanc_at(folder: Path, **settings: Any) -> Iterator[tuple[int, int]]:
    """Its DICOM port and its HTTP port."""
    binary = tool("Orthanc")
    dicom, rest = free_port(), free_port()
    given = {
        "StorageDirectory": str(folder / "storage"),
        "DicomPort": dicom,
        "HttpPort": rest,
        "DicomAet": "ORTHANC",
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowStore": True,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(given | settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while not _answers(rest):
            assert time.monotonic() < end, "Orthanc does not start"
            assert process.poll() is None, "Orthanc has ended"
            time.sleep(0.1)
        yield dicom, rest
    finally:
        process.terminate()
        process.wait(30)


def get(port: int, path: str) -> bytes:
    """From Orthanc's REST interface."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return bytes(answer.read())


def post_to(port: int, path: str, data: bytes, method: str = "POST") -> bytes:
    """To Orthanc's REST interface."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def put_to(port: int, path: str, data: bytes) -> None:
    """To Orthanc's REST interface."""
    post_to(port, path, data, "PUT")


def _answers(port: int) -> bool:
    try:
        return bool(get(port, "/system"))
    except OSError:
        return False
