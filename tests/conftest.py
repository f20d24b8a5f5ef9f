"""What every test stands on: one thread, no network, examples that do not vary."""

import os
from pathlib import Path

import hypothesis
import pytest

# Before torch or transformers is imported, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch on tiny models is fastest so

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")

ROOT = Path(__file__).parents[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The research images and questions, which lie beside the project and not in it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data in ../shared/data")
    return folder


@pytest.fixture(scope="session")
def sources() -> dict[str, Path]:
    """Every file of the package, by its path in the wheel, from the folder it really lies in."""
    folders = {"medmoe_edge": ROOT / "medmoe_edge"}
    for name in ("calibration", "export", "runtimes"):
        folders[f"medmoe_edge/{name}"] = ROOT / name
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}": path
        for prefix, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
