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
from experiments.ablation.run import ablate
from experiments.ablation.variants import applicable, widen
from medmoe_edge.errors import DataError, InputError
from medmoe_edge.models.decoder import PhiFeedForward, StableLmFeedForward
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.recipe import PhaseConfig, Recipe
from medmoe_edge.training.run import train

MODALITIES = ("mri", "ct", "pathology", "xray")
COLOURS = ((0, 0, 0), (190, 0, 0), (0, 190, 0), (0, 0, 190))
CONFIG = replace(
    PRESETS["tiny"],
    decoder=replace(PRESETS["tiny"].decoder, vocab_size=300, intermediate_size=32),
    moe=replace(PRESETS["tiny"].moe, expert_names=MODALITIES),  # type: ignore[type-var]
)
EVERYTHING = ("router.*", "projector.*", "decoder.*")
RECIPE = Recipe(
    preset="miniature",
    seed=3,
    vocab_size=300,
    questions="questions.jsonl",
    validation="questions.jsonl",
    labels="labels.jsonl",
    alignment=PhaseConfig(0, 1e-2, ("projector.*",)),
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
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run; an ablation needs no more than its second phase."""
    out = tmp_path_factory.mktemp("run")
    train(replace(RECIPE, moe=replace(RECIPE.moe, epochs=0)), data, out, Progress(disable=True))
    return out


def test_every_variant_is_trained_evaluated_and_told(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = ablate(RECIPE, run, data, out, progress=Progress(disable=True))
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


def test_experts_that_begin_in_phase_2_are_compared_from_there(data: Path, tmp_path: Path) -> None:
    train_all = ("decoder.*", "*.router.*", "projector.*")
    recipe = replace(
        RECIPE,
        experts_from="instruction",
        alignment=replace(RECIPE.alignment, epochs=1),
        instruction=replace(RECIPE.instruction, train=train_all),
    )
    train(recipe, data, tmp_path / "run", Progress(disable=True))
    chosen = ("baseline", "two-experts", "learned-router", "dense-activated")

    def made(folder: str, seed: int | None = None) -> dict[str, Any]:
        found = ablate(
            *(recipe, tmp_path / "run", data, tmp_path / folder),
            variants=chosen,
            seed=seed,
            progress=Progress(disable=True),
        )
        return {row.result.variant: row.result for row in found.rows}

    results = made("out")
    assert tuple(results) == chosen
    states = {
        name: load_file(tmp_path / "out" / name / "instruction.safetensors") for name in chosen
    }
    router = "module.model.decoder.layers.{}.ffn.router.weight"
    first, last = (states["learned-router"][router.format(layer)] for layer in CONFIG.moe_layers)
    assert not torch.equal(first, last)  # each its own
    assert states["two-experts"][router.format(0)].shape == (2, 64)
    assert results["two-experts"].router["labels"].confusion.keys() == set(MODALITIES)
    assert not results["learned-router"].router
    assert not results["dense-activated"].routing
    other = made("again", seed=4)
    assert other["baseline"].settings["seed"] == 4
    assert (tmp_path / "again" / "baseline" / "moe.safetensors").exists()


def test_the_command_resumes_and_refuses(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "read_recipe", lambda name: RECIPE)
    app = typer.Typer()
    app.command()(command.ablation)
    line = [str(run), "--data", str(data), "-o", str(tmp_path / "out"), "--variant", "baseline"]
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
    with pytest.raises(InputError, match="no variant 'top-9'"):
        ablate(RECIPE, run, data, tmp_path, variants=("top-9",), progress=Progress(disable=True))


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
