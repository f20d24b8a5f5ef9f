"""The experiment on the structure's parts, end to end on a handful of images."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.ablation import __main__ as command
from experiments.ablation import run as ablation
from experiments.ablation.run import Options, ablate
from experiments.ablation.variants import applicable, widen
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import DataError, InputError
from medmoe_edge.models.decoder import PhiFeedForward, StableLmFeedForward
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.recipe import PhaseConfig, Recipe
from medmoe_edge.training.router import loaded
from medmoe_edge.training.run import train

MODALITIES = ("mri", "ct", "pathology", "xray")
COLOURS = ((0, 0, 0), (190, 0, 0), (0, 190, 0), (0, 0, 190))
CONFIG = replace(
    PRESETS["tiny"],
    decoder=replace(PRESETS["tiny"].decoder, vocab_size=300, intermediate_size=32),
    moe=replace(PRESETS["tiny"].moe, expert_names=MODALITIES),  # type: ignore[type-var]
)
EVERYTHING = ("*.router.*", "projector.*", "decoder.*", "vision.*")
RECIPE = Recipe(
    preset="miniature",
    seed=3,
    vocab_size=300,
    questions="questions.jsonl",
    validation="questions.jsonl",
    labels="labels.jsonl",
    experts_from="instruction",
    alignment=PhaseConfig(1, 1e-2, ("projector.*",), batch_images=4),
    instruction=PhaseConfig(1, 2e-2, EVERYTHING, batch_images=4, router_weight=1.0),
    moe=PhaseConfig(
        1, 1e-2, ("decoder.layers.*.ffn.experts.*", "decoder.layers.*.ffn.meta.*"), batch_images=4
    ),
)


@pytest.fixture(scope="module", autouse=True)
def _preset() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "miniature", CONFIG)
        patch.setattr(ablation, "ROUNDS", 1)
        patch.setattr(ablation, "TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each modality, which their colour tells: one to train on, one held out."""
    folder, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    questions, labels = [], []
    for number in range(8):
        modality = MODALITIES[number % 4]
        pixels = noise.integers(0, 60, (32, 32, 3)) + COLOURS[number % 4]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        common = {"image": f"{number}.png", "modality": modality, "source": "miniature"}
        answer = {"question": "Is it CT?", "answer": "Yes" if modality == "ct" else "No"}
        questions.append(common | answer | {"id": number, "answer_type": "CLOSED", "body": "Head"})
        split = "train" if number < 4 else "val"
        labels.append(common | {"body": "head", "finding": "nothing", "split": split})
    for name, rows in ("questions", questions), ("labels", labels):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was trained for a moment: an ablation takes its tower and its tokenizer."""
    out = tmp_path_factory.mktemp("run")
    recipe = replace(RECIPE, moe=replace(RECIPE.moe, epochs=0))
    return train(recipe, data, out, Progress(disable=True))


def test_every_variant_is_trained_evaluated_and_told(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = ablate(RECIPE, checkpoint, data, out, Options(), Progress(disable=True))
    assert tuple(row.result.variant for row in made.rows) == applicable(CONFIG)
    told = json.loads((out / "ablation.json").read_text())
    assert told == json.loads(json.dumps(made.to_json()))
    sizes = {row.result.variant: row.result.size for row in made.rows}
    expert, router = 2 * 3 * 64 * 32, 2 * (64 * 4 + 4)  # in two layers
    assert sizes["top-2"].activated == sizes["baseline"].activated + expert
    assert sizes["no-meta"].activated == sizes["baseline"].activated - expert
    assert sizes["dense-total"].total == sizes["baseline"].total - router
    assert made.rows[0].difference == 0
    for row in made.rows:
        assert row.result.scores["all"].exact_match == np.mean(row.result.correct)
        for shares in row.result.routing.values():
            np.testing.assert_allclose(np.sum(shares, -1), 1)
    states = {
        row.result.variant: load_file(out / row.result.variant / "instruction.safetensors")
        for row in made.rows
    }
    router_of = "module.model.decoder.layers.{}.ffn.router.weight"
    first, last = (states["learned-router"][router_of.format(layer)] for layer in CONFIG.moe_layers)
    assert not torch.equal(first, last)  # each its own
    assert states["two-experts"][router_of.format(0)].shape == (2, 64)
    results = {row.result.variant: row.result for row in made.rows}
    assert results["two-experts"].router["labels"].confusion.keys() == set(MODALITIES)
    assert not results["learned-router"].router
    assert not results["dense-activated"].routing


def test_all_variants_see_with_the_tower_of_the_checkpoint(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    chosen = ("baseline", "dense-activated")
    ablate(RECIPE, checkpoint, data, tmp_path, Options(chosen, seed=4), Progress(disable=True))
    config = read_checkpoint(checkpoint)
    tower = loaded(config).vision.state_dict()
    assert tower
    for name in chosen:
        state = load_file(tmp_path / name / "moe.safetensors")
        for key, value in tower.items():
            torch.testing.assert_close(state[f"module.model.vision.tower.{key}"], value)
        told = json.loads((tmp_path / name / "settings.json").read_text())
        assert (told["seed"], told["phases"]["instruction"]["epochs"]) == (4, 1)
    # what all begin with is not another's: phase 1 is trained once
    for options in (Options(("top-2",), seed=5), Options(("top-2",), image_tokens=1, seed=4)):
        with pytest.raises(DataError, match="another recipe, checkpoint or data"):
            ablate(RECIPE, checkpoint, data, tmp_path, options, Progress(disable=True))


def test_the_command_resumes_and_refuses(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "read_recipe", lambda name: RECIPE)
    app = typer.Typer()
    app.command()(command.ablation)
    line = [
        str(checkpoint),
        "--data",
        str(data),
        "-o",
        str(tmp_path / "out"),
        "--variant",
        "baseline",
    ]
    first = CliRunner().invoke(app, [*line, "--json"])
    assert first.exit_code == 0, first.output
    state = tmp_path / "out" / "baseline" / "moe.safetensors"
    written = state.stat().st_mtime_ns
    again = CliRunner().invoke(app, line)
    assert (again.exit_code, state.stat().st_mtime_ns) == (0, written)
    assert "baseline: modality found, labels" in again.stdout
    refused = CliRunner().invoke(app, [*line, "--epochs", "2"])
    assert refused.exit_code == DataError.exit_code
    assert "was made with another recipe" in refused.stderr
    unknown = Options(("top-9",))
    with pytest.raises(InputError, match="no variant 'top-9'"):
        ablate(RECIPE, checkpoint, data, tmp_path, unknown, Progress(disable=True))
    late = replace(RECIPE, experts_from="moe")
    with pytest.raises(DataError, match="begin in phase 3"):
        ablate(late, checkpoint, data, tmp_path, Options(), Progress(disable=True))


@pytest.mark.parametrize(
    ("feed_forward", "kind"), [(StableLmFeedForward, "stablelm"), (PhiFeedForward, "phi")]
)
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_a_widened_layer_computes_the_same(feed_forward: Any, kind: Any, copies: int) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG.decoder, kind=kind, hidden_size=64, intermediate_size=64)
    narrow = feed_forward(config)
    wide = feed_forward(replace(config, intermediate_size=64 * copies))
    widen(narrow, wide, total=2.0)
    x = torch.randn(7, 64)
    torch.testing.assert_close(wide(x), 2 * narrow(x), atol=1e-5, rtol=1e-5)


def test_the_copies_of_a_unit_grow_apart() -> None:
    """Equal copies would get equal gradients and never become two units."""
    torch.manual_seed(0)
    wide = StableLmFeedForward(replace(CONFIG.decoder, intermediate_size=64))
    widen(StableLmFeedForward(CONFIG.decoder), wide, total=2.0)
    wide(torch.randn(7, 64)).square().sum().backward()
    assert wide.gate.weight.grad is not None
    first, second = wide.gate.weight.grad.view(2, 32, 64)
    apart = (first - second).norm(dim=1) / (first + second).norm(dim=1)
    assert apart.median() > 0.1
