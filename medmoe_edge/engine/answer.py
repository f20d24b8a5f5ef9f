"""What an answer carries, how its text comes about, and what makes it unsure."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.config import MoEConfig
from medmoe_edge.errors import InputError, Notice, Told, checked
from medmoe_edge.image.pixels import named
from medmoe_edge.prompt import MAX_QUESTION_CHARACTERS, Tokenizer, as_seen
from medmoe_edge.runtimes.base import Chosen, Decoding, Step


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds. The image's part (`image`, `vision`, `prefix`) is spent once for all its questions.

    Attributes:
        image: To read and prepare the image.
        vision: Tower and projector; 0 where the prefix was kept.
        prefix: Prefill of system prompt and image tokens; where it was kept, the time to fetch it.
        question: Prefill of the question.
        decode: All further tokens.
        first_token: From the start to the answer's first token.
        total: From the start to the end.
        tokens: How many the answer has.
        prefix_reused: Whether the prefix was kept from an earlier question.
    """

    image: float
    vision: float
    prefix: float
    question: float
    decode: float
    first_token: float
    total: float
    tokens: int
    prefix_reused: bool


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the lap that began with the last one's end, or with the clock."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def timings(
    prefix: Mapping[str, float],
    own: Mapping[str, float],
    tokens: int,
    *,
    first: bool,
    reused: bool,
) -> Timings:
    """Of an answer, from the laps of its image's prefix and its own.

    The `first` answer about an image bears the prefix's time; `reused`: that was merely fetched.
    """
    first_token = (sum(prefix.values()) if first else 0.0) + own["question"]
    return Timings(
        **prefix,
        **own,
        first_token=first_token,
        total=first_token + own["decode"],
        tokens=tokens,
        prefix_reused=reused or not first,
    )


class Piece(str):
    """A piece of an answer's text that knows its token.

    Attributes:
        chosen: The token's text and its natural log-probability.
        likely: The same of the most likely tokens at its place, the most likely first.
    """

    chosen: tuple[str, float]
    likely: Sequence[tuple[str, float]]

    def __new__(
        cls, text: str, chosen: tuple[str, float], likely: Sequence[tuple[str, float]]
    ) -> Self:
        """A text with these."""
        piece = super().__new__(cls, text)
        piece.chosen, piece.likely = chosen, likely
        return piece


Choices = Sequence[str] | Mapping[str, Sequence[str]]
"""The answers that may be given, to every question; or by question, where it has any."""

YES_NO = ("Yes", "No")
MOST_CHOICES = 20
LONGEST_CHOICE = 200  # characters


def choices_of(choices: Choices | None, question: str) -> tuple[str, ...]:
    """The answers that may be given to a question, checked; empty where any may be.

    Raises `InputError` for choices that are none, empty, no text, the same but for their case, too
    many or too long.
    """
    found = choices.get(question) if isinstance(choices, Mapping) else choices
    if found is None:
        return ()
    if isinstance(found, str):
        raise InputError("choices is one text, and a list is meant.", 'Write ["yes", "no"].')
    checked(found, Iterable, "choices")
    given = tuple(each.strip() if isinstance(each, str) else "" for each in found)
    folded = [each.casefold() for each in given]
    if len(given) < 2 or not all(given):
        raise InputError(
            "The choices are fewer than two, or one of them is empty.", "Name two or more."
        )
    twice = next((each for each in given if folded.count(each.casefold()) > 1), None)
    if twice is not None:
        raise InputError(f"The choice {twice!r} is there twice.", "Name each once.")
    try:
        "".join(given).encode()
    except UnicodeEncodeError as error:  # half of a character, as JSON can write it
        raise InputError("A choice is not valid Unicode.", "Type it as UTF-8.") from error
    longest = max(given, key=len)
    if len(given) > MOST_CHOICES or len(longest) > LONGEST_CHOICE:
        raise InputError(
            f"There are {len(given)} choices, the longest of {len(longest)} characters.",
            f"Give at most {MOST_CHOICES}, of {LONGEST_CHOICE} characters each.",
        )
    return given


def spellings(choice: str) -> list[str]:
    """A choice with its first letter small and large, unless it is an abbreviation such as CT."""
    first, rest = choice[0], choice[1:]
    if rest[:1].isupper():
        return [choice]
    return list(dict.fromkeys((choice, first.upper() + rest, first.lower() + rest)))


def is_yes_or_no(question: str) -> bool:
    """Whether a question asks for yes or no: in English, in one sentence, and beyond doubt.

    It begins with a form of "be", "do", "have" or a modal. Where another language has that word
    too ("do", "has", "was"), or where "do" or "will" may begin a request, an English subject must
    follow. What names alternatives ("or", a comma, "CT/MRI"), asks a further question ("what",
    "where"), or is a request to somebody ("can you", "tell me") may have any answer. A question
    that is wrongly left out is merely answered freely; one that is wrongly taken is answered wrong.
    """
    if len(question) > MAX_QUESTION_CHARACTERS:  # most are refused when they are asked
        return False
    asked = _SAME_AS_IS.sub("is", _ASKED_SO.sub("", as_seen(question).lower()))
    words = re.findall(r"[^\W\d_]+", asked)
    if not words or _SEVERAL.search(asked) or not _ANY_ANSWER.isdisjoint(words):
        return False
    if words[0] in _BEFORE_A_SUBJECT:
        return words[1:2] != [] and words[1] in _SUBJECTS
    return words[0] in _BEFORE_ANYTHING


def given_choices(questions: Iterable[str], yes_no: bool) -> dict[str, Sequence[str]]:
    """For those of the questions that ask for yes or no, these; none where it is not wanted."""
    return {each: YES_NO for each in questions if yes_no and is_yes_or_no(each)}


_ASKED_SO = re.compile(r"\W*\byes ?(/|or) ?no\W*$")
_SAME_AS_IS = re.compile(r"^(is/are|are/is|do you see)\b")
_SEVERAL = re.compile(r"[,/;:\uff0c\u3001]|[.?!]\s+\w|[?!]\w")  # alternatives, or sentences
_BEFORE_ANYTHING = frozenset({"is", "are", "were", "does", "did", "have", "can", "could", "should"})
_BEFORE_A_SUBJECT = frozenset({"do", "has", "had", "was", "will", "would"})
_SUBJECTS = frozenset(
    {
        *("the", "this", "that", "these", "those", "a", "there", "it", "he", "she", "they"),
        *("any", "anything", "all", "both", "either", "some", "patient", "contrast", "iv"),
    }
)
_ANY_ANSWER = frozenset(
    {
        *("or", "vs", "versus", "what", "which", "where", "who", "whose", "how", "why", "when"),
        *("i", "me", "my", "we", "us", "you", "your", "somebody", "someone"),
        *("describe", "tell", "explain", "list", "idea"),
        *("dit", "een", "het"),  # Dutch, which has "is" and "had" as well
    }
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question in tokens, and those of the answers that it may have; none: any.

    Each of these answers may be spelt in several ways.
    """

    question: str
    ids: list[int]
    choices: Mapping[str, list[list[int]]]

    @classmethod
    def of(cls, question: str, choices: Choices | None, tokenizer: Tokenizer) -> Self:
        """Both checked; raises `InputError`."""
        ids = tokenizer.question_ids(question)
        given = {
            choice: [tokenizer.answer_ids(spelt) for spelt in spellings(choice)]
            for choice in choices_of(choices, question)
        }
        return cls(question, ids, given)

    def positions(self, limit: int) -> int:
        """In the cache, of the question and the longest answer."""
        lengths = (len(tokens) for spelt in self.choices.values() for tokens in spelt)
        return len(self.ids) + max(lengths, default=limit)


Score = Callable[[list[int]], tuple[float, list[Step]]]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a character of which another token is still to come


class Draft:
    """An answer in the making.

    A token is told once it is clear that it is no part of a loop, so that nothing that was told has
    to be taken back.

    Attributes:
        tokens: Those told so far.
        text: What they spell, as far as it was told.
        log_probability: Of these tokens, and of the end once it is there.
        stopped: Why there are no more, as `Chosen` has it.
    """

    def __init__(
        self, tokenizer: Tokenizer, decoding: Decoding, alternatives: int | None = None
    ) -> None:
        self._tokenizer, self._decoding, self._alternatives = tokenizer, decoding, alternatives
        self._held: list[list[tuple[int, float]]] = []
        self._choice = ""
        self.tokens: list[int] = []
        self.text, self.log_probability = "", 0.0
        self.stopped: Literal["end", "length", "repetition"] | None = None

    def take(self, chosen: Chosen) -> Iterator[str]:
        """Add a token, and tell the pieces of text that are settled by it."""
        count, never = self._alternatives or 0, self._decoding.never
        likely = _log_probabilities(chosen.step.logits, chosen.token, count, never)
        self.stopped = chosen.stopped
        if chosen.stopped != "end":
            self._held.append(likely)
        while len(self._held) > chosen.held:
            yield self._told(self._held.pop(0))
        if chosen.stopped == "end":
            self.log_probability += likely[0][1]

    def choose(
        self, choices: Mapping[str, list[list[int]]], score: Score
    ) -> tuple[dict[str, float], list[Step]]:
        """Be the likeliest of some answers, each as likely as its spellings together.

        Args:
            choices: Each answer, with the tokens of its spellings.
            score: The log-probability of some tokens and the answer's end.

        Returns:
            The probability of each choice, where one of them is taken to be right, and the steps
            of the likeliest one's likeliest spelling.
        """
        totals, spelt = {}, {}
        for choice, spellings in choices.items():
            found = [(*score(tokens), tokens) for tokens in spellings]
            totals[choice] = float(np.logaddexp.reduce([value for value, _, _ in found]))
            spelt[choice] = max(found, key=lambda each: each[0])
        best = max(totals, key=totals.__getitem__)
        _, steps, tokens = spelt[best]
        self._choice, self.tokens, self.stopped = best, tokens, "end"
        self.log_probability = totals[best]
        shares = {choice: math.exp(value - totals[best]) for choice, value in totals.items()}
        whole = sum(shares.values())
        return {choice: share / whole for choice, share in shares.items()}, steps

    def rest(self) -> str:
        """What was not told yet of the whole text, once there are no more tokens."""
        text = self._choice or self._tokenizer.decode(self.tokens)
        rest, self.text = text.removeprefix(self.text), text
        return rest

    def _told(self, likely: list[tuple[int, float]]) -> str:
        token, log_probability = likely[0]
        self.tokens.append(token)
        self.log_probability += log_probability
        piece = self._untold()
        self.text += piece
        if self._alternatives is None:
            return piece
        texts = [(self._tokenizer.decode([each]), value) for each, value in likely]
        return Piece(piece, texts[0], texts[1:])

    def _untold(self) -> str:
        """What the tokens' text adds to what was told; nothing while it ends within a character.

        All models have byte-level tokenizers, whose text only grows at its end; what clean-up may
        still change there is not told yet.
        """
        text = self._tokenizer.decode(self.tokens)
        settled = text[: max(len(text) - self._tokenizer.unsettled, 0)]
        if text.endswith(UNFINISHED) or not settled.startswith(self.text):
            return ""
        return settled.removeprefix(self.text)


def _log_probabilities(
    logits: Floats, chosen: int, count: int, never: Sequence[int]
) -> list[tuple[int, float]]:
    """The chosen token, then the `count` most likely ones, each with its log-probability.

    What is `never` chosen has its share of probability, and is not among the likely ones.
    """
    shifted = logits.astype(np.float64) - float(logits[chosen])
    total = math.log(np.exp(shifted).sum())
    shifted[list(never)] = -np.inf
    best = np.argsort(-shifted, kind="stable")[:count] if count else ()
    return [(chosen, -total), *((int(each), float(shifted[each]) - total) for each in best)]


REFUSED = 0.5  # the probability of a refusal from which on it counts, where no bundle says another
WHY = {
    "not_a_scan": "The picture is not like the medical images that the model learned from.",
    "not_answerable": "The model cannot answer this question from this picture.",
    "language": "The question is in no language that the model reads.",
    "empty_answer": "The model said nothing.",
    "repetition": "The model began to repeat itself: its answer ends before that.",
    "unsure": "The model is unsure of this answer: it is often wrong with this confidence.",
}
# Warnings that name what they are about, each in its own words: the model reads the image as a
# modality whose experts it lacks or that the file denies, or has never seen such images.
WRONG_EXPERT = frozenset({"other_modality", "unlike_label", "unknown_modality"})
REASONS = WRONG_EXPERT.union(WHY)


def reasons(warnings: Iterable[Notice]) -> tuple[Notice, ...]:
    """Those of an answer's warnings that make it unsure."""
    return tuple(notice for notice in warnings if notice.code in REASONS)


def doubts(
    refused: Mapping[str, float],
    thresholds: Mapping[str, float],
    draft: Draft,
    *,
    enough: bool,
) -> tuple[Notice, ...]:
    """Why an answer is unsure: what the model refuses, what is wrong with its text, or its chance.

    Args:
        refused: The probability of each refusal, by its code.
        thresholds: From which on each counts; `REFUSED` where there is none.
        draft: The answer, with all of its text.
        enough: Whether its chance of being right is not known to be too small. Where it is and
            nothing else is told, the reason is a refusal that is likelier than any answer, if any.
    """
    codes = [code for code, value in refused.items() if value >= thresholds.get(code, REFUSED)]
    if not draft.text:
        codes.append("empty_answer")
    if draft.stopped == "repetition":
        codes.append("repetition")
    if not codes and not enough:
        likeliest = max(refused, key=refused.__getitem__, default="unsure")
        codes.append(likeliest if refused.get(likeliest, 0) >= REFUSED else "unsure")
    return tuple(Notice(code, WHY[code]) for code in codes)


def other_modality(moe: MoEConfig | None, read_as: str | None) -> tuple[Notice, ...]:
    """What to say where a model reads an image as a modality whose experts were left out."""
    if moe is None or read_as not in moe.left_out:
        return ()
    kept = ", ".join(named(name) for name in moe.expert_names)
    what = (
        f"The model reads the image as {named(read_as)}, whose experts were left out of this "
        f"bundle (it is for {kept}): do not rely on the answer."
    )
    return (Notice("other_modality", what),)


def shown(text: str, *, complete: bool, unsure: bool) -> str:
    """An answer for people, who see at once whether it is a guess, and whether it is whole."""
    said = text or "(no answer)"
    if not complete:
        said += " (cut off)"
    if not unsure:
        return said
    return f"Unsure. Best guess: {said}" if text else f"Unsure. {said}"


def logged(told: str, codes: Iterable[str]) -> str:
    """An answer for an audit log: as people are shown it, with the codes of why it is unsure."""
    why = ", ".join(code for code in codes if code in REASONS)
    return f"{told} [{why}]" if why else told


@dataclasses.dataclass(frozen=True)
class Answer(Told):
    """One question answered.

    Attributes:
        question: As it was asked.
        text: The answer; a best guess where it is `unsure`.
        confidence: From 0 to 1, see `confidence_kind`; what `refusals` and all other answers leave
            to this one. Of given choices the answer's share in `probabilities` times what the
            `refusals` leave of 1.
        modality: The router's reading of the image; None where the experts' modalities are not
            known.
        experts: The share of routed tokens, over all layers, that each expert took.
        timings: Seconds.
        model: By `name` and `sha256` what answered, by `runtime` what ran it, and under
            `verification` what is known of its fidelity: "passed", "failed" or "not measured" of a
            bundle, "reference" of a checkpoint. Of a bundle, `verified` says on what `machine`
            (None: not recorded) and whether that holds `here`.
        complete: Whether the answer came to its end.
        notice: That this is for research only.
        paging: How experts were brought into memory, where that is bounded; else None.
        warnings: What a person and a program should know before they use the answer: of the model,
            of how the image was read, of a label that the image is unlike, and why it is `unsure`.
        unsure: Whether the text is a best guess.
        stopped: Why it is not `complete`: by its "length", or by the model's "repetition" of
            itself.
        refusals: The probabilities that the model gave to having no answer, by their codes.
        probabilities: Of the choices that were given, which add up to 1; else None.
        confidence_kind: "calibrated": the chance that the answer is right, for the bundle knows how
            often answers of its probability were; of choices, yes and no alone. "raw": the model's
            own probability of this very answer, end token included, and no such chance.
    """

    question: str
    text: str
    confidence: float
    modality: str | None
    experts: dict[str, float]
    timings: Timings
    model: dict[str, Any]
    complete: bool = True
    notice: str = NOTICE
    paging: dict[str, Any] | None = None
    warnings: tuple[Notice, ...] = ()
    unsure: bool = False
    stopped: Literal["length", "repetition"] | None = None
    refusals: dict[str, float] = dataclasses.field(default_factory=dict)
    probabilities: dict[str, float] | None = None
    confidence_kind: Literal["calibrated", "raw"] = "raw"

    @property
    def shown(self) -> str:
        """The answer for people, who see at once whether it is a guess, and whether it is whole."""
        return shown(self.text, complete=self.complete, unsure=self.unsure)

    @property
    def reasons(self) -> tuple[Notice, ...]:
        """The warnings that say why it is unsure."""
        return reasons(self.warnings)

    @property
    def logged(self) -> str:
        """The answer for an audit log."""
        return logged(self.shown, (notice.code for notice in self.warnings))

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object; the text is under `answer`."""
        values = super().to_json()
        return {"question": values.pop("question"), "answer": values.pop("text"), **values}
