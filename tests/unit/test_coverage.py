"""The expert coverage contract: what is short, and what is done about it, expert by expert."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medmoe_edge.calibration.collect import collect
from medmoe_edge.calibration.coverage import (
    ExpertCoverage,
    assess,
    floor,
    refusal,
    samples_to_draw,
    settle,
)
from medmoe_edge.calibration.data import CalibrationData, Sample
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.calibration.run import calibrate
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import DataError, InputError, ResourceError, VerificationError

Make = Callable[..., Path]
NAMES = ("mri", "ct", "pathology", "xray")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scan.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def data(image: Path, **counts: int) -> CalibrationData:
    samples = tuple(
        Sample(f"{name}-{index}", image, f"Where is {name} {index}?", "There", name, "OPEN")
        for index in range(max(counts.values()))
        for name, count in counts.items()
        if index < count
    )
    return CalibrationData("made", samples, "ab" * 32)


def profile(**tokens: list[list[int]]) -> RoutingProfile:
    """Tokens `[M, E]` of each modality, two requests each; layers 0, 2, ..."""
    layers = range(0, 2 * len(next(iter(tokens.values()))), 2)
    made = RoutingProfile.empty([*tokens, *tokens], layers, 2)
    for name, rows in tokens.items():
        for layer, row in zip(layers, rows, strict=True):
            made.record(layer, name, np.repeat(np.arange(2), row)[:, None])
    return made


def test_the_floor_grows_with_the_input_for_hessians_only() -> None:
    assert floor(64, hessians=True) == 256
    assert floor(2048, hessians=True) == 4096
    assert floor(2048, hessians=True, multiple=1.5) == 3072
    assert floor(2048, hessians=False) == 256


def test_every_expert_is_assessed() -> None:
    seen = profile(ct=[[300, 0], [5, 255]], mri=[[10, 0], [0, 1]])
    records = assess(seen, ("mri", "ct"), 256)
    assert [(r.layer, r.expert, r.tokens, r.own_modality_tokens, r.short) for r in records] == [
        (0, 0, 310, 10, False),
        (0, 1, 0, 0, True),
        (2, 0, 5, 0, True),
        (2, 1, 256, 255, False),
    ]
    unnamed = assess(seen, (), 256)
    assert [record.own_modality_tokens for record in unnamed] == [None] * 4
    assert [record.short for record in unnamed] == [False, True, True, False]


def test_enough_tokens_are_not_enough_without_the_own_modality() -> None:
    (first, _) = assess(profile(ct=[[900, 900]]), ("mri", "ct"), 256)
    assert first.short
    assert first.may_borrow == 0


@given(st.integers(0, 600), st.sampled_from([None, 0, 9]))
def test_borrowing_fills_up_and_is_never_most_of_it(tokens: int, own: int | None) -> None:
    record = ExpertCoverage(0, 0, tokens, 256, own)
    filled = dataclasses.replace(record, borrowed=record.may_borrow)
    assert record.may_borrow <= 128
    assert filled.short == (own == 0 or tokens < 128)
    assert (record.may_borrow > 0) == (own != 0 and 128 <= tokens < 256)


def test_more_is_drawn_from_what_feeds_the_expert() -> None:
    seen = profile(ct=[[400, 100]], mri=[[20, 20]], xray=[[0, 0]])
    short = assess(seen, ("xray", "mri"), 256)[1]
    # 136 missing: half from ct at 50 tokens a request, half from its own at 10
    assert samples_to_draw([short], seen, ("xray", "mri")) == {"ct": 2, "mri": 7}
    assert samples_to_draw([short], seen, ()) == {"ct": 3}
    covered_but_for_its_own = assess(seen, ("xray", "mri"), 256)[0]
    assert list(samples_to_draw([covered_but_for_its_own], seen, ("xray", "mri"))) == ["xray"]
    assert samples_to_draw([], seen, ()) == {}


def test_an_expert_that_nothing_reaches_asks_for_its_own() -> None:
    seen = profile(ct=[[400, 0]])
    short = assess(seen, ("ct", "mri"), 256)[1]
    assert list(samples_to_draw([short], seen, ("ct", "mri"))) == ["mri"]
    assert samples_to_draw([short], seen, ()) == {}


def test_each_expert_ends_in_one_status() -> None:
    def record(expert: int, tokens: int, own: int = 9) -> ExpertCoverage:
        return ExpertCoverage(0, expert, tokens, 256, own)

    before = [record(0, 300), record(1, 100), record(2, 100), record(3, 100), record(4, 300, 0)]
    after = [record(0, 400), record(1, 256), record(2, 200), record(3, 101), record(4, 400, 0)]
    settled = settle(before, after, {(0, 2): 56, (0, 3): 20})
    assert [r.status for r in settled] == [
        *("covered", "drew more", "borrowed", "data-free", "data-free"),
    ]
    assert [r.borrowed for r in settled] == [0, 0, 56, 20, 0]
    assert all(ExpertCoverage.from_json(r.to_json()) == r for r in settled)
    with pytest.raises(DataError, match="malformed"):
        ExpertCoverage.from_json({**settled[0].to_json(), "colour": "red"})


def test_the_refusal_names_the_experts() -> None:
    error = refusal(assess(profile(ct=[[90, 300]]), ("mri", "ct"), 256), ("mri", "ct"))
    assert "layer 0 mri (expert 0: 90 of 256 tokens, none of its own modality)" in error.what
    assert error.exit_code == 4


def statuses(statistics: Statistics) -> dict[str, set[str]]:
    """Statuses over layers of each expert, by name."""
    return {
        name: {r.status for r in statistics.coverage if r.expert == expert}
        for expert, name in enumerate(NAMES)
    }


def test_a_broad_set_covers_every_expert(
    tiny_checkpoint: Make, image: Path, tmp_path: Path
) -> None:
    broad = data(image, mri=6, ct=6, pathology=6, xray=6)
    made = calibrate(tiny_checkpoint(), broad, tmp_path / "stats", samples=24)
    assert statuses(made) == {name: {"covered"} for name in NAMES}
    assert made.samples == dict.fromkeys(sorted(NAMES), 6)
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]
    made.check(read_checkpoint(tiny_checkpoint()))
    with pytest.raises(DataError, match="another checkpoint"):
        made.check(read_checkpoint(tiny_checkpoint("tiny-phi")))
    for record in made.coverage:
        found = made.get(f"decoder.layers.{record.layer}.ffn.experts.{record.expert}.in")
        assert found is not None
        assert found.tokens == record.tokens >= record.needed == 256


def test_more_is_drawn_where_the_first_draw_is_too_small(
    tiny_checkpoint: Make, image: Path, tmp_path: Path
) -> None:
    broad = data(image, mri=30, ct=30, pathology=30, xray=30)
    made = calibrate(tiny_checkpoint(), broad, tmp_path / "stats", samples=12, strict=True)
    status = {(r.layer, r.expert): r.status for r in made.coverage}
    assert set(status.values()) == {"covered", "drew more"}
    assert status[0, 0] == "covered"
    assert status[0, 2] == "drew more"
    assert 12 < sum(made.samples.values()) == len(set(made.source.drawn)) <= 36


def test_an_expert_that_stays_short_borrows(
    tiny_checkpoint: Make, image: Path, tmp_path: Path
) -> None:
    few = data(image, mri=4, ct=4, pathology=3, xray=3)
    made = calibrate(tiny_checkpoint(), few, tmp_path / "stats", samples=14)
    (record,) = (r for r in made.coverage if r.status == "borrowed")
    assert record.pair == (0, 2)
    assert record.tokens < 256 == record.tokens + record.borrowed
    for part in ("in", "hidden"):
        found = made.get(f"decoder.layers.0.ffn.experts.2.{part}")
        assert found is not None
        assert (found.tokens, found.borrowed) == (record.tokens, record.borrowed)
        assert record.tokens < found.weight < 256  # weighted down
    with pytest.raises(VerificationError, match=r"layer 0 pathology \(expert 2: \d+ of 256"):
        calibrate(tiny_checkpoint(), few, tmp_path / "strict", samples=14, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


def test_one_modality_leaves_the_other_experts_data_free(
    tiny_checkpoint: Make, image: Path, tmp_path: Path
) -> None:
    narrow = data(image, ct=40)
    made = calibrate(tiny_checkpoint(), narrow, tmp_path / "stats", samples=30)
    expected = {name: {"data-free"} for name in NAMES} | {"ct": {"covered"}}
    assert statuses(made) == expected
    for expert, name in enumerate(NAMES):
        trusted = made.get(f"decoder.layers.0.ffn.experts.{expert}.in")
        assert (trusted is not None) == (name == "ct")
    with pytest.raises(VerificationError, match="none of its own modality") as caught:
        calibrate(tiny_checkpoint(), narrow, tmp_path / "strict", samples=30, strict=True)
    assert [name in caught.value.what for name in NAMES] == [True, False, True, True]


def test_unlabelled_images_count_for_experts_without_names(
    tiny_checkpoint: Make, image: Path, tmp_path: Path
) -> None:
    samples = [dataclasses.replace(s, modality=None) for s in data(image, ct=40).samples]
    unlabelled = CalibrationData("made", tuple(samples), "ab" * 32)
    checkpoint = tiny_checkpoint(expert_names=())
    made = calibrate(checkpoint, unlabelled, tmp_path / "stats", samples=8, hessians=False)
    assert {r.status for r in made.coverage} == {"covered", "drew more"}
    assert list(made.samples) == ["unknown"]
    assert made.inputs["decoder.head.in"].hessian is None


def test_a_dense_model_has_no_contract(tiny_checkpoint: Make, image: Path, tmp_path: Path) -> None:
    made = calibrate(tiny_checkpoint(dense=True), data(image, ct=2), tmp_path / "stats")
    assert made.coverage == ()
    assert made.inputs["decoder.layers.0.ffn.in"].tokens > 0


def test_an_existing_output_is_refused_at_once(
    tiny_checkpoint: Make, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "stats").write_text("precious")

    def fail(*_: Any) -> None:
        raise AssertionError

    with pytest.raises(InputError, match="exists already"):
        calibrate(tiny_checkpoint(), data(image, ct=1), tmp_path / "stats", progress=fail)
    assert (tmp_path / "stats").read_text() == "precious"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ResourceError("Full.", "Free some.")])
def test_an_interrupted_run_goes_on(
    tiny_checkpoint: Make, image: Path, tmp_path: Path, error: BaseException
) -> None:
    """Interrupted while it borrows, after whole rounds; what is in `work` besides it is kept."""
    few = data(image, mri=4, ct=4, pathology=3, xray=3)
    work = tmp_path / "work"

    def interrupt(*arguments: Any, **options: Any) -> Any:
        if "borrow" in options:
            raise error
        return collect(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medmoe_edge.calibration.run.collect", interrupt)
        with pytest.raises(type(error)):
            calibrate(tiny_checkpoint(), few, tmp_path / "stats", samples=14, work=work)
    assert not (tmp_path / "stats").exists()
    (work / "thesis.txt").write_text("precious")
    steps: list[Any] = []
    calibrate(
        *(tiny_checkpoint(), few, tmp_path / "stats"),
        samples=14,
        work=work,
        progress=lambda *step: steps.append(step),
    )
    assert [path.name for path in work.iterdir()] == ["thesis.txt"]
    calibrate(tiny_checkpoint(), few, tmp_path / "whole", samples=14)
    assert (tmp_path / "stats").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(steps) == 3 * 14  # decoding, the images, and one layer of the pass that borrows


def test_a_run_that_fails_leaves_nothing(
    tiny_checkpoint: Make, image: Path, tmp_path: Path
) -> None:
    bad = data(image, ct=3)
    bad.samples = tuple(dataclasses.replace(s, question="<image>") for s in bad.samples)
    with pytest.raises(InputError, match="question is empty"):
        calibrate(tiny_checkpoint(), bad, tmp_path / "stats")
    assert list(tmp_path.iterdir()) == []
