"""The whole model: image tokens among text, chunked prefill, what the routers see."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmoe_edge.models.decoder import MoE, causal_mask
from medmoe_edge.models.med_moe import MedMoE, Output
from medmoe_edge.presets import PRESETS

BATCH = 2
CASES = [("tiny", {}), ("tiny-phi", {}), ("tiny", {"top_k": 2, "use_residual": True})]


@pytest.fixture(params=CASES, ids=["tiny", "tiny-phi", "tiny, two experts and residual"])
def model(request: pytest.FixtureRequest) -> MedMoE:
    preset, options = request.param
    return make_model(preset, **options)


def make_model(preset: str, **options: Any) -> MedMoE:
    config = PRESETS[preset]
    assert config.moe is not None
    torch.manual_seed(0)
    model = MedMoE(replace(config, moe=replace(config.moe, **options)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.25)
    return model.eval()


def prompt(model: MedMoE) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of a prefix, an image and a question, `[B, S, D]` each."""
    noise = torch.Generator().manual_seed(1)
    side = model.config.vision.image_size
    ids = torch.randint(256, (BATCH, 12), generator=noise)
    pixels = torch.randn(BATCH, 3, side, side, generator=noise)
    return model.embed(ids[:, :5]), model.encode_image(pixels), model.embed(ids[:, 5:])


@torch.no_grad()
def test_an_image_becomes_projected_tokens(model: MedMoE) -> None:
    prefix, image, _ = prompt(model)
    assert image.shape == (BATCH, model.config.vision.image_tokens, prefix.shape[-1])
    pixels = torch.randn(1, 3, 28, 28)
    first, second = model.projector[0], model.projector[2]
    hidden = first(model.vision(pixels))
    exact_gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(model.encode_image(pixels), second(exact_gelu))


@torch.no_grad()
@pytest.mark.parametrize(
    "cuts", [[5, 4, 7], [9, 7], [1] * 16, [15, 1]], ids=["parts", "prefix", "tokens", "last"]
)
def test_chunks_with_a_cache_equal_one_pass(model: MedMoE, cuts: list[int]) -> None:
    embeds = torch.cat(prompt(model), 1)
    whole = model(embeds)
    cache = model.new_cache(BATCH, 20)
    parts = [model(chunk, cache) for chunk in torch.split(embeds, cuts, dim=1)]
    assert cache.length == 16
    hidden = torch.cat([part.hidden for part in parts], 1)
    torch.testing.assert_close(hidden, whole.hidden, atol=1e-4, rtol=1e-4)
    routed = torch.cat([model.router_logits(part) for part in parts], 1)
    torch.testing.assert_close(routed, model.router_logits(whole), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_question_after_a_kept_prefix_does_not_disturb_it(model: MedMoE) -> None:
    prefix, image, question = prompt(model)
    cache = model.new_cache(BATCH, 16)
    model(torch.cat((prefix, image), 1), cache)
    answers = []
    for embeds in (question, question + 1, question):
        cache.length = 9
        answers.append(model(embeds, cache).hidden)
    assert torch.equal(answers[0], answers[2])
    assert not torch.allclose(answers[0], answers[1])


@torch.no_grad()
def test_what_the_image_shows_reaches_the_answer(model: MedMoE) -> None:
    prefix, image, question = prompt(model)
    one = model(torch.cat((prefix, image, question), 1)).hidden
    other = model(torch.cat((prefix, image.flip(0), question), 1)).hidden
    assert torch.equal(one[:, :5], other[:, :5])
    assert (one[:, 9:] - other[:, 9:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_default_positions_and_mask_are_causal(model: MedMoE) -> None:
    embeds = torch.cat(prompt(model), 1)
    positions = torch.arange(16).expand(BATCH, -1)
    mask = causal_mask(16, 0, torch.device("cpu"))
    given = model(embeds, positions=positions, mask=mask)
    assert torch.equal(given.hidden, model(embeds).hidden)
    later = model(embeds, positions=positions * 2)
    assert not torch.allclose(later.hidden, given.hidden)


@torch.no_grad()
def test_router_logits_are_those_of_the_experts_inputs(model: MedMoE) -> None:
    seen: list[Tensor] = []
    for layer in model.config.moe_layers:
        model.moe_layer(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output: Output = model(torch.cat(prompt(model), 1))
    assert len(output.ffn_inputs) == model.config.decoder.layers
    logits = model.router_logits(output)
    assert logits.shape == (BATCH, 16, 2, 4)
    for index, layer in enumerate(model.config.moe_layers):
        moe = model.moe_layer(layer)
        assert torch.equal(output.ffn_inputs[layer], seen[index])
        torch.testing.assert_close(logits[:, :, index], moe.router(seen[index]))


def test_experts_lie_in_the_configured_layers() -> None:
    model = make_model("tiny", layers=(1,))
    kinds = [isinstance(layer.ffn, MoE) for layer in model.decoder.layers]
    assert kinds == [False, True, False]
    dense = MedMoE(replace(model.config, moe=None))
    assert not any(isinstance(module, MoE) for module in dense.modules())
