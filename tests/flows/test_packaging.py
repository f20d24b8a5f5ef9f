"""The wheel holds the whole package and nothing else; the checkout shows the same tree."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy without links, as Git makes one where links are not allowed.

    The copy also keeps setuptools' `build/` out of the checkout.
    """
    pytest.importorskip("setuptools", minversion="77", reason="needs the build backend")
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("calibration", "export", "runtimes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ROOT / "medmoe_edge",
        copy / "medmoe_edge",
        ignore=lambda folder, names: [
            name for name in names if name == "__pycache__" or (Path(folder) / name).is_symlink()
        ],
    )
    command = [sys.executable, "-c", BUILD, str(out)]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_every_file_of_the_package_and_nothing_else(
    wheel: zipfile.ZipFile, sources: dict[str, Path]
) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == set(sources)


def test_wheel_installs_the_command_and_asks_for_no_torch(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    lines = wheel.read(metadata).decode().splitlines()
    base = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    names = {line.split()[1].partition(">")[0] for line in base}
    assert names == {
        *("numpy", "onnxruntime", "pillow", "platformdirs", "pydicom"),
        *("rich", "tokenizers", "typer"),
    }
    assert "medmoe-edge = medmoe_edge.cli:main" in wheel.read(entry_points).decode()


@pytest.mark.parametrize("name", ["calibration", "export", "runtimes"])
def test_links_are_relative_and_lead_to_the_folders(name: str) -> None:
    link = ROOT / "medmoe_edge" / name
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name
