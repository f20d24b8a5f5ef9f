"""The kernels on torch tensors: for the torch runtime on CUDA, and held against float64.

Shapes are those of the package's docstring. Tensors must be contiguous and on one device.
"""

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Self, cast

import torch
from torch import Tensor, nn

from medmoe_edge._types import there
from medmoe_edge.errors import MissingDependencyError
from medmoe_edge.kernels import PARTS, Half, Kernel, Tile, Variant, group_of
from medmoe_edge.models.decoder import MoE

try:
    from triton import knobs

    from medmoe_edge.kernels import triton as kernels
except ImportError as error:
    raise MissingDependencyError("triton", "plugin") from error


Expert = Sequence[Tensor]
"""An expert's parts for one kernel, in the order of `PARTS`."""

HALVES: dict[torch.dtype, Half] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
DECODE = 16  # slots: up to here the tiles of decode, of which one block holds an expert's slots


def feed_forward(
    x: Tensor,
    chosen: Tensor,
    gates: Tensor,
    first: Sequence[Expert],
    second: Sequence[Expert],
    activation: str,
) -> Tensor:
    """`y[t]` = sum over j of `gates[t, j]` times expert `chosen[t, j]` of `x[t]`.

    x and y are `[T, D]` in fp16 or bf16, `chosen` and `gates` `[T, S]`; `first` and `second` are
    the experts' matrices for the two kernels, the meta expert's last. Raises `ConfigError` for
    groups that there is no kernel for.
    """
    order, offsets = group_by_expert(chosen, len(first))
    tokens = order // chosen.shape[1]
    hidden = routed_hidden(x, tokens, offsets, first, activation)
    parts = routed_output(hidden, order, gates, offsets, second)
    return parts.view(*chosen.shape, -1).sum(1, dtype=torch.float32).to(x.dtype)


def linear(x: Tensor, parts: Expert) -> Tensor:
    """`[T, K]` times one stored matrix, plus the bias where there is one: an expert of all slots.

    x and the result `[T, N]` are fp16 or bf16; `parts` are the matrix, its scale and maybe a bias.
    Raises `ConfigError` for groups that there is no kernel for.
    """
    slots = torch.arange(len(x) + 1, dtype=torch.int32, device=x.device)
    gates = torch.ones(len(x), device=x.device)
    return routed_output(x, slots[:-1], gates, slots[:: len(x)].contiguous(), [parts])


def group_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """`order` and `offsets` of the slots `[T, S]`."""
    slots = chosen.flatten()
    each = torch.arange(experts, device=slots.device)
    counts = (slots[:, None] == each).sum(0)  # bincount would wait for the device
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.argsort(slots, stable=True).int(), offsets.int()


def routed_hidden(
    x: Tensor, tokens: Tensor, offsets: Tensor, experts: Sequence[Expert], activation: str
) -> Tensor:
    """`hidden` `[T * S, F]`."""
    variant = _variant("hidden", activation, experts, x)
    hidden = x.new_empty(len(tokens), variant.channels)
    return _launch(variant, [x, tokens, offsets], experts, hidden, len(tokens))


def routed_output(
    hidden: Tensor, order: Tensor, gates: Tensor, offsets: Tensor, experts: Sequence[Expert]
) -> Tensor:
    """`parts` `[T * S, D]`."""
    activation = "swiglu" if len(experts[0]) == 2 else "gelu_tanh"
    variant = _variant("output", activation, experts, hidden)
    parts = hidden.new_empty(len(order), variant.channels)
    return _launch(variant, [hidden, order, gates, offsets], experts, parts, len(order))


def routed_delta(
    x: Tensor, gates: Tensor, order: Tensor, offsets: Tensor, factors: Sequence[Sequence[Expert]]
) -> Tensor:
    """Rows `[T * S, K]` in sorted order times one matrix, or two, of each slot's expert.

    The result `[T * S, N]` is in the order of the slots; the last factor's is weighed with `gates`.
    """
    for experts in factors[:-1]:
        x = routed_output(x, order, torch.ones_like(gates), offsets, experts)[order]
    return routed_output(x, order, gates, offsets, factors[-1])


def _variant(kernel: Kernel, activation: str, experts: Sequence[Expert], x: Tensor) -> Variant:
    matrix, scale = experts[0][:2]
    return Variant(
        kernel,
        activation,
        len(experts),
        width=x.shape[1],
        channels=scale.shape[0],
        group=group_of(matrix.shape),
        half=HALVES[x.dtype],
    )


def _launch(
    variant: Variant, leading: list[Tensor], experts: Sequence[Expert], result: Tensor, slots: int
) -> Tensor:
    tile = _tile(variant, slots)
    kernel = getattr(kernels, f"{variant.kernel}_kernel")
    kernel[variant.grid(slots, tile)](
        *leading,
        tuple(part for expert in experts for part in expert),
        result,
        **variant.constants(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return result


def _tile(variant: Variant, slots: int) -> Tile:
    decode, prefill = variant.tiles
    return decode if slots <= DECODE else prefill


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
        y = linear(x.flatten(0, -2).to(self.dtype), self.parts)
        return y.view(*x.shape[:-1], -1)


class StoredMoE(MoE):
    """The layer of a `MoE` whose experts all consist of `StoredLinear`s, of the same forms."""

    def __init__(self, moe: MoE, activation: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.top_k, self.rows = moe.top_k, moe.rows
        self.merged = None
        self.router, self.coefficient = moe.router, moe.coefficient
        self.experts, self.meta = moe.experts, moe.meta
        self.activation, self.dtype = activation, dtype

    @classmethod
    def of(cls, moe: MoE, activation: str, dtype: torch.dtype) -> Self | None:
        """The layer in the kernels; None where they cannot run its experts together."""
        if moe.merged is not None:
            return None
        forms = [
            [linear.form if isinstance(linear, StoredLinear) else None for linear in linears]
            for linears in map(nn.Module.children, _experts(moe))
        ]
        alike = None not in forms[0] and all(form == forms[0] for form in forms)
        return cls(moe, activation, dtype) if alike else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]` in `dtype`; the meta expert is one more, that everyone takes."""
        tokens = x.flatten(0, -2)  # [T, D]
        gates, chosen = self.route(tokens)
        if self.meta is not None:
            share = torch.ones_like(gates[:, :1])
            if self.coefficient is not None:
                with torch.autocast(x.device.type, enabled=False):
                    mix = self.coefficient(tokens.float()).softmax(-1)  # [T, 2]
                gates, share = gates * mix[:, :1], share + mix[:, 1:]
            last = torch.full_like(chosen[:, :1], len(self.experts))
            gates, chosen = torch.cat((gates, share), -1), torch.cat((chosen, last), -1)
        first, second = self._parts("hidden"), self._parts("output")
        y = feed_forward(tokens.to(self.dtype), chosen, gates, first, second, self.activation)
        return y.view_as(x)

    def _parts(self, kernel: Kernel) -> list[list[Tensor]]:
        """What a kernel takes, of every expert."""
        matrices = [part for part in PARTS[kernel, self.activation] if "." not in part]
        return [
            [part for name in matrices for part in cast(StoredLinear, getattr(expert, name)).parts]
            for expert in _experts(self)
        ]


Deltas = Mapping[str, Sequence[Sequence[Expert]]]
"""By matrix one factor or two, each of all experts, with an expert's bias in the last."""


class DeltaMoE(MoE):
    """The layer of a `MoE` whose experts are what they add to the meta expert.

    That runs once for all tokens; `export.passes.ort_cpu` says why it serves the chosen experts
    too. Whole experts are nowhere.
    """

    def __init__(self, moe: MoE, deltas: Deltas, activation: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.top_k, self.rows = moe.top_k, moe.rows
        self.merged, self.experts = None, nn.ModuleList()
        self.router, self.coefficient, self.meta = moe.router, moe.coefficient, moe.meta
        self.deltas, self.activation, self.dtype = deltas, activation, dtype

    @classmethod
    def of(cls, moe: MoE, deltas: Deltas, activation: str, dtype: torch.dtype) -> Self | None:
        """The layer in the kernels; None where they cannot run its experts together."""
        if moe.meta is None:
            return None
        stored = all(isinstance(linear, StoredLinear) for linear in moe.meta.children())
        alike = all(
            len({(matrix.dtype, matrix.shape) for matrix, *_ in experts}) == 1
            for factors in deltas.values()
            for experts in factors
        )
        return cls(moe, deltas, activation, dtype) if stored and alike else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]` in `dtype`; sums, activations and gates are fp32."""
        tokens = x.flatten(0, -2)  # [T, D]
        gates, chosen = self.route(tokens)
        own = torch.ones_like(gates[:, :1])
        if self.coefficient is not None:
            with torch.autocast(x.device.type, enabled=False):
                mix = self.coefficient(tokens.float()).softmax(-1)  # [T, 2]
            gates, own = gates * mix[:, :1], own + mix[:, 1:]
        *first, last = self.deltas
        order, offsets = group_by_expert(chosen, len(self.deltas[last][-1]))
        tokens = tokens.to(self.dtype)
        products = [linear(tokens, self._meta(name)[:2]).float() for name in first]  # [T, F]
        routed = tokens[order // self.top_k], torch.ones_like(gates), order, offsets
        added = [routed_delta(*routed, self.deltas[name]) for name in first]  # [T * K, F]
        pairs = zip(products, added, strict=True)
        theirs = self._hidden([mine.repeat_interleave(self.top_k, 0) + new for mine, new in pairs])
        named = zip(products, first, strict=True)
        hidden = own * self._hidden([self._biased(*each) for each in named])
        hidden += self._by_token(theirs * gates.reshape(-1, 1))
        y = linear(hidden.to(self.dtype), self._meta(last)[:2]).float()
        routed = theirs.to(self.dtype)[order], gates, order, offsets
        y += self._by_token(routed_delta(*routed, self.deltas[last]))
        y += own * self._biased(torch.zeros_like(y[:1]), last)
        return y.to(self.dtype).view_as(x)

    def _meta(self, name: str) -> list[Tensor]:
        """What the kernels take of the meta expert's matrix."""
        return cast(StoredLinear, getattr(self.meta, name)).parts

    def _biased(self, product: Tensor, name: str) -> Tensor:
        """A product of the meta expert's matrix, with its bias where there is one."""
        return sum(self._meta(name)[2:], product)

    def _hidden(self, products: list[Tensor]) -> Tensor:
        """The hidden layer, of its first products."""
        if self.activation == "swiglu":
            return nn.functional.silu(products[0]) * products[1]
        return nn.functional.gelu(products[0], approximate="tanh")

    def _by_token(self, slots: Tensor) -> Tensor:
        """Rows `[T * K, N]` of the slots, summed by token in fp32."""
        return slots.view(-1, self.top_k, slots.shape[-1]).sum(1, dtype=torch.float32)


def _experts(moe: MoE) -> list[nn.Module]:
    """The routed ones, then the meta expert."""
    return [*moe.experts, *([] if moe.meta is None else [moe.meta])]


# --- held against float64 ---------------------------------------------------------------------

EXPERTS = 4  # of a layer that is tried
HALF_ERROR: dict[torch.dtype, float] = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


@functools.cache
def interpreted_kernels() -> ModuleType:
    """A second copy of the kernels, which Triton interprets on CPU tensors."""
    spec = there(importlib.util.spec_from_file_location("interpreted_kernels", kernels.__file__))
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        there(spec.loader).exec_module(module)
    return module


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it the kernels are interpreted, on CPU tensors in fp16."""
    global kernels
    compiled, kernels = kernels, interpreted_kernels()
    try:
        yield
    finally:
        kernels = compiled


@dataclass(frozen=True)
class RandomLayer:
    """Random experts as the kernels take them, and as dense float64 matrices."""

    activation: str
    first: list[list[Tensor]]
    second: list[list[Tensor]]
    dense: list[list[Tensor]]

    def __call__(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """What the kernels should give, `[T, D]`, token by token on the CPU."""
        y = torch.zeros(x.shape, dtype=torch.float64)
        for token, slot in itertools.product(range(len(x)), range(chosen.shape[1])):
            gate, expert = gates[token, slot].double(), self.dense[int(chosen[token, slot])]
            y[token] += gate * self._expert(x[token].double(), expert)
        return y

    def _expert(self, x: Tensor, dense: list[Tensor]) -> Tensor:
        if self.activation == "swiglu":
            gate, up, down = dense
            return (nn.functional.silu(x @ gate) * (x @ up)) @ down
        first, bias, second, last = dense
        return nn.functional.gelu(x @ first + bias, approximate="tanh") @ second + last

    def to(self, device: str) -> "RandomLayer":
        """The same with what the kernels take on a device."""
        first, second = (
            [[part.to(device) for part in expert] for expert in experts]
            for experts in (self.first, self.second)
        )
        return RandomLayer(self.activation, first, second, self.dense)

    def bytes_of(self, experts: int) -> int:
        """What so many of its experts take as they are stored."""
        each = [
            sum(part.nbytes for part in (*a, *b))
            for a, b in zip(self.first, self.second, strict=True)
        ]
        return sum(each[:experts])


def random_layer(
    activation: str, group: int | None, half: torch.dtype, width: int, hidden: int
) -> RandomLayer:
    """`EXPERTS` experts `[width, hidden, width]`, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    layer = RandomLayer(activation, [], [], [])
    for _ in range(EXPERTS):
        inner = [
            _random_matrix(generator, group, width, hidden)
            for _ in range(1 + (activation == "swiglu"))
        ]
        second, down = _random_matrix(generator, group, hidden, width)
        first, dense = [part for stored, _ in inner for part in stored], [each for _, each in inner]
        dense.append(down)
        if activation == "gelu_tanh":
            biases = [torch.randn(size, generator=generator).to(half) for size in (hidden, width)]
            first, second = [*first, biases[0]], [*second, biases[1]]
            dense = [dense[0], biases[0].double(), down, biases[1].double()]
        layer.first.append(first)
        layer.second.append(second)
        layer.dense.append(dense)
    return layer


def _random_matrix(
    generator: torch.Generator, group: int | None, rows: int, columns: int
) -> tuple[list[Tensor], Tensor]:
    """A matrix as it is stored, and as float64 `[rows, columns]`."""
    if group is None:
        integers = torch.randint(-127, 128, (rows, columns), generator=generator)
        scale = torch.rand(columns, generator=generator) / 500 + 1e-3
        return [integers.to(torch.int8), scale], integers.double() * scale.double()
    integers = torch.randint(0, 16, (columns, rows), generator=generator)
    scale = (torch.rand(columns, rows // group, generator=generator) / 50 + 1e-2).half()
    packed = (integers[:, ::2] + 16 * integers[:, 1::2]).to(torch.uint8)
    dense = (integers.double() - 8) * scale.double().repeat_interleave(group, 1)
    return [packed.reshape(columns, rows // group, group // 2), scale], dense.T


def random_slots(tokens: int, slots: int) -> tuple[Tensor, Tensor]:
    """Experts and gates `[T, S]`; no token takes an expert twice."""
    generator = torch.Generator().manual_seed(2)
    ranks = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)
    return ranks[:, :slots], torch.rand(tokens, slots, generator=generator)


def error_of(layer: RandomLayer, tokens: int, slots: int, half: torch.dtype, device: str) -> float:
    """The largest error of the kernels on random tokens, over the largest value of float64."""
    width = layer.dense[0][0].shape[0]
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(3)).to(half)
    chosen, gates = random_slots(tokens, slots)
    there = layer.to(device)
    given = (x.to(device), chosen.to(device), gates.to(device))
    y = feed_forward(*given, there.first, there.second, layer.activation)
    expected = layer(x, chosen, gates)
    return float((y.cpu().double() - expected).abs().max() / expected.abs().max())


def seconds_of(layer: RandomLayer, slots: int, repeats: int) -> float:
    """Of one token through so many experts on CUDA, in the mean; the kernels are warm."""
    there = layer.to("cuda")
    width = layer.dense[0][0].shape[0]
    x = torch.ones(1, width, dtype=torch.float16, device="cuda")
    chosen = torch.arange(slots, device="cuda")[None]
    gates = torch.ones(1, slots, device="cuda")
    return _timed(
        lambda: feed_forward(x, chosen, gates, there.first, there.second, layer.activation),
        repeats,
    )


def bandwidth() -> float:
    """Bytes per second that the GPU's memory reads and writes when it copies."""
    source = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    there = torch.empty_like(source)
    return 2 * source.nbytes / _timed(lambda: there.copy_(source), 10)


def _timed(work: Callable[[], object], repeats: int) -> float:
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / repeats
