"""Refusals, loops, empty answers and choices, of tiny models whose heads are biased to each."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.bundle.bundle import MANIFEST, Bundle, write_manifest
from medmoe_edge.checkpoint.reader import read_checkpoint, write_checkpoint
from medmoe_edge.config import ModelConfig, Refusal, RefusalCode
from medmoe_edge.data.datasets import Example
from medmoe_edge.engine.answer import YES_NO, Answer, Draft, Piece, doubts, is_yes_or_no
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.errors import ConfigError, InputError, ModelError
from medmoe_edge.evaluation.fidelity import compare, record
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import (
    AT_END,
    COPIES,
    LONGEST,
    REPEATED,
    Decoding,
    Step,
    greedy,
    log_softmax,
    looping,
)
from medmoe_edge.runtimes.torch.eager import EagerRuntime
from medmoe_edge.training.initialise import train_tokenizer
from medmoe_edge.training.recipe import PhaseConfig, Recipe
from medmoe_edge.training.run import trainable_config

CODES: tuple[RefusalCode, ...] = ("not_a_scan", "not_answerable", "language")
REFUSALS = tuple(Refusal(code, f"<|{code}|>") for code in CODES)
IMAGE = Image.from_array(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
QUESTION = "Is there effusion?"
END, LOOP = 0, 40
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def biased(tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`biased({1: 50.0})`: a checkpoint with refusals, its head biased towards some tokens."""
    root = tmp_path_factory.mktemp("biased")
    train_tokenizer([("Is there effusion?", "Yes"), ("", "No")] * 3, 320, root / "t.json", REFUSALS)
    source = read_checkpoint(tiny_checkpoint("tiny-phi"))

    def make(biases: dict[int, float], refusals: tuple[Refusal, ...] = REFUSALS) -> Path:
        def tensors() -> Iterator[tuple[str, Any]]:
            for name, tensor in source:
                changed = tensor.clone()
                if name.startswith("decoder.norm."):  # one channel is always 1
                    changed[0] = float(name.endswith("bias"))
                if name == "decoder.head.weight":
                    changed[:, 0] = 0.0
                    for token, bias in biases.items():
                        changed[token, 0] = bias
                yield name, changed

        folder = root / str(len(list(root.iterdir())))
        config = ModelConfig(
            source.config.vision, source.config.decoder, source.config.moe, refusals
        )
        write_checkpoint(folder, config, tensors(), tokenizer_file=root / "t.json")
        return folder

    return make


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Make:
    from medmoe_edge.export import build

    root = tmp_path_factory.mktemp("bundles")

    def make(checkpoint: Path) -> Path:
        out = root / str(len(list(root.iterdir())))
        return build.export_bundle(checkpoint, out, build.BuildOptions(precision="fp32"))

    return make


def codes(answer: Answer) -> set[str]:
    return {notice.code for notice in answer.warnings}


# --- refusals ---------------------------------------------------------------------------------


def test_a_checkpoint_says_its_refusals(biased: Make, tiny_checkpoint: Make) -> None:
    folder = biased({})
    own = json.loads((folder / "config.json").read_text())["medmoe_edge"]
    assert own["refusals"] == {code: f"<|{code}|>" for code in CODES}
    assert read_checkpoint(folder).config.refusals == REFUSALS
    plain = read_checkpoint(tiny_checkpoint("tiny-phi"))
    assert plain.config.refusals == ()
    assert "refusals" not in (plain.folder / "config.json").read_text()
    assert "refusals" not in plain.config.to_json()


@pytest.mark.parametrize(
    ("refusals", "error"),
    [
        ({"a_cat": "<|cat|>"}, "a_cat"),
        ({"language": ""}, "empty token"),
        ({"language": 7}, "must be str"),
        ({"language": "<|x|>", "not_a_scan": "<|x|>"}, "twice"),
        (["language"], "must be an object"),
    ],
)
def test_impossible_refusals_are_refused(
    biased: Make, tmp_path: Path, refusals: Any, error: str
) -> None:
    folder = biased({})
    data = json.loads((folder / "config.json").read_text())
    data["medmoe_edge"]["refusals"] = refusals
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=error):
        read_checkpoint(folder)


def test_a_refusal_that_is_no_token_is_refused(biased: Make) -> None:
    folder = biased({}, (Refusal("language", "<|elsewhere|>"),))
    with pytest.raises(ModelError, match="elsewhere"):
        load(folder, runtime="torch")


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("code", CODES)
def test_what_a_model_refuses_is_a_best_guess_with_a_warning(
    biased: Make, bundle_of: Make, runtime: Any, code: str
) -> None:
    token = 1 + CODES.index(code)
    folder = biased({token: 30.0})
    model = folder if runtime == "torch" else bundle_of(folder)
    with load(model, runtime=runtime) as engine:
        answer = engine.ask(IMAGE, QUESTION, max_new_tokens=4)
        assert engine.tokenizer.backend.token_to_id(f"<|{code}|>") == token
        pieces, told = _pieces(engine)
    assert codes(answer) >= {code}
    assert answer.unsure
    assert answer.refusals[code] > 0.999
    assert answer.confidence < 1e-6  # what the refusal leaves to the best guess
    assert "<|" not in answer.text
    assert answer.warnings[0].code == code
    assert answer.shown.startswith("Unsure. Best guess: ")
    assert f"<|{code}|>" not in told
    assert all(value < -5 for _, value in pieces[0].likely)  # no refusal is among the alternatives
    assert answer.to_json()["unsure"] is True


def _pieces(engine: Engine) -> tuple[list[Piece], str]:
    told = list(engine.ask_stream(IMAGE, [QUESTION], max_new_tokens=4, alternatives=5))
    pieces = [each for each in told if isinstance(each, Piece)]
    return pieces, "".join(map(str, told[:-1]))


def test_the_score_is_the_probability_in_the_place_of_an_answer(biased: Make) -> None:
    """By hand: the softmax of the logits behind the question."""
    engine = load(biased({1: 2.0, 2: 1.0}), runtime="torch")
    answer = engine.ask(IMAGE, QUESTION, max_new_tokens=2)
    steps: list[Step] = []
    step = engine.runtime.step

    def overheard(embeds: Any, cache: Any) -> Step:
        steps.append(step(embeds, cache))
        return steps[-1]

    engine.runtime.step = overheard  # type: ignore[method-assign]
    engine.ask(IMAGE, QUESTION, max_new_tokens=2)
    logits = engine.tokenizer.only_tokens(steps[1].logits).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert answer.refusals == pytest.approx(dict(zip(CODES, expected[1:4], strict=True)))


def test_thresholds_are_the_bundle_s(biased: Make, bundle_of: Make) -> None:
    folder = bundle_of(biased({1: 3.0}))
    score = load(folder).ask(IMAGE, QUESTION).refusals["not_a_scan"]
    assert 0.001 < score < 0.5
    assert "not_a_scan" not in codes(load(folder).ask(IMAGE, QUESTION))
    manifest = json.loads((folder / MANIFEST).read_text())
    for threshold, flagged in ((score * 0.99, True), (score * 1.01, False)):
        _rewritten(folder, manifest, {"not_a_scan": threshold})
        answer = load(folder).ask(IMAGE, QUESTION)
        assert ("not_a_scan" in codes(answer)) is flagged
    for wrong in ({"not_a_scan": 2}, {"a_cat": 0.5}, [0.5], {"not_a_scan": True}):
        _rewritten(folder, manifest, wrong)
        with pytest.raises(ConfigError, match="refusals"):
            load(folder)


def _rewritten(folder: Path, manifest: dict[str, Any], refusals: Any) -> None:
    kept = {key: value for key, value in manifest.items() if key not in ("files", "seal")}
    (folder / MANIFEST).unlink()
    write_manifest(folder, {**kept, "refusals": refusals})
    assert Bundle.open(folder).manifest["refusals"] == refusals


def test_a_typed_refusal_is_mere_text(biased: Make) -> None:
    engine = load(biased({}), runtime="torch")
    assert not {1, 2, 3} & set(engine.tokenizer.question_ids("<|not_a_scan|>"))


def test_a_verification_chooses_as_the_engine_does(
    biased: Make, bundle_of: Make, tmp_path: Path
) -> None:
    folder = biased({1: 30.0})
    engine = load(bundle_of(folder))
    checkpoint = read_checkpoint(folder)
    example = Example("1", tmp_path, QUESTION, "", "OPEN", "xray", None, None, "test")
    words = checkpoint.tokenizer.tokenizer
    recording = record(
        EagerRuntime(checkpoint), words, [example], max_new_tokens=4, load=lambda _: IMAGE
    )
    tokens = recording.questions["1"].tokens
    assert not {1, 2, 3} & set(tokens)
    overall = compare(recording, engine.runtime).overall
    assert overall.answer_agreement.share == overall.token_agreement.share == 1


def test_a_recipe_names_the_refusals_of_a_new_model(tmp_path: Path) -> None:
    phase = PhaseConfig(0, 1e-3, ("decoder.*",))
    recipe = Recipe(phase, phase, phase, preset="tiny", vocab_size=300, refusals=CODES)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    config, _ = trainable_config(replace(recipe, modalities=("ct", "mri")))
    assert config.refusals == REFUSALS
    train_tokenizer([("Is it?", "Yes")], 300, tmp_path / "tokenizer.json", config.refusals)
    backend = Tokenizer.from_file(tmp_path / "tokenizer.json").backend
    special = ["<|endoftext|>", *(refusal.token for refusal in REFUSALS)]
    assert [backend.id_to_token(number) for number in range(4)] == special
    plain = replace(recipe, refusals=None)
    assert "refusals" not in plain.to_json()
    assert trainable_config(replace(plain, modalities=("ct", "mri")))[0].refusals == ()
    with pytest.raises(ConfigError, match="Use 260 or more"):
        replace(recipe, vocab_size=259)


# --- empty answers ----------------------------------------------------------------------------


def test_an_empty_answer_is_unsure_and_says_so(biased: Make) -> None:
    answer = load(biased({END: 50.0}), runtime="torch").ask(IMAGE, QUESTION)
    assert (answer.text, answer.complete, answer.stopped) == ("", True, None)
    assert answer.unsure
    assert codes(answer) == {"empty_answer"}
    assert answer.shown == "Unsure. (no answer)"


# --- loops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_an_answer_ends_before_it_repeats_itself(
    biased: Make, bundle_of: Make, runtime: Any
) -> None:
    folder = biased({LOOP: 60.0})
    model = folder if runtime == "torch" else bundle_of(folder)
    engine = load(model, runtime=runtime)
    told = list(engine.ask_stream(IMAGE, [QUESTION], max_new_tokens=100))
    answer = told.pop()
    assert isinstance(answer, Answer)
    assert (answer.complete, answer.stopped, answer.unsure) == (False, "repetition", True)
    assert codes(answer) == {"repetition"}
    assert answer.text == engine.tokenizer.decode([LOOP]) == "".join(map(str, told))
    assert answer.timings.tokens == 1
    on = load(model, runtime=runtime, allow_repetition=True)
    whole = on.ask(IMAGE, QUESTION, max_new_tokens=20)
    assert whole.text == engine.tokenizer.decode([LOOP] * 20)
    assert (whole.stopped, whole.unsure, codes(whole)) == ("length", False, set())


def test_loops_are_alike_to_a_verification(biased: Make, bundle_of: Make, tmp_path: Path) -> None:
    folder = biased({LOOP: 60.0})
    checkpoint = read_checkpoint(folder)
    example = Example("1", tmp_path, QUESTION, "", "OPEN", "xray", None, None, "test")
    words = checkpoint.tokenizer.tokenizer
    recording = record(EagerRuntime(checkpoint), words, [example], load=lambda _: IMAGE)
    assert recording.questions["1"].tokens == (LOOP,) * (REPEATED + 1)
    overall = compare(recording, load(bundle_of(folder)).runtime).overall
    assert overall.answer_agreement.share == overall.token_agreement.share == 1


def decoded(tokens: Sequence[int], limit: int, **options: Any) -> tuple[list[int], str | None, int]:
    """What `greedy` yields of a model that says these tokens: how many, why, and what is told."""
    logits = np.eye(max(tokens) + 1, dtype=np.float32)
    script = iter(tokens)

    def steps(_: int) -> Step:
        return Step(logits[next(script)], np.zeros((0, 0, 0), np.float32))

    decoding = Decoding(ends=(END,), **options)
    found = list(greedy(steps(0), steps, decoding, limit=limit))
    tokens = [each.token for each in found]
    told = tokens[: len(tokens) - found[-1].held]
    told = told[:-1] if found[-1].stopped == "end" else told
    assert list(decoding.kept(tokens)) == told
    settled = 0
    for count, each in enumerate(found, start=1):  # nothing that was told is taken back
        settled = max(settled, count - each.held)
        assert settled <= len(told) or found[-1].stopped == "end"
    return told, found[-1].stopped, len(found)


words = st.lists(st.integers(1, 5), max_size=12)


@given(words, st.lists(st.integers(1, 9), min_size=1, max_size=LONGEST), st.integers(0, 200))
def test_every_loop_is_ended_after_its_first_copy(
    start: list[int], loop: list[int], more: int
) -> None:
    """However it begins, what goes on for ever ends soon, and what is left holds no loop."""
    said = [*start, *(loop * 400)]
    told, stopped, steps = decoded(said, limit=len(start) + 4 * LONGEST + more)
    assert stopped == "repetition"
    assert said[: len(told)] == told
    assert not looping(told, REPEATED)
    assert len(told) <= len(start) + len(loop)
    assert steps <= len(start) + max(COPIES * len(loop), len(loop) + REPEATED)


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 80))
def test_an_answer_without_a_loop_is_told_whole(said: list[int], limit: int) -> None:
    told, stopped, _ = decoded([*said, END], limit)
    ends = {"end" if len(said) < limit else "length", "repetition"}
    cut = said[:limit]
    if not any(_naive_loop(cut[:count], REPEATED) for count in range(len(cut) + 1)):
        assert stopped in ends
        if stopped != "repetition":
            assert told == cut
        else:
            assert _naive_loop(cut, AT_END)
    assert decoded([*said, END], limit, allow_repetition=True)[0] == cut


def _naive_loop(tokens: list[int], enough: int) -> bool:
    """From the definition: copies of a unit, and a part of it, at the very end."""
    for period in range(1, min(LONGEST, len(tokens)) + 1):
        for total in range(period * COPIES, len(tokens) + 1):
            tail = tokens[-total:]
            if total - period >= enough and all(
                tail[place] == tail[place - period] for place in range(period, total)
            ):
                return True
    return False


@given(st.lists(st.integers(1, 2), max_size=40), st.sampled_from([AT_END, REPEATED]))
def test_loops_against_their_definition(tokens: list[int], enough: int) -> None:
    assert (looping(tokens, enough) > 0) == _naive_loop(tokens, enough)


NUMBERED = [part for number in range(1, 30) for part in (100 + number, 10, 11, 12, 13)]


@pytest.mark.parametrize(
    "said",
    [
        [5, 6, 5],  # no, no
        [5, 6] * 4,  # no, no, no, no
        [5] * AT_END,  # a row of dashes
        NUMBERED,  # 1. no effusion 2. no effusion ...
        [*range(20, 50), *range(20, 50)],  # a sentence, said twice
    ],
)
def test_what_people_write_is_no_loop(said: list[int]) -> None:
    assert decoded([*said, END], 400) == (said, "end", len(said) + 1)


@pytest.mark.parametrize("before", [[], [1, 2]])
@pytest.mark.parametrize(
    ("piece", "copies"), [([5], 9), ([5, 6], 7), ([5, 6], 8), ([5, 6, 7], 4), ([5, 6, 7, 8], 3)]
)
def test_a_loop_that_ends_itself_is_one(before: list[int], piece: list[int], copies: int) -> None:
    """An end token after many copies makes no answer of them, and takes back nothing told."""
    said = [*before, *piece * copies]
    assert decoded([*said, END], 400)[:2] == ([*before, *piece], "repetition")
    assert decoded([*said, END], 400, allow_repetition=True)[:2] == (said, "end")


def test_an_answer_that_loops_and_ends_is_warned_of(biased: Make) -> None:
    """The engine's own words for it: what is told, why it ends, and that it is unsure."""
    engine = load(biased({}), runtime="torch")
    draft = Draft(engine.tokenizer, engine.decoding)
    said, script = [LOOP] * 11 + [END], iter([LOOP] * 11 + [END])
    logits = np.eye(320, dtype=np.float32) * 20

    def step(_: int) -> Step:
        return Step(logits[next(script)], np.zeros((0, 0, 0), np.float32))

    told = ""
    for chosen in greedy(step(0), step, Decoding(ends=(END,)), limit=len(said) + 5):
        told += "".join(draft.take(chosen))
    told += draft.rest()
    assert (draft.stopped, draft.tokens) == ("repetition", [LOOP])
    assert told == draft.text == engine.tokenizer.decode([LOOP])
    assert draft.log_probability == pytest.approx(log_softmax(logits[LOOP])[LOOP])
    assert {notice.code for notice in doubts({}, {}, draft, enough=True)} == {"repetition"}


@pytest.mark.parametrize(
    ("refused", "enough", "code"),
    [
        ({"not_a_scan": 0.1, "not_answerable": 0.9}, False, "not_answerable"),
        ({"not_a_scan": 0.1, "not_answerable": 0.9}, True, None),
        ({"not_a_scan": 0.1, "not_answerable": 0.4}, False, "unsure"),
        ({"not_a_scan": 0.1, "not_answerable": 0.98}, True, "not_answerable"),
        ({}, False, "unsure"),
    ],
)
def test_an_unsure_answer_names_the_refusal_that_is_likelier_than_it(
    biased: Make, refused: dict[str, float], enough: bool, code: str | None
) -> None:
    engine = load(biased({}), runtime="torch")
    draft = Draft(engine.tokenizer, engine.decoding)
    draft.text = "Free air"
    said = doubts(refused, {"not_answerable": 0.97}, draft, enough=enough)
    assert [notice.code for notice in said] == ([code] if code else [])


def test_at_the_limit_fewer_repeats_are_a_loop() -> None:
    """32 tokens, the usual limit, hold no loop of eleven tokens that would end before."""
    said = [1, 2, *list(range(10, 20)) * 10]
    assert decoded(said, 32)[:2] == (said[:12], "repetition")
    assert decoded(said, 31)[:2] == (said[:31], "length")


# --- choices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_choices_against_their_own_likelihoods(biased: Make, bundle_of: Make, runtime: Any) -> None:
    """By another way: each spelling's tokens are read at once, in a prompt of their own."""
    folder = biased({END: 2.0})
    engine = load(folder if runtime == "torch" else bundle_of(folder), runtime=runtime)
    choices = ["left side", "right", "CT"]
    answer = engine.ask(IMAGE, QUESTION, choices=choices)
    totals = {
        name: math.log(sum(math.exp(_likelihood(engine, spelt)) for spelt in spellings))
        for name, spellings in {
            "left side": ["left side", "Left side"],
            "right": ["right", "Right"],
            "CT": ["CT"],
        }.items()
    }
    shares = {name: math.exp(value) for name, value in totals.items()}
    whole = sum(shares.values())
    assert answer.probabilities == pytest.approx(
        {name: share / whole for name, share in shares.items()}, rel=1e-3
    )
    assert list(answer.probabilities or {}) == choices
    assert answer.text == max(totals, key=totals.__getitem__)
    left = 1 - sum(answer.refusals.values())
    assert answer.refusals
    assert answer.confidence == pytest.approx(shares[answer.text] / whole * left, rel=1e-3)
    assert (answer.complete, answer.stopped) == (True, None)
    again = engine.ask_all(IMAGE, ["Where?", QUESTION], choices={QUESTION: choices})
    assert again[0].probabilities is None
    assert again[1].probabilities == answer.probabilities
    told = list(engine.ask_stream(IMAGE, [QUESTION], choices=choices))
    assert "".join(map(str, told[:-1])) == answer.text


def _likelihood(engine: Engine, text: str) -> float:
    ids, total = engine.tokenizer.answer_ids(text), 0.0
    prefix = engine.tokenizer.prefix_ids()
    question = engine.tokenizer.question_ids(QUESTION)
    from medmoe_edge.image.loading import preprocess

    run = engine.runtime
    image = run.encode_image(preprocess(IMAGE, engine.config.vision))
    for place, token in enumerate([*ids, END]):
        embeds = np.concatenate((run.embed(prefix), image, run.embed([*question, *ids[:place]])))
        logits = run.step(embeds, run.new_cache(len(embeds))).logits
        total += float(log_softmax(engine.tokenizer.only_tokens(logits))[token])
    return total


def test_a_choice_is_refused_as_an_answer_is(biased: Make) -> None:
    answer = load(biased({2: 30.0}), runtime="torch").ask(IMAGE, QUESTION, choices=YES_NO)
    assert answer.unsure
    assert codes(answer) == {"not_answerable"}
    assert answer.confidence < 1e-6
    assert sum((answer.probabilities or {}).values()) == 1


@pytest.mark.parametrize(
    ("choices", "error"),
    [
        ([], "fewer than two"),
        (["yes"], "fewer than two"),
        (["\ud800", "no"], "not valid Unicode"),
        (["yes", " "], "empty"),
        (["yes", "no", "Yes"], "'yes' is there twice"),
        ("yes,no", "one text"),
        ([str(number) for number in range(21)], "21 choices"),
        (["yes", "n" * 201], "201 characters"),
    ],
)
def test_bad_choices_are_refused_by_name(tiny_checkpoint: Make, choices: Any, error: str) -> None:
    engine = load(tiny_checkpoint(), runtime="torch")
    with pytest.raises(InputError, match=error):
        engine.ask(IMAGE, QUESTION, choices=choices)


@pytest.mark.parametrize(
    "question",
    [
        *("Is there effusion?", "Are the lungs clear", "DOES it show a mass?"),
        *("Is/are there any fractures?", "Was contrast given?", "Were both kidneys seen?"),
        *("Has the patient a pacemaker?", "Had the patient surgery?", "Do the lungs look normal?"),
        *("Do any of these show a fracture?", "Will this heal?", "Would that be a cyst?"),
        *("Can pneumonia be seen in this picture?", "Could this be a tumour?", "Is this a CT?"),
        *("Did the tube move?", "Is pneumothorax present?", "Is the patient's heart enlarged?"),
        *("Is the mass larger than 2.5 cm?", "Should this be an axial plane?"),
        *("Do you see a fracture?", "Is the mass cystic? -yes/no", "Is it calcified, yes or no?"),
    ],
)
def test_questions_that_ask_for_yes_or_no(question: str) -> None:
    assert is_yes_or_no(question)


@pytest.mark.parametrize(
    "pasted",
    [
        *("Do  you see a fracture?", "Do\u00a0you see a fracture?", "Do y\u00adou see a fracture?"),
        *("\ufeffDo you see a fracture?", "<image>\nDo you see a fracture?"),
        *("Do you see a fracture, yes\u00a0or no?", "Do you see a fracture?\u200b yes or  no"),
    ],
)
def test_a_pasted_question_asks_for_yes_or_no_as_the_typed_one(pasted: str) -> None:
    assert is_yes_or_no(pasted)


def test_what_is_too_long_to_be_asked_is_not_looked_into() -> None:
    assert not is_yes_or_no("Is it" + "\u0301\u0316" * 6_000)


@pytest.mark.parametrize(
    "question",
    [
        *("Can you describe the findings?", "Could you tell me which organ this is?"),
        *("Any idea what this is?", "Will you tell me the modality?", "Could I have a summary?"),
        *("Would it be possible to describe the findings?", "Is it possible to tell the age?"),
        *("Is this a CT, an MRI, an X-ray?", "Is it left or right?", "Is this CT/MRI?"),
        *("Is this CT vs. MRI?", "Is this a CT? An MRI?", "Is there a mass? Describe it."),
        *("Is there a mass, and if so where?", "Do we know how old it is?", "Is there. What?"),
        *("Do que se trata?", "Do jakiego organu", "Has visto la fractura?", "Was zeigt das Bild?"),
        *("Is dit een CT of MRI?", "Ist das so?", "Will er das?", "Do"),
        *("Do you know this?", "Do you see what it is?", "Can you see it?", "Yes or no?"),
        *("Where is it?", "What is this?", "Any thoughts?", "Describe it.", "", "?"),
    ],
)
def test_questions_that_may_have_any_answer(question: str) -> None:
    assert not is_yes_or_no(question)
