"""What every test stands on: one thread, no network, examples that do not vary, tiny models."""

import ctypes
import dataclasses
import functools
import gc
import logging
import os
import shutil
import socketserver
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from browser import Page
    from command_line import Run
    from typer.testing import Result

# Before torch, transformers or ONNX Runtime is imported, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as the package does, which some tests import later
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch on tiny models is fastest so

# The tests start more than a hundred processes: without bytecode each compiles all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of the tests' own modules are errors; pyproject.toml makes the package's so.

    Files are dealt out in their order, where several processes run them: xdist's own puts those of
    few tests last, which take longest, so that one process would end long after the others.
    """
    config.option.loadscopereorder = False
    names = "|".join(sorted(path.stem for path in Path(__file__).parent.rglob("*.py")))
    config.addinivalue_line("filterwarnings", rf"error:::({names})\Z")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _gpu_is_here():
        pytest.skip("needs a CUDA device")


@functools.cache
def _gpu_is_here() -> bool:
    """By the driver's own word: PyTorch may be a build for the CPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Engines are kept in a cache of the tests' own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True, scope="session")
def servers_that_end_at_once() -> None:
    """The standard library's look each half second whether they are to end; there are hundreds."""
    serve: Any = socketserver.BaseServer.serve_forever
    serve.__defaults__ = (0.02,)  # seconds


@pytest.fixture(autouse=True, scope="session")
def no_word_of_patients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After all tests: no log, audit or answer tells what the tests' images tell of patients."""
    import patients

    log = patients.Log()
    logging.getLogger().addHandler(log)
    yield
    logging.getLogger().removeHandler(log)
    assert list(patients.leaks(tmp_path_factory.getbasetemp(), log)) == []


@pytest.fixture(autouse=True, scope="session")
def nothing_frozen_for_ever() -> Iterator[None]:
    """What `no_socket_for_later` has frozen is looked through once more, after all tests.

    By then threads of pynetdicom have ended that held on to a socket after their test: such
    sockets, which it leaves open where a peer hung up, would be an error of whatever test is last.
    """
    yield
    gc.unfreeze()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unclosed <socket", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def no_socket_for_later(request: pytest.FixtureRequest) -> Iterator[None]:
    """What pynetdicom leaves open where a peer hung up is collected here, where that is known."""
    yield
    if "listen" in request.node.nodeid or "guide" in request.node.nodeid:
        gc.collect()
        gc.freeze()  # what is left stays: else each test would look through all of it again


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """What a command line sets up for its log ends with the test."""
    log = logging.getLogger("medmoe_edge")
    level, handlers = log.level, log.handlers
    yield
    log.setLevel(level)
    log.handlers = handlers


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


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint("tiny-phi", top_k=2)`: a random checkpoint with a tokenizer, made once.

    The keywords change the preset's experts; `dense=True` leaves them out. The matrices are eight
    times those of `initialise`, so that every part of the model has a say in the logits.
    """
    from medmoe_edge.checkpoint.reader import write_checkpoint
    from medmoe_edge.presets import PRESETS
    from medmoe_edge.training.initialise import random_tensors, train_tokenizer

    root = tmp_path_factory.mktemp("checkpoints")
    train_tokenizer([("Is there effusion?", "Yes")], 300, root / "tokenizer.json")

    @functools.cache
    def make(preset: str = "tiny", *, dense: bool = False, **moe: Any) -> Path:
        base = PRESETS[preset]
        assert base.moe is not None
        moe = {"expert_names": ("mri", "ct", "pathology", "xray"), **moe}
        config = dataclasses.replace(
            base,
            decoder=dataclasses.replace(base.decoder, vocab_size=320),
            moe=None if dense else dataclasses.replace(base.moe, **moe),
        )
        tensors = (
            (name, tensor if "norm" in name else tensor * 8)
            for name, tensor in random_tensors(config, seed=1)
        )
        folder = root / str(len(list(root.iterdir())))
        write_checkpoint(folder, config, tensors, tokenizer_file=root / "tokenizer.json")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """`tiny_bundle("int8", "tiny-phi", top_k=2)`: the bundle of a tiny checkpoint, made once."""
    from medmoe_edge.export import build

    root = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def make(precision: Any = "fp32", preset: str = "tiny", **options: Any) -> Path:
        out = root / str(len(list(root.iterdir())))
        checkpoint = tiny_checkpoint(preset, **options)
        return build.export_bundle(
            checkpoint, out, build.BuildOptions(precision=precision, name="tiny")
        )

    return make


@pytest.fixture
def unlike_bundle(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An int4 bundle, one of its experts in other formats, as a mixed export may store them."""
    from graphs import UNLIKE_FORMATS

    from medmoe_edge.export import build
    from medmoe_edge.export.plan import Plan

    usual = Plan.format_of
    monkeypatch.setattr(
        Plan, "format_of", lambda plan, name: UNLIKE_FORMATS.get(name) or usual(plan, name)
    )
    return build.export_bundle(
        tiny_checkpoint(), tmp_path / "bundle", build.BuildOptions(precision="int4")
    )


@pytest.fixture(scope="session")
def proven_bundle(
    tiny_bundle: Callable[..., Path],
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An fp32 bundle that holds the proof of its fidelity on two questions; not to be changed."""
    from PIL import Image

    import medmoe_edge

    folder = tmp_path_factory.mktemp("proven")
    Image.new("L", (8, 8)).save(folder / "scan.png")
    line = '{"image": "scan.png", "question": "%s", "answer": "No", "modality": "xray"}'
    (folder / "questions.jsonl").write_text("\n".join(line % word for word in ("Is it?", "Where?")))
    shutil.copytree(tiny_bundle(), folder / "bundle")
    options = medmoe_edge.VerifyOptions(tiny_checkpoint(), str(folder / "questions.jsonl"))
    medmoe_edge.verify(folder / "bundle", options)
    return folder / "bundle"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Run":
    """Runs a command line in an empty folder, without a terminal."""
    from typer.testing import CliRunner

    from medmoe_edge import cli

    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: str) -> "Result":
        return CliRunner().invoke(cli.app, arguments, prog_name="medmoe-edge")

    return invoke


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The models and runtimes that were loaded; each is the fake engine."""
    from command_line import FakeEngine

    import medmoe_edge.engine.engine

    calls: list[tuple[str, str]] = []

    def load(
        model: str,
        *,
        runtime: str,
        device: str,
        memory_budget: str | None = None,
        drop_pages: bool = False,
        prefix_cache: Path | None = None,
        allow_repetition: bool = False,
    ) -> FakeEngine:
        calls.append((model, runtime))
        return engine

    engine = FakeEngine()
    monkeypatch.setattr("medmoe_edge.engine.engine.load", load)
    monkeypatch.setitem(vars(medmoe_edge), "engine_for_test", engine)
    return calls


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A picture of 8 x 8 black pixels."""
    from PIL import Image

    path = tmp_path / "scan.png"
    Image.new("L", (8, 8)).save(path)
    return path


@pytest.fixture(autouse=True, scope="session")
def few_questions_travel() -> Iterator[None]:
    """Six instead of 64 questions travel with bundles that tests export and verify."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("torch") is None:  # nothing is exported: tests/arithmetic on ARM
            yield
            return
        patch.setattr("medmoe_edge.pipeline.med_moe.QUESTIONS", 6)
        yield


@pytest.fixture(autouse=True, scope="session")
def servers_stop_at_once() -> Iterator[None]:
    """They look twice a second whether they should."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (0.02,))
        yield


@pytest.fixture(scope="module")
def trt() -> Any:
    """TensorRT for RTX."""
    from medmoe_edge.errors import MissingDependencyError
    from medmoe_edge.export.gpus import load_library

    try:
        return load_library("tensorrt-rtx")
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Page"]:
    """The browser that the tests of the page share."""
    from browser import chromium

    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: "Page") -> "Page":
    browser.size(1440, 900)
    return browser
