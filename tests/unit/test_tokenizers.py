"""A checkpoint's tokenizer in every form that its trainers save it in.

Ids and texts are held against the algorithms of `tokenizer_files`, and through the hash of all ids
against transformers 4.57.6's slow tokenizers and tiktoken 0.14, which gave the recorded ones.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_files import (
    END,
    SlowTokenizer,
    prompts,
    vocabulary,
    write_gpt2,
    write_phi,
    write_ranks,
)
from transformers import GPT2Tokenizer

from medmoe_edge.checkpoint.tokenizer import TIKTOKEN, find_tokenizer
from medmoe_edge.config_contrastive import BertConfig
from medmoe_edge.contrastive.text import ModalityTokenizer
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import CheckpointError, ModelError
from medmoe_edge.presets import PRESETS
from medmoe_edge.prompt import IMPOSSIBLE, Tokenizer

COUNT = 5_000
# sha256 of the ids of `COUNT` prompts, as transformers 4.57.6 (tiktoken 0.14.0) gave them
RECORDED = {
    "phi": "f04d6e502969752fdf2e760573b9c579598802f970a3b793b31f3afafcb01329",
    "gpt2": "011dcb10a37bb201b8f81794be484e11539ec8af6903220e8f0ef2b554475e7d",
    "arcade100k": "18a9c66aa3969d155e94130239e70c8e9be14d7566f25fdfa85d2d6b73791590",
}


def hash_of(ids: Iterable[list[int]]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def backend_of(folder: Path) -> Any:
    """As transformers reads a prompt: special tokens in it are what they look like."""
    backend = find_tokenizer(folder).tokenizer.backend
    backend.encode_special_tokens = False
    return backend


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi")
    write_phi(folder)
    return folder


@pytest.fixture(scope="module")
def arcade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arcade")
    write_ranks(folder / "arcade100k.tiktoken", TIKTOKEN["arcade100k.tiktoken"].ranks)
    (folder / "tokenization_arcade100k.py").write_text("raise SystemExit('executed')\n")
    return folder


def test_phi_as_the_slow_tokenizer_reads_it(phi: Path) -> None:
    added = json.loads((phi / "added_tokens.json").read_text())
    special = {len(vocabulary()), added["<|extra_0|>"]}
    slow = SlowTokenizer(vocabulary(), {END: len(vocabulary()), **added})
    backend, found = backend_of(phi), []
    for text in prompts(COUNT, [END, "<|extra_0|>", "      ", "\t\t\t"]):
        ids = backend.encode(text).ids
        assert ids == slow(text), repr(text)
        assert backend.decode(ids, skip_special_tokens=True) == slow.text(ids, special, clean=True)
        found.append(ids)
    assert hash_of(found) == RECORDED["phi"]


def test_gpt2_as_the_slow_tokenizer_reads_it(tmp_path: Path) -> None:
    """StableLM's other form; its added token stands in added_tokens.json alone."""
    first = len(vocabulary())
    write_gpt2(tmp_path, {"pad_token": "<|pad|>"}, {"<|pad|>": first + 1})
    slow = SlowTokenizer(vocabulary(), {END: first, "<|pad|>": first + 1})
    backend, found = backend_of(tmp_path), []
    for text in prompts(COUNT, [END, "<|pad|>"], seed=1):
        ids = backend.encode(text).ids
        assert ids == slow(text), repr(text)
        found.append(ids)
    assert hash_of(found) == RECORDED["gpt2"]


def test_arcade100k_as_tiktoken_reads_it(arcade: Path) -> None:
    """No special id is shifted into the hole at 100,256, and no Python file is executed."""
    form = TIKTOKEN["arcade100k.tiktoken"]
    names = {name: form.first_special + index for index, name in enumerate(form.special)}
    assert (names[END], names["<|endofprompt|>"], names["<|extra0|>"]) == (100257, 100276, 100288)
    ranks = write_ranks(arcade / "again", form.ranks)
    slow = SlowTokenizer(ranks, names, ranked=True)
    backend, found = backend_of(arcade), []
    for text in prompts(COUNT, list(names), seed=2):
        ids = backend.encode(text).ids
        assert ids == slow(text), repr(text)
        found.append(ids)
    assert hash_of(found) == RECORDED["arcade100k"]
    text = backend.decode([*backend.encode("clear lungs .").ids, 100257], skip_special_tokens=True)
    assert text == "clear lungs ."
    known = find_tokenizer(arcade).tokenizer.known(100352)
    assert list(np.flatnonzero(~known)) == [100256, *range(100289, 100352)]


def test_what_transformers_5_saves(tmp_path: Path) -> None:
    from tokenizer_files import learned, shown

    ids = {shown(token): index for token, index in vocabulary().items()}
    theirs = GPT2Tokenizer(
        vocab=ids | {END: len(ids)},
        merges=[(shown(a), shown(b)) for a, b in learned()],  # type: ignore[misc]
    )
    theirs.save_pretrained(tmp_path)
    backend = backend_of(tmp_path)
    for text in prompts(200, [END], seed=3):
        assert backend.encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_an_added_token_takes_the_space_that_its_flags_say(tmp_path: Path, side: str) -> None:
    first = len(vocabulary()) + 1
    token = {"content": "<img>", "special": True, "normalized": False, side: True}
    config = {"added_tokens_decoder": {str(first): token}}
    write_gpt2(tmp_path, config, {"<img>": first})
    plain = tmp_path / "plain"
    write_gpt2(plain, {}, {"<img>": first})
    text = "lung   <img> \n is"
    before, after = text.split("<img>")
    stripped = before.rstrip() if side == "lstrip" else before
    rest = after.lstrip() if side == "rstrip" else after
    expected = backend_of(plain).encode(f"{stripped}<img>{rest}").ids
    assert backend_of(tmp_path).encode(text).ids == expected
    assert backend_of(plain).encode(text).ids != expected


def test_a_prompt_starts_as_the_tokenizer_says(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "bos", {"add_bos_token": True})
    write_gpt2(tmp_path / "space", {"add_prefix_space": True})
    plain = tmp_path / "plain"
    write_gpt2(plain, {})
    usual = find_tokenizer(plain).tokenizer
    begun = find_tokenizer(tmp_path / "bos").tokenizer
    assert begun.prefix_ids() == [len(vocabulary()), *usual.prefix_ids()]
    assert begun.question_ids("Where?") == usual.question_ids("Where?")
    spaced = backend_of(tmp_path / "space")
    assert spaced.encode("lung").ids == backend_of(plain).encode(" lung").ids


def test_phi_cleans_the_spaces_of_its_answers(phi: Path, tmp_path: Path) -> None:
    """Also where the folder holds a tokenizer.json: its configuration speaks of both."""
    find_tokenizer(phi).write(tmp_path / "bundled.json")
    write_gpt2(tmp_path / "plain", {"clean_up_tokenization_spaces": False})
    find_tokenizer(tmp_path / "plain").write(tmp_path / "tokenizer.json")
    assert find_tokenizer(tmp_path).file == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    text = "No , there is n't any ."
    for tokenizer in (
        Tokenizer.from_file(tmp_path / "bundled.json"),
        find_tokenizer(tmp_path).tokenizer,
    ):
        ids = tokenizer.backend.encode(text).ids
        assert tokenizer.decode(ids) == "No, there isn't any."
    plain = find_tokenizer(tmp_path / "plain").tokenizer
    assert plain.decode(plain.backend.encode(text).ids) == text


@pytest.mark.parametrize(
    ("config", "cleans"),
    [
        ({}, True),
        ({"clean_up_tokenization_spaces": True}, True),
        ({"clean_up_tokenization_spaces": False}, False),
        ({"backend": "tokenizers"}, False),  # as transformers 5 saves it
    ],
)
def test_both_forms_clean_up_alike(tmp_path: Path, config: dict[str, Any], cleans: bool) -> None:
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    write_gpt2(slow, config)
    write_gpt2(tmp_path / "plain", {"clean_up_tokenization_spaces": False})
    fast.mkdir()
    find_tokenizer(tmp_path / "plain").write(fast / "tokenizer.json")
    saved = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END} | config
    (fast / "tokenizer_config.json").write_text(json.dumps(saved))
    for folder in slow, fast:
        tokenizer = find_tokenizer(folder).tokenizer
        text = tokenizer.decode(tokenizer.backend.encode("No , it is n't .").ids)
        assert text == ("No, it isn't." if cleans else "No , it is n't .")


def test_a_tokenizer_of_our_own_training_is_used_as_it_is(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "plain", {"clean_up_tokenization_spaces": False})
    find_tokenizer(tmp_path / "plain").write(tmp_path / "tokenizer.json")
    found = find_tokenizer(tmp_path)
    assert found.file == tmp_path / "tokenizer.json"
    assert found.tokenizer.decode(found.tokenizer.backend.encode("No .").ids) == "No ."


def test_what_training_last_asked_for_cuts_and_pads_no_prompt(phi: Path, tmp_path: Path) -> None:
    """A fast tokenizer's file holds the truncation and the padding of its last call."""
    find_tokenizer(phi).write(tmp_path / "tokenizer.json")
    usual = Tokenizer.from_file(tmp_path / "tokenizer.json")
    backend = Tokenizer.from_file(tmp_path / "tokenizer.json").backend
    backend.enable_truncation(5)
    backend.enable_padding(length=200)
    backend.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert found.prefix_ids() == usual.prefix_ids()
    assert found.question_ids("Is it?") == usual.question_ids("Is it?")
    assert found.answer_ids("No") == usual.answer_ids("No")


@pytest.mark.parametrize(
    ("part", "changes"), [(None, {"decoder": None}), ("model", {"dropout": 0.5})]
)
def test_a_tokenizer_that_gives_no_words_or_other_ones_each_time_is_refused(
    phi: Path, tmp_path: Path, part: str | None, changes: dict[str, Any]
) -> None:
    find_tokenizer(phi).write(tmp_path / "tokenizer.json")
    shutil.copy(phi / "tokenizer_config.json", tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (data[part] if part else data).update(changes)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="no words"):
        find_tokenizer(tmp_path).check(PRESETS["nano"].decoder)


def test_a_fast_tokenizer_is_held_against_its_map_of_special_tokens(
    phi: Path, tmp_path: Path
) -> None:
    find_tokenizer(phi).write(tmp_path / "tokenizer.json")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "the"}))
    assert find_tokenizer(tmp_path).end == "the"


@pytest.mark.parametrize("form", ["slow", "fast"])
def test_a_tokenizer_is_written_whole_or_not_at_all(
    phi: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = phi
    if form == "fast":
        find_tokenizer(phi).write(tmp_path / "tokenizer.json")
        folder = tmp_path
    found, target = find_tokenizer(folder), tmp_path / "out" / "tokenizer.json"
    target.parent.mkdir()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            found.write(target)
    assert list(target.parent.iterdir()) == []
    found.write(target)
    assert Tokenizer.from_file(target).question_ids("A?") == found.tokenizer.question_ids("A?")


def test_what_is_settled_of_a_cleaned_text_is_never_taken_back(phi: Path) -> None:
    tokenizer = find_tokenizer(phi).tokenizer
    draw = random.Random(0)
    pieces = [" n", "'", "t", " ", ".", " '", "s", "m", " ,", "re", "ve", "a", " ?", "!"]
    for _ in range(2000):
        ids: list[int] = []
        told = ""
        for _ in range(8):
            ids += tokenizer.backend.encode(draw.choice(pieces)).ids
            text = tokenizer.decode(ids)
            assert text.startswith(told), (text, told)
            settled = text[: max(len(text) - tokenizer.unsettled, 0)]
            told = settled if settled.startswith(told) else told


def test_only_tokens_that_exist_have_a_probability(phi: Path) -> None:
    tokenizer = find_tokenizer(phi).tokenizer
    count = len(vocabulary()) + 40
    logits = np.arange(count + 5, dtype=np.float32)
    masked = tokenizer.only_tokens(logits)
    assert masked.argmax() == count - 1
    assert (masked[count:] == IMPOSSIBLE).all()
    full = logits[:count]
    assert tokenizer.only_tokens(full) is full


# --- what is refused --------------------------------------------------------------------------


def edit_lines(change: Callable[[list[str]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        lines = path.read_text(encoding="utf-8").split("\n")
        change(lines)
        path.write_text("\n".join(lines), encoding="utf-8")

    return edit


def swap(lines: list[str]) -> None:
    lines[3000], lines[3001] = lines[3001], lines[3000]


def outrank(lines: list[str]) -> None:
    """A token of three before any of two that it may be made of; each line keeps its number."""
    first, second = lines[260].split()[0], lines[90_000].split()[0]
    lines[260], lines[90_000] = f"{second} 260", f"{first} 90000"


RANK_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "wrong rank": (edit_lines(lambda lines: lines.__setitem__(700, lines[700] + "1")), "line 701"),
    "swapped lines": (edit_lines(swap), "line 3001.*the rank 3000"),
    "too early": (edit_lines(outrank), "the rank 260, at which no merge makes it"),
    "twice": (edit_lines(lambda lines: lines.__setitem__(9, "AA== 9")), "line 10"),
    "not base64": (edit_lines(lambda lines: lines.__setitem__(5, "?? 5")), "line 6"),
    "cut in a line": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "line 100256"),
    "cut at a line": (edit_lines(lambda lines: lines.__delitem__(slice(50_000, -1))), "truncated"),
    "longer": (
        edit_lines(lambda lines: lines.insert(-1, "AAAAAAAA 100256")),
        "100,257 ranks, not 100,256",
    ),
    "empty": (lambda path: path.write_bytes(b""), "0 ranks"),
    "binary": (lambda path: path.write_bytes(bytes(99)), "line 1"),
    "a pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "Git-LFS pointer",
    ),
}


@pytest.mark.parametrize("fault", RANK_FAULTS)
def test_a_damaged_arcade100k_is_refused(arcade: Path, tmp_path: Path, fault: str) -> None:
    file = tmp_path / "arcade100k.tiktoken"
    file.write_bytes((arcade / file.name).read_bytes())
    damage, message = RANK_FAULTS[fault]
    damage(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        find_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return edit


def cut_lines(folder: Path) -> None:
    edit_lines(lambda lines: lines.__delitem__(slice(100, -1)))(folder / "merges.txt")


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no merges": (drop("merges.txt"), "merges.txt is missing"),
    "cut merges": (cut("merges.txt", 0.5), "truncated"),
    "cut at a line": (cut_lines, "made by no line of merges.txt"),
    "cut vocabulary": (cut("vocab.json", 0.5), "vocab.json is not valid JSON"),
    "another class": (config(tokenizer_class="LlamaTokenizer"), "LlamaTokenizer"),
    "other errors": (config(errors="ignore"), "errors = 'ignore'"),
    "special without id": (config(sep_token="<|sep|>"), "'<|sep|>' has an id in none"),
    "two ids": (
        config(added_tokens_decoder={"9": {"content": END, "special": True}}),
        "the id .* and the id 9",
    ),
    "one id twice": (
        config(added_tokens_decoder={"9": {"content": "<x>", "special": True}}),
        "the same id",
    ),
    "prefix space": (config(add_prefix_space=True), "add_prefix_space"),
    "no bos": (config(add_bos_token=True, bos_token=None), "add_bos_token"),
    "nothing": (drop("vocab.json"), "no tokenizer"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_files_that_would_give_other_ids_are_refused(tmp_path: Path, fault: str) -> None:
    write_phi(tmp_path)
    damage, message = FILE_FAULTS[fault]
    damage(tmp_path)
    if fault == "no bos":
        drop("special_tokens_map.json")(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        find_tokenizer(tmp_path)


def test_the_tokenizers_of_the_two_families_are_told_apart(tmp_path: Path) -> None:
    """Either fits into the rows of the other family's embedding, and would give it other words."""
    shutil.copy(bundle_path("modality-nano") / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="is a WordPiece"):
        find_tokenizer(tmp_path).check(PRESETS["nano"].decoder)
    of_nano = bundle_path("nano") / "tokenizer.json"
    with pytest.raises(ModelError, match=r"no \[CLS\] and \[SEP\] around a text"):
        ModalityTokenizer.from_file(of_nano, BertConfig(4000, 8, 4, 2, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 440}, "knows 456 tokens, the model 440"),
        ({"eos_token_id": 700}, "does not have: it is that of another model"),
        ({"eos_token_id": 5}, "ends texts with '<|endoftext|>', token 416"),
        ({"more_eos_token_ids": (900,)}, "the token 900, which the tokenizer does not have"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    phi: Path, changes: dict[str, Any], message: str
) -> None:
    usual = dataclasses.replace(PRESETS["tiny"].decoder, vocab_size=640, eos_token_id=416)
    found = find_tokenizer(phi)
    found.check(usual)
    found.check(dataclasses.replace(usual, eos_token_id=3, more_eos_token_ids=(416,)))
    with pytest.raises(ModelError) as caught:
        found.check(dataclasses.replace(usual, **changes))
    assert message in str(caught.value)
