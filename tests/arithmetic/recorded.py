"""What nano's bundle answered on a CPU with exact arithmetic, for all others to be held against.

`python tests/arithmetic/recorded.py` writes `recorded.json` anew, after a new export of nano: run
it where `medmoe-edge doctor` calls the arithmetic exact. Of the validation data, which is not
committed, it keeps only the questions' ids.
"""

import json
from collections.abc import Iterator
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


def main() -> None:
    """Write the record."""
    engine, told = medmoe_edge.load("nano"), {}
    for data in None, ROOT.parent / "shared" / "data":
        for name, answer in answers(data, engine):
            told[name] = [answer.text, round(answer.confidence, 6)]
    record: dict[str, Any] = {"bundle": Bundle.open(bundle_path("nano")).sha256, "answers": told}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
