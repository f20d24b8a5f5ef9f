"""Answers told while they are made, and the last image kept for the next question."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_engine import QUESTIONS, random_image, told

from medmoe_edge.engine.answer import Answer
from medmoe_edge.engine.engine import ROOM, Engine, load
from medmoe_edge.engine.prefix_cache import LastPrefix
from medmoe_edge.errors import InputError

Make = Callable[..., Path]


@pytest.fixture
def engine(tiny_bundle: Make) -> Engine:
    return load(tiny_bundle("fp32"))


def remembering(engine: Engine) -> Engine:
    engine.prefixes = LastPrefix(engine.sha256, engine.runtime)
    return engine


def no_tower(pixels: object) -> object:
    raise AssertionError("the image was processed again")


def test_the_pieces_are_the_answers(engine: Engine) -> None:
    texts: list[str] = []
    pieces: list[str] = []
    answers: list[Answer] = []
    for seed in range(20):  # gibberish of tiny models has many a broken character
        for item in engine.ask_stream(random_image(seed), QUESTIONS, max_new_tokens=8):
            if isinstance(item, Answer):
                texts.append("".join(pieces))
                pieces.clear()
                answers.append(item)
            else:
                pieces.append(item)
        assert not pieces
    assert texts == [answer.text for answer in answers]
    assert len(set(texts)) > 20


def test_streamed_or_not_the_answers_are_the_same(engine: Engine) -> None:
    streamed = engine.ask_stream(random_image(), QUESTIONS, max_new_tokens=5)
    answers = [told(item) for item in streamed if isinstance(item, Answer)]
    assert answers == [told(a) for a in engine.ask_all(random_image(), QUESTIONS, max_new_tokens=5)]


def test_nothing_is_computed_ahead(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], engine.runtime.step

    def counted(*arguments: object) -> object:
        steps.append(1)
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runtime, "step", counted)
    items = engine.ask_stream(random_image(), QUESTIONS, max_new_tokens=8)
    assert not steps
    next(items)
    assert len(steps) == 2  # the prefix and the question
    next(items)
    assert len(steps) == 3
    items.close()  # type: ignore[attr-defined]
    assert len(steps) == 3


def test_bad_questions_are_refused_before_the_image_is_read(engine: Engine) -> None:
    with pytest.raises(InputError, match="empty"):
        next(engine.ask_stream("no such file", [""]))
    with pytest.raises(InputError, match="max_new_tokens"):
        next(engine.ask_stream("no such file", ["Where?"], max_new_tokens=0))


def test_the_last_image_is_not_processed_again(
    tiny_bundle: Make, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [told(a) for a in engine.ask_all(random_image(), QUESTIONS, max_new_tokens=5)]
    kept = remembering(engine)
    first = kept.ask(random_image(), QUESTIONS[0], max_new_tokens=5)
    assert not first.timings.prefix_reused
    monkeypatch.setattr(kept.runtime, "encode_image", no_tower)
    answers = [kept.ask(random_image(), question, max_new_tokens=5) for question in QUESTIONS]
    assert [told(answer) for answer in answers] == expected
    assert all(answer.timings.prefix_reused for answer in answers)
    assert answers[0].timings.vision == 0
    with pytest.raises(AssertionError, match="again"):
        kept.ask(random_image(1), QUESTIONS[0])


def test_room_is_kept_for_longer_questions(engine: Engine) -> None:
    kept = remembering(engine)
    kept.ask(random_image(), "Is it?", max_new_tokens=1)
    longer = kept.ask(random_image(), "Is there effusion?", max_new_tokens=8)
    assert longer.timings.prefix_reused
    assert not kept.ask(random_image(), "Is it?", max_new_tokens=ROOM).timings.prefix_reused


def test_prompt_tokens_are_the_positions_before_the_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, step = [], engine.runtime.step

    def measured(embeds: object, cache: object) -> object:
        result = step(embeds, cache)  # type: ignore[arg-type]
        lengths.append(cache.length)  # type: ignore[attr-defined]
        return result

    monkeypatch.setattr(engine.runtime, "step", measured)
    engine.ask(random_image(), QUESTIONS[0], max_new_tokens=1)
    assert engine.prompt_tokens(QUESTIONS[0]) == lengths[-1]
