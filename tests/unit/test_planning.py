"""Plans: what is counted, what follows for memory and time, and what stands behind `here`."""

import ctypes
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from medmoe_edge.bundle import machine
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.calibration.quantisers import read_deltas
from medmoe_edge.device import hardware
from medmoe_edge.device.estimate import (
    Plan,
    PlanOptions,
    fit,
    make_plan,
    plan,
    plan_and_measure,
    precisions,
)
from medmoe_edge.device.hardware import (
    DEVICES,
    GB,
    Device,
    Ratings,
    find_device,
    nominal_speeds,
)
from medmoe_edge.device.measure import (
    Microbenchmarks,
    Sizes,
    compare,
    measure_speeds,
    resized,
    solve,
    toy_runtime,
)
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import InputError, ModelError, ResourceError
from medmoe_edge.evaluation.inspection import activated_parameters
from medmoe_edge.models.med_moe import ClipTower, Conv, EfficientNetLite, MedMoE
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.costs import (
    CONVOLUTIONS,
    Asked,
    Deltas,
    Precision,
    Speed,
    bits_per_weight,
    cache_values,
    decoder_parts,
    held_ratio,
    prompt_tokens,
    step_seconds,
    step_work,
    vision_bytes,
    vision_operations,
    vision_seconds,
    vision_weights,
)

Make = Callable[..., Path]
NOTHING = Speed(0, 0, 0)
PRECISIONS: tuple[Precision, Precision] = ("fp32", "int8")
STABLELM, PHI = PRESETS["med-moe-stablelm-1.6b"], PRESETS["med-moe-phi2-2.7b"]
NANO = PRESETS["nano"]


def planned(config: Any, device: Device, precision: Precision | None = None) -> Plan:
    """The forecasts of a model "m"."""
    return make_plan("m", usual(config), device, PlanOptions(device.name, precision))


def usual(config: Any) -> Asked:
    """As an export stores it."""
    return Asked(config, prompt_tokens(config))


FLAT = Device("flat", "a flat one", "gpu", 10**10, Ratings(1e12, 2e14, 1e14, "made up"))


# --- counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi", "nano"])
def test_parts_hold_every_parameter_once(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = MedMoE(config)
    parts = decoder_parts(config)
    counted = sum(part.weights for part in parts.values())
    assert counted == sum(p.numel() for p in model.decoder.parameters())
    experts = sum(p.numel() for name, p in model.decoder.named_parameters() if ".experts." in name)
    assert parts["experts"].weights == experts


def test_the_published_counts_of_activated_parameters() -> None:
    """The paper's 3.6B and 2.0B, of which the embedding, biases and norms multiply nothing."""
    for config, published in ((PHI, 3.6e9), (STABLELM, 2.0e9)):
        active = sum(part.active for part in decoder_parts(config).values())
        table = config.decoder.vocab_size * config.decoder.hidden_size
        assert active + table == pytest.approx(activated_parameters(config), rel=1e-3)
        tower = vision_weights(config)
        assert active + table + tower == pytest.approx(published + 0.31e9, rel=0.1)


@pytest.mark.parametrize(("preset", "top_k"), [("tiny", 1), ("tiny", 2), ("tiny-phi", 1)])
def test_operations_against_torch(preset: str, top_k: int) -> None:
    base = PRESETS[preset]
    assert base.moe is not None
    config = dataclasses.replace(base, moe=dataclasses.replace(base.moe, top_k=top_k))
    torch.manual_seed(0)
    model = MedMoE(config).eval()
    rows = 24
    inputs = torch.randn(1, rows, config.decoder.hidden_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    work = step_work(config, rows, 0)
    head = work.operations["head"]
    # torch does not count its fused attention on a CPU
    assert counter.get_total_flops() == sum(work.operations.values()) - head


def test_operations_of_the_towers_against_torch() -> None:
    tiny = PRESETS["tiny"]
    projector = 2 * tiny.vision.image_tokens * (16 * 64 + 64 * 64)
    side = tiny.vision.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ClipTower(tiny.vision).eval()(torch.zeros(1, 3, side, side))
    attention = 2 * 2 * tiny.vision.feature_size * (tiny.vision.image_tokens + 1) ** 2
    # torch does not count its fused attention on a CPU
    assert counter.get_total_flops() == vision_operations(tiny) - projector - attention


@pytest.mark.parametrize("variant", CONVOLUTIONS)
def test_convolutions_are_counted_right(variant: str) -> None:
    features = {"lite2": 832}.get(variant, 768)
    config = dataclasses.replace(NANO.vision, variant=variant, feature_size=features, image_size=64)
    tower = EfficientNetLite(config)
    per_pixel, parameters = CONVOLUTIONS[variant]
    held = sum(p.numel() for p in tower.parameters()) - tower.position_embedding.numel()
    assert held == parameters
    counted = 0

    def count(module: Conv, _: object, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel() * module.weight[0].numel()

    for module in tower.modules():
        if isinstance(module, Conv):
            module.register_forward_hook(count)
    with torch.no_grad():
        tower(torch.zeros(1, 3, 64, 64))
    assert counted / 64**2 == pytest.approx(per_pixel, rel=1e-4)


def test_bytes_against_the_embedded_bundle() -> None:
    bundle = Bundle.open(bundle_path("nano"), verify=False)
    files = bundle.manifest["files"]
    made = planned(bundle.config, FLAT, "int8").forecasts[0]
    assert made.weights == pytest.approx(files["decoder.data"]["bytes"], rel=0.03)
    owned = sum(size for name, (_, size) in bundle.manifest["experts"].items() if "experts" in name)
    assert made.experts == pytest.approx(owned, rel=0.02)
    stored = files["vision.data"]["bytes"]
    assert 2 * vision_weights(bundle.config) == pytest.approx(stored, rel=0.02)


def test_a_quantised_transformer_tower_weighs_less_on_a_cpu() -> None:
    in_fp32, in_8_bits = (vision_bytes(STABLELM, name, 4) for name in PRECISIONS)
    unread = 4 * 1024**2 + 2 * 1024 * 4096  # the 24th layer
    assert in_fp32 == 4 * (vision_weights(STABLELM) - unread)
    assert in_fp32 == 2 * vision_bytes(STABLELM, "int8", 2)
    assert in_8_bits / in_fp32 == pytest.approx(9 / 32, abs=0.01)
    assert vision_bytes(NANO, "int8", 4) == 4 * vision_weights(NANO)  # convolutions stay floats
    board = next(device for device in DEVICES.values() if device.kind == "cpu")
    exact, quantised = (planned(STABLELM, board, name).forecasts[0] for name in PRECISIONS)
    assert quantised.vision < exact.vision


def test_experts_are_read_once_however_many_tokens_choose_them() -> None:
    experts = decoder_parts(STABLELM)["experts"]
    one = experts.weights / 4
    assert [experts.touched(rows) / one for rows in (1, 2, 4, 600)] == [1, 2, 4, 4]
    assert step_work(STABLELM, 1, 600).operations["experts"] == 2 * one
    assert step_work(STABLELM, 600, 0).operations["experts"] == 600 * 2 * one
    dense = dataclasses.replace(STABLELM, moe=None)
    assert "experts" not in decoder_parts(dense)


@given(rows=st.integers(1, 300), past=st.integers(0, 300))
def test_steps_one_by_one_attend_as_much_as_one_step(rows: int, past: int) -> None:
    whole = step_work(NANO, rows, past)
    singles = [step_work(NANO, 1, past + row) for row in range(rows)]
    assert whole.attention == sum(step.attention for step in singles)
    assert whole.cache == singles[-1].cache == cache_values(NANO, past + rows)


# --- the roofline ---------------------------------------------------------------------------------


def test_a_step_takes_what_its_parts_take() -> None:
    work = step_work(NANO, 100, 0)
    weights = {kind: n * bits_per_weight(kind, "int8") / 8 for kind, n in work.weights.items()}

    def seconds(**costs: Any) -> float:
        return step_seconds(NANO, "int8", dataclasses.replace(NOTHING, **costs), 100, 0)

    assert seconds(operation=1.0) == sum(work.operations.values())
    assert seconds(byte=1.0) == pytest.approx(sum(weights.values()) + 4 * work.cache)
    both = seconds(byte=1.0, operation=1.0)
    longer = sum(max(weights[kind], work.operations[kind]) for kind in weights)
    assert both == pytest.approx(longer + 4 * work.cache)
    assert seconds(attention=1.0) == work.attention
    assert seconds(value=1.0) == work.values
    assert (seconds(step=1.0), seconds(dense=1.0), seconds(moe=1.0)) == (1, 3, 3)
    assert NANO.moe is not None
    beside = NANO.moe.num_experts - 1
    assert seconds(expert=1.0) == 3 * beside  # in three layers, beside the one of a decode step
    assert step_seconds(NANO, "int8", Speed(0, 0, 0, expert=1.0), 1, 0) == 0


def test_a_forecast_by_hand() -> None:
    made = planned(STABLELM, FLAT, "int4").forecasts[0]
    # 12 layers with 1 of 4 experts and the meta expert, 12 dense: 36 feed-forwards, 24 attentions
    matrices = 36 * 3 * 2048 * 5632 + 24 * 4 * 2048**2
    head = 2048 * 100352
    read = matrices * 4.5 / 8 + head + 2 * 2 * 24 * 2048 * (624 + 16)  # and the cache, in fp16
    assert made.token == pytest.approx(read / 0.75e12 + 36 * 30e-6, rel=0.03)
    every = matrices + 12 * 3 * 3 * 2048 * 5632  # of a prefill's tokens some choose each expert
    read = every * 4.5 / 8 + head + 2 * 2 * 24 * 2048 * 624
    computed = 2 * 624 * matrices / 0.5e14
    assert made.prefill == pytest.approx(read / 0.75e12 + computed + 36 * 30e-6, rel=0.03)
    assert made.first_token == made.vision + made.prefill
    assert made.tokens_per_second == 1 / made.token


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("config", [NANO, STABLELM, PHI], ids=["nano", "stablelm", "phi"])
def test_what_fits_adds_up(name: str, config: Any) -> None:
    device = DEVICES[name]
    for each in planned(config, device).forecasts:
        asked = Asked(config, 100, group=each.group)
        experts = each.experts * held_ratio(device.kind, each.precision, asked)
        pinned = each.memory_run - experts
        if each.expert_budget is None:
            assert each.memory_run <= device.usable
        elif each.fits:
            resident = each.expert_budget * held_ratio(device.kind, each.precision, asked)
            assert pinned + resident == pytest.approx(device.usable, abs=10)
            assert 0 < each.expert_budget < each.experts
            assert each.paging_cost > 1
        else:
            assert each.short > 0
            assert each.expert_budget == 0
            assert pinned < device.usable + each.short <= each.memory_run
            assert each.paging_cost == 1
        assert all(math.isfinite(value) and value > 0 for value in (each.token, each.first_token))


def test_fewer_bits_need_less_memory_and_time() -> None:
    for device in (DEVICES["orin-nano-8g"], DEVICES["rtx-4090"]):
        found = {each.precision: each for each in planned(PHI, device).forecasts}
        order = [found[name] for name in ("int4", "mixed", "int8", "fp16")]
        assert [f.token for f in order] == sorted(f.token for f in order)
        assert [f.memory_run for f in order] == sorted(f.memory_run for f in order)


@pytest.mark.parametrize(
    ("form", "bits", "held"),
    [("delta:bits=2", 2.5, 5), ("delta:auto=3", 3, 5.5), ("delta:rank=256", 1.364, 1.364)],
)
def test_deltas_take_less_memory_and_move_less(form: str, bits: float, held: float) -> None:
    cpu = dataclasses.replace(FLAT, kind="cpu", memory=64 * 10**9)
    whole, deltas = (
        make_plan(
            *("m", usual(STABLELM), cpu), PlanOptions(cpu.name, precision="int8", experts=experts)
        ).forecasts[0]
        for experts in (None, form)
    )
    weights = 12 * 4 * 3 * 2048 * 5632
    assert whole.experts == pytest.approx(weights, rel=0.01)
    assert deltas.experts == pytest.approx(weights * bits / 8, rel=0.02)
    assert whole.weights - deltas.weights == whole.experts - deltas.experts
    assert whole.memory_run - deltas.memory_run == pytest.approx(weights * (8 - held) / 8, rel=0.02)
    assert whole.switch_bytes == whole.experts // 4
    assert deltas.switch_bytes <= whole.switch_bytes / 2.6
    assert deltas.token < whole.token
    assert (deltas.prefill < 0.95 * whole.prefill) == ("rank" in form)


def test_deltas_are_planned_of_what_has_some() -> None:
    nothing = Asked(NANO, 100, deltas=Deltas(0, 0))
    assert held_ratio("cpu", "int8", nothing) == 1
    dense = dataclasses.replace(NANO, moe=None)
    cpu = dataclasses.replace(FLAT, kind="cpu")
    with pytest.raises(InputError, match="models with a meta expert"):
        make_plan("m", usual(dense), cpu, PlanOptions("flat", experts="delta:bits=2"))


@pytest.mark.parametrize(
    ("form", "bits", "share"),
    [
        ("delta", 8, 1),
        ("delta:bits=2", 4.5, 1),
        ("delta:bits=4", 4.5, 1),
        ("delta:auto=3", 4.5, 1),
        ("delta:rank=256", 1.364, 256 * (2048 + 5632) / (2048 * 5632)),
    ],
)
def test_on_gpus_each_delta_runs_on_every_token(form: str, bits: float, share: float) -> None:
    """2 bits are stored in 4 there, and deltas are not paged."""
    options = PlanOptions("flat", "int8", experts=form)
    (whole,) = make_plan("m", usual(STABLELM), FLAT, PlanOptions("flat", "int8")).forecasts
    (made,) = make_plan("m", usual(STABLELM), FLAT, options).forecasts
    layer, layers = 3 * 2048 * 5632, 12
    assert made.experts == pytest.approx(4 * layers * layer * bits / 8, rel=0.02)
    assert made.memory_run - whole.memory_run == made.weights - whole.weights
    # of whole experts the chosen one is read and computed, of deltas all four
    read = layers * layer * (4 * bits - 8) / 8
    computed = layers * 2 * layer * (4 * share - 1)
    rated = FLAT.ratings
    assert rated is not None
    seconds = read / (0.75 * rated.bandwidth) + computed / (0.5 * rated.fp16)
    assert made.token - whole.token == pytest.approx(seconds, rel=0.05)
    small = dataclasses.replace(FLAT, memory=made.memory_run)
    (lacking,) = make_plan("m", usual(STABLELM), small, options).forecasts
    assert (lacking.fits, lacking.expert_budget) == (False, 0)


def test_what_lies_in_the_graph_is_not_paged() -> None:
    """Neither deltas so small that they do, nor the feed-forwards that experts were merged into."""
    small = dataclasses.replace(FLAT, name="small", kind="cpu", memory=5 * 10**9)
    stored, options = usual(STABLELM), PlanOptions("small", "int8")
    paged, resident = (
        make_plan("m", dataclasses.replace(stored, deltas=deltas), small, options).forecasts[0]
        for deltas in (Deltas(8, 8), Deltas(8, 8, paged=False))
    )
    assert paged.fits
    assert 0 < (paged.expert_budget or 0) < paged.experts
    assert (resident.fits, resident.expert_budget) == (False, 0)
    assert resident.short == resident.memory_run - small.usable


@pytest.mark.parametrize("form", ["delta", "delta:bits=2", "delta:rank=8", "delta:auto=4"])
def test_forms_too_small_for_a_file_are_not_planned_as_paged(form: str) -> None:
    decoder = dataclasses.replace(
        NANO.decoder, hidden_size=16, heads=2, intermediate_size=32, rotary_fraction=1.0
    )
    small = dataclasses.replace(NANO, decoder=decoder)
    found = [Deltas.of(read_deltas(form), each, "int8", 32).paged for each in (NANO, small)]
    assert found == [True, False]


def test_a_tower_with_a_scale_per_token_is_forecast_where_there_is_one() -> None:
    cpu = DEVICES["cpu"]
    by_tokens = PlanOptions("cpu", vision="tokens")
    made, in_groups = (
        make_plan("m", usual(STABLELM), cpu, options) for options in (by_tokens, PlanOptions("cpu"))
    )
    assert [each.precision for each in made.forecasts] == ["int8", "int4", "mixed"]
    for ours, theirs in zip(made.forecasts, in_groups.forecasts, strict=False):
        assert ours.vision == pytest.approx(0.44 * theirs.vision)
        saved = 23 * (4 * 1024**2 + 2 * 1024 * 4096) // 8  # a bit a weight, the groups' scales
        assert theirs.memory_run - ours.memory_run == pytest.approx(saved, abs=2)
        assert (ours.prefill, ours.token) == (theirs.prefill, theirs.token)
    for config, device in ((NANO, cpu), (STABLELM, FLAT)):
        with pytest.raises(InputError, match="a vision transformer in 8 bits, on a CPU"):
            make_plan("m", usual(config), device, by_tokens)
    with pytest.raises(InputError, match="cpu is not planned in fp32 with a scale per token"):
        make_plan("m", usual(STABLELM), cpu, dataclasses.replace(by_tokens, precision="fp32"))
    command = fit("med-moe-stablelm-1.6b", by_tokens, 60.0).commands[0]
    assert " --int8 --vision tokens --calibrate DATA " in command


def test_a_model_too_large_says_by_how_much_and_what_would_do() -> None:
    small = dataclasses.replace(FLAT, name="small", memory=10**9)
    made = planned(PHI, small)
    error = made.error()
    assert error is not None
    missing = min(each.short for each in made.forecasts) / 1e9
    assert f"small: even in int4 and paged where it can be, it lacks {missing:.2f}" in str(error)
    assert error.remedy.startswith("It would fit orin-nano-8g, or any with ")
    assert planned(PHI, dataclasses.replace(FLAT, memory=10**10)).error() is None
    dense = planned(dataclasses.replace(PHI, moe=None), small).forecasts
    assert all(each.short == each.memory_run - small.usable for each in dense)


def test_precisions_of_a_device() -> None:
    assert precisions(DEVICES["cpu"], PlanOptions("cpu")) == ("int8", "int4", "mixed", "fp32")
    assert precisions(DEVICES["thor"], PlanOptions("thor", "fp16")) == ("fp16",)
    with pytest.raises(InputError, match="cpu is not planned in fp16"):
        precisions(DEVICES["cpu"], PlanOptions("cpu", "fp16"))
    assert set(nominal_speeds(DEVICES["cpu"])) >= {"fp32", "int8"}
    for name in ("fp32", "fp16", "int8", "int4", "mixed"):
        assert 4 < bits_per_weight("experts", name) <= 32


def test_devices(tmp_path: Path) -> None:
    assert all(name == device.name for name, device in DEVICES.items())
    with pytest.raises(InputError, match=r"Use one of: orin-nano-8g, .*, here; or a file"):
        find_device("orin")
    assert find_device("here").ratings is None
    (tmp_path / "info").write_text("processor : 0\nmodel name\t: A: B\nmodel name : C\n")
    assert machine.cpu_name(tmp_path / "info") == "A: B"
    assert machine.cpu_name(tmp_path / "none")


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/\n", "memory.max"),
        (None, "memory.max"),  # /proc does not tell
        ("odd\n\n0::/a/b\n", "a/memory.high"),  # of a service
        ("4:memory:/docker/0123\n0::/\n", "memory/memory.limit_in_bytes"),  # version 1
    ],
)
def test_memory_of_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str | None, file: str
) -> None:
    limit = tmp_path / "sys/fs/cgroup" / file
    for path, text in ((limit, "1000000000\n"), (tmp_path / "proc/self/cgroup", membership)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
    assert machine.memory_here(tmp_path) == 10**9
    monkeypatch.setattr(hardware, "memory_here", lambda: machine.memory_here(tmp_path))
    for whole, usable in ((64 * GB, GB), (2 * GB, 0)):
        monkeypatch.setattr(hardware, "machine_memory", lambda whole=whole: whole)
        assert find_device("here").usable == usable
    limit.write_text("max\n")
    assert machine.memory_here(tmp_path) == machine.machine_memory() > 10**8


@pytest.mark.parametrize("fails", [False, True])
def test_memory_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    class Kernel32:
        """Fills MEMORYSTATUSEX by the offsets of its documentation."""

        def __init__(self, _name: str) -> None: ...

        def GlobalMemoryStatusEx(self, status: Any) -> bool:
            whole = memoryview(status._obj).cast("B")
            assert int.from_bytes(whole[:4], "little") == len(whole) == 64
            whole[8:16] = (34 * 10**9).to_bytes(8, "little")
            return not fails

    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(ctypes, "CDLL", Kernel32)
    if fails:
        with pytest.raises(ResourceError):
            machine.memory_here(tmp_path)
    else:
        assert machine.memory_here(tmp_path) == 34 * 10**9


def test_a_siglip_tower_is_forecast_as_the_matrix_products_it_is() -> None:
    tiny = PRESETS["tiny"]
    speed = Speed(0.0, 1e-12, 0.0)
    as_clip = vision_seconds(tiny, "fp32", 4, speed)
    siglip = dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, kind="siglip"))
    same = vision_operations(siglip) / vision_operations(tiny)  # it has one image token less
    assert vision_seconds(siglip, "fp32", 4, speed) == pytest.approx(as_clip * same)
    lite = PRESETS["nano"]
    assert not lite.vision.is_transformer
    per_operation = vision_seconds(lite, "fp32", 4, speed) / vision_operations(lite)
    assert per_operation == pytest.approx(2 * as_clip / vision_operations(tiny))


def test_models_by_name(tiny_checkpoint: Make, tiny_bundle: Make) -> None:
    assert plan("nano", PlanOptions("thor")).model == "nano"
    assert plan("med-moe-phi2-2.7b", PlanOptions("thor")).prompt_tokens == 576 + 48
    for folder in (tiny_checkpoint(), tiny_bundle("int8")):
        made = plan(str(folder), PlanOptions("cpu", "int8"))
        assert [each.precision for each in made.forecasts] == ["int8"]
        assert made.to_json()["forecasts"][0]["fits"] is True
    with pytest.raises(InputError, match="is a bundle: its experts, image tokens"):
        plan(str(tiny_bundle("int8")), PlanOptions("cpu", experts="delta:bits=2"))
    with pytest.raises(ModelError, match=r"med-moe-stablelm-1\.6b"):
        plan("none", PlanOptions("cpu"))
    with pytest.raises(InputError, match="is no bundle"):
        plan_and_measure(str(tiny_checkpoint()))


# --- this machine ---------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_coefficients_are_found_again(wanted: list[float], seed: int) -> None:
    rows = np.random.default_rng(seed).uniform(0.1, 1, (3, 3)) + 3 * np.eye(3)
    rows *= [1.0, 1e6, 1e9]  # of unlike size, as bytes and layers are
    found = solve(rows.tolist(), (rows @ np.array(wanted)).tolist())
    assert found == pytest.approx(wanted, rel=1e-4)


def test_no_coefficient_is_negative() -> None:
    assert solve([(1.0, 1.0), (1.0, 3.0)], [2.0, 1.0]) == pytest.approx((1.2, 0.0))


SMALL = Sizes(narrow=32, wide=64, rows=4, more_rows=8, streamed=2**16, rest=0.0, slot=0.0)


@pytest.mark.parametrize(
    ("precision", "kernel"),
    [("int8", b"DynamicQuantizeMatMul"), ("int4", b"MatMulNBits"), ("fp32", b"MatMul")],
)
@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_toys_run_the_kernels_of_their_precision(
    precision: Precision, kernel: bytes, preset: str, tmp_path: Path
) -> None:
    config = resized(PRESETS[preset], 100, 2, experts=True)
    assert (config.decoder.hidden_size, config.decoder.layers, config.moe_layers) == (96, 2, (0, 1))
    runtime = toy_runtime(config, precision, tmp_path)
    step = runtime.step(np.ones((3, 96), np.float32), runtime.new_cache(3))
    assert step.router_logits.shape == (3, 2, 4)
    assert np.isfinite(step.logits).all()
    graph = (tmp_path / "decoder.onnx").read_bytes()
    assert kernel in graph
    assert (b"MatMulNBits" in graph) == (precision == "int4")


def test_toys_hold_no_tensor_twice(tmp_path: Path) -> None:
    config = resized(PRESETS["tiny"], 64, 2, experts=False)
    toy_runtime(config, "int8", tmp_path)
    data = (tmp_path / "decoder.data").read_bytes()
    blocks = [data[start : start + 4096] for start in range(0, len(data) - 4096, 4096)]
    assert len(set(blocks)) == len(blocks)


def test_every_precision_of_this_machine_is_measured() -> None:
    config = PRESETS["tiny"]
    speeds = measure_speeds(config, ["int4", "mixed"], 0, SMALL)
    assert speeds["mixed"] == speeds["int4"]
    for speed in speeds.values():
        assert min(dataclasses.astuple(speed)) >= 0
        assert step_seconds(config, "int4", speed, 8, 0) > 0
    dense = dataclasses.replace(config, moe=None)
    assert measure_speeds(dense, ["fp32"], 0, SMALL)["fp32"].moe == 0


def test_the_model_explains_times_that_follow_it() -> None:
    """Times made with known coefficients give these coefficients back."""
    known = Speed(2e-11, 1e-12, 6e-12, 1e-9, 5e-5, 4e-5, 8e-5, 1e-5)
    bench = Microbenchmarks(NANO, "int8")
    asked = [*bench.tokens, *bench.prefills, *bench.experts]
    bench.times = {(toy, rows): step_seconds(toy, "int8", known, rows, 0) for toy, rows in asked}
    found = bench.speed()
    for rows, past in ((1, 128), (112, 0), (624, 0)):
        for config in (NANO, STABLELM):
            wanted = step_seconds(config, "int8", known, rows, past)
            assert step_seconds(config, "int8", found, rows, past) == pytest.approx(wanted, rel=0.1)


def test_predictions_stand_beside_measurements(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    comparison, speed = compare(bundle, seconds=0, rounds=1, sizes=SMALL)
    assert set(comparison.ratios) == {"prefill", "token"}
    wanted = step_seconds(bundle.config, "int8", speed, comparison.prompt_tokens, 0)
    assert comparison.predicted["prefill"] == wanted
    assert all(seconds > 0 for seconds in comparison.measured.values())
    told = comparison.to_json()
    assert told["ratios"]["token"] == told["predicted"]["token"] / told["measured"]["token"]
