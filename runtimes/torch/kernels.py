"""Modules that compute with the integers a bundle stores, in the plugin's kernels.

No weight is ever unpacked to memory: a product reads the stored bytes, of experts the chosen ones
only. Needs Triton, and tensors on CUDA.
"""

from typing import Self, cast

import torch
from torch import Tensor, nn

from medmoe_edge.kernels import launch
from medmoe_edge.kernels.variant import PARTS, Kernel
from medmoe_edge.models.decoder import MoE, route


class StoredLinear(nn.Module):
    """In the place of `nn.Linear`: `[..., K]` to `[..., N]` in `dtype`, fp16 or bf16.

    `matrix`, `scale` and a bias of that dtype are as the docstring of `export.plugin` has them.
    """

    def __init__(
        self, matrix: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.parts = [matrix, scale, *([] if bias is None else [bias])]

    @property
    def form(self) -> tuple[torch.dtype, torch.Size]:
        """Matrices of the same form can go through one kernel together."""
        return self.parts[0].dtype, self.parts[0].shape

    def forward(self, x: Tensor) -> Tensor:
        """`x W + b`."""
        y = launch.linear(x.flatten(0, -2).to(self.dtype), self.parts)
        return y.view(*x.shape[:-1], -1)


class StoredMoE(MoE):
    """The layer of a `MoE` whose experts all consist of `StoredLinear`s, of the same forms."""

    def __init__(self, moe: MoE, activation: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.top_k, self.noise = moe.top_k, moe.noise
        self.router, self.coefficient = moe.router, moe.coefficient
        self.experts, self.meta = moe.experts, moe.meta
        self.activation, self.dtype = activation, dtype

    @classmethod
    def of(cls, moe: MoE, activation: str, dtype: torch.dtype) -> Self | None:
        """The layer in the kernels; None where they cannot run its experts together."""
        forms = [
            [linear.form if isinstance(linear, StoredLinear) else None for linear in linears]
            for linears in map(nn.Module.children, _experts(moe))
        ]
        alike = None not in forms[0] and all(form == forms[0] for form in forms)
        return cls(moe, activation, dtype) if alike else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]` in `dtype`; the meta expert is one more, that everyone takes."""
        tokens = x.flatten(0, -2)  # [T, D]
        gates, chosen = route(self.router_logits(tokens), self.top_k, self.noise)
        if self.meta is not None:
            share = torch.ones_like(gates[:, :1])
            if self.coefficient is not None:
                with torch.autocast(x.device.type, enabled=False):
                    mix = self.coefficient(tokens.float()).softmax(-1)  # [T, 2]
                gates, share = gates * mix[:, :1], share + mix[:, 1:]
            last = torch.full_like(chosen[:, :1], len(self.experts))
            gates, chosen = torch.cat((gates, share), -1), torch.cat((chosen, last), -1)
        first, second = self._parts("hidden"), self._parts("output")
        y = launch.feed_forward(
            tokens.to(self.dtype), chosen, gates, first, second, self.activation
        )
        return y.view_as(x)

    def _parts(self, kernel: Kernel) -> list[list[Tensor]]:
        """What a kernel takes, of every expert."""
        matrices = [part for part in PARTS[kernel, self.activation] if "." not in part]
        return [
            [part for name in matrices for part in cast(StoredLinear, getattr(expert, name)).parts]
            for expert in _experts(self)
        ]


def _experts(moe: MoE) -> list[nn.Module]:
    """The routed ones, then the meta expert."""
    return [*moe.experts, *([] if moe.meta is None else [moe.meta])]
