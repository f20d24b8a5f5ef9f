"""What training reads: packed conversations, random views, text from labels, recipes."""

import dataclasses
import json
import random
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.config import Config
from medmoe_edge.data.datasets import Example, LabelledImage
from medmoe_edge.errors import ConfigError, DataError
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.contrastive import read_modality_recipe
from medmoe_edge.training.data import (
    IGNORED,
    IMAGE_ID,
    Turn,
    augment,
    captions,
    check_pictures,
    from_examples,
    instructions,
    pack,
    same_pictures,
    tidy_answer,
)
from medmoe_edge.training.questions import vary_question
from medmoe_edge.training.recipe import (
    DecoderShape,
    Recipe,
    TowerShape,
    as_toml,
    read_recipe,
)
from medmoe_edge.training.run import trainable_config

PREFIX, IMAGE_TOKENS = [7, 8, 9], 4


TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=4)
CONVERSATION = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4)


@given(st.lists(CONVERSATION, min_size=1, max_size=3))
def test_every_turn_sees_the_image_and_itself_alone(batch: list[list[Turn]]) -> None:
    text = pack(PREFIX, IMAGE_TOKENS, batch)
    mask = text.mask()
    assert mask.shape == (len(batch), 1, text.ids.shape[1], text.ids.shape[1])
    shared = len(PREFIX) + IMAGE_TOKENS
    for row, turns in enumerate(batch):
        owner = [0] * shared  # turn of each token, counted from 1
        for number, (question, answer) in enumerate(turns, start=1):
            owner += [number] * (len(question) + len(answer) - 1)
        for query in range(len(owner)):
            seen = [key for key in range(query + 1) if owner[key] in (0, owner[query])]
            assert mask[row, 0, query].nonzero().flatten().tolist() == seen
            # as in a sequence of its own: as many tokens before it as its position says
            assert text.positions[row, query] == len(seen) - 1
        assert mask[row, 0].any(-1).all(), "a place that sees nothing would be NaN"


@given(st.lists(CONVERSATION, min_size=1, max_size=3))
def test_every_label_is_the_next_token(batch: list[list[Turn]]) -> None:
    text = pack(PREFIX, IMAGE_TOKENS, batch)
    for row, turns in enumerate(batch):
        assert text.ids[row, :7].tolist() == PREFIX + [IMAGE_ID] * IMAGE_TOKENS
        at = 7
        for question, answer in turns:
            whole = question + answer
            end = at + len(whole) - 1
            assert text.ids[row, at:end].tolist() == whole[:-1]
            unasked = [IGNORED] * (len(question) - 1)
            assert text.labels[row, at:end].tolist() == unasked + answer
            at = end
        assert (text.labels[row, :7] == IGNORED).all()
        assert (text.labels[row, at:] == IGNORED).all()


def test_augment_repeats_with_its_generator() -> None:
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    original = pixels.clone()
    noise = torch.Generator().manual_seed(3)
    first, second = augment(pixels, noise), augment(pixels, noise)
    assert torch.equal(pixels, original)
    assert torch.equal(first, augment(pixels, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, second)
    assert first.shape == pixels.shape
    assert first.abs().max() <= 1.3
    changes = (first - pixels).flatten(1)
    assert (changes.abs().mean(1) > 0.05).all()
    assert torch.pdist(changes).min() > 1, "every image has a view of its own"


def test_augment_never_mirrors() -> None:
    pixels = torch.full((64, 3, 32, 32), -1.0)
    pixels[..., :8, :16] = 1.0  # a mark in the upper left
    views = augment(pixels, torch.Generator().manual_seed(0)).mean(1)
    assert (views[..., :16].mean((1, 2)) > views[..., 16:].mean((1, 2))).all()
    assert (views[:, :16].mean((1, 2)) > views[:, 16:].mean((1, 2))).all()


def example(image: str, question: str, answer: str, modality: str | None = "ct") -> Example:
    return Example(
        question, Path(image), question, answer, "OPEN", modality, "Chest", None, "slake"
    )


LABEL = LabelledImage(Path("l.png"), "xray", "chest", "pneumonia", "cxr", "train")


def test_questions_are_grouped_by_image() -> None:
    examples = [example("a", "Q1?", "yes."), example("b", "Q2?", "no"), example("a", "Q3?", " CT ")]
    first, second = from_examples(examples)
    assert (first.image, first.modality, first.source) == (Path("a"), "ct", "slake")
    assert first.turns == (("Q1?", "Yes"), ("Q3?", "CT"))
    assert second.turns == (("Q2?", "No"),)


def test_labels_become_instructions_and_captions() -> None:
    (asked,) = instructions([LABEL])
    assert [answer for _, answer in asked.turns] == ["X-Ray", "Chest", "Pneumonia"]
    assert asked.modality == "xray"
    told = captions([LABEL], [example("a", "Q?", "A"), example("b", "Q?", "A", modality=None)])
    assert [turns for c in told for turns in c.turns] == [
        ("Describe this image.", "X-Ray of the chest: pneumonia"),
        ("Describe this image.", "CT of the chest"),
    ]


def test_a_modality_nobody_knows_is_called_by_its_name() -> None:
    label = LabelledImage(Path("l.png"), "OCT", "eye", "normal", "oct", "train")
    assert instructions([label])[0].turns[0][1] == "OCT"
    assert captions([label], [])[0].turns[0][1] == "OCT of the eye: normal"


@pytest.mark.parametrize(
    ("answer", "tidy"),
    [(" left  lung. ", "Left lung"), ("x-Ray", "X-Ray"), ("", ""), ("2.5 cm", "2.5 cm")],
)
def test_tidy_answer(answer: str, tidy: str) -> None:
    assert tidy_answer(answer) == tidy


def test_questions_vary_only_in_case_and_mark() -> None:
    asked = [vary_question("Is it CT?", random.Random(seed)) for seed in range(100)]
    assert set(asked) == {"Is it CT?", "Is it CT", "is it ct?", "is it ct"}
    assert asked.count("Is it CT?") > 30
    assert {vary_question("??", random.Random(seed)) for seed in range(100)} == {"??"}


def test_questions_come_in_capitals_and_with_other_ends_where_slips_are_taught() -> None:
    asked = [vary_question("Is it CT?", random.Random(seed), slips=0.2) for seed in range(400)]
    assert {"IS IT CT?", "IS IT CT", "Is it CT??", "Is it CT ?", "Is it CT."} < set(asked)
    assert 40 < sum(question.isupper() for question in asked) < 120
    assert all(question.strip(" ?.") for question in asked)


def test_the_shipped_recipe_fits_its_preset() -> None:
    recipe = read_recipe("nano")
    preset = PRESETS[recipe.preset or ""]
    assert preset.moe is not None
    assert preset.moe.expert_names
    assert recipe.vocab_size == preset.decoder.vocab_size
    assert recipe.moe.router_weight == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "'learning_rate'"),
        ({"epochs": -1}, "too small"),
        ({"batch_images": 0}, "too small"),
        ({"train": []}, "too small"),
        ({"warmup": 1.0}, "share"),
        ({"labelled_share": 1.5}, "share"),
        ({"epochs": "many"}, "epochs"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    data = read_recipe("nano").to_json()
    data["moe"] |= change
    (tmp_path / "mine.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=message):
        read_recipe(str(tmp_path / "mine.json"))


@pytest.mark.parametrize("name", ["nano", "nano-continued", "fine-tune", "modality-nano"])
def test_a_recipe_is_the_same_as_toml(tmp_path: Path, name: str) -> None:
    read = read_modality_recipe if name.startswith("modality") else read_recipe
    text = as_toml(read(name))
    (tmp_path / "mine.toml").write_text(text)
    assert read(str(tmp_path / "mine.toml")) == read(name)
    keys = [line for line in text.splitlines() if re.match(r"(# )?\w+ =", line)]
    comments = [line for line in text.splitlines() if re.match(r"# (?!\w+ =|\[)", line)]
    assert len(comments) >= len(keys) / 2


def _recipe_schema(kind: type[Config], title: str) -> dict[str, Any]:
    """What the schema must be, by the fields and types of the recipe."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return head | _object_schema(kind)


def _object_schema(kind: type[Config]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    properties, required = {}, []
    for each in dataclasses.fields(kind):
        properties[each.name] = _schema(hints[each.name]) | (
            {"description": each.metadata["about"]} if "about" in each.metadata else {}
        )
        if each.default is dataclasses.MISSING:
            required.append(each.name)
        elif each.default is not None:
            properties[each.name]["default"] = each.default
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _schema(next(each for each in arguments if each is not type(None)))
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is Mapping:
        return {"type": "object"}
    if isinstance(hint, type) and issubclass(hint, Config):
        return _object_schema(hint)
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return {"type": names[hint]}


def test_the_shipped_schema_says_what_a_recipe_is() -> None:
    """Held against the package jsonschema, on what ships and on what is refused."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    folder = files("medmoe_edge.training").joinpath("recipes")
    schema = json.loads(folder.joinpath("recipe.schema.json").read_text("utf-8"))
    assert schema == json.loads(json.dumps(_recipe_schema(Recipe, schema["title"])))
    for name in ("nano", "nano-continued", "fine-tune"):
        whole = read_recipe(name).to_json()
        jsonschema.validate({k: v for k, v in whole.items() if v is not None}, schema)
        for change in ({"presett": "nano"}, {"precision": "fp8"}, {"top_k": "two"}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(whole | change, schema)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset = ", "not valid TOML"),
        ("[moe]\nepochs = 1\n[moe]", "not valid TOML"),
        ('{"preset": }', "not valid JSON"),
        ("# nothing", "is empty"),
    ],
)
def test_a_recipe_that_is_no_toml_or_json_says_where(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_recipe(str(tmp_path / "mine.toml"))
    with pytest.raises(DataError, match="no recipe 'nanoo'") as caught:
        read_recipe("nanoo")
    assert "fine-tune, modality-nano" in caught.value.remedy


def test_a_recipe_opens_the_models_shape() -> None:
    recipe = replace(
        read_recipe("nano"),
        preset="tiny-phi",
        vocab_size=300,
        modalities=("oct", "ct", "pet"),
        top_k=2,
        decoder=DecoderShape(layers=5, heads=4),
        vision=TowerShape(kind="efficientnet-lite", variant="lite0", image_size=64, patch_size=32),
    )
    config, moe = trainable_config(recipe)
    assert (config.decoder.kind, config.decoder.layers, config.decoder.heads) == ("phi", 5, 4)
    assert (config.decoder.vocab_size, config.vision.feature_size) == (300, 320 + 4 * 112)
    assert (moe.layers, moe.num_experts, moe.top_k) == ((0, 2, 4), 3, 2)
    assert moe.expert_names == ("oct", "ct", "pet")
    with pytest.raises(ConfigError, match="outside"):
        trainable_config(replace(recipe, moe_layers=(7,)))


@pytest.mark.parametrize("content", [None, "", "{", "[" * 100_000, "\x00"])
def test_an_unreadable_recipe_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(DataError, match=r"mine\.json"):
        read_recipe(str(tmp_path / "mine.json"))


def bytes_read() -> int:
    """By this process so far."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        pytest.skip("this system does not count what a process reads")
    return int(counts.read_text().split()[1])


def test_files_are_read_as_far_as_it_takes_to_tell_them_apart(tmp_path: Path) -> None:
    size = 2**22
    contents = {"a": b"1", "b": b"2", "c": b"3", "alone": b"3" + bytes(size)}
    for name, start in contents.items():
        (tmp_path / name).write_bytes(start.ljust(size, b"\0"))
    files = [tmp_path / name for name in contents]
    before = bytes_read()
    known = check_pictures(
        [Example("1", each, "", "", "OPEN", None, None, None, "") for each in files], []
    )
    assert 3 * 2**16 <= bytes_read() - before < 2**20
    assert list(known) == files
    assert len(set(known.values())) == 4
    (tmp_path / "b").write_bytes(b"1".ljust(size, b"\0"))
    (tmp_path / "c").write_bytes(b"1".ljust(size, b"\1"))
    same = same_pictures(files[:3])
    assert same[files[0]] == same[files[1]] != same[files[2]]
