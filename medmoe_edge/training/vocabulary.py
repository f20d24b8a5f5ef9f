"""A small byte-level BPE tokenizer, trained on the questions and answers a model will meet."""

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from medmoe_edge.prompt import AFTER_IMAGE, BEFORE_IMAGE

END = "<|endoftext|>"


def train_tokenizer(texts: Iterable[tuple[str, str]], vocab_size: int, path: Path) -> None:
    """Write `tokenizer.json` for `(question, answer)` pairs; id 0 is the end token.

    Byte level: any text can be encoded, also what training never showed.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [AFTER_IMAGE.format(question=question) + f" {answer}" for question, answer in texts]
    # the system prompt is in every conversation: repeated, so that its words become tokens
    backend.train_from_iterator([*lines, *[BEFORE_IMAGE] * 20], trainer)
    partial = path.with_suffix(".partial")
    backend.save(str(partial))
    os.replace(partial, path)
