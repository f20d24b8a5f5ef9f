"""The mixture of experts: domain experts chosen by a router, and a meta expert that always runs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medmoe_edge.config import MoEConfig


def route(
    logits: Tensor, top_k: int, noise: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Choose experts from router logits `[T, E]`: weights and indices, both `[T, K]`.

    k = 1 weighs with the un-renormalised probability; k = 2 renormalises over the two chosen.
    `noise` adds Gumbel noise to the choice of the second expert only, as the official code does.
    """
    probabilities = logits.float().softmax(-1)
    first = probabilities.argmax(-1, keepdim=True)  # [T, 1]
    if top_k == 1:
        return probabilities.gather(-1, first), first
    scores = logits.float()
    if noise is not None:
        scores = scores + _gumbel(logits.shape, noise).to(scores.device)
    second = scores.scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)
    chosen = torch.cat((first, second), -1)  # [T, 2]
    weights = probabilities.gather(-1, chosen)
    return weights / weights.sum(-1, keepdim=True), chosen


def _gumbel(shape: torch.Size, noise: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=noise).clamp_min(torch.finfo(torch.float32).tiny)
    return -torch.log(-torch.log(uniform))


class MoE(nn.Module):
    """Feed-forward layer of routed experts, shapes `[..., D]` to `[..., D]`.

    `y = sum_k g_k E_k(x) + meta(x)`; with the residual coefficient `c = softmax(coefficient(x))`,
    `y = c0 sum_k g_k E_k(x) + c1 meta(x) + meta(x)`. Source: Med-MoE, arXiv 2404.10237, and its
    official code. The router is computed in fp32.
    """

    def __init__(self, config: MoEConfig, size: int, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.noise: torch.Generator | None = None
        self.router = nn.Linear(size, config.num_experts, bias=config.router_bias)
        self.experts = nn.ModuleList(make_expert() for _ in range(config.num_experts))
        self.meta = make_expert() if config.meta_expert else None
        self.coefficient = nn.Linear(size, 2) if config.use_residual else None

    def router_logits(self, x: Tensor) -> Tensor:
        """`[..., D]` to fp32 logits `[..., E]`, also under autocast."""
        bias = None if self.router.bias is None else self.router.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.router.weight.float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """Run the chosen experts on their tokens and add the meta expert."""
        tokens = x.flatten(0, -2)  # [T, D]
        y = self._routed(tokens)
        if self.meta is not None:
            meta = self.meta(tokens)
            if self.coefficient is not None:
                mix = self.coefficient(tokens).softmax(-1)  # [T, 2]
                y = y * mix[:, :1] + meta * mix[:, 1:]
            y = y + meta
        return y.view_as(x)

    def _routed(self, tokens: Tensor) -> Tensor:
        weights, chosen = route(self.router_logits(tokens), self.top_k, self.noise)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            if token.numel():
                part = expert(tokens[token]) * weights[token, slot, None]
                y = y.index_add(0, token, part.to(y.dtype))
        return y
