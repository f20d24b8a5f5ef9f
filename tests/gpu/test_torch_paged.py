"""Experts of a bundle paged in PyTorch: the same bits as the resident runtime.

On CUDA too, where there is a GPU; there was none to execute that on.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import PAGED, in_steps
from interpreted import interpret
from torch import nn

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import BundleError, InputError
from medmoe_edge.runtimes.base import Cache, Paged, Step
from medmoe_edge.runtimes.paging.pager import Expert
from medmoe_edge.runtimes.slots.slots import Chosen, CpuMemory, Table
from medmoe_edge.runtimes.torch import paged as torch_paged
from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime
from medmoe_edge.runtimes.torch.eager import TorchDevice
from medmoe_edge.runtimes.torch.paged import PagedTorchRuntime, SlotLinear

Make = Callable[..., Path]
STEPS = (17, 5, 1, 1, 1)
ANY_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Recorded(PagedTorchRuntime):
    """Remembers into which parts its steps were cut."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.parts: dict[int, int] = {}

    def _run(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        self.parts[cache.length] = len(embeds)  # what is replayed takes the place
        return super()._run(embeds, cache, table)


def check(paged: Recorded, resident: TorchBundleRuntime, lengths: tuple[int, ...] = STEPS) -> None:
    """The same bits as the resident runtime, of the same parts."""
    found = in_steps(paged, lengths)
    parts = tuple(paged.parts[begin] for begin in sorted(paged.parts))
    wanted = in_steps(resident, parts)
    routing = np.concatenate([step.router_logits for step in wanted])
    assert np.concatenate([step.router_logits for step in found]).tobytes() == routing.tobytes()
    ends = np.cumsum(parts).tolist()
    for step, end in zip(found, np.cumsum(lengths).tolist(), strict=True):
        assert step.logits.tobytes() == wanted[ends.index(end)].logits.tobytes()


def least(bundle: Bundle) -> int:
    with pytest.raises(InputError, match="is too small") as caught:
        PagedTorchRuntime(bundle, 1, "cpu")
    return int(caught.value.remedy.split(" take ")[1].split()[0].replace(",", ""))


# --- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize(("precision", "preset", "moe"), PAGED)
def test_paged_experts_give_the_same_bits(
    tiny_bundle: Make,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    preset: str,
    moe: dict[str, Any],
    unified: bool,
) -> None:
    """In memory as a CPU has it, and in a memory that is copied to."""
    monkeypatch.setattr(torch_paged, "memory_of", lambda _: CpuMemory(unified=unified))
    bundle = Bundle.open(tiny_bundle(precision, preset, **moe))
    resident = TorchBundleRuntime(bundle, "cpu")
    for budget in ("100%", "50%", least(bundle)):
        paged = Recorded(bundle, budget, "cpu")
        check(paged, resident)
        whole = sorted(paged.parts) == np.cumsum((0, *STEPS[:-1])).tolist()
        assert whole == (budget == "100%")
        assert paged.requests.slots.experts.pager.used <= paged.requests.slots.experts.pager.budget
        kept = sum(paged.requests.slots.store.stored.values())
        assert paged.requests.slots.store.host_bytes == (0 if unified else kept)


@ANY_DEVICE
@pytest.mark.parametrize(("precision", "preset", "moe"), PAGED[:2])
def test_the_kernels_read_the_slots(
    request: pytest.FixtureRequest,
    tiny_bundle: Make,
    device: TorchDevice,
    precision: str,
    preset: str,
    moe: dict[str, Any],
) -> None:
    if device == "cpu":
        interpret(request.getfixturevalue("monkeypatch"))
    bundle = Bundle.open(tiny_bundle(precision, preset, **moe))
    paged = Recorded(bundle, "75%", device, torch.float16)
    assert not any(isinstance(module, SlotLinear) for module in paged.model.modules())
    check(paged, TorchBundleRuntime(bundle, device, torch.float16), (1, 1))
    assert paged.paging()["replays"] > 0


def test_experts_of_unlike_formats_and_sizes(unlike_bundle: Path) -> None:
    bundle = Bundle.open(unlike_bundle)
    paged = Recorded(bundle, "60%", "cpu")
    assert len(set(paged.requests.slots.store.stored.values())) == 2
    check(paged, TorchBundleRuntime(bundle, "cpu"))


def test_only_experts_in_slots_are_in_memory(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("fp32"))
    paged, resident = PagedTorchRuntime(bundle, "50%", "cpu"), TorchBundleRuntime(bundle, "cpu")
    experts = sum(paged.requests.slots.store.stored.values())
    assert weights(resident.model) - weights(paged.model) == experts
    assert paged.requests.slots.count * paged.requests.slots.store.size == experts / 2


def weights(model: nn.Module) -> int:
    return sum(each.nbytes for each in model.parameters() if not each.is_meta)


# --- requests ---------------------------------------------------------------------------------


def test_an_image_tells_what_is_fetched_and_the_report_what_came_of_it() -> None:
    bundle = Bundle.open(bundle_path("nano"))
    runtime = PagedTorchRuntime(bundle, "50%", "cpu")
    assert isinstance(runtime, Paged)
    assert not isinstance(TorchBundleRuntime(bundle, "cpu"), Paged)
    tokens = runtime.encode_image(np.zeros((1, 3, 256, 256), np.float32))
    cache = runtime.new_cache(len(tokens) + 1)
    runtime.step(tokens, cache)
    runtime.step(tokens[:1], cache)
    report = runtime.paging()
    json.dumps(report)
    assert report["prediction"]["precision"] > 0
    assert report["hits"] > 0
    ran = {(layer, e) for layer, experts in report["experts"].items() for e in experts}
    assert report["hits"] + report["misses"] >= len(ran)
    assert runtime.paging()["hits"] == runtime.paging()["loads"] == 0


def test_what_is_predicted_is_there_before_the_first_step() -> None:
    bundle = Bundle.open(bundle_path("nano"))
    runtime = PagedTorchRuntime(bundle, "50%", "cpu")
    runtime.encode_image(np.zeros((1, 3, 256, 256), np.float32))
    held: list[set[Expert]] = []
    usual = runtime.requests.replay._run

    def spy(embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        held.append({(int(m), int(e)) for m, e in np.argwhere(table >= 0)})
        return usual(embeds, cache, table)

    runtime.requests.replay._run = spy
    runtime.step(runtime.embed([1]), runtime.new_cache(1))
    assert runtime.requests.routing._predicted
    assert runtime.requests.routing._predicted <= held[0]


def test_a_corrupted_expert_fails_its_request_and_no_other(
    tiny_bundle: Make, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle("int8"), tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    wanted = in_steps(TorchBundleRuntime(bundle, "cpu"), STEPS)
    runtime = PagedTorchRuntime(bundle, "100%", "cpu")
    data = tmp_path / "bundle" / "decoder.data"
    offset, _ = bundle.manifest["experts"]["decoder.layers.2.ffn.experts.1"]
    intact = data.read_bytes()
    with data.open("r+b") as file:
        file.seek(offset + 100)
        file.write(bytes([intact[offset + 100] ^ 1]))
    for _ in range(2):
        with pytest.raises(BundleError, match=r"Expert 1 of layer 2 in .* was changed"):
            in_steps(runtime, STEPS)
    data.write_bytes(intact[: offset + 100])
    with pytest.raises(BundleError, match="is incomplete"):
        in_steps(runtime, STEPS)
    data.write_bytes(intact)
    found = in_steps(runtime, STEPS)
    for step, right in zip(found, wanted, strict=True):
        assert step.logits.tobytes() == right.logits.tobytes()


# --- what is refused --------------------------------------------------------------------------


def test_a_budget_too_small_names_the_least(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("int8", top_k=2))
    size = least(bundle)
    assert PagedTorchRuntime(bundle, size, "cpu").requests.slots.count == 4  # two layers of two
    with pytest.raises(InputError):
        PagedTorchRuntime(bundle, size - 1, "cpu")
    with pytest.raises(InputError, match="is no memory budget"):
        PagedTorchRuntime(bundle, "10 potatoes", "cpu")


def test_a_dense_model_has_nothing_to_page(tiny_bundle: Make) -> None:
    with pytest.raises(BundleError, match="it has no experts"):
        PagedTorchRuntime(Bundle.open(tiny_bundle("fp32", dense=True)), "50%", "cpu")
