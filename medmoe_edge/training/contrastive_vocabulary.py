"""A small WordPiece vocabulary, trained on captions, for a BERT that starts from nothing."""

import os
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from medmoe_edge.contrastive.text import PADDING, UNKNOWN

START, END = "[CLS]", "[SEP]"

_MARKS = [PADDING, UNKNOWN, START, END]
_LETTERS = string.ascii_lowercase + string.digits
# Given to the trainer beforehand, or it numbers the pieces within words in another order each time
# and breaks ties by that.
_BASE = [*_MARKS, *string.punctuation, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]


def train_word_pieces(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Write `tokenizer.json`: lower case, no accents, the marks around a text; id 0 is padding.

    Any text in Latin letters can be encoded, also words that training never showed. The same texts
    give the same file.
    """
    trained = _reading(models.WordPiece(unk_token=UNKNOWN))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=_BASE, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    vocabulary = trained.get_vocab()
    backend = _reading(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    backend.add_special_tokens(_MARKS)
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(m, vocabulary[m]) for m in (START, END)]
    )
    partial = path.with_suffix(".partial")
    backend.save(str(partial))
    os.replace(partial, path)


def _reading(model: models.WordPiece) -> Backend:
    """A tokenizer that splits texts as BERT does."""
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend
