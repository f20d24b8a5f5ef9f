"""Experts as what they add to the meta expert: the same numbers, and less of them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run, two_lines
from graphs import (
    changed,
    moe_config,
    moe_layer,
    moe_model,
    normal,
    observed,
    op_types,
    random_tokens,
    run_ort,
)
from mutants import write_weights
from test_ort_paged import steps

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.recorded import stored_weights
from medmoe_edge.calibration.quantisers import (
    DeltaForm,
    read_deltas,
)
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint
from medmoe_edge.config import Precision
from medmoe_edge.device.estimate import PlanOptions, make_plan, plan
from medmoe_edge.device.hardware import DEVICES
from medmoe_edge.engine.loading import choose_memory
from medmoe_edge.errors import BundleError, InputError
from medmoe_edge.evaluation.gates import compare_weights
from medmoe_edge.evaluation.inspection import inspect_model
from medmoe_edge.evaluation.mutations import Mutation, mutated_weights, mutations_of
from medmoe_edge.export import build, builder
from medmoe_edge.export.decoder import MoESpec, meta_name
from medmoe_edge.export.passes.ort_cpu import lower_deltas
from medmoe_edge.export.weights import low_rank
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.costs import (
    Asked,
    Deltas,
    decoder_parts,
    experts_bytes,
    held_experts,
)
from medmoe_edge.runtimes.ort.paged import SESSION, OrtExpertStore, PagedOrtRuntime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.paging.pager import ExpertPager
from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime
from medmoe_edge.runtimes.torch.paged import PagedTorchRuntime


def alike(form: DeltaForm) -> Callable[[str], DeltaForm]:
    """All deltas in one form."""
    return lambda _: form


STRUCTURES: list[tuple[str, dict[str, Any]]] = [
    (kind, {"top_k": top_k, "use_residual": residual, "router_bias": residual})
    for kind in ("stablelm", "phi")
    for top_k in (1, 2)
    for residual in (False, True)
]


def layer(kind: str, options: dict[str, Any], **sizes: int) -> Any:
    """A layer whose experts are near its meta expert, as up-cycled ones are, and its graph."""
    config = moe_config(kind, **sizes, **options)
    moe = moe_layer(config)
    with torch.no_grad():
        assert moe.meta is not None
        meta = dict(moe.meta.named_parameters())
        for expert in moe.experts:
            for name, parameter in expert.named_parameters():
                parameter.copy_(meta[name] + 0.2 * parameter)
        scale = (16 / config.decoder.hidden_size) ** 0.5  # so that outputs stay of one size
        for parameter in moe.parameters():
            parameter.mul_(scale)
    return config, moe


@pytest.mark.parametrize(("kind", "options"), STRUCTURES)
def test_deltas_equal_the_op(kind: str, options: dict[str, Any]) -> None:
    config, moe = layer(kind, options)
    spec = MoESpec.of(config)
    lowered, modified = lower_deltas(moe_model(moe, config), spec, alike(DeltaForm()))
    assert modified
    assert op_types(lowered)["If"] == 4
    assert not any(name.endswith("experts.0.gate.weight") for name in lowered.graph.initializers)
    for batch, length in ((2, 9), (1, 1), (1, 2)):
        x = random_tokens(batch, length, 16)
        expected = run_ort(moe_model(moe, config), x=x)
        np.testing.assert_allclose(run_ort(lowered, x=x), expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            np.testing.assert_allclose(
                run_ort(lowered, x=x), moe(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("top_k", [1, 2])
def test_every_token_of_a_prompt_has_its_own_experts(top_k: int) -> None:
    config, moe = layer("stablelm", {"top_k": top_k})
    x = random_tokens(1, 40, 16)
    chosen = moe.router(torch.from_numpy(x)).topk(top_k).indices
    assert len(chosen.unique()) == 4  # in one prompt
    lowered, _ = lower_deltas(moe_model(moe, config), MoESpec.of(config), alike(DeltaForm()))
    expected = run_ort(moe_model(moe, config), x=x)
    np.testing.assert_allclose(run_ort(lowered, x=x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top_k", "residual"), [(1, False), (2, True)])
def test_deltas_equal_the_op_at_full_width(top_k: int, residual: bool) -> None:
    """StableLM-2-1.6B's; relative to the size of the outputs."""
    options = {"top_k": top_k, "use_residual": residual, "num_experts": 2}
    config, moe = layer("stablelm", options, size=2048, hidden=5632)
    x = random_tokens(1, 5, 2048)
    with torch.no_grad():
        expected = moe(torch.from_numpy(x)).numpy()
    lowered, _ = lower_deltas(moe_model(moe, config), MoESpec.of(config), alike(DeltaForm()))
    found = run_ort(lowered, x=x)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_rank_that_the_deltas_have_loses_nothing() -> None:
    config, moe = layer("stablelm", {"top_k": 2})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for expert in moe.experts:
            for name, parameter in expert.named_parameters():
                rows, columns = parameter.shape
                narrow = torch.randn(rows, 3, generator=generator)
                added = narrow @ torch.randn(3, columns, generator=generator)
                parameter.copy_(moe.meta.get_parameter(name) + 0.05 * added)
    x = random_tokens(1, 12, 16)
    expected = run_ort(moe_model(moe, config), x=x)
    for rank, exact in ((3, True), (2, False), (16, True)):
        lowered, _ = lower_deltas(
            moe_model(moe, config), MoESpec.of(config), alike(DeltaForm(rank=rank))
        )
        error = np.abs(run_ort(lowered, x=x) - expected).max() / np.abs(expected).max()
        assert bool(error < 1e-5) is exact


def test_the_nearest_matrix_of_a_rank_is_that_of_the_singular_values() -> None:
    generator = np.random.default_rng(0)
    for shape in ((24, 40), (40, 24)):
        matrix = generator.standard_normal(shape).astype(np.float32)
        u, s, v = np.linalg.svd(matrix)
        a, b = low_rank(matrix, 5, None)
        np.testing.assert_allclose(a @ b, (u[:, :5] * s[:5]) @ v[:5], atol=1e-4)
        importance = generator.uniform(0.1, 30, shape[0]).astype(np.float32)
        weighed = low_rank(matrix, 5, importance)
        loss = [
            float((importance[:, None] * (matrix - first @ second) ** 2).sum())
            for first, second in (weighed, (a, b))
        ]
        assert loss[0] < 0.95 * loss[1]


# --- bundles ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Exports a tiny checkpoint in a precision, its experts in some form."""

    def make(
        precision: Any,
        experts: str | None,
        preset: str = "tiny",
        statistics: Statistics | None = None,
        **moe: Any,
    ) -> Path:
        out = tmp_path_factory.mktemp("bundles") / "bundle"
        return export(tiny_checkpoint(preset, **moe), out, precision, experts, statistics)

    return make


def export(
    checkpoint: Path,
    out: Path,
    precision: Any,
    experts: str | None,
    statistics: Statistics | None = None,
) -> Path:
    """A bundle with its experts in some form."""
    deltas = None if experts is None else read_deltas(experts)
    options = build.BuildOptions(precision, name="tiny", deltas=deltas)
    return build.export_bundle(checkpoint, out, options, statistics=statistics)


def logits(folder: Path) -> Any:
    return prefill(OrtRuntime(Bundle.open(folder)))


def prefill(runtime: Runtime) -> tuple[Floats, Floats]:
    """Logits, and those of the routers."""
    step = runtime.step(normal(12, 64), runtime.new_cache(12))
    return step.logits, step.router_logits


@pytest.mark.parametrize(
    ("preset", "moe"),
    [("tiny", {"top_k": 1}), ("tiny-phi", {"top_k": 2, "use_residual": True})],
)
def test_a_bundle_of_deltas_answers_as_one_of_whole_experts(
    bundles: Callable[..., Path], preset: str, moe: dict[str, Any]
) -> None:
    expected = logits(bundles("fp32", None, preset, **moe))
    found = logits(bundles("fp32", "delta", preset, **moe))
    for own, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("precision", "experts", "told", "bits"),
    [
        ("int8", "delta", "deltas from the meta expert", {8}),
        ("int8", "delta:bits=2", "deltas from the meta expert, 2 bits in groups of 32", {2}),
        ("int4", "delta:rank=32", "deltas from the meta expert, rank 32", {4}),
        ("fp32", "delta:bits=4", "deltas from the meta expert, 4 bits in groups of 32", {4}),
    ],
)
def test_a_bundle_says_how_its_experts_are_stored(
    bundles: Callable[..., Path], precision: str, experts: str, told: str, bits: set[int]
) -> None:
    folder = bundles(precision, experts)
    bundle = Bundle.open(folder)
    stored = bundle.manifest["quantisation"]
    assert stored["experts"] == told
    deltas = [matrix for matrix in stored["matrices"] if ".delta" in matrix["name"]]
    assert {matrix["bits"] for matrix in deltas} == bits
    assert len(deltas) == 2 * 4 * 3 * (2 if "rank" in experts else 1)
    assert np.isfinite(logits(folder)[0]).all()
    weights = compare_weights(bundle)
    assert weights is not None
    assert weights.wrong == ()
    held = {name: np.array(array) for name, array in stored_weights(folder / "decoder.onnx")}
    owner = "decoder.layers.0.ffn.experts.1"
    damage = mutated_weights(held, Mutation("exchange", owner, f"{owner[:-1]}2"))
    assert damage is not None
    write_weights(folder, damage)
    damaged = compare_weights(Bundle.open(folder))
    assert damaged is not None
    assert any(name.startswith(owner) for name in damaged.wrong)


@pytest.mark.parametrize(
    ("precision", "experts", "preset", "moe"),
    [
        ("fp32", "delta", "tiny-phi", {"top_k": 2, "use_residual": True}),
        ("int8", "delta", "tiny-phi", {}),
        ("int8", "delta:bits=2", "tiny", {}),
        ("int8", "delta:rank=32", "tiny", {"top_k": 2, "use_residual": True}),
        ("int4", "delta:rank=32", "tiny", {"top_k": 2}),
    ],
)
def test_paged_deltas_give_the_same_bits_and_torch_what_they_stand_for(
    bundles: Callable[..., Path], precision: str, experts: str, preset: str, moe: dict[str, Any]
) -> None:
    bundle = Bundle.open(bundles(precision, experts, preset, **moe))
    paged = PagedOrtRuntime(bundle, "50%")
    found, expected = steps(paged), steps(OrtRuntime(bundle))
    if precision == "int4":  # its kernel for AVX2 adds up in an order that the batch decides
        for one, other in zip(found, expected, strict=True):
            close(np.frombuffer(one, np.float32), np.frombuffer(other, np.float32), 1e-5)
    else:
        assert found == expected
    report = paged.paging()
    assert report["misses"] > 8  # of eight experts: some came twice
    extents = bundle.manifest["experts"].items()
    largest = max(size for owner, (_, size) in extents if ".experts." in owner)
    assert report["bytes_read"] <= report["loads"] * largest
    torch_runtime = TorchBundleRuntime(bundle, "cpu")
    for mine, wanted in zip(prefill(torch_runtime), prefill(OrtRuntime(bundle)), strict=True):
        close(mine, wanted, 1e-4 if precision == "fp32" else 0.05)  # activations in 8 bits
    with pytest.raises(BundleError, match="torch does not page"):
        PagedTorchRuntime(bundle, "50%", "cpu")


def close(found: Floats, wanted: Floats, tolerance: float) -> None:
    """Within parts of the largest value."""
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_a_switch_moves_a_third_of_the_bytes_and_plans_know(bundles: Callable[..., Path]) -> None:
    """All experts anew, as for an image of another modality: counted by the pager."""
    read = []
    for experts in (None, "delta:bits=2"):
        bundle = Bundle.open(bundles("int8", experts))
        store = OrtExpertStore(bundle)
        deltas = Deltas.of_bundle(bundle)
        assert (deltas is None) == (experts is None)
        if deltas is not None:
            asked = Asked(bundle.config, 100, deltas=deltas)
            inline = stored_weights(bundle.path("decoder.onnx"), external=False)
            scales = sum(array.nbytes for name, array in inline if ".experts." in name)
            assert scales > 0  # so few here that they lie in the graph
            assert experts_bytes(asked, "int8") == sum(store.stored.values()) + scales
            held = sum(size - SESSION for size in store.sizes.values())
            assert held_experts(asked, "int8") == pytest.approx(held, abs=1)
            assert deltas.stored == 2.5
            assert deltas.held == 5
        pager = ExpertPager(sum(store.sizes.values()) + store.scratch).open(store, 1)
        for expert in store.sizes:
            with pager.use(expert):
                pass
        read.append(pager.counts.bytes_read)
    assert read[1] <= read[0] / 3


def test_deltas_that_lie_in_the_graph_are_counted(bundles: Callable[..., Path]) -> None:
    bundle = Bundle.open(bundles("fp32", "delta:rank=2"), verify=False)
    assert not any(".experts." in owner for owner in bundle.manifest["experts"])
    deltas = Deltas.of_bundle(bundle)
    assert deltas is not None
    form = Deltas.of(read_deltas("delta:rank=2"), bundle.config, "fp32", 32)
    assert deltas.stored == deltas.held == pytest.approx(form.stored)
    assert choose_memory(bundle, 10**10).budget is None
    made = plan(str(bundle.folder), PlanOptions("cpu", "fp32")).forecasts[0]
    assert made.experts > 0
    memory = made.memory_run - made.experts // 4
    small = replace(DEVICES["cpu"], memory=memory, reserved=0)
    stored = Asked.of_bundle(bundle)
    (lacking,) = make_plan("m", stored, small, PlanOptions("cpu", "fp32")).forecasts
    assert lacking.expert_budget == 0  # there is nothing to page
    assert lacking.short == made.memory_run - memory
    graph = bundle.path("decoder.onnx")
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(BundleError, match="was changed or is incomplete"):
        Deltas.of_bundle(bundle)


@pytest.mark.parametrize(
    ("precision", "experts", "bits"),
    [("int8", "delta:bits=2", 2.5), ("fp32", "delta", 32.0), ("int8", "delta", 8.5)],
)
def test_inspect_counts_the_bits_of_deltas(
    bundles: Callable[..., Path], precision: str, experts: str, bits: float
) -> None:
    bundle = Bundle.open(bundles(precision, experts))
    parts = decoder_parts(bundle.config)
    others = sum(parts[kind].weights for kind in ("attention", "ffn", "meta", "head"))
    own, rest = parts["experts"].weights, 32 if precision == "fp32" else 8.5
    expected = (own * bits + others * rest) / (own + others)
    assert inspect_model(bundle.folder).bits_per_weight == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("experts", ["delta", "delta:bits=2", "delta:rank=8"])
def test_a_bundle_is_planned_as_the_form_it_was_made_in(
    bundles: Callable[..., Path], experts: str
) -> None:
    bundle = Bundle.open(bundles("int8", experts))
    found = Deltas.of_bundle(bundle)
    assert found is not None
    form = Deltas.of(read_deltas(experts), bundle.config, "int8", 32)
    assert (found.operations, found.narrow) == (form.operations, form.narrow)
    assert found.on_gpu().stored - found.stored == (2 if experts == "delta:bits=2" else 0)


def test_fewer_bits_take_fewer_bytes(bundles: Callable[..., Path]) -> None:
    sizes = [
        sum(size for owner, (_, size) in Bundle.open(folder).manifest["experts"].items())
        for folder in (bundles("int8", form) for form in (None, "delta:bits=4", "delta:bits=2"))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.65 * sizes[0]  # with the meta experts, which are as they were


# --- each delta in a form of its own ------------------------------------------------------------


@pytest.fixture(scope="module")
def up_cycled(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """Experts near their meta expert: one of them much farther away, one by a low rank alone."""
    before = tiny_checkpoint()
    tensors = dict(read_checkpoint(before))
    generator = torch.Generator().manual_seed(2)

    def near(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".experts." not in name:
            return tensor
        rows, width = tensor.shape
        added = 0.01 * torch.randn(rows, width, generator=generator)
        if ".experts.1." in name:
            added = 12 * added
        if ".experts.2." in name:
            narrow = torch.randn(rows, 2, generator=generator)
            added = 0.05 * narrow @ torch.randn(2, width, generator=generator)
        return tensors[meta_name(name)] + added

    folder = tmp_path_factory.mktemp("up_cycled") / "checkpoint"
    return read_checkpoint(changed(before, folder, near))


@pytest.fixture(scope="module")
def statistics(up_cycled: Checkpoint) -> Statistics:
    return observed(up_cycled)


def test_bits_go_to_the_deltas_whose_errors_reach_the_stream(
    up_cycled: Checkpoint,
    statistics: Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(builder, "INLINE_BYTES", 64)  # else a rank of 2 is too small to be paged
    exact = logits(export(up_cycled.folder, tmp_path / "exact", "fp32", None))[0]
    errors, sizes = {}, {}
    for form in ("delta:bits=2", "delta:auto=2.5", "delta:auto=4"):
        folder = export(up_cycled.folder, tmp_path / form, "fp32", form, statistics)
        manifest = Bundle.open(folder).manifest
        errors[form] = np.square(logits(folder)[0] - exact).mean()
        held = stored_weights(folder / "decoder.onnx")
        sizes[form] = sum(array.nbytes for name, array in held if ".experts." in name)
        stored = manifest["quantisation"].get("deltas")
    assert sizes["delta:auto=2.5"] <= sizes["delta:bits=2"] < sizes["delta:auto=4"]
    count = sum(int(np.prod(up_cycled.names[name].shape)) for name in stored)
    assert sizes["delta:auto=4"] <= 4 * count / 8
    assert errors["delta:auto=2.5"] < 0.9 * errors["delta:bits=2"], errors
    assert errors["delta:auto=4"] < 0.5 * errors["delta:auto=2.5"], errors
    told = Bundle.open(tmp_path / "delta:auto=2.5").manifest["quantisation"]
    assert (
        told["experts"] == "deltas from the meta expert, a form for each within 2.5 bits a weight"
    )
    of_expert = [
        [form for name, form in told["deltas"].items() if f".experts.{index}." in name]
        for index in range(3)
    ]
    assert all(form.startswith("rank") for form in of_expert[2])  # it is of rank 2
    assert {"4 bits in groups of 32", "8 bits in groups of 32"} & set(of_expert[1])
    assert not {"8 bits in groups of 32"} & set(of_expert[0])
    kept = {name: form for name, form in told["deltas"].items() if form.startswith("rank")}
    matrices = {matrix["name"] for matrix in told["matrices"]}
    assert not matrices & {name.replace(".weight", ".delta") for name in kept}
    bundle = Bundle.open(tmp_path / "delta:auto=4")
    assert steps(PagedOrtRuntime(bundle, "50%")) == steps(OrtRuntime(bundle))
    weights = compare_weights(Bundle.open(tmp_path / "delta:auto=2.5"))
    assert weights is not None
    assert weights.wrong == ()


def test_experts_that_calibration_missed_take_what_the_budget_holds(
    up_cycled: Checkpoint, tmp_path: Path
) -> None:
    missed = observed(up_cycled, data_free=[(0, 1)])
    for budget, form in (("=2.5", "2 bits"), ("=5", "4 bits"), ("", "4 bits")):
        folder = tmp_path / f"budget{budget}"
        export(up_cycled.folder, folder, "int8", f"delta:auto{budget}", missed)
        stored = Bundle.open(folder).manifest["quantisation"]["deltas"]
        own = {form for name, form in stored.items() if "layers.0.ffn.experts.1." in name}
        assert own == {f"{form} in groups of 32"}
        assert np.isfinite(logits(folder)[0]).all()
        # no other gets fewer bits for the sake of some, unless a low rank keeps more
        fewest = min(int(form.split()[0]) for form in stored.values() if "bits" in form)
        assert fewest == int(form.split()[0])


def test_a_form_is_not_chosen_without_calibration_or_room(
    up_cycled: Checkpoint, tmp_path: Path
) -> None:
    cases: list[tuple[Precision, str, bool, str]] = [
        ("int8", "delta:auto", False, "by what calibration measured"),
        ("int8", "delta:auto=0.2", True, r"0.2 bits per weight are too few. The least is 1\.\d+"),
        ("int4", "delta:auto=1", True, "too few"),  # no rank of 64 divides into groups of 32
    ]
    for precision, form, calibrated, error in cases:
        options = build.BuildOptions(precision, deltas=read_deltas(form))
        with pytest.raises(InputError, match=error):
            build.check_exportable(up_cycled, options, calibrated=calibrated)


def test_a_proof_can_see_an_expert_that_adds_nothing(
    up_cycled: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    for precision in ("fp32", "int8"):
        folder = export(up_cycled.folder, tmp_path / precision, precision, "delta", statistics)
        bundle = Bundle.open(folder)
        held = {name: np.array(array) for name, array in stored_weights(folder / "decoder.onnx")}
        owner = "decoder.layers.0.ffn.experts.1"
        tokens = {"decoder.layers.0.ffn.": [1, 9, 2, 3]}
        found = {each.kind: each for each in mutations_of(held, tokens, bundle.config.moe)}
        assert {"exchange", "meta", "router"} <= set(found)
        damage = mutated_weights(held, found["meta"], bundle.config.moe)
        assert damage is not None
        assert all(
            name.startswith(f"{owner}.") and not array.any() for name, array in damage.items()
        )
        whole, without = (
            prefill(runtime)[0] for runtime in (OrtRuntime(bundle), OrtRuntime(bundle, damage))
        )
        assert np.abs(whole - without).max() > 0.01 * np.abs(whole).max()


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_a_plan_knows_which_deltas_are_too_small_to_be_paged(
    preset: str, precision: Precision, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As a bundle that is there does: the smallest lie in the graph itself."""
    source = tiny_checkpoint(preset)
    found = set()
    forms = ["delta:rank=32", "delta:bits=2", "delta"]
    forms += [] if precision == "int4" else ["delta:rank=2", "delta:rank=4", "delta:rank=8"]
    for form in forms:
        bundle = Bundle.open(export(source, tmp_path / form, precision, form))
        stored = Asked.of_bundle(bundle)
        assert stored.deltas is not None
        planned = Deltas.of(read_deltas(form), bundle.config, precision, stored.group)
        assert planned.paged == stored.deltas.paged, form
        found.add(planned.paged)
    assert found == ({True} if precision == "int4" else {True, False})  # its ranks are whole groups


@pytest.mark.parametrize(
    "text",
    [
        "delta:auto=",
        "delta:auto=x",
        "delta:auto=nan",
        "delta:auto=-1",
        "delta:auto=17",
        "",
        "deltas",
        "delta:",
        "delta:rank=0",
        "delta:bits=3",
        "delta:bits",
        "delta:rank=x",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="no form of experts"):
        read_deltas(text)


def test_what_has_no_deltas_is_refused(run: Run, tiny_checkpoint: Callable[..., Path]) -> None:
    alone = str(tiny_checkpoint(meta_expert=False))
    for model, options, error in (
        (alone, ["--experts", "delta"], "no meta expert"),
        (str(tiny_checkpoint()), ["--int4", "--experts", "delta:rank=5"], "rank of 5"),
        (str(tiny_checkpoint()), ["--mixed", "4", "--experts", "delta"], "Mixed precision|mixed"),
        (str(tiny_checkpoint()), ["--experts", "low"], "no form of experts"),
        ("modality-nano", ["--experts", "delta"], "--experts"),
        ("nano", ["--experts", "delta", "--target", "tensorrt-rtx", "--paged"], "No GPU pages"),
    ):
        result = run("export", model, *options)
        assert result.exit_code in (2, 3), result.stderr
        assert re.search(error, two_lines(result)[0])
