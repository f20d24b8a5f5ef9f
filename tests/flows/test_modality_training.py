"""MedMoE's training on a handful of images, and what its batches are made of."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file

from medmoe_edge.config_contrastive import ModalityConfig, read_scores
from medmoe_edge.contrastive.engine import load_modality
from medmoe_edge.contrastive.text import ModalityTokenizer
from medmoe_edge.data.captions import Captioned, GroundedPhrase
from medmoe_edge.data.datasets import LabelledImage
from medmoe_edge.errors import ConfigError, DataError, ImageError, InputError
from medmoe_edge.models.contrastive import UNLABELLED, ImageFeatures, TextFeatures, grounding_loss
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.training import contrastive as modality_batches
from medmoe_edge.training import loop
from medmoe_edge.training.contrastive import (
    VIEW_ALONE,
    ModalityBatches,
    ModalityObjective,
    ModalityRecipe,
    Told,
    coarser,
    hold_out,
    is_modality_recipe,
    read_modality_corpus,
    read_modality_recipe,
    some_phrases,
    train_modality,
    train_word_pieces,
    validation_scores,
)
from medmoe_edge.training.data import augment
from medmoe_edge.training.initialise import random_modality_model
from medmoe_edge.training.loop import make_optimisers, prepare_parameters
from medmoe_edge.training.recipe import Schedule
from medmoe_edge.training.report import TrainOptions

TINY = MODALITY_PRESETS["modality-tiny"]
CONFIG: ModalityConfig = replace(
    TINY, text=replace(TINY.text, vocab_size=400), modalities=("ct", "mri")
)
COLOURS = {
    ("ct", "round"): (200, 30, 30),
    ("ct", "flat"): (30, 200, 30),
    ("mri", "round"): (30, 30, 200),
    ("mri", "flat"): (200, 200, 200),
}
RECIPE = ModalityRecipe(
    preset="miniature",
    seed=3,
    questions="questions.jsonl",
    labels="labels.jsonl",
    schedule=Schedule(3, 3e-3, ("*",), tower_rate=1.0, batch_images=6, dropout=0.1),
    hold_out=4,
    boxes="boxes.json",
)


@pytest.fixture(scope="module", autouse=True)
def _preset() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODALITY_PRESETS, "miniature", CONFIG)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each modality and finding, which their colour tells, and two questions."""
    folder, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    labels, questions = [], []
    for number in range(16):
        modality, finding = list(COLOURS)[number % 4]
        pixels = noise.integers(0, 40, (32, 32, 3)) + COLOURS[modality, finding]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        common = {"image": f"{number}.png", "modality": modality, "body": "head", "source": "few"}
        labels.append(common | {"finding": finding, "split": "train"})
        if number < 2:
            labels.append(common | {"finding": finding, "split": "val"})
        elif number < 4:
            asked = {"id": number, "question": "Is there a nodule?", "answer": "Yes"}
            questions.append(common | asked | {"answer_type": "CLOSED", "modality": None})
    boxes = {f"{n}.png": [{"label": "Nodule", "xywh": [2, 8, 12, 12]}] for n in range(16)}
    (folder / "boxes.json").write_text(json.dumps(boxes))
    for name, rows in ("questions", questions), ("labels", labels):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run(data: Path, out: Path, recipe: ModalityRecipe = RECIPE) -> Path:
    return train_modality(recipe, data, out, Progress(disable=True))


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert run(data, out) == out / "checkpoint"
    return out


def test_the_loss_falls_and_every_epoch_is_logged(unbroken: Path) -> None:
    rows = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[2]["loss"] < 0.9 * rows[0]["loss"]
    for row in rows:
        assert row.keys() >= {"seconds", "modality", "head ct"}, "there is one val image of mri"


def test_an_image_of_no_known_modality_counts_for_its_finding_alone(
    data: Path, batches: ModalityBatches
) -> None:
    def labelled(modality: str) -> list[LabelledImage]:
        findings = ("round", "flat")
        return [
            LabelledImage(data / f"{n}.png", modality, "head", finding, "few", "val")
            for n, finding in enumerate(findings)
        ]

    objective = ModalityObjective(random_modality_model(CONFIG, 0)).eval()
    known = validation_scores(objective, labelled("ct"), batches)
    mixed = validation_scores(objective, [*labelled("ct"), *labelled("oct")], batches)
    assert mixed.keys() == {"modality", "head ct", "head oct"}
    assert known.items() <= mixed.items()
    assert validation_scores(objective, labelled("oct"), batches).keys() == {"head oct"}


def test_an_epoch_is_kept_though_its_validation_fails(data: Path, tmp_path: Path) -> None:
    """A validation picture is damaged after training has begun, and mended for the second run."""
    copy, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, copy)
    row = {"image": "held.png", "modality": "mri", "body": "head", "split": "val"}
    with (copy / "labels.jsonl").open("a") as file:
        file.writelines("\n" + json.dumps(row | {"finding": each}) for each in ("flat", "round"))
    (copy / "held.png").write_bytes(b"no picture")
    with pytest.raises(ImageError):
        run(copy, out)
    assert not (out / "log.jsonl").exists()
    shutil.copyfile(copy / "6.png", copy / "held.png")
    run(copy, out)
    logged = [json.loads(row)["epoch"] for row in (out / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2]


def test_the_checkpoint_is_whole_and_has_scores(unbroken: Path, data: Path) -> None:
    engine = load_modality(unbroken / "checkpoint")
    assert engine.config == CONFIG
    assert engine.scores == read_scores(unbroken / "checkpoint")
    assert 1 <= engine.scores.temperature <= 200
    assert 0 < engine.scores.entropy_limit <= np.log(2) + 1e-6
    found = engine.classify(data / "0.png", ["round", "flat"])
    assert sum(found.scores.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_broken_off_goes_on(
    unbroken: Path, data: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = loop._append, iter(range(1, 100))

    def broken(*arguments: Any) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt
        append(*arguments)

    monkeypatch.setattr(loop, "_append", broken)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path)
    assert not (tmp_path / "checkpoint").exists()
    run(data, tmp_path)
    ours, theirs = (load_file(f / "alignment.safetensors") for f in (tmp_path, unbroken))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("recipe", {"schedule": replace(RECIPE.schedule, learning_rate=1e-3)}),
        ("labels.jsonl", ("flat", "oval")),
        ("questions.jsonl", ("nodule", "mass")),
        ("boxes.json", ("[2, 8", "[3, 8")),
    ],
)
def test_a_run_is_not_gone_on_with_by_another_recipe_or_on_other_data(
    unbroken: Path, data: Path, tmp_path: Path, file: str, change: Any
) -> None:
    out, copy, recipe = tmp_path / "run", tmp_path / "data", RECIPE
    shutil.copytree(unbroken, out)
    shutil.copytree(data, copy)
    if isinstance(change, dict):
        recipe = replace(RECIPE, **change)
    else:
        (copy / file).write_text((copy / file).read_text().replace(*change))
    before = (out / "checkpoint" / "config.json").stat().st_mtime_ns
    with pytest.raises(DataError, match="begun by another recipe"):
        run(copy, out, recipe)
    assert (out / "checkpoint" / "config.json").stat().st_mtime_ns == before
    (out / "alignment.safetensors").unlink()  # no epoch is done: it may become another's
    begun = (out / "tokenizer.json").stat().st_mtime_ns
    run(copy, out, recipe)
    assert (out / "tokenizer.json").stat().st_mtime_ns != begun
    assert len((out / "log.jsonl").read_text().splitlines()) == RECIPE.schedule.epochs


def test_what_is_held_out_is_learned_from_nowhere(data: Path, tmp_path: Path) -> None:
    """Not under another name in the questions, either."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    rows = [json.loads(row) for row in (tmp_path / "labels.jsonl").read_text().splitlines()]
    rows = [row | {"split": "train"} for row in rows if row["split"] == "train"]
    rows[0]["split"] = "val"
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    held = read_modality_corpus(replace(RECIPE, questions=None), tmp_path).held_out
    for number, image in enumerate((tmp_path / "0.png", held[0].image, tmp_path / "1.png")):
        shutil.copyfile(image, tmp_path / f"asked{number}.png")
    asked = {"question": "Is there a nodule?", "answer": "Yes", "body": "head"}
    lines = [json.dumps(asked | {"image": f"asked{number}.png"}) for number in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    corpus = read_modality_corpus(RECIPE, tmp_path)
    learned = [item.image.name for item in corpus.captioned]
    assert [name for name in learned if name.startswith("asked")] == ["asked2.png"]
    assert "0.png" not in learned
    assert not {item.image.name for item in corpus.held_out} & {*learned}
    (tmp_path / "asked2.png").unlink()
    with pytest.raises(DataError, match=r"the image .*asked2\.png does not exist"):
        run(tmp_path, tmp_path / "run")


def test_options_that_a_modality_moe_does_not_have(data: Path, tmp_path: Path) -> None:
    for options in (
        TrainOptions(base=data),
        TrainOptions(lora_rank=4),
        TrainOptions(vision_tower=data),
    ):
        with pytest.raises(InputError, match="starts from nothing"):
            train_modality(RECIPE, data, tmp_path / "out", Progress(disable=True), options)


def test_a_share_that_leaves_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hold_out is 1"):
        replace(RECIPE, hold_out=1)
    recipe = json.dumps(read_modality_recipe("modality-nano").to_json() | {"hold_out": 0})
    (tmp_path / "mine.json").write_text(recipe, encoding="utf-8-sig")  # as Windows saves it
    with pytest.raises(DataError, match=r"mine\.json'.*hold_out is 0"):
        read_modality_recipe(str(tmp_path / "mine.json"))


def test_a_shared_expert_trains_too(data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, shared_expert=True, schedule=replace(RECIPE.schedule, epochs=1))
    assert load_modality(run(data, tmp_path, recipe)).config.experts == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "nano"}, "modality-nano"),
        ({"hold_out": 5}, "hold_out"),
        ({"labels": "nowhere.jsonl"}, "nowhere"),
        ({"schedule": replace(RECIPE.schedule, train=("visoin.*",))}, "visoin"),
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


def test_the_shipped_recipes_differ_in_the_experts_alone() -> None:
    recipe, shared = map(read_modality_recipe, ("modality-nano", "modality-nano-shared"))
    assert shared == replace(recipe, shared_expert=True)
    assert recipe.model_config() == MODALITY_PRESETS["modality-nano"]
    assert is_modality_recipe("modality-nano")
    assert not is_modality_recipe("nano")


# --- batches ----------------------------------------------------------------------------------


@given(
    st.lists(st.text("abc", min_size=1), min_size=1, max_size=6, unique=True), st.integers(0, 999)
)
def test_what_is_said_is_known(phrases: list[str], seed: int) -> None:
    said, text = some_phrases(phrases, random.Random(seed))
    assert 1 <= len(said) == len(set(said)) <= len(phrases)
    assert set(said) <= set(phrases)
    for phrase in said:
        assert phrase in text


def test_a_finding_is_named_alone_and_in_many_ways() -> None:
    order = random.Random(0)
    told = Counter(some_phrases(("chest ct", "mass"), order)[1] for _ in range(4000))
    assert told["chest ct"] / 4000 == pytest.approx(VIEW_ALONE, abs=0.02)
    assert told["mass"] / 4000 == pytest.approx(0.45, abs=0.03)
    assert {"chest ct, mass", "mass, chest ct", "mass on chest ct"} < told.keys()


@pytest.fixture(scope="module")
def batches(data: Path) -> ModalityBatches:
    file = data / "tokenizer.json"
    train_word_pieces(["head ct showing round, flat", "head mri on nodule"], 400, file)
    grounded = [GroundedPhrase(data / "0.png", "nodule", ((8.0, 16.0, 8.0, 4.0),))]
    return ModalityBatches(CONFIG, ModalityTokenizer.from_file(file, CONFIG.text), grounded, seed=1)


def captioned(data: Path) -> list[Captioned]:
    return [
        Captioned(data / "0.png", ("head ct", "round"), "ct", "few"),
        Captioned(data / "1.png", ("head ct", "flat", "nodule"), "ct", "few"),
        Captioned(data / "2.png", ("head mri", "round"), "mri", "few"),
        Captioned(data / "3.png", ("head",), None, "few"),
    ]


def test_a_text_fits_each_image_of_which_all_it_says_is_known(
    data: Path, batches: ModalityBatches
) -> None:
    items = captioned(data)
    said = [("round",), ("head ct", "nodule"), ("head mri", "round"), ("head",)]
    told = [Told(item, own, ", ".join(own)) for item, own in zip(items, said, strict=True)]
    batch = batches.collate(told, torch.Generator().manual_seed(0))
    assert batch.fits.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [True, False, True, False],
        [False, False, False, True],
    ]
    assert batch.modality.tolist() == [0, 0, 1, UNLABELLED]
    assert batch.pixels.shape == (4, 3, 32, 32)
    assert batch.texts.ids.shape == batch.texts.words.shape == batch.texts.seen.shape
    assert batch.grounding is None


def test_a_box_moves_with_its_image(
    data: Path, batches: ModalityBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tilted(pixels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return pixels.roll(4, -1)

    boxed = GroundedPhrase(data / "0.png", "nodule", ((8.0, 16.0, 8.0, 4.0),))
    hidden = replace(boxed, boxes=((40.0, 0.0, 5.0, 5.0),))
    first, second, third, _ = captioned(data)
    told = [
        Told(first, ("round",), "round", hidden),
        Told(second, ("flat",), "flat"),
        Told(third, ("round",), "round", boxed),
    ]
    monkeypatch.setattr(modality_batches, "augment", tilted)
    found = batches.collate(told, torch.Generator()).grounding
    assert found is not None
    assert found.rows.tolist() == [2], "what is out of sight teaches nothing"
    assert found.texts.ids.shape[0] == 1
    expected = torch.zeros(1, 8, 8)
    expected[0, 4, 3:5] = 0.5  # patches of 4 pixels
    torch.testing.assert_close(found.boxes, expected)


def test_the_mask_is_augmented_as_the_pixels_are() -> None:
    pixels = torch.zeros(2, 3, 32, 32)
    pixels[:, :, 8:24, 4:12] = 1
    views = augment(torch.cat((pixels, pixels[:, :1]), 1), torch.Generator().manual_seed(0))
    alone = augment(pixels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views[:, :3], alone)
    for view, mask in zip(views[:, :3], views[:, 3], strict=True):
        flat, outside = view[0][mask > 0.99], view[0][mask < 0.01]
        assert flat.std() < 1e-3
        assert outside.std() < 1e-3
        assert not torch.allclose(flat.mean() - outside.mean(), torch.tensor(1.0), atol=1e-3)


def test_an_epoch_can_be_repeated_and_the_next_is_another(
    data: Path, batches: ModalityBatches
) -> None:
    def epoch(number: int) -> list[torch.Tensor]:
        drawn = list(batches.shuffled(captioned(data), 3, number))
        assert [len(batch.pixels) for batch in drawn] == [3], "a rest is left out"
        return [drawn[0].pixels, drawn[0].texts.ids, drawn[0].fits]

    first, again, second = epoch(0), epoch(0), epoch(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], second[0])
    assert [len(batch.pixels) for batch in batches.shuffled(captioned(data), 8, 0)] == [4]


def test_some_of_each_finding_are_held_out() -> None:
    def image(number: int, finding: str) -> LabelledImage:
        return LabelledImage(Path(f"{number}"), "ct", "head", finding, "few", "train")

    labelled = [image(number, "ab"[number % 2]) for number in range(11)]  # 6 of a, 5 of b
    learned, held_out = hold_out(labelled, 3)
    assert [item.finding for item in held_out] == ["a", "a", "b"]
    assert sorted([*learned, *held_out], key=lambda i: int(i.image.name)) == labelled


def of_patient(number: int, finding: str, patient: str) -> LabelledImage:
    return LabelledImage(Path(f"{finding}{number}"), "ct", "head", finding, "few", "train", patient)


def test_a_patient_is_held_out_as_one() -> None:
    labelled = [of_patient(n, "ab"[n % 2], f"p{n // 6 % 9}") for n in range(120)]
    learned, held_out = hold_out(labelled, 3)
    own, others = ({item.patient for item in part} for part in (held_out, learned))
    assert (len(own), own & others) == (3, set())
    assert {item.finding for item in held_out} == {"a", "b"}
    assert len(learned) + len(held_out) == 120


def test_no_finding_is_held_out_whole() -> None:
    """Of few patients images are held out; other findings' patients do not take the last of one."""
    normal = [of_patient(n, "normal", f"p{n}") for n in range(100)]
    mass = [of_patient(n, "mass", "p0") for n in range(25)]
    cyst = [of_patient(n, "cyst", ("p19", "p39")[n % 2]) for n in range(40)]
    rare = [of_patient(n, "rare", "p19") for n in range(3)]
    mixed = [of_patient(n, "mixed", ("p19", "p0")[n % 2]) for n in range(4)]
    held_out = hold_out([*normal, *mass, *cyst, *rare, *mixed], 20)[1]
    assert [item.image.name for item in held_out] == [
        *("normal19", "normal39", "normal59", "normal79", "normal99"),
        *("mass19", "cyst19", "cyst39", "mixed0", "mixed2"),
    ]
    many = [of_patient(n, "many", f"p{20 * n + 19}") for n in range(2)]  # all are held by another
    learned = hold_out([*(of_patient(n, "normal", f"p{n}") for n in range(40)), *many], 20)[0]
    assert {*many} <= {*learned}


# --- what learns ------------------------------------------------------------------------------


def test_regions_are_pooled_in_squares() -> None:
    regions = torch.randn(2, 4, 4, 3)
    features = ImageFeatures(regions, torch.zeros(2, 3), torch.zeros(2, 2))
    pooled = coarser(features).regions
    assert pooled.shape == (2, 2, 2, 3)
    torch.testing.assert_close(pooled[:, 0, 1], regions[:, :2, 2:].mean((1, 2)))
    small = features._replace(regions=regions[:, :3, :3])
    assert coarser(small) is small


def test_grounding_by_hand() -> None:
    """Two places, of which one is like the word: its logit is 10, the other's 0."""
    regions = torch.tensor([[[[2.0, 0.0], [0.0, 3.0]]]])  # [1, 1, 2, 2]
    words = torch.tensor([[[5.0, 0.0], [1.0, 1.0]]])
    texts = TextFeatures(words, torch.tensor([[True, False]]), words[:, 0])
    right, wrong = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    exact = np.log1p(np.exp(-10.0))
    assert grounding_loss(regions, texts, right).item() == pytest.approx(exact, abs=1e-6)
    assert grounding_loss(regions, texts, wrong).item() == pytest.approx(10 + exact, abs=1e-4)


def test_muon_trains_the_matrices_inside_the_towers() -> None:
    objective = ModalityObjective(random_modality_model(CONFIG, 0))
    prepare_parameters(objective, RECIPE.schedule)
    muon, adamw = make_optimisers(objective, RECIPE.schedule)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    by_muon, by_adamw = (
        {names[p] for group in optimiser.param_groups for p in group["params"]}
        for optimiser in (muon, adamw)
    )
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    assert {
        "model.vision.stages.0.0.attention.q.weight",
        "model.text.layers.1.fc1.weight",
    } < by_muon
    assert {
        "model.vision.stages.0.0.attention.offset_bias",
        "model.text.word_embedding.weight",
        "model.experts.0.attention_in.weight",
        "model.router.0.weight",
    } < by_adamw
