"""What training minimises and counts, against one pass per turn and a loop per image."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medmoe_edge.models.med_moe import MedMoE, Output
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.data import IGNORED, UNKNOWN, Batch, Turn, pack
from medmoe_edge.training.phases import Objective

PREFIX, IMAGE_TOKENS = [7, 8, 9], 4
IMAGE, TEXT = slice(3, 7), slice(7, None)
TURNS: list[list[Turn]] = [
    [([11, 12], [13, 0]), ([21, 22, 23], [24, 25, 0]), ([31], [0])],
    [([41, 42, 43, 44], [45, 0])],
]
SECOND_LENGTH = 7 + 5  # without padding


@pytest.fixture(params=["tiny", "tiny-phi"])
def objective(request: pytest.FixtureRequest) -> Objective:
    torch.manual_seed(0)
    model = MedMoE(PRESETS[request.param]).eval()
    return Objective(model, None, model.config.moe_layers)


@pytest.fixture
def batch() -> Batch:
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    text = pack(PREFIX, IMAGE_TOKENS, TURNS)
    return Batch(pixels, text, torch.tensor([UNKNOWN, 2]), pool=1)


def packed_pass(model: MedMoE, batch: Batch) -> Output:
    """The model on the packed sequences, put together by hand."""
    ids, text = batch.text.ids, batch.text
    parts = (model.embed(ids[:, :3]), model.encode_image(batch.pixels), model.embed(ids[:, TEXT]))
    output: Output = model(torch.cat(parts, 1), None, text.positions, text.mask())
    return output


def separate_logits(model: MedMoE, batch: Batch) -> Tensor:
    """Logits where an answer token is predicted, from one plain causal pass for each turn."""
    prefix, logits = model.embed(torch.tensor([PREFIX])), []
    for image, turns in zip(model.encode_image(batch.pixels), TURNS, strict=True):
        for question, answer in turns:
            tail = model.embed(torch.tensor([question + answer[:-1]]))
            hidden = model(torch.cat((prefix, image[None], tail), 1)).hidden
            logits.append(model.head(hidden[0, -len(answer) :]))
    return torch.cat(logits)


@torch.no_grad()
def test_a_packed_pass_equals_separate_passes(objective: Objective, batch: Batch) -> None:
    model, labels = objective.model, batch.text.labels
    logits = model.head(packed_pass(model, batch).hidden)
    expected = separate_logits(model, batch)
    torch.testing.assert_close(logits[labels != IGNORED], expected, atol=1e-5, rtol=1e-5)
    answers = torch.tensor([token for turns in TURNS for _, answer in turns for token in answer])
    torch.testing.assert_close(objective(batch), cross_entropy(expected, answers))
    objective.label_smoothing = 0.1
    smooth = cross_entropy(expected, answers, label_smoothing=0.1)
    torch.testing.assert_close(objective(batch), smooth)


@torch.no_grad()
@pytest.mark.parametrize("beside", [False, True], ids=["router in the model", "router beside"])
def test_the_router_learns_modalities_from_two_pools(
    objective: Objective, batch: Batch, beside: bool
) -> None:
    model, layers = objective.model, objective.layers
    router = nn.Linear(model.config.decoder.hidden_size, 4)
    if beside:
        objective.router = router
    else:
        router = model.moe_layer(0).router
    states = torch.stack([packed_pass(model, batch).ffn_inputs[layer] for layer in layers])
    plain = objective(batch)
    losses = []
    for place in (IMAGE, slice(7, SECOND_LENGTH)):  # the first image's modality is unknown
        logits = router(states[:, 1, place].mean((0, 1)))
        losses.append(-logits.log_softmax(-1)[2])
    objective.router_weight = 0.5
    expected = plain + 0.5 * (losses[0] + losses[1]) / 2
    torch.testing.assert_close(objective(batch), expected)

    guesses = objective.scores(batch).modality
    assert guesses is not None
    for row in range(2):
        logits = router(states[:, row, IMAGE].mean((0, 1)))
        assert guesses[row] == logits.argmax()

    nobody = replace(batch, modality=torch.full((2,), UNKNOWN))
    torch.testing.assert_close(objective(nobody), plain)


@torch.no_grad()
def test_a_turn_is_right_when_all_its_tokens_are(objective: Objective, batch: Batch) -> None:
    model, labels = objective.model, batch.text.labels
    greedy = model.head(packed_pass(model, batch).hidden).argmax(-1)
    right = torch.where(labels != IGNORED, greedy, labels)

    def exact(labels: Tensor) -> list[bool]:
        text = replace(batch.text, labels=labels)
        found: list[bool] = objective.scores(replace(batch, text=text)).exact.tolist()
        return found

    assert exact(right) == [True] * 4
    wrong = right.clone()
    last_of_second = 7 + 3 + 5 - 1
    assert labels[0, last_of_second] == 0, "the end token of the second turn"
    wrong[0, last_of_second] += 1
    assert exact(wrong) == [True, False, True, True]
