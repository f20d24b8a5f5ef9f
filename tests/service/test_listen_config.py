"""The configuration of listen, its verb, and how both fail."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ROOT, Run, start_without, two_lines
from listen_process import send, study, wait_for

from medmoe_edge.bedside.listen.config import load_configuration
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import InputError

GOOD = """
folder = "node"
peers = [{ ae_title = "SENDER" }]
questions = [{ ask = ["Is there effusion?"] }]
"""


def test_a_small_configuration(tmp_path: Path) -> None:
    (tmp_path / "listen.toml").write_text(GOOD)
    found = load_configuration(tmp_path / "listen.toml")
    assert found.folder == tmp_path / "node"
    assert (found.ae_title, found.host, found.model) == ("MEDMOE", "127.0.0.1", "nano")
    assert found.questions_for("CR", "") == ("Is there effusion?",)
    values = {
        "folder": "/node",
        "peers": [{"ae_title": "A"}],
        "questions": [{"ask": ["q"]}],
        "fhir": [{"url": "https://x.example/fhir", "version": "R5"}],
    }
    (tmp_path / "listen.json").write_text(json.dumps(values))
    found = load_configuration(tmp_path / "listen.json")
    assert found.all_documents == ("comprehensive-3d-sr", "fhir-r5")


def test_yes_and_no_are_chosen_between_and_other_answers_where_they_are_given(
    tmp_path: Path,
) -> None:
    path = tmp_path / "listen.toml"
    sides = '{ ask = ["Which side?", "Is it clear?"], choices = ["left", "right"] }'
    path.write_text(GOOD.replace("questions = [", f"questions = [{sides}, "))
    found = load_configuration(path)
    asked = ["Is there effusion?", "Which side?", "Is it clear?", "What is it?"]
    assert found.choices_for(asked) == {
        "Is there effusion?": ("Yes", "No"),
        "Which side?": ("left", "right"),
        "Is it clear?": ("left", "right"),
    }
    path.write_text("yes_no = false\n" + GOOD)
    assert load_configuration(path).choices_for(asked) == {}
    path.write_text(GOOD.replace('effusion?"]', 'effusion?"], choices = ["yes", "Yes"]'))
    with pytest.raises(InputError, match="'yes' is there twice"):
        load_configuration(path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "folder"),
        ("[", "not TOML"),
        (GOOD + "[[dicom]]\nae_title='A'\nhost='h'\nport=0", "dicom.0.port"),
        (GOOD + "modle = 'nano'", "unknown entry: modle"),
        (GOOD + "ae_title = 'SEVENTEENLETTERS!'", "ae_title"),
        (GOOD + "ae_title = '  '", "ae_title"),
        (GOOD + "documents = ['pdf']", "documents.0"),
        (GOOD + "port = 'x'", "port"),
        (GOOD.replace('"node"', '""'), "folder"),
        (GOOD + "audit = ''", "audit"),
        (GOOD.replace('["Is there effusion?"]', "[]"), "questions.0.ask"),
        (GOOD.replace('"Is there effusion?"', '" "'), "questions.0.ask.0"),
        (GOOD.replace('"SENDER"', '"SENDER", hosts = ["localhost"]'), "peers.0.hosts.0"),
        *((GOOD + f"host = '{host}'", "host") for host in ("", "a..b", "h" * 64)),
        (GOOD.replace('"SENDER"', '"SENDER", hosts = []'), "peers.0.hosts"),
        *((GOOD + f"{name} = true", name) for name in ("keep_days", "reserve_mb", "timeout")),
        *((GOOD + f"timeout = {value}", "timeout") for value in ("1e12", "inf", "nan", "0")),
        *((GOOD + f"series.quiet = {value}", "series.quiet") for value in ("1e12", "inf", "-1")),
        (GOOD + "certainty.probable = nan", "certainty.probable"),
        (GOOD + "[http]\nhost = 'a..b'", "http.host"),
        (GOOD + "[[hl7]]\nhost = 'a..b'\nport = 1", "hl7.0.host"),
        (GOOD + "[[stow]]\nurl = 'https://a..b'", "stow.0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, run: Run, text: str, what: str) -> None:
    path = tmp_path / "listen.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=what):
        load_configuration(path)
    result = run("listen", "--config", "listen.toml")
    assert result.exit_code == 2
    assert what in two_lines(result)[0]


def test_a_key_that_is_there_twice_is_refused_in_json_too(tmp_path: Path) -> None:
    values = {"folder": "/node", "peers": [{"ae_title": "A"}], "questions": [{"ask": ["q"]}]}
    path = tmp_path / "listen.JSON"
    path.write_text(json.dumps(values | {"timeout": 5}))
    assert load_configuration(path).timeout == 5
    path.write_text('{"keep_images": true, "keep_images": false, ' + json.dumps(values)[1:])
    with pytest.raises(InputError, match="'keep_images' is there twice"):
        load_configuration(path)


@pytest.mark.parametrize(
    ("kind", "one", "other", "name"),
    [
        ("hl7", 'application = "A"', 'application = "B"', "mllp://h:1"),
        ("sources", 'ae_title = "A"', 'ae_title = "A"', "A"),
    ],
)
def test_what_would_be_one_in_the_queue_is_refused(
    tmp_path: Path, kind: str, one: str, other: str, name: str
) -> None:
    path = tmp_path / "listen.toml"
    place = f'[[{kind}]]\nhost = "h"\nport = 1\n'
    path.write_text(f"{GOOD}{place}{one}")
    load_configuration(path)
    path.write_text(f"{GOOD}{place}{one}\n{place}{other}")
    with pytest.raises(InputError, match=f"{name} is there twice"):
        load_configuration(path)


def test_a_configuration_that_is_not_there(run: Run) -> None:
    result = run("listen", "--config", "none.toml")
    assert result.exit_code == 2
    assert "does not exist" in two_lines(result)[0]


def test_what_is_missing_is_named_with_its_extra() -> None:
    result = start_without(["pynetdicom"], "listen", "--config", "none.toml")
    assert result.returncode == 5
    assert "medmoe-edge[listen]" in result.stderr


def heard(systemd: socket.socket) -> Iterator[bytes]:
    """What has come since."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield systemd.recv(100)


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
def test_the_verb_answers_with_nano_and_ends_on_sigterm(tmp_path: Path) -> None:
    (tmp_path / "listen.toml").write_text(GOOD + "port = 0\nreserve_mb = 0\n")
    command = [sys.executable, str(ROOT / "cli.py"), "listen", "--json", "--config", "listen.toml"]
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.setblocking(False)
    systemd.bind(str(tmp_path / "notify"))
    states: list[bytes] = []
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        place = json.loads(process.stdout.readline())
        assert send(place["port"], study()) == [0]

        def is_watched_and_has_answered() -> bool:
            states.extend(heard(systemd))
            return b"WATCHDOG=1" in states and any(tmp_path.glob("node/documents/*/*.dcm"))

        wait_for(is_watched_and_has_answered, 60)
    finally:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0
    assert told.splitlines() == [NOTICE]
    first, *others, last = [*states, *heard(systemd)]
    systemd.close()
    assert (first, set(others), last) == (b"READY=1", {b"WATCHDOG=1"}, b"STOPPING=1")
