"""Sessions opened ahead: whoever needs one waits for it, and meets what opening it met."""

import errno
import gc
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import medmoe_edge
from medmoe_edge.contrastive.engine import load_modality
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import BundleError, ResourceError
from medmoe_edge.runtimes.base import EmbeddingTable
from medmoe_edge.runtimes.ort import runtime as ort_sessions
from medmoe_edge.runtimes.ort.runtime import (
    CPU,
    CUDA,
    OPENED_AT_ONCE,
    EarlySessions,
    one_of_many,
    session_options,
)

SOON = 60.0  # seconds; a failure then, rather than a wait for ever

Make = Callable[..., Path]


def test_a_graph_is_open_by_its_name(tiny_bundle: Make) -> None:
    graphs = [tiny_bundle() / name for name in ("vision.onnx", "decoder.onnx")]
    sessions = EarlySessions({graph: session_options() for graph in graphs})
    assert sessions["decoder.onnx"].get_inputs()[0].name == "embeds"
    assert sessions["vision.onnx"].get_inputs()[0].name == "pixels"


def test_what_cannot_be_opened_is_told_to_who_needs_it(tiny_bundle: Make) -> None:
    folder = tiny_bundle()
    graphs = (folder / "tokenizer.json", folder / "vision.onnx")
    sessions = EarlySessions({graph: session_options() for graph in graphs})
    assert sessions["vision.onnx"]
    with pytest.raises(BundleError, match=r"cannot load tokenizer\.json"):
        sessions["tokenizer.json"]


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("Exception during initialization: std::bad_alloc", "not enough memory for vision.onnx."),
        ("Failed to allocate memory for requested buffer", "not enough memory for vision.onnx."),
        ("PosixThread pthread_create failed, error code: 11", "no further thread or process for v"),
        ("Platform requires procfs", "There is no /proc, which is needed for vision.onnx."),
        (
            "vision.data: errcode = 24 - Too many open files",
            "vision.onnx cannot be used now: too m",
        ),
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, Exception])
def test_what_the_machine_refuses_is_not_the_fault_of_the_bundle(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], said: str, what: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind(said)

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(ResourceError) as caught:
        ort_sessions.open_session(Path("vision.onnx"), ort.SessionOptions())
    assert what in caught.value.what


def test_an_embedding_without_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(ResourceError, match=r"not enough memory for .*embedding\.npy"):
        EmbeddingTable(tmp_path / "embedding.npy")


def test_a_provider_that_fails_prints_nothing_on_stdout(
    tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own fall back does, where a verb prints JSON."""
    real = ort.InferenceSession._create_inference_session

    def create(self: Any, providers: list[str], *more: Any) -> None:
        if CUDA in providers:
            raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")
        real(self, providers, *more)

    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", create)
    graph = tiny_bundle() / "vision.onnx"
    session = ort_sessions.open_session(graph, session_options(), [CUDA, CPU])
    assert session.get_providers() == [CPU]
    with pytest.raises(BundleError, match=r"cannot load tokenizer\.json"):
        ort_sessions.open_session(graph.with_name("tokenizer.json"), session_options())
    assert capsys.readouterr().out == ""


def test_what_nobody_waits_for_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while it loads, the process does not end only after all is loaded."""
    opened: list[str] = []
    begun, go_on = threading.Semaphore(0), threading.Event()

    def open_session(path: Path, *_: Any) -> None:
        opened.append(path.name)
        begun.release()
        go_on.wait(SOON)

    monkeypatch.setattr(ort_sessions, "open_session", open_session)
    others = set(threading.enumerate())
    names = [f"{index}.onnx" for index in range(OPENED_AT_ONCE + 3)]
    sessions = EarlySessions({tmp_path / name: ort.SessionOptions() for name in names})
    for _ in range(OPENED_AT_ONCE):
        assert begun.acquire(timeout=SOON)
    threads = set(threading.enumerate()) - others
    del sessions
    gc.collect()
    go_on.set()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert sorted(opened) == names[:OPENED_AT_ONCE]


def test_weights_that_are_cut_off_while_they_are_mapped_end_no_process(tmp_path: Path) -> None:
    """A MedMoE's, which asks for its sessions each time."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_path("modality-nano"), folder)
    engine = load_modality(folder)
    picture, labels = np.zeros((64, 64), np.uint8), ["effusion", "mass"]
    assert engine.classify(picture, labels)
    for file in folder.glob("*.data"):
        os.truncate(file, 100)
    with pytest.raises(BundleError, match=r"\.data was changed while it was in use"):
        engine.classify(picture, labels)


def test_no_thread_outlives_the_opening(tiny_bundle: Make) -> None:
    others = set(threading.enumerate())
    sessions = EarlySessions({tiny_bundle() / "vision.onnx": session_options()})
    threads = set(threading.enumerate()) - others
    assert sessions["vision.onnx"]
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


def test_kernels_that_scale_each_token_alone_are_off() -> None:
    """Arm's for SME; tests/arithmetic/emulate.sh runs the op on such a processor."""
    assert session_options().get_session_config_entry("mlas.disable_kleidiai") == "1"


def test_one_of_many_spins_no_longer_than_between_two_operators() -> None:
    options = one_of_many(session_options())
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "100"


@pytest.mark.parametrize("version", ["1.23.2", "1.9.0", "0.5"])
def test_an_old_onnx_runtime_is_told_before_anything_is_opened(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "__version__", version)
    for load in medmoe_edge.load, partial(load_modality, "modality-nano"):
        with pytest.raises(ResourceError, match=rf"{version} is installed, but 1\.24") as told:
            load()
        assert "pip install 'onnxruntime>=1.24'" in told.value.remedy


@pytest.mark.parametrize("version", ["1.24.0", "1.32.0", "2.0.1", "1.33.0.dev20270101"])
def test_a_recent_one_is_fine(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", version)
    assert session_options()
