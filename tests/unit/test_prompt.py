"""The conversation template and the tokenizer, on one trained here."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from medmoe_edge.errors import InputError, ModelError
from medmoe_edge.prompt import BEFORE_IMAGE, Tokenizer, check_question
from medmoe_edge.training.initialise import END, train_tokenizer

TEXTS = [("Is there effusion?", "Yes"), ("What modality is this?", "CT"), ("Where?", "Left lung")]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS * 3, 400, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.backend.decode(ids, skip_special_tokens=False)


def test_prefix_and_question_make_the_official_prompt(tokenizer: Tokenizer) -> None:
    ids = tokenizer.prefix_ids() + tokenizer.question_ids(" Is there effusion? ")
    # conv_phi_v0 of the official code, around its <image>
    assert text_of(tokenizer, ids) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: \nIs there effusion? ASSISTANT:"
    )
    assert text_of(tokenizer, tokenizer.prefix_ids()) == BEFORE_IMAGE


def test_the_vocabulary_learns_words_and_the_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.backend.token_to_id(END) == 0
    assert tokenizer.backend.get_vocab_size() <= 400
    assert len(tokenizer.answer_ids("Yes")) == 1
    assert len(tokenizer.prefix_ids()) < len(BEFORE_IMAGE) / 4


@pytest.mark.parametrize(
    "question", ["", "  \n", "<image>", " <image>\n<image> ", "\u200d", "\u200c \u200d\n"]
)
def test_an_empty_question_is_refused(tokenizer: Tokenizer, question: str) -> None:
    with pytest.raises(InputError, match="empty"):
        tokenizer.question_ids(question)


def test_a_question_of_100_kb_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="102,400 characters") as caught:
        tokenizer.question_ids("a" * 102_400)
    assert len(str(caught.value)) < 200
    assert tokenizer.question_ids("a" * 10_000)


def test_a_question_of_stray_bytes_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="Unicode"):
        tokenizer.question_ids(b"Is it \xff?".decode(errors="surrogateescape"))


def test_the_image_mark_in_a_question_is_dropped() -> None:
    assert check_question("<image>\nIs there <image>effusion?") == "Is there effusion?"


@pytest.mark.parametrize("mark", ["<im\u00adage>", "<ima<image>ge>", "<ima<im\u200bage>ge>\u200b"])
def test_no_image_mark_is_left_in_a_question(mark: str) -> None:
    assert check_question(f"Is there {mark}effusion?") == "Is there effusion?"


@pytest.mark.parametrize(
    ("pasted", "typed"),
    [
        ("La\u0308sion?", "L\u00e4sion?"),
        ("La<image>\u0308sion?", "L\u00e4sion?"),
        ("T2\u2010weighted or T2\u2011weighted?", "T2-weighted or T2-weighted?"),
    ],
)
def test_accents_and_hyphens_are_those_of_a_keyboard(pasted: str, typed: str) -> None:
    assert check_question(pasted) == check_question(typed) == typed


@pytest.mark.parametrize(
    "pasted",
    [
        *("Is  there effusion?", "Is\tthere effusion?", "Is\u00a0there\u2009effusion?"),
        *("\ufeffIs there effusion?", "Is there ef\u00adfusion?", "Is\u200b there effusion?"),
        *("\u202aIs there effusion?\u202c", "Is there effusion?\x00", "Is there e\ufb00usion?"),
        *("Is \u200b there effusion?\r\n", "Is <image>there effusion?"),
    ],
)
def test_what_looks_the_same_is_asked_the_same(pasted: str) -> None:
    assert check_question(pasted) == "Is there effusion?"


def test_lines_accents_and_joiners_stay() -> None:
    for text in ("A. CT\nB. MRI", "¿Qué es?", "\u0645\u06cc\u200c\u0634\u0648\u062f", "5 cm²"):
        assert check_question(text) == text
    with pytest.raises(InputError, match="empty"):
        check_question("\u200b\x00 \ufeff")


def test_braces_in_a_question_are_text(tokenizer: Tokenizer) -> None:
    assert "{question} {0} {" in text_of(tokenizer, tokenizer.question_ids("{question} {0} {"))


def test_the_end_token_in_a_question_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.question_ids(f"Is it {END} or not?")
    assert 0 not in ids
    assert tokenizer.decode(ids) == f"Is it {END} or not? ASSISTANT:"


@given(st.text(max_size=40))
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.answer_ids(text)) == text.strip()
    with contextlib.suppress(InputError):  # nothing in it can be seen
        question = check_question(text)
        assert check_question(question) == question
        assert tokenizer.decode(tokenizer.question_ids(text)) == f"{question} ASSISTANT:"


def test_decode_strips_space_and_the_end_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.answer_ids(" Left lung \n")
    assert tokenizer.decode([*ids, 0]) == "Left lung"
    assert tokenizer.decode([0]) == tokenizer.decode([]) == ""


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x80\x04pickle", b'{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)


def test_training_twice_gives_the_same_file(tokenizer_file: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS * 3, 400, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == tokenizer_file.read_bytes()


def test_the_tokenizer_says_whether_a_prompt_has_a_start_token(tokenizer: Tokenizer) -> None:
    plain, question = tokenizer.prefix_ids(), tokenizer.question_ids("Why?")
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    starting = Tokenizer(backend)
    assert starting.prefix_ids() == [0, *plain]
    assert starting.question_ids("Why?") == question
