"""Plans held against what was measured: NVIDIA's own table for Jetsons, and ours for a CPU.

NVIDIA's: TensorRT Edge-LLM, docs/source/user_guide/performance/performance-benchmarks.md, runtime
rows of release 0.9.0 (JetPack 7.2; batch 1, int4 AWQ weights, vanilla decoding), and the three rows
of release 0.10.0 for Qwen3-VL-2B. They are of NVIDIA's kernels, not of ours, which ran on no
Jetson. Shapes: the models' `config.json`.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest

from medmoe_edge.device.estimate import (
    PlanOptions,
    _forecasts,
    fit,
    make_plan,
    plan,
)
from medmoe_edge.device.hardware import DEVICES, REACHED, Device, find_device, nominal_speeds
from medmoe_edge.errors import DataError, InputError
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.costs import (
    COPIES,
    Asked,
    Kind,
    Precision,
    Work,
    experts_bytes,
    held_experts,
    held_ratio,
    memory_run,
    paging_cost,
    work_seconds,
)
from medmoe_edge.runtimes.paging.prediction import budget_bytes
from medmoe_edge.runtimes.slots.slots import slot_count
from medmoe_edge.training.recipe import recipe_json

STABLELM, PHI = "med-moe-stablelm-1.6b", "med-moe-phi2-2.7b"
VOCABULARY = 151_936
INT4 = 4 + 16 / 128  # AWQ: groups of 128


class Dense(NamedTuple):
    """A decoder of Qwen3: sizes of the residual stream, queries, keys and the feed-forward."""

    hidden: int
    layers: int
    queries: int
    keys: int
    forward: int

    def work(self, rows: int, past: int) -> Work:
        """A step; the head is stored in fp16."""
        attention = self.layers * self.hidden * 2 * (self.queries + self.keys)
        forward = self.layers * 3 * self.hidden * self.forward
        head = VOCABULARY * self.hidden
        positions = rows * past + rows * (rows + 1) // 2
        return Work(
            {"attention": attention, "ffn": forward, "head": head},
            {"attention": 2.0 * rows * attention, "ffn": 2.0 * rows * forward, "head": 2.0 * head},
            4.0 * self.layers * self.queries * positions,
            2 * self.layers * self.keys * (past + rows),
            0,
        )


QWEN = {
    "0.6B": Dense(1024, 28, 2048, 1024, 3072),
    "1.7B": Dense(2048, 28, 2048, 1024, 6144),
    "4B": Dense(2560, 36, 4096, 1024, 9728),
    "8B": Dense(4096, 36, 4096, 1024, 12288),
}
# Layers, width and feed-forward of the vision transformers of Qwen3-VL; 265 tokens are 4 patches
# each.
TOWERS = {"1.7B": (24, 1024, 4096), "4B": (24, 1024, 4096), "8B": (27, 1152, 4304)}
PATCHES = 265 * 4


class Row(NamedTuple):
    """A line of the table: milliseconds of a prefill of `prompt` tokens and of the vision tower (0:
    none), and tokens per second.
    """

    device: str
    model: str
    prompt: int
    prefill: float
    vision: float
    decode: float


AGX, NX, NANO = "orin-agx-64g", "orin-nx-16g", "orin-nano-8g"
TABLE = [
    Row(*line)
    for line in (
        (AGX, "0.6B", 61, 14.8, 0, 186.4),
        (AGX, "1.7B", 61, 20.4, 0, 98.6),
        (AGX, "4B", 57, 42.6, 0, 53.1),
        (AGX, "8B", 61, 65.7, 0, 32.5),
        (AGX, "1.7B", 292, 50.0, 39.0, 98.4),
        (AGX, "4B", 292, 123.7, 39.3, 52.4),
        (AGX, "8B", 292, 225.1, 57.2, 32.3),
        (NX, "0.6B", 61, 18.9, 0, 117.4),
        (NX, "1.7B", 61, 35.4, 0, 60.4),
        (NX, "4B", 57, 74.9, 0, 31.6),
        (NX, "8B", 61, 127.2, 0, 19.0),
        (NX, "1.7B", 292, 103.1, 82.1, 60.1),
        (NX, "4B", 292, 244.6, 83.7, 31.2),
        (NX, "8B", 292, 462.1, 120.0, 18.9),
        (NANO, "0.6B", 61, 28.7, 0, 72.8),
        (NANO, "1.7B", 61, 63.1, 0, 37.4),
        (NANO, "1.7B", 292, 190.9, 151.1, 36.9),
        ("thor", "4B", 57, 33.5, 0, 79.6),
        ("thor", "8B", 61, 56.0, 0, 49.3),
        ("thor", "4B", 292, 85.2, 11.7, 79.0),
        ("thor", "8B", 292, 156.5, 15.8, 48.9),
        # release 0.10.0
        (AGX, "1.7B", 292, 46, 36, 94),
        (NX, "1.7B", 292, 94, 77, 56),
        (NANO, "1.7B", 292, 167, 141, 34),
        (AGX, "1.7B", 2048, 298, 0, 94),
        (NX, "1.7B", 2048, 760, 0, 56),
        (NANO, "1.7B", 2048, 1017, 0, 34),
    )
]


def step(device: Device, model: str, rows: int, past: int) -> float:
    """Milliseconds of a step of a dense decoder, by the arithmetic of `plan`."""
    speed, shape = nominal_speeds(device)["int4"], QWEN[model]
    bits = {"attention": INT4, "ffn": INT4, "head": 16.0}
    fixed = speed.dense + (speed.prefill if rows > 1 else 0)
    return 1000 * (work_seconds(shape.work(rows, past), bits, speed) + shape.layers * fixed)


def tower(device: Device, model: str) -> float:
    """Milliseconds of the vision transformer in fp16."""
    layers, width, forward = TOWERS[model]
    rows = PATCHES * (4 * width**2 + 2 * width * forward) + 2 * PATCHES**2 * width
    return 1000 * 2 * layers * rows * nominal_speeds(device)["fp16"].operation


def predicted(row: Row) -> Iterator[tuple[str, float]]:
    """Predicted over measured, each as a time."""
    device = DEVICES[row.device]
    yield "prefill", step(device, row.model, row.prompt, 0) / row.prefill
    yield "decode", step(device, row.model, 1, row.prompt) * row.decode / 1000
    if row.vision:
        yield "vision", tower(device, row.model) / row.vision


def test_plans_come_near_nvidias_own_figures() -> None:
    errors = {(row, what): abs(ratio - 1) for row in TABLE for what, ratio in predicted(row)}
    assert len(errors) > 60
    assert median(errors.values()) <= 0.10
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] <= 0.25, worst


def test_the_order_of_devices_is_that_of_the_table() -> None:
    compared = 0
    for one, other in itertools.permutations(TABLE, 2):
        if (one.model, one.prompt) != (other.model, other.prompt) or one.device == other.device:
            continue
        for what in ("prefill", "decode"):
            rows = one.prompt if what == "prefill" else 1
            past = 0 if what == "prefill" else one.prompt
            ours = [step(DEVICES[row.device], row.model, rows, past) for row in (one, other)]
            measured = (one.prefill, other.prefill)
            if what == "decode":
                measured = (1 / one.decode, 1 / other.decode)
            if measured[0] < measured[1]:
                assert ours[0] < ours[1], (one, other, what)
                compared += 1
    assert compared > 60


def test_our_own_model_keeps_that_order_and_comes_near_a_decoder_of_its_size() -> None:
    """StableLM's decoder multiplies about as much as Qwen3-1.7B's, and reads a smaller head."""
    made = {
        name: plan(STABLELM, PlanOptions(name, "int4")).forecasts[0] for name in (AGX, NX, NANO)
    }
    for one, other in ((AGX, NX), (NX, NANO)):
        assert made[one].first_token < made[other].first_token
        assert made[one].tokens_per_second > made[other].tokens_per_second
    near = {row.device: row for row in TABLE if (row.model, row.prompt) == ("1.7B", 292)}
    for name, each in made.items():
        assert each.tokens_per_second == pytest.approx(near[name].decode, rel=0.3)


def test_power_modes_are_devices_and_less_power_is_never_faster() -> None:
    for modes in (
        ("orin-nano-8g-7w", "orin-nano-8g", "orin-nano-8g-25w", "orin-nano-8g-super"),
        ("orin-nx-16g-10w", "orin-nx-16g-15w", "orin-nx-16g", "orin-nx-16g-40w"),
        ("orin-agx-64g-15w", "orin-agx-64g-30w", "orin-agx-64g-50w", "orin-agx-64g"),
    ):
        made = [plan("nano", PlanOptions(name, "int8")).forecasts[0] for name in modes]
        times = [each.first_token for each in made]
        assert times == sorted(times, reverse=True)
        assert [each.token for each in made] == sorted((each.token for each in made), reverse=True)


def test_processors_differ_by_their_instructions() -> None:
    order = ["cpu-avx2", "cpu", "cpu-avx512-vnni", "cpu-amx"]
    made = [plan(STABLELM, PlanOptions(name, "int8")).forecasts[0].prefill for name in order]
    assert made == sorted(made, reverse=True)
    assert made[0] > 2 * made[1]  # without VNNI an int8 product is three instructions
    arm = plan(STABLELM, PlanOptions("cpu-arm-dotprod", "int8")).forecasts[0].prefill
    assert made[1] < arm
    exact = [plan(STABLELM, PlanOptions(name, "fp32")).forecasts[0].prefill for name in order]
    assert exact[0] == exact[1]  # VNNI and AMX multiply integers only


# --- memory and paging, measured on two cores of a Zen 4 (docs/benchmarks.md) ---------------------

GB = 10**9
MEMORY: list[tuple[str, Precision, int, float, float]] = [
    # model, precision, group, share of the experts in memory, peak in GB
    (STABLELM, "int8", 32, 1.0, 4.11),
    (STABLELM, "int8", 32, 0.5, 3.26),
    (STABLELM, "int8", 32, 0.25, 3.0),
    (STABLELM, "int4", 32, 1.0, 3.70),
    (STABLELM, "int4", 32, 0.5, 2.95),
    (STABLELM, "int4", 128, 1.0, 3.0),
    (PHI, "int8", 32, 1.0, 7.7),
]


@pytest.mark.parametrize(("model", "precision", "group", "share", "peak"), MEMORY)
def test_memory_is_what_was_measured(
    model: str, precision: Precision, group: int, share: float, peak: float
) -> None:
    config, cpu = PRESETS[model], DEVICES["cpu"]
    asked = Asked(config, config.vision.image_tokens + 40, 8, group)
    options = PlanOptions("cpu", precision, group)
    (made,) = make_plan(model, asked, cpu, options).forecasts
    away = (1 - share) * made.experts * held_ratio(cpu.kind, precision, asked)
    assert memory_run(asked, cpu.kind, precision) - away == pytest.approx(peak * GB, rel=0.08)


def test_a_device_with_too_little_memory_is_forecast_as_paging_was_measured() -> None:
    """Half of the experts: 1.13 to 1.24 times as long; a quarter: 2.6 to 2.8 times."""
    whole = plan(STABLELM, PlanOptions("cpu", "int8")).forecasts[0]
    for share, least, most in ((0.5, 1.13, 1.24), (0.25, 2.6, 2.8)):
        missing = round((1 - share) * whole.experts)
        small = dataclasses.replace(
            DEVICES["cpu"], memory=whole.memory_run - missing + 2 * GB, reserved=None
        )
        asked = Asked(PRESETS[STABLELM], 576 + 48)
        (paged,) = make_plan("m", asked, small, PlanOptions("cpu", "int8")).forecasts
        assert paged.expert_budget == pytest.approx(share * whole.experts, rel=1e-6)
        for what in ("first_token", "token"):
            ratio = getattr(paged, what) / getattr(whole, what)
            assert least - 1e-6 <= ratio <= most + 1e-6
    assert paging_cost(1.0) == 1
    costs = [paging_cost(share / 100) for share in range(1, 101)]
    assert costs == sorted(costs, reverse=True)


# --- own devices, prompts, and what fits ----------------------------------------------------------

OWN = """
kind = "jetson"
memory_gb = 16
bandwidth_gb_s = 102.4
int8_tops = 30
fp16_tops = 15
title = "our panel"
reserved_gb = 3
[reached]
bandwidth = 0.5
"""


def test_a_device_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "panel.toml").write_text(OWN)
    device = find_device(str(tmp_path / "panel.toml"))
    assert (device.name, device.title, device.usable) == ("panel", "our panel", 13 * GB)
    assert device.reached == dataclasses.replace(REACHED["jetson"], bandwidth=0.5)
    slower = plan("nano", PlanOptions(str(tmp_path / "panel.toml"), "int8")).forecasts[0]
    assert slower.token > plan("nano", PlanOptions(NX, "int8")).forecasts[0].token
    (tmp_path / "panel.json").write_text(
        '{"kind": "cpu", "memory_gb": 8, "bandwidth_gb_s": 50, "int8_tops": 1, "fp16_tops": 0.3}'
    )
    assert find_device(str(tmp_path / "panel.json")).kind == "cpu"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("memory_gb = 16", "memory = 16", "has an unknown key 'memory'"),
        ("memory_gb = 16", "", "lacks the key 'memory_gb'"),
        ("memory_gb = 16", "memory_gb = -1", "memory_gb is -1"),
        ("memory_gb = 16", 'memory_gb = "16"', "memory_gb must be float, not '16'"),
        ("memory_gb = 16", "memory_gb = nan", "memory_gb is nan"),
        ('kind = "jetson"', 'kind = "tpu"', "kind is 'tpu'"),
        ("bandwidth = 0.5", "bandwith = 0.5", "has an unknown key 'bandwith'"),
        ("bandwidth = 0.5", "bandwidth = 0", "bandwidth is 0"),
        ("[reached]", "[reached", "is no valid TOML"),
    ],
)
def test_a_wrong_device_file_names_what_is_wrong(
    old: str, new: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / "panel.toml").write_text(OWN.replace(old, new, 1))
    with pytest.raises(DataError, match=r"panel\.toml") as found:
        find_device(str(tmp_path / "panel.toml"))
    assert what in found.value.what
    assert found.value.remedy


def test_a_key_that_is_there_twice_in_json_is_refused(tmp_path: Path) -> None:
    for name, load in (("panel.JSON", find_device), ("recipe.json", recipe_json)):
        (tmp_path / name).write_text('{"kind": "gpu", "kind": "cpu"}')
        with pytest.raises(DataError, match=name) as found:
            load(str(tmp_path / name))
        assert "'kind' is there twice" in str(found.value)


def test_longer_prompts_and_answers_cost_more() -> None:
    def made(**options: Any) -> Any:
        return plan(STABLELM, PlanOptions("cpu", "int8", **options)).forecasts[0]

    usual, longer = made(), made(prompt_tokens=2048, new_tokens=256)
    assert longer.prefill > 3 * usual.prefill
    assert longer.token > usual.token
    cache = 4 * 2 * 24 * 2048 * (2048 + 256 - 624 - 32)
    assert longer.memory_run - usual.memory_run == cache  # activations: both in parts
    assert longer.vision == usual.vision


def test_fit_takes_the_most_exact_form_that_meets_the_latency() -> None:
    options = PlanOptions("cpu")
    for latency, precision in ((60.0, "fp32"), (10.0, "int8")):
        found = fit(STABLELM, options, latency)
        assert found.error() is None
        assert found.forecast is not None
        assert found.forecast.precision == precision
        assert found.forecast.answer(32) <= latency
    late = fit(STABLELM, options, 6.0)
    assert late.forecast is None
    error = late.error()
    assert error is not None
    assert "does not answer within 6 s on cpu: int8 takes" in error.what
    assert late.image_tokens == 144
    assert "144 image tokens (export --image-tokens)" in error.remedy
    never = fit(STABLELM, options, 1.0)  # the tower and the answer alone take longer
    assert never.image_tokens == 0
    assert "image tokens" not in str(never.error())


@pytest.mark.parametrize(("kind", "precision"), [("gpu", "int8"), ("cpu", "int8"), ("cpu", "int4")])
@pytest.mark.parametrize("missing", [0.2, 0.5, 0.74, 0.76, 0.95, 0.98])  # of the experts' bytes
def test_what_is_planned_paged_is_what_the_runtime_takes(
    kind: Kind, precision: Precision, missing: float, tmp_path: Path
) -> None:
    asked = Asked(PRESETS[STABLELM], 576 + 48)
    number, size, held = 48, *(f(asked, precision) // 48 for f in (experts_bytes, held_experts))
    memory = (memory_run(asked, kind, precision) - round(missing * 48 * held)) / GB
    panel = tmp_path / "panel.json"
    about = dict.fromkeys(("bandwidth_gb_s", "int8_tops", "fp16_tops"), 100)
    panel.write_text(json.dumps({**about, "kind": kind, "memory_gb": memory, "reserved_gb": 0}))
    found = fit(STABLELM, PlanOptions(str(panel), precision), 1e6)
    if found.forecast is None:
        assert missing > (0.75 if kind == "gpu" else 0.93)
        return
    assert found.commands[1].endswith("--target tensorrt-rtx --gpu GPU --paged -o engines") == (
        kind == "gpu"
    )
    budget = budget_bytes(found.commands[-1].rpartition(" ")[2], number * held)
    if kind == "gpu":
        resident = slot_count(budget, size, number, least=12)
    else:
        resident = (budget - COPIES * size) // held
    assert resident >= 1
    assert resident == pytest.approx(found.resident_experts, abs=1)


@pytest.mark.parametrize(
    ("device", "gpu"), [("orin-nano-8g", "orin-nano-8g"), ("orin-nano-8g-7w", "orin")]
)
def test_on_a_jetson_no_experts_are_paged(device: str, gpu: str) -> None:
    """No target of its GPU does; and an engine is built for a GPU that is named."""
    (whole,) = plan("med-moe-phi2-2.7b", PlanOptions(device, "fp16")).forecasts
    assert (whole.fits, whole.expert_budget) == (False, 0)
    assert whole.short == whole.memory_run - DEVICES[device].usable
    found = fit(STABLELM, PlanOptions(device), 1e6)
    built = f"medmoe-edge export portable --target tensorrt --gpu {gpu} -o engines"
    assert found.commands[1] == built


@pytest.mark.parametrize(
    ("form", "device", "precision", "options"),
    [
        ("delta:bits=2", "cpu-avx2", None, "--fp32 --experts delta:bits=2"),
        ("delta:auto=3", "cpu-avx2", None, "--fp32 --experts delta:auto=3 --calibrate DATA"),
        ("delta:rank=2", "cpu", "int8", "--int8 --experts delta:rank=2 --calibrate DATA"),
    ],
)
def test_fit_makes_the_deltas_that_it_forecast(
    form: str, device: str, precision: Precision | None, options: str
) -> None:
    found = fit("nano", PlanOptions(device, precision, experts=form), 1e6)
    assert found.commands[0] == f"medmoe-edge export nano {options} -o portable"


def test_precisions_that_deltas_do_not_go_with_are_not_planned() -> None:
    for rank, groups, precisions in (
        (128, (32, 128), {"fp32", "int8", "int4"}),
        (32, (32,), {"fp32", "int8", "int4"}),
        (5, (), {"fp32", "int8"}),
    ):
        options = PlanOptions("cpu", experts=f"delta:rank={rank}")
        assert {each.precision for each in plan(STABLELM, options).forecasts} == precisions
        tried = [each for each in _forecasts(STABLELM, options) if each.precision == "int4"]
        assert tuple(each.group for each in tried) == groups
    with pytest.raises(InputError, match="not planned in mixed with delta"):
        plan(STABLELM, PlanOptions("cpu", "mixed", experts="delta"))
