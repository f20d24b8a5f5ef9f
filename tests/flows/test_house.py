"""The rules of the house: what asking never imports, which extra holds what, how long a file is.

Who may import whom is import-linter's, in pyproject.toml.
"""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
    "project"
]["optional-dependencies"]

# What asking must not pay for; the last three are imported for the files that need them, only then.
NEVER_ON_THE_ASK_PATH = {
    *("torch", "transformers", "accelerate", "optimum", "scipy"),
    *("onnx", "onnxscript", "onnx_ir"),
    *("pydicom", "pylibjpeg", "nibabel"),
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


def test_modules_are_short_enough_to_need_no_map(sources: dict[str, Path]) -> None:
    lines = {
        name: path.read_text("utf-8").count("\n")
        for name, path in sources.items()
        if path.suffix == ".py"
    }
    assert {name: count for name, count in lines.items() if count > 550} == {}
