"""Texts as MedMoE's BERT reads them: word pieces, and which word each piece belongs to.

A word is what BERT's splitting gives that holds a letter or digit and has pieces in the
vocabulary. Punctuation is read as context but is no word, and nor is an unknown piece: a script
that the vocabulary does not know says nothing. The tokenizer is any BERT `tokenizer.json`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from medmoe_edge.config_contrastive import BertConfig
from medmoe_edge.errors import InputError
from medmoe_edge.prompt import Tokenizer

NO_WORD = -1  # the word index of marks, punctuation, unknown pieces and padding
PADDING = "[PAD]"
UNKNOWN = "[UNK]"
MAX_CHARACTERS = 10_000  # far more than any model reads


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

    @classmethod
    def from_file(cls, path: Path, text: BertConfig) -> "ModalityTokenizer":
        """Read `tokenizer.json`; raises `ModelError` unless it can be read and fits the model."""
        tokenizer = Tokenizer.from_file(path)
        tokenizer.check_vocabulary(text.vocab_size)
        backend = tokenizer.backend
        backend.no_padding()
        backend.enable_truncation(text.max_pieces)
        return cls(backend, text.max_pieces)

    def encode(self, texts: Sequence[str]) -> Pieces:
        """The pieces of at least one text; what is beyond `max_pieces` is not read.

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
            words[row, :length] = _word_indices(text, encoding)
            if words[row].max() == NO_WORD:
                raise InputError(
                    "A text has no word that the model can read.",
                    "Write words in Latin letters, such as: pleural effusion.",
                )
        return Pieces(ids, words, seen)

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
