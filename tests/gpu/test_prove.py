"""`prove`: every path of this package to a GPU, or what stands in for it where there is none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run

from medmoe_edge.device import prove
from medmoe_edge.device.prove import NO_DEVICE, PATHS, Fault, check, cuda_devices
from medmoe_edge.errors import MissingDependencyError, ResourceError
from medmoe_edge.export.decoder import heads
from medmoe_edge.export.passes import tensorrt_parser
from medmoe_edge.kernels import launch
from medmoe_edge.render.bench import proof_page
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime
from medmoe_edge.runtimes.torch.paged import PagedTorchRuntime

BY_NAME = {path.name: path for path in PATHS}


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_NAME)
def test_a_path_is_right_on_this_gpu(name: str, tmp_path: Path) -> None:
    found = check(BY_NAME[name], tmp_path, "cuda")
    if found.verdict == "not run":
        pytest.skip(found.why)
    assert found.verdict == "passed", found.why


# --- without a GPU --------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def no_gpu() -> None:
    if cuda_devices():
        pytest.skip("there is a GPU")


def test_without_a_gpu_nothing_is_proven_and_stand_ins_are_named(run: Run, tmp_path: Path) -> None:
    ran = run("prove", "--json", "-o", str(tmp_path / "proof"))
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told == json.loads((tmp_path / "proof" / "proof.json").read_text())
    assert [path["name"] for path in told["paths"]] == list(BY_NAME)
    assert told["failed"] == []
    for path in told["paths"]:
        assert path["verdict"] == "not run"
        assert path["why"].startswith(NO_DEVICE)
        if path["figures"]:
            assert path["stand_in"] == BY_NAME[path["name"]].stand_in
    assert told["machine"]["device"] == "cpu"
    shown = (tmp_path / "proof" / "proof.html").read_text()
    assert all(path.what in shown for path in PATHS)
    again = run("prove", "-o", str(tmp_path / "proof"))
    assert again.exit_code == 2
    assert "already" in again.stderr


def off(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step with logits that are a little wrong."""

    def wrong(*arguments: Any) -> Any:
        found = step(*arguments)
        noise = np.random.default_rng(0).standard_normal(found.logits.shape)
        return found._replace(logits=found.logits + 0.1 * noise.astype(np.float32))

    return wrong


def slightly_large(feed_forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: feed_forward(*arguments) * 1.01


def not_turned(build: Any, values: Any, name: str, steps: Any, decoder: Any) -> Any:
    """Heads of q or k without their positions."""
    return heads(build, values[name], decoder)


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "fault"),
    [
        ("kernels", launch, "feed_forward", slightly_large),
        ("torch", TorchBundleRuntime, "step", off),
        ("torch-paged", PagedTorchRuntime, "step", off),
        ("onnxruntime-cuda", OrtRuntime, "step", off),
        ("engine", tensorrt_parser, "rotated", lambda rotated: not_turned),
    ],
)
def test_a_fault_turns_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    owner: Any,
    attribute: str,
    fault: Callable[[Any], Any],
) -> None:
    monkeypatch.setattr(owner, attribute, fault(getattr(owner, attribute)))
    found = check(BY_NAME[name], tmp_path, "cpu")
    assert found.verdict == "failed"
    assert "off" in found.why
    assert found.stand_in


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(
    ("error", "verdict", "why"),
    [
        (Fault("Logits are off."), "failed", "Logits are off."),
        (ResourceError("No memory.", "Free some."), "failed", "No memory. Free some."),
        (RuntimeError("CUDA error 700"), "failed", "RuntimeError: CUDA error 700"),
        (MissingDependencyError("tensorrt", "tensorrt"), "not run", "'tensorrt'"),
        (None, "passed", ""),
    ],
)
def test_a_verdict_on_a_gpu(
    tmp_path: Path, name: str, error: Exception | None, verdict: str, why: str
) -> None:
    def run(bench: Any) -> dict[str, Any]:
        assert bench.device == "cuda"
        if error:
            raise error
        return {"figure": 1.0}

    found = check(BY_NAME[name]._replace(run=run), tmp_path, "cuda")
    assert (found.verdict, found.stand_in) == (verdict, None)
    assert why in found.why
    assert found.figures == ({} if error else {"figure": 1.0})


def test_what_is_missing_or_late_is_not_run(tmp_path: Path) -> None:
    path = BY_NAME["torch"]._replace(needs=(("no_such_module", "such", "export"),))
    assert check(path, tmp_path, "cuda").why == "such is not installed (medmoe-edge[export])"
    assert check(path, tmp_path, "cpu").why.startswith(f"{NO_DEVICE}; such is not installed")
    assert check(path, tmp_path, "cuda", late=True).why == "8 minutes are over"


def test_a_page_shows_what_failed_and_escapes_it() -> None:
    failed = prove.Checked("engine", "TensorRT", "failed", "<b>off</b>", None, {"x": 0.5}, 1.0)
    proof = prove.Proof({"gpus": "<none>"}, (failed,))
    shown = proof_page(proof)
    assert "&lt;b&gt;off&lt;/b&gt;" in shown
    assert "&lt;none&gt;" in shown
    assert "<b>" not in shown
    error = proof.error()
    assert error is not None
    assert (error.exit_code, "engine" in error.what) == (4, True)
    assert proof.to_json()["failed"] == ["engine"]
