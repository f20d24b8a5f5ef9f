"""Models cut to some modalities: what is left computes what it did, and says what it cannot."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import random_image

from medmoe_edge.bench.routing import directions
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.recorded import stored_weights
from medmoe_edge.checkpoint.reader import (
    Checkpoint,
    cut_checkpoint,
    cut_like,
    read_checkpoint,
    write_checkpoint,
)
from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.engine.answer import other_modality
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import ConfigError, InputError
from medmoe_edge.evaluation.mutations import mutated_weights, mutations_of
from medmoe_edge.export import build
from medmoe_edge.models.decoder import MoE, StableLmFeedForward
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.base import chosen_experts
from medmoe_edge.runtimes.ort.paged import PagedOrtRuntime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.eager import EagerRuntime

NAMES = ("mri", "ct", "pathology", "xray")
KEPT = ("xray", "ct")  # in another order than the model's
Make = Callable[..., Path]


# --- one layer ----------------------------------------------------------------------------------


def layer(moe: MoEConfig, seed: int = 0) -> MoE:
    decoder = dataclasses.replace(PRESETS["tiny"].decoder, hidden_size=16, intermediate_size=24)
    torch.manual_seed(seed)
    made = MoE(moe, 16, lambda: StableLmFeedForward(decoder))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_tokens_of_experts_that_stay_are_the_same_bits(top_k: int, residual: bool) -> None:
    moe = MoEConfig((0,), top_k=top_k, use_residual=residual, expert_names=NAMES)
    whole = layer(moe)
    cut = layer(
        dataclasses.replace(moe, num_experts=2, expert_names=("ct", "xray"), router_names=NAMES)
    )
    state = dict(whole.state_dict())
    for name in cut.state_dict():
        theirs = name.replace("experts.1.", "experts.3.").replace("experts.0.", "experts.1.")
        cut.get_parameter(name).data = state[theirs]
    tokens = torch.randn(400, 16)
    chosen = chosen_experts(whole.router_logits(tokens).detach().numpy(), top_k)
    stay = np.isin(chosen, (1, 3)).all(-1)
    assert 20 < stay.sum() < 380
    with torch.inference_mode():
        expected, found = whole(tokens), cut(tokens)
    # row by row: how many tokens go through one product decides how it rounds
    torch.testing.assert_close(found[stay], expected[stay], rtol=1e-6, atol=1e-6)
    assert (found[~stay] - expected[~stay]).abs().max() > 0.01


# --- a model ------------------------------------------------------------------------------------


def routed_to(config: ModelConfig, modalities: tuple[str, ...]) -> Callable[..., Any]:
    """Changes the routers' biases, so that tokens go to these experts alone, but not by far."""
    assert config.moe is not None
    bias = torch.tensor([0.0 if name in modalities else -4.0 for name in config.moe.expert_names])

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("router.bias"):
            return bias
        return tensor * 0.05 if name.endswith("router.weight") else tensor

    return change


@pytest.fixture(scope="module")
def made(
    tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Checkpoint]:
    """`made("tiny-phi", to=("xray",), top_k=2)`: a checkpoint that routes to some experts."""
    known: dict[Any, Checkpoint] = {}

    def make(preset: str = "tiny", *, to: tuple[str, ...] = KEPT, **moe: Any) -> Checkpoint:
        key = (preset, to, *sorted(moe.items()))
        if key not in known:
            source = read_checkpoint(tiny_checkpoint(preset, **moe))
            change = routed_to(source.config, to)
            folder = tmp_path_factory.mktemp("routed") / "model"
            tensors = ((name, change(name, tensor)) for name, tensor in source)
            tokenizer = source.folder / "tokenizer.json"
            write_checkpoint(folder, source.config, tensors, tokenizer_file=tokenizer)
            known[key] = read_checkpoint(folder)
        return known[key]

    return make


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Bundle]:
    """The bundle of a checkpoint in fp32, or as asked."""

    def export(checkpoint: Checkpoint, precision: Any = "fp32") -> Bundle:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        build.export_bundle(checkpoint, out, build.BuildOptions(precision, name="tiny"))
        return Bundle.open(out)

    return export


def answers(folder: Path, **options: Any) -> list[Any]:
    engine = load(folder, **options)
    found = []
    for seed in range(2):
        told = engine.ask_all(random_image(seed), ["Where?", "Is it?"], max_new_tokens=4)
        found += [(answer.text, answer.confidence, answer.modality) for answer in told]
    return found


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_the_cut_bundle_answers_as_the_whole_one(
    made: Callable[..., Checkpoint], exported: Callable[..., Bundle], preset: str
) -> None:
    source = made(preset)
    whole, cut = exported(source), exported(cut_checkpoint(source, KEPT))
    runtime, other = OrtRuntime(whole), OrtRuntime(cut)
    embeds = runtime.embed(list(range(40)))
    step = runtime.step(embeds, runtime.new_cache(40))
    found = other.step(embeds, other.new_cache(40))
    chosen = chosen_experts(step.router_logits, 1)
    assert set(np.unique(chosen)) == {1, 3}  # ct and xray, both
    np.testing.assert_array_equal(found.router_logits, step.router_logits)
    np.testing.assert_array_equal(found.logits, step.logits)
    assert answers(cut.folder) == answers(whole.folder)
    paged = answers(cut.folder, memory_budget="60%")
    assert paged == answers(cut.folder)
    sizes = [sum(file["bytes"] for file in b.manifest["files"].values()) for b in (cut, whole)]
    assert sizes[0] < sizes[1]
    assert cut.config.moe is not None
    assert cut.config.moe.expert_names == ("ct", "xray")
    assert cut.config.moe.left_out == ("mri", "pathology")
    weights, tokens = (
        dict(stored_weights(cut.path("decoder.onnx"))),
        {"decoder.layers.0.ffn.": [1, 2]},
    )
    tried = mutations_of(weights, tokens, cut.config.moe)
    router = next(one for one in tried if one.kind == "router")  # of the second expert
    damaged = mutated_weights(weights, router, cut.config.moe) or {}
    assert not damaged["decoder.layers.0.ffn.router.weight"][:, 3].any()
    assert cut.manifest["left_out"] == {
        "kept": ["ct", "xray"],
        "modalities": ["mri", "pathology"],
        "merged": False,
    }
    np.testing.assert_array_equal(directions(cut), directions(whole)[[1, 3]])  # as bench asks
    assert cut.manifest["source"] == whole.manifest["source"]
    assert "left_out" not in whole.manifest


def test_torch_and_the_graphs_agree_on_a_cut_model(
    made: Callable[..., Checkpoint], exported: Callable[..., Bundle]
) -> None:
    """Tokens of experts that were left out go to the best that is there: in each runtime."""
    cut = cut_checkpoint(made(to=("mri", "ct")), ("ct", "xray"))
    bundle = exported(cut)
    steps = []
    for runtime in (EagerRuntime(cut), OrtRuntime(bundle), PagedOrtRuntime(bundle, "100%")):
        embeds = runtime.embed(list(range(60)))
        steps.append(runtime.step(embeds, runtime.new_cache(60)))
    best = chosen_experts(steps[0].router_logits, 1)
    assert {0, 1} <= set(np.unique(best))  # of all rows: mri too
    for step in steps[1:]:
        np.testing.assert_allclose(step.logits, steps[0].logits, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(step.router_logits, steps[0].router_logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_image_of_another_modality_is_warned_of(
    made: Callable[..., Checkpoint], exported: Callable[..., Bundle], precision: str
) -> None:
    source = made(to=("mri",))
    bundle = exported(cut_checkpoint(source, KEPT), precision)
    engine = load(bundle.folder)
    answer = engine.ask(random_image(), "Where?", max_new_tokens=2)
    assert answer.modality == "mri"
    assert answer.warnings[0].code == "other_modality"
    assert "MRI" in answer.warnings[0].message
    assert answer.unsure
    assert answer.shown.startswith("Unsure.")
    assert "other_modality" in answer.logged.rpartition("[")[2]
    assert set(answer.experts) == {"ct", "xray"}
    assert engine.modality(random_image()) == "mri"
    usual = load(exported(cut_checkpoint(made(), KEPT)).folder)
    told = usual.ask(random_image(), "Where?", max_new_tokens=2)
    assert told.modality in KEPT
    assert "other_modality" not in [notice.code for notice in told.warnings]


def test_what_is_said_of_other_modalities() -> None:
    moe = MoEConfig((0,), 1, expert_names=("xray",), router_names=("mri", "xray"))
    assert other_modality(moe, "xray") == other_modality(moe, None) == ()
    assert other_modality(None, "mri") == ()
    assert [notice.code for notice in other_modality(moe, "mri")] == ["other_modality"]


# --- one expert, merged -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize("meta", [True, False])
def test_merged_is_the_expert_and_the_meta_expert(
    made: Callable[..., Checkpoint], exported: Callable[..., Bundle], preset: str, meta: bool
) -> None:
    """Where the router sends all to one expert and is sure of it, merging changes nothing."""
    source = made(preset, to=("xray",), meta_expert=meta)
    apart = cut_checkpoint(source, ["xray"])
    merged = cut_checkpoint(source, ["xray"], merge=True)
    assert apart.config.moe is not None

    def sure(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("router.bias"):
            return torch.tensor([-100.0, -100.0, -100.0, 0.0])
        return tensor

    class Sure(EagerRuntime):
        """With a router for which the expert counts fully."""

        def __init__(self, checkpoint: Checkpoint) -> None:
            super().__init__(checkpoint)
            state = {n: sure(n, t) for n, t in self.model.state_dict().items()}
            self.model.load_state_dict(state, assign=True)

    reference, torch_merged = Sure(apart), EagerRuntime(merged)
    bundle = exported(merged)
    graph = OrtRuntime(bundle)
    embeds = reference.embed(list(range(40)))
    expected = reference.step(embeds, reference.new_cache(40)).logits
    for runtime in (torch_merged, graph):
        found = runtime.step(embeds, runtime.new_cache(40)).logits
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    manifest: Mapping[str, Any] = bundle.manifest
    assert manifest["left_out"]["merged"]
    assert manifest["experts"] == {} or not any(".experts." in name for name in manifest["experts"])
    answer = load(bundle.folder).ask(random_image(), "Where?", max_new_tokens=2)
    assert answer.experts == {"xray": 1.0}


def test_a_merged_bundle_is_gated_against_experts_apart(
    made: Callable[..., Checkpoint], exported: Callable[..., Bundle]
) -> None:
    source = made(to=("xray",))
    merged = cut_checkpoint(source, ["xray"], merge=True)
    reference = cut_like(merged, merged.config)
    assert reference.config == cut_checkpoint(source, ["xray"]).config
    assert reference.sha256() == merged.sha256() == source.sha256()
    assert cut_like(source, source.config) is source


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "moe", "modalities", "merge", "what"),
    [
        ("tiny", {}, ("xry",), False, "no expert for 'xry'. Did you mean 'xray'"),
        ("tiny", {}, NAMES, False, "All of the model's experts would stay"),
        ("tiny", {}, ("xray", "ct"), True, "2 experts would be left"),
        ("tiny", {"top_k": 2}, ("xray",), False, "asks 2 experts about each token, and 1"),
        ("tiny", {"use_residual": True}, ("xray",), True, "cannot be merged"),
        ("tiny", {"expert_names": ()}, ("xray",), False, "does not say which expert"),
    ],
)
def test_what_cannot_be_cut(
    tiny_checkpoint: Make,
    preset: str,
    moe: dict[str, Any],
    modalities: tuple[str, ...],
    merge: bool,
    what: str,
) -> None:
    source = read_checkpoint(tiny_checkpoint(preset, **moe))
    with pytest.raises(InputError) as caught:
        cut_checkpoint(source, modalities, merge=merge)
    assert what in str(caught.value)


def test_a_configuration_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="router_names"):
        MoEConfig((0,), 1, expert_names=("xray",), router_names=("ct", "mri"))
    with pytest.raises(ConfigError, match="merged"):
        MoEConfig((0,), 2, merged=True)
    assert "router_names" not in MoEConfig((0,)).to_json()  # earlier bundles keep their bytes


def test_the_command_line(
    run: Callable[..., Any],
    tiny_checkpoint: Make,
    tmp_path: Path,
) -> None:
    export = ("export", str(tiny_checkpoint()), "--fp32", "-o", "cut")
    assert run(*export, "--modality", "xray, CT").exit_code == 0
    inspected = run("inspect", "cut")
    assert "left out" in inspected.stdout
    assert "mri, pathology" in inspected.stdout
    moe = json.loads(run("inspect", "cut", "--json").stdout)["config"]["moe"]
    assert moe["router_names"] == list(NAMES)
    planned = run("plan", "cut", "--device", "cpu")
    assert "without its experts for mri, pathology" in planned.stdout
    assert json.loads(run("plan", "cut", "--device", "cpu", "--json").stdout)["left_out"] == [
        "mri",
        "pathology",
    ]
    for options, what in (
        (("--merge",), "What is to be merged?"),
        (("--modality", "xray", "--stats", "some.stats"), "are to be left out"),
    ):
        refused = run(*export, "--force", *options)
        assert refused.exit_code == 2
        assert what in refused.stderr
    assert (tmp_path / "cut" / "manifest.json").exists()
