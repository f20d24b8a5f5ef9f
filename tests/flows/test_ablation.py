"""An ablation end to end on a handful of images, and the structures that it compares."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn

from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import DataError, InputError, ResourceError
from medmoe_edge.evaluation import ablation, ablation_cost
from medmoe_edge.evaluation.ablation import ALL, ablate
from medmoe_edge.evaluation.ablation_results import (
    Ablation,
    Result,
    caption,
    confusion_table,
    difference,
    table,
)
from medmoe_edge.evaluation.ablation_variants import VARIANTS, widen
from medmoe_edge.evaluation.inspection import activated_parameters
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.models.decoder import PhiFeedForward, StableLmFeedForward
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.torch.eager import EagerRuntime
from medmoe_edge.training import loop
from medmoe_edge.training.recipe import PhaseConfig, Recipe
from medmoe_edge.training.run import restore_instructed, train

MODALITIES = ("mri", "ct", "pathology", "xray")
COLOURS = ((0, 0, 0), (190, 0, 0), (0, 190, 0), (0, 0, 190))
CONFIG = replace(
    PRESETS["tiny"],
    decoder=replace(PRESETS["tiny"].decoder, vocab_size=300, intermediate_size=32),
    moe=replace(PRESETS["tiny"].moe, expert_names=MODALITIES),  # type: ignore[type-var]
)
EVERYTHING = ("router.*", "projector.*", "decoder.*")
RECIPE = Recipe(
    preset="miniature",
    seed=3,
    vocab_size=300,
    questions="questions.jsonl",
    validation="questions.jsonl",
    labels="labels.jsonl",
    alignment=PhaseConfig(0, 1e-2, ("projector.*",)),
    instruction=PhaseConfig(4, 2e-2, EVERYTHING, batch_images=4, router_weight=1.0),
    moe=PhaseConfig(
        3, 1e-2, ("decoder.layers.*.ffn.experts.*", "decoder.layers.*.ffn.meta.*"), batch_images=4
    ),
)


@pytest.fixture(scope="module", autouse=True)
def _preset() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "miniature", CONFIG)
        patch.setattr(ablation_cost, "ROUNDS", 1)
        patch.setattr(ablation_cost, "TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each modality, which their colour tells: one to train on, one held out."""
    folder, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    questions, labels = [], []
    for number in range(8):
        modality = MODALITIES[number % 4]
        pixels = noise.integers(0, 60, (32, 32, 3)) + COLOURS[number % 4]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        common = {"image": f"{number}.png", "modality": modality, "source": "miniature"}
        answer = {"question": "Is it CT?", "answer": "Yes" if modality == "ct" else "No"}
        questions.append(common | answer | {"id": number, "answer_type": "CLOSED", "body": "Head"})
        split = "train" if number < 4 else "val"
        labels.append(common | {"body": "head", "finding": "nothing", "split": split})
    for name, rows in ("questions", questions), ("labels", labels):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run; an ablation needs no more than its second phase."""
    out = tmp_path_factory.mktemp("run")
    train(replace(RECIPE, moe=replace(RECIPE.moe, epochs=0)), data, out, Progress(disable=True))
    return out


@pytest.fixture(scope="module")
def finished(
    run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ablation]:
    out = tmp_path_factory.mktemp("ablation") / "new"
    return out, again(run, data, out, variants=ALL)


def again(run: Path, data: Path, out: Path, **options: Any) -> Ablation:
    given: dict[str, Any] = {"variants": ("baseline",), "epochs": 1, "recipe": RECIPE}
    progress = Progress(disable=True)
    return ablate(run=run, data=data, out=out, progress=progress, **given | options)


def result(made: Ablation, name: str) -> Result:
    return next(row.result for row in made.rows if row.result.variant == name)


def start(run: Path, variant: str, config: ModelConfig = CONFIG) -> MedMoE:
    """A variant before phase 3."""
    assert config.moe is not None
    dense, router = restore_instructed(run, config, config.moe, RECIPE.instruction)
    torch.manual_seed(RECIPE.seed)
    return VARIANTS[variant].build(dense, router, config)


def test_every_variant_has_its_line(finished: tuple[Path, Ablation]) -> None:
    out, made = finished
    assert tuple(row.result.variant for row in made.rows) == ALL
    assert json.loads((out / "ablation.json").read_text()) == json.loads(json.dumps(made.to_json()))
    for row in made.rows:
        assert row.result.scores.keys() == {"all", "closed", "miniature"}
        assert row.result.scores["all"].exact_match == np.mean(row.result.correct)
        assert row.result.settings["phase"]["epochs"] == 1
        assert row.latency.first_token > 0 < row.latency.token
    columns, lines = table(made)
    assert [line[0] for line in lines] == list(ALL)
    assert {len(line) for line in lines} == {len(columns)}
    assert "(1.00x)" in lines[0][-1]
    assert all(part in caption(made) for part in ("miniature", "1 epochs", "0.01", "experts"))


def test_parameters_are_counted_as_the_table_claims(finished: tuple[Path, Ablation]) -> None:
    sizes = {row.result.variant: row.result.size for row in finished[1].rows}
    baseline, router = sizes["baseline"], 2 * (64 * 4 + 4)  # in two layers
    assert baseline.activated == activated_parameters(CONFIG)
    assert sizes["dense-activated"].activated == baseline.activated - router
    assert sizes["dense-total"].total == baseline.total - router
    assert sizes["dense-total"].activated == sizes["dense-total"].language
    expert = 2 * 3 * 64 * 32
    assert sizes["top-2"].activated == baseline.activated + expert
    assert sizes["no-meta"].activated == baseline.activated - expert
    assert sizes["two-experts"].total == baseline.total - 2 * expert - router // 2
    assert baseline.bytes >= 4 * baseline.total


FFN = tuple(f"decoder.layers.{layer}.ffn." for layer in (0, 2))
EXPERTS = tuple(f"{ffn}{part}" for ffn in FFN for part in ("experts.", "meta."))
LEARNS = dict.fromkeys(ALL, EXPERTS) | {
    "no-meta": tuple(f"{ffn}experts." for ffn in FFN),
    "learned-router": (*EXPERTS, *(f"{ffn}router." for ffn in FFN)),
    "dense-activated": FFN,
    "dense-total": FFN,
}


@pytest.mark.parametrize("name", ALL)
def test_a_variant_trains_its_experts_and_nothing_else(
    finished: tuple[Path, Ablation], run: Path, name: str
) -> None:
    before, after = start(run, name).state_dict(), load_file(finished[0] / name / "moe.safetensors")
    changed = {
        key for key, value in before.items() if not torch.equal(value, after[f"module.model.{key}"])
    }
    assert changed
    assert all(key.startswith(LEARNS[name]) for key in changed)
    for part in LEARNS[name]:  # an expert that no token chose stays as it was
        assert any(key.startswith(part) for key in changed), part


def test_without_meta_expert(run: Path) -> None:
    assert not [key for key in start(run, "no-meta").state_dict() if ".meta." in key]


def test_two_experts_average_the_routers_rows(run: Path) -> None:
    four, two = start(run, "baseline"), start(run, "two-experts")
    x = torch.randn(5, 64)
    apart, together = (model.moe_layer(2).router_logits(x) for model in (four, two))
    torch.testing.assert_close(together[:, 0], (apart[:, 0] + apart[:, 1]) / 2)
    torch.testing.assert_close(together[:, 1], (apart[:, 2] + apart[:, 3]) / 2)
    assert two.config.moe is not None
    assert two.config.moe.expert_names == ("mri+ct", "pathology+xray")


def test_a_merged_expert_is_right_for_both_modalities(finished: tuple[Path, Ablation]) -> None:
    found = result(finished[1], "two-experts").router["labels"]
    right = [
        ("mri", "mri+ct"),
        ("ct", "mri+ct"),
        *(((m, "pathology+xray")) for m in MODALITIES[2:]),
    ]
    hits = sum(found.confusion[true].get(name, 0) for true, name in right)
    assert (found.images, found.accuracy) == (4, hits / 4)
    columns, lines = confusion_table(found)
    assert [line[0] for line in lines] == sorted(MODALITIES)
    assert sum(int(cell) for line in lines for cell in line[1:]) == 4
    assert set(columns) <= {"", "mri+ct", "pathology+xray"}


def test_a_learned_router_starts_from_nothing_in_every_layer(run: Path) -> None:
    learned, frozen = start(run, "learned-router"), start(run, "baseline")
    first, second = (learned.moe_layer(layer).router.weight for layer in (0, 2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, frozen.moe_layer(0).router.weight)
    assert torch.equal(first, start(run, "learned-router").moe_layer(0).router.weight)


def test_only_experts_with_names_recognise_modalities(finished: tuple[Path, Ablation]) -> None:
    named = {"baseline", "no-meta", "two-experts", "top-2"}
    for row in finished[1].rows:
        expected = {"questions", "labels"} if row.result.variant in named else set()
        assert row.result.router.keys() == expected
    assert result(finished[1], "baseline").router["labels"].accuracy == 1.0, "colour tells it"


@pytest.mark.parametrize(("name", "top_k"), [("baseline", 1), ("top-2", 2)])
def test_routing_counts_the_image_tokens_of_each_layer(
    finished: tuple[Path, Ablation], run: Path, data: Path, name: str, top_k: int
) -> None:
    """Against a loop over tokens; the frozen router sees what training has changed in between."""
    bench = ablation._Bench(
        replace(RECIPE, moe=replace(RECIPE.moe, epochs=1)),
        run, data, finished[0], Progress(disable=True),
    )  # fmt: skip
    entry = bench.entry(name)
    bench.finish(entry)  # only reads the trained state
    engine, stored = entry.engine, bench.result(entry)
    assert isinstance(engine.runtime, EagerRuntime)
    model, tokenizer = engine.runtime.model, engine.tokenizer
    image = next(item for item in bench.labels if item.modality == "xray")
    pixels = torch.from_numpy(preprocess(load_image(image.image), CONFIG.vision))
    with torch.no_grad():
        prefix = model.embed(torch.tensor([tokenizer.prefix_ids()]))
        output = model(torch.cat((prefix, model.encode_image(pixels)), 1))
        logits = model.router_logits(output)[0, prefix.shape[1] :]  # [N, M, E]
    expected = np.zeros((2, 4))
    for token in logits:
        for layer, scores in enumerate(token):
            for expert in scores.topk(top_k).indices:
                expected[layer, expert] += 1 / (len(logits) * top_k)
    np.testing.assert_allclose(stored.routing["xray"], expected)


@pytest.mark.parametrize(
    ("feed_forward", "kind"), [(StableLmFeedForward, "stablelm"), (PhiFeedForward, "phi")]
)
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_a_widened_layer_computes_the_same(feed_forward: Any, kind: Any, copies: int) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG.decoder, kind=kind, hidden_size=64, intermediate_size=64)
    narrow = feed_forward(config)
    wide = feed_forward(replace(config, intermediate_size=64 * copies))
    widen(narrow, wide, total=2.0)
    x = torch.randn(7, 64)
    torch.testing.assert_close(wide(x), 2 * narrow(x), atol=1e-5, rtol=1e-5)


def test_the_copies_of_a_unit_grow_apart() -> None:
    """Equal copies would get equal gradients and never become two units."""
    torch.manual_seed(0)
    wide = StableLmFeedForward(replace(CONFIG.decoder, intermediate_size=64))
    widen(StableLmFeedForward(CONFIG.decoder), wide, total=2.0)
    wide(torch.randn(7, 64)).square().sum().backward()
    assert wide.gate.weight.grad is not None
    first, second = wide.gate.weight.grad.view(2, 32, 64)
    apart = (first - second).norm(dim=1) / (first + second).norm(dim=1)
    assert apart.median() > 0.1


def test_upcycled_and_dense_variants_start_as_the_same_function(run: Path) -> None:
    """Up to the router's certainty, which a router of large rows makes complete."""
    assert CONFIG.moe is not None
    dense, router = restore_instructed(run, CONFIG, CONFIG.moe, RECIPE.instruction)
    with torch.no_grad():
        router.weight.mul_(1e4)
    moe = VARIANTS["baseline"].build(dense, router, CONFIG)
    x = torch.randn(9, 64)
    for name in ("dense-activated", "dense-total"):
        wide = start(run, name)
        for layer in (0, 2):
            made, expected = (
                model.decoder.layers[layer].get_submodule("ffn")(x) for model in (wide, moe)
            )
            torch.testing.assert_close(made, expected)


def test_differences_are_paired(finished: tuple[Path, Ablation]) -> None:
    base = finished[1].rows[0]
    assert (base.difference, base.difference_interval) == (0.0, (0.0, 0.0))
    worse = replace(base.result, correct=[True, False] * 4)
    better = replace(base.result, correct=[True, True] * 4)
    images = [str(number // 2) for number in range(8)]
    assert difference(better, worse, images) == (0.5, (0.5, 0.5))  # the same in every image


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was done already")


def test_a_second_call_goes_on(
    finished: tuple[Path, Ablation], run: Path, data: Path, tmp_path: Path
) -> None:
    append, both = loop._append, ("baseline", "no-meta")

    def breaking(path: Path, row: Any) -> None:
        append(path, row)
        if path.parent.name == "no-meta":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_append", breaking)
        with pytest.raises(KeyboardInterrupt):
            again(run, data, tmp_path, variants=both)
    assert (tmp_path / "baseline" / "result.json").exists()
    assert not (tmp_path / "no-meta" / "result.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_epoch", forbidden)
        resumed = again(run, data, tmp_path, variants=both)
        patch.setattr(ablation, "evaluate", forbidden)
        alone = again(run, data, tmp_path, variants=("no-meta",))
    for row in resumed.rows:
        assert row.result == result(finished[1], row.result.variant)
    assert alone.rows[0].result == result(finished[1], "no-meta")
    assert alone.rows[0].difference == 0.0, "the first row is what the others are held against"


@pytest.fixture
def mine(finished: tuple[Path, Ablation], tmp_path: Path) -> Path:
    """A copy of the finished baseline, to be spoilt."""
    out = tmp_path / "copy"
    shutil.copytree(finished[0] / "baseline", out / "baseline")
    return out


def test_a_folder_of_another_recipe_is_refused(run: Path, data: Path, mine: Path) -> None:
    with pytest.raises(DataError, match="baseline was made with another"):
        again(run, data, mine, epochs=2)
    with pytest.raises(DataError, match="baseline was made with another"):
        again(run, data, mine, recipe=replace(RECIPE, seed=4))
    (mine / "baseline" / "settings.json").unlink()
    with pytest.raises(DataError, match=r"settings\.json cannot be read"):
        again(run, data, mine)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04pickle", b"[]", b"{}", b'{"variant": 1', "no-meta", "fewer"]
)
def test_a_damaged_or_foreign_result_is_named(
    finished: tuple[Path, Ablation], run: Path, data: Path, mine: Path, content: bytes | str
) -> None:
    file = mine / "baseline" / "result.json"
    if content == "no-meta":
        shutil.copy(finished[0] / "no-meta" / "result.json", file)
    elif content == "fewer":
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"correct": values["correct"][1:]}))
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"result\.json"):
        again(run, data, mine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("no-metta",)}, "no variant 'no-metta'.*two-experts"),
        ({"variants": ()}, "named twice"),
        ({"variants": ("top-2", "top-2")}, "named twice"),
        ({"recipe": replace(RECIPE, validation=None)}, "no validation"),
        ({"recipe": replace(RECIPE, validation="nowhere.jsonl")}, "nowhere"),
        (
            {"recipe": replace(RECIPE, instruction=replace(RECIPE.instruction, epochs=5))},
            "done 4 of the recipe's 5 epochs",
        ),
        ({"run": Path("nowhere")}, r"instruction\.safetensors cannot be read.*medmoe-edge train"),
        ({"data": Path("nowhere")}, "nowhere"),
    ],
)
def test_what_cannot_be_ablated_is_refused(
    run: Path, data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        again(**{"run": run, "data": data, "out": tmp_path / "out"} | options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_start_is_named(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(run / "tokenizer.json", tmp_path)
    whole = (run / "instruction.safetensors").read_bytes()
    (tmp_path / "instruction.safetensors").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"instruction\.safetensors is damaged"):
        again(tmp_path, data, tmp_path / "out")


def test_an_output_that_is_a_file_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ResourceError, match="cannot be made"):
        again(run, data, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_four_experts_are_what_can_be_merged(run: Path) -> None:
    assert CONFIG.moe is not None
    config = replace(CONFIG, moe=replace(CONFIG.moe, num_experts=3, expert_names=MODALITIES[:3]))
    with pytest.raises(DataError, match="two-experts merges four"):
        VARIANTS["two-experts"].build(MedMoE(replace(config, moe=None)), nn.Linear(64, 3), config)
