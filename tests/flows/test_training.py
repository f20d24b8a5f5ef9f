"""The three phases end to end on a handful of images, and what may be resumed from where."""

import csv
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import ConfigError, DataError, InputError, MissingDependencyError
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.presets import PRESETS
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.training import loop
from medmoe_edge.training.data import IMAGE_ID, Batch, Batches, Conversation
from medmoe_edge.training.initialise import new_dense_model
from medmoe_edge.training.phases import Objective
from medmoe_edge.training.recipe import PhaseConfig, Recipe
from medmoe_edge.training.report import TrainOptions, choose_precision
from medmoe_edge.training.run import read_corpus, train

MODALITIES = ("mri", "ct", "pathology", "xray")
COLOURS = ((0, 0, 0), (190, 0, 0), (0, 190, 0), (0, 0, 190))
CONFIG = replace(
    PRESETS["tiny"],
    decoder=replace(PRESETS["tiny"].decoder, vocab_size=300),
    moe=replace(PRESETS["tiny"].moe, expert_names=MODALITIES),  # type: ignore[type-var]
)
RECIPE = Recipe(
    preset="tiny",
    seed=3,
    modalities=MODALITIES,
    vocab_size=300,
    questions="questions.jsonl",
    validation="questions.jsonl",
    labels="labels.jsonl",
    alignment=PhaseConfig(1, 1e-2, ("projector.*", "decoder.*"), batch_images=4, accumulation=2),
    instruction=PhaseConfig(
        3,
        1e-2,
        ("router.*", "projector.*", "decoder.*"),
        batch_images=8,
        dropout=0.1,
        router_weight=1.0,
    ),
    moe=PhaseConfig(
        2,
        1e-2,
        ("decoder.layers.*.ffn.experts.*", "decoder.layers.*.ffn.meta.*"),
        batch_images=8,
        dropout=0.1,
        labelled_share=0.5,
    ),
)
PHASES = {"alignment": 1, "instruction": 3, "moe": 2}  # epochs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each modality, which their colour tells."""
    folder, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    questions, labels = [], []
    for number in range(8):
        modality = MODALITIES[number % 4]
        pixels = noise.integers(0, 60, (32, 32, 3)) + COLOURS[number % 4]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        common = {"image": f"{number}.png", "modality": modality, "source": "miniature"}
        answer = {"question": "Is it CT?", "answer": "Yes" if modality == "ct" else "No"}
        questions.append(common | answer | {"id": number, "answer_type": "CLOSED", "body": "Head"})
        labels.append(common | {"body": "head", "finding": "nothing", "split": "train"})
    for name, rows in ("questions", questions), ("labels", labels):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run(data: Path, out: Path, recipe: Recipe = RECIPE) -> Path:
    return train(recipe, data, out, Progress(disable=True))


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert run(data, out) == out / "checkpoint"
    return out


def state(out: Path, phase: str) -> dict[str, Tensor]:
    """The model's weights after a phase, by name; the phase-2 router is called `router`."""
    tensors = load_file(out / f"{phase}.safetensors")
    names = [name for name in tensors if name.startswith("module.")]
    return {name.removeprefix("module.").removeprefix("model."): tensors[name] for name in names}


def test_every_epoch_is_logged_and_the_loss_falls(unbroken: Path) -> None:
    rows = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        (phase, epoch) for phase, epochs in PHASES.items() for epoch in range(epochs)
    ]
    assert rows[3]["loss"] < 0.8 * rows[1]["loss"]
    assert rows[5]["loss"] < rows[4]["loss"]
    for row in rows[1:]:
        assert row.keys() >= {"loss", "seconds", "miniature", "modality"}
        assert 0 <= row["miniature"] <= 1
    assert rows[3]["modality"] > 0.6, "colour tells the modality"


def test_each_phase_changes_only_what_it_trains(unbroken: Path) -> None:
    start = new_dense_model(CONFIG, RECIPE.seed).state_dict()
    aligned, instructed, final = (
        state(unbroken, phase) for phase in ("alignment", "instruction", "moe")
    )

    def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        shared = before.keys() & after.keys()
        return {name for name in shared if not torch.equal(before[name], after[name])}

    learning = {name for name in start if not name.startswith("vision.")}
    assert changed(start, aligned) == changed(aligned, instructed) == learning
    assert changed(instructed, final) == set()  # all that phase 3 changes has a new name
    for layer in (0, 2):
        ffn = f"decoder.layers.{layer}.ffn."
        for part in ("weight", "bias"):
            assert torch.equal(final[f"{ffn}router.{part}"], instructed[f"router.{part}"])
        learned = instructed[ffn + "up.weight"]
        assert not torch.equal(final[ffn + "meta.up.weight"], learned)
        assert any(
            not torch.equal(final[f"{ffn}experts.{expert}.up.weight"], learned)
            for expert in range(4)
        )


def test_gradients_accumulate(unbroken: Path) -> None:
    step = "optimiser.step.model.decoder.head.weight"
    assert load_file(unbroken / "alignment.safetensors")[step] == 2  # 4 batches, a step for two
    assert load_file(unbroken / "instruction.safetensors")[step] == 6  # 3 epochs of 2 batches


def test_the_checkpoint_is_an_official_folder(unbroken: Path) -> None:
    checkpoint = read_checkpoint(unbroken / "checkpoint")
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer_file is not None
    assert checkpoint.tokenizer_file.read_bytes() == (unbroken / "tokenizer.json").read_bytes()
    assert checkpoint.shared_router
    final = state(unbroken, "moe")
    model = MedMoE(CONFIG)
    model.load_state_dict({name: tensor.float() for name, tensor in checkpoint})
    for name, tensor in model.state_dict().items():
        if "router" not in name:  # which are settled afterwards, by little
            torch.testing.assert_close(tensor, final[name], rtol=2**-8, atol=0.0)
        elif name.endswith("weight"):
            assert (tensor - final[name]).norm() < 0.2 * final[name].norm()
    ids = torch.tensor([Tokenizer.from_file(checkpoint.tokenizer_file).prefix_ids()])

    def close(weights: dict[str, Tensor]) -> int:
        """Tokens that begin every prompt and hardly prefer their expert."""
        model.load_state_dict(weights)
        with torch.no_grad():
            best = model.eval().router_logits(model(model.embed(ids))).topk(2).values
        return int((best[..., 0] - best[..., 1] < 0.08).sum())

    assert close({name: tensor.float() for name, tensor in checkpoint}) <= close(final) // 4


def broken_off(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """`function`, but the call number `after` ends in an interrupt."""
    calls = iter(range(1, 10_000))

    def wrapped(*args: Any, **options: Any) -> Any:
        if next(calls) == after:
            raise KeyboardInterrupt
        return function(*args, **options)

    return wrapped


@pytest.mark.parametrize("epochs", [2, 5])
def test_a_run_broken_off_after_an_epoch_goes_on(
    unbroken: Path, data: Path, tmp_path: Path, epochs: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_append", broken_off(loop._append, epochs))
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path)
    assert not (tmp_path / "checkpoint").exists()
    run(data, tmp_path)
    assert_same_state(tmp_path, unbroken)
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(rows) == sum(PHASES.values()) - 1, "only epochs that were not done are run again"


@pytest.mark.parametrize("batches", [3, 12], ids=["first of phase 2", "first of phase 3"])
def test_a_run_broken_off_within_an_epoch_goes_on(
    unbroken: Path, data: Path, tmp_path: Path, batches: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "collate", broken_off(Batches.collate, batches))
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path)
    run(data, tmp_path)
    assert_same_state(tmp_path, unbroken)


def assert_same_state(out: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "moe.safetensors") for folder in (out, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_batches_take_one_of_several_numbers_of_image_tokens(unbroken: Path, data: Path) -> None:
    read = read_checkpoint(unbroken / "checkpoint")
    asked = [Conversation(data / f"{n}.png", "ct", (("Is it?", "Yes"),), "x") for n in range(8)]

    def drawn(epoch: int, pools: tuple[int, ...] = (1, 2)) -> list[Batch]:
        batches = Batches(read.config, read.tokenizer.tokenizer, MODALITIES, RECIPE.seed)
        batches.take_pools(pools)
        return list(batches.shuffled(asked, 1, 1, epoch))

    first = drawn(0)
    counts = {(batch.pool, int((batch.text.ids == IMAGE_ID).sum())) for batch in first}
    assert counts == {(1, 4), (2, 1)}
    pools = [batch.pool for batch in first]
    assert [batch.pool for batch in drawn(0)] == pools, "as a resumed run draws them"
    assert [batch.pool for batch in drawn(1)] != pools
    model = MedMoE(read.config)
    for batch in first[:4]:
        assert Objective(model, None, read.config.moe_layers)(batch).isfinite()
    batches = Batches(read.config, read.tokenizer.tokenizer, MODALITIES, RECIPE.seed)
    batches.take_pools((1, 2))
    assert {batch.pool for batch in batches.plain(asked, 2)} == {1}, "scored as the model is"
    with pytest.raises(ConfigError, match=r"pools \[2\] lack 1"):
        batches.take_pools((2,))
    with pytest.raises(ConfigError, match=r"vision\.pool 3 does not divide the 4 features"):
        batches.take_pools((1, 3))


def test_a_run_with_several_numbers_of_image_tokens(data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, pools=(1, 2))
    run(data, tmp_path / "unbroken", recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "collate", broken_off(Batches.collate, 12))
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "broken", recipe)
    run(data, tmp_path / "broken", recipe)
    assert_same_state(tmp_path / "broken", tmp_path / "unbroken")
    assert read_checkpoint(tmp_path / "unbroken" / "checkpoint").config.vision.pool == 1
    for pools in ((), (0, 1)):
        with pytest.raises(ConfigError, match="recipe's pools are"):
            replace(RECIPE, pools=pools)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04pickle", "truncated", {}, {"epoch": "two"}, {"epoch": "1"}],
    ids=["empty", "pickle", "truncated", "no epoch", "a wrong epoch", "another model"],
)
def test_a_damaged_state_is_named(
    unbroken: Path, data: Path, tmp_path: Path, content: bytes | str | dict[str, str]
) -> None:
    path = tmp_path / "alignment.safetensors"
    whole = unbroken / "alignment.safetensors"
    if isinstance(content, dict):
        tensors = load_file(whole) if content != {"epoch": "1"} else {"module.x": torch.zeros(1)}
        save_file(tensors, path, metadata=content or None)
    else:
        path.write_bytes(whole.read_bytes()[:-100] if isinstance(content, str) else content)
    with pytest.raises(DataError, match=r"alignment\.safetensors"):
        run(data, tmp_path)


def test_a_vocabulary_that_no_checkpoint_can_have_is_refused_at_once() -> None:
    for size in (0, 1, 256):
        with pytest.raises(ConfigError, match=f"vocab_size is {size}"):
            replace(RECIPE, vocab_size=size)
    assert replace(RECIPE, vocab_size=257).vocab_size == 257


def test_a_run_is_not_gone_on_with_by_another_recipe(unbroken: Path, data: Path) -> None:
    with pytest.raises(DataError, match="begun by another recipe"):
        run(data, unbroken, replace(RECIPE, seed=4))


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    for name in ("learning_rate", "tower_rate", "matrix_rate", "weight_decay"):
        change: dict[str, Any] = {name: rate}
        with pytest.raises(ConfigError, match="rate below 0, or one that is no number"):
            replace(RECIPE.moe, **change)


def test_a_tower_of_no_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    options = TrainOptions(vision_tower=tmp_path)
    with pytest.raises(DataError, match="no checkpoint to start from"):
        train(RECIPE, data, tmp_path / "run", Progress(disable=True), options)


def test_a_diverged_epoch_is_not_kept(data: Path, tmp_path: Path) -> None:
    """Neither a loss nor weights that are no numbers; what was kept before is gone on with."""
    forward, calls = Objective.forward, iter(range(1, 100))

    def diverging(self: Objective, batch: Batch) -> Tensor:
        loss = forward(self, batch)
        return loss * float("nan") if next(calls) == 8 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "forward", diverging)
        with pytest.raises(DataError, match="diverged: epoch 2 of the phase instruction"):
            run(data, tmp_path)
    assert all(tensor.isfinite().all() for tensor in state(tmp_path, "instruction").values())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [("alignment", 0), ("instruction", 0)]
    objective = torch.nn.Linear(2, 2)
    objective.weight.data[0, 0] = float("inf")
    with pytest.raises(DataError, match="diverged"):
        loop.check_finite("moe", 0, 1.0, objective)


def test_a_picture_of_two_modalities_or_in_two_splits_is_told(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (9, 9)).save(tmp_path / "copy.png")
    row = {"image": "copy.png", "question": "Is it CT?", "answer": "Yes", "modality": "ct"}
    (tmp_path / "held.jsonl").write_text(json.dumps(row))
    recipe = replace(RECIPE, validation="held.jsonl")
    read_corpus(recipe, tmp_path)
    assert not caplog.records
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    read_corpus(recipe, tmp_path)
    assert "1 pictures or patients are learned from and held out too" in caplog.text
    (tmp_path / "held.jsonl").write_text(json.dumps(row | {"modality": "MR"}))
    with pytest.raises(DataError, match=r"copy\.png is labelled mri, and ct as .*1\.png"):
        read_corpus(recipe, tmp_path)


def test_what_is_told(unbroken: Path, data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = TrainOptions(say=lines.append, precision="bf16")
    recipe = replace(RECIPE, instruction=replace(RECIPE.instruction, epochs=1))
    train(recipe, data, tmp_path / "run", Progress(disable=True), options)
    assert re.match(r"Training on cpu \(.*\), in bf16\.", lines[0])
    assert lines[1] == "4 experts: mri, ct, pathology, xray; 8 images to learn from."
    assert lines[2].startswith("alignment 1/1: loss ")
    assert re.match(r"instruction 1/1: loss [\d.]+, miniature [\d.]+%, modality [\d.]+%", lines[3])
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [json.loads(row) for row in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in logged]
    assert rows[0]["modality"] == ""
    kept = tmp_path / "run" / "precision.json"
    with pytest.raises(DataError, match="begun in bf16"):
        choose_precision("fp32", torch.device("cpu"), kept)


def test_precision_is_what_is_faster_and_stays(tmp_path: Path) -> None:
    device = torch.device("cpu")
    chosen = choose_precision("auto", device, tmp_path / "precision.json")
    assert chosen.ratio is not None
    assert chosen.name == ("bf16" if chosen.ratio >= 1.1 else "fp32")
    assert f"in {chosen.name} (bf16 is" in str(chosen)
    assert choose_precision("auto", device, tmp_path / "precision.json") == chosen
    (tmp_path / "precision.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        choose_precision("auto", device, tmp_path / "precision.json")


def test_tensorboard(data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, **{p: replace(getattr(RECIPE, p), epochs=0) for p in PHASES})
    options = TrainOptions(tensorboard=True)
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(MissingDependencyError, match="tensorboard"):
            train(recipe, data, tmp_path, Progress(disable=True), options)
        return
    train(recipe, data, tmp_path, Progress(disable=True), options)
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "nanoo"}, "nano"),
        ({"preset": None}, "names no preset"),
        ({"vocab_size": None}, "fewer than bytes"),
        ({"questions": "nowhere.jsonl"}, "nowhere"),
        ({"alignment": replace(RECIPE.alignment, train=("decoder.layer.*",))}, r"decoder\.layer\."),
        ({"moe": replace(RECIPE.moe, train=("decoder.*.expert.*",))}, r"\.expert\."),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(data, tmp_path / "out", replace(RECIPE, **change))
    assert not (tmp_path / "out" / "alignment.safetensors").exists()


def test_a_folder_that_is_no_checkpoint_is_kept(data: Path, tmp_path: Path) -> None:
    """It is found before an epoch, not where the checkpoint is to be written."""
    mine = tmp_path / "checkpoint" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InputError, match="will not be replaced"):
        run(data, tmp_path)
    assert [*tmp_path.rglob("*.*")] == [mine]
