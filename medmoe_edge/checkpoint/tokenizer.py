"""The tokenizer of a checkpoint, in whichever form its folder holds, as a `tokenizers.Tokenizer`.

    tokenizer.json                     as it is
    arcade100k.tiktoken                StableLM-2's own, and qwen.tiktoken: ranks of byte strings
    vocab.json, merges.txt             Phi's CodeGenTokenizer, StableLM's GPT2Tokenizer

The last two are what the official trainers save (`use_fast=False`), with added_tokens.json,
special_tokens_map.json and tokenizer_config.json beside them. Only data is read: the Python file
that comes with a tiktoken form is never executed, so what it says stands here as a table.

Sources: transformers 4.57's slow tokenizers (GPT2Tokenizer, CodeGenTokenizer and their base), whose
ids are reproduced; tiktoken 0.14's encoding; the tables of `tokenization_arcade100k.py`
(stabilityai/stablelm-2-1_6b) and of `tokenization_qwen.py` (Qwen/Qwen-1_8B).
"""

import base64
import binascii
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Backend

from medmoe_edge.atomic import atomic_file
from medmoe_edge.checkpoint.tensors import check_file, read_json
from medmoe_edge.config import DecoderConfig
from medmoe_edge.errors import CheckpointError
from medmoe_edge.prompt import Tokenizer

FAST_FILE = "tokenizer.json"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE, SPECIAL_FILE = "added_tokens.json", "special_tokens_map.json"

# Byte-level BPE with GPT-2's way to split a text; others would give other ids without a word.
_GPT2_CLASSES = frozenset(
    f"{name}Tokenizer{fast}" for name in ("GPT2", "CodeGen") for fast in ("", "Fast")
)
_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
    *("mask_token", "additional_special_tokens"),
)
# Where tokenizer_config.json does not say: transformers 4 cleaned up the texts of fast and slow
# tokenizers alike until 4.45 (https://github.com/huggingface/transformers/issues/31884), so also in
# the release that Med-MoE's authors use (4.37), and later ones write the value down. transformers 5
# does not, and does not clean up; its files have the key "backend".
CLEANS_UP = True
# What transformers 4's `clean_up_tokenization` replaces in a decoded text, in this order.
_CLEANED = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m"}
_CLEANED |= {" 's": "'s", " 've": "'ve", " 're": "'re"}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_COPY = "Copy the tokenizer's files again from where the model was published."


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A vocabulary in tiktoken's form: so many ranks, and special tokens from an id on.

    Between the ranks and the special tokens there may be ids that no token has.
    """

    ranks: int
    first_special: int
    special: tuple[str, ...]
    end: str = "<|endoftext|>"


_ARCADE_CODE = "gh_stars filename issue_start issue_comment issue_closed jupyter_start jupyter_text"
_ARCADE_CODE += " jupyter_code jupyter_output empty_output commit_before commit_msg commit_after"
TIKTOKEN: Mapping[str, Ranks] = {
    "arcade100k.tiktoken": Ranks(
        ranks=100_256,
        first_special=100_257,  # no token has the id 100256
        special=(
            "<|endoftext|>",
            *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
            *(f"<{name}>" for name in (*_ARCADE_CODE.split(), "reponame")),
            *("<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>"),
            *(f"<|reg{index}|>" for index in range(8)),
            "<|extra0|>",
        ),
    ),
    "qwen.tiktoken": Ranks(
        ranks=151_643,
        first_special=151_643,
        special=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            *(f"<|extra_{index}|>" for index in range(205)),
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class FoundTokenizer:
    """A folder's tokenizer; `file` is its tokenizer.json where that is used as it stands.

    `end` is the token that the folder names as the end of a text, None where it names none.
    """

    tokenizer: Tokenizer
    file: Path | None
    end: str | None

    def check(self, decoder: DecoderConfig) -> None:
        """Raise `CheckpointError` unless it belongs to weights of this configuration."""
        self.tokenizer.check_vocabulary(decoder.vocab_size)
        backend = self.tokenizer.backend
        if not isinstance(backend.model, models.BPE):
            raise CheckpointError(
                f"The tokenizer is a {type(backend.model).__name__}, and all of these decoders "
                "read byte pairs (BPE): it is that of another model.",
                _COPY,
            )
        if backend.decoder is None or backend.model.dropout:
            raise CheckpointError(
                f"{FAST_FILE} has decoder = {backend.decoder} and dropout = "
                f"{backend.model.dropout}: its texts would be no words, or other ones each time.",
                _COPY,
            )
        ends = decoder.end_tokens
        for end in ends:
            if backend.id_to_token(end) is None:
                raise CheckpointError(
                    f"config.json ends answers with the token {end}, which the tokenizer does not "
                    "have: it is that of another model.",
                    "Put the tokenizer's files of this very model into the folder.",
                )
        if self.end is None:
            return
        own = backend.token_to_id(self.end)
        if own is None:
            raise CheckpointError(
                f"The tokenizer names {self.end!r} as the end of a text and has no such token.",
                _COPY,
            )
        if own not in ends:
            raise CheckpointError(
                f"The tokenizer ends texts with {self.end!r}, token {own}, and config.json with "
                f"token {ends[0]}: one of the two is of another model.",
                f"Use this model's tokenizer; if it is, set eos_token_id in config.json to {own}.",
            )

    def write(self, path: Path) -> None:
        """Write it as a tokenizer.json, the bytes of the folder's own where that is used."""
        if self.file is not None:
            content = self.file.read_bytes()
        else:
            content = self.tokenizer.backend.to_str(pretty=False).encode()
        with atomic_file(path) as file:
            file.write(content)


def find_tokenizer(folder: Path) -> FoundTokenizer:
    """Read the tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: There is none, or it is of a form or a state that would give other ids
            than the model was trained with.
    """
    config = _json(folder / CONFIG_FILE)
    special = _json(folder / SPECIAL_FILE)
    end = _content(config.get("eos_token")) or _content(special.get("eos_token"))
    if (folder / FAST_FILE).exists():
        check_file(folder / FAST_FILE)
        tokenizer = Tokenizer.from_file(folder / FAST_FILE)
        # without a configuration no transformers saved the folder: our own training did
        if not config or not _cleans_up(config) or tokenizer.backend.decoder is None:
            return FoundTokenizer(tokenizer, folder / FAST_FILE, end)
        tokenizer.backend.decoder = _cleaning(tokenizer.backend.decoder)
        return FoundTokenizer(tokenizer, None, end)
    for name, ranks in TIKTOKEN.items():
        if (folder / name).exists():
            return FoundTokenizer(_of(_from_ranks(folder / name, ranks)), None, ranks.end)
    if (folder / VOCABULARY_FILE).exists():
        backend = _from_merges(folder, config, special)
        return FoundTokenizer(_of(backend), None, end)
    forms = f"{FAST_FILE}, {VOCABULARY_FILE} with {MERGES_FILE}, {' or '.join(TIKTOKEN)}"
    raise CheckpointError(
        f"{folder} has no tokenizer: no tokenizer.json, and none of the other forms.",
        f"Copy the model's {forms} into it.",
    )


def _of(backend: Backend) -> Tokenizer:
    backend.encode_special_tokens = True  # as `Tokenizer.from_file` has it
    return Tokenizer(backend)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: object) -> str | None:
    """The text of a token that a JSON file holds as text or as an object with its flags."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _from_ranks(path: Path, form: Ranks) -> Backend:
    """tiktoken's form: BPE whose merges are found from the ranks of what they make.

    tiktoken merges the pair whose joined bytes have the lowest rank. A token's own bytes, merged
    by the ranks below its own, end in the one pair that can make it, whatever stands around them.
    """
    check_file(path)
    ranks = _read_ranks(path)
    if len(ranks) != form.ranks:
        state = "truncated" if len(ranks) < form.ranks else "of another model"
        raise CheckpointError(
            f"{path.name} holds {len(ranks):,} ranks, not {form.ranks:,}: it is {state}.", _COPY
        )
    letters = byte_letters()
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _merged(token, ranks, rank)
            if len(parts) != 2:
                raise CheckpointError(
                    f"{path.name} gives {token!r} the rank {rank}, at which no merge makes it.",
                    _COPY,
                )
            merges.append((words[parts[0]], words[parts[1]]))
        elif rank >= 256:
            raise CheckpointError(f"{path.name} gives the byte {token!r} the rank {rank}.", _COPY)
    special = {name: form.first_special + index for index, name in enumerate(form.special)}
    vocabulary = {words[token]: rank for token, rank in ranks.items()} | special
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return backend


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Byte strings and their ranks, which are the numbers of their lines."""
    ranks: dict[bytes, int] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            if not token or token in ranks or int(rank) != number - 1:
                raise ValueError
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path.name}, line {number}: {line[:40].decode('ascii', 'replace')!r} is not "
                f"a new token in base64 with the rank {number - 1}.",
                _COPY,
            ) from None
        ranks[token] = number - 1
    return ranks


def _merged(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """A token's bytes after every merge whose result has a rank `below` its own."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 1:
        made = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        best = min(made)
        if best >= below:
            break
        place = made.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies.

    Source: GPT-2's encoder.py (Radford et al., 2019): printable Latin-1 stands for itself, the
    rest are the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def _from_merges(folder: Path, config: Mapping[str, Any], special: Mapping[str, Any]) -> Backend:
    """GPT-2's form, as transformers' slow tokenizers read it."""
    _check_class(config)
    vocabulary: dict[str, int] = _ids(folder / VOCABULARY_FILE)
    merges = _read_merges(folder / MERGES_FILE)
    added = _added_tokens(folder, config, special, vocabulary)
    _check_complete(vocabulary, merges, {token.content for token in added.values()})
    vocabulary = vocabulary | {token.content: index for index, token in added.items()}
    if len(set(vocabulary.values())) != len(vocabulary):
        raise CheckpointError(f"Two tokens of {folder} have the same id.", _COPY)
    try:
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the Rust binding raises bare Exception
        raise CheckpointError(
            f"{VOCABULARY_FILE} and {MERGES_FILE} do not belong together ({error}).", _COPY
        ) from error
    prefixed = bool(config.get("add_prefix_space", False))
    if prefixed and not all(token.special for token in added.values()):
        raise CheckpointError(
            f"{CONFIG_FILE} has add_prefix_space beside added tokens that are not special.",
            f"Save the model's {FAST_FILE} instead.",
        )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    backend.decoder = decoders.ByteLevel()
    if _cleans_up(config):
        backend.decoder = _cleaning(backend.decoder)
    # Slow tokenizers look for all added tokens at once, with the longest first.
    for _, token in sorted(added.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    if config.get("add_bos_token", False):
        start = _content(config.get("bos_token")) or _content(special.get("bos_token"))
        _start_with(backend, start)
    return backend


def _check_class(config: Mapping[str, Any]) -> None:
    name = config.get("tokenizer_class", "GPT2Tokenizer")
    if name not in _GPT2_CLASSES or config.get("errors", "replace") != "replace":
        raise CheckpointError(
            f"{CONFIG_FILE} names {name!r} with errors = {config.get('errors', 'replace')!r}; "
            f"{VOCABULARY_FILE} is read as one of {', '.join(sorted(_GPT2_CLASSES))}.",
            f"Save the model's fast tokenizer, {FAST_FILE}, into the folder.",
        )


def _ids(path: Path) -> dict[str, int]:
    """A JSON object of tokens and ids."""
    data = read_json(path)
    for token, index in data.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 2**24:
            raise CheckpointError(f"{path.name} gives {token!r} the id {index!r}.", _COPY)
    return data


def _read_merges(path: Path) -> list[tuple[str, str]]:
    check_file(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path.name} is not UTF-8: it is truncated or damaged.", _COPY
        ) from error
    if lines[-1]:
        raise CheckpointError(f"{path.name} ends within a line: it is truncated.", _COPY)
    merges = []
    for number, line in enumerate(lines[:-1], 1):
        if number == 1 and line.startswith("#version"):
            continue
        parts = tuple(line.split(" "))
        if len(parts) != 2 or not all(parts):
            raise CheckpointError(f"{path.name}, line {number}: {line[:40]!r} is no merge.", _COPY)
        merges.append((parts[0], parts[1]))
    return merges


def _check_complete(
    vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], added: set[str]
) -> None:
    """Refuse merges that are cut short: each token is a byte, what a merge makes, or added."""
    made = {left + right for left, right in merges}
    lost = [token for token in vocabulary if len(token) > 1 and token not in made | added]
    if lost:
        raise CheckpointError(
            f"{len(lost):,} tokens of {VOCABULARY_FILE}, such as {lost[0]!r}, are made by no line "
            f"of {MERGES_FILE}: it is truncated or of another model.",
            _COPY,
        )
    missing = [letter for letter in byte_letters() if letter not in vocabulary]
    if missing:
        raise CheckpointError(
            f"{VOCABULARY_FILE} has no token for {len(missing)} of the 256 bytes.", _COPY
        )


def _added_tokens(
    folder: Path,
    config: Mapping[str, Any],
    special: Mapping[str, Any],
    vocabulary: Mapping[str, int],
) -> dict[int, AddedToken]:
    """The tokens beside the merges, by id, with their flags.

    Those of tokenizer_config.json, of added_tokens.json, and the special ones that vocab.json has.
    """
    named = _special_tokens(config) | _special_tokens(special)
    found: dict[str, tuple[int, AddedToken]] = {}
    for key, flags in (config.get("added_tokens_decoder") or {}).items():
        text = _content(flags)
        if not key.isdigit() or text is None or not isinstance(flags, Mapping):
            raise CheckpointError(f"{CONFIG_FILE} has an added token {key!r}: {flags!r}.", _COPY)
        found[text] = (int(key), _token(text, flags, special=bool(flags.get("special"))))
    listed = _ids(folder / ADDED_FILE) if (folder / ADDED_FILE).exists() else {}
    for text, index in (*listed.items(), *((text, vocabulary.get(text)) for text in named)):
        if index is None and text not in found:
            raise CheckpointError(
                f"The special token {text!r} has an id in none of the tokenizer's files.", _COPY
            )
        if index is not None and found.get(text, (index,))[0] != index:
            raise CheckpointError(
                f"The token {text!r} has the id {index} and the id {found[text][0]}.", _COPY
            )
        if text not in found:
            assert index is not None
            found[text] = (index, _token(text, named.get(text, {}), special=text in named))
    return dict(found.values())


def _special_tokens(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The texts of the special tokens that a file names, with the flags it gives them."""
    found = {}
    for key in _SPECIAL:
        value = data.get(key)
        for token in value if isinstance(value, list) else [value]:
            text = _content(token)
            if text is not None:
                found[text] = token if isinstance(token, Mapping) else {}
    return found


def _token(text: str, flags: Mapping[str, Any], *, special: bool) -> AddedToken:
    """`normalized` says nothing here: these tokenizers have no normalizer."""
    kept = {name: bool(flags.get(name)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(text, normalized=False, special=special, **kept)


def _start_with(backend: Backend, start: str | None) -> None:
    index = None if start is None else backend.token_to_id(start)
    if start is None or index is None:
        raise CheckpointError(f"{CONFIG_FILE} has add_bos_token, and {start!r} is no token.", _COPY)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, index)]
    )


def _cleans_up(config: Mapping[str, Any]) -> bool:
    """Whether the transformers that saved a tokenizer_config.json cleans up what it decodes."""
    return bool(config.get("clean_up_tokenization_spaces", CLEANS_UP and "backend" not in config))


def _cleaning(decoder: Any) -> Any:
    """A decoder that does to its text what `clean_up_tokenization_spaces` does."""
    replaced = [decoders.Replace(before, after) for before, after in _CLEANED.items()]
    return decoders.Sequence([decoder, *replaced])
