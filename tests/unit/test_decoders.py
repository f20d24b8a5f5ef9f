"""The dense decoders against transformers' own, on random weights in fp32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.models.decoder import KVCache, Phi, StableLm, causal_mask
from medmoe_edge.presets import PRESETS

BATCH, LENGTH, SPLIT = 2, 11, 7
NEAR: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
SIZES: dict[str, Any] = {
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 72,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "attention_dropout": 0.0,
}
# ours -> transformers', part by part; what is not listed is called the same
STABLELM_NAMES = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
STABLELM_NAMES |= {"out": "o_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
PHI_NAMES = {"input_norm": "input_layernorm", "out": "dense", "norm": "final_layernorm"}
COMMON_NAMES = {"embed": "embed_tokens", "attention": "self_attn", "ffn": "mlp"}
COMMON_NAMES |= {"q": "q_proj", "k": "k_proj", "v": "v_proj"}

Pair = tuple[StableLm | Phi, nn.Module]


def config_of(kind: Any, fraction: float) -> ModelConfig:
    decoder = DecoderConfig(
        kind=kind,
        hidden_size=80,
        layers=3,
        heads=2,  # 40 channels a head: 10, 16 or 20 of them rotate
        intermediate_size=72,
        vocab_size=50,
        rotary_fraction=fraction,
        rope_theta=5000.0,
    )
    return ModelConfig(PRESETS["tiny"].vision, decoder)


def reference_of(kind: str, fraction: float) -> nn.Module:
    sizes = {**SIZES, "partial_rotary_factor": fraction}
    if kind == "stablelm":
        return StableLmForCausalLM(
            StableLmConfig(
                **sizes,
                num_key_value_heads=2,
                use_qkv_bias=True,
                use_parallel_residual=False,
                hidden_dropout=0.0,
            )
        )
    if kind == "qwen":  # Qwen2 is Qwen with q, k and v apart and no bound on its positions
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, rms_norm_eps=1e-5))
    return PhiForCausalLM(PhiConfig(**sizes, hidden_act="gelu_new", resid_pdrop=0.0))


def their_name(name: str, kind: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    parts = COMMON_NAMES | (PHI_NAMES if kind == "phi" else STABLELM_NAMES)
    return "model." + ".".join(parts.get(part, part) for part in name.split("."))


@pytest.fixture(
    params=[("stablelm", 0.25), ("stablelm", 0.5), ("phi", 0.4), ("phi", 0.5), ("qwen", 1.0)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Our decoder and transformers', with the same random weights, none of them a default."""
    kind, fraction = request.param
    torch.manual_seed(0)
    theirs = reference_of(kind, fraction).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.3)
    if kind == "phi":  # Med-MoE's head has no bias
        nn.init.zeros_(theirs.get_parameter("lm_head.bias"))
    decoders: dict[str, type[StableLm | Phi]] = {"stablelm": StableLm, "phi": Phi, "qwen": StableLm}
    ours = decoders[kind](config_of(kind, fraction)).eval()
    copied = theirs.state_dict()
    ours.load_state_dict({name: copied.pop(their_name(name, kind)) for name in ours.state_dict()})
    assert set(copied) <= {"lm_head.bias"}, "transformers has weights that ours lack"
    return ours, theirs


def run(decoder: StableLm | Phi, ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """Logits `[B, S, V]`, after what is in `cache`."""
    past = cache.length if cache else 0
    positions = torch.arange(past, past + ids.shape[1]).expand(len(ids), -1)
    mask = causal_mask(ids.shape[1], past, ids.device)
    hidden, _ = decoder(decoder.embed(ids), positions, mask, cache)
    if cache:
        cache.length += ids.shape[1]
    logits: Tensor = decoder.head(hidden)
    return logits


def random_ids() -> Tensor:
    return torch.randint(50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_without_a_cache(pair: Pair) -> None:
    ours, theirs = pair
    expected = theirs(random_ids()).logits
    assert expected.std() > 0.1  # a comparison of zeros would prove nothing
    torch.testing.assert_close(run(ours, random_ids()), expected, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize(
    "chunks",
    [[SPLIT] + [1] * (LENGTH - SPLIT), [SPLIT, LENGTH - SPLIT], [1, LENGTH - 1]],
    ids=["token by token", "two chunks", "one and the rest"],
)
def test_logits_with_a_cache(pair: Pair, chunks: list[int]) -> None:
    ours, theirs = pair
    cache = KVCache(ours.config, BATCH, LENGTH + 2, ours.embed.weight)
    past, logits, expected = None, [], []
    for chunk in torch.split(random_ids(), chunks, dim=1):
        logits.append(run(ours, chunk, cache))
        step = theirs(chunk, cache=past, use_cache=True)
        past = step.cache
        expected.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), torch.cat(expected, 1), **NEAR)
    torch.testing.assert_close(torch.cat(logits, 1), theirs(random_ids()).logits, **NEAR)
    assert cache.length == LENGTH
    assert not cache.keys[..., LENGTH:, :].any(), "written behind the end"


@torch.no_grad()
def test_no_token_sees_a_later_one(pair: Pair) -> None:
    ours, _ = pair
    ids, changed = random_ids(), random_ids()
    changed[:, SPLIT:] = (changed[:, SPLIT:] + 1) % 50
    before, after = run(ours, ids), run(ours, changed)
    assert torch.equal(before[:, :SPLIT], after[:, :SPLIT])
    assert (before[:, SPLIT:] - after[:, SPLIT:]).abs().amax(-1).min() > 1e-3


def test_the_causal_mask() -> None:
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(causal_mask(3, 2, torch.device("cpu"))[0, 0], expected)
