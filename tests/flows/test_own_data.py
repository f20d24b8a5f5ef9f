"""A person's day from downloads to an answer: each step reads what the one before wrote.

Four modalities come from look-alikes of official downloads, two new ones from folders of images.
Nothing but files and options is changed, least of all the source.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from command_line import Run
from PIL import Image

EACH = 60  # images of a modality
NEW = ("dermoscopy", "oct")
KNOWN = {"ct": "CT", "mri": "MRI", "xray": "X-Ray"}
COLOURS = {
    "ct": (190, 0, 0),
    "dermoscopy": (0, 190, 0),
    "mri": (0, 0, 190),
    "oct": (190, 190, 0),
    "pathology": (190, 0, 190),
    "xray": (0, 190, 190),
}
RECIPE = """
preset = "tiny-phi"
vocab_size = 300
seed = 5
precision = "fp32"

[decoder]
hidden_size = 64

[alignment]
epochs = 1
learning_rate = 0.01
train = ["projector.*", "decoder.*"]

[instruction]
epochs = 4
learning_rate = 0.01
train = ["router.*", "projector.*", "decoder.*"]
router_weight = 0.5
max_turns = 4

[moe]
epochs = 1
learning_rate = 0.003
train = ["decoder.layers.*.ffn.experts.*", "decoder.layers.*.ffn.meta.*"]
max_turns = 4
"""


def picture(file: Path, modality: str, number: int) -> Path:
    """Its colour tells the modality; no two are the same."""
    noise = np.random.default_rng([number, *modality.encode()]).integers(0, 60, (28, 28, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise + COLOURS[modality]).astype(np.uint8)).save(file)
    return file


def downloads(folder: Path) -> None:
    """SLAKE's and PathVQA's forms, and a folder of images in sub-folders."""
    slake: dict[str, list[dict[str, object]]] = {"train": [], "validate": [], "test": []}
    for number in range(3 * EACH):
        modality = list(KNOWN)[number % 3]
        name = f"xmlab{number}/source.jpg"
        picture(folder / "slake" / "imgs" / f"xmlab{number}" / "source.jpg", modality, number)
        split = {8: "validate", 9: "test"}.get(number // 3 % 10, "train")
        common = {"img_name": name, "q_lang": "en", "modality": KNOWN[modality]}
        common |= {"location": "Head", "content_type": "Modality"}
        for question, answer, kind in (
            ("What modality is this?", KNOWN[modality], "OPEN"),
            ("Is this a CT?", "Yes" if modality == "ct" else "No", "CLOSED"),
        ):
            row = {"qid": f"{number}-{kind}", "question": question, "answer": answer}
            slake[split].append({**common, **row, "answer_type": kind})
    for split, rows in slake.items():
        (folder / "slake" / f"{split}.json").write_text(json.dumps(rows))
    path: dict[str, list[dict[str, str]]] = {"train": [], "val": [], "test": []}
    for number in range(EACH):
        picture(folder / "path" / "images" / f"p{number}.jpg", "pathology", number)
        split = {8: "val", 9: "test"}.get(number % 10, "train")
        line = {"image": f"p{number}", "question": "Is this a slide?", "answer": "yes"}
        path[split].append(line)
    for split, lines in path.items():
        (folder / "path" / f"{split}_qa.json").write_text(json.dumps(lines))
    for modality in NEW:
        for number in range(EACH):
            finding = ("normal", "lesion")[number % 2]
            picture(folder / "own" / modality / finding / f"{number}.png", modality, number)


def test_from_downloads_to_an_answer(run: Run, tmp_path: Path) -> None:
    def do(*arguments: str) -> dict[str, Any]:
        result = run(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    downloads(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert do("data", "slake", "slake", "DATA")["images"] == 3 * EACH
    assert do("data", "pathvqa", "path", "DATA")["questions"] == {"train": 48, "val": 6, "test": 6}
    labels = do("data", "labels", "own", "DATA")
    assert labels["modalities"] == dict.fromkeys(NEW, EACH)
    assert labels["labels"] == {"train": 96, "val": 12, "test": 12}

    trained = run("train", "recipe.toml", "--data", "DATA", "-o", "run")
    assert trained.exit_code == 0, trained.stderr
    assert f"6 experts: {', '.join(COLOURS)}; " in trained.stderr
    shown = run("train", "--watch", "run")
    assert "Finished." in shown.stdout

    held_out = ("--data", "DATA", "--labels", "DATA/labels.jsonl")
    scores = do("eval", "run/checkpoint", *held_out, "--blind")
    assert scores["blind"]["overall"]["accuracy"] < scores["overall"]["accuracy"]
    assert scores["router"]["accuracy"] > 0.9
    assert scores["labels"]["accuracy"] > 0.9
    assert scores["labels"]["images"] == 24
    assert scores["overall"]["accuracy"] > 0.8

    exported = do(
        *("export", "run/checkpoint", "--int8", "--calibrate", "DATA"),
        *("--samples", "24", "-o", "bundle"),
    )
    assert exported["verification"]
    verified = do("verify", "bundle", "--against", "run/checkpoint", "--data", "DATA/test.jsonl")
    assert verified["passed"] is not False  # so few questions decide nothing
    assert verified["faults"] == []
    asked = do("ask", "own/oct/normal/0.png", "What modality is this?", "--model", "bundle")
    (answer,) = asked["answers"]
    assert answer["modality"] == "oct"
    assert set(answer["experts"]) == set(COLOURS)
