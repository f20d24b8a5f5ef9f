"""The rules of the house: what asking never imports, which extra holds what, how large
the modules are, and how far an answer travels.

Who may import whom is import-linter's, in pyproject.toml.
"""

import ast
import collections
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FrameType

import pytest

import medmoe_edge

ROOT = Path(__file__).parents[2]
OURS = "medmoe_edge"
GENERATOR = 0x20  # of a code object's flags: a call of it goes on where it was
OPTIONAL: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
    "project"
]["optional-dependencies"]

# What asking must not pay for; the last three are imported for the files that need them, only then.
NEVER_ON_THE_ASK_PATH = {
    *("torch", "transformers", "accelerate", "optimum", "scipy"),
    *("onnx", "onnxscript", "onnx_ir"),
    *("pydicom", "imagecodecs", "nibabel"),
}


@pytest.mark.parametrize("module", ["medmoe_edge", "medmoe_edge.engine.engine", "medmoe_edge.cli"])
def test_asking_imports_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert NEVER_ON_THE_ASK_PATH.isdisjoint(result.stdout.split())


def distributions(extra: str) -> set[str]:
    """The packages that `pip install 'medmoe-edge[extra]'` adds to the base, by name."""
    names: set[str] = set()
    for requirement in OPTIONAL[extra]:
        name, within, rest = requirement.partition(">=")[0].partition("[")
        names |= set().union(*map(distributions, rest[:-1].split(","))) if within else {name}
    return names


def test_a_missing_package_names_an_extra_that_holds_it(sources: dict[str, Path]) -> None:
    wrong = []
    for module, path in sources.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8") if path.suffix == ".py" else "")):
            match node:
                case ast.Call(
                    func=ast.Name("MissingDependencyError"),
                    args=[ast.Constant(str(package)), ast.Constant(str(extra))],
                ):
                    if extra not in OPTIONAL or package not in distributions(extra):
                        wrong.append(f"{module}: {package} is not in the extra {extra}")
    assert wrong == []


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
    assert 150 <= statistics.median(lines.values()) <= 350
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
