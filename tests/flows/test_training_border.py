"""The border between yes and no is fitted to films that no phase learns from."""

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import ConfigError, DataError
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.presets import PRESETS
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.training.border import fit_border
from medmoe_edge.training.data import Batches, Conversation, augment_features
from medmoe_edge.training.initialise import train_tokenizer
from medmoe_edge.training.loop import Session
from medmoe_edge.training.phases import answered
from medmoe_edge.training.questions import Asking
from medmoe_edge.training.recipe import BorderConfig, PhaseConfig, Recipe
from medmoe_edge.training.run import read_corpus, train

PHASE = PhaseConfig(1, 1e-2, ("decoder.*",))
RECIPE = Recipe(alignment=PHASE, instruction=PHASE, moe=PHASE, preset="tiny", phrases=True)
KEPT = replace(RECIPE, border=BorderConfig(0.5))
TINY = replace(KEPT, vocab_size=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films, two of each patient, of which the bright ones show an effusion."""
    folder, noise = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    rows = []
    for number in range(80):
        effusion = number % 2 == 0
        pixels = noise.integers(0, 80, (32, 32, 3)) + 150 * effusion
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append(
            {
                "image": f"{number}.png",
                "modality": "xray",
                "body": "chest",
                "view": "pa",
                "findings": ["pleural effusion"] if effusion else [],
                "negatives": [] if effusion else ["pleural effusion"],
                "patient": f"p{number // 2}",
                "split": "val" if number >= 64 else "train",
                "source": "films",
            }
        )
    (folder / "findings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def patients(images: set[str]) -> set[int]:
    return {int(Path(name).stem) // 2 for name in images}


def test_kept_patients_are_learned_from_nowhere(data: Path) -> None:
    corpus, whole = read_corpus(KEPT, data), read_corpus(RECIPE, data)
    kept = {facts.image.name for facts in corpus.border}
    told, seen = [*corpus.known, *corpus.border], [*corpus.seen, *corpus.seen_held_out]
    assert len(told) == len(whole.known)
    images = {each.image for each in corpus.everything} | {each.image for each in seen}
    images |= {each.image for each in corpus.known}
    learned = {image.name for image in images if int(image.stem) < 64}
    assert len(kept) >= 16
    assert len(learned) >= 16
    assert not patients(kept) & patients(learned)
    assert kept | learned == {each.image.name for each in whole.known}
    assert not any(int(Path(name).stem) >= 64 for name in kept), "of what is to validate on"


@dataclass(frozen=True)
class Leaning:
    """A model of random weights whose head leans to no, and what its border is fitted with."""

    model: MedMoE
    asking: Asking
    batches: Batches
    session: Session
    said: list[str]
    tokens: tuple[int, int]

    def fit(self, others: Sequence[Conversation] = (), penalty: float = 1e-5) -> dict[str, Tensor]:
        """By how much each parameter has changed."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        border = BorderConfig(0.5, penalty)
        fit_border(self.model, self.asking, others, border, self.batches, self.session)
        return {name: value - before[name] for name, value in self.model.state_dict().items()}

    def shares(self) -> list[float]:
        """Those that the last line says, in percent."""
        return [float(share) for share in re.findall(r"([\d.]+)%", self.said[-1])]


@pytest.fixture
def leaning(data: Path, tmp_path: Path) -> Leaning:
    asking = Asking(read_corpus(KEPT, data).border, ())
    turns = [turn for own in asking.epoch(random.Random(0), 1.0, 1.0) for turn in own]
    train_tokenizer(turns, 400, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    tiny = PRESETS["tiny"]
    config = replace(tiny, decoder=replace(tiny.decoder, vocab_size=400, eos_token_id=0))
    torch.manual_seed(0)
    model = MedMoE(config)
    yes, no = (tokenizer.answer_ids(word)[0] for word in ("Yes", "No"))
    batches = Batches(config, tokenizer, ("xray",), 0)
    said: list[str] = []
    session = Session.begin(tmp_path / "run", 0, Progress(disable=True), "fp32", said.append)
    with torch.no_grad():  # the state that all questions share says no
        (batch,) = batches.plain([Conversation(data / "0.png", "xray", (("Is it?", "No"),), "")], 1)
        state = answered(model, batch).hidden[0, -1]
        model.decoder.head.weight[no] += 20 * state / state.square().sum()
    return Leaning(model, asking, batches, session, said, (yes, no))


def test_a_model_that_leans_to_no_finds_the_border(leaning: Leaning) -> None:
    changes = leaning.fit()
    before, after = leaning.shares()
    assert before == 50.0, "yes to none"
    assert after > 65.0
    yes, no = leaning.tokens
    moved = {name for name, change in changes.items() if change.any()}
    assert moved == {"decoder.head.weight"}
    rows = changes["decoder.head.weight"]
    assert set(rows.any(1).nonzero()[:, 0].tolist()) == {yes, no}
    torch.testing.assert_close(rows[yes], -rows[no], rtol=0, atol=1e-5)


def test_a_strong_penalty_changes_little(leaning: Leaning) -> None:
    change = leaning.fit(penalty=1e5)["decoder.head.weight"]
    assert change.abs().max() < 1e-3


def test_other_questions_are_kept(leaning: Leaning, data: Path) -> None:
    """A change that other questions feel is smaller where these are to be answered as before."""
    turns = tuple((f"Is there effusion {word}?", "No") for word in ("a", "b", "c", "now", "here"))
    others = [Conversation(data / f"{number}.png", "xray", turns, "x") for number in range(40)]
    careless = replace(leaning, model=copy.deepcopy(leaning.model))
    careful = leaning.fit(others)["decoder.head.weight"][leaning.tokens[0]]
    alone = careless.fit()["decoder.head.weight"][leaning.tokens[0]]
    (batch,) = leaning.batches.plain(others[:8], 8)
    with torch.no_grad():
        states = answered(leaning.model, batch).hidden[batch.text.labels == leaning.tokens[1]]
    assert (states @ careful).abs().mean() < 0.5 * (states @ alone).abs().mean()


def test_many_questions_of_an_image_are_read_as_each_alone(leaning: Leaning, data: Path) -> None:
    turns = [
        (f"Is there effusion {number}?", ("Yes", "No")[number % 3 == 0]) for number in range(70)
    ]
    together = [Conversation(data / "0.png", "xray", tuple(turns), "x")]
    apart = [replace(together[0], turns=(turn,)) for turn in turns]
    other = replace(leaning, model=copy.deepcopy(leaning.model))
    changes = (each.fit(some, 0.01) for each, some in ((leaning, together), (other, apart)))
    one, two = (change["decoder.head.weight"] for change in changes)
    assert sum(line.startswith("Of 70 other questions") for line in leaning.said) == 2
    torch.testing.assert_close(one, two, rtol=0, atol=0.01 * float(one.abs().max()))


def films(folder: Path, data: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The films with other rows."""
    rows = [json.loads(line) for line in (data / "findings.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = str(data / row["image"])
        change(row)
    (folder / "findings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("known", ["findings", "negatives", ""])
def test_a_border_needs_films_with_a_finding_and_without(
    data: Path, tmp_path: Path, known: str
) -> None:
    """Refused before there is a folder, not after the phases."""

    def told(row: dict[str, Any]) -> None:
        row.update({name: row[name] if name == known else [] for name in ("findings", "negatives")})

    out = tmp_path / "out"
    with pytest.raises(DataError, match="none shows a finding"):
        train(TINY, films(tmp_path, data, told), out, Progress(disable=True))
    assert not out.exists()


def test_a_finding_that_all_kept_films_lack_is_not_asked_about(leaning: Leaning) -> None:
    facts = [replace(each, absent=each.absent | {"fracture"}) for each in leaning.asking.known]
    alone = replace(leaning, model=copy.deepcopy(leaning.model))
    found = replace(leaning, asking=Asking(facts, ())).fit()
    assert all(torch.equal(found[name], change) for name, change in alone.fit().items())


def test_a_tokenizer_must_tell_yes_from_no(data: Path, tmp_path: Path) -> None:
    """One that was trained on texts without yes and no begins both with a space."""
    with pytest.raises(DataError, match="same token"):
        train(replace(TINY, phrases=False), data, tmp_path, Progress(disable=True))
    assert not (tmp_path / "alignment.safetensors").exists()


def test_patients_asked_about_elsewhere_are_not_kept(data: Path, tmp_path: Path) -> None:
    kept = sorted(facts.image for facts in read_corpus(KEPT, data).border)
    asked = {"question": "Is it?", "answer": "Yes", "answer_type": "CLOSED", "source": "x"}
    one = kept[0]
    other = next(each for each in kept if patients({each.name}) != patients({one.name}))
    rows = [
        asked | {"id": 1, "image": str(one)},
        asked | {"id": 2, "image": str(data / "79.png"), "patient": f"p{int(other.stem) // 2}"},
    ]
    folder = films(tmp_path, data, lambda row: None)
    (folder / "vqa_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    left = {facts.image for facts in read_corpus(KEPT, folder).border}
    told = patients({one.name, other.name})
    assert left == {each for each in kept if not patients({each.name}) & told}
    assert len(left) == len(kept) - 2 * len(told)


def test_a_finished_run_fits_the_same_border_again(data: Path, tmp_path: Path) -> None:
    def head() -> Tensor:
        return dict(read_checkpoint(tmp_path / "checkpoint"))["decoder.head.weight"]

    train(TINY, data, tmp_path, Progress(disable=True))
    once, state = head(), load_file(tmp_path / "moe.safetensors")
    before = state["module.model.decoder.head.weight"].to(once)
    tokenizer = Tokenizer.from_file(tmp_path / "checkpoint" / "tokenizer.json")
    moved = (once != before).any(1).nonzero()[:, 0].tolist()
    assert moved == sorted(tokenizer.answer_ids(word)[0] for word in ("Yes", "No"))
    train(TINY, data, tmp_path, Progress(disable=True))
    assert torch.equal(head(), once)
    with pytest.raises(DataError, match="begun by another recipe"):
        train(replace(TINY, border=BorderConfig(0.3)), data, tmp_path, Progress(disable=True))


def test_a_run_without_phrases_is_not_gone_on_with_by_other_kept_films(
    data: Path, tmp_path: Path
) -> None:
    recipe, folder = replace(TINY, phrases=False), tmp_path / "films"
    folder.mkdir()
    films(folder, data, lambda row: None)
    asked = {"image": str(data / "79.png"), "answer_type": "CLOSED", "source": "x"}
    rows = [
        asked | {"id": index, "question": "Is it?", "answer": answer}
        for index, answer in enumerate(("Yes", "No") * 4)
    ]
    (folder / "vqa_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(recipe, folder, tmp_path / "out", Progress(disable=True))
    kept = {facts.image.name for facts in read_corpus(recipe, folder).border}

    def turned(row: dict[str, Any]) -> None:
        if Path(row["image"]).name in kept:
            row["findings"], row["negatives"] = row["negatives"], row["findings"]

    films(folder, data, turned)
    with pytest.raises(DataError, match="on other data"):
        train(recipe, folder, tmp_path / "out", Progress(disable=True))


def test_moved_views_must_be_kept() -> None:
    with pytest.raises(ConfigError, match="moves views"):
        replace(RECIPE, moved=True)


@pytest.mark.parametrize("border", [{"share": 0}, {"share": 1}, {"share": 0.2, "penalty": 0}])
def test_borders_that_cannot_be(border: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="border"):
        BorderConfig(**border)


def test_features_are_moved_and_strengthened_by_their_seed() -> None:
    features = torch.zeros(2, 3, 16, 16)
    features[:, :, 6:10, 6:10] = 1.0
    first, again = (augment_features(features, torch.Generator().manual_seed(1)) for _ in "12")
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], first[1])
    strongest = first.flatten(2).amax(-1)
    assert (strongest <= 1.2).all()
    assert (strongest > 0.6).all()
    assert len(set(strongest.flatten().tolist())) == 6, "each channel by itself"
