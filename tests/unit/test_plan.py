"""What becomes of each weight: its format, its method, the error that is recorded."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Floats, changed, normal, observed
from torch import Tensor

from medmoe_edge.bundle.recorded import MOST_MOVED
from medmoe_edge.calibration.methods import INT4, quantise_gptq
from medmoe_edge.calibration.quantisers import (
    DeltaForm,
    Format,
    Quantised,
    output_error,
    round_searched,
    round_to_nearest,
)
from medmoe_edge.calibration.statistics import InputStatistics, Statistics, input_of
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint
from medmoe_edge.errors import CheckpointError, InputError
from medmoe_edge.export.builder import save_model
from medmoe_edge.export.decoder import DecoderBuilder
from medmoe_edge.export.plan import HEAD, INT8, Plan, check_precision
from medmoe_edge.export.quantise import quantise_weights
from medmoe_edge.export.weights import Factors, WeightSource

Make = Callable[..., Path]
EXPERT = "decoder.layers.0.ffn.experts.1.up.weight"
SPARED = [
    *("decoder.norm.weight", "decoder.embed.weight", "vision.layers.0.attention.q.weight"),
    *("decoder.layers.0.input_norm.weight", "decoder.layers.0.attention.q.bias"),
    *("decoder.layers.0.ffn.router.weight", "decoder.layers.0.ffn.coefficient.weight"),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Make) -> Checkpoint:
    return read_checkpoint(tiny_checkpoint())


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint) -> Statistics:
    return observed(checkpoint)


def quantised(plan: Plan, name: str, rows: Floats) -> Quantised:
    found = plan(name)
    assert found is not None
    form, quantiser = found
    made = quantiser(rows)
    assert made.format == form
    return made


# --- formats and methods ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4", "mixed"])
def test_what_decides_and_what_is_small_is_spared(precision: Any) -> None:
    plan = Plan(precision)
    assert not [name for name in SPARED if plan(name) is not None]
    assert plan(EXPERT) is not None
    assert Plan("fp32")(EXPERT) is None


def test_each_precision_has_its_format() -> None:
    pair = Format(2, 32)
    assert Plan("int8", formats={EXPERT: pair}).format_of(EXPERT) == INT8
    assert Plan("int4").format_of(EXPERT) == INT4
    assert Plan("mixed", formats={EXPERT: pair}).format_of(EXPERT) == pair
    assert Plan("mixed", formats={EXPERT: pair}).format_of(EXPERT.replace("1", "2")) == INT4
    assert Plan("mixed", formats={HEAD: pair}).format_of(HEAD) == INT8


@pytest.mark.parametrize(
    ("precision", "method", "seen", "name", "expected"),
    [
        ("int8", "auto", None, EXPERT, "rtn"),
        ("int8", "auto", "squares", EXPERT, "rtn"),
        ("int8", "auto", "hessians", EXPERT, "gptq"),
        ("int8", "auto", "data-free", EXPERT, "rtn"),
        ("int8", "rtn", "hessians", EXPERT, "rtn"),
        ("int4", "auto", None, EXPERT, "rtn"),
        ("int4", "auto", "squares", EXPERT, "weighted"),
        ("int4", "auto", "hessians", EXPERT, "gptq"),
        ("int4", "auto", "squares", HEAD, "rtn"),
        ("int4", "auto", "hessians", HEAD, "gptq"),
        ("int4", "rtn", "hessians", EXPERT, "rtn"),
        ("int4", "auto", "data-free", EXPERT, "rtn"),
        ("int4", "auto", "data-free", EXPERT.replace("1", "2"), "gptq"),
        ("mixed", "auto", "hessians", EXPERT, "gptq"),
    ],
)
def test_the_method_is_the_best_that_the_statistics_allow(
    checkpoint: Checkpoint,
    precision: Any,
    method: Any,
    seen: str | None,
    name: str,
    expected: str,
) -> None:
    data_free = [(0, 1)] if seen == "data-free" else []
    found = observed(checkpoint, hessians=seen != "squares", data_free=data_free)
    plan = Plan(precision, method, found if seen else None)
    rows = WeightSource(checkpoint).array(name)
    measured, form = found.inputs[str(input_of(name))], plan.format_of(name)
    assert (measured.hessian is None) == (seen == "squares")
    made = quantised(plan, name, rows)
    if expected == "rtn":
        alone = round_to_nearest(rows, form)
    elif expected == "gptq":
        alone = quantise_gptq(rows, np.asarray(measured.hessian), form)
    else:
        alone = round_searched(rows, form, measured.mean_square if expected == "weighted" else None)
    assert np.array_equal(made.integers, alone.integers)
    assert np.array_equal(made.scale, alone.scale)
    (record,) = plan.matrices
    error = record.pop("error")
    assert record == {"name": name, "bits": form.bits, "group": form.group, "method": expected}
    assert 0 < error < 0.2


def test_the_error_is_that_of_the_output(checkpoint: Checkpoint, statistics: Statistics) -> None:
    rows = WeightSource(checkpoint).array(EXPERT)
    x = normal(5000, 64) * np.geomspace(0.1, 3, 64, dtype=np.float32)
    measured = InputStatistics.empty(64, hessian=True)
    measured.update(x)
    inputs = {str(input_of(EXPERT)): measured}
    scale = np.exp(normal(64, seed=1))
    for factors, entering, stored in (
        ({}, x, rows),
        ({EXPERT: Factors(columns=scale)}, x / scale, rows * scale),
        ({EXPERT: Factors(rows=scale)}, x, rows * scale[:, None]),
    ):
        plan = Plan("int4", "auto", dataclasses.replace(statistics, inputs=inputs), factors=factors)
        made = quantised(plan, EXPERT, stored)
        hessian = (entering.T.astype(np.float64) @ entering / len(x)).astype(np.float32)
        best = quantise_gptq(stored, hessian, INT4)
        other = made.integers != best.integers  # by rounding of the moments; a row moved too far
        assert other.mean() < 0.03
        assert other.any(1).mean() < 0.1
        exact = entering.astype(np.float64) @ stored.T
        noise = entering.astype(np.float64) @ (made.dequantise() - stored).T
        expected = np.sqrt((noise**2).sum() / (exact**2).sum())
        assert plan.matrices[0]["error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("plan", "name", "evenly"),
    [
        (Plan("int4"), EXPERT, False),
        (Plan("int8", deltas=DeltaForm(bits=2)), EXPERT.replace("weight", "delta"), True),
    ],
    ids=("int4", "deltas"),
)
def test_a_row_that_gptq_moves_farther_than_marks_can_tell_is_rounded_by_itself(
    statistics: Statistics, plan: Plan, name: str, evenly: bool
) -> None:
    """Else what was just exported would be taken for damaged."""
    measured = InputStatistics.empty(64, hessian=True)
    measured.update(normal(600, 64) + 10 * normal(600, 1, seed=2))  # correlated inputs
    rows, form = 0.1 * normal(64, 64, seed=3), plan.format_of(name)
    rows[::2, 32:] *= 0.001  # small groups, into which the errors of large ones are moved
    inputs = {str(input_of(EXPERT)): measured}
    made = quantised(
        dataclasses.replace(plan, statistics=dataclasses.replace(statistics, inputs=inputs)),
        name,
        rows,
    )
    alone = quantise_gptq(rows, np.asarray(measured.hessian), form, evenly=evenly)
    plain = round_searched(rows, form)
    norms = [np.linalg.norm(w.reshape(64, -1, 32), axis=-1) for w in (rows, alone.dequantise())]
    far = np.abs(np.log2(norms[1] / norms[0])).max(1) > MOST_MOVED
    assert far[::2].any()
    assert not far[1::2].any()
    for row, apart in enumerate(far):
        wanted = plain if apart else alone
        assert np.array_equal(made.integers[row], wanted.integers[row])
        assert np.array_equal(made.scale[row], wanted.scale[row])


def test_without_statistics_all_inputs_count_alike(checkpoint: Checkpoint) -> None:
    plan, rows = Plan("int8"), WeightSource(checkpoint).array(EXPERT)
    made = quantised(plan, EXPERT, rows)
    noise = np.linalg.norm(made.dequantise() - rows) / np.linalg.norm(rows)
    assert plan.matrices[0]["error"] == pytest.approx(noise, rel=1e-3)


def test_every_matrix_is_recorded_as_it_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = Plan("int4")
    model = DecoderBuilder(checkpoint.config, WeightSource(checkpoint)).model()
    quantise_weights(model, plan)
    assert plan.matrices == []
    save_model(model, tmp_path, "decoder")
    recorded = [record["name"] for record in plan.matrices]
    matrices = [name for name in checkpoint.names if input_of(name) is not None and name != HEAD]
    assert sorted(recorded) == sorted([*matrices, HEAD])


def test_blocks_of_one_matrix_are_one_record(checkpoint: Checkpoint) -> None:
    rows, whole, parts = WeightSource(checkpoint).array(HEAD), Plan("int4"), Plan("int4")
    quantised(whole, HEAD, rows)
    for block in np.split(rows, [100, 250]):
        quantised(parts, HEAD, block)
    ((one,), (other,)) = whole.matrices, parts.matrices
    assert one.pop("error") == pytest.approx(other.pop("error"), rel=0.05)
    assert one == other


@pytest.mark.parametrize("precision", ["int4", "mixed"])
def test_data_makes_better_matrices(
    checkpoint: Checkpoint, statistics: Statistics, precision: Any
) -> None:
    """Of all of them together, judged by the very moments that the best method is given."""
    errors: dict[str, list[float]] = {}
    plans = (
        Plan(precision, "rtn", statistics),
        Plan(precision, "auto", squares(statistics)),
        Plan(precision, "auto", statistics),
    )
    for plan in plans:
        for name in (EXPERT, EXPERT.replace("up", "down"), "decoder.layers.1.attention.out.weight"):
            rows = WeightSource(checkpoint).array(name)
            made = quantised(plan, name, rows)
            moments = statistics.inputs[str(input_of(name))].hessian
            assert moments is not None
            found = errors.setdefault(plan.matrices[-1]["method"], [])
            found.append(output_error(rows, made, moments))
    gptq, weighted, rtn = (np.mean(errors[name]) for name in ("gptq", "weighted", "rtn"))
    assert gptq < 0.9 * weighted
    assert weighted < 0.99 * rtn


def squares(statistics: Statistics) -> Statistics:
    """The same without Hessians."""
    inputs = {
        name: dataclasses.replace(measured, hessian=None)
        for name, measured in statistics.inputs.items()
    }
    return dataclasses.replace(statistics, inputs=inputs)


# --- what is refused --------------------------------------------------------------------------


def test_rows_that_do_not_divide_are_refused_where_there_are_groups(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    def narrow(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(("gate.weight", "up.weight")):
            return tensor[:48].clone()
        return tensor[:, :48].clone() if name.endswith("down.weight") else tensor

    folder = changed(tiny_checkpoint(), tmp_path / "narrow", narrow, intermediate_size=48)
    source = read_checkpoint(folder)
    check_precision(source, "int8", None, calibrated=False)
    with pytest.raises(CheckpointError, match=r"down\.weight, of 48 weights, do not divide"):
        check_precision(source, "int4", None, calibrated=False)


@pytest.mark.parametrize(
    ("budget", "calibrated", "message"),
    [
        (4.5, False, "what calibration measured"),
        (None, True, "what calibration measured"),
        (2.4, True, r"2\.4 bits per weight are too few\. The least is 2\.5"),
        (float("nan"), True, "nan bits per weight are too few"),
    ],
)
def test_a_mixed_export_needs_statistics_and_a_budget(
    checkpoint: Checkpoint, budget: float | None, calibrated: bool, message: str
) -> None:
    check_precision(checkpoint, "mixed", 2.5, calibrated=True)
    with pytest.raises(InputError, match=message):
        check_precision(checkpoint, "mixed", budget, calibrated=calibrated)
