"""The MoE layer against a per-token loop in float64, written here from the paper's formulas."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medmoe_edge.config import DecoderConfig, MoEConfig
from medmoe_edge.models.decoder import MoE, PhiFeedForward, StableLmFeedForward, route

SIZE, EXPERTS = 16, 4
FEED_FORWARD = {"phi": PhiFeedForward, "stablelm": StableLmFeedForward}


def make_moe(kind: Any = "stablelm", **options: Any) -> MoE:
    decoder = DecoderConfig(
        kind=kind,
        hidden_size=SIZE,
        layers=1,
        heads=2,
        intermediate_size=24,
        vocab_size=8,
        rotary_fraction=0.5,
    )
    torch.manual_seed(0)
    moe = MoE(MoEConfig(layers=(0,), **options), SIZE, lambda: FEED_FORWARD[kind](decoder))
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe.eval()


def random_tokens() -> Tensor:
    return torch.randn(3, 7, SIZE, generator=torch.Generator().manual_seed(1))


def naive_ffn(kind: str, expert: nn.Module, x: Tensor) -> Tensor:
    """One feed-forward in float64 on one token `[D]`, from its weights and the definition."""
    w: dict[str, Tensor] = {name: value.double() for name, value in expert.state_dict().items()}
    if kind == "stablelm":
        gate = w["gate.weight"] @ x
        return w["down.weight"] @ (gate * torch.sigmoid(gate) * (w["up.weight"] @ x))
    h = w["fc1.weight"] @ x + w["fc1.bias"]
    gelu_new = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return w["fc2.weight"] @ gelu_new + w["fc2.bias"]


def naive_moe(moe: MoE, kind: str, top_k: int, x: Tensor) -> Tensor:
    """The whole layer on one token `[D]` in float64."""
    logits = moe.router.weight.double() @ x
    if moe.router.bias is not None:
        logits = logits + moe.router.bias.double()
    p = (logits.exp() / logits.exp().sum()).tolist()
    chosen = sorted(range(EXPERTS), key=lambda index: -p[index])[:top_k]
    total = sum(p[index] for index in chosen) if top_k == 2 else 1.0  # k = 1: not renormalised
    y = torch.zeros(SIZE, dtype=torch.float64)
    for index in chosen:
        y = y + p[index] / total * naive_ffn(kind, moe.experts[index], x)
    if moe.meta is None:
        return y
    meta = naive_ffn(kind, moe.meta, x)
    if moe.coefficient is None:
        return y + meta
    scores = (moe.coefficient.weight.double() @ x + moe.coefficient.bias.double()).exp()
    return (y * scores[0] + meta * scores[1]) / scores.sum() + meta


STRUCTURES = [
    (kind, {"top_k": k, "router_bias": bias, "meta_expert": meta, "use_residual": residual})
    for kind, k, bias, meta, residual in itertools.product(
        FEED_FORWARD, (1, 2), (True, False), (True, False), (True, False)
    )
    if meta or not residual
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), STRUCTURES)
def test_equals_the_naive_loop(kind: str, options: dict[str, Any]) -> None:
    moe, x = make_moe(kind, **options), random_tokens()
    tokens = x.double().flatten(0, 1)
    expected = torch.stack([naive_moe(moe, kind, options["top_k"], token) for token in tokens])
    torch.testing.assert_close(moe(x).double(), expected.view(x.shape), atol=1e-4, rtol=1e-5)
    # every expert had work, so none could be wrong unnoticed
    _, chosen = route(moe.router_logits(x).flatten(0, 1), options["top_k"])
    assert chosen.flatten().bincount(minlength=EXPERTS).min() > 0


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_nobody_chooses_do_not_run(top_k: int) -> None:
    moe, x = make_moe(top_k=top_k), random_tokens()
    assert moe.router.bias is not None
    moe.router.bias.copy_(torch.tensor([-1e4, 1e4, -1e4, 0.0]))
    before = moe(x)
    for idle in (0, 2):
        for parameter in moe.experts[idle].parameters():
            parameter.fill_(math.nan)
    if top_k == 1:
        next(moe.experts[3].parameters()).fill_(math.nan)
    assert torch.equal(moe(x), before)
    assert moe.meta is not None  # expert 1 has all the weight
    torch.testing.assert_close(before, moe.experts[1](x) + moe.meta(x))


@torch.no_grad()
def test_the_router_is_fp32_also_under_autocast() -> None:
    moe, x = make_moe(), random_tokens()
    exact = moe.router_logits(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe.router_logits(x), exact)
        assert moe(x.bfloat16()).dtype == torch.bfloat16
    rounded = x.bfloat16()
    assert torch.equal(moe.router_logits(rounded), moe.router_logits(rounded.float()))


LOGITS = st.lists(
    st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=2, max_size=6),
    min_size=1,
    max_size=5,
).filter(lambda rows: len({len(row) for row in rows}) == 1)


@given(LOGITS)
def test_one_expert_is_the_first_of_the_likeliest(rows: list[list[float]]) -> None:
    weights, chosen = route(torch.tensor(rows), 1)
    for row, weight, index in zip(rows, weights.tolist(), chosen.tolist(), strict=True):
        assert index == [row.index(max(row))]  # the lowest index wins a tie
        expected = math.exp(max(row)) / sum(map(math.exp, row))
        assert weight[0] == pytest.approx(expected, rel=1e-5)


@given(LOGITS)
def test_two_experts_share_the_weight(rows: list[list[float]]) -> None:
    weights, chosen = route(torch.tensor(rows), 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(rows)))
    assert (weights > 0).all()
    for row, weight, (first, second) in zip(rows, weights.tolist(), chosen.tolist(), strict=True):
        assert first == row.index(max(row))
        assert second == max((i for i in range(len(row)) if i != first), key=row.__getitem__)
        expected = 1 / (1 + math.exp(row[second] - row[first]))
        assert weight[0] == pytest.approx(expected, rel=1e-5)
