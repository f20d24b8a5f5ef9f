"""The comparison of two models, against loops that compute every figure the slow way."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.data.datasets import Example
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import DataError, InputError, ModelError
from medmoe_edge.evaluation.fidelity import Recording, compare, record
from medmoe_edge.evaluation.metrics import Fidelity
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Cache, Runtime, Step, log_softmax
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.eager import EagerRuntime

Make = Callable[..., Path]
LIMIT = 4
QUESTIONS = ("Is there effusion?", "Where?", "What modality is used to take this image?")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    made = []
    for number, modality in enumerate(("ct", "mri", "ct", None)):
        image = folder / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), np.uint8)).save(image)
        for index, question in enumerate(QUESTIONS):
            answer_type: Any = "CLOSED" if index == 0 else "OPEN"
            made.append(
                Example(
                    f"{number}-{index}",
                    image,
                    question,
                    "",
                    answer_type,
                    modality,
                    *(None, None),
                    "",
                )
            )
    return made[::-1]  # an image's questions need not lie together


def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(folder / "tokenizer.json")


def reference(folder: Path) -> EagerRuntime:
    return EagerRuntime(read_checkpoint(folder))


def bundled(folder: Path) -> OrtRuntime:
    return OrtRuntime(Bundle.open(folder))


@pytest.fixture(scope="module")
def recording(tiny_checkpoint: Make, examples: list[Example]) -> Recording:
    folder = tiny_checkpoint()
    return record(reference(folder), tokenizer(folder), examples, max_new_tokens=LIMIT)


@pytest.fixture(scope="module")
def int8(tiny_bundle: Make, recording: Recording) -> Fidelity:
    return compare(recording, bundled(tiny_bundle("int8")))


# --- a faithful copy --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"preset": "tiny-phi", "top_k": 2}, {"dense": True}])
def test_the_fp32_bundle_is_faithful(
    tiny_checkpoint: Make, tiny_bundle: Make, examples: list[Example], options: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(**options)
    recorded = record(reference(folder), tokenizer(folder), examples[:4], max_new_tokens=LIMIT)
    fidelity = compare(recorded, bundled(tiny_bundle("fp32", **options)))
    assert fidelity.finite
    assert (fidelity.questions, fidelity.images) == (4, 2)
    assert fidelity.overall.answer_agreement.share == 1
    assert fidelity.overall.token_agreement.share == 1
    assert 0 <= fidelity.overall.kl.mean <= fidelity.overall.kl.p99 <= fidelity.overall.kl.max
    assert fidelity.overall.kl.max < 1e-5
    assert fidelity.vision.cosine_min > 0.9999
    assert fidelity.vision.relative_error < 1e-4
    if "dense" in options:
        assert fidelity.routing is None
    else:
        assert fidelity.routing is not None
        assert fidelity.routing.flips.count == 0
        assert list(fidelity.routing.by_layer) == list(recorded.config.moe_layers)
        assert max(fidelity.routing.error_by_layer.values()) < 1e-4


def test_progress_counts_images(recording: Recording, tiny_bundle: Make) -> None:
    steps: list[tuple[int, int]] = []
    compare(recording, bundled(tiny_bundle()), progress=lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- an unfaithful one, against a naive recomputation -----------------------------------------


def whole(runtime: Runtime, words: Tokenizer, example: Example, answer: list[int]) -> list[Step]:
    """The steps over prefix, question and each answer token, without any reuse of the prefix.

    The head has more rows than there are tokens, and these cannot be chosen.
    """
    exist = words.backend.get_vocab_size()
    pixels = preprocess(load_image(example.image), runtime.config.vision)
    features = runtime.encode_image(pixels)
    start = np.concatenate((runtime.embed(words.prefix_ids()), features))
    question = runtime.embed(words.question_ids(example.question))
    steps = []
    for count in range(len(answer) + 1):
        tail = [runtime.embed(answer[:count])] if count else []
        embeds = np.concatenate((start, question, *tail))
        step = runtime.step(embeds, runtime.new_cache(len(embeds)))
        steps.append(step._replace(logits=step.logits[:exist]))
    return steps


def greedy(runtime: Runtime, words: Tokenizer, example: Example) -> list[int]:
    answer: list[int] = []
    while len(answer) < LIMIT:
        answer.append(int(whole(runtime, words, example, answer)[-1].logits.argmax()))
        if answer[-1] == runtime.config.decoder.eos_token_id:
            break
    return answer


def naive_kl(first: Floats, second: Floats) -> float:
    p, q = (
        [math.exp(float(value) - max(map(float, logits))) for value in logits]
        for logits in (first, second)
    )
    return sum(
        a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True)
    )


def noisy(folder: Path) -> EagerRuntime:
    """The reference with 10% of noise on every parameter."""
    runtime = reference(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in runtime.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * parameter.std(correction=0) * noise)
    return runtime


def test_figures_against_a_naive_loop(tiny_checkpoint: Make, examples: list[Example]) -> None:
    folder, some = tiny_checkpoint(), examples[:2]  # of one image
    words, model, candidate = tokenizer(folder), reference(folder), noisy(folder)
    fidelity = compare(record(model, words, some, max_new_tokens=LIMIT), candidate)
    kl, agree, same, flips, tokens = [], [], [], 0, 0
    for number, example in enumerate(some):
        answer = greedy(model, words, example)
        same.append(greedy(candidate, words, example) == answer)
        expected, found = (
            whole(runtime, words, example, answer[:-1]) for runtime in (model, candidate)
        )
        for token, left, right in zip(answer, expected, found, strict=True):
            kl.append(naive_kl(left.logits, right.logits))
            agree.append(token == right.logits.argmax())
        chosen = [step[0].router_logits.argmax(-1) for step in (expected, found)]  # [S, M]
        counted = slice(0 if number == 0 else -len(words.question_ids(example.question)), None)
        flips += int((chosen[0] != chosen[1])[counted].sum())  # the image's prefix once
        tokens += chosen[0][counted].size
    overall, routing = fidelity.overall, fidelity.routing
    assert overall.kl.mean == pytest.approx(np.mean(kl), rel=1e-3)
    assert overall.kl.p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert overall.kl.max == pytest.approx(np.max(kl), rel=1e-3)
    assert (overall.token_agreement.count, overall.token_agreement.total) == (
        sum(agree),
        len(agree),
    )
    assert 0 < sum(agree) < len(agree)
    assert overall.answer_agreement.count == sum(same)
    assert routing is not None
    assert (routing.flips.count, routing.flips.total) == (flips, tokens)
    assert flips > 0


def test_agreement_is_that_of_the_engines_answers(
    tiny_checkpoint: Make, tiny_bundle: Make, examples: list[Example], recording: Recording
) -> None:
    candidate = Shifted(bundled(tiny_bundle("fp32")), every=2)
    engines = load(tiny_checkpoint()), load(tiny_bundle("fp32"))
    engines[1].runtime = candidate
    same = 0
    for example in examples:  # each asked by itself
        texts = [
            engine.ask(example.image, example.question, max_new_tokens=LIMIT).text
            for engine in engines
        ]
        same += texts[0] == texts[1]
    fidelity = compare(recording, candidate)
    assert 0 < fidelity.overall.token_agreement.share < 1
    assert fidelity.overall.answer_agreement.count == same


def test_groups_add_up(int8: Fidelity) -> None:
    assert set(int8.by_modality) == {"ct", "mri", "unknown"}
    assert set(int8.by_answer_type) == {"CLOSED", "OPEN"}
    assert int8.routing is not None
    for groups in (int8.by_modality, int8.by_answer_type):
        assert sum(group.n for group in groups.values()) == int8.questions
        counts = [group.token_agreement.count for group in groups.values()]
        assert sum(counts) == int8.overall.token_agreement.count
    for shares in (int8.routing.by_layer, int8.routing.by_modality):
        assert sum(share.count for share in shares.values()) == int8.routing.flips.count
        assert sum(share.total for share in shares.values()) == int8.routing.flips.total


def test_figures_are_json(int8: Fidelity) -> None:
    text = json.dumps(int8.to_json(), allow_nan=False)
    figures = json.loads(text)
    assert set(figures["routing"]["by_layer"]) == {"0", "2"}
    assert figures["overall"]["answer_agreement"]["total"] == 12


def test_accuracy_is_of_the_questions_with_an_answer(
    tiny_checkpoint: Make, tiny_bundle: Make, examples: list[Example]
) -> None:
    folder = tiny_checkpoint()
    said = load(folder).ask(examples[0].image, examples[0].question, max_new_tokens=LIMIT).text
    some = [
        replace(examples[0], answer=said),
        replace(examples[1], answer="not what it says"),
        examples[2],
    ]
    recorded = record(reference(folder), tokenizer(folder), some, max_new_tokens=LIMIT)
    accuracy = compare(recorded, Shifted(bundled(tiny_bundle()), every=1)).overall.accuracy
    assert accuracy is not None
    assert (accuracy.n, accuracy.reference, accuracy.candidate) == (2, 0.5, 0)
    assert accuracy.difference == -0.5
    assert compare(recorded, bundled(tiny_bundle())).by_answer_type["OPEN"].n == 2


# --- broken candidates ------------------------------------------------------------------------


class Wrapped:
    """A runtime that passes everything on."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.name, self.config = runtime, runtime.name, runtime.config

    def encode_image(self, pixels: Floats) -> Floats:
        return self.runtime.encode_image(pixels)

    def embed(self, ids: list[int]) -> Floats:
        return self.runtime.embed(ids)

    def new_cache(self, capacity: int) -> Cache:
        return self.runtime.new_cache(capacity)

    def step(self, embeds: Floats, cache: Cache) -> Step:
        return self.runtime.step(embeds, cache)


class Shifted(Wrapped):
    """Takes the neighbour of the right token wherever the position divides by `every`."""

    def __init__(self, runtime: Runtime, every: int) -> None:
        super().__init__(runtime)
        self.every = every

    def step(self, embeds: Floats, cache: Cache) -> Step:
        step = super().step(embeds, cache)
        shift = int(cache.length % self.every == 0)
        return step._replace(logits=np.roll(step.logits, shift))


class Broken(Wrapped):
    """Spoils one of its outputs with a NaN."""

    def __init__(self, runtime: Runtime, part: str) -> None:
        super().__init__(runtime)
        self.part = part

    def encode_image(self, pixels: Floats) -> Floats:
        features = super().encode_image(pixels).copy()
        features[0, 0] = np.nan if self.part == "features" else features[0, 0]
        return features

    def step(self, embeds: Floats, cache: Cache) -> Step:
        step = super().step(embeds, cache)
        if self.part == "features":
            return step
        return step._replace(**{self.part: getattr(step, self.part) * np.nan})


def test_another_choice_at_every_step_is_seen(recording: Recording, tiny_bundle: Make) -> None:
    fidelity = compare(recording, Shifted(bundled(tiny_bundle()), every=1))
    assert fidelity.overall.token_agreement.count == 0
    assert fidelity.overall.kl.mean > 0.1
    assert fidelity.vision.cosine_min > 0.9999
    assert fidelity.finite


@pytest.mark.parametrize("part", ["features", "logits", "router_logits"])
def test_what_is_not_finite_is_told_and_breaks_nothing(
    recording: Recording, tiny_bundle: Make, part: str
) -> None:
    fidelity = compare(recording, Broken(bundled(tiny_bundle()), part))
    assert not fidelity.finite
    json.dumps(fidelity.to_json(), allow_nan=False)
    if part == "features":
        assert fidelity.vision.cosine_mean == 0


# --- what cannot be compared ------------------------------------------------------------------


def test_bad_input_is_refused(
    tiny_checkpoint: Make, tiny_bundle: Make, examples: list[Example], recording: Recording
) -> None:
    folder = tiny_checkpoint()
    model, words = reference(folder), tokenizer(folder)
    with pytest.raises(DataError, match="no questions"):
        record(model, words, [])
    with pytest.raises(DataError, match="share an id"):
        record(model, words, [examples[0], examples[0]])
    with pytest.raises(InputError, match="positions"):
        record(model, words, [replace(examples[0], question="why " * 500)])
    with pytest.raises(ModelError, match="reference model's output is not finite"):
        record(Broken(model, "logits"), words, examples[:1])
    with pytest.raises(ModelError, match="different make"):
        compare(recording, bundled(tiny_bundle("fp32", "tiny-phi")))


def test_log_softmax_against_the_definition() -> None:
    logits = np.array([[1000.0, 999.0, -1000.0]])
    expected = [-math.log1p(math.exp(-1)), -1 - math.log1p(math.exp(-1)), -2000]
    assert log_softmax(logits)[0] == pytest.approx(expected, abs=0.4)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1, abs=1e-12)
