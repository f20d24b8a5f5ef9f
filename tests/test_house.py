"""The rules of the house: who imports whom, what asking never imports, how long a file may be."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
    "project"
]["optional-dependencies"]

# Each room of the package and the rooms that it may import; all may import config and errors.
# A new module takes its place here; the data flows down, nothing imports upwards.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "atomic": set(),
    "image": set(),
    "prompt": set(),
    "bundle": {"atomic"},
    "answer": {"bundle"},
    "embedded": set(),
    "models": set(),
    "metrics": set(),
    "datasets": set(),
    "captions": {"datasets"},
    "downloads": set(),
    "data": {"atomic", "datasets", "downloads"},
    "checkpoint": {"atomic", "models"},
    "presets": {"checkpoint", "models"},
    "calibration": {"checkpoint", "datasets", "image", "models", "prompt"},
    "tensorrt": {"bundle"},
    "export": {"atomic", "bundle", "calibration", "checkpoint", "models", "prompt", "tensorrt"},
    "inspection": {"bundle", "checkpoint"},
    "runtimes": {"bundle", "calibration", "checkpoint", "export", "models", "tensorrt"},
    "prefix": {"atomic", "runtimes"},
    "devices": set(),
    "doctor": {"devices"},
    "planning": {
        *("bundle", "calibration", "checkpoint", "devices", "embedded", "export", "presets"),
        "runtimes",
    },
    "engine": {
        *("answer", "bundle", "checkpoint", "embedded", "image", "prefix", "prompt", "runtimes"),
    },
    "modality": {
        *("bundle", "captions", "checkpoint", "datasets", "embedded", "engine", "image", "prompt"),
        "runtimes",
    },
    "archive": {"bundle", "image", "modality"},
    "training": {
        *("atomic", "captions", "checkpoint", "datasets", "image", "metrics", "modality", "models"),
        *("presets", "prompt"),
    },
    "bench": {
        *("bundle", "calibration", "checkpoint", "datasets", "devices", "embedded", "engine"),
        *("export", "image", "planning", "presets", "prompt", "runtimes"),
    },
    "evaluate": {"datasets", "engine", "metrics"},
    "ablation": {
        *("datasets", "engine", "evaluate", "image", "metrics", "models", "prompt", "runtimes"),
        "training",
    },
    "fidelity": {"datasets", "image", "metrics", "prompt", "runtimes"},
    "agreement": {"bundle", "datasets", "export", "fidelity", "prompt", "runtimes"},
    "verification": {
        *("bundle", "checkpoint", "datasets", "fidelity", "image", "metrics", "modality", "prompt"),
        "runtimes",
    },
    "report": {"bundle", "fidelity", "verification"},
    "pipeline": {
        *("agreement", "atomic", "bundle", "calibration", "checkpoint", "datasets", "embedded"),
        *("export", "runtimes", "verification"),
    },
    "audit": {"atomic", "image"},
    "serve": {"answer", "audit", "bundle", "engine", "image", "modality", "prefix"},
    "listen": {"answer", "atomic", "audit", "image", "modality"},
    "batch": {"answer", "atomic", "bundle", "datasets", "embedded", "engine", "prompt"},
    "render": {
        *("ablation", "agreement", "answer", "archive", "bench", "calibration", "doctor"),
        *("evaluate", "inspection", "modality", "pipeline", "planning", "verification"),
    },
}
TOP = {"", "cli"}  # medmoe_edge/__init__.py and the command line, which may import everything

# What asking must not pay for; the last three are imported for the files that need them, only then.
NEVER_ON_THE_ASK_PATH = {
    *("torch", "transformers", "accelerate", "optimum", "scipy"),
    *("onnx", "onnxscript", "onnx_ir"),
    *("pydicom", "imagecodecs", "nibabel"),
}


def room(module: str) -> str:
    """The part of the house that a module belongs to; the empty string for the package itself.

    `medmoe_edge.models.phi` is of the room `models`, `medmoe_edge.checkpoint_keys` of `checkpoint`.
    """
    return f"{module}.".split(".")[1].partition("_")[0]


def imported_rooms(source: str) -> Iterator[str]:
    """The rooms that a module's text imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "medmoe_edge":
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            modules = [f"medmoe_edge.{name}" for name in names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        yield from (room(module) for module in modules if module.split(".")[0] == "medmoe_edge")


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import numpy, medmoe_edge.models.phi", ["models"]),
        ("def f():\n    from medmoe_edge.runtimes.ort import Session", ["runtimes"]),
        ("from medmoe_edge import __version__, engine", ["engine"]),
        ("import medmoe_edge\nfrom medmoe_edger import cli", [""]),
    ],
)
def test_imports_are_seen_wherever_they_stand(source: str, rooms: list[str]) -> None:
    assert list(imported_rooms(source)) == rooms


def test_imports_go_down_the_house(sources: dict[str, Path]) -> None:
    wrong = []
    for name, path in sources.items():
        own = room(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        if path.suffix != ".py" or own in TOP:
            continue
        assert own in MAY_IMPORT, f"{name} has no place in MAY_IMPORT"
        allowed = MAY_IMPORT[own] | {own, "config", "errors"}
        wrong += [
            f"{name} imports {other or 'medmoe_edge'}"
            for other in imported_rooms(path.read_text("utf-8"))
            if other not in allowed
        ]
    assert wrong == []


def test_the_house_has_no_circle() -> None:
    reached: dict[str, set[str]] = {}
    for own, below in MAY_IMPORT.items():  # rows stand in order: what they import comes first
        assert below <= set(reached), f"{own} stands above a room that it imports"
        reached[own] = below


@pytest.mark.parametrize("module", ["medmoe_edge", "medmoe_edge.engine", "medmoe_edge.cli"])
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
    assert {name: count for name, count in lines.items() if count > 400} == {}
