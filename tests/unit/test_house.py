"""The shape of the packages: how many modules, how large, and how far an answer travels.

Who may import whom, and that nothing goes in circles, is import-linter's (`pyproject.toml`).
"""

import collections
import statistics
import sys
from pathlib import Path
from types import FrameType

import medmoe_edge

ROOT = Path(__file__).parents[2]
OURS = "medmoe_edge"
GENERATOR = 0x20  # of a code object's flags: a call of it goes on where it was


def modules() -> dict[Path, int]:
    """Lines of each module, by its path."""
    return {
        path: len(path.read_text().splitlines())
        for package in ("medmoe_edge", "export", "calibration", "runtimes")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }


def test_modules_are_concepts() -> None:
    lines = modules()
    assert len(lines) <= 180
    assert 150 <= statistics.median(lines.values()) <= 250
    assert {path.name: n for path, n in lines.items() if n > 550} == {}
    assert len([path for path in lines if path.parent == ROOT / OURS]) <= 12


def test_an_answer_takes_few_hops_between_modules() -> None:
    """A hop is a call from one module of ours into another; loading the model is counted too."""
    hops: collections.Counter[tuple[str, str]] = collections.Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        called = frame.f_globals.get("__name__", "")
        if event != "call" or not called.startswith(OURS) or frame.f_code.co_name[0] == "<":
            return
        if frame.f_code.co_flags & GENERATOR and frame.f_lasti > 0:
            return
        caller = frame.f_back
        while caller and not caller.f_globals.get("__name__", "").startswith(OURS):
            caller = caller.f_back
        if caller and caller.f_globals["__name__"] != called:
            hops[caller.f_globals["__name__"], called] += 1

    scan = ROOT / "scan.png"
    medmoe_edge.load("nano").ask(scan, "Is there effusion?")  # what is imported once is
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        answer = medmoe_edge.load("nano").ask(scan, "Is there effusion?")
    finally:
        sys.setprofile(before)
    assert answer.text
    assert 20 < hops.total() <= 120, hops.most_common(10)
