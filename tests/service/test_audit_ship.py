"""An audit log sent on to a collector that speaks TLS, in this process."""

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from command_line import Run, two_lines
from test_audit import lines, write

from medmoe_edge.bedside.audit import log as audit_log
from medmoe_edge.bedside.audit.log import Collector, ship
from medmoe_edge.errors import DataError, InputError, ResourceError


class Received:
    """A collector: what it was sent, whole once its connections have ended."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority = folder / "ca.pem"
        authority.cert_pem.write_to_path(self.authority)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.data, self.closes, self.closed = b"", False, threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                with contextlib.suppress(OSError), self._context.wrap_socket(plain, True) as peer:
                    while part := peer.recv(2**16):
                        self.data += part
                        if self.closes:
                            break
                self.closed.set()

    def messages(self) -> list[tuple[str, dict[str, object]]]:
        """The heads and entries, by the octet counts of RFC 5425."""
        found, rest = [], self.data
        while rest:
            count, _, rest = rest.partition(b" ")
            message, rest = rest[: int(count)], rest[int(count) :]
            head, brace, entry = message.partition(b"{")
            found.append((head.decode(), json.loads(brace + entry)))
        return found

    def end(self) -> None:
        """No more connections."""
        if self._thread.is_alive():
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join(20)
            self._listener.close()


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Received]:
    received = Received(tmp_path)
    yield received
    received.end()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "audit.jsonl", *"abc")


def place_of(collector: Received) -> Collector:
    return Collector("localhost", collector.port, collector.authority)


def test_each_line_is_sent_once(collector: Received, log: Path) -> None:
    assert ship(log, place_of(collector)) == 3
    write(log, "d")
    log.write_bytes(log.read_bytes() + b'{"being writ')  # left for the next time
    assert ship(log, place_of(collector)) == 1
    assert ship(log, place_of(collector)) == 0
    collector.end()
    heads, entries = zip(*collector.messages(), strict=True)
    assert list(entries) == [json.loads(line) for line in lines(log)[:4]]
    for head in heads:
        priority, when, _, program, _, kind, _ = head.split()
        assert (priority, program, kind) == ("<110>1", "medmoe-edge", "audit")
        assert when.endswith("Z")


def test_a_log_that_was_cut_or_changed_is_not_sent_on(collector: Received, log: Path) -> None:
    ship(log, place_of(collector))
    whole = lines(log)
    for changed in (whole[:2], [*whole[:2], whole[0]]):
        log.write_bytes(b"".join(changed))
        with pytest.raises(DataError, match="entry 3"):
            ship(log, place_of(collector))


@pytest.mark.parametrize("how", ["cut", "replaced", "removed"])
def test_a_log_that_is_replaced_while_it_is_followed_is_told(
    collector: Received, log: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A backup that is restored, say: what is then written would reach nobody."""
    monkeypatch.setattr(audit_log, "PAUSE", 0.05)
    shipped = log.with_name(f"{log.name}.shipped")

    def exchange() -> None:
        while not shipped.exists():
            time.sleep(0.01)
        if how == "cut":
            log.write_bytes(lines(log)[0])
        elif how == "removed":
            log.unlink()
        else:
            log.with_suffix(".copy").write_bytes(log.read_bytes())
            log.with_suffix(".copy").replace(log)

    thread = threading.Thread(target=exchange)
    thread.start()
    with pytest.raises(DataError, match="entry 4"):
        ship(log, place_of(collector), follow=True)
    thread.join()


def test_what_a_closed_connection_would_lose_is_sent_next_time(
    collector: Received, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectors and firewalls close what was idle; a line would still be taken, and be lost."""
    log = write(tmp_path / "audit.jsonl", "a")
    collector.closes = True

    def go_on(_: float) -> None:  # one line at a time, once the last has arrived
        assert collector.closed.wait(20)
        write(log, "b")

    monkeypatch.setattr(time, "sleep", go_on)
    with pytest.raises(ResourceError, match="takes no entries"):
        ship(log, place_of(collector), follow=True)
    assert ship(log, place_of(collector)) == 1
    collector.end()
    assert [entry["number"] for _, entry in collector.messages()] == [1, 2]


def test_a_disk_that_takes_no_note_is_not_the_collectors_fault(
    collector: Received, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "_shipped", lambda path: path.parent / "none" / "shipped")
    with pytest.raises(ResourceError, match="shipped cannot be written"):
        ship(log, place_of(collector))


def test_a_log_that_cannot_be_opened_is_told(collector: Received, log: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        ship(log.parent, place_of(collector))


def test_a_stranger_gets_nothing(
    collector: Received, log: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(other)
    with pytest.raises(ResourceError, match="takes no entries"):
        ship(log, Collector("localhost", collector.port, other))
    collector.end()
    assert collector.data == b""


@pytest.mark.parametrize("place", ["", ":6514", "logs:0", "logs:x", "logs:70000", "a..b"])
def test_a_place_that_is_none_is_refused(place: str) -> None:
    with pytest.raises(InputError, match="HOST"):
        Collector.at(place)


def test_places_as_people_write_them() -> None:
    assert Collector.at("logs.example") == Collector("logs.example", 6514)
    assert Collector.at("logs.example:601") == Collector("logs.example", 601)
    assert Collector.at("[::1]:601") == Collector("::1", 601)
    assert Collector.at("[::1]") == Collector("::1", 6514)


def test_the_verb_says_what_was_sent(run: Run, collector: Received, log: Path) -> None:
    where = ["--to", f"localhost:{collector.port}", "--tls-ca", str(collector.authority), "--json"]
    assert json.loads(run("audit", "ship", str(log), *where).stdout) == {"sent": 3}
    missing = run("audit", "ship", str(log.with_name("missing")), *where[:-1])
    assert missing.exit_code == 2
    assert two_lines(missing)
