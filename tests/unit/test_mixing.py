"""The formats of a mixed export: within the budget, most for what adds most."""

from collections.abc import Callable
from pathlib import Path

import pytest
from graphs import changed, observed
from torch import Tensor

from medmoe_edge.calibration.methods import INT4
from medmoe_edge.calibration.quantisers import Format
from medmoe_edge.calibration.statistics import Statistics, input_of
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint
from medmoe_edge.errors import InputError
from medmoe_edge.export.plan import HEAD, make_plan, search_formats

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Make) -> Checkpoint:
    return read_checkpoint(tiny_checkpoint())


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint) -> Statistics:
    return observed(checkpoint)


def bits(checkpoint: Checkpoint, formats: dict[str, Format]) -> float:
    """Per weight, on average."""
    sizes = {name: checkpoint.names[name].shape for name in formats}
    stored = sum(n * k * formats[name].bits_per_weight(k) for name, (n, k) in sizes.items())
    return stored / sum(n * k for n, k in sizes.values())


@pytest.mark.parametrize("budget", [2.5, 3.0, 3.7, 4.5, 9.0])
def test_formats_keep_within_the_budget(
    checkpoint: Checkpoint, statistics: Statistics, budget: float
) -> None:
    formats = search_formats(checkpoint, statistics, budget)
    matrices = {name for name in checkpoint.names if input_of(name) is not None}
    assert set(formats) == matrices - {HEAD}
    # all matrices are of one size here, each upgraded by 2 bits or not
    assert min(budget, 4.5) - 2 / len(formats) < bits(checkpoint, formats) <= budget


def test_the_plan_of_a_mixed_export_takes_them(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    plan = make_plan(checkpoint, "mixed", "auto", statistics, 3.5)
    assert plan.formats == search_formats(checkpoint, statistics, 3.5)
    assert not make_plan(checkpoint, "int4", "auto", statistics, None).formats


def test_what_adds_most_to_the_stream_gets_most(tiny_checkpoint: Make, tmp_path: Path) -> None:
    loud, quiet = (f"decoder.layers.2.ffn.experts.{index}." for index in (1, 2))

    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor * {f"{loud}down.weight": 10, f"{quiet}down.weight": 0.02}.get(name, 1)

    source = read_checkpoint(changed(tiny_checkpoint(), tmp_path / "loud", change))
    formats = search_formats(source, observed(source), 3.5)
    for name, form in formats.items():
        if name.startswith(loud):
            assert form == INT4
        if name.startswith(quiet):
            assert form == Format(2, 32)


def test_an_expert_without_statistics_stays_at_four_bits(checkpoint: Checkpoint) -> None:
    statistics = observed(checkpoint, hessians=False, data_free=[(0, 1), (2, 3)])
    formats = search_formats(checkpoint, statistics, 3.0)
    owners = ("decoder.layers.0.ffn.experts.1.", "decoder.layers.2.ffn.experts.3.")
    assert {formats[name] for name in formats if name.startswith(owners)} == {INT4}
    assert Format(2, 32) in formats.values()
    with pytest.raises(InputError, match=r"The least is 2\.\d"):
        search_formats(checkpoint, statistics, 2.5)


def test_a_layer_that_adds_nothing_is_no_accident(tiny_checkpoint: Make, tmp_path: Path) -> None:
    def silence(name: str, tensor: Tensor) -> Tensor:
        return tensor * 0 if name.endswith(("out.weight", "down.weight")) else tensor

    source = read_checkpoint(changed(tiny_checkpoint(), tmp_path / "silent", silence))
    assert bits(source, search_formats(source, observed(source), 3.0)) <= 3.0
