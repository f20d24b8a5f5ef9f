"""A bundle for CUDA whose experts are paged: run on ONNX Runtime's CPU, which has the same ops.

What needs CUDA was not executed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from graphs import in_steps

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle, Target
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import InputError, ResourceError
from medmoe_edge.export.targets import export_target
from medmoe_edge.runtimes.base import Cache, Paged, Step
from medmoe_edge.runtimes.ort import paged as ort_paged
from medmoe_edge.runtimes.ort.paged import SlotOrtRuntime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.slots.slots import Chosen, CpuMemory, Table

if TYPE_CHECKING:
    from command_line import Run

Make = Callable[..., Path]
STEPS = (17, 5, 1, 1, 1)
PAGED = Target("onnxruntime-cuda", "fp16", paged=True)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("fp32", "tiny", {"top_k": 2, "use_residual": True}),
    ("fp32", "tiny-phi", {}),
    ("int8", "tiny", {}),  # QMoE: on the CPU alone
]


class Recorded(SlotOrtRuntime):
    """Remembers into which parts its steps were cut."""

    def _run_with(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        self.__dict__.setdefault("parts", {})[cache.length] = len(embeds)
        return super()._run_with(embeds, cache, table)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize(("precision", "preset", "moe"), CASES)
def test_slots_compute_what_the_resident_runtime_does(
    tiny_bundle: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    preset: str,
    moe: dict[str, Any],
    unified: bool,
) -> None:
    monkeypatch.setattr(ort_paged, "_memory_of", lambda _: CpuMemory(unified=unified))
    portable = Bundle.open(tiny_bundle(precision, preset, **moe))
    for name, target in (("paged", PAGED), ("whole", Target("onnxruntime-cuda", "fp16"))):
        export_target(portable, tmp_path / name, target)
    resident = OrtRuntime(Bundle.open(tmp_path / "whole"), device="cpu")
    for budget in ("100%", "50%"):
        runtime = Recorded(Bundle.open(tmp_path / "paged"), budget, device="cpu")
        found = in_steps(runtime, STEPS)
        parts = tuple(length for _, length in sorted(runtime.__dict__["parts"].items()))
        wanted = in_steps(resident, parts)
        ends = np.cumsum(parts).tolist()
        for step, end in zip(found, np.cumsum(STEPS).tolist(), strict=True):
            right = wanted[ends.index(end)].logits
            if moe.get("top_k") == 2:  # gates are rounded over another number of columns
                np.testing.assert_allclose(step.logits, right, atol=5e-3 * np.abs(right).max())
            else:
                assert step.logits.tobytes() == right.tobytes()
        slots = runtime.requests.slots
        assert slots.experts.pager.used <= slots.experts.pager.budget
        assert (slots.store.host_bytes == 0) == unified


def test_it_is_loaded_with_a_budget_or_with_room_for_all(tiny_bundle: Make, tmp_path: Path) -> None:
    portable = Bundle.open(tiny_bundle("fp32"))
    export_target(portable, tmp_path / "paged", PAGED)
    for budget, slots in (("50%", 4), (None, 8)):
        runtime = load(tmp_path / "paged", device="cpu", memory_budget=budget).runtime
        assert isinstance(runtime, SlotOrtRuntime)
        assert isinstance(runtime, Paged)
        assert runtime.requests.slots.count == slots
        side = runtime.config.vision.image_size
        tokens = runtime.encode_image(np.zeros((1, 3, side, side), np.float32))
        runtime.step(tokens, runtime.new_cache(len(tokens)))
        report = runtime.paging()
        json.dumps(report)
        assert report["hits"] + report["misses"] > 0
    with pytest.raises(ResourceError, match="CUDA"):
        load(tmp_path / "paged", memory_budget="50%")
    with pytest.raises(InputError, match="too small"):
        load(tmp_path / "paged", device="cpu", memory_budget="1kB")
    export_target(portable, tmp_path / "whole", Target("onnxruntime-cuda", "fp16"))
    with pytest.raises(InputError, match="with all experts in memory"):
        load(tmp_path / "whole", device="cpu", memory_budget="50%")


def test_a_portable_bundle_needs_no_flag_to_be_paged(run: "Run") -> None:
    done = run("export", "nano", "--paged")
    assert done.exit_code != 0
    assert "--paged is for GPUs" in done.output


@pytest.mark.gpu
def test_slots_in_a_gpus_memory(tiny_bundle: Make, tmp_path: Path) -> None:
    portable = Bundle.open(tiny_bundle("fp32", top_k=2))
    export_target(portable, tmp_path / "paged", PAGED)
    bundle = Bundle.open(tmp_path / "paged")
    here = in_steps(SlotOrtRuntime(bundle, "100%", device="cpu"), STEPS)
    for budget in ("100%", "50%"):
        there = in_steps(SlotOrtRuntime(bundle, budget, device="cuda"), STEPS)
        for found, wanted in zip(there, here, strict=True):
            bound = 2e-2 * np.abs(wanted.logits).max()
            np.testing.assert_allclose(found.logits, wanted.logits, atol=bound)
