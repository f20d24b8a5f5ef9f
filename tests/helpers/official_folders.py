"""Folders as the official code saves them, made with transformers' own decoders and towers.

The experts are written here after the paper and the description of the official code, and take the
place of a decoder's feed-forwards under the official names, so that a `state_dict` is a checkpoint.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

SIZE, HEADS, LAYERS, EXPERTS, ROWS = 64, 2, 3, 4, 512
SIZES: dict[str, Any] = {
    "hidden_size": SIZE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": SIZE,
    "vocab_size": ROWS,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
}
SAID = torch.arange(300, 400, 10)  # tokens
ROTARY: dict[str, Any] = {"partial_rotary_factor": 0.5}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,  # of 64 channels in all published towers: shapes do not tell
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}


class Deepspeed(nn.Module):
    """What DeepSpeed's layer stores: a gate and the experts."""

    def __init__(self, experts: Sequence[nn.Module], bias: bool) -> None:
        super().__init__()
        self.gate: Any = nn.Module()
        self.gate.wg = nn.Linear(SIZE, len(experts), bias=bias)
        self.experts: Any = nn.Module()
        self.experts.deepspeed_experts = nn.ModuleList(experts)


class OfficialMoE(nn.Module):
    """`sum_k g_k E_k(x) + meta(x)`, with the residual mix where there is a coefficient."""

    def __init__(self, experts: Sequence[nn.Module], top_k: int, residual: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.deepspeed_moe = Deepspeed(experts[1:], bias=True)
        self.meta_moe = experts[0]
        if residual:
            self.coefficient = nn.Linear(SIZE, 2)
            self.mlp = self.meta_moe

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, S, D]`, every expert on every token."""
        shares = self.deepspeed_moe.gate.wg(x).softmax(-1)
        best = shares.topk(self.top_k, -1)
        gates = best.values if self.top_k == 1 else best.values / best.values.sum(-1, keepdim=True)
        weights = torch.zeros_like(shares).scatter(-1, best.indices, gates)
        experts = self.deepspeed_moe.experts.deepspeed_experts
        outputs = torch.stack([expert(x) for expert in experts], -1)
        routed = (outputs * weights[..., None, :]).sum(-1)
        meta = self.meta_moe(x)
        if hasattr(self, "coefficient"):
            mix = self.coefficient(x).softmax(-1)
            routed = routed * mix[..., :1] + meta * mix[..., 1:]
        return routed + meta  # type: ignore[no-any-return]


class MoELlavaMoE(nn.Module):
    """MoE-LLaVA's: two of the experts, renormalised, and nothing beside them."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.deepspeed_moe = Deepspeed(experts[1:], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, S, D]`."""
        best = self.deepspeed_moe.gate.wg(x).softmax(-1).topk(2, -1)
        gates = best.values / best.values.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts):
            y = y + expert(x) * (gates * (best.indices == index)).sum(-1, keepdim=True)
        return y


def decoder_of(kind: str, rows: int = ROWS) -> Any:
    """transformers' dense decoder; Qwen has no class there, Qwen2 computes the same."""
    sizes = SIZES | {"vocab_size": rows}
    if kind == "phi":
        return PhiForCausalLM(PhiConfig(**sizes, **ROTARY, hidden_act="gelu_new", resid_pdrop=0.0))
    if kind == "qwen":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, rms_norm_eps=1e-6))
    return StableLmForCausalLM(
        StableLmConfig(**sizes, **ROTARY, use_qkv_bias=True, hidden_dropout=0.0)
    )


def randomise(*modules: nn.Module) -> None:
    """Values none of which is a default; embeddings so small that the context has a say."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if "gate.wg" in name:  # so few tokens are near a tie that rounding changes no answer
                nn.init.normal_(parameter, 0.0, 0.6 if parameter.ndim == 1 else 0.05)
            elif parameter.ndim == 1:
                nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.1)
            else:
                nn.init.normal_(parameter, 0.0, 0.05 if "embed_tokens" in name else 0.2)


class Official:
    """A whole reference model, its folder, and how it answers."""

    def __init__(
        self,
        kind: str,
        top_k: int = 1,
        residual: bool = False,
        llava: bool = False,
        rows: int = ROWS,
    ) -> None:
        torch.manual_seed(7)  # the tower comes first: it is the same in all models
        self.tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
        self.projector = nn.Sequential(nn.Linear(16, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE))
        randomise(self.tower, self.projector)
        self.kind, self.top_k, self.residual, self.llava = kind, top_k, residual, llava
        self.decoder, self.rows = decoder_of(kind, rows), rows
        for layer in range(0, LAYERS, 2):
            block = self.decoder.model.layers[layer]
            experts = [decoder_of(kind).model.layers[0].mlp for _ in range(EXPERTS + 1)]
            block.mlp = MoELlavaMoE(experts) if llava else OfficialMoE(experts, top_k, residual)
        randomise(self.decoder)
        if kind == "phi":
            nn.init.zeros_(self.decoder.lm_head.bias)  # Med-MoE's head has none
        for module in (self.decoder, self.tower, self.projector):
            module.eval().requires_grad_(False)

    def save(self, folder: Path, known: Tensor, **config: Any) -> None:
        """Write `config.json` and the weights; rows that no token has would win everywhere.

        `known` `[rows]` says which a token has. Of those some are said rather than all others, so
        that answers are decided by more than the rounding of int8.
        """
        self.known = known
        with torch.no_grad():
            self.decoder.lm_head.weight[~known] *= 50
            self.decoder.lm_head.weight[~torch.isin(torch.arange(self.rows), SAID) & known] *= 0.2
        state = {
            name: value
            for name, value in self.decoder.state_dict().items()
            if name != "lm_head.bias" and not (self.residual and ".mlp.mlp." in name)
        }
        own = {"": self.projector, "vision_model.": self.tower}
        prefixes = {"": "model.mm_projector.image_spatial_proj."}
        prefixes["vision_model."] = "model.image_tower.image_tower.vision_model."
        for key, module in own.items():
            for name, value in module.state_dict().items():
                state[prefixes[key] + name.removeprefix(key)] = value
        if self.kind == "qwen":
            state = as_qwen(state)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in state.items()},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps(self.config() | config))

    def config(self) -> dict[str, Any]:
        """As the official trainers write it, with the keys that say nothing to us."""
        moe = {
            "capacity_factor": 1.5,
            "ep_size": 1,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "moe_enable": True,
            "moe_layers_idx": list(range(0, LAYERS, 2)),
            "moe_mode": "sparse",
            "num_experts": [EXPERTS] * 2,
            "router_aux_loss_coef": 0.01,
            "top_k_experts": self.top_k,
            "train_modules": ["fc1", "fc2", "wg"],
            "use_residual": self.residual,
        }
        sizes = {name: value for name, value in SIZES.items() if name != "attention_dropout"}
        shared = {
            "architectures": ["EvalMoELLaVAForCausalLM"],
            "freeze_mm_mlp_adapter": False,
            "image_aspect_ratio": "pad",
            "image_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 16,
            "mm_image_tower": "/home/stranger/clip-vit-large-patch14-336",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_video_tower": None,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "moe": moe,
            "model_type": f"moe_llava_{self.kind}",
            "tokenizer_padding_side": "right",
            "torch_dtype": "bfloat16",
            "tune_mm_mlp_adapter": False,
            "unfreeze_mm_vision_tower": False,
            "use_cache": True,
        }
        own: dict[str, dict[str, Any]] = {
            "phi": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, **ROTARY},
            "stablelm": {
                "num_heads": HEADS,
                "norm_eps": 1e-5,
                "rope_pct": 0.5,
                "rotary_scaling_factor": 1.0,
                "use_qkv_bias": True,
            },
            "qwen": {
                "bf16": True,
                "intermediate_size": 2 * SIZE,
                "kv_channels": SIZE // HEADS,
                "layer_norm_epsilon": 1e-6,
                "no_bias": True,
                "rotary_emb_base": 10000,
                "rotary_pct": 1.0,
                "seq_length": 512,
                "use_dynamic_ntk": True,
                "use_flash_attn": "auto",
                "use_logn_attn": True,
            },
        }
        return sizes | shared | own[self.kind] | {"vocab_size": self.rows}

    @torch.inference_mode()
    def image_tokens(self, pixels: Tensor) -> Tensor:
        """`[1, 3, S, S]` to `[1, N, D]`."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        return self.projector(states[-2][:, 1:])  # type: ignore[no-any-return]

    @torch.inference_mode()
    def answers(
        self, pixels: Tensor, before: list[int], after: list[list[int]], end: int, limit: int
    ) -> list[tuple[list[int], float]]:
        """Greedy tokens of each prompt, and by how much the closest choice was decided.

        That is in standard deviations of the logits of the tokens that are said.

        The head is cut to the tokens that exist, as the official loader resizes it.
        """
        embed, image = self.decoder.model.embed_tokens, self.image_tokens(pixels)[0]
        head = torch.cat((embed(torch.tensor(before)), image))
        groups = defaultdict(list)
        for index, ids in enumerate(after):
            groups[len(ids)].append(index)
        found: list[tuple[list[int], float]] = [([], 0.0)] * len(after)
        for members in groups.values():
            tails = embed(torch.tensor([after[index] for index in members]))
            x = torch.cat((head.expand(len(members), -1, -1), tails), 1)
            chosen: list[Tensor] = []
            gaps: list[Tensor] = []
            cache = None
            for _ in range(limit):
                step = self.decoder(inputs_embeds=x, cache=cache, use_cache=True)
                logits, cache = step.logits[:, -1, self.known], step.cache
                two = logits.topk(2, -1)
                token = self.known.nonzero()[two.indices[:, 0]]  # [B, 1]
                chosen.append(token[:, 0])
                said = step.logits[:, -1, SAID].std(-1)
                gaps.append((two.values[:, 0] - two.values[:, 1]) / said)
                x = embed(token)
            for place, index in enumerate(members):
                tokens = [int(token[place]) for token in chosen]
                stop = tokens.index(end) if end in tokens else limit
                margins = [float(gap[place]) for gap in gaps[: stop + 1]]
                found[index] = (tokens[:stop], min(margins))
        return found


def as_qwen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and fused matrices of Qwen's own modelling."""
    parts = {
        "model.embed_tokens.": "transformer.wte.",
        "model.norm.": "transformer.ln_f.",
        "model.layers.": "transformer.h.",
        "model.": "transformer.",
    }
    inner = {
        ".input_layernorm.": ".ln_1.",
        ".post_attention_layernorm.": ".ln_2.",
        ".self_attn.o_proj.": ".attn.c_proj.",
        ".gate_proj.": ".w2.",
        ".up_proj.": ".w1.",
        ".down_proj.": ".c_proj.",
    }
    renamed = {}
    for name, value in state.items():
        for old, new in parts.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        for old, new in inner.items():
            name = name.replace(old, new)
        renamed[name] = value
    for layer in range(LAYERS):
        for part in ("weight", "bias"):
            names = [f"transformer.h.{layer}.self_attn.{name}_proj.{part}" for name in "qkv"]
            fused = torch.cat([renamed.pop(name) for name in names])
            renamed[f"transformer.h.{layer}.attn.c_attn.{part}"] = fused
    return renamed
