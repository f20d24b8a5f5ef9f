"""Damage done on purpose: every verification fails for it, and says whether answers would tell."""

import dataclasses
import html
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run
from mutants import (
    LENIENT,
    PRECISIONS,
    questions_about_noise,
    reseal,
    verified_bundles,
    write_weights,
)

from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.bundle.recorded import FLOAT, Marks, SignatureMaker, read_recorded, stored_weights
from medmoe_edge.config import MoEConfig
from medmoe_edge.data.datasets import Example
from medmoe_edge.evaluation.gates import Compared, compare_signature, compare_weights, judge_weights
from medmoe_edge.evaluation.mutations import (
    QUESTIONS,
    Effect,
    Mutation,
    Mutations,
    few,
    mutated_weights,
)
from medmoe_edge.evaluation.quick import verify_quick
from medmoe_edge.evaluation.record import AnswersRecord, read_record
from medmoe_edge.evaluation.verify import Data, verify
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Two questions about each of two pictures."""
    texts = ("Is there effusion?", "Where?")
    return questions_about_noise(tmp_path_factory.mktemp("images"), [(32, 32)] * 2, texts)


@pytest.fixture(scope="module")
def proven(
    tiny_bundle: Make,
    tiny_checkpoint: Make,
    examples: list[Example],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A bundle of each precision with its record and inputs; not to be changed."""
    root = tmp_path_factory.mktemp("proven")
    return verified_bundles(tiny_bundle, tiny_checkpoint(), examples, root)


@pytest.fixture
def copy(proven: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda precision: Path(shutil.copytree(proven[precision], tmp_path / "bundle"))


def all_mutations(bundle: Bundle) -> Iterator[Mutation]:
    """Of every expert of every layer, of each kind."""
    assert bundle.config.moe is not None
    for layer in bundle.config.moe_layers:
        ffn = f"decoder.layers.{layer}.ffn."
        count = bundle.config.moe.num_experts
        for index in range(count):
            owner = f"{ffn}experts.{index}"
            yield Mutation("exchange", owner, f"{ffn}experts.{(index + 1) % count}")
            yield Mutation("meta", owner, f"{ffn}meta")
            yield Mutation("scale", owner)
            yield Mutation("router", owner)


def held(folder: Path) -> dict[str, Any]:
    return {name: np.array(array) for name, array in stored_weights(folder / "decoder.onnx")}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_damage_to_any_expert_is_found_on_disk(
    copy: Callable[[str], Path], precision: str
) -> None:
    folder = copy(precision)
    weights, done = held(folder), 0
    for mutation in all_mutations(Bundle.open(folder)):
        damaged = mutated_weights(weights, mutation)
        if damaged is None:
            assert (precision, mutation.kind) == ("fp32", "scale")
            continue
        write_weights(folder, damaged)
        found = compare_weights(Bundle.open(folder))
        assert found is not None
        layer = mutation.owner.partition("experts")[0]
        place = f"{layer}router." if mutation.kind == "router" else f"{mutation.owner}."
        assert any(name.startswith(place) for name in found.wrong), mutation
        write_weights(folder, {name: weights[name] for name in damaged})
        done += 1
    assert done == (24 if precision == "fp32" else 32)
    healed = compare_weights(Bundle.open(folder))
    assert healed is not None
    assert healed.wrong == ()


@pytest.mark.parametrize("kind", ["exchange", "meta", "scale", "router"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_verification_fails_and_names_the_gate(
    copy: Callable[[str], Path], precision: str, kind: str
) -> None:
    folder = copy(precision)
    mutation = next(one for one in all_mutations(Bundle.open(folder)) if one.kind == kind)
    damaged = mutated_weights(held(folder), mutation)
    if damaged is None:
        assert (precision, kind) == ("fp32", "scale")
        return
    write_weights(folder, damaged)
    quick = verify_quick(folder)
    assert "weights" in {gate.name for gate in quick.gates if not gate.passed}
    found = verify(folder)
    assert (found.passed, found.outcome) == (False, "failed")
    for error in (quick.error(), found.error()):
        assert error is not None
        assert "matrices unlike the checkpoint's" in error.what
        assert "decoder.layers." in error.what


def test_verification_against_the_checkpoint_fails_and_records_it(
    copy: Callable[[str], Path], tiny_checkpoint: Make, examples: list[Example], run: Run
) -> None:
    folder = copy("int8")
    mutation = next(all_mutations(Bundle.open(folder)))
    damaged = mutated_weights(held(folder), mutation)
    assert damaged is not None
    write_weights(folder, damaged)
    found = verify(folder, tiny_checkpoint(), Data("questions", examples))
    assert found.record is not None
    assert found.record.gate("weights").verdict == "failed"
    assert found.passed is False
    result = run("verify", str(folder), "--json")
    assert result.exit_code == 4
    assert len(json.loads(result.stdout)["weights"]["wrong"]) >= 6
    shown = run("verify", str(folder))
    assert "Not the checkpoint's: decoder.layers." in shown.stdout


def test_paged_experts_that_lie_elsewhere_are_found(copy: Callable[[str], Path]) -> None:
    folder = copy("int8")
    manifest = json.loads((folder / MANIFEST).read_text())
    names = [f"decoder.layers.0.ffn.experts.{index}" for index in (0, 1)]
    for table in (manifest["experts"], manifest["paging"]["experts"]):
        table[names[0]], table[names[1]] = table[names[1]], table[names[0]]
    reseal(folder, experts=manifest["experts"], paging=manifest["paging"])
    quick = verify_quick(folder)
    assert [gate.name for gate in quick.gates if not gate.passed] == ["weights"]
    assert quick.weights is not None
    assert all(name.startswith(tuple(names)) for name in quick.weights.wrong)


def test_what_is_measured_is_what_a_damaged_bundle_computes(copy: Callable[[str], Path]) -> None:
    folder = copy("int8")
    bundle = Bundle.open(folder)
    mutation = next(all_mutations(bundle))
    damaged = mutated_weights(held(folder), mutation)
    assert damaged is not None
    in_memory = OrtRuntime(bundle, damaged)
    embeds = in_memory.embed([5, 9, 200, 3])
    expected = in_memory.step(embeds, in_memory.new_cache(4)).logits
    write_weights(folder, damaged)
    on_disk = OrtRuntime(Bundle.open(folder))
    np.testing.assert_array_equal(on_disk.step(embeds, on_disk.new_cache(4)).logits, expected)


# --- what is recorded -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_effects_are_measured_once(
    copy: Callable[[str], Path],
    tiny_checkpoint: Make,
    examples: list[Example],
    precision: str,
) -> None:
    folder = copy(precision)
    record = read_record(Bundle.open(folder))
    assert isinstance(record, AnswersRecord)
    assert record.mutations is not None
    kinds = [effect.mutation.kind for effect in record.mutations.effects]
    expected = ["exchange", "meta", "scale", "router"]
    assert kinds == [kind for kind in expected if (precision, kind) != ("fp32", "scale")]
    for effect in record.mutations.effects:
        assert effect.answers.total == 2  # one of each picture
        assert effect.kl is not None
        assert effect.kl >= 0
    assert (record.mutations.effects[0].kl or 0) > 0
    steps: list[str] = []
    data = Data("questions", examples)
    again = verify(folder, tiny_checkpoint(), data, progress=lambda step, *_: steps.append(step))
    assert "experts" in steps
    assert "damaged models" not in steps
    assert again.record is not None
    assert again.record.mutations == record.mutations
    assert verify_quick(folder).mutations == record.mutations


def test_experts_that_are_alike_are_said_to_be_invisible(
    tiny_checkpoint: Make,
    examples: list[Example],
    tmp_path: Path,
    run: Run,
) -> None:
    """Every expert and the meta expert are the same: no answer can tell one from another."""
    from medmoe_edge.checkpoint.reader import read_checkpoint, write_checkpoint
    from medmoe_edge.evaluation.report import render_report
    from medmoe_edge.export import build

    source = read_checkpoint(tiny_checkpoint())

    def alike(name: str) -> str:
        head, found, rest = name.partition("experts.")
        return f"{head}meta.{rest.partition('.')[2]}" if found else name

    tensors = ((name, source.tensor(alike(name))) for name in source.names)
    tokenizer = tiny_checkpoint() / "tokenizer.json"
    write_checkpoint(tmp_path / "alike", source.config, tensors, tokenizer_file=tokenizer)
    folder = build.export_bundle(
        tmp_path / "alike", tmp_path / "bundle", build.BuildOptions("int8")
    )
    reseal(folder, gates=LENIENT.to_json())
    found = verify(folder, tmp_path / "alike", Data("questions", examples), inputs=examples)
    assert found.record is not None
    assert found.record.mutations is not None
    exchange, meta, *_ = found.record.mutations.unseen
    for effect in (exchange, meta):
        assert (effect.answers.count, effect.routing.count, effect.seen) == (0, 0, False)
        assert effect.kl is not None
        assert effect.kl < 1e-5  # what storing log-probabilities in fp16 costs
    sentence = found.record.mutations.summary
    assert "this proof cannot see expert damage" in sentence
    assert sentence in html.unescape(render_report(found))
    assert "cannot see expert damage" in " ".join(run("verify", str(folder)).stdout.split())
    quick = run("verify", "--quick", str(folder))
    assert quick.exit_code == 0  # experts that are equal may change places
    assert "cannot see expert damage" in " ".join(quick.stdout.split())


def test_the_sentence_follows_the_effects() -> None:
    from medmoe_edge.evaluation.metrics import Share

    mutation = Mutation("exchange", "a.experts.0", "a.experts.1")
    seen = Effect(mutation, Share.of(3, 6), Share.of(1, 9), seen=True, kl=0.5)
    assert Mutations((seen,)).summary == (
        "This proof would notice damage to an expert: exchanging a.experts.0 and a.experts.1 "
        "changes 3 of 6 answers (KL 0.5)."
    )
    unseen = dataclasses.replace(seen, seen=False)
    assert Mutations((seen, unseen)).unseen == (unseen,)
    scale = dataclasses.replace(unseen, mutation=Mutation("scale", "a.experts.0"))
    assert Mutations((seen, scale)).unseen == ()


def effect(kind: Any, *, seen: bool) -> Effect:
    from medmoe_edge.evaluation.metrics import Share

    mutation = Mutation(kind, "a.experts.0", "a.meta" if kind == "meta" else "")
    return Effect(mutation, Share.of(1, 6), Share.of(1, 9), seen=seen, kl=0.5)


NOTICE, MISSED = "would notice damage to an expert: ", "would not notice by its answers: "


@pytest.mark.parametrize("kind", ["exchange", "meta", "scale", "router"])
def test_only_what_was_seen_would_be_noticed(kind: str) -> None:
    unseen = effect(kind, seen=False)
    assert NOTICE not in Mutations((unseen,)).summary
    others = [effect(other, seen=True) for other in ("meta", "router") if other != kind]
    noticed = Mutations((unseen, *others)).summary.partition(NOTICE)[2].partition(MISSED)[0]
    assert str(unseen.mutation) not in noticed
    assert all(str(other) in noticed for other in others)
    assert str(unseen) in Mutations((unseen, *others)).summary


def test_what_was_not_tried_is_said_to_be() -> None:
    scale, router = effect("scale", seen=False), effect("router", seen=True)
    nothing = "Whether this proof would notice another expert in an expert's place was not measured"
    for effects in ((), (scale,), (scale, router)):
        summary = Mutations(effects).summary
        assert summary.startswith(nothing)
        assert (NOTICE in summary, MISSED in summary) == (router in effects, scale in effects)
    assert nothing not in Mutations((effect("exchange", seen=True), scale)).summary


@pytest.mark.parametrize("size", [4, 16])  # as many columns as rows, or more
def test_the_router_of_a_cut_model_loses_the_row_of_the_expert(size: int) -> None:
    names, left = ("ct", "mri", "xray", "pathology"), ("pathology", "mri")
    moe = MoEConfig((0,), 2, expert_names=left, router_names=names)
    generator = np.random.default_rng(0)
    weights = {f"f.experts.{index}.up.weight": np.zeros((size, 8), np.float32) for index in (0, 1)}
    weights["f.router.weight"] = generator.random((size, 4), np.float32)  # stored as [K, N]
    weights["f.router.bias"] = generator.random(4, np.float32)
    for index, row in ((0, 3), (1, 1)):
        made = mutated_weights(weights, Mutation("router", f"f.experts.{index}"), moe)
        assert made is not None
        assert made.keys() == {"f.router.weight", "f.router.bias"}
        for name, array in made.items():
            zero = np.flatnonzero((np.atleast_2d(array) == 0).all(0))
            assert zero.tolist() == [row]
            others = np.arange(4) != row
            np.testing.assert_array_equal(array[..., others], weights[name][..., others])


def test_few_questions_are_of_all_modalities() -> None:
    made = [
        Example(str(number), Path(f"{number // 2}.png"), "?", "", "OPEN", modality, *rest)
        for number, modality in enumerate(["ct"] * 20 + ["mri"] * 2 + ["xray"] * 4)
        for rest in [(None, None, "test")]
    ]
    chosen = few(made)
    assert len(chosen) == QUESTIONS
    assert [example.modality for example in chosen[:4]] == ["ct", "mri", "xray", "ct"]
    assert len({example.image for example in chosen}) == QUESTIONS


def test_damage_that_weights_do_not_allow() -> None:
    wide, narrow = np.zeros((4, 8), np.float32), np.zeros((4, 6), np.float32)
    weights = {"f.experts.0.gate.weight": wide, "f.experts.1.gate.weight": narrow}
    assert mutated_weights(weights, Mutation("exchange", "f.experts.0", "f.experts.1")) is None
    assert mutated_weights(weights, Mutation("meta", "f.experts.0", "f.meta")) is None
    assert mutated_weights(weights, Mutation("scale", "f.experts.0")) is None
    assert mutated_weights(weights, Mutation("router", "f.experts.0")) is None


# --- the marks --------------------------------------------------------------------------------


def compared(checkpoint: dict[str, Any], stored: dict[str, Any], error: float) -> Compared:
    """Marks of these experts `[N, K]`, held against what is stored with an error of rounding."""
    maker = SignatureMaker()
    generator = np.random.default_rng(1)
    for name, rows in checkpoint.items():
        maker.keep(name, 8, rows.shape[1], *[Marks.of(rows, 1)] * 2)
    kept = {}
    for name, rows in stored.items():
        noise = generator.standard_normal(rows.shape).astype(np.float32)
        kept[name] = ((rows + error * noise).T, None)
    return compare_signature(kept, maker.signature())


@pytest.mark.parametrize("apart", [0.0, 0.001, 0.004, 0.04])
def test_experts_nearer_to_each_other_than_rounding_are_told_apart(apart: float) -> None:
    generator = np.random.default_rng(0)
    base = generator.standard_normal((512, 256)).astype(np.float32)
    experts = {
        f"decoder.layers.0.ffn.experts.{index}.gate.weight": base
        + apart * generator.standard_normal(base.shape).astype(np.float32)
        for index in range(4)
    }
    names = list(experts)
    assert compared(experts, experts, 0.03).wrong == ()
    swapped = {**experts, names[0]: experts[names[1]], names[1]: experts[names[0]]}
    wrong = compared(experts, swapped, 0.03).wrong
    assert wrong == (tuple(names[:2]) if apart == 0.04 else ())


@pytest.mark.parametrize(
    ("bits", "groups", "alone"),
    [(8, 1, True), (4, 4, True), (4, 5, True), (4, 6, False), (4, 391, False)],
)
def test_a_single_scale_is_claimed_only_where_it_is_seen(
    monkeypatch: pytest.MonkeyPatch, bits: int, groups: int, alone: bool
) -> None:
    """Where a norm stands for so many scales, of weights as large as each other."""
    monkeypatch.setattr("medmoe_edge.bundle.recorded.OF_ONE", 32)
    width, generator = 32, np.random.default_rng(0)
    rows = generator.choice([-7, 7], (32, groups * width)).astype(np.float32)
    maker, name = SignatureMaker(), "decoder.layers.0.ffn.experts.0.gate.weight"
    maker.keep(name, bits, rows.shape[1], *[Marks.of(rows, groups)] * 2)
    scale = np.ones(32 if bits == 8 else (32, groups), np.float32)
    stored = rows.T.astype(np.int8)
    if bits == 4:
        packed = (rows.reshape(32, groups, -1) + 8).astype(np.uint8)
        stored = packed[..., ::2] | packed[..., 1::2] << 4

    def held(factor: float) -> Compared:
        changed = scale.copy()
        changed.flat[3] *= factor
        return compare_signature({name: (stored, changed)}, maker.signature())

    whole, damaged = held(1), held(2)
    assert whole.wrong == ()
    assert (whole.scales, whole.alone) == (scale.size, scale.size if alone else 0)
    if alone:
        assert damaged.wrong == (name,)
    if groups == 391:
        assert damaged.wrong == ()
    (gate,) = judge_weights(whole)
    told = f"would be seen in 0 of {scale.size:,} scales"
    assert (told in gate.note, gate.passed) == (not alone, True)


def test_routers_are_marked_in_every_precision(proven: dict[str, Path]) -> None:
    for precision, folder in proven.items():
        signature = read_recorded(Bundle.open(folder)).signature
        assert signature is not None
        floats = {matrix.name for matrix in signature.matrices if matrix.bits == FLOAT}
        assert "decoder.layers.0.ffn.router.weight" in floats
        assert ("decoder.layers.0.ffn.experts.0.up.weight" in floats) == (precision == "fp32")


def test_a_bundle_without_marks_says_so(tiny_bundle: Make, tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(tiny_bundle("int8"), tmp_path / "bundle"))
    for path in folder.glob("recorded-*"):
        path.unlink()
    reseal(folder)
    found = verify(folder)
    assert (found.weights, found.passed) == (None, None)
    assert "carries no marks" in run("verify", str(folder)).stdout
