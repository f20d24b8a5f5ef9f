"""The DICOM node: whom it lets in, what it keeps before it says so, and what it answers."""

import contextlib
import logging
import os
import socket
import sqlite3
import stat
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import answer_to, raising
from listen_process import (
    PEER,
    QUESTION,
    SOME,
    Archive,
    StandIn,
    configuration,
    free_port,
    located,
    send,
    study,
    wait_for,
)
from patients import SECRETS
from pydicom import dcmread
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    CTImageStorage,
    SecondaryCaptureImageStorage,
)
from pynetdicom.ae import ApplicationEntity

from medmoe_edge.bedside.audit.log import verify_log
from medmoe_edge.bedside.listen import node as listen_node
from medmoe_edge.bedside.listen import queue as listen_files
from medmoe_edge.bedside.listen import receiving as listen_receiving
from medmoe_edge.bedside.listen.answering import Answering
from medmoe_edge.bedside.listen.evidence import Evidence, Result, is_ours
from medmoe_edge.bedside.listen.node import Node
from medmoe_edge.bedside.listen.queue import Queue
from medmoe_edge.bedside.listen.selection import classes_with_pixels
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import CheckpointError, ImageError, Notice, ResourceError
from medmoe_edge.image.pixels import Image

# pynetdicom leaves a socket to the garbage collector where its peer hung up first.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def done(node: Node) -> bool:
    counts = node.queue.counts()
    return counts["waiting"] == counts["unsent"] == 0


def documents(node: Node) -> list[Path]:
    return sorted(node.folder.documents.glob("*/*"))


def test_an_image_is_received_answered_and_forgotten(tmp_path: Path) -> None:
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        assert send(node.port, study()) == [0]
        wait_for(lambda: done(node) and not list(node.folder.images.iterdir()))
        (path,) = documents(node)
        report = dcmread(path)
        assert node.queue.counts() == {"waiting": 0, "answered": 1, "failed": 0, "unsent": 0}
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.StudyInstanceUID == study().StudyInstanceUID == report.StudyInstanceUID
    instance = evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert instance.ReferencedSOPInstanceUID == study().SOPInstanceUID
    audit = tmp_path / "node" / "audit.jsonl"
    assert verify_log(audit).entries == 1
    assert QUESTION.encode("ascii", "backslashreplace")[:6] in audit.read_bytes()


def test_echo(tmp_path: Path) -> None:
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        entity = ApplicationEntity(PEER)
        entity.add_requested_context("1.2.840.10008.1.1")
        association = entity.associate("127.0.0.1", node.port, ae_title="MEDMOE")
        assert association.send_c_echo().Status == 0
        association.release()


@pytest.mark.parametrize(
    ("peer", "called"),
    [
        ({"ae_title": "OTHER"}, "MEDMOE"),
        ({"ae_title": PEER, "hosts": ["10.0.0.1"]}, "MEDMOE"),
        ({"ae_title": PEER}, "SOMEBODY"),
    ],
)
def test_who_is_not_on_the_list_is_not_let_in(
    tmp_path: Path, peer: dict[str, object], called: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Node(configuration(tmp_path / "node", peers=[peer]), StandIn()) as node:
        assert send(node.port, study(), called=called) == [-1]
        assert node.queue.counts()["waiting"] == 0
    why = "its AE title or address is not on the list"
    assert (why if called == "MEDMOE" else "it called another AE title") in caplog.text
    both = [("::", "127.0.0.1"), ("127.0.0.1", "::ffff:127.0.0.1")]
    for host, known in (
        ("127.0.0.1", "127.0.0.1"),
        *(both if socket.has_dualstack_ipv6() else []),
    ):
        peer = {"ae_title": PEER, "hosts": [known]}
        with Node(configuration(tmp_path / "node", host=host, peers=[peer]), StandIn()) as node:
            assert send(node.port, study()) == [0]


NO_LOG = raising(OSError(28, "No space left on device"))


@pytest.mark.parametrize("called", ["MEDMOE", "SOMEBODY"])
def test_who_is_rejected_is_so_even_where_the_log_cannot_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    monkeypatch.setattr(listen_receiving.log, "handle", NO_LOG)
    peer = {"ae_title": "OTHER" if called == "MEDMOE" else PEER}
    with Node(configuration(tmp_path / "node", peers=[peer]), StandIn()) as node:
        assert send(node.port, study(), called=called) == [-1]
        assert node.queue.counts()["waiting"] == 0


def test_who_cannot_be_judged_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        for method in ("_rejection", "_support_private"):
            with monkeypatch.context() as patch:
                patch.setattr(node.receiving, method, raising(RuntimeError("Doe^Jane")))
                assert send(node.port, study()) == [-1]
            wait_for(lambda: "rejected: it cannot be judged (RuntimeError)" in caplog.text)
            caplog.clear()
        assert send(node.port, study()) == [0]


def test_a_log_that_cannot_be_written_ends_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen_node.log, "handle", NO_LOG)
    with Node(configuration(tmp_path / "node"), StandIn(), first_delay=0.01) as node:
        with monkeypatch.context() as patch:
            patch.setattr(node._answerer, "_pending", raising(OSError("a")))
            time.sleep(0.2)
            patch.setattr(node._answerer, "_pending", lambda *_: ["1"])
            patch.setattr(node._answerer, "_do", raising(OSError("b")))
            wait_for(lambda: node._answerer._failures > 1)
        assert send(node.port, study()) == [0]
        wait_for(lambda: done(node))
        assert node.ails() == ""


@pytest.mark.parametrize(
    ("attributes", "status"),
    [
        ({"BurnedInAnnotation": "YES"}, 0x0124),
        ({"StudyInstanceUID": ""}, 0xC000),
        ({"SeriesInstanceUID": "Jane"}, 0xC000),
        ({"Rows": 0}, 0xC000),
        ({"Rows": 17}, 0xC000),
        ({"NumberOfFrames": 10**9}, 0xC000),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_what_cannot_be_used_is_refused_with_its_status(
    tmp_path: Path, attributes: dict[str, object], status: int
) -> None:
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        assert send(node.port, study(1, **attributes), study(2)) == [status, 0]
        wait_for(lambda: done(node) and not list(node.folder.images.iterdir()))
        assert node.queue.counts()["answered"] == 1


def test_objects_without_pixels_are_set_aside_and_images_without_refused(tmp_path: Path) -> None:
    report, empty = study(1, SOPClassUID=BasicTextSRStorage, Modality="SR"), study(2)
    del report.PixelData, empty.PixelData
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        assert send(node.port, report, empty, study(3)) == [0, 0xA900, 0]
        wait_for(lambda: done(node))
        assert node.queue.asides() == {"no_pixels": 1, "refused": 1}
        assert node.queue.counts()["answered"] == 1
    classes = classes_with_pixels()
    assert BasicTextSRStorage not in classes
    assert {CTImageStorage, SecondaryCaptureImageStorage} < set(classes)


def test_marked_pixels_are_taken_where_that_is_allowed(tmp_path: Path) -> None:
    with Node(configuration(tmp_path / "node", allow_burned_in=True), StandIn()) as node:
        assert send(node.port, study(1, BurnedInAnnotation="YES")) == [0]


def test_a_full_disk_keeps_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Node(configuration(tmp_path / "node", reserve_mb=10**9), StandIn()) as node:
        assert send(node.port, study()) == [0xA700]
    with Node(configuration(tmp_path / "node"), StandIn()) as node:

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            assert send(node.port, study()) == [0xA700]
        assert list(node.folder.images.iterdir()) == []
        with monkeypatch.context() as patch:

            def full(*_: object) -> None:
                raise ResourceError("Full.", "Free some.")

            patch.setattr(Queue, "add", full)
            assert send(node.port, study()) == [0xA700]
        assert list(node.folder.images.iterdir()) == []
        assert send(node.port, study()) == [0]


def test_an_object_beyond_the_limit_ends_the_connection(tmp_path: Path) -> None:
    large = study(1)
    large.Rows = large.Columns = 1200
    large.PixelData = bytes(1200 * 1200)
    with Node(configuration(tmp_path / "node", max_object_mb=1), StandIn()) as node:
        assert send(node.port, large) == [-1]
        assert send(node.port, study(2)) == [0]
        wait_for(lambda: done(node))
        assert node.queue.counts()["answered"] == 1


def test_who_says_nothing_takes_no_senders_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as stack:
        config = configuration(tmp_path / "node", max_associations=1)
        node = stack.enter_context(Node(config, StandIn()))
        for _ in range(5):
            stack.enter_context(socket.create_connection(("127.0.0.1", node.port), 20))
        assert send(node.port, study(1)) == [0]
        entity = ApplicationEntity(PEER)
        entity.add_requested_context("1.2.840.10008.1.1")
        open_one = entity.associate("127.0.0.1", node.port, ae_title="MEDMOE")
        assert open_one.is_established
        assert send(node.port, study(2)) == [-1]
        wait_for(lambda: "rejected: max_associations are open" in caplog.text)
        open_one.release()
        wait_for(lambda: send(node.port, study(2)) == [0])


def test_senders_that_come_at_once_are_counted_before_they_are_established(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(listen_receiving.Receiving, "accepted", lambda *_: go_on.wait(20))
    entity = ApplicationEntity(PEER)
    entity.add_requested_context("1.2.840.10008.1.1")
    with Node(configuration(tmp_path / "node", max_associations=2), StandIn()) as node:
        several = [entity.associate("127.0.0.1", node.port, ae_title="MEDMOE") for _ in range(4)]
        assert [each.is_established for each in several] == [True, True, False, False]
        go_on.set()
        for each in several[:2]:
            each.release()
        wait_for(lambda: send(node.port, study()) == [0])


def test_a_sender_beyond_all_connections_is_told_of_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listen_node, "MOST_CONNECTIONS", 1)
    with contextlib.ExitStack() as stack:
        config = configuration(tmp_path / "node", max_associations=1)
        node = stack.enter_context(Node(config, StandIn()))
        for _ in range(2):
            stack.enter_context(socket.create_connection(("127.0.0.1", node.port), 20))
        wait_for(lambda: len(node._entity.active_associations) == 2)
        assert send(node.port, study()) == [-1]
        assert "rejected: too many connections are open" in caplog.text


def test_who_waits_for_the_node_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects that take longer to keep than a peer may be silent."""
    with Node(configuration(tmp_path / "node", timeout=1.0), StandIn()) as node:
        keep = node.folder.keep

        def slowly(path: Path, data: bytes) -> None:
            time.sleep(1.5)
            keep(path, data)

        monkeypatch.setattr(node.folder, "keep", slowly)
        assert send(node.port, study(1), study(2), study(3)) == [0] * 3


@pytest.mark.parametrize("announced", [0xFFFFFFF0, 1000])
def test_a_pdu_without_end_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, announced: int
) -> None:
    """Nobody has said who he is yet: a header must not take gigabytes, nor a drip a place."""
    with Node(configuration(tmp_path / "node", timeout=1), StandIn()) as node:
        with socket.create_connection(("127.0.0.1", node.port), 20) as peer:
            peer.sendall(b"\x01\0" + announced.to_bytes(4))
            with contextlib.suppress(OSError):
                for _ in range(100):
                    peer.sendall(b"\0")
                    time.sleep(0.05)
            with contextlib.suppress(ConnectionResetError):
                assert peer.recv(1) == b""
        wait_for(lambda: "a PDU is too long, or does not come to its end" in caplog.text)
        assert send(node.port, study(2)) == [0]


def test_what_is_sent_again_is_answered_once(tmp_path: Path) -> None:
    engine = StandIn(0.05)
    with Node(configuration(tmp_path / "node"), engine) as node:
        assert send(node.port, study(), study()) == [0, 0]
        wait_for(lambda: done(node))
        assert send(node.port, study()) == [0]
        assert done(node)
    assert engine.asked == 1
    with Node(configuration(tmp_path / "node"), engine) as node:  # and after a restart
        assert send(node.port, study()) == [0]
        assert done(node)
        assert list(node.folder.images.iterdir()) == []


def test_questions_go_by_modality_and_body_part(tmp_path: Path) -> None:
    questions = [
        {"modalities": ["CR", "DX"], "ask": ["a"]},
        {"modalities": ["CR"], "body_parts": ["chest"], "ask": ["b", "a"]},
        {"modalities": ["CT"], "ask": ["c"]},
    ]
    with Node(configuration(tmp_path / "node", questions=questions), StandIn()) as node:
        foot, mri = study(2, BodyPartExamined="FOOT"), study(3, Modality="MR")
        assert send(node.port, study(1), foot, mri) == [0, 0, 0]
        wait_for(lambda: done(node) and not list(node.folder.images.iterdir()))
        rows = sqlite3.connect(node.folder.queue).execute(
            "SELECT source.object, question FROM answer JOIN source ON source.result = answer.key"
        )
        found = sorted(rows)
        assert node.queue.counts()["answered"] == 2
        assert node.queue.asides() == {"no_question": 1}  # of the MR nothing is asked
    keys = {number: listen_files.key_of(study(number).SOPInstanceUID) for number in (1, 2)}
    assert found == sorted([(keys[1], "a"), (keys[1], "b"), (keys[2], "a")])


def test_an_answer_that_fails_is_tried_again_and_a_hopeless_one_given_up(tmp_path: Path) -> None:
    engine = StandIn()
    errors: list[Exception] = [
        CheckpointError("a", "b"),
        ValueError("Doe^Jane"),
        ImageError("", ""),
    ]

    def ask_all(*_: object, **__: object) -> object:
        if errors:
            raise errors.pop(0)
        return StandIn.ask_all(engine, *_, **__)  # type: ignore[arg-type]

    engine.ask_all = ask_all  # type: ignore[assignment,method-assign]
    with Node(configuration(tmp_path / "node"), engine, first_delay=0.01) as node:
        assert send(node.port, study(1)) == [0]
        wait_for(lambda: node.queue.counts()["failed"] == 1)
        assert len(list(node.folder.images.iterdir())) == 1  # kept, to be looked at
        assert send(node.port, study(2)) == [0]
        wait_for(lambda: done(node))
        assert node.queue.counts() == {"waiting": 0, "answered": 1, "failed": 1, "unsent": 0}


def test_an_object_is_not_blamed_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = listen_files.Folder(tmp_path / "node")
    queue = Queue(folder.queue)
    queue.add("a" * 64, "b" * 64, PEER, [QUESTION])
    queue.add("c" * 64, "b" * 64, PEER, [QUESTION])
    queue.count_attempt("a" * 64)
    assert queue.waiting(9) == ["c" * 64, "a" * 64]
    config = configuration(tmp_path / "node")
    answering = Answering(config, folder, queue, StandIn(), None)
    (folder.images / f"{'a' * 64}.dcm").write_bytes(b"an image")
    monkeypatch.setattr(answering, "_ask", raising(ResourceError("Full.", "Free some.")))
    for _ in range(3):
        with pytest.raises(ResourceError):
            answering.do("a" * 64)
    assert queue.job("a" * 64).attempts == 1
    queue.close()


def test_an_object_is_not_blamed_for_an_audit_log_that_was_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configuration(tmp_path / "node")
    with Node(config, StandIn(), first_delay=0.01) as node:
        config.audit_log.write_text("{}\n")
        assert send(node.port, study()) == [0]
        wait_for(lambda: "again in" in caplog.text)
        assert "audit log's last line is not as it was written" in caplog.text
        assert node.queue.counts()["waiting"] == 1
        config.audit_log.unlink()
        wait_for(lambda: node.queue.counts()["answered"] == 1)
    assert "cannot be read" not in caplog.text


def test_an_object_that_ends_the_process_again_and_again_is_given_up(tmp_path: Path) -> None:
    queue_folder = listen_files.Folder(tmp_path / "node")
    queue = Queue(queue_folder.queue)
    queue.add("a" * 64, "b" * 64, PEER, [QUESTION])
    for _ in range(100):
        queue.count_attempt("a" * 64)
    queue.close()
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        wait_for(lambda: node.queue.counts()["failed"] == 1)


def test_documents_are_sent_until_they_are_taken(tmp_path: Path) -> None:
    port = free_port()
    destination = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": port}
    kinds = ["comprehensive-3d-sr", "basic-text-sr"]
    given = {"dicom": [destination], "documents": kinds}
    with Node(configuration(tmp_path / "node", **given), StandIn(), first_delay=0.05) as node:
        assert send(node.port, study()) == [0]
        wait_for(lambda: node.queue.counts()["unsent"] == 2)  # nobody is there
        with Archive(port) as archive:
            archive.refuse = 1
            wait_for(lambda: done(node))
    assert [len(each) for each in archive.received.values()] == [1, 1]


def test_where_nobody_is_there_not_all_that_waits_is_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A destination that is down over the weekend, and a log with a line for each document."""
    waiting, is_there = [f"document {number}" for number in range(200)], threading.Event()

    def send_one(document: str) -> None:
        if not is_there.is_set():
            raise ResourceError("it cannot be reached", "Is it running?")
        waiting.remove(document)

    worker = listen_node.Worker(
        "Sending", lambda limit: waiting[:limit], send_one, first_delay=0.05
    )
    worker.start()
    time.sleep(1)
    assert listen_node.MANY <= caplog.text.count("it cannot be reached") < 2 * listen_node.MANY
    is_there.set()
    wait_for(lambda: not waiting)
    worker.stop()
    worker.join()


@pytest.mark.parametrize("failures", [0, 1])
def test_what_is_refused_for_good_holds_up_nothing_behind_it(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """Each is due again before its turn comes, as with minutes between two tries."""
    monkeypatch.setattr(listen_node, "LONGEST_DELAY", 0.01)
    waiting, tried = [*(f"refused {number}" for number in range(9)), "good"], list[str]()

    def send_one(document: str) -> None:
        time.sleep(0.01)
        tried.append(document)
        if document != "good" or tried.count(document) <= failures:
            raise ResourceError("it is refused", "Is it whole?")
        waiting.remove(document)

    worker = listen_node.Worker(
        "Sending", lambda limit: waiting[:limit], send_one, first_delay=0.001
    )
    worker.start()
    try:
        wait_for(lambda: "good" not in waiting)
    finally:
        worker.stop()
        worker.join()


class Held(StandIn):
    """Ends no answer before it may."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__()
        self.go = go

    def ask_all(self, *given: Any, **options: Any) -> list[Answer]:
        """As `StandIn` does, then waits."""
        answers = super().ask_all(*given, **options)
        assert self.go.wait(60)
        return answers


def test_a_node_stops_after_what_it_has_begun(tmp_path: Path) -> None:
    go = threading.Event()
    engine = Held(go)
    with Node(configuration(tmp_path / "node"), engine) as node:
        assert send(node.port, *(study(number) for number in range(1, 4))) == [0, 0, 0]
        wait_for(lambda: engine.asked == 1)
        threading.Timer(2.0, go.set).start()  # when the node is stopping
    assert engine.asked == 1
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        wait_for(lambda: node.queue.counts()["answered"] == 3)


def test_what_nobody_was_told_of_is_swept_away(tmp_path: Path) -> None:
    folder = listen_files.Folder(tmp_path / "node")
    (folder.images / f"{'a' * 64}.dcm").write_bytes(b"half")
    (folder.images / ".b.part").write_bytes(b"half")
    with Node(configuration(tmp_path / "node"), StandIn()):
        assert list(folder.images.iterdir()) == []


def test_a_folder_or_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        with pytest.raises(ResourceError, match="Another node"):
            Node(configuration(tmp_path / "node"), StandIn())
        other = configuration(tmp_path / "other", port=node.port)
        with pytest.raises(ResourceError, match="cannot listen"), Node(other, StandIn()):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize("made_before", [False, True])
def test_its_folder_is_for_its_owner_alone(tmp_path: Path, made_before: bool) -> None:
    if made_before:
        (tmp_path / "node/images").mkdir(parents=True)
        for folder in (tmp_path / "node", tmp_path / "node/images"):
            folder.chmod(0o755)
    with Node(configuration(tmp_path / "node"), StandIn()):
        for folder in (tmp_path / "node", *(tmp_path / "node").glob("*/")):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_no_log_name_or_audit_tells_of_the_patient(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    documents = ["comprehensive-3d-sr", "fhir-r4"]
    config = configuration(tmp_path / "node", documents=documents, keep_images=True)
    with Node(config, StandIn()) as node:
        bad = study(3, Rows=99)
        assert send(node.port, study(1), study(2, BurnedInAnnotation="YES"), bad)[0] == 0
        wait_for(lambda: done(node))
    told = caplog.text + (tmp_path / "node" / "audit.jsonl").read_text()
    told += " ".join(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    database = (tmp_path / "node" / "queue.sqlite").read_bytes().decode("latin-1")
    for secret in (*SECRETS, "Doe"):
        assert secret not in told
        assert secret not in database


def test_the_notice_is_in_every_document(tmp_path: Path) -> None:
    kinds = ["comprehensive-3d-sr", "basic-text-sr", "fhir-r4", "fhir-r5", "heat-map"]

    locator: Any = SimpleNamespace(locate=located)
    with Node(configuration(tmp_path / "node", documents=kinds), StandIn(), locator) as node:
        assert send(node.port, study()) == [0]
        wait_for(lambda: done(node))
        found = documents(node)
    assert sorted(path.name.split(".")[1] for path in found) == sorted(kinds)
    assert all(NOTICE.encode() in path.read_bytes() for path in found)


def test_an_unsure_answer_is_called_so_in_every_report(tmp_path: Path) -> None:
    kinds = ["comprehensive-3d-sr", "basic-text-sr", "fhir-r4", "fhir-r5"]
    notice = Notice("not_a_scan", "It is a cat.")

    class Doubtful(StandIn):
        def ask_all(self, image: Image, questions: Any, **options: Any) -> list[Answer]:
            self.choices = options["choices"]
            found = super().ask_all(image, questions, **options)
            return [replace(each, unsure=True, warnings=(notice,)) for each in found]

    engine = Doubtful()
    with Node(configuration(tmp_path / "node", documents=kinds), engine, None) as node:
        assert send(node.port, study()) == [0]
        wait_for(lambda: done(node))
        found = [path.read_bytes() for path in documents(node)]
        log = (node.folder.root / "audit.jsonl").read_text("utf-8")
    assert len(found) == len(kinds)
    for document in found:
        assert b"Unsure. Best guess: No" in document
        assert b"It is a cat." in document
        assert b"not_a_scan" in document
    assert engine.choices == {QUESTION: ("Yes", "No")}
    assert "Unsure. Best guess: No [not_a_scan]" in log


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of the values made here
def test_values_that_the_standard_forbids_are_left_out() -> None:
    odd = study(
        StudyTime="999999", PatientSex="Jane", PatientBirthDate="yesterday", StudyID="x" * 99
    )
    header = Evidence.of(odd, Image.from_array(SOME), "0" * 64).header
    forbidden = (header.StudyTime, header.PatientSex, header.PatientBirthDate, header.StudyID)
    assert forbidden == ("", "", "", "")
    assert (header.PatientName, header.StudyDate) == ("Doe^Jane", "20240506")


def test_uids_are_the_same_for_the_same_and_no_others() -> None:
    first, second = (Evidence.of(study(n), Image.from_array(SOME), "0" * 64) for n in (1, 2))
    results = [Result(first, answer_to("a"), ""), Result(first, answer_to("b"), "")]
    results.append(Result(second, answer_to("a"), ""))
    uids = [result.uid(kind) for result in results for kind in ("x", "y")]
    assert len(set(uids)) == 6
    assert all(UID(uid).is_valid and len(uid) <= 64 for uid in uids)
    assert Result(first, answer_to("a"), "later").uid("x") == uids[0]  # made again
    model = {"name": "fake", "sha256": "1" * 64, "verification": "passed"}
    others = [
        Result(first, answer_to("a", "Yes"), ""),
        Result(first, answer_to("a", confidence=0.5), ""),
        Result(first, answer_to("a", model=model), ""),
        Result(first, answer_to("a"), "", settings="all slices"),
        Result(first, answer_to("a"), "", others=(first, second)),
        Result(first, answer_to("a"), "", repeat=1),
    ]
    assert len({*uids, *(result.uid("x") for result in others)}) == 12
    assert all(map(is_ours, uids))
    foreign = f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, 'x').int}"
    assert not any(map(is_ours, ("1.2.3", "2.25.", f"2.25.{'9' * 60}", foreign)))
