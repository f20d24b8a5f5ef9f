"""The library as people write it: engines that end, threads, several images, functions."""

import asyncio
import io
import json
import os
import pydoc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from test_engine import random_image, told

import medmoe_edge
from medmoe_edge import CalibrateOptions, EvaluateOptions, ExportOptions, VerifyOptions
from medmoe_edge.engine.engine import Engine
from medmoe_edge.errors import InputError, MedMoEError, ModelError

Make = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(tiny_bundle: Make) -> Engine:
    found: Engine = medmoe_edge.load(tiny_bundle("fp32"))
    return found


def test_load_gives_the_engine_of_the_family() -> None:
    with medmoe_edge.load("modality-nano") as engine:
        labels = ["chest x-ray", "brain mri"]
        found = engine.classify(ROOT / "scan.png", labels)
        pixels = np.asarray(Pillow.open(ROOT / "scan.png")) / 255
        assert engine.classify(pixels, labels, value_range=(0, 1)).scores == found.scores
        with pytest.raises(InputError, match="labels is one text"):
            engine.classify(pixels, "chest x-ray")
    assert next(iter(found.scores)) == "chest x-ray"
    with pytest.raises(InputError, match="memory_budget does not go with"):
        medmoe_edge.load("modality-nano", memory_budget="50%")
    with pytest.raises(ModelError, match=r"no model folder"):
        medmoe_edge.load("no-such-model")


def test_an_engine_ends(tiny_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where proofs of other tests are kept
    with medmoe_edge.load(tiny_bundle("fp32")) as engine:
        assert repr(engine) == "<Engine tiny, onnxruntime, verification not measured>"
        engine.ask(random_image(), "Is it?", max_new_tokens=1)
    engine.close()
    assert repr(engine) == "<Engine tiny, closed, verification not measured>"
    with pytest.raises(InputError, match="closed"):
        engine.ask(random_image(), "Is it?")
    with pytest.raises(InputError, match="closed"):
        engine.modality(random_image())


def test_every_form_of_a_picture_has_one_answer(engine: Engine, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 24), np.uint8)
    path = tmp_path / "scan.png"
    Pillow.fromarray(grey).save(path)
    forms = [path, path.read_bytes(), io.BytesIO(path.read_bytes()), Pillow.open(path), grey]
    answers = [told(engine.ask(form, "Where?", max_new_tokens=4)) for form in forms]
    stated = engine.ask(grey / 255, "Where?", max_new_tokens=4, value_range=(0, 1))
    assert all(answer == answers[0] for answer in [*answers, told(stated)])


def test_several_images(engine: Engine) -> None:
    images, questions = [random_image(seed) for seed in range(3)], ["Is it?", "Where?"]
    found = engine.ask_images(images, questions, max_new_tokens=2)
    expected = [engine.ask_all(image, questions, max_new_tokens=2) for image in images]
    assert [[told(a) for a in each] for each in found] == [[told(a) for a in e] for e in expected]
    with pytest.raises(InputError, match=r"^Image 2: .* is no image"):
        engine.ask_images([images[0], 3], questions, max_new_tokens=1)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda e: e.ask_all(random_image(), "Is it?"), "questions is one text, and a list is"),
        (lambda e: e.ask_images("scan.png", ["Is it?"]), "images is one image, and a list is"),
        (lambda e: e.ask_images([random_image()], "Is it?"), "questions is one text"),
        (lambda e: e.ask(random_image(), ["Is it?"]), "question is not one text"),
        (lambda e: next(e.ask_stream(random_image(), "Is it?")), "questions is one text"),
    ],
)
def test_one_where_many_are_meant(engine: Engine, call: Callable[[Any], Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        call(engine)


def test_what_would_be_passed_over_is_refused(engine: Engine, tiny_bundle: Make) -> None:
    scan, wrong = ROOT / "scan.png", {"yes": ["yes", "no"]}
    for call, what in (
        (lambda: engine.ask(scan, "Is it?", choices=wrong), "choices for 'yes'"),
        (lambda: engine.ask_all(scan, ["Is it?", None]), "None is not text"),  # type: ignore[list-item]
        (lambda: engine.ask(scan, "Is it?", frame=0.0), "frame is 0.0"),  # type: ignore[arg-type]
        (lambda: medmoe_edge.load(tiny_bundle("fp32"), device="gpu"), "cpu, cuda"),  # type: ignore[call-overload]
        (lambda: medmoe_edge.load(tiny_bundle("fp32"), runtime="ort"), "auto, onnx"),  # type: ignore[call-overload]
        (lambda: medmoe_edge.load("modality-nano", device="gpu"), "device is 'gpu'"),  # type: ignore[call-overload]
    ):
        with pytest.raises(InputError, match=what):
            call()


@pytest.mark.parametrize("odd", [None, 5, 1.5, b"x", [1], {}, object(), "", "x" * 5000, "x\0y"])
def test_what_is_no_path_is_told(odd: Any, tmp_path: Path) -> None:
    other: Any = odd or 1  # where None is nothing odd
    for call in (
        lambda: medmoe_edge.load(odd),
        lambda: medmoe_edge.export_model(odd, tmp_path / "b"),
        lambda: medmoe_edge.export_model("nano", odd),
        lambda: medmoe_edge.verify(odd),
        lambda: medmoe_edge.evaluate(odd, EvaluateOptions(tmp_path / "q")),
        lambda: medmoe_edge.evaluate("nano", EvaluateOptions(tmp_path / "q", predictions=other)),
        lambda: medmoe_edge.calibrate("nano", odd, CalibrateOptions("builtin")),
        lambda: medmoe_edge.train(odd, tmp_path / "run"),
        lambda: medmoe_edge.train(tmp_path / "q", tmp_path / "run", odd),
        lambda: medmoe_edge.load("nano", prefix_cache=other),
    ):
        with pytest.raises(MedMoEError):
            call()
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_unicode_is_told_as_that(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    folder.mkdir()
    for call in (
        lambda: medmoe_edge.load(folder),
        lambda: medmoe_edge.export_model("nano", folder / "bundle"),
    ):
        with pytest.raises(InputError, match="is not valid Unicode"):
            call()


@pytest.mark.parametrize("odd", [None, 1.5, b"x", object(), "x", [1], True])
def test_what_is_of_another_type_is_told(engine: Engine, odd: Any) -> None:
    other: Any = odd or 1.5  # where None is nothing odd
    no_number: Any = [] if odd is True else odd
    for call in (
        lambda: engine.ask(random_image(), "Is it?", max_new_tokens=no_number),
        lambda: engine.ask_all(random_image(), odd),
        lambda: engine.ask_images(odd, ["Is it?"]),
        lambda: engine.ask(random_image(), "Is it?", choices=other),
        lambda: engine.ask(random_image(), "Is it?", choices={"Is it?": other}),
        lambda: engine.ask_all(random_image(), [other], choices={"Is it?": ["yes", "no"]}),
        lambda: list(engine.ask_stream(random_image(), ["Is it?"], alternatives=other)),
        lambda: medmoe_edge.load("nano", memory_budget=other),
        lambda: medmoe_edge.load("nano", allow_repetition=no_number),
        lambda: medmoe_edge.export_model("nano", "b", other),
        lambda: medmoe_edge.verify("nano", other),
        lambda: medmoe_edge.evaluate("nano", odd),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (lambda: ExportOptions("INT8"), "precision is 'INT8'. Use one of: fp32, int8"),  # type: ignore[arg-type]
        (lambda: ExportOptions(method="gptq"), "method is 'gptq'"),  # type: ignore[arg-type]
        (lambda: ExportOptions(vision="token"), "vision is 'token'"),  # type: ignore[arg-type]
        (lambda: ExportOptions("int4", group=16), "group is 16"),  # type: ignore[arg-type]
        (lambda: ExportOptions(samples="5"), "samples cannot be str. Give a whole number"),  # type: ignore[arg-type]
        (lambda: ExportOptions(strict=1), "strict cannot be int. Give True or False"),  # type: ignore[arg-type]
        (lambda: ExportOptions(modalities="ct"), "Give a list of texts"),  # type: ignore[arg-type]
        (lambda: EvaluateOptions(""), "data cannot be ''. Give a path or None"),  # type: ignore[arg-type]
        (lambda: EvaluateOptions(Path("q"), device="gpu"), "device is 'gpu'"),  # type: ignore[arg-type]
        (lambda: medmoe_edge.verify("nano", {}), "options cannot be dict. Give VerifyOptions or"),  # type: ignore[arg-type]
        (lambda: VerifyOptions(beside=["nano"]), "measure against a checkpoint"),
        (lambda: VerifyOptions(data="mine"), "measure against a checkpoint"),
        (lambda: VerifyOptions(record=True), "There is nothing to record"),
    ],
)
def test_options_are_checked_where_they_are_made(options: Callable[[], Any], what: str) -> None:
    with pytest.raises(InputError) as caught:
        options()
    assert what in str(caught.value)


def test_options_take_what_people_have_in_hand() -> None:
    made = ExportOptions("mixed", budget_bits=5, stats="stats", modalities=["ct"])  # type: ignore[arg-type]
    assert made == ExportOptions("mixed", budget_bits=5.0, stats=Path("stats"), modalities=("ct",))
    counted = EvaluateOptions("q.jsonl", limit=np.int64(3))  # type: ignore[arg-type]
    assert counted == EvaluateOptions(Path("q.jsonl"), limit=3)
    assert ExportOptions("int4", group=np.int64(64), strict=np.True_).group == 64  # type: ignore[arg-type]
    assert CalibrateOptions(Path("images")).data == Path("images")
    assert CalibrateOptions("builtin").data == "builtin"


def test_what_goes_with_no_model_of_its_kind_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "none"
    for asked, what in (
        (EvaluateOptions(data, device="cuda"), "--device does not go"),
        (EvaluateOptions(data, allow_repetition=True), "--allow-repetition does not go"),
    ):
        with pytest.raises(InputError, match=what):
            medmoe_edge.evaluate("modality-nano", asked)
    for given, what in (
        (ExportOptions(budget_bits=3.0), "int8 has no bits to spend"),
        (ExportOptions(stats=data), "does not exist"),
    ):
        with pytest.raises(MedMoEError, match=what):
            medmoe_edge.export_model("nano", tmp_path / "never", given)


def test_threads_wait_for_each_other(engine: Engine) -> None:
    """Eight threads, four pictures each: the answers are those of one thread."""
    images = [random_image(seed) for seed in range(4)]
    expected = [told(engine.ask(image, "Where?", max_new_tokens=3)) for image in images]
    found: dict[int, list[Any]] = {}

    def ask(number: int) -> None:
        found[number] = [told(engine.ask(image, "Where?", max_new_tokens=3)) for image in images]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(8)] == [expected] * 8


def test_a_stream_keeps_its_turn(engine: Engine) -> None:
    stream = engine.ask_stream(random_image(), ["Where?"], max_new_tokens=3)
    next(stream)
    with pytest.raises(InputError, match="is being streamed by this thread"):
        engine.ask(random_image(), "Is it?")
    waiting = threading.Thread(target=engine.ask, args=(random_image(), "Is it?"))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    stream.close()  # type: ignore[attr-defined]
    waiting.join(30)
    assert not waiting.is_alive()


def test_an_engine_that_two_threads_close_at_once_is_closed_once(tiny_bundle: Make) -> None:
    engine = medmoe_edge.load(tiny_bundle("fp32"))
    stream = engine.ask_stream(random_image(), ["Where?"], max_new_tokens=3)
    next(stream)
    with ThreadPoolExecutor(2) as threads:
        closing = [threads.submit(engine.close) for _ in range(2)]
        time.sleep(0.2)  # both wait for the stream
        stream.close()
        assert [each.result(30) for each in closing] == [None, None]


def test_asked_from_an_event_loop(engine: Engine) -> None:
    async def ask() -> list[Any]:
        asked = [engine.ask_async(random_image(n), "Where?", max_new_tokens=2) for n in range(3)]
        return list(await asyncio.gather(*asked))

    expected = [engine.ask(random_image(n), "Where?", max_new_tokens=2) for n in range(3)]
    assert list(map(told, asyncio.run(ask()))) == list(map(told, expected))


def test_help_shows_what_matters() -> None:
    text = pydoc.render_doc(medmoe_edge, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    for name in set(medmoe_edge.__all__) - {"__version__"}:
        assert name in text
    assert 'load("nano")' in text
    for function in ("calibrate", "export_model", "verify", "evaluate", "train", "load"):
        told_of = getattr(medmoe_edge, function).__doc__
        assert all(part in told_of for part in ("Args:", "Returns:", "Raises:")), function


def test_importing_loads_neither_torch_nor_onnx_runtime() -> None:
    code = (
        "import sys, medmoe_edge; first = set(sys.modules)\n"
        "medmoe_edge.load; medmoe_edge.export_model; medmoe_edge.ExportOptions\n"
        "print('onnxruntime' in first, 'numpy' in first, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False", "False"]


def test_from_a_checkpoint_to_figures(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """What the verbs do, Python does."""
    for number in range(3):
        Pillow.fromarray(random_image(number).pixels).save(tmp_path / f"{number}.png")
    lines = [
        {"image": f"{n}.png", "question": "Is it?", "answer": "no", "modality": "ct"}
        for n in range(3)
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    checkpoint = tiny_checkpoint()
    chosen = medmoe_edge.CalibrateOptions(str(data), samples=2)
    found = medmoe_edge.calibrate(checkpoint, tmp_path / "stats", chosen)
    assert set(found.statistics.samples) == {"ct"}
    options = medmoe_edge.ExportOptions("int4", stats=tmp_path / "stats")
    made = medmoe_edge.export_model(checkpoint, tmp_path / "bundle", options)
    page = VerifyOptions(report=tmp_path / "page.html")
    assert medmoe_edge.verify(made.bundle, page).outcome == "not measured"
    assert "<html" in (tmp_path / "page.html").read_text("utf-8")
    scored = medmoe_edge.evaluate(made.bundle, medmoe_edge.EvaluateOptions(data, blind=True))
    assert scored.to_json()["blind"]["overall"]["n"] == 3
    with pytest.raises(MedMoEError, match="needs no calibration"):
        medmoe_edge.calibrate("modality-nano", tmp_path / "s", chosen)
    asked = data.read_bytes()
    with pytest.raises(InputError, match="its own input"):
        medmoe_edge.evaluate(made.bundle, EvaluateOptions(data, predictions=data))
    (weights,) = shutil.copytree(checkpoint, tmp_path / "c").glob("*.safetensors")
    with pytest.raises(InputError, match="its own input"):
        medmoe_edge.calibrate(tmp_path / "c", weights, CalibrateOptions(str(data), force=True))
    with pytest.raises(InputError, match="0 samples"):
        medmoe_edge.calibrate(checkpoint, tmp_path / "s", CalibrateOptions(str(data), samples=0))
    with pytest.raises(InputError, match="The limit is -1"):
        medmoe_edge.evaluate(made.bundle, EvaluateOptions(data, limit=-1))
    assert data.read_bytes() == asked
