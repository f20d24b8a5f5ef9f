"""A GGUF whose decoder has as many weights as a Med-MoE's, for llama.cpp; they are noise.

Its nearest architecture is qwen2moe: RMSNorm and gated experts, some of them for every token, in
every layer. Of L layers Med-MoE has experts in a share s; with F the feed-forward size, an expert
here is s F wide and the shared one (1 - s) F, and F more for a meta expert. So both store as many
weights, and both use as many for a token. Phi's feed-forward has two matrices where a gated one
has three: F counts two thirds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

from medmoe_edge._types import there
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import ModelError

Form = Literal["q8_0", "q4_0"]
KINDS = {"q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
STEPS = {Kind.Q8_0: 127, Kind.Q4_0: 8}  # from zero to the largest magnitude
LARGEST = 0.06  # three standard deviations of what `init` draws
BLOCK = 32  # weights that share a scale, in both forms


class Widths(NamedTuple):
    """Feed-forward sizes: of each expert, and of the one that every token passes."""

    expert: int
    shared: int


@dataclass(frozen=True)
class Tensor:
    """`kind` None is a vector or router in fp32."""

    name: str
    shape: tuple[int, ...]
    kind: Kind | None = None


def widths(config: ModelConfig) -> Widths:
    """Widths of equal work, in whole blocks; raises `ModelError` for a model without experts."""
    moe, decoder = config.moe, config.decoder
    if moe is None:
        raise ModelError(
            "A model without experts has no counterpart of equal shape here.",
            "Compare llama.cpp's own dense models.",
        )
    share = len(moe.layers) / decoder.layers
    size = decoder.intermediate_size * (1.0 if decoder.kind != "phi" else 2 / 3)
    shared = size * (1 - share + share * moe.meta_expert)
    return Widths(*(max(round(width / BLOCK), 1) * BLOCK for width in (share * size, shared)))


def tensors(config: ModelConfig, form: Form) -> Iterator[Tensor]:
    """All that the file holds, in llama.cpp's names; the head and embeddings are Q8_0 always."""
    decoder, width, moe = config.decoder, widths(config), there(config.moe)
    size, kind = decoder.hidden_size, KINDS[form]
    yield Tensor("token_embd.weight", (decoder.vocab_size, size), Kind.Q8_0)
    yield Tensor("output_norm.weight", (size,))
    yield Tensor("output.weight", (decoder.vocab_size, size), Kind.Q8_0)
    for layer in range(decoder.layers):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            yield Tensor(f"{block}.{norm}.weight", (size,))
        for part in ("attn_q", "attn_k", "attn_v"):
            yield Tensor(f"{block}.{part}.weight", (size, size), kind)
            yield Tensor(f"{block}.{part}.bias", (size,))
        yield Tensor(f"{block}.attn_output.weight", (size, size), kind)
        yield Tensor(f"{block}.ffn_gate_inp.weight", (moe.num_experts, size))
        yield Tensor(f"{block}.ffn_gate_inp_shexp.weight", (size,))
        for suffix, first, inner in (
            ("exps", (moe.num_experts,), width.expert),
            ("shexp", (), width.shared),
        ):
            yield Tensor(f"{block}.ffn_gate_{suffix}.weight", (*first, inner, size), kind)
            yield Tensor(f"{block}.ffn_up_{suffix}.weight", (*first, inner, size), kind)
            yield Tensor(f"{block}.ffn_down_{suffix}.weight", (*first, size, inner), kind)


def write_gguf(config: ModelConfig, form: Form, out: Path) -> None:
    """Write the file, one tensor in memory; it has no vocabulary, tokens go in as numbers.

    Raises `ModelError` for a model without experts.
    """
    decoder, width, moe = config.decoder, widths(config), there(config.moe)
    writer = gguf.GGUFWriter(out, "qwen2moe")
    writer.add_context_length(decoder.max_positions)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_block_count(decoder.layers)
    writer.add_feed_forward_length(decoder.intermediate_size)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.heads)
    writer.add_rope_freq_base(decoder.rope_theta)
    writer.add_layer_norm_rms_eps(decoder.norm_eps)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_feed_forward_length(width.expert)
    writer.add_expert_shared_feed_forward_length(width.shared)
    writer.add_vocab_size(decoder.vocab_size)
    writer.add_tokenizer_model("none")
    generator = np.random.default_rng(0)
    for tensor in tensors(config, form):
        empty = np.empty(0, np.float32 if tensor.kind is None else np.uint8)
        shape = _stored(tensor)
        size = int(np.prod(shape)) * empty.itemsize
        writer.add_tensor_info(tensor.name, shape, empty.dtype, size, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors(config, form):
        writer.write_tensor_data(noise(tensor, generator))
    writer.close()


def noise(tensor: Tensor, generator: np.random.Generator) -> npt.NDArray[Any]:
    """The tensor's bytes; of a quantised one, rows of blocks: an fp16 scale, then its integers.

    Block formats: llama.cpp, ggml/src/ggml-common.h. Any integers are valid ones.
    """
    if tensor.kind is None:
        if "norm" in tensor.name:
            return np.ones(tensor.shape, np.float32)
        return generator.standard_normal(tensor.shape, np.float32) * np.float32(LARGEST / 3)
    *rest, row = _stored(tensor)
    _, block = gguf.GGML_QUANT_SIZES[tensor.kind]
    blocks = generator.integers(0, 256, (*rest, row // block, block), np.uint8)
    scale = np.array([LARGEST / STEPS[tensor.kind]], "<f2")
    blocks[..., :2] = scale.view(np.uint8)
    return blocks.reshape(*rest, row)


def _stored(tensor: Tensor) -> tuple[int, ...]:
    """Its shape in bytes where it is quantised, or in numbers."""
    if tensor.kind is None:
        return tensor.shape
    return gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
