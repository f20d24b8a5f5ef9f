"""Fewer image tokens: squares of features averaged, the same in torch, graphs and bundles."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_engine import random_image

from experiments import curves
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.checkpoint.reader import (
    Checkpoint,
    cut_checkpoint,
    cut_like,
    read_checkpoint,
    with_all_tokens,
    with_tokens,
    write_checkpoint,
)
from medmoe_edge.config import VisionConfig
from medmoe_edge.data.datasets import Example
from medmoe_edge.device.estimate import PlanOptions, fit, plan
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import ConfigError, InputError
from medmoe_edge.evaluation.metrics import Fidelity, Flips, Share
from medmoe_edge.evaluation.quick import verify_quick
from medmoe_edge.evaluation.record import AnswersRecord, read_record
from medmoe_edge.evaluation.report import render_report
from medmoe_edge.evaluation.verify import Data, Verification, verify
from medmoe_edge.export import build
from medmoe_edge.models.med_moe import pooled_features
from medmoe_edge.presets import PRESETS
from medmoe_edge.render.verification import show_verification
from medmoe_edge.runtimes.costs import vision_operations, vision_weights
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime
from medmoe_edge.runtimes.torch.eager import EagerRuntime
from medmoe_edge.training.initialise import random_tensors

Make = Callable[..., Path]
GRIDS = {  # of 4 x 4 features
    "clip": dataclasses.replace(PRESETS["tiny"].vision, image_size=56),
    "siglip": dataclasses.replace(
        PRESETS["tiny-qwen"].vision, image_size=48, select_feature="cls_patch"
    ),
    "efficientnet-lite": VisionConfig(
        kind="efficientnet-lite",
        image_size=128,
        feature_size=320 + 4 * 112,
        pixel_mean=(127.0,) * 3,
        pixel_std=(128.0,) * 3,
        variant="lite0",
    ),
}


@pytest.fixture(scope="module")
def made(
    tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Checkpoint]:
    """A random checkpoint whose tower of a kind sees 4 x 4 features."""
    root = tmp_path_factory.mktemp("grids")

    def make(kind: str) -> Checkpoint:
        if not (root / kind).exists():
            base = read_checkpoint(tiny_checkpoint()).config
            config = dataclasses.replace(base, vision=GRIDS[kind])
            tensors = (
                (name, tensor if "norm" in name else tensor * 8)
                for name, tensor in random_tensors(config, 1)
            )
            tokenizer = tiny_checkpoint() / "tokenizer.json"
            write_checkpoint(root / kind, config, tensors, tokenizer_file=tokenizer)
        return read_checkpoint(root / kind)

    return make


def exported(checkpoint: Checkpoint, folder: Path, precision: Any = "fp32") -> Bundle:
    options = build.BuildOptions(precision=precision, name="tiny")
    return Bundle.open(build.export_bundle(checkpoint, folder, options))


# --- what is computed ---------------------------------------------------------------------------


def test_squares_of_neighbours_are_averaged() -> None:
    features = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))
    grid = features.reshape(2, 6, 6, 5)
    for pool in (2, 3):
        found = pooled_features(features, pool).reshape(2, 6 // pool, 6 // pool, 5)
        for row, column in np.ndindex(6 // pool, 6 // pool):
            top, left = pool * row, pool * column
            square = grid[:, top : top + pool, left : left + pool].mean((1, 2))
            torch.testing.assert_close(found[:, row, column], square)
    assert pooled_features(features, 1) is features


@pytest.mark.parametrize(("kind", "tokens"), [*((kind, 4) for kind in GRIDS), ("clip", 1)])
def test_the_bundle_equals_torch(
    made: Callable[[str], Checkpoint], tmp_path: Path, kind: str, tokens: int
) -> None:
    checkpoint = with_tokens(made(kind), tokens)
    side = checkpoint.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    reference = EagerRuntime(checkpoint)
    expected = reference.encode_image(pixels)
    assert expected.shape == (tokens, 64)
    bundle = exported(checkpoint, tmp_path / "bundle")
    assert bundle.config.vision.image_tokens == tokens
    for runtime in (OrtRuntime(bundle), TorchBundleRuntime(bundle, "cpu")):
        found = runtime.encode_image(pixels)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        logits = [
            each.step(image, each.new_cache(tokens)).logits
            for each, image in ((runtime, found), (reference, expected))
        ]
        np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)


def test_a_question_takes_fewer_positions(
    made: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    whole = load(exported(made("clip"), tmp_path / "whole").folder)
    fewer = load(exported(with_tokens(made("clip"), 4), tmp_path / "fewer").folder)
    assert whole.prompt_tokens("Where?") - fewer.prompt_tokens("Where?") == 16 - 4
    assert fewer.ask(random_image(), "Where?", max_new_tokens=2).modality == fewer.modality(
        random_image()
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_all_tokens_are_the_same_bytes(
    made: Callable[[str], Checkpoint], tmp_path: Path, precision: str
) -> None:
    without = exported(made("clip"), tmp_path / "without", precision)
    all_of_them = exported(with_tokens(made("clip"), 16), tmp_path / "all", precision)
    assert without.sha256 == all_of_them.sha256
    assert "pool" not in without.manifest["config"]["vision"]


# --- what is refused ----------------------------------------------------------------------------


def test_numbers_that_no_squares_give(tiny_checkpoint: Make) -> None:
    clip = PRESETS["med-moe-stablelm-1.6b"].vision
    assert list(clip.token_counts) == [576, 144, 64, 36, 16, 9, 4, 1]
    assert clip.with_tokens(144).pool == 2
    with pytest.raises(InputError, match="576 features cannot be averaged into 100") as caught:
        clip.with_tokens(100)
    assert "576, 144, 64, 36" in caught.value.remedy
    siglip = PRESETS["tiny-qwen"].vision  # its first feature is dropped: no square is left
    with pytest.raises(InputError) as caught:
        siglip.with_tokens(2)
    assert caught.value.remedy == "It can have: 8."
    with pytest.raises(ConfigError, match=r"vision\.pool 5 does not divide the 576 features"):
        dataclasses.replace(clip, pool=5)
    with pytest.raises(InputError):
        with_tokens(read_checkpoint(tiny_checkpoint()), 3)


# --- the reference ------------------------------------------------------------------------------


def test_a_checkpoint_with_the_tokens_of_a_bundle(made: Callable[[str], Checkpoint]) -> None:
    source = made("clip")
    fewer = with_tokens(cut_checkpoint(source, ["xray", "ct"]), 4)
    reference = cut_like(source, fewer.config)
    assert reference.config == cut_like(fewer, fewer.config).config == fewer.config
    assert reference.sha256() == source.sha256()
    every = with_all_tokens(reference)
    assert every is not None
    assert every.config == cut_checkpoint(source, ["xray", "ct"]).config
    assert with_all_tokens(every) is None
    assert with_all_tokens(source) is None


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Questions about noise, without answers."""
    noise, examples = np.random.default_rng(0), []
    folder = tmp_path_factory.mktemp("noise")
    for number in range(12):
        image = folder / f"{number}.png"
        Image.fromarray(noise.integers(0, 256, (20, 20, 3), np.uint8)).save(image)
        kind, modality = ("OPEN", "ct") if number % 2 else ("CLOSED", "xray")
        rest: tuple[Any, ...] = ("", kind, modality, None, None, "test")
        examples.append(Example(str(number), image, f"What is {number}?", *rest))
    return examples


def answers(bundle: Bundle, asked: Sequence[Example]) -> list[str]:
    engine = load(bundle.folder, allow_repetition=True)
    return [engine.ask(each.image, each.question, max_new_tokens=32).text for each in asked]


@pytest.fixture(scope="module")
def proven(
    made: Callable[[str], Checkpoint],
    asked: list[Example],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Verification, Fidelity, dict[str, Flips]]:
    """A bundle with a quarter of the tokens, verified, and the flips counted by hand.

    The first half of the known answers is what the checkpoint says with all of its tokens, the
    second what it says with a quarter.
    """
    folder, source = tmp_path_factory.mktemp("proven"), made("clip")
    fewer = exported(with_tokens(source, 4), folder / "fewer")
    before = answers(exported(source, folder / "whole"), asked)
    after = answers(fewer, asked)
    right = [*before[:6], *after[6:]]
    known = [
        dataclasses.replace(each, answer=answer) for each, answer in zip(asked, right, strict=True)
    ]
    counted: dict[str, Flips] = {}
    for name in ("all", "ct", "xray", "OPEN", "CLOSED"):
        own = [
            i for i, each in enumerate(asked) if name in ("all", each.modality, each.answer_type)
        ]
        changed = [i for i in own if before[i] != after[i]]
        lost = sum(i < 6 and before[i] != "" for i in changed)
        gained = sum(i >= 6 and after[i] != "" for i in changed)
        counted[name] = Flips(Share.of(len(changed), len(own)), lost, gained)
    found = verify(fewer.folder, source, Data("noise", known), inputs=known[:2])
    assert isinstance(found.record, AnswersRecord)
    return found, found.record.figures, counted


def test_flips_are_told_in_both_directions(
    proven: tuple[Verification, Fidelity, dict[str, Flips]],
) -> None:
    _, figures, counted = proven
    reduction = figures.reduction
    assert reduction is not None
    assert reduction.image_tokens == 16
    assert reduction.flips == counted["all"]
    assert reduction.flips.lost > 0
    assert reduction.flips.gained > 0
    assert reduction.by_modality == {name: counted[name] for name in ("ct", "xray")}
    assert reduction.by_answer_type == {name: counted[name] for name in ("CLOSED", "OPEN")}
    assert reduction.answers.answer_agreement.count == 12 - reduction.flips.changed.count
    accuracy = reduction.answers.accuracy
    assert accuracy is not None
    gap = reduction.flips.gained - reduction.flips.lost
    assert accuracy.difference * accuracy.n == pytest.approx(gap)


def test_quantisation_is_held_against_as_few_tokens(
    proven: tuple[Verification, Fidelity, dict[str, Flips]],
) -> None:
    found, figures, _ = proven
    assert figures.overall.answer_agreement.share == 1
    assert figures.overall.kl.mean < 1e-6
    assert figures.routing is not None
    assert figures.routing.flips.count == 0
    assert figures.vision.cosine_mean == pytest.approx(1)
    assert found.record is not None
    gate = found.record.gate("whole_answer_agreement")
    assert gate.bound == found.record.gate("answer_agreement").bound
    assert gate.verdict == "failed"
    assert found.record.gate("answer_agreement").verdict == "not decided"
    error = found.error()
    assert error is not None
    assert "answers as with all image tokens" in error.what
    assert error.remedy == "Do not use it: export again with more image tokens."


def test_flips_are_shown_and_kept(
    proven: tuple[Verification, Fidelity, dict[str, Flips]], capsys: pytest.CaptureFixture[str]
) -> None:
    found, figures, counted = proven
    show_verification(found)
    shown = capsys.readouterr().out
    assert "with all 16 image tokens" in shown
    rows = [line.split() for line in shown.splitlines()]
    for name in ("ct", "closed"):
        flips = counted[name.upper() if name == "closed" else name]
        assert any(
            row[:3] == [name, "6", str(flips.changed.count)]
            and row[-2:] == [str(flips.lost), str(flips.gained)]
            for row in rows
        )
    page = render_report(found)
    assert "Fewer image tokens" in page
    assert "which has 16" in page
    kept = read_record(Bundle.open(found.bundle.folder))
    assert isinstance(kept, AnswersRecord)
    assert kept.figures == figures
    json.dumps(found.to_json(), allow_nan=False)


def test_what_travels_is_of_as_few_tokens(
    proven: tuple[Verification, Fidelity, dict[str, Flips]],
) -> None:
    quick = verify_quick(proven[0].bundle.folder)
    assert isinstance(quick.figures, Fidelity)
    assert quick.figures.overall.answer_agreement.share == 1
    assert quick.figures.reduction is None


def test_with_all_tokens_there_is_no_other_reference(
    tiny_bundle: Make, tiny_checkpoint: Make, asked: list[Example], tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle(), tmp_path / "bundle")
    found = verify(tmp_path / "bundle", tiny_checkpoint(), Data("noise", asked[:1]))
    assert isinstance(found.record, AnswersRecord)
    assert found.record.figures.reduction is None
    assert "reduction" not in found.record.figures.to_json()
    assert not any(gate.name.startswith("whole_") for gate in found.record.gates)


# --- forecasts ----------------------------------------------------------------------------------


def test_the_tower_costs_the_same(made: Callable[[str], Checkpoint]) -> None:
    config = made("clip").config
    fewer = with_tokens(made("clip"), 4).config
    assert vision_weights(fewer) == vision_weights(config)
    width, size = config.vision.feature_size, config.decoder.hidden_size
    projector = 2 * (16 - 4) * (width * size + size**2)
    assert vision_operations(config) - vision_operations(fewer) == projector


def test_a_plan_of_fewer_tokens() -> None:
    model = "med-moe-stablelm-1.6b"
    usual, fewer = (
        plan(model, PlanOptions("cpu", "int8", image_tokens=count)) for count in (None, 144)
    )
    assert usual.prompt_tokens - fewer.prompt_tokens == 576 - 144
    (before,), (after,) = usual.forecasts, fewer.forecasts
    assert after.first_token < before.first_token
    assert after.memory_run < before.memory_run
    assert after.weights == before.weights
    with pytest.raises(InputError, match="cannot be averaged into 100"):
        plan(model, PlanOptions("cpu", image_tokens=100))


def test_a_fit_names_a_number_that_meets_the_latency() -> None:
    model, latency = "med-moe-stablelm-1.6b", 6.0
    late = fit(model, PlanOptions("cpu"), latency)
    error = late.error()
    assert error is not None
    assert f"{late.image_tokens} image tokens (export --image-tokens)" in error.remedy
    assert late.image_tokens == 144
    met = fit(model, PlanOptions("cpu", image_tokens=144), latency)
    assert met.error() is None
    assert met.image_tokens == 144
    assert "--image-tokens 144" in met.commands[0]


def test_the_curves_of_a_model(tiny_checkpoint: Make, asked: list[Example], tmp_path: Path) -> None:
    lines = [
        {"image": str(each.image), "question": each.question, "answer": "No"} for each in asked[:2]
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = [str(tiny_checkpoint()), str(tmp_path / "asked.jsonl"), "-o", str(tmp_path / "out")]
    curves.main(given)
    file = tmp_path / "out" / "curve.json"
    whole, fewer = json.loads(file.read_text())
    assert (whole["form"], fewer["form"]) == ("4", "1")
    assert whole["cache_bytes"] - fewer["cache_bytes"] == 3 * 4 * 2 * 3 * 64  # fp32, 3 layers of 64
    assert whole["flips"] is None
    assert fewer["flips"]["changed"]["total"] == 2
    assert fewer["prefill"] > 0
    curves.main([given[0], given[1], "1", "int8", "delta:bits=4", "int4", *given[2:]])
    rows = json.loads(file.read_text())
    assert rows[:2] == [whole, fewer]  # not repeated
    int8, delta, int4 = (row["expert_bytes"] for row in rows[2:])
    assert [row["form"] for row in rows[2:]] == ["int8", "delta:bits=4", "int4"]
    assert int8 == whole["expert_bytes"] > delta
    assert int8 > int4


# --- the command line ---------------------------------------------------------------------------


def test_the_command_line(
    run: Callable[..., Any], made: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    source = str(made("clip").folder)
    result = run("export", source, "--fp32", "--image-tokens", "4")
    assert result.exit_code == 0
    bundle = tmp_path / "clip-4-tokens-fp32"
    assert "4 image tokens, averaged from 16" in run("inspect", str(bundle)).stdout
    random_image_file = tmp_path / "scan.png"
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(random_image_file)
    asked = run("ask", str(random_image_file), "Where?", "--model", str(bundle), "--json")
    assert asked.exit_code == 0
    for arguments, what in (
        (("export", source, "--image-tokens", "5"), "It can have: 16, 4, 1."),
        (("export", source, "--image-tokens", "4", "--stats", "some.stats"), "image tokens are"),
        (("export", "modality-nano", "--image-tokens", "4"), "--image-tokens"),
        (
            ("export", str(bundle), "--target", "tensorrt-rtx", "--image-tokens", "4"),
            "is a bundle",
        ),
        (("plan", str(bundle), "--device", "cpu", "--image-tokens", "4"), "is a bundle"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2, arguments
        assert what in refused.stderr, arguments
