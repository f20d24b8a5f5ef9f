"""`prove`: every path of this package to a GPU, or what stands in for it where there is none."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run

from medmoe_edge.device import prove
from medmoe_edge.device.hardware import cuda_devices
from medmoe_edge.device.prove import NO_DEVICE, PATHS, Fault, check
from medmoe_edge.errors import MissingDependencyError, ResourceError
from medmoe_edge.export.decoder import heads
from medmoe_edge.export.passes import tensorrt_parser
from medmoe_edge.kernels import launch
from medmoe_edge.render.bench import proof_page
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.slots.slots import SlotPools
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
    shown = html.unescape((tmp_path / "proof" / "proof.html").read_text())
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


def next_slot(in_place: Callable[..., Any]) -> Callable[..., Any]:
    """Experts are read into the slot behind the one that the table names."""

    def wrong(pools: SlotPools, slot: int) -> Any:
        count = len(pools.pools[0]) // pools.kinds[0].bytes
        return in_place(pools, (slot + 1) % count)

    return wrong


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
        ("onnxruntime-cuda-paged", SlotPools, "in_place", next_slot),
        ("engine-paged", SlotPools, "in_place", next_slot),
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
    assert re.search("off|other experts", found.why)
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


class Clock:
    """It moves when it is told to, and by so many seconds whenever it is read."""

    def __init__(self, each: float = 0.0) -> None:
        self.now, self.each = 1000.0, each

    def __call__(self) -> float:
        self.now += self.each
        return self.now


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_all_paths_end_in_their_time_and_leave_the_rest_to_others(
    monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    """Steps of 7 seconds: two paths would never end, the others need 21."""
    clock, endless = Clock(), {"kernels", "torch-paged"}
    began: dict[str, float] = {}

    def take(name: str) -> Callable[..., Any]:
        def run(bench: Any) -> dict[str, Any]:
            began[name] = clock.now
            steps = iter(int, 1) if name in endless else range(3)
            for _ in steps:
                bench.watch.check()
                clock.now += 7
            return {"figure": 1.0}

        return run

    paths = tuple(path._replace(run=take(path.name), needs=()) for path in PATHS)
    monkeypatch.setattr(prove, "PATHS", paths)
    proof = prove.prove(device=device, clock=clock)
    assert clock.now - 1000 <= prove.SECONDS
    assert proof.failed == []
    assert proof.error() is None
    assert began.keys() == BY_NAME.keys()
    for path in proof.paths:
        if path.name in endless:
            assert (path.verdict, path.figures, path.stand_in) == ("not run", {}, None)
            assert path.why.endswith("no time left")
            assert path.seconds > prove.SECONDS / len(PATHS) / 2
        else:
            assert path.figures == {"figure": 1.0}
            assert path.verdict == ("passed" if device == "cuda" else "not run")
            assert "no time left" not in path.why


def test_one_step_that_takes_all_the_time_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def run(bench: Any) -> dict[str, Any]:
        clock.now += prove.SECONDS
        return {"figure": 1.0}

    paths = tuple(path._replace(run=run, needs=()) for path in PATHS)
    monkeypatch.setattr(prove, "PATHS", paths)
    first, *others = prove.prove(device="cuda", clock=clock).paths
    assert first.verdict == "passed"
    assert {(path.verdict, path.why) for path in others} == {("not run", "no time left")}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_stand_in_ends_between_its_steps(tmp_path: Path, name: str) -> None:
    found = check(BY_NAME[name], tmp_path, "cpu", prove.Watch(2.5, Clock(each=1)))
    assert (found.verdict, found.figures, found.stand_in) == ("not run", {}, None)
    assert found.why == f"{NO_DEVICE}; no time left"


def test_what_is_missing_or_late_is_not_run(tmp_path: Path) -> None:
    path = BY_NAME["torch"]._replace(needs=(("no_such_module", "such", "export"),))
    assert check(path, tmp_path, "cuda").why == "such is not installed (medmoe-edge[export])"
    assert check(path, tmp_path, "cpu").why.startswith(f"{NO_DEVICE}; such is not installed")
    late = prove.Watch(0)
    assert check(BY_NAME["torch"], tmp_path, "cuda", late).why == "no time left"


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
