"""Texts of a contrastive model: as its BERT reads them, as labels with prompts, as a key phrase.

A word is what BERT's splitting gives that holds a letter or digit and has pieces in the
vocabulary. Punctuation is read as context but is no word, and nor is an unknown piece: a script
that the vocabulary does not know says nothing. The tokenizer is any BERT `tokenizer.json`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from medmoe_edge.config_contrastive import BertConfig
from medmoe_edge.errors import DataError, InputError, ModelError
from medmoe_edge.prompt import Tokenizer

NO_WORD = -1  # the word index of marks, punctuation, unknown pieces and padding
OUTSIDE = 2**30  # of a word that takes part in the mean over a text alone, as published
PADDING = "[PAD]"
UNKNOWN = "[UNK]"
START, END = "[CLS]", "[SEP]"
MARKS = (PADDING, UNKNOWN, START, END)
MAX_CHARACTERS = 10_000  # far more than any model reads


def splitting(model: models.Model) -> Backend:
    """A tokenizer that splits texts as BERT does."""
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def word_pieces(vocabulary: dict[str, int]) -> Backend:
    """BERT's tokenizer over a vocabulary that holds `MARKS`: they stand around every text."""
    backend = splitting(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    backend.add_special_tokens(list(MARKS))
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(m, vocabulary[m]) for m in (START, END)]
    )
    return backend


class Pieces(NamedTuple):
    """T texts, padded to the longest one's P pieces.

    `ids` int64 `[T, P]`; `words` int64 `[T, P]`, each piece's word counted from 0 or `NO_WORD`;
    `seen` bool `[T, P]`, False for padding only.
    """

    ids: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    seen: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ModalityTokenizer:
    """Reads texts for a MedMoE; at most `max_pieces` pieces of each, the two marks included."""

    backend: Backend
    max_pieces: int
    as_published: bool = False

    @classmethod
    def from_file(
        cls, path: Path, text: BertConfig, *, as_published: bool = False
    ) -> "ModalityTokenizer":
        """Read `tokenizer.json`; raises `ModelError` unless it can be read and fits the model.

        `as_published` counts words as the authors' code does: see `published_words`.
        """
        tokenizer = Tokenizer.from_file(path)
        tokenizer.check_vocabulary(text.vocab_size)
        backend = tokenizer.backend
        tokens = backend.encode("a").tokens
        if not tokens or (tokens[0], tokens[-1]) != (START, END):
            raise ModelError(
                f"The tokenizer puts no {START} and {END} around a text, as a BERT's does: it is "
                "that of another model.",
                "Use the tokenizer.json that belongs to this model.",
            )
        backend.enable_truncation(text.max_pieces)
        return cls(backend, text.max_pieces, as_published)

    def encode(self, texts: Sequence[str]) -> Pieces:
        """The pieces of at least one text; what is beyond `max_pieces` is not read: `check_whole`.

        Raises `InputError` for a text without a word or of invalid Unicode.
        """
        encodings = [self._encode(text) for text in texts]
        shape = len(texts), max(len(encoding.ids) for encoding in encodings)
        padding = self.backend.token_to_id(PADDING) or 0
        ids, words = np.full(shape, padding, np.int64), np.full(shape, NO_WORD, np.int64)
        seen = np.zeros(shape, np.bool_)
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            length = len(encoding.ids)
            ids[row, :length], seen[row, :length] = encoding.ids, True
            words[row, :length] = known = _word_indices(text, encoding)
            if self.as_published:
                words[row, :length] = published_words(encoding.tokens)
            if max(known) == NO_WORD:
                raise InputError(
                    "A text has no word that the model can read.",
                    "Write words in Latin letters, such as: pleural effusion.",
                )
        return Pieces(ids, words, seen)

    def check_whole(self, texts: Sequence[str]) -> None:
        """Raise `InputError` for a text of which only the beginning would be read."""
        for text in texts:
            if len(text) > MAX_CHARACTERS or self._encode(text).overflowing:
                most = self.max_pieces - 2  # the marks around it
                raise InputError(
                    f"A text has more than the {most} word pieces that the model reads.",
                    "Write it in fewer words.",
                )

    def _encode(self, text: str) -> Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("A text is not valid Unicode.", "Type it as UTF-8.") from error
        return self.backend.encode(text[:MAX_CHARACTERS])


def _word_indices(text: str, encoding: Encoding) -> list[int]:
    """Each piece's word, counted from 0 in reading order, or `NO_WORD`."""
    readable: dict[int, bool] = {}  # of each stretch that the splitting gave
    for word, token, (start, end) in zip(
        encoding.word_ids, encoding.tokens, encoding.offsets, strict=True
    ):
        if word is not None:
            known = token != UNKNOWN and any(c.isalnum() for c in text[start:end])
            readable[word] = readable.get(word, False) or known
    number = {word: at for at, word in enumerate(w for w, readable in readable.items() if readable)}
    return [NO_WORD if w is None else number.get(w, NO_WORD) for w in encoding.word_ids]


def published_words(tokens: Sequence[str]) -> list[int]:
    """Each piece's word as the authors' code counts: whatever does not begin with ## begins one.

    The marks and punctuation are words. Of n words that do not begin with a bracket the first
    n + 1 are compared with regions, the first mark among them; the others are from `OUTSIDE` on.
    """
    starts = [not token.startswith("##") for token in tokens]
    indices = [sum(starts[: at + 1]) - 1 for at in range(len(tokens))]
    named = [token for token, start in zip(tokens, starts, strict=True) if start]
    compared = sum(not token.startswith("[") for token in named) + 1
    return [index if index < compared else OUTSIDE + index for index in indices]


MAX_BYTES = 2**20
EXAMPLE = 'Write: {"pneumonia": ["pneumonia", "consolidation of the lung"], "no finding": [...]}'

Prompts = dict[str, list[str]]


def read_prompts(path: Path) -> Prompts:
    """Label -> prompts, from a JSON file; raises `DataError` for anything else."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise DataError(f"{path} is larger than 1 MB.", "Give fewer prompts.")
        found = json.loads(text, object_pairs_hook=_once)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {(error.strerror or 'unknown reason').lower()}.",
            "Check the path and its permissions.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON file.", EXAMPLE) from error
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds no labels.", EXAMPLE)
    for label, prompts in found.items():
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise DataError(f"{path}: the prompts of {label!r} are no list of texts.", EXAMPLE)
    return found


def parse_labels(given: str) -> list[str]:
    """The labels of a list with commas."""
    return [label.strip() for label in given.split(",") if label.strip()]


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DataError("The prompts name a label twice.", "Put all its prompts into one list.")
    return found


# Words of English questions that name nothing to be seen. Of other languages none is left out.
ENGLISH = """
a an any the this that these those there here it its is are was were be been being am do does did
has have had having can could may might will would shall should must what which who whom whose where
when why how many much kind type of in on at by to for from with within without and or as if not no
yes you your i we us our me my they their see seen seeing show shows shown showing image images
picture pictures scan photo please tell describe present visible located appear appears
"""
UNSEEN = frozenset(ENGLISH.split())
YES_NO = {"yes", "no"}


def key_phrase(question: str, answer: str) -> str:
    """The question's content words, and those of an answer other than yes or no.

    A text is kept word by word, as it was written, without `UNSEEN`; what has no words but those
    (or is in a language that does not part them) stays the whole question.
    """
    words = _content(question)
    if answer.strip(" .!").lower() not in YES_NO:
        words += [word for word in _content(answer) if word not in words]
    return " ".join(words) or question


def _content(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text)
    return [word for word in words if word.lower() not in UNSEEN]
