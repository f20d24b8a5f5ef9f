"""Tokenizers in the forms that the official trainers save, and what they should give.

`transformers` 5 has no slow tokenizers any more, so what ours is held against is written here after
the published algorithms, without the library that ours is made of: byte-level BPE as GPT-2 has it
(https://github.com/openai/gpt-2, encoder.py) behind a search for added tokens, the longest first,
and tiktoken's merges by rank.
"""

import base64
import functools
import itertools
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

GPT2_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
RANKED_WORDS = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "Is there effusion in the left lung? No. It is a CT of the chest, and the lungs are clear. "
    "don't they've we're I'm he's it'll 12345 3.14 2024  größe naïve 日本語テスト 🙂 résumé "
    "Привет мир "
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:\n\n"
    "   a    b\t\tc aaaaaaaa 000000 ====== "
)
END = "<|endoftext|>"
MERGES = 160
CLEANED = [(f" {mark}", mark) for mark in ".?!,"] + [(" ' ", "'")]
CLEANED += [(f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")]


@functools.cache
def letters() -> tuple[str, ...]:
    """The character that stands for each byte: itself where it can be seen, or one from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return tuple(chr(byte if byte in seen else next(spare)) for byte in range(256))


@functools.cache
def learned() -> tuple[tuple[bytes, bytes], ...]:
    """`MERGES` merges of pairs of byte strings, learned on `CORPUS`, the most frequent first."""
    words = Counter(match.group() for match in GPT2_WORDS.finditer(CORPUS * 3))
    parts = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < MERGES:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(parts[word]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            parts[word] = joined(parts[word], best)
    return tuple(merges)


def joined(parts: Sequence[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """The parts with every occurrence of the pair, from the left, made one."""
    made: list[bytes] = []
    index = 0
    while index < len(parts):
        both = tuple(parts[index : index + 2]) == pair
        made.append(parts[index] + parts[index + 1] if both else parts[index])
        index += 1 + both
    return made


def vocabulary() -> dict[bytes, int]:
    """Ids of GPT-2's form: the 256 bytes in the order of their characters, then the merges."""
    bytes_in_order = sorted(range(256), key=lambda byte: letters()[byte])
    tokens = [bytes([byte]) for byte in bytes_in_order]
    return {token: index for index, token in enumerate([*tokens, *(a + b for a, b in learned())])}


def shown(token: bytes) -> str:
    """A token as vocab.json and merges.txt spell it."""
    return "".join(letters()[byte] for byte in token)


def write_gpt2(folder: Path, config: Mapping[str, Any], added: Mapping[str, int] = {}) -> int:
    """Files as transformers 4's slow tokenizers save them; returns the number of tokens.

    `config` is put over the usual tokenizer_config.json; `added` are added_tokens.json's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = {shown(token): index for token, index in vocabulary().items()}
    ids[END] = len(ids)
    lines = ["#version: 0.2", *(f"{shown(a)} {shown(b)}" for a, b in learned()), ""]
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {f"{name}_token": END for name in ("bos", "eos", "unk")}
    usual = {
        "add_prefix_space": False,
        "model_max_length": 2048,
        "tokenizer_class": "GPT2Tokenizer",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(special | usual | dict(config)))
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(dict(added)))
    return len(ids) + len(added)


def write_phi(folder: Path) -> int:
    """Phi-2's: runs of spaces and tabs as added tokens, and the unknown token of MoE-LLaVA."""
    runs = [" " * length for length in range(31, 1, -1)]
    runs += ["\t" * length for length in range(9, 1, -1)]
    first = len(vocabulary()) + 1
    added = {text: first + index for index, text in enumerate([*runs, "<|extra_0|>"])}
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    decoder = {
        str(index): {"content": text, "normalized": text in runs, "special": text not in runs}
        | flags
        for text, index in {END: first - 1, **added}.items()
    }
    config = {
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": True,
        "tokenizer_class": "CodeGenTokenizer",
        "unk_token": "<|extra_0|>",
    }
    return write_gpt2(folder, config, added)


def write_ranks(path: Path, count: int) -> dict[bytes, int]:
    """A tiktoken file of `count` ranks: bytes, what was learned, then pairs and triples."""
    tokens = dict.fromkeys([bytes([byte]) for byte in range(256)])
    tokens |= dict.fromkeys(a + b for a, b in learned())
    common = b"etaoinshrdlucmfwypvbgkqjxzETAOINSHRDLUCMFWYPVBGKQJXZ"
    for pair in ((a, b) for a in common for b in common):
        tokens[bytes(pair)] = None
    for triple in ((a, b, c) for a in common for b in common for c in common):
        if len(tokens) < count:
            tokens[bytes(triple)] = None
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    path.write_bytes(b"".join(lines))
    return ranks


class SlowTokenizer:
    """Ids as a slow tokenizer gives them; `order` is the rank of each pair, by what it makes."""

    def __init__(
        self, ids: Mapping[bytes, int], added: Mapping[str, int], *, ranked: bool = False
    ) -> None:
        self.ids, self.added, self.ranked = ids, added, ranked
        self.order = {pair: rank for rank, pair in enumerate(learned())}
        longest_first = sorted(added, key=len, reverse=True)
        self.split = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        if self.ranked:
            text = unicodedata.normalize("NFC", text)
        words = RANKED_WORDS if self.ranked else GPT2_WORDS
        found: list[int] = []
        for part in self.split.split(text) if self.added else [text]:
            if part in self.added:
                found.append(self.added[part])
            else:
                for match in words.finditer(part):
                    found += self.word(match.group().encode())
        return found

    @functools.cache  # noqa: B019 -- as long as its test
    def word(self, word: bytes) -> list[int]:
        """The ids of what lies between two splits."""
        if self.ranked and word in self.ids:
            return [self.ids[word]]
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            none = len(self.ids)
            ranks = [
                self.ids.get(a + b, none) if self.ranked else self.order.get((a, b), none)
                for a, b in pairs
            ]
            best = min(ranks)
            if best == none:
                break
            if self.ranked:  # one place at a time
                at = ranks.index(best)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            else:
                parts = joined(parts, pairs[ranks.index(best)])
        return [self.ids[part] for part in parts]

    def text(self, ids: Sequence[int], special: set[int], *, clean: bool) -> str:
        """The text of ids without the special ones."""
        tokens = {index: token for token, index in self.ids.items()}
        tokens |= {index: text.encode() for text, index in self.added.items()}
        joined_bytes = b"".join(tokens[index] for index in ids if index not in special)
        text = joined_bytes.decode("utf-8", errors="replace")
        for before, after in CLEANED if clean else []:
            text = text.replace(before, after)
        return text


POOLS = (
    "abcdefghij XYZ ,.?!'\"-",
    "0123456789 .,",
    " \t\n\r\x0b\x0c\xa0\u2003\u3000",
    "äöüßéñçøåÆ \u017f",
    "日本語テスト中文한국어",
    "🙂👩\u200d⚕️e\u0301s\u0323\u0307ﬁ①Ⅷ²½",
    "Приветмирاختبارעבריתहिन्दी",
    "\x00\x01\x1b\x1c\x1d\x1e\x1f\x7f\x85\u200b\ufeff",
)
WORDS = (
    *("the", "lung", " is", " there", "'s", "'ll", "'RE", "don't", " n't", " effusion", "CT"),
    *("MRI", " .", " ,", "  ", "    ", "\n\n", "12", "2024", "'\u017f", "aaaaa", "a" * 9, " ' "),
)


def prompts(count: int, special: Sequence[str], seed: int = 0) -> Iterator[str]:
    """Texts of words, characters of many scripts, runs of space, digits and special tokens."""
    draw = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(1, 12)):
            kind = draw.random()
            if kind < 0.35:
                parts.append(draw.choice(WORDS))
            elif kind < 0.5:
                parts.append(draw.choice(special))
            else:
                pool = draw.choice(POOLS)
                parts.append("".join(draw.choice(pool) for _ in range(draw.randrange(1, 8))))
        yield "".join(parts)
