"""Statistics of an input against float64, how they merge, and the file that keeps them."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from medmoe_edge import atomic
from medmoe_edge.calibration.coverage import ExpertCoverage
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.calibration.statistics import (
    InputStatistics,
    Source,
    Statistics,
    StatisticsFiles,
    write_statistics,
)
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import DataError, InputError, ResourceError

Floats = npt.NDArray[np.float32]
EXPERT = "decoder.layers.0.ffn.experts.1.in"
DENSE = "decoder.layers.1.ffn.in"


def tokens(count: int, width: int = 6, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0.3, 2.0, (count, width)).astype(np.float32)


def observed(*batches: Floats, hessian: bool = True) -> InputStatistics:
    found = InputStatistics.empty(batches[0].shape[1], hessian=hessian)
    for batch in batches:
        found.update(batch)
    return found


def assert_same(one: InputStatistics, other: InputStatistics, tolerance: float = 0) -> None:
    assert (one.tokens, one.borrowed) == (other.tokens, other.borrowed)
    assert one.weight == pytest.approx(other.weight)
    arrays, others = one.arrays(), other.arrays()
    assert list(arrays) == list(others)
    for key, array in arrays.items():
        np.testing.assert_allclose(array, others[key], rtol=tolerance, atol=tolerance)


def statistics(inputs: dict[str, InputStatistics]) -> Statistics:
    routing = RoutingProfile.empty(["ct", "mri", "ct"], [0], 2)
    routing.record(0, "ct", np.array([[1], [1], [0]]))
    coverage = (
        ExpertCoverage(0, 0, 1, 256, 0, status="data-free"),
        ExpertCoverage(0, 1, 2, 256, None, 300, status="borrowed"),
    )
    source = Source("set", "ab" * 32, ("ef" * 32,), 1)
    return Statistics("cd" * 32, source, routing, coverage, inputs)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 100))
def test_batches_add_up_to_the_whole(counts: list[int], seed: int) -> None:
    x = tokens(sum(counts), seed=seed)
    found = observed(*np.split(x, np.cumsum(counts)[:-1]))
    exact = x.astype(np.float64)
    np.testing.assert_array_equal(found.minimum, x.min(0))
    np.testing.assert_array_equal(found.maximum, x.max(0))
    np.testing.assert_array_equal(found.absmax, np.abs(x).max(0))
    np.testing.assert_allclose(found.mean_square, np.square(exact).mean(0), rtol=1e-5)
    assert found.hessian is not None
    np.testing.assert_allclose(found.hessian, exact.T @ exact / len(x), rtol=1e-4, atol=1e-5)
    assert (found.tokens, found.borrowed, found.weight) == (len(x), 0, len(x))


@settings(max_examples=25)
@given(st.integers(0, 3), st.integers(0, 100))
def test_merged_passes_equal_one(borrowing: int, seed: int) -> None:
    """Also where either pass borrowed some tokens."""
    one, left, right = (InputStatistics.empty(6, hessian=True) for _ in range(3))
    for index, count in enumerate((7, 30, 1, 12)):
        x = tokens(count, seed=seed + index)
        weights = np.linspace(0.01, 1, count, dtype=np.float32) if index == borrowing else None
        one.update(x, weights)
        (left if index < 2 else right).update(x, weights)
    left.merge(right)
    assert_same(left, one, 1e-5)
    np.testing.assert_array_equal(left.minimum, one.minimum)


def test_borrowed_tokens_weigh_less() -> None:
    own, lent = tokens(20), tokens(30, seed=1)
    weights = np.random.default_rng(2).uniform(0.01, 1, 30).astype(np.float32)
    found = observed(own)
    found.update(lent, weights)
    x = np.concatenate((own, lent)).astype(np.float64)
    w = np.concatenate((np.ones(20), weights.astype(np.float64)))
    assert found.hessian is not None
    np.testing.assert_allclose(found.hessian, (x.T * w) @ x / w.sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.mean_square, w @ x**2 / w.sum(), rtol=1e-5)
    assert (found.tokens, found.borrowed) == (20, 30)
    assert found.weight == pytest.approx(w.sum())


def test_without_hessians_the_rest_is_the_same() -> None:
    bare = observed(tokens(9), hessian=False)
    assert bare.hessian is None
    assert "hessian" not in bare.arrays()
    np.testing.assert_array_equal(bare.mean_square, observed(tokens(9)).mean_square)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    made = statistics({EXPERT: observed(tokens(5)), DENSE: observed(tokens(9, 4))})
    made.save(tmp_path / "stats")
    opened = Statistics.open(tmp_path / "stats")
    assert dataclasses.replace(opened, routing=made.routing, inputs={}) == dataclasses.replace(
        made, inputs={}
    )
    assert opened.routing.to_json() == made.routing.to_json()
    assert opened.samples == {"ct": 2, "mri": 1}
    assert set(opened.inputs) == {EXPERT, DENSE}
    for name, found in made.inputs.items():
        assert_same(opened.inputs[name], found)
    opened.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "stats").read_bytes()


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    found = observed(tokens(5, 3))  # three channels: wide types would lie askew if in order
    write_statistics(tmp_path / "stats", {EXPERT: found}, {})
    loaded = load_file(tmp_path / "stats")
    assert set(loaded) == {f"{EXPERT}/{key}" for key in found.arrays()}
    for key, array in found.arrays().items():
        np.testing.assert_array_equal(loaded[f"{EXPERT}/{key}"], array)


def test_the_summary_is_json_that_names_no_sample() -> None:
    made = statistics({})
    text = json.dumps(made.summary())
    assert json.loads(text)["samples"] == {"ct": 2, "mri": 1}
    assert json.loads(text)["coverage"][1]["status"] == "borrowed"
    assert made.source.drawn[0] not in text


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    whole = observed(tokens(5), tokens(8, seed=1))
    write_statistics(tmp_path / "a", {EXPERT: observed(tokens(5))}, {"note": 1})
    second = {EXPERT: observed(tokens(8, seed=1)), DENSE: observed(tokens(3))}
    write_statistics(tmp_path / "b", second, {})
    files = StatisticsFiles([tmp_path / "a", tmp_path / "b"])
    assert files.contents[0]["note"] == 1
    assert set(files) == {EXPERT, DENSE}
    assert files.counts(EXPERT) == [13, 0, 13]
    write_statistics(tmp_path / "both", files, {})
    merged = StatisticsFiles([tmp_path / "both"])
    assert_same(merged[EXPERT], whole, 1e-5)
    assert merged[DENSE].tokens == 3


def test_what_a_data_free_expert_saw_is_not_trusted(tmp_path: Path) -> None:
    other = EXPERT.replace("experts.1", "experts.0")
    made = statistics({EXPERT: observed(tokens(5)), other: observed(tokens(5))})
    assert made.get(EXPERT) is made.inputs[EXPERT]
    assert made.get(other) is None
    assert made.get(DENSE) is None
    assert dataclasses.replace(made, coverage=()).get(other) is made.inputs[other]


def test_statistics_belong_to_one_checkpoint(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint())
    made = statistics({})
    with pytest.raises(DataError, match="made for another checkpoint"):
        made.check(checkpoint)
    dataclasses.replace(made, checkpoint_sha256=checkpoint.sha256()).check(checkpoint)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    path.write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        statistics({}).save(path)
    assert path.read_text() == "precious"
    statistics({}).save(path, force=True)
    assert len(Statistics.open(path).coverage) == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="No space left"):
        statistics({EXPERT: observed(tokens(5))}).save(tmp_path / "stats")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["shape", "missing"])
def test_tensors_must_be_as_announced(tmp_path: Path, wrong: str) -> None:
    specs = dict.fromkeys("ab", ("F32", (2,)))
    given = [("a", np.zeros(3 if wrong == "shape" else 2, np.float32))]
    with pytest.raises(ValueError, match=r"a is|b was not given"):
        atomic.write_tensors(tmp_path / "file", specs, given, {})
    assert list(tmp_path.iterdir()) == []


def test_no_other_file_is_taken_for_statistics(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    with pytest.raises(DataError, match="does not exist"):
        Statistics.open(path)
    path.write_bytes(b"PK\3\4 not ours")
    with pytest.raises(DataError, match="truncated or no statistics"):
        Statistics.open(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(DataError, match="holds no calibration statistics"):
        Statistics.open(path)
    write_statistics(path, {}, {}, force=True)  # a layer's file, as a pass leaves it
    with pytest.raises(DataError, match="damaged"):
        Statistics.open(path)


def test_no_damage_makes_more_than_an_error(tmp_path: Path) -> None:
    """Cut off anywhere, or with bytes changed in the header, it is read or refused."""
    path = tmp_path / "stats"
    statistics({EXPERT: observed(tokens(5))}).save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(0, header, 3):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged[: generator.integers(0, len(whole) * 2)])
        try:
            for found in Statistics.open(path).inputs.values():
                assert found.tokens >= 0
        except DataError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("key", ["minimum", "mean_square", "hessian"])
def test_a_site_that_is_not_finite_is_refused(tmp_path: Path, key: str) -> None:
    found = observed(tokens(5))
    getattr(found, key)[0] = np.nan
    write_statistics(tmp_path / "stats", {EXPERT: found}, {})
    with pytest.raises(DataError, match="damaged"):
        StatisticsFiles([tmp_path / "stats"])[EXPERT]


def test_a_routing_profile_survives_json() -> None:
    profile = RoutingProfile.empty(["ct", "mri", "ct"], [0, 2], 3)
    profile.record(0, "ct", np.array([[0, 1], [0, 2]]))
    profile.record(2, "mri", np.array([[1, 2]]))
    data = json.loads(json.dumps(profile.to_json()))
    again = RoutingProfile.from_json(data)
    assert again.to_json() == data
    np.testing.assert_array_equal(again.distinct, profile.distinct)
    np.testing.assert_allclose(profile.union, [1, 2 / 3])
    np.testing.assert_allclose(profile.probability("ct")[0], [0.5, 0.25, 0.25])
    np.testing.assert_array_equal(profile.probability("xray"), np.zeros((2, 3)))
    for key in data:
        with pytest.raises(DataError, match="malformed"):
            RoutingProfile.from_json({**data, key: "x"})


def test_routing_profiles_merge_by_modality() -> None:
    one = RoutingProfile.empty(["ct"], [0], 2)
    one.record(0, "ct", np.array([[0], [0], [1]]))
    other = RoutingProfile.empty(["ct", "mri"], [0], 2)
    other.record(0, "ct", np.array([[1]]))
    other.record(0, "mri", np.array([[1], [1]]))
    both = one.merge(other)
    assert both.modalities == ("ct", "mri")
    assert both.tokens.tolist() == [[[2, 0], [2, 2]]]
    assert both.requests.tolist() == [2, 1]
    assert both.distinct.tolist() == [4]
    with pytest.raises(ValueError, match="different models"):
        one.merge(RoutingProfile.empty(["ct"], [1], 2))
