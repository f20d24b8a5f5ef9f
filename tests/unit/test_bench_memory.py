"""The bench of paging, of a soak and under a memory limit: figures by hand, processes in here."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run
from in_process import InProcess, without_processes
from PIL import Image

from medmoe_edge.bench import limits, paging
from medmoe_edge.bench import worker as processes
from medmoe_edge.bench.backends import open_backend
from medmoe_edge.bench.limits import LimitBench, Limited, Prefix, bench_limited, find_limit, forget
from medmoe_edge.bench.measurement import Measured, Shape, Spread
from medmoe_edge.bench.paging import AtBudget, Cost, Held, PagingBench, Soak, bench_paging, soak
from medmoe_edge.bench.peers import PEERS, find_peers
from medmoe_edge.bench.routing import (
    Asking,
    Session,
    SyntheticPagedRuntime,
    by_modality,
    directions,
    with_synthetic_profile,
)
from medmoe_edge.bench.worker import Worker
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.errors import BundleError, DataError, InputError, ResourceError
from medmoe_edge.render.bench import show_limited, show_paging, show_soak

Make = Callable[..., Path]
SHAPE = Shape(prefix=20, image=4, question=6, new=8)


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(monkeypatch)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Three questions on two modalities, and one of none."""
    file = tmp_path / "questions.jsonl"
    lines = []
    for number, modality in enumerate(("xray", "ct", "xray", None)):
        Image.new("L", (8, 8), 60 * number).save(tmp_path / f"{number}.png")
        told: dict[str, Any] = {
            "id": str(number),
            "image": f"{number}.png",
            "question": "Is it?",
            "answer": "No",
        }
        told |= {"answer_type": "CLOSED", "source": "test", "modality": modality}
        lines.append(json.dumps(told))
    file.write_text("\n".join(lines))
    return file


def spread(value: float) -> Spread:
    return Spread(value, value, value, 1)


# --- synthetic routing ----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_tokens_follow_the_modality(preset: str, tiny_bundle: Make) -> None:
    session = Session(tiny_bundle("int8", preset), None, True, Asking())
    for modality in range(4):
        answer = session.ask(modality, 0)
        assert answer["share"] == 1
        assert answer == session.ask(modality, 0) | {"seconds": answer["seconds"]}
    runtime: Any = session.engine.runtime
    assert runtime.modality == 3
    counts = np.zeros(4)
    for seed in range(20):
        runtime.follow, runtime.modality = 0.7, 1
        runtime._generator = np.random.default_rng(seed)
        moved = runtime.embed(list(range(50))) @ directions(runtime.bundle).T
        counts += np.bincount(moved.argmax(-1), minlength=4)
    shares = counts / counts.sum()
    assert shares == pytest.approx([0.1, 0.7, 0.1, 0.1], abs=0.03)


def test_synthetic_routing_is_predicted(tiny_bundle: Make) -> None:
    bundle = with_synthetic_profile(Bundle.open(tiny_bundle("int8")), 0.7)
    profile = RoutingProfile.from_json(bundle.manifest["calibration"]["routing"])
    assert profile.probability("modality 2")[0] == pytest.approx([0.1, 0.1, 0.7, 0.1])
    assert profile.union.tolist() == [4, 4]
    session = Session(tiny_bundle("int8"), 10**9, True, Asking())
    assert isinstance(session.engine.runtime, SyntheticPagedRuntime)
    report = session.ask(2, 0)["paging"]
    assert set(map(tuple, report["experts"].values())) == {(2,)}
    assert report["prediction"]["precision"] == report["prediction"]["recall"] == 1


# --- questions of a file --------------------------------------------------------------------------


def test_questions_are_grouped_by_modality(
    questions: Path, tmp_path: Path, tiny_bundle: Make
) -> None:
    first, second = by_modality(questions)
    assert [example.modality for example in (*first, *second)] == ["ct", "xray", "xray"]
    one = tmp_path / "one.jsonl"
    one.write_text(questions.read_text().split("\n")[0])
    with pytest.raises(DataError, match="fewer than two modalities"):
        bench_paging(str(tiny_bundle("int8")), asking=Asking(str(one)))


# --- paging ---------------------------------------------------------------------------------------


def held(peak: int | None, same: float, switch: float) -> Held:
    report = {"hits": 8.0, "late": 1.0, "misses": 3.0, "loads": 4.0, "bytes_read": 4e6}
    paging = report | {"stall": 0.25}
    return Held(1.0, 300, peak, 200, Cost(spread(same), paging), Cost(spread(switch), paging))


def at_budget(**changes: Any) -> AtBudget:
    every = {"resident": held(900, 2, 4), "prefetch": held(600, 3, 5), "on_demand": held(500, 9, 7)}
    return dataclasses.replace(AtBudget("50%", 500, every, 16, 0), **changes)


def paging_bench() -> PagingBench:
    return PagingBench("toy", "0" * 64, "int8", 1000, Asking(), 4, 0.75, (at_budget(changed=1),))


def test_what_follows_of_a_budget() -> None:
    found = at_budget()
    assert (found.same_ratio, found.switch_ratio, found.prefetch_gain) == (1.5, 1.25, 1.4)
    assert found.saved == 300
    blind = {**found.held, "prefetch": held(None, 3, 5)}
    assert at_budget(held=blind).saved is None
    told = json.loads(json.dumps(paging_bench().to_json(), allow_nan=False))
    assert told["budgets"][0]["prefetch_gain"] == 1.4
    assert "routing is synthetic" in told["differences"][0]
    own = dataclasses.replace(paging_bench(), asking=Asking("questions.jsonl"))
    assert len(own.differences) == 1


def test_experts_are_paged_at_budgets(tiny_bundle: Make) -> None:
    steps: list[tuple[str, int, int]] = []
    found = bench_paging(
        str(tiny_bundle("int8")),
        budgets=("200%", "1%"),
        rounds=1,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [("experts at 200%", 0, 2), ("experts at 1%", 1, 2)]
    large, least = found.budgets
    assert (found.modalities, found.share, large.changed, least.changed) == (4, 1, 0, 0)
    assert large.answers == 2 * 4 * 2  # both ways, modalities, questions
    assert large.bytes == 2 * found.expert_bytes
    assert least.bytes == found.expert_bytes / 8  # of one expert of eight
    for budget, misses in ((large, 0), (least, 2)):
        switch, same = (getattr(budget.held["on_demand"], kind) for kind in ("switch", "same"))
        assert switch.seconds.count == same.seconds.count == 4
        assert switch.paging["misses"] >= misses
        assert bool(switch.paging["bytes_read"]) == bool(misses)
    assert large.held["resident"].same.paging == {}


def test_another_answer_is_told(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Session.ask

    def other(self: Session, modality: int, number: int) -> dict[str, Any]:
        answer = ask(self, modality, number)
        return answer | {"confidence": 2.0} if answer["paging"] and modality == 1 else answer

    monkeypatch.setattr(Session, "ask", other)
    model = str(tiny_bundle("int8"))
    (found,) = bench_paging(model, budgets=("50%",), rounds=1).budgets
    assert (found.changed, found.answers) == (4, 16)


def test_a_model_pages_by_its_own_routing(tiny_bundle: Make, questions: Path) -> None:
    asking = Asking(str(questions))
    found = bench_paging(str(tiny_bundle("int8")), budgets=("50%",), rounds=1, asking=asking)
    assert (found.modalities, found.budgets[0].answers, found.budgets[0].changed) == (2, 8, 0)


def test_what_cannot_be_paged_is_refused(tiny_bundle: Make) -> None:
    with pytest.raises(BundleError, match="no experts"):
        bench_paging(str(tiny_bundle("int8", dense=True)))
    with pytest.raises(InputError, match="no memory budget"):
        soak(str(tiny_bundle("int8")), 1, budget="half")


# --- soak -----------------------------------------------------------------------------------------


def soaked(**changes: Any) -> Soak:
    memory = {100: 9**9, 200: 1000, 300: 1100, 400: 1300, 500: 1300}
    made = Soak("toy", "0" * 64, "int8", Asking(), "50%", 500, 500, 32, 0, spread(0.1), memory)
    return dataclasses.replace(made, **changes)


def test_growth_is_of_what_comes_after_the_start() -> None:
    assert soaked().growth == pytest.approx(1100)  # of a line through 1000, 1100, 1300, 1300
    assert soaked(memory={200: 5, 300: 5}).growth is None
    assert soaked(memory=dict.fromkeys((200, 300, 400))).growth is None
    told = json.loads(json.dumps(soaked().to_json(), allow_nan=False))
    assert told["memory"][1] == {"questions": 200, "resident": 1000}


def test_a_soak_asks_again_and_compares(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "EVERY", 30)
    found = soak(str(tiny_bundle("int8")), 70)
    assert (found.questions, found.distinct, found.changed) == (70, 32, 0)
    assert list(found.memory) == [30, 60, 70]
    assert found.seconds.count == 70
    told = iter(range(70))
    monkeypatch.setattr(
        Session,
        "ask",
        lambda *_, **__: {"answer": "", "confidence": float(next(told) == 40), "seconds": 1.0},
    )
    monkeypatch.setattr(Session, "__init__", lambda *_: None)
    assert soak(str(tiny_bundle("int8")), 70).changed == 1


# --- limits ---------------------------------------------------------------------------------------


@contextmanager
def no_limit(limit: int) -> Iterator[Prefix]:
    yield ("env",)


def refused(limit: int) -> Any:
    raise PermissionError


@contextmanager
def binding(limit: int) -> Iterator[Prefix]:
    """Stands for a limit: in its place a process that takes twice the trial's bytes fails."""
    code = f"import sys; sys.exit(str({2 * limits.TRIAL}) in sys.argv[-1])"
    yield (sys.executable, "-S", "-c", code)


BINDING = {"nothing": binding}


def test_a_limit_is_one_that_binds() -> None:
    assert find_limit({"none": no_limit, "forbidden": refused}) is None
    assert find_limit({"none": no_limit, "tight": binding}) == "tight"


def test_a_group_is_made_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    member = tmp_path / "cgroup"
    member.write_text("5:cpu,memory:/own\n4:name=systemd:/\n")
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(Path, "rmdir", lambda path: removed.append(path))
    removed: list[Path] = []
    with limits.control_group(4096, member, tmp_path) as prefix:
        (group,) = (tmp_path / "own").iterdir()
        assert (group / "memory.limit_in_bytes").read_text() == "4096"
        assert prefix[-1] == str(group / "cgroup.procs")
        with Worker(prefix=prefix) as worker:  # it joins before it is a worker
            pid = worker._process.pid
            assert worker.ask("memory")
    assert (group / "cgroup.procs").read_text() == f"{pid}\n"
    assert removed == [group]
    member.write_text("0::/\n")
    with (
        pytest.raises(OSError, match="no such controller"),
        limits.control_group(1, member, tmp_path),
    ):
        pass


def test_systemd_is_asked_for_a_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    for user, own in ((0, False), (1000, True)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        with limits.systemd_scope(4096) as prefix:
            assert prefix[0] == "/bin/systemd-run"
            assert ("--user" in prefix) == own
            assert "MemoryMax=4096" in prefix
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError), limits.systemd_scope(1):
        pass


def test_files_that_are_forgotten_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("b")
    forget(tmp_path)
    forget(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "b"


def test_nothing_is_run_where_no_limit_binds(tiny_bundle: Make) -> None:
    found = bench_limited(str(tiny_bundle("int8")), 10**6, PEERS, ways={"forbidden": refused})
    assert (found.how, found.found, InProcess.prefixes) == (None, (), [])
    assert found.to_json()["why"].startswith("No limit on memory binds here")


def test_bundle_and_peers_run_under_the_limit(
    tiny_bundle: Make,
    tiny_checkpoint: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried: list[str] = []

    def tight(kind: Any, *arguments: Any) -> Any:
        tried.append(arguments[1])
        if kind == "bundle" and len(tried) < 3:
            raise ResourceError("Killed.", "Do.")
        return open_backend(kind, *arguments)

    monkeypatch.setattr(processes, "open_backend", tight)
    peers = (
        *find_peers(["torch-fp32"]),
        dataclasses.replace(PEERS[-1], packages=("no_such",)),
    )
    model, checkpoint = str(tiny_bundle("int8")), str(tiny_checkpoint("tiny-phi"))
    found = bench_limited(model, 10**6, peers, checkpoint=checkpoint, rounds=2, ways=BINDING)
    ours, wrong, none = found.found
    budgets = [int(form.removesuffix("B")) for form in tried if form.endswith("B")]
    assert budgets == sorted(budgets, reverse=True)
    assert ours.budget == budgets[2]
    assert list(ours.failed.items()) == [(budget, "Killed.") for budget in budgets[:2]]
    assert ours.measured is not None
    assert ours.measured.seconds["question"].count == 2
    assert "another model" in wrong.why
    assert none.why.startswith("Not installed")
    assert {prefix[0] for prefix in InProcess.prefixes} == {sys.executable}
    assert json.dumps(found.to_json(), allow_nan=False)
    show_limited(found)
    assert "Not installed" in capsys.readouterr().out


def test_a_bundle_that_does_not_fit_is_a_result(
    tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise ResourceError("Its process was killed.", "Do.")

    monkeypatch.setattr(processes, "open_backend", fail)
    (ours,) = bench_limited(str(tiny_bundle("int8")), 10**6, (), ways=BINDING).found
    assert (ours.measured, ours.why) == (None, "Its process was killed.")


# --- shown ----------------------------------------------------------------------------------------


def limited() -> LimitBench:
    times = {"prefill": 3, "decode": 14, "question": 17}
    measured = Measured({name: spread(value) for name, value in times.items()}, 1, 2, 3)
    ours = Limited("toy", "toy, paged", budget=500, measured=measured, faults=3.0, read=2e6)
    theirs = Limited("peer", "Peer", why="Killed.")
    return LimitBench("toy", "0" * 64, "int8", 10**6, "a group", SHAPE, (ours, theirs))


@pytest.mark.parametrize(
    ("options", "name", "made", "words"),
    [
        (["--paging"], "medmoe_edge.bench.paging.bench_paging", paging_bench(), "15 of 16 answers"),
        (
            ["--soak", "9"],
            "medmoe_edge.bench.paging.soak",
            soaked(),
            "+0.00 MB per 1,000 questions",
        ),
        (
            ["--memory-limit", "1MB"],
            "medmoe_edge.bench.limits.bench_limited",
            limited(),
            "Peer: Killed.",
        ),
        (
            ["--memory-limit", "1MB"],
            "medmoe_edge.bench.limits.bench_limited",
            dataclasses.replace(limited(), how=None, found=()),
            "No limit on memory binds here",
        ),
    ],
)
def test_people_see_tables_and_then_one_line(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    name: str,
    made: Any,
    words: str,
) -> None:
    monkeypatch.setattr(name, lambda model, **given: made)
    shown = run("bench", *options)
    assert (shown.exit_code, shown.stderr) == (0, "")
    *lines, last = shown.stdout.splitlines()
    assert json.loads(last) == json.loads(json.dumps(made.to_json()))
    assert any(words in line for line in lines)
    assert json.loads(run("bench", *options, "--json").stdout)["model"] == "toy"


def test_a_changed_answer_is_told_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    show_soak(soaked(changed=3, memory={}))
    assert "3 differ" in capsys.readouterr().out
    show_paging(paging_bench())
    assert "Peak lower by 300 B, 30.0% of the experts' bytes" in capsys.readouterr().out
