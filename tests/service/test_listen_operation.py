"""The node as it is run: figures and health, systemd, backup, what is kept and for how long; and
what frames of an object say together.
"""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import sqlite3
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import filelock
import httpx
import numpy as np
import pytest
from command_line import Run, answer_to, raising
from dicom_files import made
from listen_process import (
    PEER,
    QUESTION,
    SOME,
    Archive,
    StandIn,
    configuration,
    free_port,
    send,
    study,
    wait_for,
)
from prometheus_client.parser import text_string_to_metric_families
from pydicom import Dataset, dcmread
from pydicom.uid import UltrasoundMultiFrameImageStorage

from medmoe_edge.bedside.audit.log import AuditLog, head_file, verify_log
from medmoe_edge.bedside.listen.config import Configuration
from medmoe_edge.bedside.listen.desk import DAY, Desk, Tidying, restore
from medmoe_edge.bedside.listen.node import Node
from medmoe_edge.bedside.listen.queue import Folder, Queue, key_of
from medmoe_edge.bedside.listen.schema import VERSION, Membership
from medmoe_edge.bedside.listen.sending import COMMITMENT, Sending
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import InputError, ResourceError
from medmoe_edge.image.pixels import Image

# pynetdicom leaves a socket to the garbage collector where its peer hung up first.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = f"""
folder = "node"
peers = [{{ ae_title = "{PEER}" }}]
questions = [{{ ask = ["a?"] }}]
"""
FINDING = {"ask": [QUESTION], "code": ["60046008", "SCT", "Pleural effusion"]}


def get(url: str, **options: Any) -> httpx.Response:
    """As httpx does, but for its five seconds: the machine may be busy."""
    return httpx.get(url, timeout=60, **options)


def answered(node: Node, count: int = 1) -> None:
    wait_for(lambda: node.queue.counts()["answered"] == count)


def test_prometheus_and_an_orchestrator_are_told_how_the_node_stands(tmp_path: Path) -> None:
    with Node(configuration(tmp_path / "node", http={"port": 0}), StandIn()) as node:
        assert send(node.port, study()) == [0]
        answered(node)
        url = f"http://127.0.0.1:{node.web_port}"
        for route in ("/healthz", "/readyz"):
            assert get(url + route).json()["status"] == "ready"
            assert httpx.head(url + route).status_code == 200
        text = get(f"{url}/metrics").text
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert found["medmoe_listen_objects",] == found["medmoe_listen_results",] == 1
        assert found["medmoe_listen_series", "answered"] == 1
        assert found["medmoe_listen_well",] == 1
        assert found["medmoe_listen_used_bytes",] > 0
        log = tmp_path / "node" / "audit.jsonl"
        log.unlink()
        log.mkdir()  # answers could not be audited
        told = get(f"{url}/readyz")
        assert (told.status_code, "audit log" in told.json()["status"]) == (503, True)
        assert get(f"{url}/healthz").status_code == 200


def test_no_password_is_told_and_figures_need_the_token(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokens").write_text("pacs 0123456789abcdef0123\n")
    (tmp_path / "tokens").chmod(0o600)
    port = free_port()
    secret = f"http://jane:s3cret@127.0.0.1:{port}/r4?key=s4cret"
    shown = f"http://127.0.0.1:{port}/r4"
    values: dict[str, Any] = {
        "http": {"port": 0, "token_file": str(tmp_path / "tokens")},
        "fhir": [{"url": secret, "version": "R4"}],
        "stow": [{"url": secret}],
    }
    text = f'{CONFIG}[[fhir]]\nurl = "{secret}"\nversion = "R4"\n[[stow]]\nurl = "{secret}"\n'
    (tmp_path / "listen.toml").write_text(text)
    given = ["--config", str(tmp_path / "listen.toml"), "--json"]
    with Node(configuration(tmp_path / "node", **values), StandIn()) as node:
        assert send(node.port, study()) == [0]
        answered(node)
        wait_for(lambda: "again in" in caplog.text)
        url = f"http://127.0.0.1:{node.web_port}"
        assert get(f"{url}/healthz").status_code == 200
        assert get(f"{url}/readyz").status_code == 200
        for token in ("", "Bearer 0123456789abcdef0124"):
            refused = get(f"{url}/metrics", headers={"Authorization": token})
            assert refused.status_code == 401
            assert "medmoe" not in refused.text
        headers = {"Authorization": "Bearer 0123456789abcdef0123"}
        figures = get(f"{url}/metrics", headers=headers).text
        assert f'medmoe_listen_unsent{{destination="{shown}"}} 1.0' in figures
        (series,) = node.desk.series()
        said = [
            run("listen", *command, *given)
            for command in (
                ["status"],
                ["show", series["series"]],
                ["requeue", series["series"], "--destination", "nobody"],
            )
        ]
        # not stderr, where this process's node says meanwhile that it tries again
        assert json.loads(said[0].stdout)["unsent"] == {shown: 1, f"stow+{shown}": 1}
        assert shown in said[1].stdout
        assert shown in said[2].stderr
        named = run("listen", "requeue", series["series"], "--destination", shown, *given)
        assert json.loads(named.stdout) == {"sent_again": 0, "gone": 0}  # not sent before
    for each in (figures, caplog.text, *(result.output for result in said)):
        assert "s3cret" not in each
        assert "s4cret" not in each
        assert "jane" not in each


def test_pages_of_other_sites_reach_nothing(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("pacs 0123456789abcdef0123\n")
    tokens.chmod(0o600)
    routes = [("GET", "/healthz"), ("GET", "/metrics"), ("POST", "/studies")]
    with Node(configuration(tmp_path / "open", http={"port": 0}), StandIn()) as node:
        url = f"http://127.0.0.1:{node.web_port}"
        for method, route in routes:
            for host in (f"evil.example:{node.web_port}", "evil.example", "localhost.evil.example"):
                told = httpx.request(method, url + route, headers={"Host": host}, timeout=60)
                assert (told.status_code, told.json()["error"]["code"]) == (421, "wrong_host")
            foreign = {"Origin": "http://evil.example"}
            told = httpx.request(method, url + route, headers=foreign, timeout=60)
            assert (told.status_code, told.json()["error"]["code"]) == (403, "wrong_origin")
        packed = {"Content-Encoding": "gzip"}
        told = httpx.post(f"{url}/studies", headers=packed, content=b"a", timeout=60)
        assert (told.status_code, told.json()["error"]["code"]) == (415, "unsupported_encoding")
        for headers in ({}, {"Host": f"localhost:{node.web_port}"}, {"Origin": url}):
            assert get(f"{url}/healthz", headers=headers).status_code == 200
    guarded = {"port": 0, "token_file": str(tokens)}
    with Node(configuration(tmp_path / "guarded", http=guarded), StandIn()) as node:
        url = f"http://127.0.0.1:{node.web_port}/healthz"
        assert get(url, headers={"Host": "node.example"}).status_code == 200
        assert get(url, headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_the_http_port_may_have_an_address_of_ipv6(tmp_path: Path) -> None:
    http = {"host": "::1", "port": 0}
    with Node(configuration(tmp_path / "node", http=http), StandIn()) as node:
        assert get(f"http://[::1]:{node.web_port}/healthz").status_code == 200


def test_an_engine_that_hangs_is_not_well(tmp_path: Path) -> None:
    with Node(configuration(tmp_path / "node"), StandIn(seconds=2), stuck=0.2) as node:
        assert node.ails() == ""
        assert send(node.port, study()) == [0]
        wait_for(lambda: node.ails() == "an answer takes too long")
        answered(node)
        wait_for(lambda: node.ails() == "")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets, as systemd does")
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.bind(str(path))
        link.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        stop = threading.Event()
        with Node(configuration(tmp_path / "node"), StandIn()) as node:
            watching = threading.Thread(target=node.watch, args=[stop])
            watching.start()
            assert [link.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            stop.set()
            watching.join(10)
            while (told := link.recv(100)) == b"WATCHDOG=1":
                pass
            assert told == b"STOPPING=1"


def test_a_backup_of_a_running_node_is_whole_and_goes_on_elsewhere(tmp_path: Path) -> None:
    config = configuration(tmp_path / "node", series={"quiet": 0, "linger": 600})
    with Node(config, StandIn()) as node:
        assert send(node.port, study(1)) == [0]
        answered(node)
        slow = configuration(tmp_path / "node", series={"quiet": 600})
        node.answering.configuration = slow  # the second series waits
        assert send(node.port, study(2)) == [0]
        assert node.desk.back_up(config.audit_log, tmp_path / "node.tar") == 5
        assert stat.S_IMODE((tmp_path / "node.tar").stat().st_mode) & 0o077 == 0
        assert not list(node.folder.root.glob(".backup.*"))
        documents = {path.name: path.read_bytes() for path in node.folder.documents.glob("*/*")}
        with pytest.raises(InputError, match="holds a queue already"):
            restore(tmp_path / "node.tar", node.folder, config.audit_log)
    other = configuration(tmp_path / "other")
    with pytest.raises(InputError, match="cannot be restored"):
        restore(Path(__file__), Folder(other.folder), other.audit_log)
    restore(tmp_path / "node.tar", Folder(other.folder), other.audit_log)
    asked, restored = map(json.loads, other.audit_log.read_bytes().splitlines())
    assert (asked["event"], restored["event"]) == ("answer", "restore")
    assert (
        restored["input_sha256"] == hashlib.sha256((tmp_path / "node.tar").read_bytes()).hexdigest()
    )
    with Node(other, StandIn()) as node:
        answered(node, 2)
        kept = {path.name: path.read_bytes() for path in node.folder.documents.glob("*/*")}
        assert documents.items() <= kept.items()
        assert send(node.port, study(1)) == [0]  # it knows it
        assert node.queue.counts() == {"waiting": 0, "answered": 2, "failed": 0, "unsent": 0}


def test_a_backup_does_not_hold_up_a_node_that_receives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path / "node")
    folder = Folder(config.folder)
    queue = Queue(folder.queue)
    for name in "ab":
        folder.keep(folder.image(key_of(name)), b"image")
        queue.add(key_of(name), "0" * 64, "peer", ["What is shown?"])
    copied: list[str] = []

    def copy(path: Path, target: Path) -> None:
        """While the first file is linked, another comes and one is answered."""
        copied.append(path.stem)
        if len(copied) == 1:
            folder.keep(folder.image(key_of("c")), b"image")
            queue.add(key_of("c"), "0" * 64, "peer", ["What is shown?"])
            queue.close_series(queue.job(key_of("a")), "answered")  # a lock would be an error
            folder.image(key_of("a")).unlink()
        target.write_bytes(path.read_bytes())  # or an error, where it is the one that was answered

    monkeypatch.setattr(os, "link", copy)
    Desk(folder.root).back_up(config.audit_log, tmp_path / "node.tar")
    queue.close()
    assert len(copied) >= 2
    monkeypatch.undo()
    other = configuration(tmp_path / "other")
    place = Folder(other.folder)
    restore(tmp_path / "node.tar", place, other.audit_log)
    again = Queue(place.queue)
    waiting = again.waiting(9)
    assert sorted(waiting) == sorted(key_of(name) for name in "bc")
    assert {path.stem for path in place.images.iterdir()} == set(waiting)
    again.close()


def test_a_backup_at_work_takes_nothing_of_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path / "node")
    folder = Folder(config.folder)
    queue, link = Queue(folder.queue), os.link
    folder.keep(folder.image(key_of("a")), bytes(1_000_000))
    queue.add(key_of("a"), "0" * 64, "peer", ["What is shown?"])
    found: list[int] = []

    def measured(path: Path, target: Path) -> None:
        link(path, target)
        found.append(Folder(config.folder).used())

    monkeypatch.setattr(os, "link", measured)
    Desk(config.folder).back_up(config.audit_log, tmp_path / "node.tar")
    queue.close()
    assert 1_000_000 < found[0] < 2_000_000


def test_an_audit_log_from_an_older_backup_is_good_and_says_so(tmp_path: Path) -> None:
    config = configuration(tmp_path / "node")
    Queue(Folder(config.folder).queue).close()
    log = AuditLog(config.audit_log)
    entry: dict[str, Any] = {
        "who": "peer",
        "event": "answer",
        "model": {},
        "question": "q",
        "input_sha256": "",
    }
    log.append(answer="first", **entry)
    Desk(config.folder).back_up(config.audit_log, tmp_path / "node.tar")
    log.append(answer="second", **entry)
    lost = verify_log(config.audit_log).head

    config.folder.rename(tmp_path / "broken")  # with the log, or it stays
    config.audit_log.unlink(missing_ok=True)
    restore(tmp_path / "node.tar", Folder(config.folder), config.audit_log)
    report = verify_log(config.audit_log)
    assert (report.intact, report.entries) == (True, 2)
    last = json.loads(config.audit_log.read_bytes().splitlines()[-1])
    assert last["event"] == "restore"
    assert lost in last["answer"]  # what is missing can be named
    AuditLog(config.audit_log).append(answer="third", **entry)
    assert verify_log(config.audit_log).intact


@pytest.mark.parametrize("by", ["node", "backup"])
def test_what_a_killed_backup_left_of_images_goes(tmp_path: Path, by: str) -> None:
    config = configuration(tmp_path / "node")
    Queue(Folder(config.folder).queue).close()
    left, at_work = config.folder / ".backup.abc", config.folder / ".restore.def"
    for place in (left, at_work):
        (place / "images").mkdir(parents=True)
        (place / "images" / "key.dcm").write_bytes(b"image")
    os.utime(left, (time.time() - 2 * DAY,) * 2)
    if by == "node":
        with Node(config, StandIn()):
            pass
    else:
        Desk(config.folder).back_up(config.audit_log, tmp_path / "node.tar")
    assert not left.exists()
    assert at_work.exists()


def test_uids_of_requests_that_are_closed_go(tmp_path: Path, desk: Desk) -> None:
    """Left by a node that ended between the two."""
    for study_uid in ("1.2.3", "1.2.4"):
        desk.request(study_uid, 0, "")
    for path in desk.folder.requests.iterdir():
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    desk.request("1.2.5", 0, "")
    for number in (1, 3):
        desk.close_request(number, "fetched")
    desk.back_up(tmp_path / "audit.jsonl", tmp_path / "node.tar")
    assert {path.read_text() for path in desk.folder.requests.iterdir()} == {"1.2.4", "1.2.5"}


def test_a_restored_log_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails between its entry and its head would leave the head of a log that is removed."""
    config, other = configuration(tmp_path / "node"), configuration(tmp_path / "other")
    Queue(Folder(config.folder).queue).close()
    entry: dict[str, Any] = {"who": "p", "event": "answer", "model": {}, "question": "q"}
    AuditLog(config.audit_log).append(answer="a", input_sha256="", **entry)
    Desk(config.folder).back_up(config.audit_log, tmp_path / "node.tar")
    opened = Counter[str]()
    for module, name in ((os, "open"), (io, "open")):
        real = getattr(module, name)

        def count(path: Any, *given: Any, real: Any = real, **named: Any) -> Any:
            opened[str(path)] += 1
            return real(path, *given, **named)

        monkeypatch.setattr(module, name, count)
    restore(tmp_path / "node.tar", Folder(other.folder), other.audit_log)
    assert opened[str(other.audit_log)] == 1
    assert verify_log(other.audit_log).entries == 2


def test_restoring_does_not_hide_that_a_log_that_stayed_was_cut(tmp_path: Path) -> None:
    config = configuration(tmp_path / "node")
    audit = tmp_path / "audit.jsonl"
    Queue(Folder(config.folder).queue).close()
    log = AuditLog(audit)
    entry: dict[str, Any] = {
        "who": "peer",
        "event": "answer",
        "model": {},
        "question": "q",
        "input_sha256": "",
    }
    log.append(answer="first", **entry)
    Desk(config.folder).back_up(audit, tmp_path / "node.tar")
    log.append(answer="second", **entry)
    audit.write_bytes(audit.read_bytes().splitlines(keepends=True)[0])
    config.folder.rename(tmp_path / "broken")
    restore(tmp_path / "node.tar", Folder(config.folder), audit)
    assert verify_log(audit).fault == "head"


@pytest.mark.parametrize("stays", [False, True], ids=["log of the backup", "log that stays"])
def test_a_disk_that_refuses_the_entry_has_nothing_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    config, other = configuration(tmp_path / "node"), configuration(tmp_path / "other")
    folder = Folder(config.folder)
    Queue(folder.queue).close()
    folder.keep(folder.image(key_of("a")), b"image")
    entry: dict[str, Any] = {"who": "p", "event": "answer", "model": {}, "question": "q"}
    AuditLog(config.audit_log).append(answer="a", input_sha256="", **entry)
    Desk(config.folder).back_up(config.audit_log, tmp_path / "node.tar")
    place = Folder(other.folder)
    if stays:
        AuditLog(other.audit_log).append(answer="b", input_sha256="", **entry)

    def files() -> dict[Path, bytes]:
        found = (path for path in tmp_path.joinpath("other").rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in found if path.suffix != ".lock"}

    before = files()
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patched.setattr(os, "fsync", Mock(side_effect=full))
        unlink, removed = Path.unlink, list[Path]()

        def remove(path: Path, missing_ok: bool = False) -> None:
            removed.append(path)
            unlink(path, missing_ok)

        patched.setattr(Path, "unlink", remove)
        with pytest.raises(ResourceError, match=r"No space left.*Nothing was restored"):
            restore(tmp_path / "node.tar", place, other.audit_log)
        ours = [path for path in removed if path in (place.queue, place.image(key_of("a")))]
        assert ours == [place.queue, place.image(key_of("a"))]  # a queue never lacks its images
    assert files() == before
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "move", Mock(side_effect=full))
        with pytest.raises(ResourceError, match=r"No space left.*nothing was"):
            restore(tmp_path / "node.tar", place, other.audit_log)
    assert files() == before
    move = shutil.move

    def move_all_but_the_queue(path: Path, target: Path) -> None:
        if target == place.queue:
            raise full
        move(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "move", move_all_but_the_queue)
        with pytest.raises(ResourceError, match=r"No space left.*nothing was"):
            restore(tmp_path / "node.tar", place, other.audit_log)
    assert files() == before
    if not stays:
        AuditLog(other.audit_log).append(answer="b", input_sha256="", **entry)
        assert verify_log(other.audit_log).intact  # no head was kept of what was removed
        other.audit_log.unlink()
        head_file(other.audit_log).unlink()
    assert restore(tmp_path / "node.tar", place, other.audit_log) == 3
    report = verify_log(other.audit_log)
    assert (report.intact, report.entries) == (True, 2)


def test_a_queue_that_appears_during_a_restore_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, other = configuration(tmp_path / "node"), configuration(tmp_path / "other")
    folder, place = Folder(config.folder), Folder(other.folder)
    Queue(folder.queue).close()
    folder.keep(folder.image(key_of("a")), b"image")
    Desk(config.folder).back_up(config.audit_log, tmp_path / "node.tar")
    move = shutil.move

    def move_while_a_node_starts(path: Path, target: Path) -> None:
        place.queue.write_bytes(b"a node's")
        move(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "move", move_while_a_node_starts)
        with pytest.raises(InputError, match=r"holds a queue already.*Nothing was restored"):
            restore(tmp_path / "node.tar", place, other.audit_log)
    assert place.queue.read_bytes() == b"a node's"
    assert not list(place.images.iterdir())
    assert not other.audit_log.exists()


def test_the_commands_back_up_and_restore(tmp_path: Path, run: Run) -> None:
    text = CONFIG
    (tmp_path / "listen.toml").write_text(text)
    given = ["--config", str(tmp_path / "listen.toml"), "--json"]
    assert run("listen", "backup", "-o", str(tmp_path / "b.tar"), *given).exit_code == 2
    assert not (tmp_path / "node").exists()  # nothing is made by looking
    Queue(Folder(tmp_path / "node").queue).close()
    done = run("listen", "backup", "-o", str(tmp_path / "b.tar"), *given)
    assert json.loads(done.stdout) == {"files": 1}
    assert run("listen", "backup", "-o", str(tmp_path / "b.tar"), *given).exit_code == 2
    for name, code in (("b.tar", 0), ("b.tar", 0), ("queue.sqlite", 2)):  # its own is not replaced
        place = str(tmp_path / "node" / name)
        assert run("listen", "backup", "-o", place, "--force", *given).exit_code == code
    (tmp_path / "listen.toml").write_text(text.replace('"node"', '"other"'))
    done = run("listen", "restore", str(tmp_path / "b.tar"), *given)
    assert json.loads(done.stdout) == {"files": 1}
    assert json.loads(run("listen", "status", *given).stdout)["objects"] == 0


def test_the_command_asks_for_a_study(tmp_path: Path, run: Run) -> None:
    text = CONFIG
    (tmp_path / "listen.toml").write_text(text)
    Queue(Folder(tmp_path / "node").queue).close()
    given = ["--config", str(tmp_path / "listen.toml"), "--json"]
    assert "No source" in run("listen", "ask", "--study", "1.2.3", *given).output
    source = '[[sources]]\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n'
    (tmp_path / "listen.toml").write_text(text + source)
    assert run("listen", "ask", "--study", "1.2.3; DROP", *given).exit_code == 2
    assert "PACS" in run("listen", "ask", "--study", "1.2.3", "--source", "x", *given).output
    done = run("listen", "ask", "--study", "1.2.3", "--priors", "2", *given)
    assert json.loads(done.stdout) == {
        "request": 1,
        "source": "PACS",
        "state": "waiting",
        "why": "",
    }
    assert json.loads(run("listen", "status", *given).stdout)["requests"]["waiting"] == 1


def test_the_log_goes_to_files_that_do_not_grow_for_ever(tmp_path: Path) -> None:
    from medmoe_edge.bedside.listen.config import Log
    from medmoe_edge.cli import bedside

    ours = logging.getLogger("medmoe_edge")
    before, umask = list(ours.handlers), os.umask(0o022)
    try:
        bedside._run_as_service(Log(file=tmp_path / "node.log", max_mb=1, keep=2))
        for number in range(4):
            ours.error("%d %s", number, "x" * 700_000)
        for handler in ours.handlers:
            handler.close()
    finally:
        ours.handlers = before
        os.umask(umask)
    files = sorted(tmp_path.glob("node.log*"))
    assert [path.name for path in files] == ["node.log", "node.log.1", "node.log.2"]
    assert files[0].read_text()[:4].isdigit()  # each line says when
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_nothing_is_accepted_that_cannot_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    big = study(2, Rows=1000, Columns=1000)
    big.PixelData = bytes(1_000_000)
    config = configuration(tmp_path / "node", quota_mb=1)
    with Node(config, StandIn()) as node:
        assert send(node.port, study(1)) == [0]
        assert send(node.port, big) == [0xA700]
        answered(node)
        assert "reached its quota_mb" in caplog.text
        assert not [path for path in node.folder.images.iterdir() if path.stat().st_size > 10**6]


def replaced_folder(root: Path) -> None:
    root.rename(root.with_name("old"))
    root.mkdir(mode=0o700)


def replaced_lock(root: Path) -> None:
    (root / "lock").rename(root / "old")  # the descriptor stays open, so that its number is taken
    (root / "lock").touch()


@pytest.mark.skipif(os.name != "posix", reason="no open file can be moved elsewhere")
@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (replaced_folder, "The"),
        (shutil.rmtree, "The"),
        (replaced_lock, "lock of the"),
        (lambda root: (root / "queue.sqlite").unlink(), "queue.sqlite of the"),
        (lambda root: shutil.rmtree(root / "documents"), "documents of the"),
        (lambda root: shutil.rmtree(root / "images"), "images of the"),
    ],
)
def test_nothing_is_accepted_into_another_folder_than_the_queues(
    tmp_path: Path, change: Any, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Node(configuration(tmp_path / "node", http={"port": 0}), StandIn()) as node:
        url = f"http://127.0.0.1:{node.web_port}"
        assert get(f"{url}/readyz").status_code == 200
        change(node.folder.root)
        assert send(node.port, study(1)) == [0xA700]
        told = get(f"{url}/readyz")
        assert told.status_code == 503
        assert f"{lost} node's folder was moved" in told.json()["status"]
        assert f"{lost} node's folder was moved" in caplog.text
        if lost == "The":  # nothing was begun in what took its place
            assert not list(node.folder.root.glob("*"))
        assert not [*node.folder.root.glob("images/*"), *node.folder.root.glob("documents/*")]


@pytest.mark.skipif(os.name != "posix", reason="no open file can be moved elsewhere")
def test_an_object_whose_folder_goes_while_it_is_kept_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        add = node.queue.add

        def moved(*given: Any) -> None:
            replaced_folder(node.folder.root)
            add(*given)

        monkeypatch.setattr(node.queue, "add", moved)
        assert send(node.port, study(1)) == [0xA700]


@pytest.mark.parametrize(
    ("of", "name"), [(Path, "mkdir"), (filelock.FileLock, "acquire"), (Path, "unlink")]
)
def test_a_folder_that_is_read_only_is_the_machines_fault(
    tmp_path: Path, of: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Folder(tmp_path / "node").image(FIRST).touch()
    Folder(tmp_path / "node").image(SECOND).with_name(f".{SECOND}.dcm.1.part").touch()
    monkeypatch.setattr(of, name, raising(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(ResourceError, match=r"node cannot be written \(Read-only file system\)"):
        Node(configuration(tmp_path / "node"), StandIn())


@pytest.mark.skipif(os.name != "posix", reason="no open file can be moved elsewhere")
def test_what_waits_is_answered_and_sent_once_its_folder_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.sending.MOST_FAILURES", 1)
    away = tmp_path / "away"
    with Archive() as archive:
        config = configuration(
            tmp_path / "node",
            series={"quiet": 600},
            dicom=[{"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}],
        )
        with Node(config, StandIn(), first_delay=0.1) as node:
            assert send(node.port, study(1)) == [0]
            node.folder.root.rename(away)
            wait_for(lambda: "Answering cannot work (The node's folder" in caplog.text)
            job = node.queue.job(*node.queue.waiting(1))
            with pytest.raises(ResourceError, match="was moved"):
                node.answering.do(job.key)  # or it would be given up: its images are gone
            (sending,) = (each for each in node._workers if "Sending" in each.name)
            with pytest.raises(ResourceError, match="was moved"):
                sending._do(f"{FIRST}/1.dcm")  # or it would be set aside as gone
            away.rename(node.folder.root)
            node.answering.configuration = config.model_copy(
                update={"series": config.series.model_copy(update={"quiet": 0})}
            )
            wait_for(lambda: bool(archive.received))
            assert node.lacks() == ""
            assert node.queue.counts()["failed"] == 0
            assert "set aside" not in caplog.text


def test_images_of_another_queue_are_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configuration(tmp_path / "node", series={"quiet": 600})
    with Node(config, StandIn()) as node:
        assert send(node.port, study(1), study(2)) == [0, 0]
        images = {path.name: path.read_bytes() for path in node.folder.images.iterdir()}
        node.folder.queue.rename(tmp_path / "kept.sqlite")
    with Node(config, StandIn()) as node:
        aside = node.folder.root / "unknown"
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == images
        assert not list(node.folder.images.iterdir())
        assert "2 received images are not in the node's queue" in caplog.text
        assert str(aside) in caplog.text
        assert send(node.port, study(1), study(2)) == [0, 0]
        (node.folder.images / f"{FIRST}.dcm").touch()  # as one that is killed leaves it
    with Node(config, StandIn()) as node:
        assert {path.name for path in node.folder.images.iterdir()} == images.keys()
        assert {path.name for path in aside.iterdir()} == images.keys()


def test_what_was_sent_goes_after_a_while_and_is_known_still(tmp_path: Path) -> None:
    config = configuration(tmp_path / "node", keep_days=30, keep_images=True)
    with Node(config, StandIn()) as node:
        assert send(node.port, study(1)) == [0]
        answered(node)
        tidying, (result,) = Tidying(config, node.desk), node.folder.documents.iterdir()
        (node.folder.documents / ".DS_Store").touch()  # no result: a person's computer made it
        assert tidying.pending(1) == []  # the clock may not be set yet
        tidying.do("old files")
        assert tidying.pending(1) == []
        assert result.exists()
        old = time.time() - 31 * DAY
        for path in (*result.iterdir(), result, *node.folder.images.iterdir()):
            os.utime(path, (old, old))
        node.queue.ask_commitment("somewhere", "1.2", {f"{result.name}/x.dcm": "1.3"})
        node.queue._write(
            "INSERT INTO delivery (document, destination, sent) VALUES (?, 'somewhere', 1)",
            [(f"{result.name}/x.dcm",)],
        )
        tidying.do("old files")
        assert result.exists()  # nobody has said yet that he keeps it
        node.queue.commit("1.2", ["1.3"], "kept")
        tidying.do("old files")
        assert not result.exists()
        assert not list(node.folder.images.iterdir())
        (series,) = node.desk.series()
        assert node.desk.show(series["series"])["results"][0]["answers"] == []
        assert send(node.port, study(1)) == [0]
        assert node.queue.counts() == {"waiting": 0, "answered": 1, "failed": 0, "unsent": 0}


WHERE = "hl7://ris:2575"
OURS, OTHERS = "1" * 64, "2" * 64  # series
FIRST, SECOND, THIRD = "a" * 64, "b" * 64, "c" * 64  # results


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    Queue(Folder(tmp_path / "node").queue).close()
    with contextlib.closing(Desk(tmp_path / "node")) as desk:
        yield desk


def make(desk: Desk, series: str, result: str, *names: str, replaced: Iterable[str] = ()) -> None:
    """Record a result that takes the place of others; its documents go to one destination."""
    desk.add(f"an object of {result}", "", PEER, [QUESTION], membership=Membership(series))
    for name in names:
        desk.folder.keep(desk.folder.documents / result / name, b"a document")
    deliveries = [(f"{result}/{name}", WHERE) for name in names]
    desk.answered(desk.job(series), result, [], {QUESTION: "{}"}, deliveries, replaced)


def test_a_withdrawal_that_was_refused_is_wanted_whatever_becomes_of_its_result(
    tmp_path: Path, desk: Desk
) -> None:
    make(desk, OURS, FIRST, "1.hl7")
    desk.sent(f"{FIRST}/1.hl7", WHERE)
    withdrawals = ("withdrawn.1.hl7", "aaaa.withdrawal.dcm")
    make(desk, OTHERS, SECOND, *withdrawals, "2.hl7", replaced=[FIRST])
    for name in (*withdrawals, "2.hl7"):
        desk.refused(f"{SECOND}/{name}", WHERE, "it refused the message: AE")
    make(desk, OTHERS, THIRD, replaced=[SECOND])
    assert desk.status(configuration(tmp_path / "node"))["set_aside"] == {WHERE: 2}
    assert not desk.is_finished(SECOND, ())
    assert desk.retry([]) == (0, 2, 0)
    assert desk.unsent(WHERE, 9) == [f"{SECOND}/{name}" for name in withdrawals]


def test_what_was_refused_and_replaced_is_kept_no_longer(desk: Desk) -> None:
    make(desk, OURS, FIRST, "1.hl7", "2.hl7")
    desk.sent(f"{FIRST}/1.hl7", WHERE)
    desk.refused(f"{FIRST}/2.hl7", WHERE, "it refused the message: AE")
    assert not desk.is_finished(FIRST, ())
    make(desk, OURS, SECOND, "1.hl7", replaced=[FIRST])
    assert desk.is_finished(FIRST, ())
    assert not desk.is_finished(SECOND, ())  # it is to be sent


def old_results(desk: Desk, at: float) -> list[Path]:
    """The folders of two results that were sent, of which one has files from `at`."""
    for series, result in ((OURS, FIRST), (OTHERS, SECOND)):
        make(desk, series, result, "1.hl7")
        desk.sent(f"{result}/1.hl7", WHERE)
    folders = [desk.folder.documents / each for each in (FIRST, SECOND)]
    for folder, when in zip(folders, (at, time.time() - 31 * DAY), strict=True):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (when, when))
    return folders


@pytest.mark.parametrize("at", [0, 4e9])  # 1970 and 2096
def test_a_time_that_cannot_be_makes_nothing_old(
    desk: Desk, at: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medmoe_edge.bedside.listen")
    kept, old = old_results(desk, at)
    tidying = Tidying(configuration(desk.folder.root, keep_days=30), desk)
    for _ in range(2):
        tidying.do("old files")
        assert (kept.exists(), old.exists()) == (True, False)
    assert all(abs(path.stat().st_mtime - time.time()) < 600 for path in (kept, *kept.iterdir()))
    told = [each for each in caplog.messages if "keep_days" in each]
    assert told == ["Removed after keep_days: the documents of 1 results, and 0 images."]


@pytest.mark.parametrize("days", [4000, -40_000])
def test_a_clock_that_was_set_makes_nothing_old(
    desk: Desk, days: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = old_results(desk, time.time())
    tidying, right = Tidying(configuration(desk.folder.root, keep_days=30), desk), time.time
    monkeypatch.setattr(time, "time", lambda: right() + days * DAY)
    tidying.do("old files")
    assert "The clock was set" in caplog.text
    assert tidying.pending(1) == []  # not before an hour has gone
    monkeypatch.undo()
    tidying.do("old files")  # it was set back
    assert all(folder.exists() for folder in folders)
    tidying.do("old files")
    assert [folder.exists() for folder in folders] == [True, False]


def test_what_others_have_made_in_a_nodes_folder_stays(tmp_path: Path) -> None:
    """As file systems do: `.snapshot`, `lost+found`."""
    folder = Folder(tmp_path / "node")
    files = [
        place / "lost+found" / "a file"
        for place in (folder.root, folder.images, folder.documents, folder.requests)
    ]
    for file in files:
        file.parent.mkdir()
        file.touch()
        for path in (file, file.parent):
            os.utime(path, (time.time() - 31 * DAY,) * 2)
    config = configuration(tmp_path / "node", keep_days=30)
    with Node(config, StandIn()) as node:
        assert send(node.port, study(1)) == [0]
        answered(node)
        Tidying(config, node.desk).do("old files")
        assert node.desk.back_up(config.audit_log, tmp_path / "node.tar") > 0
    assert all(file.exists() for file in files)


def test_answers_go_though_the_process_ends_while_their_documents_do(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(desk, OURS, FIRST, "1.hl7")
    desk.sent(f"{FIRST}/1.hl7", WHERE)
    folder = desk.folder.documents / FIRST
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - 31 * DAY,) * 2)
    tidying = Tidying(configuration(desk.folder.root, keep_days=30), desk)
    tidying._due = time.monotonic()
    monkeypatch.setattr(shutil, "rmtree", raising(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        tidying.do("old files")
    assert desk.show(FIRST[:8])["results"][0]["answers"] == []
    monkeypatch.undo()
    assert tidying.pending(1)  # not only in an hour
    tidying.do("old files")
    assert not folder.exists()


def test_a_result_that_was_withdrawn_from_another_series_is_not_sent_again(desk: Desk) -> None:
    make(desk, OURS, FIRST, "1.hl7")
    make(desk, OURS, SECOND, "2.hl7", replaced=[FIRST])
    for document in (f"{FIRST}/1.hl7", f"{SECOND}/2.hl7"):
        desk.sent(document, WHERE)
    assert desk.requeue([OURS], None) == (2, 0)  # it corrects the first, and comes after it
    assert desk.unsent(WHERE, 9) == [f"{FIRST}/1.hl7"]
    for document in (f"{FIRST}/1.hl7", f"{SECOND}/2.hl7"):
        desk.sent(document, WHERE)
    make(desk, OTHERS, THIRD, "withdrawn.2.hl7", replaced=[SECOND])
    desk.sent(f"{THIRD}/withdrawn.2.hl7", WHERE)
    assert desk.requeue([OURS], None) == (0, 0)
    assert desk.requeue([OTHERS], None) == (1, 0)


def test_what_was_refused_and_is_gone_is_not_said_to_be_sent_again(desk: Desk) -> None:
    make(desk, OURS, FIRST, "1.hl7", "2.hl7")
    for name in ("1.hl7", "2.hl7"):
        desk.refused(f"{FIRST}/{name}", WHERE, "it refused the message: AE")
    (desk.folder.documents / FIRST / "1.hl7").unlink()
    assert desk.retry([]) == (0, 1, 1)
    assert desk.unsent(WHERE, 9) == [f"{FIRST}/2.hl7"]


def test_what_was_sent_waits_to_be_asked_about_and_what_is_gone_holds_nothing_up(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    values: dict[str, Any] = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": port}
    (tmp_path / "listen.toml").write_text(
        f'{CONFIG}[[dicom]]\nae_title = "ARCHIVE"\nhost = "127.0.0.1"\nport = {port}\n'
    )
    given = ["--config", str(tmp_path / "listen.toml")]
    peers = [{"ae_title": PEER}, {"ae_title": "ARCHIVE"}]

    def config(*, commitment: bool) -> Configuration:
        place = values | {"commitment": commitment}
        return configuration(tmp_path / "node", peers=peers, dicom=[place], keep_days=30)

    with Archive(port), Node(config(commitment=False), StandIn()) as node:
        assert send(node.port, study(1), study(2)) == [0, 0]
        answered(node, 2)
        wait_for(lambda: node.queue.counts()["unsent"] == 0)
    asking = config(commitment=True)
    (name,) = asking.committing
    folder, desk = Folder(tmp_path / "node"), Desk(tmp_path / "node")
    first, second = folder.documents.iterdir()
    shutil.rmtree(first)  # before commitment was configured
    old = time.time() - 31 * DAY
    for path in (*second.iterdir(), second):
        os.utime(path, (old, old))
    Tidying(asking, desk).do("old files")
    assert second.exists()  # the archive has not been asked yet
    sending = Sending(asking.dicom[0], "MEDMOE", folder, desk)
    assert sending.pending(9) == [COMMITMENT]
    with Archive(port), pytest.raises(ResourceError, match="no storage commitment"):
        sending.do(COMMITMENT)
    assert "1 documents are gone" in caplog.text
    assert desk.status(asking)["uncommitted"] == {name: 1}  # the one that can be asked about
    (left,) = desk.uncommitted(name, 9)
    assert left.startswith(second.name)
    keys = [each["series"] for each in desk.series()]
    assert json.loads(run("listen", "requeue", *keys, *given, "--json").stdout) == {
        "sent_again": 1,
        "gone": 1,
    }
    assert desk.unsent(name, 9) == [left]
    told = run("listen", "requeue", *keys, *given).output
    assert "0 documents are to be sent again" in told
    assert "1 were removed" in told
    desk.sent(left, name)
    desk.ask_commitment(name, "1.2", {left: "1.3"})
    assert desk.status(asking)["uncommitted"] == {name: 1}
    desk.commit("1.2", ["1.3"], "kept")
    assert desk.status(asking)["uncommitted"] == {}
    Tidying(asking, desk).do("old files")
    assert not second.exists()
    desk.close()


def test_whose_turn_it_is_takes_no_longer_where_much_waits(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.sqlite")
    names = [key_of(str(number)) for number in range(3)]
    queue.add("a" * 64, "b" * 64, PEER, [QUESTION])
    job = queue.job("a" * 64)
    for place, name in enumerate(names):
        waiting = [(f"{name}/{number}.hl7", "there") for number in range(5000)]
        queue.answered(job, name, ["a" * 64], {}, waiting, names[place - 1 : place])
    started = time.monotonic()
    found = queue.unsent("there", 20_000)
    assert time.monotonic() - started < 5
    assert {each[:64] for each in found} == {names[0]}  # what took its place waits for it
    assert len(found) == 5000
    queue.close()


def test_a_queue_of_version_2_is_taken_over(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "node")
    with Node(configuration(folder.root), StandIn()) as node:
        assert send(node.port, study(1)) == [0]
        answered(node)
    database = sqlite3.connect(folder.queue)
    database.executescript(
        "DROP TABLE commitment; DROP TABLE request; PRAGMA user_version = 2; VACUUM;"
    )
    database.close()
    with Node(configuration(folder.root), StandIn()) as node:
        assert node.queue.counts()["answered"] == 1
        assert node.desk.status(node.configuration)["requests"]["waiting"] == 0
    database = sqlite3.connect(folder.queue)
    assert database.execute("PRAGMA user_version").fetchone() == (VERSION,)
    database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.commit()
    database.close()
    with pytest.raises(ResourceError, match="later version"):
        Desk(folder.root)


def test_two_nodes_behind_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        Node(configuration(tmp_path / "node"), StandIn()),
        pytest.raises(ResourceError, match="Another node works") as refused,
    ):
        Node(configuration(tmp_path / "node"), StandIn())
    assert "folder of its own" in refused.value.remedy


class ByBrightness(StandIn):
    """Says "Yes" of bright pictures."""

    def ask_all(
        self, image: Image, questions: Any, *, max_new_tokens: int, **_: Any
    ) -> list[Answer]:
        self.asked += 1
        text = "Yes" if image.pixels.mean() > 128 else "No"
        sure = 0.99 if text == "Yes" else 0.95
        return [replace(answer_to(question, text), confidence=sure) for question in questions]


def cine(bright: int, frames: int = 6) -> Dataset:
    """An ultrasound of frames, of which some are bright."""
    pixels = np.zeros((frames, *SOME.shape), np.uint8)
    pixels[:, 0] = 255  # some contrast in each
    pixels[:bright, 8:] = 255
    pixels[:bright, :8] = 200
    uids = {
        "SOPClassUID": UltrasoundMultiFrameImageStorage,
        "SOPInstanceUID": "1.2.826.0.4711.70.3",
        "SeriesInstanceUID": "1.2.826.0.4711.70.2",
        "StudyInstanceUID": "1.2.826.0.4711.70.1",
    }
    return made(pixels, Modality="US", StudyDate="20240506", **uids)


@pytest.mark.parametrize(
    ("slices", "bright", "asked", "text", "presence"),
    [
        ("middle", 6, 1, "Yes", "52101004"),
        ("middle", 0, 1, "No", "373068000"),  # the other frames may show it
        ("all", 6, 6, "Yes", "52101004"),
        ("all", 0, 6, "No", "272519000"),
        ("all", 1, 6, "No", "373068000"),  # one shows it, whatever most say
        ("every", 6, 3, "Yes", "52101004"),
    ],
)
def test_frames_of_an_object_are_asked_and_vote(
    tmp_path: Path, slices: str, bright: int, asked: int, text: str, presence: str
) -> None:
    engine = ByBrightness()
    series = {"quiet": 0, "linger": 0, "slices": slices, "every": 2}
    config = configuration(
        tmp_path / "node",
        series=series,
        findings=[FINDING],
        documents=["comprehensive-3d-sr", "picture"],
    )
    with Node(config, engine) as node:
        assert send(node.port, cine(bright)) == [0]
        answered(node)
        (series_row,) = node.desk.series()
        ((answer,),) = [each["answers"] for each in node.desk.show(series_row["series"])["results"]]
    assert engine.asked == asked
    codes = {notice["code"]: notice["message"] for notice in answer["warnings"]}
    assert answer["answer"] == text
    assert ("frames" in codes) == (asked < 6)
    assert ("vote" in codes) == (asked > 1)
    (path,) = (tmp_path / "node" / "documents").glob("*/*-sr.dcm")
    report = dcmread(path)
    found = list(_items(report))
    (coded,) = [
        item.ConceptCodeSequence[0].CodeValue
        for item in found
        if item.ConceptNameCodeSequence[0].CodeValue == "60046008"
    ]
    assert coded == presence
    (frames,) = [
        item.ReferencedSOPSequence[0].ReferencedFrameNumber
        for item in found
        if item.ValueType == "IMAGE" and "ReferencedFrameNumber" in item.ReferencedSOPSequence[0]
    ]
    assert len([frames] if isinstance(frames, int | str) else frames) == asked
    pictures = list((tmp_path / "node" / "documents").glob("*/*.picture.dcm"))
    assert len(pictures) == asked
    assert len({dcmread(each).SOPInstanceUID for each in pictures}) == asked


def _items(item: Any) -> Any:
    for each in item.get("ContentSequence", []):
        yield each
        yield from _items(each)
