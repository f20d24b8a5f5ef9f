"""What a model is taught to be asked: facts about images, in people's words.

A fact is what is known to be present or absent in an image. Each is asked in many wordings
(`phrases.json`), as often where the answer is yes as where it is no, for each finding by itself:
from the words alone the answer cannot be known. Questions that no picture answers, pictures that
are no scans and languages that the model does not read are answered by refusals, which are tokens.
The questions of question files are asked in other words too: by rules, which know most of their
forms (`rewrites.json`), and one by one as people put them (`paraphrases.json`).
"""

import functools
import json
import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medmoe_edge.config import Refusal
from medmoe_edge.data.captions import NAMES, body_name
from medmoe_edge.data.datasets import NO_SCAN, Example, Finding, LabelledImage
from medmoe_edge.evaluation.findings import question_key

NORMAL = "no finding"
HEALTHY = {NORMAL, "normal", "healthy", "nothing", "none", "unremarkable"}  # as labels say it
# A class and its kinds: who has a kind has the class, and none of the other kinds.
KINDS = {
    "tumor": ("glioma", "meningioma", "pituitary tumor"),
    "lesion": ("benign lesion", "malignant lesion"),
    "malignancy": ("lung adenocarcinoma", "lung squamous cell carcinoma"),
}
# What a label of none of a class is called, where it is not "no" and the class.
WELL = {"normal breast": "lesion", "benign lung tissue": "malignancy"}
IMPLIED_SHARE = 0.3  # of the images asked about as those without, which are only not labelled
PLAIN_SHARE, PLAINEST = 0.35, 10  # how often a wording is one of the first, and of how many
PEOPLE_SHARE = 0.7  # how often a question is put as people did, where both they and a rule know it
FEWEST, MOST = 24, 160  # images with a finding that an epoch asks about
Turn = tuple[str, str]


@dataclass(frozen=True)
class Facts:
    """What is known of one image.

    Attributes:
        image: Its file.
        modality: By name; `NO_SCAN` of a picture that is no scan, empty where not known.
        body: The part of the body; empty where not known.
        source: Whose image it is.
        present: Findings that it shows.
        absent: Findings that its source says it does not show.
        implied: Findings that are only not labelled, which is weaker.
        labelled: Whether it comes of a file of labels.
        view: "pa" or "ap" of a chest film; empty where not known.
    """

    image: Path
    modality: str
    body: str
    source: str
    present: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    implied: frozenset[str] = frozenset()
    view: str = ""
    labelled: bool = False

    def told(self) -> str:
        """All of it in one text but the file, the same for the same facts."""
        sets = (sorted(each) for each in (self.present, self.absent, self.implied))
        return "|".join(map(str, (self.modality, self.body, self.source, self.view, *sets)))


def facts_of_labels(labelled: Iterable[LabelledImage]) -> list[Facts]:
    """What labels say: of several kinds of one class an image shows one, and not the others."""
    found = []
    for item in labelled:
        present, absent = _told(item.finding)
        found.append(
            Facts(item.image, item.modality, item.body, item.source, present, absent, labelled=True)
        )
    return found


def _told(label: str) -> tuple[frozenset[str], frozenset[str]]:
    label = label.strip().lower()
    if not label:
        return frozenset(), frozenset()
    if label in HEALTHY or (label.startswith("normal ") and label not in WELL):
        return frozenset({NORMAL}), frozenset()
    negated = WELL.get(label) or (label.removeprefix("no ") if label.startswith("no ") else None)
    if negated is not None:
        return frozenset({NORMAL}), frozenset({negated, *KINDS.get(negated, ())})
    for name, kinds in KINDS.items():
        if label in kinds:
            return frozenset({label, name}), frozenset(kinds) - {label}
    return frozenset({label}), frozenset()


def facts_of_findings(findings: Iterable[Finding]) -> list[Facts]:
    """What a file of findings says, `data.datasets.read_findings`."""
    return [
        Facts(
            item.image,
            item.modality,
            item.body,
            item.source,
            frozenset(item.present),
            frozenset(item.absent),
            frozenset(item.implied_absent),
            view=item.view or "",
        )
        for item in findings
    ]


def facts_of_examples(examples: Iterable[Example]) -> list[Facts]:
    """What question files say of their images beside the questions: modality and part of the body.

    They are asked what no picture answers, too.
    """
    first = {example.image: example for example in reversed(list(examples))}
    return [
        Facts(image, example.modality or "", body_name(example.body or ""), example.source)
        for image, example in first.items()
    ]


@functools.cache
def phrase_book() -> Mapping[str, Any]:
    """The wordings, by what they ask."""
    book: Mapping[str, Any] = _packaged("phrases.json")
    return book


@functools.cache
def _rules() -> Sequence[tuple[re.Pattern[str], Sequence[str]]]:
    rules = _packaged("rewrites.json")
    return [(re.compile(rule["pattern"], re.IGNORECASE), rule["to"]) for rule in rules]


@functools.cache
def paraphrases() -> Mapping[str, Sequence[str]]:
    """Questions as people put them, by `question_key` of the question."""
    people: Mapping[str, Sequence[str]] = _packaged("paraphrases.json")
    return people


def _packaged(name: str) -> Any:
    return json.loads(files("medmoe_edge.training").joinpath(name).read_text("utf-8"))


def reworded(question: str, order: random.Random) -> str:
    """The question in other words with the same answer; as it is where nobody knows others."""
    people = paraphrases().get(question_key(question.strip()), ())
    ruled = None if people and order.random() < PEOPLE_SHARE else _ruled(question, order)
    if ruled is not None:
        return ruled
    return order.choice(people) if people else question


def _ruled(question: str, order: random.Random) -> str | None:
    """The question as the first rule that knows it has it."""
    bare = question.strip().rstrip("?. ")
    for pattern, wordings in _rules():
        if (match := pattern.fullmatch(bare)) is not None:
            words = " ".join(match.expand(order.choice(list(wordings))).split())
            return _capital(words) + ("?" if order.random() < 0.7 else "")
    return None


def vary_question(question: str, order: random.Random, slips: float = 0.0) -> str:
    """Now and then as people type: in small letters or capitals alone, otherwise ended.

    In a share `slips` of the questions one letter is missing, doubled or exchanged with the next,
    and in as many others all letters are capitals or the end is a space, a full stop or two marks.
    """
    drawn = order.random()
    if drawn < 0.3:
        question = question.lower()
    elif drawn > 1 - slips:
        question = question.upper()
    if slips and order.random() < slips and len(question) > 8:
        at = order.randrange(1, len(question) - 2)
        slip = order.choice(("", question[at] * 2, question[at + 1] + question[at]))
        question = (
            question[:at] + slip + question[at + 1 + (len(slip) == 2 and slip[0] != slip[1]) :]
        )
    shorter = question.rstrip("? ")
    if not shorter:
        return question
    if slips and order.random() < slips:
        return shorter + order.choice((" ?", "??", ".", " "))
    return shorter if order.random() < 0.3 else question


class Asking:
    """Makes the questions of an epoch about images whose facts are known.

    The model's `refusals` are taught, each as the answer that its token is.
    """

    def __init__(self, known: Sequence[Facts], refusals: Iterable[Refusal]) -> None:
        self.known = known
        self.refusals = {refusal.code: refusal.token for refusal in refusals}
        self.book = phrase_book()
        self._with: dict[str, list[int]] = defaultdict(list)
        self._without: dict[str, list[int]] = defaultdict(list)
        self._implied: dict[str, list[int]] = defaultdict(list)
        for index, facts in enumerate(known):
            for name in facts.present & self.book["findings"].keys():
                self._with[name].append(index)
            for name in facts.absent & self.book["findings"].keys():
                self._without[name].append(index)
            for name in facts.implied & self.book["findings"].keys():
                self._implied[name].append(index)

    def epoch(self, order: random.Random, share: float, others: float) -> list[list[Turn]]:
        """The turns of each image, in the order of `known`; an image may get none.

        Args:
            order: Draws everything.
            share: How much of the questions about findings is asked, 0 to 1.
            others: How many of the images that these leave out are asked about as well, 0 to 1.
        """
        turns: list[list[Turn]] = [[] for _ in self.known]
        for name in sorted(self._with):
            self._ask_finding(name, turns, order, share)
        for facts, own in zip(self.known, turns, strict=True):
            if facts.modality == NO_SCAN:
                own += self._about_no_scan(order)
            elif own or order.random() < others:
                own += self._about_scan(facts, order)
            order.shuffle(own)
        return turns

    def _ask_finding(
        self, name: str, turns: list[list[Turn]], order: random.Random, share: float
    ) -> None:
        """As many images with the finding as without it."""
        having = self._with[name]
        lacking, implied = self._without[name], self._implied[name]
        if not lacking and not implied:
            return
        count = max(1, round(share * min(max(len(having), FEWEST), MOST)))
        weaker = round(count * IMPLIED_SHARE) if lacking else count
        weaker = min(weaker, len(implied))
        drawn = [
            (True, _draw(having, count, order)),
            (False, _draw(lacking or implied, count - weaker, order)),
            (False, _draw(implied, weaker, order)),
        ]
        for present, chosen in drawn:
            for index in chosen:
                turns[index].append(self._yes_no(name, self.known[index], present, order))

    def about_findings(
        self, facts: Facts, names: Collection[str], count: int, order: random.Random
    ) -> list[tuple[str, Turn]]:
        """`count` wordings of each of the findings that an image shows or not, and its negation.

        With each turn goes what it asks, the same for all images.
        """
        known = sorted((facts.present | facts.absent) & {*names})
        return [
            (
                f"{'no ' if negated else ''}{name}",
                self._yes_no(name, facts, name in facts.present, order, negated=negated),
            )
            for name in known
            for negated in (False, True)
            for _ in range(count)
        ]

    def _yes_no(
        self,
        name: str,
        facts: Facts,
        present: bool,
        order: random.Random,
        *,
        negated: bool | None = None,
    ) -> Turn:
        if negated is None:
            negated = order.random() < 0.25
        wording = _some(self.book["absent" if negated else "present"], order)
        text = self._filled(
            wording, facts, order, n=_some(self.book["findings"][name]["names"], order)
        )
        return text, "Yes" if present != negated else "No"

    def _about_scan(self, facts: Facts, order: random.Random) -> list[Turn]:
        """What every scan is asked: two of what it is, and now and then what it cannot answer."""
        options = []
        if facts.modality:
            options.append(self._modality(facts, order))
        if facts.body:
            options.append(self._body(facts, order))
        if facts.view:
            options.append(self._view(facts, order))
        if facts.present:
            options.append(self._open_finding(facts, order))
        if facts.present:
            options.append(self._normal(facts, order))
        chosen = order.sample(options, min(2, len(options)))
        if "not_answerable" in self.refusals and order.random() < 0.35:
            chosen.append((self._unanswerable(facts, order), self.refusals["not_answerable"]))
        if "language" in self.refusals and order.random() < 0.35:
            chosen.append((self._foreign(order), self.refusals["language"]))
        return chosen

    def _about_no_scan(self, order: random.Random) -> list[Turn]:
        token = self.refusals.get("not_a_scan")
        if token is None:
            return []
        questions = [self._any_question(order) for _ in range(6)]
        return [(question, token) for question in questions]

    def _any_question(self, order: random.Random) -> str:
        """A question of any kind about any image."""
        facts = order.choice(self.known)
        kind = order.choice(
            ("present", "absent", "normal", "abnormal", "which_finding", "modality")
        )
        if order.random() < 0.3:
            kind = order.choice(("body", "is_modality", "is_body", "side", "is_side"))
        return self._filled(order.choice(self.book[kind]), facts, order)

    def _modality(self, facts: Facts, order: random.Random) -> Turn:
        if order.random() < 0.5:
            text = self._filled(order.choice(self.book["modality"]), facts, order)
            return text, NAMES.get(facts.modality, facts.modality)
        others = sorted({each.modality for each in self.known} - {facts.modality, NO_SCAN, ""})
        named = facts.modality if order.random() < 0.5 or not others else order.choice(others)
        text = self._filled(
            order.choice(self.book["is_modality"]), facts, order, m=spoken(named, order)
        )
        return text, "Yes" if named == facts.modality else "No"

    def _body(self, facts: Facts, order: random.Random) -> Turn:
        if order.random() < 0.5:
            text = self._filled(order.choice(self.book["body"]), facts, order)
            return text, _capital(facts.body)
        others = sorted({each.body for each in self.known if each.body} - {facts.body})
        named = facts.body if order.random() < 0.5 or not others else order.choice(others)
        text = self._filled(order.choice(self.book["is_body"]), facts, order, b=named)
        return text, "Yes" if named == facts.body else "No"

    def _view(self, facts: Facts, order: random.Random) -> Turn:
        if order.random() < 0.5:
            return order.choice(self.book["view"]), facts.view.upper()
        named = order.choice(("PA", "AP"))
        text = order.choice(self.book["is_view"]).replace("{v}", named)
        return text, "Yes" if named == facts.view.upper() else "No"

    def _open_finding(self, facts: Facts, order: random.Random) -> Turn:
        named = sorted(facts.present - KINDS.keys()) or sorted(facts.present)
        text = self._filled(order.choice(self.book["which_finding"]), facts, order)
        if facts.present & {*KINDS["lesion"]} and order.random() < 0.5:
            text = order.choice(self.book["benign_malignant"])
        return text, ", ".join(map(_capital, named[:2]))

    def _normal(self, facts: Facts, order: random.Random) -> Turn:
        normal, asks_normal = NORMAL in facts.present, order.random() < 0.5
        wording = order.choice(self.book["normal" if asks_normal else "abnormal"])
        return self._filled(wording, facts, order), "Yes" if normal == asks_normal else "No"

    def _unanswerable(self, facts: Facts, order: random.Random) -> str:
        """A question that no picture answers, or one about what another kind of image shows."""
        drawn = order.random()
        if drawn < 0.2:
            return str(order.choice(self.book["nonsense"]))
        if drawn < 0.5:
            away = [name for name in self._with if not self._fits(name, facts)]
            if away:
                name = order.choice(self.book["findings"][order.choice(sorted(away))]["names"])
                return self._filled(order.choice(self.book["present"]), facts, order, n=name)
        return str(order.choice(self.book["unanswerable"]))

    def _fits(self, name: str, facts: Facts) -> bool:
        """Whether an image of this body part and modality could show the finding."""
        return any(
            (self.known[index].body, self.known[index].modality) == (facts.body, facts.modality)
            or self.known[index].body == facts.body
            for index in self._with[name][:50]
        )

    def _foreign(self, order: random.Random) -> str:
        languages = self.book["languages"]  # those most likely to be met have most questions
        return str(order.choice([one for name in sorted(languages) for one in languages[name]]))

    def _filled(
        self,
        wording: str,
        facts: Facts,
        order: random.Random,
        *,
        n: str | None = None,
        m: str | None = None,
        b: str | None = None,
    ) -> str:
        real = facts.modality not in (NO_SCAN, "")
        modality = m or spoken(facts.modality if real else order.choice(sorted(_SPOKEN)), order)
        if n is None:
            n = order.choice(
                self.book["findings"][order.choice(sorted(self.book["findings"]))]["names"]
            )
        article = "an" if modality.lower().startswith(("a", "e", "i", "o", "u", "x", "mr")) else "a"
        values = {
            "n": n,
            "m": modality,
            "a": article,
            "b": b or facts.body or "body",
            "s": order.choice(("left", "right")),
            "v": order.choice(("PA", "AP")),
        }
        text = re.sub(r"\{([nmabsv])\}", lambda match: values[match[1]], wording)
        return _capital(text)


_SPOKEN = {
    "xray": ("x-ray", "X-ray", "radiograph", "film", "plain film"),
    "ct": ("CT", "CT scan", "CT image", "computed tomography scan"),
    "mri": ("MRI", "MR image", "MRI scan", "magnetic resonance image"),
    "ultrasound": ("ultrasound", "ultrasound image", "sonogram"),
    "pathology": ("histology slide", "pathology slide", "microscopy image"),
    "fundus": ("fundus photograph", "fundus image", "retinal photograph"),
}


def spoken(modality: str, order: random.Random) -> str:
    """A modality as people say it."""
    return order.choice(_SPOKEN.get(modality, (NAMES.get(modality, modality),)))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _some(wordings: Sequence[str], order: random.Random) -> str:
    """One of them; the first, which are the plainest and most likely to be met, more often."""
    plainest = order.random() < PLAIN_SHARE
    return order.choice(wordings[: min(PLAINEST, len(wordings) // 3)] if plainest else wordings)


def _draw(items: Sequence[int], count: int, order: random.Random) -> list[int]:
    """`count` of the items; each as often as any other, give or take one."""
    if not items or count < 1:
        return []
    whole, rest = divmod(count, len(items))
    return [*items] * whole + order.sample(list(items), rest)
