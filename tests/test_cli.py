"""The command line: what it passes on, what it prints where, and how it fails."""

import dataclasses
import errno
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import medmoe_edge
from medmoe_edge import cli, render
from medmoe_edge.answer import Answer, Timings
from medmoe_edge.bundle import NOTICE, write_manifest
from medmoe_edge.cli_errors import Commands, needs
from medmoe_edge.config import DecoderConfig, ModelConfig, VisionConfig
from medmoe_edge.embedded import checkpoint_path
from medmoe_edge.errors import (
    BundleError,
    DataError,
    ImageError,
    MissingDependencyError,
    ModelError,
    ResourceError,
    VerificationError,
)
from medmoe_edge.image import load_image
from medmoe_edge.prompt import check_question

ROOT = Path(__file__).parents[1]
VERBS = ["ask", "export", "init", "train", "data", "eval", "inspect"]


def answer_to(question: str, text: str = "No", **values: Any) -> Answer:
    """What an engine might say of a chest X-ray."""
    timings = Timings(0.01, 0.2, 0.1, 0.02, 0.04, 0.33, 0.37, tokens=1, prefix_reused=False)
    experts = {"mri": 0.1, "ct": 0.0, "pathology": 0.2, "xray": 0.7}
    model = {"name": "fake", "sha256": "0" * 64}
    answer = Answer(question, text, 0.934, "xray", experts, timings, model)
    return dataclasses.replace(answer, **values)


class FakeEngine:
    """Answers "No" to everything, after checking its input as the real one does."""

    expert_names = ("mri", "ct", "pathology", "xray")

    def __init__(self) -> None:
        self.asked: list[tuple[Path, list[str], dict[str, object]]] = []

    def ask_all(self, image: Path, questions: Sequence[str], **options: Any) -> list[Answer]:
        self.asked.append((image, list(questions), options))
        load_image(image, frame=options.get("frame"))
        return [answer_to(check_question(question)) for question in questions]

    def modality(self, image: Path) -> str | None:
        return "xray"


CONFIG = ModelConfig(
    VisionConfig("efficientnet-lite", 32, 8, (127.0,), (128.0,)),
    DecoderConfig("stablelm", 8, 1, 1, 8, 8, 0.25),
)


class Run(Protocol):
    def __call__(self, *arguments: str) -> Result: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in an empty folder, without a terminal."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli.app, arguments, prog_name="medmoe-edge")

    return invoke


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The models and runtimes that were loaded; each is the fake engine."""
    calls: list[tuple[str, str]] = []

    def load(model: str, *, runtime: str) -> FakeEngine:
        calls.append((model, runtime))
        return engine

    engine = FakeEngine()
    monkeypatch.setitem(vars(medmoe_edge), "load", load)
    monkeypatch.setitem(vars(medmoe_edge), "engine_for_test", engine)
    return calls


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def two_lines(result: Result) -> list[str]:
    """The error of a failed run: what was wrong, and what to do."""
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    assert result.stdout == ""
    return lines


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.png"
    Image.new("L", (8, 8)).save(path)
    return path


# --- Help --------------------------------------------------------------------------------------


def test_help_groups_the_verbs_by_panel(run: Run) -> None:
    shown = run("--help").stdout
    order = [shown.index(word) for word in ("─ Ask ─", "─ Build ─", "─ Prove ─")]
    assert order == sorted(order)
    assert all(re.search(rf"^│ {verb} ", shown, re.MULTILINE) for verb in VERBS)
    assert "not a medical device" in shown
    assert run().stdout == shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_one_example_that_parses(
    run: Run, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(verb, "--help")
    (example,) = re.findall(r"^ *Example: medmoe-edge (.*\S)", result.stdout, re.MULTILINE)
    assert result.exit_code == 0
    command, calls = shlex.split(example), []
    group = typer.main.get_command(cli.app)
    assert isinstance(group, Commands)
    monkeypatch.setattr(group.commands[verb], "callback", lambda **given: calls.append(given))
    with pytest.raises(SystemExit) as stopped:
        group.main(command)
    assert (stopped.value.code, command[0], len(calls)) == (0, verb, 1)


def test_the_version(run: Run) -> None:
    assert run("--version").stdout == f"medmoe-edge {medmoe_edge.__version__}\n"


def test_shell_completion_knows_the_verbs() -> None:
    environment = os.environ | {"_CLI.PY_COMPLETE": "complete_bash"}
    words = {"COMP_WORDS": "cli.py e", "COMP_CWORD": "1"}
    result = start("", environment=environment | words)
    assert result.stdout.split() == ["export", "eval"]


# --- Ask ---------------------------------------------------------------------------------------


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
    expected = (Path("scan.png"), ["a", "b"], {"max_new_tokens": 5, "frame": 0})
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
    assert (asked, said) == ("q", "  (no answer)")
    assert grounds.startswith("  cut off · confidence 93.4% · 0.37 s")


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


# --- The other verbs ---------------------------------------------------------------------------


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The calls of the exporter, which writes nothing."""
    calls: list[dict[str, Any]] = []

    def export_bundle(checkpoint: Path, out: Path, *, progress: Any, **options: Any) -> Path:
        for done in (0, 1, 2):
            progress("Decoder", done, 2)
        calls.append({"checkpoint": checkpoint, "out": out, **options})
        return out

    fake_module(monkeypatch, "medmoe_edge.export.build", export_bundle=export_bundle)
    (tmp_path / "my-model").mkdir()
    return calls


def test_export_alone_makes_the_embedded_model_int8(
    run: Run, exported: list[dict[str, Any]]
) -> None:
    for line in (["export", "--int8"], ["export"]):
        result = run(*line)
        assert (result.exit_code, result.stdout) == (0, "Wrote the bundle nano-int8\n")
    first, second = exported
    assert first == second
    assert first == {
        "checkpoint": checkpoint_path("nano"),
        "out": Path("nano-int8"),
        "precision": "int8",
        "name": "nano",
        "vision_tower": None,
        "force": False,
    }


def test_export_of_a_folder(run: Run, exported: list[dict[str, Any]]) -> None:
    result = run("export", "my-model/", "--fp32", "--vision-tower", "clip", "--force", "--json")
    assert json.loads(result.stdout) == {
        "bundle": "my-model-fp32",
        "name": "my-model",
        "precision": "fp32",
    }
    assert exported == [
        {
            "checkpoint": Path("my-model"),
            "out": Path("my-model-fp32"),
            "precision": "fp32",
            "name": "my-model",
            "vision_tower": Path("clip"),
            "force": True,
        }
    ]
    run("export", "my-model", "-o", "elsewhere")
    assert exported[1]["out"] == Path("elsewhere")


@pytest.mark.parametrize("verb", ["export", "inspect"])
@pytest.mark.usefixtures("exported")
def test_a_wrong_model_name_lists_the_right_ones(run: Run, verb: str) -> None:
    result = run(verb, "nanno")
    assert result.exit_code == 3
    what, remedy = two_lines(result)
    assert "'nanno'" in what
    assert "nano" in remedy


def test_init_and_inspect(run: Run) -> None:
    pytest.importorskip("torch")
    assert run("init", "tiny", "out", "--seed", "3").stdout == "Wrote the checkpoint out\n"
    shown = run("inspect", "out")
    assert shown.exit_code == 0, shown.stderr
    described = json.loads(run("inspect", "out", "--json").stdout)
    assert described["kind"] == "checkpoint"
    for figure in (described["parameters_total"], described["parameters_activated"]):
        assert f"{figure:,}" in shown.stdout
    assert "4, top-1 + meta expert, in 2 layers" in shown.stdout
    again = run("init", "tiny", "out")
    assert again.exit_code == 2
    two_lines(again)
    assert run("init", "tiny", "out", "--force").exit_code == 0
    unknown = run("init", "tyny", "new")
    assert unknown.exit_code == 2
    assert "tiny" in two_lines(unknown)[1]


def test_train(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(recipe: str, data: Path, out: Path, progress: Any) -> Path:
        assert (recipe, data, out) == ("recipe nano", Path("images"), Path("run"))
        progress.advance(progress.add_task("epoch", total=1))
        return out / "checkpoint"

    read = SimpleNamespace(read_recipe=lambda name: f"recipe {name}")
    monkeypatch.setitem(sys.modules, "medmoe_edge.training.recipe", read)
    fake_module(monkeypatch, "medmoe_edge.training.run", train=train)
    result = run("train", "--data", "images", "-o", "run")
    assert result.stdout == "Wrote the checkpoint run/checkpoint\n"
    assert result.stderr == ""


def test_data(run: Run, tmp_path: Path) -> None:
    record = {
        **{"qid": 1, "img_name": "xmlab1/source.jpg", "q_lang": "en", "modality": "CT"},
        **{"location": "Lung", "question": "Is it?", "answer": "No", "answer_type": "CLOSED"},
        "content_type": "Abnormality",
    }
    source = tmp_path / "slake"
    (source / "imgs" / "xmlab1").mkdir(parents=True)
    (source / "imgs" / "xmlab1" / "source.jpg").write_bytes(b"picture")
    (source / "test.json").write_text(json.dumps([record]))
    result = run("data", "slake", "slake", "out")
    assert result.stdout == f"Wrote 1 test questions about 1 images to {tmp_path / 'out'}\n"
    assert run("data", "slake", "slake", "out").exit_code == 2
    assert run("data", "slake", "slake", "out", "--force").exit_code == 0
    assert run("data", "slack", "slake", "new").exit_code == 2


@pytest.fixture
def questions(tmp_path: Path, scan: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    records = [
        {
            **{"id": f"q{number}", "image": "scan.png", "question": "Is it?", "answer": answer},
            **{"answer_type": "CLOSED", "modality": "xray", "source": "slake"},
        }
        for number, answer in enumerate(["no", "yes"])
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.usefixtures("questions")
def test_eval(run: Run, loaded: list[tuple[str, str]], tmp_path: Path) -> None:
    label = {"image": "scan.png", "body": "chest", "finding": "none", "source": "s"}
    splits = [("xray", "train"), ("ct", "val"), ("xray", "test"), ("xray", "val")]
    lines = [json.dumps({**label, "modality": name, "split": split}) for name, split in splits]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    command = ["eval", "my", "--data", "questions.jsonl", "--runtime", "torch"]
    result = run(*command, "--labels", "labels.jsonl", "--predictions", "out.jsonl", "--json")
    figures = json.loads(result.stdout)
    assert figures["overall"]["exact_match"] == 0.5
    assert figures["labels"]["images"] == 3  # the training image is left out
    assert figures["labels"]["accuracy"] == pytest.approx(2 / 3)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert loaded == [("my", "torch")]
    shown = run(*command)
    assert re.search(r"^ *all +2 +50.0% ", shown.stdout, re.MULTILINE)
    assert "Modality found in these images: 100.0% of 1" in shown.stdout
    assert json.loads(run(*command, "--json").stdout)["labels"] is None


@pytest.mark.usefixtures("questions")
def test_eval_refuses_before_it_works(
    run: Run, loaded: list[tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    command = ["eval", "--data", "questions.jsonl", "--predictions"]
    for line in ([*command, "out.jsonl"], [*command, "none/out.jsonl"], ["eval", "--data", "x"]):
        result = run(*line)
        assert result.exit_code == 2
        two_lines(result)
    assert loaded == []
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert run(*command, "out.jsonl", "--force").exit_code == 0
    assert (tmp_path / "out.jsonl").read_text() != "mine"


# --- Failure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (DataError("What.", "Do."), 2, "What."),
        (ImageError("What.", "Do."), 2, "What."),
        (ModelError("What.", "Do."), 3, "What."),
        (BundleError("One\ntwo \x1b[31m.", "Do."), 3, "One�two �[31m."),
        (VerificationError("What.", "Do."), 4, "What."),
        (ResourceError("What.", "Do."), 5, "What."),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 5, "a: no space left on device."),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "a: permission denied."),
        (OSError("strange"), 2, "A file: it cannot be used."),
        (MemoryError(), 5, "There is not enough memory."),
        (KeyError("Doe^John"), 1, "Unexpected error (KeyError)."),
    ],
)
def test_failures_are_two_lines_and_a_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, what: str
) -> None:
    monkeypatch.setitem(vars(medmoe_edge), "load", raising(error))
    result = run("ask", "scan.png", "Is there effusion?", "--json")
    assert result.exit_code == code
    assert two_lines(result)[0] == what
    told = run("ask", "scan.png", "Is there effusion?", "--verbose")
    assert told.exit_code == code
    assert told.stderr.startswith("Traceback")
    assert "Traceback" not in run("ask", "scan.png", "Is there effusion?").stderr


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["aks"], "'ask'"),
        (["--bogus"], "--bogus"),
        (["ask"], "IMAGE"),
        (["ask", "scan.png"], "QUESTION"),
        (["ask", "scan.png", "q", "--jsn"], "--json"),
        (["ask", "scan.png", "q", "--runtime", "gpu"], "'onnxruntime'"),
        (["ask", "scan.png", "q", "--frame", "-1"], "--frame"),
        (["ask", "scan.png", "q", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["train"], "--data"),
        (["eval"], "--data"),
        (["data"], "DATASET"),
    ],
)
def test_bad_usage_says_what_and_where_to_look(run: Run, line: list[str], what: str) -> None:
    result = run(*line)
    assert result.exit_code == 2
    told, remedy = two_lines(result)
    assert what in told
    verb = f" {line[0]}" if line[0] in VERBS else ""
    assert remedy == f"See: medmoe-edge{verb} --help"


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        (["export"], "export"),
        (["init", "tiny", "out"], "export"),
        (["train", "--data", "data", "-o", "run"], "train"),
    ],
)
def test_a_missing_package_names_its_extra(
    run: Run, monkeypatch: pytest.MonkeyPatch, line: list[str], extra: str
) -> None:
    first = ("medmoe_edge.presets", "medmoe_edge.training.run", "medmoe_edge.training.recipe")
    for name in list(sys.modules):
        if name.startswith((*first, "medmoe_edge.export.")):
            monkeypatch.delitem(sys.modules, name)
    for name in ("torch", "onnx_ir"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run(*line)
    assert result.exit_code == 5
    what, remedy = two_lines(result)
    assert re.search("'(torch|onnx_ir)'", what)
    assert remedy == f"Install it with: pip install 'medmoe-edge[{extra}]'"


def test_a_module_of_ours_is_never_called_a_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError), needs("export"):
        __import__("medmoe_edge.nothing")
    with pytest.raises(MissingDependencyError, match="'nothing_at_all'"), needs("export"):
        __import__("nothing_at_all.deep")


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(medmoe_edge), "load", raising(KeyboardInterrupt()))
    result = run("ask", "scan.png", "Is there effusion?")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


# --- Quiet, verbose, terminals -----------------------------------------------------------------


@pytest.mark.usefixtures("scan")
def test_quiet_and_verbose_may_stand_anywhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, runtime: str) -> FakeEngine:
        log = logging.getLogger("medmoe_edge.engine")
        log.info("loading")
        log.warning("slow")
        return FakeEngine()

    monkeypatch.setitem(vars(medmoe_edge), "load", load)
    expected = {
        (): "slow\n",
        ("-q",): "",
        ("--quiet",): "",
        ("-v",): "loading\nslow\n",
        ("--verbose",): "loading\nslow\n",
    }
    for switch, logged in expected.items():
        for line in (
            [*switch, "ask", "scan.png", "q"],
            ["ask", *switch, "scan.png", "q"],
            ["ask", "scan.png", "q", *switch],
        ):
            assert run(*line).stderr == f"{logged}{NOTICE}\n"
    asked = run("ask", "scan.png", "--", "-q")
    assert asked.stdout.splitlines()[0] == "-q"


class Terminal:
    """Makes rich believe in a terminal, which is one if no variable says otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm-256color"} | environment).items():
            monkeypatch.setenv(name, value)
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)


def test_colour_only_on_a_terminal_and_not_with_no_color(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    render.show("No", "bold green")
    assert capsys.readouterr().out == "No\n"
    Terminal(monkeypatch)
    render.show("No", "bold green")
    assert "\x1b[1;32m" in capsys.readouterr().out
    Terminal(monkeypatch, NO_COLOR="1")
    render.show("No", "bold green")
    assert "32m" not in capsys.readouterr().out


def test_bars_only_on_a_terminal_and_not_when_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        with render.working("Reading") as report:
            report("Decoder", 1, 2)
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    logging.getLogger("medmoe_edge").setLevel("WARNING")
    assert shown() == ""
    Terminal(monkeypatch)
    assert "Decoder" in shown()
    logging.getLogger("medmoe_edge").setLevel("ERROR")
    assert shown() == ""


# --- The real process --------------------------------------------------------------------------


def start(
    *arguments: str, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    options = {"capture_output": True} | options
    return subprocess.run(command, text=True, check=False, env=environment, **options)


def test_the_command_in_a_checkout(tmp_path: Path) -> None:
    shown = start("--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    forced = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    forced |= {"FORCE_COLOR": "1", "TERM": "xterm"}
    coloured = start("ask", cwd=tmp_path, environment=forced)
    plain = start("ask", cwd=tmp_path, environment=forced | {"NO_COLOR": "1"})
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.splitlines()[1] == "See: cli.py ask --help"
    assert ("\x1b[31m" in coloured.stderr, "\x1b" in plain.stderr) == (True, False)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_reason_for_a_traceback(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    streams = {"capture_output": False, "stdout": writing, "stderr": subprocess.PIPE}
    result = start("--version", environment=environment, **streams)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_command_line_starts_light() -> None:
    code = "import sys, medmoe_edge.cli; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"numpy", "onnxruntime", "rich.console", "rich.table", "rich.progress", "zipfile"}
    assert heavy.isdisjoint(result.stdout.split())
