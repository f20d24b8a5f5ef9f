"""The audit log: what was written is proven, and whatever was done to it since is seen."""

import hashlib
import json
import multiprocessing
import os
import stat
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import Run, two_lines
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import medmoe_edge.bedside.audit.log as audit
from medmoe_edge.bedside.audit.log import GENESIS, AuditLog, kept_head, verify_log
from medmoe_edge.errors import DataError, InputError, ResourceError

MODEL = {"name": "nano", "sha256": "a" * 64}


def write(path: Path, *questions: str) -> Path:
    log = AuditLog(path)
    for question in questions:
        log.append(
            who="test",
            event="answer",
            model=MODEL,
            question=question,
            answer="No \ud800 é",
            input_sha256="b" * 64,
        )
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of four entries."""
    return write(tmp_path / "audit.jsonl", *"abcd")


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_lines_follow_from_each_other_by_an_independent_reckoning(log: Path) -> None:
    previous = "0" * 64
    for number, line in enumerate(lines(log), 1):
        entry = json.loads(line)
        stated = entry.pop("hash")
        assert (entry["number"], entry["previous"]) == (number, previous)
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == stated
        assert entry["time"].endswith("+00:00")
        previous = stated
    report = verify_log(log)
    assert (report.entries, report.intact, report.fault, report.head) == (4, True, None, previous)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_only_its_owner_may_read_it(log: Path) -> None:
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@given(at=st.integers(0), byte=st.integers(0, 255))
@settings(max_examples=300)
def test_no_changed_byte_goes_unseen(
    at: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed"
    folder.mkdir(exist_ok=True)
    good, path = folder / "good", folder / "bad"
    if not good.exists():
        write(good, *"abc")
    data = bytearray(good.read_bytes())
    at %= len(data)
    is_same, data[at] = data[at] == byte, byte
    path.write_bytes(data)
    report = verify_log(path)
    assert report.intact == is_same
    if not is_same:
        line = good.read_bytes()[:at].count(b"\n") + 1
        assert report.first_broken_line == line
        assert report.entries == line - 1


@pytest.mark.parametrize(
    ("edit", "fault", "line"),
    [
        (lambda rows: rows[:1] + rows[2:], "deleted", 2),
        (lambda rows: rows[1:], "deleted", 1),
        (lambda rows: [rows[0], rows[2], rows[1], rows[3]], "reordered", 2),
        (lambda rows: [*rows[:2], *rows[1:]], "reordered", 3),
        (lambda rows: [*rows[:3], rows[3][:-1]], "torn", 4),
        (lambda rows: [*rows[:3], rows[3][:10]], "torn", 4),
        (lambda rows: [*rows[:2], rows[2][:-2] + b"\n", rows[3]], "changed", 3),
        (lambda rows: [rows[0], b"\n", *rows[1:]], "changed", 2),
        (lambda rows: [rows[0].replace(b'"a"', b'"z"'), *rows[1:]], "changed", 1),
        (lambda rows: [*rows, b"x" * 2**21], "changed", 5),
    ],
)
def test_what_was_done_to_it_is_told_apart(log: Path, edit, fault: str, line: int) -> None:  # type: ignore[no-untyped-def]
    log.write_bytes(b"".join(edit(lines(log))))
    report = verify_log(log)
    assert (report.intact, report.fault, report.first_broken_line) == (False, fault, line)


def test_a_line_that_was_replaced_whole_breaks_the_chain(log: Path, tmp_path: Path) -> None:
    other = lines(write(tmp_path / "other", *"axcd"))
    log.write_bytes(b"".join([*lines(log)[:1], other[1], *lines(log)[2:]]))
    report = verify_log(log)
    assert (report.fault, report.first_broken_line) == ("changed", 2)


def test_a_cut_end_is_seen_by_the_head_that_is_kept_apart(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = verify_log(log).head
    write(log, "e")
    assert verify_log(log).intact
    assert verify_log(log, head).intact  # the log has grown since
    log.write_bytes(b"".join(lines(log)[:3]))
    assert verify_log(log).fault == verify_log(log, head).fault == "head"
    write(log, "f")
    assert "has 3 entries and not the last one that was written here, 5" in caplog.text
    assert verify_log(log).fault == "head"  # until somebody has seen to it


@pytest.mark.skipif(not hasattr(psutil.Process, "io_counters"), reason="needs counts of bytes read")
def test_a_missing_head_is_looked_for_once(log: Path, tmp_path: Path) -> None:
    """Or each entry of a log that was moved away would take longer than the one before."""
    other = write(tmp_path / "other.jsonl", *(["long" * 2**17] * 12))
    other.replace(log)
    audit, process = AuditLog(log), psutil.Process()
    entry: dict[str, Any] = {"who": "test", "event": "answer", "model": MODEL, "question": "q"}
    read = []
    for _ in range(2):
        before = process.io_counters().read_chars
        audit.append(answer="No", input_sha256="", **entry)
        read.append(process.io_counters().read_chars - before)
    assert read[0] > log.stat().st_size > 2 * read[1]
    assert verify_log(log).fault == "head"


def test_a_head_that_was_not_kept_for_a_while_is_still_one_of_the_log(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = os.environ["XDG_STATE_HOME"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    write(log, *"ef")
    monkeypatch.setenv("XDG_STATE_HOME", kept)
    write(log, "g")
    assert verify_log(log).intact
    assert kept_head(log) == (7, verify_log(log).head)


def test_elsewhere_a_cut_end_needs_a_recorded_head(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = verify_log(log).head
    log.write_bytes(b"".join(lines(log)[:3]))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert verify_log(log).intact
    assert verify_log(log, head).fault == "head"


def test_a_log_that_others_could_read_is_its_owners_alone_again(log: Path) -> None:
    log.chmod(0o644)
    write(log, "e")
    assert log.stat().st_mode & 0o777 == 0o600
    assert verify_log(log, GENESIS).intact


def test_an_unfinished_line_is_cut_off_by_the_next_entry(log: Path) -> None:
    log.write_bytes(log.read_bytes() + b'{"answer":"tor')
    assert verify_log(log).fault == "torn"
    write(log, "e")
    report = verify_log(log)
    assert (report.intact, report.entries) == (True, 5)


def test_an_unfinished_first_line_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"answ')
    write(path, "a")
    assert verify_log(path).entries == 1


@pytest.mark.parametrize("content", [b"Ask on.\nThe last line has no end", b"\x89PNG\0\1", b"x"])
def test_a_file_that_is_no_log_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "questions.txt"
    path.write_bytes(content)
    with pytest.raises(DataError):
        write(path, "a")
    with pytest.raises(ResourceError):
        AuditLog(path).check()
    assert path.read_bytes() == content


def test_a_log_whose_end_was_changed_takes_no_more(log: Path) -> None:
    log.write_bytes(log.read_bytes() + b"{}\n")
    before = log.read_bytes()
    with pytest.raises(DataError, match="not as it was written"):
        write(log, "e")
    assert log.read_bytes() == before


def test_an_entry_that_is_too_long_is_refused(log: Path) -> None:
    before = log.read_bytes()
    with pytest.raises(InputError, match="too long"):
        write(log, "e" * 2**20)
    assert log.read_bytes() == before


def test_a_full_disk_leaves_it_as_it_was(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = log.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match="No space left"):
        write(log, "e")
    assert log.read_bytes() == before


def test_a_clock_that_jumps_back_does_not_matter(log: Path) -> None:
    rows = [json.loads(line) for line in lines(log)]
    assert all(row["time"] for row in rows)
    assert verify_log(log).intact  # nothing compares the times


def _append(path: Path) -> None:
    write(path, *"0123456789")


def test_several_processes_write_one_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    report = verify_log(path)
    assert (report.intact, report.entries) == (True, 30)


def test_an_entry_does_not_wait_for_ever(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a process that was stopped while it held the log."""
    monkeypatch.setattr(audit, "LOCK_SECONDS", 0.1)
    before = log.read_bytes()
    with FileLock(f"{log}.lock"):
        with pytest.raises(ResourceError, match=r"has held the audit log for 0\.1 s"):
            write(log, "e")
        with pytest.raises(ResourceError, match="Another process"):
            AuditLog(log).check()
    assert log.read_bytes() == before
    assert verify_log(write(log, "e")).entries == 5


def test_the_verb_verifies(run: Run, log: Path) -> None:
    result = run("audit", "verify", str(log), "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["entries"], told["intact"]) == (0, 4, True)
    assert told["head"] in run("audit", "verify", str(log)).stdout
    log.write_bytes(b"".join(lines(log)[1:]))
    result = run("audit", "verify", str(log), "--json")
    assert (result.exit_code, json.loads(result.stdout)["fault"]) == (4, "deleted")
    assert run("audit", "verify", str(log), "--head", told["head"]).exit_code == 4


def test_a_log_that_is_not_there(run: Run) -> None:
    result = run("audit", "verify", "none.jsonl")
    assert result.exit_code == 2
    assert two_lines(result)[0] == "The audit log none.jsonl does not exist."
