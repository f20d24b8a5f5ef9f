"""A batch: one row for each image and question in their order, whatever interrupts it."""

import contextlib
import csv
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import ROOT, Run, answer_to, start_without, two_lines
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from pyarrow import parquet

import medmoe_edge
from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.batch import run as batch_asking
from medmoe_edge.bedside.batch import run as batch_results
from medmoe_edge.bedside.batch.inputs import Asked, Journal, journal_path, read_items
from medmoe_edge.bedside.batch.run import BatchReport, Here, Identity, Recipe, run_batch
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import InputError, MedMoEError, Notice, ResourceError
from medmoe_edge.image.loading import load_image

QUESTIONS = ("Is there effusion?", "Which organ is shown?")


class StandIn:
    """Answers with the image's name; `dies` at that image, by whatever way `how` is."""

    name, verification = "stand-in", "passed"
    config = SimpleNamespace(decoder=SimpleNamespace(max_positions=100))

    def __init__(self, dies: int | None = None) -> None:
        self.sha256, self.dies = "0" * 64, dies
        self.asked: list[str] = []

    def prompt_tokens(self, question: str) -> int:
        return len(question)

    def ask_all(self, path: str, questions: Sequence[str], *, max_new_tokens: int) -> list[Answer]:
        if len(self.asked) == self.dies:
            self.how()
        self.asked.append(Path(path).name)
        load_image(path)
        model = {"name": self.name, "sha256": self.sha256}
        name = ascii(Path(path).name)
        return [answer_to(each, f"{name}: {each}", model=model) for each in questions]

    def how(self) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    engine = StandIn()
    monkeypatch.setattr(batch_asking, "load", lambda *_, **__: engine)
    return engine


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three images and a text, one of them in a folder within; a hidden file besides."""
    folder = tmp_path / "scans"
    (folder / "within").mkdir(parents=True)
    for name in ("b.png", "a.png", "within/é.png", ".hidden.png"):
        Pillow.new("L", (8, 8)).save(folder / name)
    (folder / "notes").write_text("no image")
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(("", *QUESTIONS, "")))
    return file


def rows(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = parquet.read_table(output).to_pylist()
    return found


def told(output: Path) -> list[tuple[Any, ...]]:
    """What does not depend on how long it took."""
    return [tuple(value for key, value in row.items() if key != "seconds") for row in rows(output)]


def go(scans: Path, questions: Path, **options: Any) -> BatchReport:
    return run_batch(scans, scans.parent / "out.parquet", questions, **options)


# --- What is written -----------------------------------------------------------------------------


def test_every_image_and_question_has_its_row_in_order(
    engine: StandIn, scans: Path, questions: Path, tmp_path: Path
) -> None:
    report = go(scans, questions)
    found = rows(tmp_path / "out.parquet")
    names = ["a.png", "b.png", "notes", "within/é.png"]
    assert [(row["image"], row["question"]) for row in found] == [
        (name, question) for name in names for question in QUESTIONS
    ]
    assert [row["image_number"] for row in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row["question_number"] for row in found] == [0, 1] * 4
    assert (report.images, report.rows, report.errors, report.resumed) == (4, 8, 2, 0)
    assert report.notice == NOTICE
    metadata = parquet.read_schema(tmp_path / "out.parquet").metadata
    assert metadata[b"notice"].decode() == NOTICE
    assert metadata[b"verification"] == b"passed"
    good, bad = found[0], found[4]
    assert good["answer"] == "'a.png': Is there effusion?"
    assert dict(good["experts"]) == {"mri": 0.1, "ct": 0.0, "pathology": 0.2, "xray": 0.7}
    assert (good["confidence"], good["modality"], good["complete"]) == (0.934, "xray", True)
    assert (good["seconds"], good["error"]) == (0.37, None)
    assert bad["error"].startswith("'notes' is not an image that can be read.")
    assert (bad["answer"], bad["experts"], bad["seconds"]) == (None, None, None)
    for row in found:
        assert (row["model"], row["model_sha256"]) == ("stand-in", "0" * 64)
    assert not journal_path(tmp_path / "out.parquet").exists()


def test_every_answer_is_audited_before_it_is_kept(
    engine: StandIn, scans: Path, questions: Path, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    report = go(scans, questions, audit=AuditLog(log))
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(entries) == report.rows - report.errors
    assert {entry["who"] for entry in entries} == {"batch"}
    assert [entry["answer"] for entry in entries] == [
        row["answer"] for row in rows(tmp_path / "out.parquet") if row["error"] is None
    ]
    digest = hashlib.sha256((scans / "a.png").read_bytes()).hexdigest()
    assert entries[0]["input_sha256"] == digest


def test_an_unsure_answer_is_called_so_in_table_and_audit_log(
    engine: StandIn, scans: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = Notice("repetition", "The model began to repeat itself.")
    doubtful: dict[str, Any] = {
        "unsure": True,
        "complete": False,
        "stopped": "repetition",
        "warnings": (notice,),
    }
    asked = engine.ask_all
    monkeypatch.setattr(
        engine, "ask_all", lambda *a, **b: [replace(each, **doubtful) for each in asked(*a, **b)]
    )
    go(scans, questions, audit=AuditLog(tmp_path / "audit.jsonl"))
    found = rows(tmp_path / "out.parquet")
    assert (found[0]["unsure"], found[0]["stopped"]) == (True, "repetition")
    assert (found[4]["unsure"], found[4]["stopped"]) == (None, None)  # it could not be read
    entry = json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[0])
    told = f"Unsure. Best guess: {found[0]['answer']} (cut off) [repetition]"
    assert entry["answer"] == told


def test_the_real_model_answers_as_if_asked_alone(tmp_path: Path) -> None:
    picture, out = ROOT / "scan.png", tmp_path / "out.parquet"
    (tmp_path / "in.csv").write_text(f"image,question\n{picture},{QUESTIONS[0]}\n")
    run_batch(tmp_path / "in.csv", out, recipe=Recipe(max_new_tokens=8))
    engine = medmoe_edge.load("nano")
    answer = engine.ask(picture, QUESTIONS[0], max_new_tokens=8)
    (row,) = rows(out)
    assert (row["answer"], row["confidence"]) == (answer.text, answer.confidence)
    assert (dict(row["experts"]), row["modality"]) == (answer.experts, answer.modality)
    assert row["model_sha256"] == engine.sha256


def test_what_comes_twice_is_told_apart(engine: StandIn, scans: Path, tmp_path: Path) -> None:
    file = scans / "list.csv"
    file.write_text("patient,image\n1,a.png\n2,b.png\n1,a.png\n", encoding="utf-8-sig")
    (tmp_path / "twice.txt").write_text("Why?\r\nWhy?\r\n")
    run_batch(file, tmp_path / "out.parquet", tmp_path / "twice.txt")
    found = rows(tmp_path / "out.parquet")
    keys = [(row["image_number"], row["question_number"]) for row in found]
    assert keys == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [row["image"] for row in found] == ["a.png"] * 2 + ["b.png"] * 2 + ["a.png"] * 2
    assert {row["question"] for row in found} == {"Why?"}


def test_a_table_may_bring_its_questions(engine: StandIn, scans: Path, tmp_path: Path) -> None:
    absolute = scans / "b.png"
    (scans / "list.csv").write_text(f'image,question\na.png,"Where, if?"\n{absolute},Why?\n')
    run_batch(scans / "list.csv", tmp_path / "out.parquet")
    found = [
        (row["image"], row["question"], row["error"]) for row in rows(tmp_path / "out.parquet")
    ]
    assert found == [("a.png", "Where, if?", None), (str(absolute), "Why?", None)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names that are text")
def test_names_need_not_be_text(engine: StandIn, tmp_path: Path, questions: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    Pillow.new("L", (8, 8)).save(folder / "a.png")
    os.rename(folder / "a.png", os.fsencode(folder) + b"/\xff.png")
    go(folder, questions)
    assert [(row["image"], row["error"]) for row in rows(tmp_path / "out.parquet")] == [
        ("\\xff.png", None)
    ] * 2


def test_neither_output_nor_questions_are_images(engine: StandIn, scans: Path) -> None:
    (scans / "questions.txt").write_text(QUESTIONS[0])
    for force in (False, True):
        run_batch(scans, scans / "out.parquet", scans / "questions.txt", force=force)
        names = [row["image"] for row in rows(scans / "out.parquet")]
        assert names == ["a.png", "b.png", "notes", "within/é.png"]


# --- Interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", range(4))
def test_interrupted_it_goes_on_where_it_ended(
    engine: StandIn, scans: Path, questions: Path, tmp_path: Path, dies: int
) -> None:
    go(scans, questions)
    whole = told(tmp_path / "out.parquet")
    (tmp_path / "out.parquet").unlink()
    engine.asked.clear()
    engine.dies = dies
    with pytest.raises(KeyboardInterrupt):
        go(scans, questions)
    assert not (tmp_path / "out.parquet").exists()
    engine.dies = None
    assert go(scans, questions, force=True).resumed == dies  # which replaces only what it must
    assert engine.asked == ["a.png", "b.png", "notes", "é.png"]  # none twice
    assert told(tmp_path / "out.parquet") == whole


@pytest.mark.parametrize("audited_first", [False, True])
def test_a_batch_is_audited_whole_or_not_at_all(
    engine: StandIn, scans: Path, questions: Path, tmp_path: Path, audited_first: bool
) -> None:
    engine.dies = 2
    log = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(KeyboardInterrupt):
        go(scans, questions, audit=log if audited_first else None)
    engine.dies = None
    with pytest.raises(InputError, match="other images, questions or options"):
        go(scans, questions, audit=None if audited_first else log)
    assert go(scans, questions, audit=log if audited_first else None).resumed == 2


def test_an_audit_log_is_neither_an_image_nor_the_output(
    engine: StandIn, scans: Path, questions: Path
) -> None:
    engine.dies = 2
    log = AuditLog(scans / "audit.csv")
    with pytest.raises(KeyboardInterrupt):
        run_batch(scans, scans / "out.parquet", questions, audit=log)
    engine.dies = None
    assert run_batch(scans, scans / "out.parquet", questions, audit=log).resumed == 2
    names = [row["image"] for row in rows(scans / "out.parquet")]
    assert [*dict.fromkeys(names)] == ["a.png", "b.png", "notes", "within/é.png"]
    with pytest.raises(InputError, match="its own input"):
        run_batch(scans, log.path, questions, audit=log, force=True)


KILLED = """
import os, signal, sys
sys.path[:0] = ["tests/service", "tests/helpers"]
from test_batch import StandIn, batch_asking, go, Path
engine = StandIn(dies=2)
engine.how = lambda: os.kill(os.getpid(), signal.SIGKILL)
batch_asking.load = lambda *_, **__: engine
go(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_it_goes_on_where_it_ended(
    engine: StandIn, scans: Path, questions: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(scans), str(questions)]
    killed = subprocess.run(command, cwd=ROOT, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert go(scans, questions).resumed == 2
    assert engine.asked == ["notes", "é.png"]
    assert len(rows(tmp_path / "out.parquet")) == 8


@contextlib.contextmanager
def interrupted(engine: StandIn, scans: Path, questions: Path) -> Iterator[None]:
    engine.dies = 2
    with pytest.raises(KeyboardInterrupt):
        go(scans, questions)
    engine.dies = None
    engine.asked.clear()
    yield


def test_another_job_is_not_mixed_in(engine: StandIn, scans: Path, questions: Path) -> None:
    with interrupted(engine, scans, questions):
        engine.sha256 = "1" * 64
        with pytest.raises(InputError, match="had other images, questions or options"):
            go(scans, questions)
        assert go(scans, questions, force=True).resumed == 0
        assert len(engine.asked) == 4


def test_a_damaged_journal_is_told(engine: StandIn, scans: Path, questions: Path) -> None:
    journal = journal_path(scans.parent / "out.parquet")
    journal.write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="is damaged"):
        go(scans, questions)
    assert go(scans, questions, force=True).rows == 8
    assert not journal.exists()


def test_one_command_at_a_time(engine: StandIn, scans: Path, questions: Path) -> None:
    with (
        Journal(scans.parent / "out.parquet", "another"),
        pytest.raises(InputError, match="Another command is at work"),
    ):
        go(scans, questions, force=True)


def test_a_full_disk_costs_no_answer(
    engine: StandIn, scans: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(batch_results, "atomic_file", full)
        with pytest.raises(ResourceError, match="No space left"):
            go(scans, questions)
    engine.asked.clear()
    assert go(scans, questions).resumed == 4
    assert engine.asked == []


@given(numbers=st.lists(st.integers(0, 2**62)), stops=st.sets(st.integers(0, 20)))
def test_a_journal_keeps_each_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], stops: set[int]
) -> None:
    output = tmp_path_factory.mktemp("journal") / "out"
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(output, "job"))
        first: dict[int, int] = {}
        for place, number in enumerate(numbers):
            first.setdefault(number, place)
            journal.keep(number, Asked({"name": str(place)}, [{"place": place}]))
            if place in stops:
                stack.close()
                journal = stack.enter_context(Journal(output, "job"))
        assert journal.done() == {number: {"name": str(at)} for number, at in first.items()}
        assert list(journal.results()) == [(n, [{"place": first[n]}]) for n in sorted(first)]
        journal.forget(numbers[1:])
        assert set(journal.done()) == set(first) - set(numbers[1:])


# --- What cannot be used -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("", "no column named image"),
        ("file\na.png\n", "no column named image"),
        ("image;question\na.png;Why?\n", "no column named image"),
        ("image\n", "names no images"),
        ("image,question\n,Why?\n", "line 2: there is no image"),
        ("image,question\na.png,Why?\nb.png\n", "line 3: The question is empty"),
        (f"image,question\na.png,{'?' * 10_001}\n", "line 2: The question has 10,001"),
        ('image,question\n"a.png,Why?\n', "is no CSV"),
        ("image,question\na.png,Is it ill, or well?\n", "line 2: there are more cells"),
        ("image,question,question\na.png,Why?,How?\n", "two columns of one name"),
    ],
)
def test_a_bad_table_is_told(tmp_path: Path, table: str, what: str) -> None:
    (tmp_path / "in.csv").write_text(table)
    (tmp_path / "questions.txt").write_text("Why?")
    asked = None if "question" in table else tmp_path / "questions.txt"
    with pytest.raises(InputError, match=what):
        read_items(tmp_path / "in.csv", asked)


def test_columns_may_have_spaces_around_their_names_and_rows_empty_cells(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("image , question,,\na.png,Why?,,\n")
    ((item,), _) = read_items(tmp_path / "in.csv", None)
    assert (item.image, item.questions) == ("a.png", ("Why?",))


def test_images_behind_a_link_are_there_and_a_circle_ends(
    tmp_path: Path, scans: Path, questions: Path
) -> None:
    before = [item.image for item in read_items(scans, questions).items]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Pillow.new("L", (8, 8)).save(elsewhere / "far.png")
    (scans / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(scans)
    found = [item.image for item in read_items(scans, questions).items]
    assert [name for name in found if name not in before] == ["linked/far.png"]


def test_no_image_is_asked_twice_because_of_a_link(
    tmp_path: Path, scans: Path, questions: Path
) -> None:
    before = [item.image for item in read_items(scans, questions).items]
    for folder in (scans / "month", scans / ".hidden", tmp_path / "far" / "near"):
        folder.mkdir(parents=True)
        Pillow.new("L", (8, 8)).save(folder / "a.png")
    links = {"latest": "month", "month/up": "..", "kept": ".hidden", "again": ".hidden"}
    far = {"around": "..", "x": "../far", "y": "../far", "z": "../far/near"}
    for name, target in (links | far).items():
        (scans / name).symlink_to(target)
    (tmp_path / "far" / "a-link").symlink_to("near")
    Pillow.new("L", (8, 8)).save(tmp_path / "far" / "far.png")
    found = [item.image for item in read_items(scans, questions).items]
    assert [name for name in found if name not in before] == [
        *("again/a.png", "month/a.png", "x/far.png", "z/a.png")
    ]


def test_a_name_that_a_spreadsheet_would_compute_is_text(
    engine: StandIn, tmp_path: Path, questions: Path
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out.csv"
    folder.mkdir()
    Pillow.new("L", (8, 8)).save(folder / "=HYPERLINK(1).png")
    run_batch(folder, output, questions)
    row, _ = csv.DictReader(output.read_text("utf-8-sig").splitlines())
    assert row["image"] == "'=HYPERLINK(1).png"


def test_another_commands_output_is_not_replaced(
    engine: StandIn, scans: Path, questions: Path
) -> None:
    """It may come into being after the first look, while the model is loaded."""
    output = scans.parent / "out.csv"

    class Late(Here):
        def begin(self, questions: Iterable[str]) -> Identity:
            output.write_text("of another command")
            return super().begin(questions)

    with pytest.raises(InputError, match="exists already"):
        run_batch(scans, output, questions, answering=Late(Recipe()))
    assert output.read_text() == "of another command"
    assert not journal_path(output).exists()
    assert engine.asked == []


def test_an_image_that_changes_as_it_is_asked_is_audited_as_it_was(
    engine: StandIn, scans: Path, questions: Path
) -> None:
    first = scans / "a.png"
    before = hashlib.sha256(first.read_bytes()).hexdigest()
    ask = engine.ask_all

    def ask_and_lose(path: str, *args: Any, **options: Any) -> list[Answer]:
        answers = ask(path, *args, **options)
        if path == str(first):
            Path(path).unlink()
        return answers

    engine.ask_all = ask_and_lose  # type: ignore[method-assign]
    audit = AuditLog(scans.parent / "audit.jsonl")
    run_batch(scans, scans.parent / "out.csv", questions, audit=audit)
    entry = json.loads((scans.parent / "audit.jsonl").read_text().splitlines()[0])
    assert entry["input_sha256"] == before


def test_a_link_to_a_file_is_not_asked_beside_it(
    engine: StandIn, tmp_path: Path, scans: Path, questions: Path
) -> None:
    far = tmp_path / "far.png"
    Pillow.new("L", (8, 8)).save(far)
    (scans / ".store").mkdir()
    (scans / ".store" / "x").write_bytes(far.read_bytes())
    links: dict[str, str | Path] = {
        "0.png": "a.png",  # comes before what it leads to
        "again.png": "0.png",
        "y.png": far,
        "z.png": far,
        "stored.png": ".store/x",
        "within/up.png": "../b.png",
        "asked.txt": questions,  # which are no image under any name
        "round": "round",
        "gone.png": "nowhere",
    }
    for name, target in links.items():
        (scans / name).symlink_to(target)
    report = go(scans, questions)
    names = [row["image"] for row in rows(tmp_path / "out.parquet")][::2]
    before = ["a.png", "b.png", "notes", "within/é.png"]
    assert names == sorted([*before, "gone.png", "round", "stored.png", "y.png"])
    assert report.images == 8
    asked_by = {"0.png": "a.png", "again.png": "a.png", "within/up.png": "b.png", "z.png": "y.png"}
    assert report.links == asked_by


@pytest.mark.parametrize("changed", ["a.png", "notes", "gone", "other folder"])
def test_an_image_that_was_changed_is_asked_again(
    engine: StandIn, scans: Path, questions: Path, tmp_path: Path, changed: str
) -> None:
    """Not by its size and time, which another image may share."""
    engine.dies = 3
    with pytest.raises(KeyboardInterrupt):
        go(scans, questions)
    assert engine.asked == ["a.png", "b.png", "notes"]
    folder, about = scans, (scans / "a.png").stat()
    if changed == "gone":
        (scans / "b.png").unlink()
        (scans / "b.png").symlink_to("nowhere")
    elif changed == "other folder":  # of which nobody has said anything yet
        folder = tmp_path / "others"
        shutil.copytree(scans, folder)
        (folder / "b.png").write_bytes((scans / "b.png").read_bytes() + b" ")
    else:
        data = bytearray((scans / changed).read_bytes())
        data[-1] ^= 1
        (scans / changed).write_bytes(data)
        os.utime(scans / changed, ns=(about.st_atime_ns, about.st_mtime_ns))
    engine.dies = None
    engine.asked.clear()
    report = go(folder, questions)
    again = "b.png" if changed in ("gone", "other folder") else changed
    assert engine.asked == [again, "é.png"]
    assert (report.resumed, report.changed) == (2, 1)
    assert len(rows(tmp_path / "out.parquet")) == 8


def test_an_image_at_which_the_machine_failed_is_asked_again(
    engine: StandIn, scans: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_all = engine.ask_all

    def without_memory(path: str, *about: Any, **options: Any) -> list[Answer]:
        if Path(path).name == "a.png":
            raise ResourceError("There is no memory left.", "Free some.")
        return ask_all(path, *about, **options)

    monkeypatch.setattr(engine, "ask_all", without_memory)
    engine.dies = 2
    with pytest.raises(KeyboardInterrupt):
        go(scans, questions)
    monkeypatch.setattr(engine, "ask_all", ask_all)
    engine.dies = None
    engine.asked.clear()
    report = go(scans, questions)
    assert engine.asked == ["a.png", "é.png"]
    assert (report.resumed, report.changed, report.errors) == (2, 1, 2)  # the text is no image


def test_a_pipe_among_the_images_holds_nothing_up(
    engine: StandIn, scans: Path, questions: Path, tmp_path: Path
) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes")
    os.mkfifo(scans / "c.png")
    go(scans, questions)
    found = {row["image"]: row["error"] for row in rows(tmp_path / "out.parquet")}
    assert "not a regular file" in found["c.png"]


def test_bad_questions_are_told(tmp_path: Path, scans: Path) -> None:
    file = tmp_path / "bad"
    for data, what in (
        (b"\n \n", "no questions"),
        (b"\xff", "not UTF-8"),
        (b"a\n<image>", "line 2"),
    ):
        file.write_bytes(data)
        with pytest.raises(InputError, match=what):
            read_items(scans, file)
    for missing, what in ((None, "no questions for the images"), (tmp_path / "none", "not exist")):
        with pytest.raises(InputError, match=what):
            read_items(scans, missing)
    (tmp_path / "in.csv").write_text("image,question\na.png,Why?\n")
    file.write_text("Why?")
    with pytest.raises(InputError, match="questions of its own"):
        read_items(tmp_path / "in.csv", file)


def test_a_question_too_long_for_the_model_stops_before_the_first(
    engine: StandIn, scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("Why?\n" + "?" * 69)
    with pytest.raises(InputError, match=r"needs 101 positions.* the model has 100"):
        go(scans, tmp_path / "long.txt")
    assert engine.asked == []
    assert not journal_path(tmp_path / "out.parquet").exists()


def test_errors_of_the_model_are_rows_and_others_stop(
    engine: StandIn, scans: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Any:
        def ask(*_: object, **__: object) -> Any:
            raise error

        return ask

    monkeypatch.setattr(engine, "ask_all", fail(RuntimeError("the device is lost")))
    with pytest.raises(RuntimeError):
        go(scans, questions)
    monkeypatch.setattr(engine, "ask_all", fail(MedMoEError("What.", "Do.")))
    assert (go(scans, questions).errors, rows(scans.parent / "out.parquet")[0]["error"]) == (
        *(8,),
        "What. Do.",
    )


# --- The command ---------------------------------------------------------------------------------


def test_the_command(engine: StandIn, run: Run, scans: Path, questions: Path) -> None:
    command = ("batch", "scans", "--questions", "questions.txt", "-o", "out.parquet")
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == NOTICE + "\n"
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[:4] == [
        ["images", "4"],
        ["done", "by", "earlier", "runs", "0"],
        ["rows", "8"],
        ["without", "an", "answer", "2"],
    ]
    assert two_lines(run(*command))[0] == "out.parquet exists already."
    told = json.loads(run(*command, "--force", "--json").stdout)
    assert (told["rows"], told["errors"], told["notice"]) == (8, 2, NOTICE)
    assert told["model"] == {"name": "stand-in", "sha256": "0" * 64, "verification": "passed"}


def test_ctrl_c_leaves_what_is_done(
    engine: StandIn, run: Run, scans: Path, questions: Path
) -> None:
    command = ("batch", "scans", "--questions", "questions.txt", "-o", "out.parquet", "--json")
    engine.dies = 2
    result = run(*command)
    assert result.exit_code == 130
    assert json.loads(result.stdout)["error"]["code"] == "interrupted"
    assert result.stderr.startswith("What is done is kept: the same command goes on.\n")
    engine.dies = None
    assert json.loads(run(*command).stdout)["resumed"] == 2


def test_the_command_refuses(run: Run, scans: Path, questions: Path) -> None:
    command = ["batch", "scans", "--questions", "questions.txt", "-o", "out.parquet"]
    result = run(*command, "--model", "none")
    assert (result.exit_code, two_lines(result)[0]) == (3, "There is no model folder 'none'.")
    result = run(*command, "--workers", "2")
    assert (result.exit_code, two_lines(result)[0]) == (2, "Workers are of a cluster.")
    assert run("batch", "scans", "-o", "out.parquet").exit_code == 2
    Path("table.csv").write_text("image,question\nscans/a.png,Is it?\n")
    result = run("batch", "table.csv", "-o", "table.csv", "--force")
    assert (result.exit_code, "own input" in two_lines(result)[0]) == (2, True)


@pytest.mark.parametrize(
    ("package", "more", "extra"), [("pyarrow", [], "batch"), ("ray", ["--ray", "local"], "ray")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, package: str, more: list[str], extra: str
) -> None:
    out = str(tmp_path / "out.parquet")
    result = start_without([package], "batch", str(tmp_path), "-o", out, *more)
    assert result.returncode == 5
    assert f"pip install 'medmoe-edge[{extra}]'" in result.stderr
