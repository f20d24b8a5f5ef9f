"""Texts to pieces and words."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from medmoe_edge.config_contrastive import BertConfig
from medmoe_edge.contrastive.text import NO_WORD, ModalityTokenizer
from medmoe_edge.errors import InputError, ModelError
from medmoe_edge.training.contrastive import train_word_pieces

TEXTS = ["chest x-ray, pneumonia", "head ct, no finding", "abdomen mri, t2 weighted, liver"] * 5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    train_word_pieces(TEXTS, 400, path)
    return path


def reader(file: Path, max_pieces: int = 16) -> ModalityTokenizer:
    return ModalityTokenizer.from_file(file, BertConfig(400, 8, 4, 2, 8, max_pieces=max_pieces))


def test_pieces_words_and_padding(file: Path) -> None:
    backend = Backend.from_file(str(file))
    ids, words, seen = reader(file).encode(["Chest X-ray, Pneumonia", "liver"])
    tokens = ["[CLS]", "chest", "x", "-", "ray", ",", "pneumonia", "[SEP]"]
    assert [backend.id_to_token(i) for i in ids[0]] == tokens
    assert words[0].tolist() == [-1, 0, 1, -1, 2, -1, 3, -1]
    assert [backend.id_to_token(i) for i in ids[1]] == ["[CLS]", "liver", "[SEP]", *["[PAD]"] * 5]
    assert words[1].tolist() == [-1, 0, *[-1] * 6]
    assert seen.tolist() == [[True] * 8, [True] * 3 + [False] * 5]
    assert [part.dtype.name for part in (ids, words, seen)] == ["int64", "int64", "bool"]


@pytest.mark.parametrize("direction", ["left", "right"])
def test_padding_that_the_file_asks_for_is_not_read(
    file: Path, tmp_path: Path, direction: str
) -> None:
    backend = Backend.from_file(str(file))
    backend.enable_padding(direction=direction, length=12)
    backend.save(str(tmp_path / "padded.json"))
    plain, padded = (reader(each).encode(["liver"]) for each in (file, tmp_path / "padded.json"))
    assert all((one == other).all() for one, other in zip(plain, padded, strict=True))


def test_the_pieces_of_a_word_belong_together(file: Path) -> None:
    ids, words, _ = reader(file).encode(["zebra liver"])
    pieces = np.count_nonzero(words[0] == 0)
    assert pieces > 1, "a word that training never showed is spelt"
    assert words[0].tolist() == [NO_WORD, *[0] * pieces, 1, NO_WORD]
    assert 1 not in ids, "nothing is unknown"


@pytest.mark.parametrize(("text", "words"), [("liver 肺 lung", 2), ("[CLS] liver [PAD]", 3)])
def test_what_is_unknown_or_looks_like_a_mark_is_mere_text(
    file: Path, text: str, words: int
) -> None:
    ids, found, seen = reader(file).encode([text])
    assert found.max() + 1 == words
    assert [ids[0][0], ids[0][-1]] == [2, 3]
    assert not np.isin(ids[0][1:-1], (0, 2, 3)).any()
    assert seen.all()


def test_a_long_text_is_cut(file: Path) -> None:
    ids, words, _ = reader(file, max_pieces=5).encode(["liver " * 100_000])
    assert ids.shape == (1, 5)
    assert words[0].tolist() == [-1, 0, 1, 2, -1]
    assert ids[0][-1] == 3, "the mark at the end stays"


@pytest.mark.parametrize("text", ["", "  \n", "...", "肺炎", "\ud800", "a" * 101])
def test_a_text_without_a_word_is_refused(file: Path, text: str) -> None:
    with pytest.raises(InputError):
        reader(file).encode(["liver", text])


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text_is_read_or_refused(file: Path, texts: list[str]) -> None:
    try:
        ids, words, seen = reader(file).encode(texts)
    except InputError:
        return
    assert ids.shape == words.shape == seen.shape
    for row, text in enumerate(texts):
        found = words[row][words[row] != NO_WORD]
        assert (np.diff(found) >= 0).all()
        assert set(found) == set(range(found.max() + 1)), "counted from 0 without a gap"
        assert (words[row][~seen[row]] == NO_WORD).all()
        alone = reader(file).encode([text])
        assert (alone.ids[0] == ids[row][seen[row]]).all(), "its neighbours change nothing"


def test_the_same_texts_give_the_same_file(file: Path, tmp_path: Path) -> None:
    train_word_pieces(TEXTS, 400, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == file.read_bytes()


def test_a_tokenizer_larger_than_the_model_is_refused(file: Path) -> None:
    with pytest.raises(ModelError, match="tokens"):
        ModalityTokenizer.from_file(file, BertConfig(10, 8, 4, 2, 8))
