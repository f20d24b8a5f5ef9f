"""The two kernels. A program takes a block of slots of one expert and a block of output channels.

Everything but pointers is a compile-time constant, since a plugin's kernel gets its inputs and its
outputs and no more: the number of slots is read from `offsets`, and programs beyond it return.
Products accumulate in fp32; integers go into them as they are (fp16 and bf16 hold them exactly) and
scales come after, so a weight means exactly what the specification says.
Shapes are those of the package's docstring; `weights` is the flat tuple of all experts' parts.
"""

# Triton reads this text and compiles it; as Python its types do not add up.
# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false

import triton
import triton.language as tl


@triton.jit
def hidden_kernel(
    x,
    tokens,
    offsets,
    weights,
    hidden,
    GATED: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`hidden` of one block: SwiGLU where GATED, else tanh-GELU with a bias."""
    expert, start, stop = find_block(offsets, tl.program_id(1), EXPERTS, BLOCK_M)
    if expert < 0:
        return
    places = start + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(tokens + places, places < stop, 0)
    PARTS: tl.constexpr = 4 if GATED else 3
    first = choose(weights, expert, 0, PARTS, EXPERTS)
    scale = choose(weights, expert, 1, PARTS, EXPERTS)
    total = product(x, rows, places < stop, first, scale, n, K, N, GROUP, BLOCK_K)
    if GATED:
        second = choose(weights, expert, 2, PARTS, EXPERTS)
        scale = choose(weights, expert, 3, PARTS, EXPERTS)
        up = product(x, rows, places < stop, second, scale, n, K, N, GROUP, BLOCK_K)
        total = total / (1 + tl.exp(-total)) * up
    else:
        bias = choose(weights, expert, 2, PARTS, EXPERTS)
        total += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
        # u / 2 (1 + tanh z) = u / (1 + exp(-2 z)), z = sqrt(2 / pi) (u + 0.044715 u^3)
        z = 0.7978845608028654 * (total + 0.044715 * total * total * total)
        total = total / (1 + tl.exp(-2 * z))
    inside = (places < stop)[:, None] & (n < N)[None, :]
    to = hidden + places[:, None].to(tl.int64) * N + n[None, :]
    tl.store(to, total.to(hidden.dtype.element_ty), inside)


@triton.jit
def output_kernel(
    hidden,
    order,
    gates,
    offsets,
    weights,
    parts,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`parts` of one block, each written to the row of its slot."""
    expert, start, stop = find_block(offsets, tl.program_id(1), EXPERTS, BLOCK_M)
    if expert < 0:
        return
    places = start + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    PARTS: tl.constexpr = 3 if BIASED else 2
    down = choose(weights, expert, 0, PARTS, EXPERTS)
    scale = choose(weights, expert, 1, PARTS, EXPERTS)
    total = product(hidden, places, places < stop, down, scale, n, K, N, GROUP, BLOCK_K)
    if BIASED:
        bias = choose(weights, expert, 2, PARTS, EXPERTS)
        total += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    slots = tl.load(order + places, places < stop, 0)
    total *= tl.load(gates + slots, places < stop, 0.0)[:, None]
    inside = (places < stop)[:, None] & (n < N)[None, :]
    to = parts + slots[:, None].to(tl.int64) * N + n[None, :]
    tl.store(to, total.to(parts.dtype.element_ty), inside)


@triton.jit
def find_block(offsets, block, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of the `block`-th block, -1 beyond the last; its first place, its expert's end."""
    expert, start, stop = -1, 0, 0
    before = 0
    for e in tl.static_range(EXPERTS):
        begin = tl.load(offsets + e)
        end = tl.load(offsets + e + 1)
        blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
        mine = (block >= before) & (block < before + blocks)
        expert = tl.where(mine, e, expert)
        start = tl.where(mine, begin + (block - before) * BLOCK_M, start)
        stop = tl.where(mine, end, stop)
        before += blocks
    return expert, start, stop


@triton.jit
def choose(weights, expert, part: tl.constexpr, PARTS: tl.constexpr, EXPERTS: tl.constexpr):
    """The address of one part of an expert known only now; nothing of the others is read."""
    address = weights[part]
    for e in tl.static_range(1, EXPERTS):
        address = tl.where(expert == e, weights[e * PARTS + part], address)
    return address


@triton.jit
def product(
    x,
    rows,
    present,
    weight,
    scale,
    n,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of x `[.., K]` times columns n of a matrix, fp32; int8 where GROUP is 0, else 4 bits."""
    starts = x + rows[:, None].to(tl.int64) * K
    if GROUP == 0:
        total = product_int8(starts, present, weight, n, K, N, BLOCK_K)
        return total * tl.load(scale + n, n < N, 0.0)[None, :]
    else:
        return product_int4(starts, present, weight, scale, n, K, N, GROUP)


@triton.jit
def product_int8(starts, present, weight, n, K: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr):
    """The product with the integers `[K, N]` alone."""
    total = tl.full([starts.shape[0], n.shape[0]], 0.0, tl.float32)
    for begin in range(0, K, STEP):
        k = begin + tl.arange(0, STEP)
        a = tl.load(starts + k[None, :], present[:, None] & (k < K)[None, :], 0.0)
        inside = (k < K)[:, None] & (n < N)[None, :]
        integers = tl.load(weight + k[:, None] * N + n[None, :], inside, 0)
        total = tl.dot(a, integers.to(a.dtype), total)
    return total


@triton.jit
def product_int4(
    starts, present, weight, scale, n, K: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr
):
    """One group at a time; even k meet the low halves of its bytes and odd k the high ones."""
    total = tl.full([starts.shape[0], n.shape[0]], 0.0, tl.float32)
    for group in range(0, K // GROUP):
        k = group * GROUP + tl.arange(0, GROUP)
        a = tl.load(starts + k[None, :], present[:, None], 0.0)
        even, odd = tl.split(tl.reshape(a, [starts.shape[0], GROUP // 2, 2]))
        byte = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
        packed = tl.load(weight + n[None, :] * (K // 2) + byte[:, None], (n < N)[None, :], 0)
        low = (packed & 15).to(tl.int8) - 8
        high = ((packed >> 4) & 15).to(tl.int8) - 8
        part = tl.dot(even, low.to(a.dtype))
        part = tl.dot(odd, high.to(a.dtype), part)
        step = tl.load(scale + n * (K // GROUP) + group, n < N, 0.0)
        total += part * step.to(tl.float32)[None, :]
    return total
