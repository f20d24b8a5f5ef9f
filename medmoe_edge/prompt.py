"""The conversation template of Med-MoE and the tokenizer that goes with a model.

The prompt falls into two parts, split at `<image>`, which is in no vocabulary: the prefix up to
the image is the same for every question and is prefilled once, the rest carries the question.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from medmoe_edge._types import Floats
from medmoe_edge.config import Refusal, RefusalCode
from medmoe_edge.errors import InputError, ModelError, Notice, of_file

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
BEFORE_IMAGE = f"{SYSTEM} USER: "
AFTER_IMAGE = "\n{question} ASSISTANT:"
IMAGE = "<image>"  # where the template has the image; of a question it is no part
MAX_QUESTION_CHARACTERS = 10_000
# A logit of probability 0. An infinite one would make 0 x infinity, NaN, in a divergence.
IMPOSSIBLE = float(np.finfo(np.float32).min)
# How many characters at the end of a decoded text the next token may still change, where the
# tokenizer cleans up spaces: " n ' t" becomes "n't".
UNSETTLED = 5
STAND_IN = "<|stand-in tokenizer|>"  # a token of those that `init` writes


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, from a `tokenizer.json`."""

    backend: Backend

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`; raises `ModelError` where it is missing or malformed."""
        try:
            if not path.is_file():  # a pipe might be read for ever
                raise FileNotFoundError(path)
            backend = Backend.from_file(str(path))
        except Exception as error:  # the Rust binding raises bare Exception
            what = f"The tokenizer {path.name}"
            other = ModelError(f"{what} cannot be read.", "Export or copy the model again.")
            raise of_file(what, error, other) from error
        backend.encode_special_tokens = True  # typed in a question, the end token is mere text
        # What training last asked for stays in the file; transformers sets both anew at each call.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend)

    def check_vocabulary(self, size: int) -> None:
        """Raise `ModelError` unless each of its tokens has one of `size` embeddings."""
        tokens = self._beyond
        if tokens > size:
            raise ModelError(
                f"The tokenizer knows {tokens:,} tokens, the model {size:,}.",
                "Use the tokenizer.json that belongs to this model.",
            )

    @functools.cached_property
    def _ids(self) -> npt.NDArray[np.int64]:
        """The ids of all tokens, in order; some below the highest may be missing."""
        return np.sort(np.fromiter(self.backend.get_vocab(True).values(), np.int64))

    @property
    def _beyond(self) -> int:
        """The first id behind all tokens."""
        return int(self._ids[-1]) + 1 if len(self._ids) else 0

    @functools.cached_property
    def _holes(self) -> npt.NDArray[np.int64]:
        """Ids before that which no token has."""
        return np.setdiff1d(np.arange(self._beyond), self._ids)

    def known(self, rows: int) -> npt.NDArray[np.bool_]:
        """Which of a head's `rows` are a token's; `[rows]`."""
        known = np.arange(rows) < self._beyond
        known[self._holes[self._holes < rows]] = False
        return known

    def only_tokens(self, logits: Floats) -> Floats:
        """Logits `[..., V]` with `IMPOSSIBLE` in the rows that no token has.

        Stored heads have more rows than their tokenizer has tokens (Phi 51,200 for 50,296), and a
        vocabulary may have holes (StableLM's at 100,256). Everything that chooses a token, or
        compares or reports probabilities, does so over the tokens that exist.
        """
        if len(self._ids) == logits.shape[-1]:
            return logits
        masked = logits.copy()
        masked[..., self._beyond :] = IMPOSSIBLE
        masked[..., self._holes] = IMPOSSIBLE
        return masked

    def ids_of(self, refusals: Iterable[Refusal]) -> dict[RefusalCode, int]:
        """The token of each refusal, by its code; raises `ModelError` for one that it lacks."""
        ids = {}
        for refusal in refusals:
            found = self.backend.token_to_id(refusal.token)
            if found is None:
                raise ModelError(
                    f"The model refuses by the token {refusal.token!r}, which the tokenizer does "
                    "not have.",
                    "Use the tokenizer.json that belongs to this model.",
                )
            ids[refusal.code] = found
        return ids

    @functools.cached_property
    def unsettled(self) -> int:
        """How many characters at the end of a decoded text the next token may still change."""
        decoder = self.backend.decoder
        state = b"" if decoder is None else decoder.__getstate__()  # its JSON
        return UNSETTLED if b'"Replace"' in state else 0

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What must be known of every answer: that this is no model's own tokenizer."""
        if self.backend.token_to_id(STAND_IN) is None:
            return ()
        what = "The tokenizer is a stand-in written by init: it is no model's own."
        return (Notice("stand_in_tokenizer", what),)

    def prefix_ids(self) -> list[int]:
        """Token ids before the image, with a start token where the tokenizer itself adds one.

        The published models name a `bos_token_id`, but their tokenizers never put it in front.
        """
        return list(self.backend.encode(BEFORE_IMAGE, add_special_tokens=True).ids)

    def question_ids(self, question: str) -> list[int]:
        """Token ids after the image, up to where the answer begins; raises `InputError`."""
        return self._encode(AFTER_IMAGE.format(question=check_question(question)))

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer, without the end token."""
        return self._encode(f" {answer}")

    def decode(self, ids: list[int]) -> str:
        """Text of an answer's token ids."""
        return self.backend.decode(ids, skip_special_tokens=True).strip()

    def _encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)


def check_question(question: str) -> str:
    """The question `as_seen`.

    Raises `InputError` if it is empty, far too long or no text.
    """
    if not isinstance(question, str):
        raise InputError(f"The question {question!r} is not text.", "Ask in words.")
    question = question.replace(IMAGE, "").strip()
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise InputError(
            f"The question has {len(question):,} characters.",
            f"Ask in at most {MAX_QUESTION_CHARACTERS:,}.",
        )
    try:
        question.encode()
    except UnicodeEncodeError as error:  # such as bytes on the command line that are not UTF-8
        raise InputError("The question is not valid Unicode.", "Type it as UTF-8.") from error
    question = as_seen(question)
    if not question.strip(f" \n{_JOINERS}"):
        raise InputError("The question is empty.", "Ask something, such as: Is there effusion?")
    return question


def as_seen(question: str) -> str:
    """The question as it looks, without surrounding space and `<image>`.

    What looks the same is asked the same, wherever it was pasted from. Of spaces of any kind or
    number one is left. What cannot be seen is left out, but for the joiners of some scripts.
    Accents are composed; hyphens are those of keyboards; ligatures are their letters.
    """
    seen = "".join(_PLAIN.get(c, c) for c in question if c.isspace() or not _is_hidden(c))
    while IMAGE in seen:  # what is left may be one again
        seen = seen.replace(IMAGE, "")
    composed = unicodedata.normalize("NFC", seen)
    return _SPACES.sub(" ", composed.replace("\r\n", "\n")).strip()


_SPACES = re.compile(r"[^\S\n]+")
_PLAIN = {c: unicodedata.normalize("NFKC", c) for c in map(chr, range(0xFB00, 0xFB07))}
_PLAIN |= {"\u2010": "-", "\u2011": "-"}  # the second does not break
_JOINERS = "\u200c\u200d"  # which Persian and Indic scripts are spelt with


def _is_hidden(character: str) -> bool:
    """Whether it is a control, or a mark of format such as a soft hyphen."""
    return unicodedata.category(character) in ("Cc", "Cf") and character not in _JOINERS
