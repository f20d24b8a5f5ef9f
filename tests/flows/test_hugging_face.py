"""The model class, the pipeline and the plug-in of optimum-cli, with the real libraries."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from hub_server import Hub, serving
from PIL import Image as Pillow

import medmoe_edge
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.checkpoint.hub import PullOptions, pull
from medmoe_edge.errors import InputError, ModelError

transformers = pytest.importorskip("transformers", reason="needs the extra optimum")
pytest.importorskip("huggingface_hub", reason="needs the extra optimum")

from medmoe_edge.engine.hugging_face import (  # noqa: E402 -- it imports what may be missing
    TASK,
    MedMoEForVisualQuestionAnswering,
    VisualQuestionAnsweringPipeline,
)

Make = Callable[..., Path]
SCAN = str(ROOT / "scan.png")
QUESTIONS = ["Is there effusion?", "Which organ is shown?"]


@pytest.fixture(scope="module")
def model() -> MedMoEForVisualQuestionAnswering:
    return MedMoEForVisualQuestionAnswering.from_pretrained("nano")


@pytest.fixture(scope="module")
def answers(model: MedMoEForVisualQuestionAnswering) -> list[tuple[str, float]]:
    return [(a.text, a.confidence) for a in medmoe_edge.load("nano").ask_all(SCAN, QUESTIONS)]


def told(found: list[list[dict[str, Any]]]) -> list[tuple[str, float]]:
    return [(each["answer"], each["score"]) for (each,) in found]


def test_the_pipeline_of_transformers_gives_the_engines_answers(
    model: MedMoEForVisualQuestionAnswering, answers: list[tuple[str, float]]
) -> None:
    pipe = transformers.pipeline(
        TASK,
        model=model,
        config=model.config,
        pipeline_class=VisualQuestionAnsweringPipeline,
    )
    assert told([pipe(SCAN, QUESTIONS[0])]) == answers[:1]
    assert told(pipe(SCAN, QUESTIONS)) == answers
    asked = [{"image": SCAN, "question": question} for question in QUESTIONS]
    assert told(pipe(asked)) == answers
    assert told(list(pipe(one for one in asked))) == answers
    with Pillow.open(SCAN) as picture:
        assert told([model.pipeline()(picture, QUESTIONS[0])]) == answers[:1]
    assert len(pipe(SCAN, "Describe it", max_new_tokens=1)[0]["answer"].split()) <= 1
    assert "image" in repr(pipe)
    with pytest.raises(InputError, match="no option 'top_k'"):
        pipe(SCAN, "Is it?", top_k=5)
    with pytest.raises(InputError, match="no image or no question"):
        pipe({"image": SCAN})


def test_a_model_is_saved_with_a_card_and_loaded_again(
    model: MedMoEForVisualQuestionAnswering, answers: list[tuple[str, float]], tmp_path: Path
) -> None:
    out = model.save_pretrained(tmp_path / "saved")
    assert Bundle.open(out).sha256 == model.engine.sha256
    again = MedMoEForVisualQuestionAnswering.from_pretrained(out)
    assert told(again.pipeline()(SCAN, QUESTIONS)) == answers
    with pytest.raises(InputError, match="exists already"):
        model.save_pretrained(out)
    with pytest.raises((InputError, ModelError)):
        MedMoEForVisualQuestionAnswering.from_pretrained("nothing")


def test_a_checkpoint_is_a_model_too(tiny_checkpoint: Make, tmp_path: Path) -> None:
    model = MedMoEForVisualQuestionAnswering.from_pretrained(tiny_checkpoint())
    asked = medmoe_edge.load(tiny_checkpoint()).ask(SCAN, "Is it?", max_new_tokens=4)
    (found,) = model.pipeline()(SCAN, "Is it?", max_new_tokens=4)
    assert (found["answer"], found["score"]) == (asked.text, asked.confidence)
    out = model.save_pretrained(tmp_path / "saved")
    assert "pipeline_tag: visual-question-answering" in (out / "README.md").read_text()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub("me/mine", {})) as hub:
        yield hub


def test_a_model_of_the_hub_is_kept_by_its_commit(
    hub: Hub, tiny_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.files = {path.name: path.read_bytes() for path in tiny_bundle().iterdir()}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # as HF_ENDPOINT at the start of a process
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "*")
    make = MedMoEForVisualQuestionAnswering.from_pretrained
    first = make("me/mine", cache_dir=tmp_path)
    assert first.engine.sha256 == Bundle.open(tiny_bundle()).sha256
    asked = len(hub.asked)
    assert make("me/mine", cache_dir=tmp_path).folder == first.folder
    assert len(hub.asked) == asked  # what is there is not fetched again
    hub.commit = "d" * 40
    newer = make("me/mine", cache_dir=tmp_path)
    assert newer.folder != first.folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert make("me/mine", cache_dir=tmp_path).folder == newer.folder
    assert make("me/mine", revision=f"{'c0ffee':0<40}", cache_dir=tmp_path).folder == first.folder


def test_a_bundle_is_pushed_with_its_card_and_pulled_again(
    hub: Hub, tiny_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    model = MedMoEForVisualQuestionAnswering.from_pretrained(tiny_bundle())
    commit = model.push_to_hub("me/mine", path_in_repo="int8", endpoint=hub.url, token="hf_x")
    assert commit == hub.commit
    assert b"not a medical device" in hub.files["int8/README.md"]
    options = PullOptions(endpoint=hub.url, cache=tmp_path / "cache", revision=commit)
    pull("me/mine/int8", tmp_path / "pulled", options)
    assert Bundle.open(tmp_path / "pulled").sha256 == model.engine.sha256
    assert (tmp_path / "pulled" / "README.md").read_bytes() == hub.files["int8/README.md"]


@pytest.fixture
def optimum_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs a command line of optimum's own program; returns its exit code."""
    monkeypatch.syspath_prepend(ROOT / "plugins" / "optimum-medmoe")
    program = pytest.importorskip(
        "optimum.commands.optimum_cli", reason="needs the extra optimum", exc_type=ImportError
    )
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
        with pytest.raises(SystemExit) as left:
            program.main()
        return int(left.value.code or 0)

    return run


def test_optimum_cli_exports_what_our_verb_exports(
    optimum_cli: Callable[..., int],
    tiny_checkpoint: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert optimum_cli("export", "medmoe", str(tiny_checkpoint()), "out", "--fp32") == 0
    assert "Wrote the bundle out" in capsys.readouterr().out
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest["quantisation"]["precision"] == "fp32"
    assert optimum_cli("export", "medmoe", "nothing", "out2", "--int8") == 3
    assert "There is no model folder 'nothing'." in capsys.readouterr().err
    assert optimum_cli("export", "--help") == 0
    assert "medmoe" in capsys.readouterr().out
