"""nano as it ships, on this very CPU: answers as on every other, and paging changes no bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from recorded import RECORD, answers, require_equal

import medmoe_edge
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.embedded import bundle_path
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.ort.paged import PagedOrtRuntime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

STEPS = (17, 5, 1, 1)  # a prefill, a question, two tokens


@pytest.fixture(scope="module")
def engine() -> medmoe_edge.Engine:
    return medmoe_edge.load("nano")


def require_recorded(data: Path | None, engine: medmoe_edge.Engine) -> None:
    """The answers are those recorded, and so, within bounds, are their confidences."""
    record = json.loads(RECORD.read_text())
    assert record["bundle"] == Bundle.open(bundle_path("nano")).sha256, (
        "nano was exported again: record its answers by `python tests/arithmetic/recorded.py`"
    )
    found = ((name, answer.text, answer.confidence) for name, answer in answers(data, engine))
    require_equal(record["answers"], found)


def test_the_answers_about_the_scan_are_those_of_other_processors(
    engine: medmoe_edge.Engine,
) -> None:
    require_recorded(None, engine)


def test_twenty_answers_to_validation_questions_too(
    engine: medmoe_edge.Engine, data_dir: Path
) -> None:
    require_recorded(data_dir, engine)


def test_paged_experts_give_the_same_bits() -> None:
    bundle = Bundle.open(bundle_path("nano"))
    whole, paged = OrtRuntime(bundle), PagedOrtRuntime(bundle, "50%")
    assert steps(paged) == steps(whole)
    assert paged.paging()["misses"] > 0


def steps(runtime: Runtime) -> list[bytes]:
    """The logits of tokens and of routers, to the bit."""
    cache, chance, told = runtime.new_cache(sum(STEPS)), np.random.default_rng(3), []
    for length in STEPS:
        size = runtime.config.decoder.hidden_size
        step = runtime.step(chance.normal(size=(length, size)).astype(np.float32), cache)
        told += [step.logits.tobytes(), step.router_logits.tobytes()]
    return told
