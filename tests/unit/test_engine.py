"""Questions asked of tiny random models: they answer gibberish, but always the same gibberish."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmoe_edge.bundle.bundle import NOTICE, Bundle, write_verification
from medmoe_edge.engine.answer import Answer
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.errors import BundleError, CheckpointError, InputError
from medmoe_edge.image.pixels import Image

Make = Callable[..., Path]
QUESTIONS = ["Is there effusion?", "What modality is used to take this image?", "Where?"]
EXPERTS = ("mri", "ct", "pathology", "xray")


def random_image(seed: int = 0) -> Image:
    shape = (40, 30 + seed % 20, 3)
    return Image.from_array(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@pytest.fixture(scope="module")
def engines(tiny_bundle: Make, tiny_checkpoint: Make) -> dict[str, Engine]:
    return {
        "fp32": load(tiny_bundle("fp32")),
        "int8": load(tiny_bundle("int8")),
        "torch": load(tiny_checkpoint()),
    }


def told(answer: Answer) -> dict[str, Any]:
    """Everything but how long it took."""
    values = answer.to_json()
    assert values.pop("timings")
    return values


# --- what is answered -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "int8", "torch"])
def test_every_question_is_answered_as_if_alone(engines: dict[str, Engine], name: str) -> None:
    engine, image = engines[name], random_image()
    together = engine.ask_all(image, [*QUESTIONS, QUESTIONS[0]], max_new_tokens=5)
    assert [answer.question for answer in together] == [*QUESTIONS, QUESTIONS[0]]
    for answer in together:
        alone = engine.ask(image, answer.question, max_new_tokens=5)
        assert told(alone) == told(answer)
        assert not alone.timings.prefix_reused
    assert [answer.timings.prefix_reused for answer in together] == [False, True, True, True]
    assert len({answer.text for answer in together}) == 3
    other = engine.ask(random_image(1), QUESTIONS[0], max_new_tokens=5)
    assert told(other) != told(together[0])


def test_asked_twice_the_bytes_are_the_same(tiny_bundle: Make) -> None:
    texts = [
        json.dumps(told(load(tiny_bundle("int8")).ask(random_image(), QUESTIONS[0])))
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_bundle_and_torch_answer_fifty_questions_alike(engines: dict[str, Engine]) -> None:
    generator = np.random.default_rng(0)
    letters = list(string.ascii_letters + " ?")
    texts = set()
    for seed in range(50):
        question = "Q" + "".join(generator.choice(letters, generator.integers(1, 30)))
        ours, theirs = (
            engines[name].ask(random_image(seed), question, max_new_tokens=4)
            for name in ("fp32", "torch")
        )
        assert (ours.text, ours.modality, ours.experts, ours.complete) == (
            *(theirs.text, theirs.modality, theirs.experts),
            theirs.complete,
        )
        assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-3)
        texts.add(ours.text)
    assert len(texts) > 10


def test_an_answer_says_all(engines: dict[str, Engine], tiny_bundle: Make) -> None:
    answer = engines["fp32"].ask(random_image(), f"  {QUESTIONS[0]}\n", max_new_tokens=3)
    assert set(answer.experts) == set(EXPERTS)
    assert sum(answer.experts.values()) == pytest.approx(1)
    assert answer.modality in EXPERTS
    assert 0 < answer.confidence < 1
    sha256 = engines["fp32"].sha256
    assert answer.model == {
        "name": "tiny",
        "sha256": sha256,
        "verification": "not measured",
        "runtime": "onnxruntime",
        "verified": {"here": False, "machine": None},
    }
    assert engines["torch"].ask(random_image(), "Where?").model["verification"] == "reference"
    assert answer.notice == NOTICE
    times = answer.timings
    assert times.first_token == pytest.approx(
        times.image + times.vision + times.prefix + times.question
    )
    assert times.total == pytest.approx(times.first_token + times.decode)
    assert answer.complete == (times.tokens < 3)
    values = json.loads(json.dumps(answer.to_json()))
    assert list(values)[:3] == ["question", "answer", "confidence"]
    assert values["answer"] == answer.text


def test_two_experts_are_counted_for_each_token(tiny_bundle: Make, tiny_checkpoint: Make) -> None:
    options = {"top_k": 2, "use_residual": True}
    models = (tiny_bundle("fp32", **options), tiny_checkpoint(**options))
    ours, theirs = (
        load(path).ask(random_image(), QUESTIONS[0], max_new_tokens=3) for path in models
    )
    assert ours.experts == theirs.experts
    assert sum(ours.experts.values()) == pytest.approx(1)
    assert max(ours.experts.values()) <= 0.5  # no expert is chosen twice for a token


def test_a_dense_model_has_no_experts_to_tell(tiny_bundle: Make) -> None:
    engine = load(tiny_bundle("fp32", dense=True))
    answer = engine.ask(random_image(), QUESTIONS[0], max_new_tokens=2)
    assert (answer.experts, answer.modality, engine.expert_names) == ({}, None, ())
    assert engine.modality(random_image()) is None


def test_experts_without_names_are_numbered(tiny_bundle: Make) -> None:
    answer = load(tiny_bundle("fp32", expert_names=())).ask(random_image(), "Where?")
    assert list(answer.experts) == ["expert-0", "expert-1", "expert-2", "expert-3"]
    assert answer.modality is None


def test_the_modality_is_the_router_s_over_the_image_tokens(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["torch"]
    assert engine.modality(random_image()) == engines["fp32"].modality(random_image())
    step = engine.runtime.step

    def scripted(embeds: Any, cache: Any) -> Any:
        logits = np.zeros((len(embeds), 2, 4), np.float32)
        logits[:-4, :, 0] = 100.0  # the system prompt
        logits[-4:, 0, 1] = [5.0, 1.0, 1.0, 1.0]  # one of the four image tokens, one layer
        logits[-4:, :, 2] = 1.5
        return step(embeds, cache)._replace(router_logits=logits)

    monkeypatch.setattr(engine.runtime, "step", scripted)
    assert engine.modality(random_image()) == "pathology"


def test_the_experts_of_prompt_question_and_answer_are_counted(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["fp32"]
    step, lengths = engine.runtime.step, []

    def scripted(embeds: Any, cache: Any) -> Any:
        lengths.append(len(embeds))
        expert = min(len(lengths), 3) - 1  # one for the prefix, one for the question, one for all
        router = np.tile(np.eye(4, dtype=np.float32)[expert], (len(embeds), 2, 1))
        logits = np.eye(320, dtype=np.float32)[40]
        return step(embeds, cache)._replace(logits=logits, router_logits=router)

    monkeypatch.setattr(engine.runtime, "step", scripted)
    answer = engine.ask(random_image(), "Where?", max_new_tokens=4)
    prefix, question, *decode = lengths
    assert decode == [1, 1, 1]  # nothing follows the fourth token
    shares = {"mri": prefix, "ct": question, "pathology": 3, "xray": 0}
    assert answer.experts == {name: n / sum(lengths) for name, n in shares.items()}


# --- the end of an answer ---------------------------------------------------------------------


def test_an_answer_ends_at_the_end_token_or_the_limit(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime is scripted: three tokens, then the end, each with probability 1/2."""
    engine = engines["fp32"]
    step = engine.runtime.step
    script: list[int] = []

    def scripted(embeds: Any, cache: Any) -> Any:
        logits = np.full(320, -1e4, np.float32)
        logits[[script.pop(0), 299]] = 0.0
        return step(embeds, cache)._replace(logits=logits)

    monkeypatch.setattr(engine.runtime, "step", scripted)
    for limit, tokens, complete in ((5, 3, True), (4, 3, True), (3, 3, False), (1, 1, False)):
        script[:] = [7, 40, 41, 42, 0]  # the first is the prefix's, which nobody reads
        answer = engine.ask(random_image(), "Where?", max_new_tokens=limit)
        assert (answer.timings.tokens, answer.complete) == (tokens, complete)
        assert answer.text == engine.tokenizer.decode([40, 41, 42][:tokens])
        assert answer.confidence == pytest.approx(0.5 ** (tokens + complete))
        assert len(script) == (0 if complete else 4 - limit)


@pytest.mark.parametrize("spoilt", ["encode_image", "logits", "router_logits"])
def test_what_is_not_finite_is_no_answer(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    for name, error in (("int8", BundleError), ("torch", CheckpointError)):
        engine = engines[name]
        step, encode = engine.runtime.step, engine.runtime.encode_image

        def spoilt_step(embeds: Any, cache: Any, step: Any = step) -> Any:
            done = step(embeds, cache)
            values = getattr(done, spoilt).copy()
            values[..., -1] = np.nan
            return done._replace(**{spoilt: values})

        if spoilt == "encode_image":
            broken = np.full_like(encode(np.zeros((1, 3, 28, 28), np.float32)), np.inf)
            monkeypatch.setattr(engine.runtime, "encode_image", lambda _, broken=broken: broken)
        else:
            monkeypatch.setattr(engine.runtime, "step", spoilt_step)
        with pytest.raises(error, match="values that are NaN or infinite"):
            engine.ask(random_image(), "Where?")


def test_a_bundle_that_failed_its_verification_answers_and_warns(
    tiny_bundle: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("int8"), folder)
    for passed, proof, warnings in ((True, "passed", 0), (False, "failed", 1)):
        write_verification(Bundle.open(folder), {"passed": passed})
        answer = load(folder).ask(random_image(), "Where?", max_new_tokens=1)
        assert answer.to_json()["model"]["verification"] == proof
        assert len(caplog.messages) == warnings
    assert caplog.messages[0].startswith("tiny failed its verification")


# --- what cannot be asked ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", {}, "empty"),
        (" <image> ", {}, "empty"),
        ("Is it?", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("Is it?", {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ("Is it?", {"max_new_tokens": 10**9}, "the model has 512"),
        ("why " * 300, {}, r"need [\d,]+ positions, the model has 512"),
        ("a" * 100_000, {}, "100,000 characters"),
    ],
)
def test_what_cannot_be_asked(
    engines: dict[str, Engine], question: str, options: dict[str, Any], message: str
) -> None:
    for name in ("fp32", "torch"):
        with pytest.raises(InputError, match=message):
            engines[name].ask_all(random_image(), ["Where?", question], **options)
    assert engines["fp32"].ask_all(random_image(), []) == []
