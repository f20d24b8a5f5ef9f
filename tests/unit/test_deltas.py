"""Experts as what they add to the meta expert: the same numbers, and less of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run, two_lines
from graphs import (
    moe_config,
    moe_layer,
    moe_model,
    op_types,
    random_tokens,
    run_ort,
)
from mutants import write_weights

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.recorded import compare_weights, stored_weights
from medmoe_edge.errors import BundleError, InputError
from medmoe_edge.evaluation.mutations import Mutation, mutated_weights
from medmoe_edge.export import build
from medmoe_edge.export.decoder import MoESpec
from medmoe_edge.export.passes.ort_cpu import lower_deltas
from medmoe_edge.export.plan import read_deltas
from medmoe_edge.export.stored import specification
from medmoe_edge.export.weights import DeltaForm, low_rank
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.paging.pager import read_extents

EXACT = DeltaForm()
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
    lowered, modified = lower_deltas(moe_model(moe, config), spec, EXACT)
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
    lowered, _ = lower_deltas(moe_model(moe, config), MoESpec.of(config), EXACT)
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
    lowered, _ = lower_deltas(moe_model(moe, config), MoESpec.of(config), EXACT)
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
        form = DeltaForm(rank=rank)
        lowered, _ = lower_deltas(moe_model(moe, config), MoESpec.of(config), form)
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

    def make(precision: Any, experts: str | None, preset: str = "tiny", **moe: Any) -> Path:
        deltas = None if experts is None else read_deltas(experts)
        options = build.BuildOptions(precision, name="tiny", deltas=deltas)
        out = tmp_path_factory.mktemp("bundles") / "bundle"
        return build.export_bundle(tiny_checkpoint(preset, **moe), out, options)

    return make


def logits(folder: Path) -> Any:
    runtime = OrtRuntime(Bundle.open(folder))
    embeds = np.random.default_rng(0).standard_normal((12, 64)).astype(np.float32)
    step = runtime.step(embeds, runtime.new_cache(12))
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
    assert bundle.manifest["paging"] is None
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
    with pytest.raises(BundleError, match="experts as deltas"):
        specification(bundle)
    with pytest.raises(BundleError, match="cannot be paged"):
        read_extents(bundle)


def test_fewer_bits_take_fewer_bytes(bundles: Callable[..., Path]) -> None:
    sizes = [
        sum(size for owner, (_, size) in Bundle.open(folder).manifest["experts"].items())
        for folder in (bundles("int8", form) for form in (None, "delta:bits=4", "delta:bits=2"))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.65 * sizes[0]  # with the meta experts, which are as they were


@pytest.mark.parametrize(
    "text", ["", "deltas", "delta:", "delta:rank=0", "delta:bits=3", "delta:bits", "delta:rank=x"]
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
        ("nano", ["--experts", "delta", "--target", "tensorrt-rtx"], "does not read"),
    ):
        result = run("export", model, *options)
        assert result.exit_code in (2, 3), result.stderr
        assert re.search(error, two_lines(result)[0])
