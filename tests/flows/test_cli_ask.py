"""The verb `ask`: what it passes on, what it prints where, and how it fails."""

import json
from pathlib import Path

import pytest
from command_line import Run, answer_to, two_lines

import medmoe_edge
from medmoe_edge.bundle.bundle import NOTICE, write_manifest
from medmoe_edge.config import DecoderConfig, ModelConfig, VisionConfig
from medmoe_edge.errors import Notice
from medmoe_edge.render import console as render

CONFIG = ModelConfig(
    VisionConfig("efficientnet-lite", 32, 8, (127.0,) * 3, (128.0,) * 3),
    DecoderConfig("stablelm", 8, 1, 1, 8, 8, 0.25),
)


def test_ask_for_people(run: Run, loaded: list[tuple[str, str]], scan: Path) -> None:
    result = run("ask", "scan.png", "Is there effusion?", "Is it [bold]?")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:2] == ["Is there effusion?", "  No"]
    assert lines[4:6] == ["Is it [bold]?", "  No"]
    assert lines[2] == (
        "  confidence 93.4% · modality xray · experts xray 70%, pathology 20%, mri 10% · "
        "0.37 s, first token after 0.33 s"
    )
    assert result.stderr == f"{NOTICE}\n"  # once, for two answers
    assert loaded == [("nano", "auto")]


def test_ask_passes_its_options_on(run: Run, loaded: list[tuple[str, str]], scan: Path) -> None:
    options = ["--model", "my", "--runtime", "torch", "--frame", "0", "--max-new-tokens", "5"]
    assert run("ask", *options, "scan.png", "a", "b").exit_code == 0
    assert loaded == [("my", "torch")]
    expected = (Path("scan.png"), ["a", "b"], {"max_new_tokens": 5, "choices": None, "frame": 0})
    assert vars(medmoe_edge)["engine_for_test"].asked == [expected]


@pytest.mark.usefixtures("loaded", "scan")
def test_ask_json_is_one_object(run: Run) -> None:
    result = run("ask", "scan.png", "Is there effusion?", "What is it? é", "--json")
    (line,) = result.stdout.splitlines()
    answers = json.loads(line)["answers"]
    assert [answer["question"] for answer in answers] == ["Is there effusion?", "What is it? é"]
    assert answers[0]["answer"] == "No"
    assert result.stderr == f"{NOTICE}\n"


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("content", "question"),
    [
        (b"", "q"),
        (b"not an image", "q"),
        (b"\x89PNG\r\n\x1a\n", "q"),
        (b"\0" * 128 + b"DICM", "q"),
        ("folder", "q"),
        (None, "q"),
        ("good", ""),
        ("good", "why? " * 20_000),
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(
    run: Run, scan: Path, content: bytes | str | None, question: str
) -> None:
    image = scan if content == "good" else scan.with_name("bad")
    if content == "folder":
        image.mkdir()
    elif isinstance(content, bytes):
        image.write_bytes(content)
    result = run("ask", str(image), question)
    assert result.exit_code == 2
    assert all(two_lines(result))


def test_an_answer_that_says_little(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_answers([answer_to("q", "", modality=None, experts={}, complete=False)])
    asked, said, grounds = capsys.readouterr().out.splitlines()
    assert (asked, said) == ("q", "  (no answer) (cut off)")
    assert grounds.startswith("  confidence 93.4% · 0.37 s")


@pytest.mark.usefixtures("scan")
def test_choices_are_passed_on_and_bad_ones_refused(
    run: Run, loaded: list[tuple[str, str]]
) -> None:
    assert run("ask", "scan.png", "Where?", "--choices", "left, right,both").exit_code == 0
    ((_, _, options),) = vars(medmoe_edge)["engine_for_test"].asked
    assert options["choices"] == ("left", "right", "both")
    result = run("ask", "scan.png", "Where?", "--choices", "left,,right")
    assert result.exit_code == 2
    assert "one of them is empty" in two_lines(result)[0]
    assert len(loaded) == 1  # refused before a model is loaded


def test_why_an_answer_is_unsure_comes_before_the_best_guess(
    capsys: pytest.CaptureFixture[str],
) -> None:
    notice = Notice("not_a_scan", "It is a cat.")
    shares = {"Yes": 0.25, "No": 0.75}
    answer = answer_to("q", "No", warnings=(notice,), unsure=True, probabilities=shares)
    render.show_answers([answer])
    _, warned, said, grounds = capsys.readouterr().out.splitlines()
    assert (warned, said) == ("  Warning: It is a cat.", "  Unsure. Best guess: No")
    assert grounds.startswith("  Yes 25.0%, No 75.0% · confidence 93.4%")


@pytest.mark.usefixtures("scan")
def test_a_bad_model_is_two_lines_and_exit_code_3(run: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()

    def fails(model: str, word: str) -> None:
        result = run("ask", "scan.png", "Is there effusion?", "--model", model)
        assert result.exit_code == 3
        assert word in two_lines(result)[0]

    fails("nanno", "nanno")
    fails("bundle", "bundle")  # empty
    (bundle / "manifest.json").write_text('{"format_version": 1')
    fails("bundle", "damaged")
    (bundle / "decoder.onnx").write_bytes(b"graph")
    contents = {"name": "b", "config": CONFIG.to_json(), "quantisation": {}}
    write_manifest(bundle, contents | {"source": "", "licence": ""})
    (bundle / "decoder.onnx").write_bytes(b"grap")
    fails("bundle", "decoder.onnx")
