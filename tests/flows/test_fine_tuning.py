"""Training that starts from a checkpoint: other experts, adapters, routers, people's own lists."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file

from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.config import MoEConfig
from medmoe_edge.data.datasets import LabelledImage, read_labels
from medmoe_edge.errors import CheckpointError, DataError, InputError, ResourceError
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.presets import PRESETS
from medmoe_edge.training import router
from medmoe_edge.training.data import Batches, instructions
from medmoe_edge.training.recipe import PhaseConfig, Recipe, read_recipe
from medmoe_edge.training.report import TrainOptions
from medmoe_edge.training.router import (
    Features,
    fit_router,
    import_into,
    loaded,
    pooled_features,
    settle,
    train_router,
)
from medmoe_edge.training.run import PHASES, check_memory, train

Make = Callable[..., Path]
SIX = ("ct", "dermoscopy", "fundus", "mri", "oct", "xray")
COLOURS = {
    "ct": (190, 0, 0),
    "dermoscopy": (0, 190, 0),
    "fundus": (0, 0, 190),
    "mri": (190, 190, 0),
    "oct": (190, 0, 190),
    "xray": (0, 190, 190),
    "pathology": (0, 0, 0),
}
EXPERTS = ("decoder.layers.*.ffn.experts.*", "decoder.layers.*.ffn.meta.*")
RECIPE = Recipe(
    seed=1,
    router="fitted",
    precision="fp32",
    alignment=PhaseConfig(1, 1e-3, ("projector.*",), optimiser="adamw"),
    instruction=PhaseConfig(1, 1e-3, ("projector.*", "decoder.*"), optimiser="adamw"),
    moe=PhaseConfig(1, 3e-4, EXPERTS, optimiser="adamw"),
)


def labelled(folder: Path, modalities: tuple[str, ...], each: int) -> Path:
    """A dataset folder of images whose colour tells their modality; a tenth is to validate."""
    noise, rows = np.random.default_rng(0), []
    for number in range(each * len(modalities)):
        modality = modalities[number % len(modalities)]
        pixels = noise.integers(0, 60, (28, 28, 3)) + COLOURS[modality]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        split = "val" if number // len(modalities) % 10 == 9 else "train"
        rows.append({"image": f"{number}.png", "modality": modality, "split": split})
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("six"), SIX, 34)  # 204 images


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("few"), SIX, 3)


def run(base: Path, data: Path, out: Path, recipe: Recipe = RECIPE, **options: Any) -> Path:
    return train(recipe, data, out, Progress(disable=True), TrainOptions(base=base, **options))


def routed(checkpoint: Path, items: list[LabelledImage]) -> float:
    """Share of images whose modality the router of a checkpoint finds."""
    read = read_checkpoint(checkpoint)
    assert read.config.moe is not None
    model, names = loaded(read), read.config.moe.expert_names
    batches = Batches(read.config, read.tokenizer.tokenizer, names, 0)
    found = pooled_features(model, read.config.moe.layers, batches, instructions(items))
    found = found.only(found.of_image)
    logits = model.moe_layer(read.config.moe.layers[0]).router_logits(found.pooled)
    return float((logits.argmax(-1) == found.modality).double().mean())


def test_six_modalities_and_six_experts_from_a_phi(
    tiny_checkpoint: Make, six: Path, tmp_path: Path
) -> None:
    import medmoe_edge

    base = tiny_checkpoint("tiny-phi")
    checkpoint = run(base, six, tmp_path / "run")
    read = read_checkpoint(checkpoint)
    assert read.config.moe is not None
    assert read.config.decoder.kind == "phi"
    assert read.config.moe.expert_names == SIX
    assert read.config.moe.num_experts == 6
    assert read.shared_router
    assert (checkpoint / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    held_out = [item for item in read_labels(six / "labels.jsonl") if item.split == "val"]
    assert routed(checkpoint, held_out) > 0.9
    rows = [json.loads(row) for row in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["alignment", "instruction", "moe"]
    assert rows[1]["loss"] < rows[0]["loss"]
    engine = medmoe_edge.load(checkpoint)
    assert engine.expert_names == SIX
    assert engine.ask(six / "0.png", "What modality is used to take this image?").modality


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize("dense", [False, True])
def test_any_preset_with_or_without_experts(
    tiny_checkpoint: Make, few: Path, tmp_path: Path, preset: str, dense: bool
) -> None:
    recipe = replace(RECIPE, moe_layers=(1,) if dense else None)
    checkpoint = run(tiny_checkpoint(preset, dense=dense), few, tmp_path, recipe)
    moe = read_checkpoint(checkpoint).config.moe
    assert moe is not None
    assert moe.expert_names == SIX
    assert moe.layers == ((1,) if dense else (0, 2))


def test_an_expert_starts_as_the_one_of_its_name(
    tiny_checkpoint: Make, few: Path, tmp_path: Path
) -> None:
    """Without an epoch, what was there is there still; new ones are copies of those chosen."""
    base = tiny_checkpoint("tiny")
    still = {phase: replace(getattr(RECIPE, phase), epochs=0) for phase in PHASES}
    checkpoint = run(base, few, tmp_path, replace(RECIPE, **still))
    old, new = dict(read_checkpoint(base)), dict(read_checkpoint(checkpoint))
    names = ("mri", "ct", "pathology", "xray")
    for index, name in enumerate(SIX):
        key = "decoder.layers.2.ffn.experts.{}.up.weight"
        if name in names:
            assert torch.equal(new[key.format(index)], old[key.format(names.index(name))])
        else:
            assert any(torch.equal(new[key.format(index)], old[key.format(n)]) for n in range(4))
    same = [name for name in old if ".experts." not in name and ".router." not in name]
    assert all(torch.equal(new[name], old[name]) for name in same)


def test_adapters_learn_in_place_of_the_decoder_and_are_merged(
    tiny_checkpoint: Make, few: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="needs peft, which the extra train brings")
    base = tiny_checkpoint("tiny-phi")
    whole = run(base, few, tmp_path / "run", lora_rank=2)
    state = load_file(tmp_path / "run" / "instruction.safetensors")
    learning = {name for name in state if name.startswith("optimiser.step.model.decoder.")}
    assert learning
    assert all(".lora_" in name for name in learning)
    assert any(".experts.5.fc2.lora_B" in name for name in learning)
    old, new = dict(read_checkpoint(base)), dict(read_checkpoint(whole))
    frozen = "decoder.embed.weight"
    assert torch.equal(old[frozen], new[frozen])
    name = "decoder.layers.1.attention.q.weight"
    change = new[name].float() - old[name].float()
    assert change.abs().max() > 0
    key = f"module.model.{name.removesuffix('weight')}"
    up, down = (state[f"{key}lora_{part}.default.weight"] for part in "BA")
    merged = state[f"{key}base_layer.weight"] + 16.0 * up @ down  # alpha over rank
    torch.testing.assert_close(new[name].float(), merged, rtol=2**-8, atol=1e-6)
    again = run(base, few, tmp_path / "run", lora_rank=2)
    assert all(torch.equal(tensor, new[name]) for name, tensor in read_checkpoint(again))


def test_lists_without_modality_keep_a_models_experts(
    tiny_checkpoint: Make, few: Path, tmp_path: Path
) -> None:
    """The official list alone: no answer types, no labels. Its images are used in each phase."""
    turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "Yes"}]
    items = [{"image": [f"{n}.png", "0.png"], "conversatons": turns} for n in range(4)]
    asked = few / "asked.json"
    asked.write_text(json.dumps(items))
    checkpoint = run(tiny_checkpoint("tiny"), asked, tmp_path / "run")
    moe = read_checkpoint(checkpoint).config.moe
    assert moe is not None
    assert moe.expert_names == ("mri", "ct", "pathology", "xray")
    old = dict(read_checkpoint(tiny_checkpoint("tiny")))
    name = "decoder.layers.0.ffn.router.weight"
    assert torch.equal(dict(read_checkpoint(checkpoint))[name], old[name])
    with pytest.raises(DataError, match="says its modality"):
        run(tiny_checkpoint("tiny", dense=True), asked, tmp_path / "dense")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"preset": "tiny"}, "says 'preset'"),
        ({"vocab_size": 300}, "says 'vocab_size'"),
        ({"moe_layers": (1,)}, "the checkpoint has them in"),
        ({"modalities": ("ct", "pet")}, "no labelled image of pet"),
    ],
)
def test_what_the_checkpoint_decides(
    tiny_checkpoint: Make, few: Path, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    still = {phase: replace(getattr(RECIPE, phase), epochs=0) for phase in PHASES}
    with pytest.raises(DataError, match=complaint):
        run(tiny_checkpoint("tiny"), few, tmp_path / "run", replace(RECIPE, **still, **change))
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipe_needs_a_checkpoint(few: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no preset") as caught:
        train(read_recipe("fine-tune"), few, tmp_path, Progress(disable=True))
    assert "--from" in caught.value.remedy


def test_what_no_memory_holds_is_refused_at_once() -> None:
    config = PRESETS["med-moe-phi2-2.7b"]
    huge = replace(config, decoder=replace(config.decoder, layers=3200, vocab_size=51200))
    full = replace(RECIPE, instruction=replace(RECIPE.instruction, train=("decoder.*",)))
    with pytest.raises(ResourceError, match="GB are free") as caught:
        check_memory(full, huge)
    assert "--lora" in caught.value.remedy
    check_memory(full, PRESETS["tiny"])


# --- routers ----------------------------------------------------------------------------------


def test_a_fitted_router_tells_what_is_linear_apart() -> None:
    """Held against the true classes of Gaussian clouds, with and without a bias."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 12, generator=generator) * 4
    modality = torch.arange(5).repeat_interleave(40)
    pooled = centres[modality] + torch.randn(200, 12, generator=generator)
    for bias in (True, False):
        router = fit_router(Features(pooled, modality, modality >= 0), 5, bias=bias)
        assert (router(pooled).argmax(-1) == modality).double().mean() > 0.97
        assert (router.bias is not None) == bias
    with pytest.raises(DataError, match="1 of 6 modalities have no labelled image"):
        fit_router(Features(pooled, modality, modality >= 0), 6, bias=True)


@pytest.mark.parametrize(("top_k", "bias"), [(1, True), (2, True), (1, False)])
def test_no_token_that_begins_every_prompt_is_undecided(top_k: int, bias: bool) -> None:
    torch.manual_seed(3)
    tiny = PRESETS["tiny"]
    assert tiny.moe is not None
    model = MedMoE(replace(tiny, moe=replace(tiny.moe, top_k=top_k, router_bias=bias))).eval()
    prefix, others = list(range(5, 45)), list(range(100, 250))

    def chosen(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token in each layer, and by how much the last is above the next."""
        with torch.no_grad():
            logits = model.router_logits(model(model.embed(torch.tensor([ids]))))
        best = logits.sort(descending=True)
        gap = best.values[..., top_k - 1] - best.values[..., top_k]
        return best.indices[..., :top_k].sort().values, gap

    layers = [model.moe_layer(layer).router for layer in tiny.moe.layers]
    weights = [layer.weight.clone() for layer in layers]
    (before, gaps), (elsewhere, _) = chosen(prefix), chosen(others)
    close = int((gaps < 0.09).sum())
    assert close >= 10
    assert settle(model, prefix) == (close, 0)
    after, gaps = chosen(prefix)
    assert torch.equal(after, before)
    assert gaps.min() >= 0.09
    changes = [layer.weight - own for layer, own in zip(layers, weights, strict=True)]
    assert all(torch.allclose(change, changes[0], atol=1e-6) for change in changes)
    assert (chosen(others)[0] == elsewhere).double().mean() > 0.8
    assert settle(model, prefix) == (0, 0)


def test_a_choice_that_would_cost_too_much_stays_close() -> None:
    torch.manual_seed(3)
    model = MedMoE(PRESETS["tiny"])
    moe = PRESETS["tiny"].moe
    assert moe is not None
    layers = [model.moe_layer(layer).router for layer in moe.layers]
    for layer in layers:
        layer.weight.data *= 1e-3  # so that every choice is closer than any little change helps
    weights = [layer.weight.clone() for layer in layers]
    close, left = settle(model, list(range(5, 45)))
    assert 0 < left <= close == 40 * len(layers)
    for layer, own in zip(layers, weights, strict=True):
        assert (layer.weight - own).norm() <= 0.151 * own.norm()


def router_file(folder: Path, experts: int = 4, size: int = 64) -> tuple[Path, torch.Tensor]:
    weight = torch.randn(experts, size)
    torch.save({"fc1.weight": weight, "fc1.bias": torch.ones(experts)}, folder / "phi_router.pth")
    return folder / "phi_router.pth", weight


@pytest.mark.parametrize("in_place", [False, True])
def test_a_router_is_imported_into_every_layer(
    tiny_checkpoint: Make, tmp_path: Path, in_place: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("tiny-phi", expert_names=()), base)
    (base / "generation_config.json").write_text("{}")
    before = dict(read_checkpoint(base))
    file, weight = router_file(tmp_path)
    out = None if in_place else tmp_path / "out"
    order = ("pathology", "CT", "MR", "xray")
    result = import_into(file, base, modalities=order, out=out)
    assert result.checkpoint == (out or base)
    assert result.modalities == ("pathology", "ct", "mri", "xray")
    read = read_checkpoint(result.checkpoint)
    assert read.config.moe is not None
    assert read.config.moe.expert_names == result.modalities
    assert read.shared_router
    assert (result.checkpoint / "generation_config.json").exists()
    for name, tensor in read:
        if ".router.weight" in name:
            assert torch.equal(tensor, weight)
        elif ".router." not in name:
            assert torch.equal(tensor, before[name])
    if not in_place:
        assert all(torch.equal(tensor, before[name]) for name, tensor in read_checkpoint(base))
        with pytest.raises(InputError, match="exists already"):
            import_into(file, base, out=out)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "out", "phi_router.pth"}


def test_a_snapshot_of_links_is_copied_by_what_they_name(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """As the Hub's cache holds it: every file a relative link into a folder of blobs."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "1", tmp_path / "cache" / "blobs"
    shutil.copytree(tiny_checkpoint("tiny-phi"), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    file, weight = router_file(tmp_path)
    out = import_into(file, snapshot, out=tmp_path / "a" / "b" / "out").checkpoint
    assert {path.name for path in out.iterdir()} == {path.name for path in blobs.iterdir()}
    assert not any(path.is_symlink() for path in out.iterdir())
    tensors = dict(read_checkpoint(out))
    assert torch.equal(tensors["decoder.layers.0.ffn.router.weight"], weight)


def test_a_router_that_does_not_fit_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    base = tiny_checkpoint("tiny-phi")
    file, _ = router_file(tmp_path, size=32)
    with pytest.raises(CheckpointError, match=r"4 experts of 32 channels.* has 4 of 64"):
        import_into(file, base, out=tmp_path / "out")
    file, _ = router_file(tmp_path)
    with pytest.raises(InputError, match="2 modalities were named"):
        import_into(file, base, modalities=("ct", "mri"), out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="no experts"):
        import_into(file, tiny_checkpoint("tiny-phi", dense=True), out=tmp_path / "out")
    without = tiny_checkpoint("tiny-phi", router_bias=False, meta_expert=False)
    with pytest.raises(CheckpointError, match="without a bias"):
        import_into(file, without, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_router_cannot_be_fitted_to_is_refused_before_the_work(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_checkpoint("tiny-phi", expert_names=("ct", "mri", "pathology", "xray"))
    data = labelled(tmp_path, ("ct", "mri", "pathology", "xray"), 2)
    monkeypatch.setattr(router, "pooled_features", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="exists already"):
        train_router(base, data, out=tmp_path / "out")
    lines = (data / "labels.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"split": "val"} for line in lines]
    (data / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="labels no image of ct, mri, pathology, xray to train on"):
        train_router(base, data, out=tmp_path / "new")
    rows[0]["image"] = rows[1]["image"]
    (data / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"is labelled .*, and .* as"):
        train_router(base, data, out=tmp_path / "new")


def test_a_router_is_trained_on_labelled_images_alone(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    data = labelled(tmp_path, ("ct", "mri", "pathology", "xray"), 20)
    for names in (("mri", "ct", "pathology", "xray"), ()):
        base = tiny_checkpoint("tiny-phi", expert_names=names)
        result = train_router(base, data, out=tmp_path / str(len(names)))
        assert result.accuracy is not None
        assert (result.images, result.held_out) == (72, 8)
        assert result.accuracy > 0.9
        assert set(result.modalities) == {"ct", "mri", "pathology", "xray"}
        if names:
            assert result.modalities == names
        read, before = read_checkpoint(result.checkpoint), dict(read_checkpoint(base))
        assert read.shared_router
        for name, tensor in read:
            assert ".router." in name or torch.equal(tensor, before[name])
        items = read_labels(data / "labels.jsonl")
        assert routed(result.checkpoint, items) > 0.9
    with pytest.raises(DataError, match=r"name 4 modalities .* 2 experts"):
        train_router(
            tiny_checkpoint("tiny-phi", num_experts=2, expert_names=()), data, out=tmp_path / "x"
        )


def test_moe_settings_of_a_recipe(tiny_checkpoint: Make, few: Path, tmp_path: Path) -> None:
    still = {phase: replace(getattr(RECIPE, phase), epochs=0) for phase in PHASES}
    checkpoint = run(tiny_checkpoint("tiny"), few, tmp_path, replace(RECIPE, **still, top_k=2))
    moe = read_checkpoint(checkpoint).config.moe
    assert moe == MoEConfig((0, 2), num_experts=6, top_k=2, expert_names=SIX)
