"""How well an engine sees, on engines that see what the tests say."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.data.datasets import Example, Finding
from medmoe_edge.errors import DataError, Notice
from medmoe_edge.evaluation.confidence import RefusalFit
from medmoe_edge.evaluation.evaluate import Prediction
from medmoe_edge.evaluation.findings import (
    FLAGSHIP,
    Paraphrased,
    Versions,
    area_under_curve,
    ask_flagship,
    evaluate_findings,
    evaluate_paraphrases,
    evaluate_versions,
    question_about,
    question_key,
    read_paraphrases,
    read_versions,
    score_no_scans,
)
from medmoe_edge.evaluation.metrics import Share
from medmoe_edge.families import AnswerScores
from medmoe_edge.image.pixels import Image
from medmoe_edge.render.verification import show_seen


@dataclass
class FakeAnswer:
    text: str
    unsure: bool = False
    warnings: Sequence[Notice] = ()
    refusals: dict[str, float] = field(default_factory=dict)
    probabilities: dict[str, float] | None = None


class FakeEngine:
    """Answers by a function of the image's name ("black" without one) and the question."""

    def __init__(self, says: Callable[[str, str], FakeAnswer]) -> None:
        self.says = says
        self.asked: list[tuple[str, str]] = []

    def ask_all(
        self,
        image: Path | Image,
        questions: Sequence[str],
        /,
        *,
        max_new_tokens: int,
        choices: Sequence[str] | None = None,
    ) -> list[FakeAnswer]:
        assert max_new_tokens == 32
        name = image.stem if isinstance(image, Path) else "black"
        self.asked += [(name, question) for question in questions]
        return [self.says(name, question) for question in questions]


def yes(chance: float) -> FakeAnswer:
    said = {"Yes": chance, "No": 1 - chance}
    return FakeAnswer(max(said, key=lambda text: said[text]), probabilities=said)


def film(number: int, *present: str, absent: Sequence[str] = (), modality: str = "xray") -> Finding:
    about = ("chest", None, tuple(present), tuple(absent), ("mass",), f"p{number // 2}")
    return Finding(Path(f"{number}.png"), modality, *about, "val", None, "films")


def picture(name: str, kind: str) -> Finding:
    return Finding(Path(f"{name}.png"), "none", "", None, (), (), (), None, "val", kind, "web")


EFFUSION = "pleural effusion"
FILMS = [film(number, EFFUSION, "no finding") for number in range(10)] + [
    film(number, absent=[EFFUSION, "mass"]) for number in range(10, 30)
]


def test_a_finding_is_scored_by_yes_against_no() -> None:
    """The engine is right of all but two films with the finding, and one without it."""
    wrong = {"0": 0.3, "1": 0.2, "10": 0.8}

    def says(name: str, question: str) -> FakeAnswer:
        assert question == "Is there effusion?"
        return yes(0.4 if name == "black" else wrong.get(name, 0.9 if int(name) < 10 else 0.1))

    engine = FakeEngine(says)
    steps: list[tuple[int, int]] = []
    (score,) = evaluate_findings(engine, FILMS, progress=lambda *at: steps.append(at))
    assert (score.finding, score.present, score.absent) == (EFFUSION, 10, 20)
    assert (score.sensitivity, score.specificity) == (0.8, 0.95)
    # by hand: 8 films are above all 20, and two above 19 of them
    assert score.auc == pytest.approx((8 * 20 + 2 * 19) / 200)
    low, high = score.auc_interval
    assert low < score.auc <= high <= 1
    assert (score.black.auc, score.black.sensitivity, score.black.specificity) == (0.5, 0.0, 1.0)
    assert score.shuffled.auc == pytest.approx(0.5, abs=0.02)
    assert score.shuffled.sensitivity == pytest.approx(9 / 30, abs=0.02)
    assert score.chance[0] < 0.4 < 0.6 < score.chance[1] < score.auc
    assert steps[-1] == (30, 30)
    assert [name for name, _ in engine.asked].count("black") == 1
    assert len(engine.asked) == 31  # nothing is asked that nobody knows, or that is too rare


def test_few_patients_that_are_all_in_order_prove_little() -> None:
    """Five patients with the finding, ten without it: no draw finds another order."""
    for right, bounds in ((0.9, (0.566, 1.0)), (0.05, (0.0, 0.434))):

        def says(name: str, _: str, right: float = right) -> FakeAnswer:
            return yes(right if name.isdigit() and int(name) < 10 else 0.1)

        (score,) = evaluate_findings(FakeEngine(says), FILMS)
        assert score.auc_interval == pytest.approx(bounds, abs=1e-3)


def test_a_tie_is_no_yes() -> None:
    (score,) = evaluate_findings(FakeEngine(lambda *_: yes(0.5)), FILMS)
    assert (score.auc, score.sensitivity, score.specificity) == (0.5, 0.0, 1.0)
    assert score.auc_interval == (0.5, 0.5), "who always says the same orders nothing"


def test_findings_that_nobody_can_score_are_an_error() -> None:
    engine = FakeEngine(lambda *_: yes(0.5))
    with pytest.raises(DataError, match="No finding is present in 5 images"):
        evaluate_findings(engine, FILMS[:10])  # absent nowhere; what is implied does not count
    with pytest.raises(DataError, match="No finding"):
        evaluate_findings(engine, [film(1, EFFUSION, absent=["mass"], modality="none")] * 20)


def test_a_finding_is_asked_about_in_words() -> None:
    assert question_about("pneumothorax") == "Is there pneumothorax?"
    assert question_about("nodule or mass") == "Is there a nodule or mass?"


pairs = st.lists(st.tuples(st.floats(0, 1, width=16), st.booleans()), min_size=2, max_size=30)


@given(pairs)
def test_the_area_is_the_chance_to_win(some: list[tuple[float, bool]]) -> None:
    here = [score for score, there in some if there]
    gone = [score for score, there in some if not there]
    if here and gone:
        wins = sum((a > b) + 0.5 * (a == b) for a in here for b in gone)
        area = area_under_curve([score for score, _ in some], [there for _, there in some])
        assert area == pytest.approx(wins / (len(here) * len(gone)))


def test_pictures_that_are_no_scans() -> None:
    def says(name: str, question: str) -> FakeAnswer:
        assert question == FLAGSHIP
        flagged = name in ("cat", "12")
        return FakeAnswer("No", warnings=[Notice("not_a_scan" if flagged else "unsure", "...")])

    engine = FakeEngine(says)
    pictures = [picture("cat", "photo"), picture("map", "map")]
    of_pictures = ask_flagship(engine, [one.image for one in pictures])
    of_scans = ask_flagship(engine, [one.image for one in FILMS])
    found = score_no_scans(pictures, of_pictures, of_scans)
    assert (found.pictures, found.scans) == (Share.of(1, 2), Share.of(1, 30))
    assert found.missed == {"map": 1}


# --- other languages, other words ---------------------------------------------------------------


def test_languages(tmp_path: Path) -> None:
    file = tmp_path / "languages.json"
    file.write_text(json.dumps([{"en": "Is it?", "de": "Ist es?", "fr": "Est-ce ?"}]))
    versions = read_versions(file)

    def says(name: str, question: str) -> FakeAnswer:
        if question == "Est-ce ?":
            return FakeAnswer("Oui", unsure=name != "0")
        return FakeAnswer({"Is it?": "Yes", "Ist es?": "yes."}[question])

    found = evaluate_versions(FakeEngine(says), versions, [one.image for one in FILMS])
    assert list(found) == ["de", "fr"]
    assert found["de"].alike == Share.of(10, 10)  # ten of the images are asked about
    assert found["fr"].flagged == Share.of(9, 10)
    assert found["fr"].silent == Share.of(1, 10)
    assert found["fr"].questions == {"Est-ce ?": 1}


@pytest.mark.parametrize("content", ["{}", "[]", '[{"de": "Ist es?"}]', '[{"en": "Is it?"}]', "["])
def test_files_that_hold_no_versions(tmp_path: Path, content: str) -> None:
    (tmp_path / "languages.json").write_text(content)
    with pytest.raises(DataError, match=r"languages\.json"):
        read_versions(tmp_path / "languages.json")


def example(number: int, image: str, answer: str, source: str) -> tuple[Example, Prediction]:
    about = f"q{number}", Path(f"{image}.png"), f"Question {number}?", answer
    asked = Example(*about, "OPEN", None, None, None, source)
    right = number != 3
    return asked, Prediction(about[0], about[2], answer, right, 0, 0, answer, "OPEN")


def test_paraphrases(tmp_path: Path) -> None:
    """Every question weighs the same; those without a paraphrase are passed over."""
    rows = [example(n, "ab"[n % 2], "liver", "xy"[n // 2]) for n in range(4)]
    examples, predictions = map(list, zip(*rows, strict=True))
    file = tmp_path / "paraphrases.json"
    others = {0: ["Zero?", "None?"], 1: ["One?"], 3: ["Three?", "Trois?"]}
    file.write_text(json.dumps({question_key(f"Question {n}?"): o for n, o in others.items()}))
    right = {"Zero?", "Three?", "Trois?"}
    engine = FakeEngine(lambda _, question: FakeAnswer("liver" if question in right else "spleen"))
    found = evaluate_paraphrases(engine, examples, predictions, read_paraphrases(file))
    assert sorted(found) == ["all", "x", "y"]
    whole = found["all"]
    assert (whole.questions, whole.asked) == (3, 5)
    assert whole.original == pytest.approx(2 / 3)
    assert whole.paraphrased == pytest.approx((0.5 + 0 + 1) / 3)
    assert whole.loss == pytest.approx(2 / 3 - 0.5)
    assert (found["y"].original, found["y"].paraphrased, found["y"].loss) == (0, 1, -1)
    assert {name for name, question in engine.asked if question == "Zero?"} == {"a"}
    with pytest.raises(DataError, match="No question of the data has a paraphrase"):
        evaluate_paraphrases(engine, examples, predictions, {"0" * 16: ["What?"]})


def test_the_key_of_a_question() -> None:
    """As `printf "Is there effusion?" | sha256sum` has it."""
    assert question_key("Is there effusion?") == "2b2d6300577344dc"


def test_all_of_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(lambda name, _: yes(0.9 if name.isdigit() and int(name) < 10 else 0.1))
    scores = AnswerScores(
        None,
        0,
        findings=evaluate_findings(engine, FILMS),
        no_scans=score_no_scans([picture("cat", "photo")], [FakeAnswer("No")], [FakeAnswer("No")]),
        languages={"de": Versions(4, Share.of(2, 4), Share.of(1, 4), Share.of(1, 4), {"Ist?": 1})},
        paraphrases={"all": Paraphrased(10, 20, 0.8, 0.75, 0.05, (-0.01, 0.1))},
        refusals={
            "not_a_scan": RefusalFit(0.25, Share.of(1, 100), Share.of(9, 10)),
            "language": RefusalFit(1.0, Share.of(9, 90), None, ("not separated", "flags too many")),
        },
    )
    show_seen(scores)
    shown = " ".join(capsys.readouterr().out.split())
    for told in (
        "pleural effusion",
        "1.00",
        "0 of 1 (0.0%) pictures that are none",
        "not a scan: from 0.25 on. It flags 9 of 10 (90.0%) that it is meant for, 1 of 100 (1.0%)",
        "language: from 1 on. It flags 9 of 90 (10.0%) others",
        "That is no more than chance may give",
        "That is more than the 2% of the others that were aimed at",
        "In de: 2 of 4 (50.0%) answered as in English, 1 of 4 (25.0%) marked as unsure",
        "In other words, all: 80.0% of 10 right become 75.0%: 5.0 points lost (-1.0 to 10.0)",
    ):
        assert told in shown
    told_json = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert told_json["findings"][0]["finding"] == EFFUSION
    assert told_json["no_scans"]["missed"] == {"photo": 1}
    assert told_json["refusals"]["not_a_scan"]["usual"] == {"share": 0.01, "count": 1, "total": 100}
