"""The targets that can be run here, each as made from one bundle, and what runs it."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import onnxruntime as ort

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.target import Target
from medmoe_edge.data.datasets import Example
from medmoe_edge.evaluation.targets import Agreement, Opened, Progress, agree
from medmoe_edge.export.external_data import save_model
from medmoe_edge.export.stored import specification
from medmoe_edge.export.target_graphs import write_graphs
from medmoe_edge.export.targets import export_target
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.graph import GraphRuntime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.ort.sessions import CUDA

CPU = "ONNX Runtime, CPU"
GRAPH = "its graph on ONNX Runtime, CPU"


def agree_on_targets(
    bundle: Bundle, examples: Sequence[Example], *, progress: Progress | None = None
) -> list[Agreement]:
    """Hold every target's form of a bundle against its specification, as far as it runs here.

    The plugin of TensorRT proper is held against it in the tests, on small shapes: on a CPU its
    kernels run in an interpreter.
    """
    bundle.check_portable()
    candidates: dict[str, Callable[[], Opened]] = {
        "onnxruntime": partial(_portable, bundle),
        "onnxruntime-cuda": partial(_cuda, bundle),
        "tensorrt-rtx": partial(_graphs, bundle),
    }
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    return agree(partial(_specified, bundle), candidates, tokenizer, examples, progress=progress)


@contextlib.contextmanager
def _specified(bundle: Bundle) -> Iterator[tuple[Runtime, str]]:
    with tempfile.TemporaryDirectory() as folder:
        save_model(specification(bundle), Path(folder), "decoder")
        decoder = Path(folder) / "decoder.onnx"
        yield GraphRuntime(bundle, bundle.path("vision.onnx"), decoder), CPU


@contextlib.contextmanager
def _portable(bundle: Bundle) -> Iterator[tuple[Runtime, str]]:
    yield OrtRuntime(bundle), CPU


@contextlib.contextmanager
def _cuda(bundle: Bundle) -> Iterator[tuple[Runtime, str]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        export_target(bundle, out, Target("onnxruntime-cuda", "fp16"))
        here = CUDA in ort.get_available_providers()
        runtime = OrtRuntime(
            Bundle.open(out), device="auto" if here else "cpu", allow_fallback=True
        )
        yield runtime, CPU if runtime.choice.device == "cpu" else "ONNX Runtime, CUDA"


@contextlib.contextmanager
def _graphs(bundle: Bundle) -> Iterator[tuple[Runtime, str]]:
    positions = bundle.config.decoder.max_positions
    target = Target("tensorrt-rtx", "fp16", "none", "none", positions, positions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_graphs(bundle, target, folder)
        yield GraphRuntime(bundle, folder / "vision.onnx", folder / "decoder.onnx"), GRAPH
