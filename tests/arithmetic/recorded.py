"""What nano's bundle answered on a CPU with exact arithmetic, for all others to be held against.

`python tests/arithmetic/recorded.py` writes `recorded.json` anew, after a new export of nano: run
it where `medmoe-edge doctor` calls the arithmetic exact. Of the validation data, which is not
committed, it keeps only the questions' ids. With two files of answers, as `ask --json` prints them,
it holds the second against the first instead.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import medmoe_edge
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.data.datasets import Example, read_examples
from medmoe_edge.embedded import bundle_path
from medmoe_edge.engine.answer import Answer

ROOT = Path(__file__).parents[2]
SCAN = ROOT / "scan.png"
RECORD = Path(__file__).with_suffix(".json")
IMAGES, QUESTIONS = 5, 4  # 20 validation questions; an image's part is computed once
ABOUT_THE_SCAN = (
    "Is there effusion?",
    "What modality is used to take this image?",
    "Which part of the body does this image belong to?",
    "Is the heart enlarged?",
)


def validation_questions(data: Path) -> list[list[Example]]:
    """20 validation questions by their images, which are spread over the file."""
    examples = [e for e in read_examples(data / "vqa_val.jsonl") if e.image]
    images = [list(of) for _, of in groupby(examples, key=lambda example: example.image)]
    images = [of for of in images if len(of) >= QUESTIONS]
    return [of[:QUESTIONS] for of in images[:: len(images) // IMAGES][:IMAGES]]


def answers(data: Path | None, engine: medmoe_edge.Engine) -> Iterator[tuple[str, Answer]]:
    """The scan's questions, or with `data` the validation's, each by its name in the record."""
    if data is None:
        for answer in engine.ask_all(SCAN, ABOUT_THE_SCAN):
            yield answer.question, answer
        return
    for of in validation_questions(data):
        asked = engine.ask_all(of[0].image, [example.question for example in of])
        for example, answer in zip(of, asked, strict=True):
            yield example.id, answer


def require_equal(
    expected: Mapping[str, tuple[str, float]], found: Iterable[tuple[str, str, float]]
) -> list[float]:
    """Fail for another answer, or confidences that differ by more than 0.01, 0.002 on average.

    int8 is exact everywhere, but fp32 rounds differently by processor (fused multiply-add, exp),
    and an activation that lies between two of its 256 steps then takes the other. Without AVX2 the
    third nano differs by 0.0081 at most, 0.0015 on average (0.005 and 0.001 held the second).

    Args:
        expected: Answers and confidences by the questions' names.
        found: Names, answers and confidences.

    Returns:
        By how much each confidence differs.
    """
    differences = []
    for name, text, confidence in found:
        assert text == expected[name][0], name
        differences.append(abs(confidence - expected[name][1]))
    assert max(differences) <= 1e-2, differences
    assert sum(differences) / len(differences) <= 2e-3, differences
    return differences


def compare(here: Path, there: Path) -> None:
    """Hold what `ask --json` printed on another processor against what it printed on this one."""
    wanted, found = (
        [
            (answer["question"], answer["answer"], answer["confidence"])
            for answer in json.loads(path.read_text())["answers"]
        ]
        for path in (here, there)
    )
    assert len(wanted) == len(found)
    off = require_equal({name: (text, sure) for name, text, sure in wanted}, found)
    print(f"{len(off)} answers are equal; confidences differ by {max(off):.4f} at most.")


def main() -> None:
    """Write the record, or compare two files."""
    if len(sys.argv) == 3:
        compare(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    engine, told = medmoe_edge.load("nano"), {}
    for data in None, ROOT.parent / "shared" / "data":
        for name, answer in answers(data, engine):
            told[name] = [answer.text, round(answer.confidence, 6)]
    record: dict[str, Any] = {"bundle": Bundle.open(bundle_path("nano")).sha256, "answers": told}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
