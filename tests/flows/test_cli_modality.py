"""The verbs of MedMoE: what they pass on, what they print where, and how they fail."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, start_without, two_lines
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.cli.ask import INDEX
from medmoe_edge.contrastive import engine as modality_engine
from medmoe_edge.contrastive.features import Classification, Location, Reading
from medmoe_edge.contrastive.text import UNSEEN, key_phrase, parse_labels, read_prompts
from medmoe_edge.errors import DataError, InputError
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.render import contrastive as render_contrastive
from medmoe_edge.runtimes.contrastive import ImageFeatures

MODEL = {"name": "fake", "sha256": "0" * 64, "verification": "passed", "runtime": "onnxruntime"}
CONFIG = MODALITY_PRESETS["modality-tiny"]
TIMINGS = {"image": 0.01, "total": 0.04}


class FakeEngine:
    """Likes labels the better the earlier they stand, and sees everything in the middle."""

    name, sha256, config = MODEL["name"], MODEL["sha256"], CONFIG
    unfamiliar = False

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def reading(self, features: ImageFeatures | None = None) -> Reading:
        return Reading(TIMINGS, MODEL, "xray", {"xray": 0.9, "ct": 0.1}, 0.3, self.unfamiliar)

    def classify(
        self,
        image: Path,
        labels: Sequence[str],
        *,
        prompts: Mapping[str, Sequence[str]] | None,
        frame: int | None,
    ) -> Classification:
        self.asked.append((labels, prompts, frame))
        load_image(image, frame=frame)
        count = len(labels)
        total = count * (count + 1) / 2
        scores = {label: (count - at) / total for at, label in enumerate(labels)}
        return Classification(TIMINGS, MODEL, scores, dict.fromkeys(labels, 0.25), self.reading())

    def locate(self, image: Image, phrase: str) -> Location:
        self.asked.append(phrase)
        height, width = image.pixels.shape[:2]
        heat = np.zeros((height, width), np.float32)
        peak = (width // 2, height // 2)
        heat[peak[1], peak[0]] = 1
        return Location(TIMINGS, MODEL, phrase, heat, peak, 0.25, self.reading())

    def embed_images(self, pixels: Floats) -> ImageFeatures:
        pooled = np.ones((1, CONFIG.size), np.float32)
        pooled[0, 0] = pixels.mean()
        return ImageFeatures(pooled[:, None, None], pooled, np.eye(6, dtype=np.float32)[[1]])

    def embed_text(self, text: str) -> Floats:
        if not any(mark.isalnum() for mark in text):
            raise InputError("The text has no word.", "Write words.")
        found: Floats = np.eye(CONFIG.size, dtype=np.float32)[0]
        return found


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """What every model is, once it is loaded."""
    fake = FakeEngine()

    def load(model: str) -> FakeEngine:
        assert model in ("modality-nano", "my")
        return fake

    monkeypatch.setattr(modality_engine, "load_modality", load)
    return fake


# --- classify ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("scan")
def test_classify_for_people(run: Run, engine: FakeEngine) -> None:
    result = run(
        "classify", "scan.png", "--labels", "pleural effusion, [bold],,胸水", "--model", "my"
    )
    assert result.exit_code == 0
    header, *rows, grounds = result.stdout.splitlines()
    assert header.split() == ["label", "score", "similarity"]
    assert [row.split()[0] for row in rows] == ["pleural", "[bold]", "胸水"]
    assert [row.count("█") for row in rows] == [15, 10, 5]
    assert rows[0].split()[-2:] == ["50.0%", "0.250"]
    assert grounds == "image read as xray 90.0%, ct 10.0% · 0.04 s"
    assert result.stderr == f"{NOTICE}\n"
    assert engine.asked == [(["pleural effusion", "[bold]", "胸水"], None, None)]


@pytest.mark.usefixtures("scan")
def test_classify_json_is_one_object(run: Run, engine: FakeEngine) -> None:
    engine.unfamiliar = True
    result = run("classify", "scan.png", "--labels", "a,b", "--json", "--frame", "0")
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert list(found["scores"]) == ["a", "b"]
    assert sum(found["scores"].values()) == pytest.approx(1)
    assert found["reading"]["unfamiliar"] is True
    assert result.stderr == f"{render_contrastive.UNFAMILIAR}\n{NOTICE}\n"
    assert engine.asked == [(["a", "b"], None, 0)]


@pytest.mark.usefixtures("engine", "scan")
def test_one_label_gets_no_score(run: Run) -> None:
    shown = run("classify", "scan.png", "--labels", "pneumonia").stdout
    assert "100.0%" not in shown
    assert "0.250" in shown
    assert render_contrastive.ONE_LABEL in shown
    told = run("classify", "scan.png", "--labels", "pneumonia", "--json")
    assert json.loads(told.stdout)["scores"] == {"pneumonia": 1.0}
    assert told.stderr == f"{render_contrastive.ONE_LABEL}\n{NOTICE}\n"


@pytest.mark.usefixtures("engine", "scan")
def test_a_thousand_labels(run: Run) -> None:
    labels = ",".join(f"label {number}" for number in range(1000))
    shown = run("classify", "scan.png", "--labels", labels).stdout.splitlines()
    assert len(shown) == 1 + render_contrastive.SHOWN + 2
    assert shown[-2] == "and 980 more labels; --json has them all"
    told = run("classify", "scan.png", "--labels", labels, "--json")
    assert len(json.loads(told.stdout)["scores"]) == 1000


@pytest.mark.usefixtures("scan")
def test_prompts_come_from_a_file(run: Run, engine: FakeEngine, tmp_path: Path) -> None:
    prompts = {"effusion": ["fluid", "плевральный выпот"], "none": ["no finding"]}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    assert run("classify", "scan.png", "--prompts", "prompts.json").exit_code == 0
    both = ("--labels", "effusion,none,other", "--prompts", "prompts.json")
    assert run("classify", "scan.png", *both).exit_code == 0
    assert engine.asked == [
        (["effusion", "none"], prompts, None),
        (["effusion", "none", "other"], prompts, None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[]", "{}", '"a"', "\xff", '{"a": "b"}', '{"a": [1]}', '{"a": null}'),
        *('{"a": ["b"], "a": ["c"]}', "[" * 100_000, '{"a": ["' + "b" * 2**20 + '"]}'),
    ],
)
def test_bad_prompts_are_told(run: Run, scan: Path, text: str) -> None:
    scan.with_name("prompts.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError):
        read_prompts(scan.with_name("prompts.json"))
    result = run("classify", "scan.png", "--prompts", "prompts.json")
    assert result.exit_code == 2
    assert all(two_lines(result))


@pytest.mark.usefixtures("engine", "scan")
@pytest.mark.parametrize(
    "line",
    [
        ("classify", "scan.png"),
        ("classify", "scan.png", "--labels", " , "),
        ("classify", "none.png", "--labels", "a,b"),
        ("classify", "scan.png", "--labels", "a,b", "--frame", "1"),
        ("classify", "scan.png", "--prompts", "none.json"),
        ("locate", "scan.png", "heart", "-o", "heart.jpg"),
        ("locate", "scan.png", "heart", "-o", "scan.png"),
        ("locate", "scan.png", "heart", "-o", "none/heart.png"),
        ("locate", "none.png", "heart", "-o", "heart.png"),
        ("ask", "scan.png", "a", "b", "--explain", "out.png"),
        ("ask", "scan.png", "a", "--explain", "scan.png"),
        ("index", "none"),
        ("index", "scan.png"),
        ("retrieve", "heart"),
        ("retrieve", "heart", "--index", "scan.png"),
        ("retrieve", "heart", "-k", "0"),
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(
    run: Run, tmp_path: Path, line: Sequence[str]
) -> None:
    before = (tmp_path / "scan.png").read_bytes()
    result = run(*line)
    assert result.exit_code == 2
    assert all(two_lines(result))
    assert [path.name for path in tmp_path.iterdir()] == ["scan.png"]
    assert (tmp_path / "scan.png").read_bytes() == before


@given(st.lists(st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]))))
def test_labels_are_what_stands_between_commas(labels: list[str]) -> None:
    expected = [label.strip() for label in labels if label.strip()]
    assert parse_labels(",".join(labels)) == expected


# --- locate ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("engine", "scan")
def test_locate_draws_a_picture(run: Run, tmp_path: Path) -> None:
    result = run("locate", "scan.png", "heart", "-o", "heart.png")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "heart",
        "  most alike at 4, 4 of 8 x 8 pixels",
        "  similarity to the whole image 0.250",
        "image read as xray 90.0%, ct 10.0% · 0.04 s",
        "Wrote the map heart.png",
    ]
    assert result.stderr == f"{NOTICE}\n"
    with Pillow.open(tmp_path / "heart.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 512)
    assert run("locate", "scan.png", "heart", "-o", "heart.png").exit_code == 2
    again = run("locate", "scan.png", "heart", "-o", "heart.png", "--force", "--json")
    told = json.loads(again.stdout)
    assert (told["peak"], told["size"], told["picture"]) == ([4, 4], [8, 8], "heart.png")
    assert "heat" not in told


@pytest.mark.usefixtures("engine", "scan")
def test_a_map_that_cannot_be_written_is_named(run: Run) -> None:
    name = "m" * 246 + ".png"  # too long for what is written beside it first
    result = run("locate", "scan.png", "heart", "-o", name)
    assert result.exit_code == 5
    assert f"{name} cannot be written (File name too long)." in two_lines(result)[0]


# --- index and retrieve ------------------------------------------------------------------------


@pytest.mark.usefixtures("engine")
def test_index_and_retrieve(run: Run, tmp_path: Path) -> None:
    for number in range(4):
        Pillow.new("L", (8, 8), 60 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("Doe^John")
    result = run("index", ".")
    assert result.exit_code == 0
    assert "embedded now                     4" in " ".join(result.stdout.splitlines())
    assert (tmp_path / INDEX / "archive.sqlite").exists()
    assert "notes.txt" not in result.stderr
    told = json.loads(run("index", ".", "--json").stdout)
    assert (told["entries"], told["unchanged"], told["skipped"]) == (4, 4, 1)
    text = run("retrieve", "heart", "-k", "2")
    _, first, second, ground = text.stdout.splitlines()
    assert first.split()[:2] == ["1", "3.png"]
    assert second.split()[:2] == ["2", "2.png"]
    assert ground.startswith(f"of 4 images below {tmp_path}, in")
    image = json.loads(run("retrieve", "0.png", "--json").stdout)
    assert (image["kind"], image["hits"][0]["path"]) == ("image", "0.png")
    assert image["reading"]["modality"] == "xray"
    assert run("retrieve", "!?").exit_code == 2


@pytest.mark.usefixtures("engine")
def test_an_index_of_another_model_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scans").mkdir()
    assert run("index", "scans").exit_code == 0
    monkeypatch.setattr(FakeEngine, "sha256", "1" * 64)
    for line in (("retrieve", "heart"), ("index", "scans")):
        result = run(*line)
        assert result.exit_code == 2
        what, remedy = two_lines(result)
        assert "another model" in what
        assert "--model" in remedy
    assert run("index", "scans", "--force").exit_code == 0
    assert run("retrieve", "heart").stdout.startswith("The index is empty.\n")


def test_a_missing_usearch_is_told(tmp_path: Path) -> None:
    result = start_without(["usearch", "usearch.index"], "index", str(tmp_path))
    assert result.returncode == 5
    assert "'usearch'" in result.stderr
    assert "medmoe-edge[archive]" in result.stderr


# --- ask --explain -----------------------------------------------------------------------------


@pytest.mark.usefixtures("scan", "loaded")
def test_ask_explains(run: Run, engine: FakeEngine, tmp_path: Path) -> None:
    engine.unfamiliar = True
    result = run("ask", "scan.png", "Is there pleural effusion?", "--explain", "out.png")
    assert result.exit_code == 0
    assert engine.asked == ["pleural effusion"]
    lines = result.stdout.splitlines()
    assert lines[:2] == ["Is there pleural effusion?", "  No"]
    assert lines[4] == "pleural effusion"
    assert lines[-2].split() == ["fake", "xray", "90.0%"]
    assert lines[-1].split() == ["the", "answer's", "router", "xray"]
    assert result.stderr == f"{render_contrastive.UNFAMILIAR}\n{NOTICE}\n"
    with Pillow.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
    told = run("ask", "scan.png", "Is it?", "--explain", "out.png", "--force", "--json")
    found = json.loads(told.stdout)
    assert found["explanation"]["phrase"] == "Is it?"
    assert found["explanation"]["picture"] == "out.png"
    assert found["answers"][0]["modality"] == "xray"


@pytest.mark.usefixtures("scan", "loaded")
def test_no_map_is_drawn_of_an_answer_that_a_black_picture_gets_too(
    run: Run, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("command_line.FakeEngine.blind", "No")
    result = run("ask", "scan.png", "Is there effusion?", "--explain", "out.png")
    assert result.exit_code == 0
    assert "No map: the answer does not rest on the picture" in result.stderr
    assert not (tmp_path / "out.png").exists()
    assert engine.asked == []
    told = run("ask", "scan.png", "Is there effusion?", "--explain", "out.png", "--json")
    assert json.loads(told.stdout)["explanation"] is None


@pytest.mark.usefixtures("scan", "loaded")
def test_ask_without_explain_loads_no_second_model(run: Run, engine: FakeEngine) -> None:
    result = run("ask", "scan.png", "Is there effusion?", "--json")
    assert json.loads(result.stdout).keys() == {"answers"}
    assert engine.asked == []


@pytest.mark.parametrize(
    ("question", "answer", "phrase"),
    [
        ("Is there pleural effusion?", "No", "pleural effusion"),
        ("Is there pleural effusion?", "yes.", "pleural effusion"),
        ("Which organ is abnormal?", "Liver", "organ abnormal Liver"),
        ("Where is the X-ray's left lung?", "left", "X-ray's left lung"),
        ("What is this?", "", "What is this?"),
        ("Is it?", "No", "Is it?"),
        ("胸水はありますか?", "no", "胸水はありますか"),
        ("Есть ли плевральный выпот?", "Yes", "Есть ли плевральный выпот"),
        ("???", "", "???"),
    ],
)
def test_key_phrases(question: str, answer: str, phrase: str) -> None:
    assert key_phrase(question, answer) == phrase


@given(st.text(min_size=1), st.text())
def test_a_key_phrase_is_never_empty_and_says_nothing_new(question: str, answer: str) -> None:
    phrase = key_phrase(question, answer)
    assert phrase
    assert phrase == question or UNSEEN.isdisjoint(phrase.lower().split())
    assert all(word in f"{question} {answer}" for word in phrase.split())
