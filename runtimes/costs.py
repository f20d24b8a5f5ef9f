"""What a model weighs, computes and holds in memory, from its configuration alone.

Weights are counted in numbers, not bytes, so that the same count serves every precision;
`bits_per_weight` says how each part is stored. One multiply-add is two operations.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from medmoe_edge.bundle.bundle import DEFAULT, Bundle
from medmoe_edge.bundle.recorded import INLINE_BYTES, stored_weights
from medmoe_edge.calibration.quantisers import (
    DELTA_GROUP,
    VISION_TOKENS,
    DeltaForm,
    Format,
)
from medmoe_edge.checkpoint.keys import decoder_parameters
from medmoe_edge.config import ModelConfig, VisionConfig, VisionScales

TEXT_TOKENS = 48  # of a prompt beside the image: Med-MoE's system prompt and a short question
NEW_TOKENS = 32  # of an answer, at most

Kind = Literal["gpu", "jetson", "cpu"]
Precision = Literal["fp32", "fp16", "int8", "int4", "mixed"]
# Of a transformer's matrices in memory: 8, and in groups of 32 an fp32 scale for each
VISION_BITS: dict[VisionScales, float] = {"groups": 9.0, "tokens": 8.0}
MIXED_BITS = 6.0  # per weight, scales included: a budget between int4 and int8
BITS: dict[Precision, float] = {"fp32": 32, "fp16": 16, "int8": 8}
GROUP = 32  # weights that share a scale in int4, unless it is said otherwise
SCALE_BITS = 16  # of a group as it is stored
# What ONNX Runtime's CPU kernels hold of a group of int4 weights beside the weights themselves: its
# scale, and the sum of the weights for the activations' zero points, in fp32, and the scale as it
# was given. Measured at full size in groups of 32: 6.9 bits a weight in memory, 4.5 on the disk.
HELD_SCALE_BITS = 96
NARROW, WIDENED = 2.5, 4.5  # bits of a weight in 2 bits and in 4, in groups of 32
NUMBER = {"gpu": 2, "jetson": 2, "cpu": 4}  # bytes of an activation: fp16, or fp32
# Bytes of the process without a model: Python and ONNX Runtime; CUDA's context and TensorRT besides
PROCESS = {"gpu": 600 * 10**6, "jetson": 600 * 10**6, "cpu": 110 * 10**6}
COPIES = 2  # of an expert's stored bytes while a CPU loads it, beside the packed ones
PREFILL_AT_ONCE = 384  # tokens of a prefill that a CPU computes together
# Activations of a prefill are held so many times over, by kernels and the allocator: measured on a
# CPU at full size, assumed elsewhere.
ACTIVATIONS = {"gpu": 1, "jetson": 1, "cpu": 5}
CONVOLUTION = 0.5  # of matrix products' rate: depthwise layers are bound by memory
# Times the rate of fp32 of a transformer with its matrices in 8 bits: measured in groups; with a
# scale per token the same tower took 0.44 of that time (docs/benchmarks.md).
VISION_INT8: dict[VisionScales, float] = {"groups": 1.5, "tokens": 1.5 / 0.44}
# How much longer a question takes where a share of the experts is resident: the worse of the same
# and another modality, measured at full size on a CPU (docs/benchmarks.md).
PAGING_COST = {1.0: 1.0, 0.5: 1.24, 0.25: 2.8}
# EfficientNet-lite without its position embedding: multiply-adds per pixel and parameters,
# counted from models/med_moe.py, which needs torch
# (tests/unit/test_planning.py repeats it)
CONVOLUTIONS = {
    "lite0": (7251.22, 2_940_656),
    "lite1": (9588.59, 3_699_504),
    "lite2": (11024.23, 4_331_848),
}


@dataclass(frozen=True)
class Part:
    """One part of the decoder, over all layers.

    `weights` are stored; a token multiplies with `active` of them, in matrices whose inputs and
    outputs have `values` numbers together. `copies` experts share the work, `chosen` of them per
    token.
    """

    weights: int = 0
    active: int = 0
    values: int = 0
    copies: int = 1
    chosen: int = 1

    def touched(self, rows: int) -> float:
        """Weights read for `rows` tokens: at least the chosen experts', at most all."""
        return self.active / self.chosen * min(self.copies, rows * self.chosen)


@dataclass(frozen=True)
class Work:
    """What one step computes: `rows` tokens after `past` positions in the cache.

    By part: `weights` read and `operations`. `attention` are the operations on keys and values,
    `cache` the numbers read from the KV cache, `values` those that enter and leave matrices.
    """

    weights: Mapping[str, float]
    operations: Mapping[str, float]
    attention: float
    cache: int
    values: int


@functools.cache
def decoder_parts(config: ModelConfig) -> Mapping[str, Part]:
    """The decoder's parts by name: embedding, head, attention, ffn, experts, meta, router, norm."""
    moe = config.moe
    parts: dict[str, Part] = {}
    for name, shape in decoder_parameters(config).items():
        part = parts.get(kind := _kind(name), Part())
        copies, chosen = (moe.num_experts, moe.top_k) if moe and kind == "experts" else (1, 1)
        matrix = len(shape) == 2 and kind != "embedding"
        parts[kind] = Part(
            part.weights + math.prod(shape),
            part.active + matrix * math.prod(shape),
            part.values + matrix * sum(shape),
            copies,
            chosen,
        )
    return {
        kind: Part(
            part.weights,
            part.active * part.chosen // part.copies,
            part.values * part.chosen // part.copies,
            part.copies,
            part.chosen,
        )
        for kind, part in parts.items()
    }


def step_work(config: ModelConfig, rows: int, past: int) -> Work:
    """Count one step of the decoder; only the last of the `rows` goes through the head."""
    decoder = config.decoder
    parts = {kind: part for kind, part in decoder_parts(config).items() if part.active}
    each = {kind: 1 if kind == "head" else rows for kind in parts}
    positions = rows * past + rows * (rows + 1) // 2  # causal: each row reads those before it
    return Work(
        weights={kind: part.touched(rows) for kind, part in parts.items()},
        operations={kind: 2.0 * each[kind] * part.active for kind, part in parts.items()},
        attention=4.0 * decoder.layers * decoder.hidden_size * positions,
        cache=cache_values(config, past + rows),
        values=sum(each[kind] * part.values for kind, part in parts.items()),
    )


def cache_values(config: ModelConfig, positions: int) -> int:
    """Numbers in the KV cache of so many positions."""
    return 2 * config.decoder.layers * config.decoder.hidden_size * positions


def vision_operations(config: ModelConfig) -> float:
    """Operations of the vision tower, up to the layer that is read, and the projector."""
    vision, size = config.vision, config.decoder.hidden_size
    tokens = vision.features
    projector = vision.image_tokens * (vision.feature_size * size + size**2)
    if not vision.is_transformer:
        per_pixel, _ = CONVOLUTIONS[vision.variant]
        return 2.0 * (per_pixel * vision.image_size**2 + projector)
    width, rows = vision.feature_size, tokens + 1
    layer = rows * _layer_weights(vision) + 2 * rows**2 * width
    patches = tokens * 3 * vision.patch_size**2 * width
    return 2.0 * (patches + _layers_read(vision) * layer + projector)


def vision_weights(config: ModelConfig) -> int:
    """Parameters of the vision tower and the projector, short of biases and norms of CLIP."""
    vision = config.vision
    positions = vision.features * vision.feature_size
    return _tower_weights(vision) + positions + _projector_weights(config)


def vision_bytes(
    config: ModelConfig, precision: Precision, number: int, scales: VisionScales = "groups"
) -> int:
    """Bytes of the vision tower and the projector in memory, where a float takes `number`.

    What is stored in fp16 is expanded where arithmetic is fp32; a projector in 8 bits has groups.
    A transformer's layers behind the one that is read are not in the graph.
    """
    vision, floats = config.vision, vision_weights(config)
    if not vision.is_transformer:
        return floats * number
    layers = _layer_weights(vision) * _layers_read(vision)
    floats -= _layer_weights(vision) * (vision.layers - _layers_read(vision))
    if not vision_in_8_bits(config, precision, number):
        return floats * number
    projector = _projector_weights(config)
    integers = layers * VISION_BITS[scales] + projector * VISION_BITS["groups"]
    return round(integers / 8) + (floats - layers - projector) * number


def vision_in_8_bits(config: ModelConfig, precision: Precision, number: int) -> bool:
    """Whether the tower's matrices are integers: a quantised model's transformer on a CPU.

    Where a float takes `number` = 2 bytes, all are fp16.
    """
    return config.vision.is_transformer and precision != "fp32" and number == 4


@dataclass(frozen=True)
class Deltas:
    """Routed experts as what they add to the meta expert.

    Bits of an expert's weight, as `stored` and as `held` in the memory of a process on a CPU; the
    shares of a whole expert's `operations` that they take, and of its weights that are stored in 2
    bits (`narrow`); whether they can be `paged`; and whether each runs `everywhere`, on all tokens,
    in place of the chosen ones.
    """

    stored: float
    held: float
    operations: float = 1.0
    narrow: float = 0.0
    paged: bool = True
    everywhere: bool = False

    @classmethod
    def of(cls, form: DeltaForm, config: ModelConfig, precision: Precision, group: int) -> Self:
        """Of a form, in a precision that decides where the form does not."""
        stored, held = (bits("experts", precision, group) for bits in (bits_per_weight, held_bits))
        paged = _largest(config, form, form.budget or stored) >= INLINE_BYTES
        scales = (HELD_SCALE_BITS - SCALE_BITS) / DELTA_GROUP
        if form.budget:  # spent on few bits, as nothing is known of ranks before the search
            narrow = (WIDENED - form.budget) / (WIDENED - NARROW)
            bits = form.budget
            return cls(bits, bits + scales, narrow=min(max(narrow, 0.0), 1.0), paged=paged)
        operations, narrow = _shares(config, lambda _: form.stored)
        if form.bits:
            bits = Format(form.bits, DELTA_GROUP).bits_per_weight(DELTA_GROUP)
            return cls(bits, bits + scales, narrow=narrow, paged=paged)
        return cls(operations * stored, operations * held, operations, paged=paged)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Self | None:
        """As a portable bundle's lie in its files; None of one that stores experts whole.

        The smallest lie in the graph itself, where nothing can be paged. Raises `BundleError` where
        that is damaged.
        """
        part = decoder_parts(bundle.config).get("experts")
        whole = "experts" not in bundle.manifest.get("quantisation", {})
        if part is None or whole or bundle.target.name != DEFAULT:
            return None
        extents = bundle.manifest["experts"].items()
        stored = sum(size for owner, (_, size) in extents if ".experts." in owner)
        bundle.check_file("decoder.onnx")  # the bundle may have been opened unchecked
        inline = stored_weights(bundle.path("decoder.onnx"), external=False)
        stored += sum(array.nbytes for name, array in inline if ".experts." in name)
        paging = bundle.manifest.get("paging") or {}
        held = sum(expert["bytes"] for expert in paging.get("experts", {}).values()) or stored
        told = bundle.manifest["quantisation"]
        forms = told.get("deltas", {})
        shares = _shares(bundle.config, lambda name: forms.get(name, told["experts"]))
        bits = 8 / part.weights
        return cls(bits * stored, bits * held, *shares, paged=bool(paging))

    def on_gpu(self) -> Self:
        """As graphs and engines for GPUs have them: 2 bits in 4, and none is paged."""
        bits = self.stored + (WIDENED - NARROW) * self.narrow
        return replace(self, stored=bits, held=bits, paged=False, everywhere=True)


def _shares(config: ModelConfig, form_of: Callable[[str], str]) -> tuple[float, float]:
    """Of whole experts: operations that deltas take, weights in 2 bits; forms are in words."""
    whole = operations = narrow = 0
    for name, shape in decoder_parameters(config).items():
        if _kind(name) != "experts" or len(shape) < 2:
            continue
        size, form = math.prod(shape), form_of(name)
        rank = re.search(r"\brank (\d+)", form)
        whole += size
        operations += min(int(rank[1]) * sum(shape), size) if rank else size
        narrow += size if re.search(r"\b2 bits", form) else 0
    return operations / whole, narrow / whole


def _largest(config: ModelConfig, form: DeltaForm, bits: float) -> float:
    """Bytes of the largest tensor that a delta is stored as, its scales aside."""
    sizes = [4.0]
    for name, shape in decoder_parameters(config).items():
        if _kind(name) == "experts" and len(shape) == 1:
            sizes.append(4 * shape[0])  # a bias, in fp32
        elif _kind(name) == "experts":
            sizes.append(max(shape) * (form.rank or min(shape)) * int(form.bits or bits) / 8)
    return max(sizes)


def bits_per_weight(
    kind: str, precision: Precision, group: int = GROUP, deltas: Deltas | None = None
) -> float:
    """How a part is stored: routers and norms in fp32, embeddings in fp16, the head in int8.

    Of fp32 and fp16 models everything is in that; routed experts may be `deltas`.
    """
    if deltas is not None and kind == "experts":
        return deltas.stored
    return _bits(kind, precision, 4 + SCALE_BITS / group, MIXED_BITS)


def held_bits(
    kind: str, precision: Precision, group: int = GROUP, deltas: Deltas | None = None
) -> float:
    """How many bits a weight takes in the memory of a process on a CPU, packed for its kernels."""
    if deltas is not None and kind == "experts":
        return deltas.held
    stored, held = 4 + SCALE_BITS / group, 4 + HELD_SCALE_BITS / group
    in_4_bits = (8 - MIXED_BITS) / (8 - stored)  # the share of a mixed model that meets its budget
    return _bits(kind, precision, held, in_4_bits * held + (1 - in_4_bits) * 8)


def _bits(kind: str, precision: Precision, int4: float, mixed: float) -> float:
    if precision in ("fp32", "fp16") or kind in ("router", "norm"):
        return BITS["fp16" if precision == "fp16" else "fp32"]
    if kind in ("embedding", "head"):
        return BITS["fp16" if kind == "embedding" else "int8"]
    return {"int4": int4, "mixed": mixed}.get(precision) or BITS[precision]


def _tower_weights(vision: VisionConfig) -> int:
    if not vision.is_transformer:
        return CONVOLUTIONS[vision.variant][1]
    patches = 3 * vision.patch_size**2 * vision.feature_size
    return vision.layers * _layer_weights(vision) + patches


def _layers_read(vision: VisionConfig) -> int:
    return range(vision.layers + 1)[vision.select_layer]


def _layer_weights(vision: VisionConfig) -> int:
    """Weights in a layer of a transformer."""
    width = vision.feature_size
    return 4 * width**2 + 2 * width * vision.intermediate_size


def _projector_weights(config: ModelConfig) -> int:
    size = config.decoder.hidden_size
    return config.vision.feature_size * size + size**2


def _kind(name: str) -> str:
    """The part that a parameter belongs to."""
    for mark, kind in (
        ("decoder.embed.", "embedding"),
        ("decoder.head.", "head"),
        (".attention.", "attention"),
        (".ffn.experts.", "experts"),
        (".ffn.meta.", "meta"),
        (".ffn.router.", "router"),
        (".ffn.coefficient.", "router"),
        (".ffn.", "ffn"),
    ):
        if mark in name:
            return kind
    return "norm"


@dataclass(frozen=True)
class Speed:
    """Seconds that a device takes at one precision.

    Per `byte` of weights, per `operation` on them and per operation of `attention`; per `value`
    that enters or leaves a matrix; and fixed: per `step`, per `dense` layer, per `moe` layer with
    its chosen experts, per further `expert` that some token of a prefill chose, and per layer of
    any kind in a `prefill`, besides. A `number` in the KV cache has so many bytes. `overlaps`:
    weights are read while others are computed with, so that the longer counts, not the sum.
    """

    byte: float
    operation: float
    attention: float
    value: float = 0.0
    step: float = 0.0
    dense: float = 0.0
    moe: float = 0.0
    expert: float = 0.0
    prefill: float = 0.0
    number: int = 4
    overlaps: bool = True


def prompt_tokens(config: ModelConfig) -> int:
    """Positions of a typical prompt."""
    return config.vision.image_tokens + TEXT_TOKENS


def step_seconds(
    config: ModelConfig,
    precision: Precision,
    speed: Speed,
    rows: int,
    past: int,
    group: int = GROUP,
    deltas: Deltas | None = None,
) -> float:
    """Seconds of one step of `rows` tokens after `past` positions."""
    work, moe = step_work(config, rows, past), config.moe
    bits = {kind: bits_per_weight(kind, precision, group, deltas) for kind in work.weights}
    if deltas is not None and moe is not None and "experts" in work.operations:
        own, read = work.operations["experts"] * deltas.operations, work.weights["experts"]
        if deltas.everywhere:
            own *= moe.num_experts / moe.top_k
            read = decoder_parts(config)["experts"].touched(moe.num_experts)
        work = replace(
            work,
            weights={**work.weights, "experts": read},
            operations={**work.operations, "experts": own},
        )
    seconds = work_seconds(work, bits, speed)
    with_experts, layers = len(config.moe_layers), config.decoder.layers
    seconds += (layers - with_experts) * speed.dense + with_experts * speed.moe
    if rows > 1:
        seconds += layers * speed.prefill
    if moe:
        further = min(moe.num_experts, rows * moe.top_k) - moe.top_k
        seconds += with_experts * further * speed.expert
    return seconds


def work_seconds(work: Work, bits: Mapping[str, float], speed: Speed) -> float:
    """Seconds of a step's reading and computing; layers' fixed times come besides.

    Args:
        work: What is read and computed, by part.
        bits: Of a weight, by part.
        speed: Of the device.
    """
    seconds = speed.step + speed.value * work.values
    parts = [
        (weights * bits[kind] / 8 * speed.byte, work.operations[kind] * speed.operation)
        for kind, weights in work.weights.items()
    ]
    parts.append((speed.number * work.cache * speed.byte, work.attention * speed.attention))
    return seconds + sum(max(part) if speed.overlaps else sum(part) for part in parts)


def vision_seconds(
    config: ModelConfig,
    precision: Precision,
    number: int,
    speed: Speed,
    scales: VisionScales = "groups",
) -> float:
    """Seconds of the vision tower and the projector, from the speed of floats of `number` bytes."""
    rate = 1.0 if config.vision.is_transformer else CONVOLUTION
    if vision_in_8_bits(config, precision, number):
        rate = VISION_INT8[scales]
    return vision_operations(config) * speed.operation / rate


def paging_cost(share: float) -> float:
    """How many times as long all takes with a share of the experts resident.

    Between what was measured, and below it, the logarithm follows that of the share.
    """
    shares = sorted(PAGING_COST, reverse=True)
    share = min(max(share, 1e-3), 1.0)
    pairs = list(itertools.pairwise(shares))
    above, below = next((pair for pair in pairs if share >= pair[1]), pairs[-1])
    slope = math.log(PAGING_COST[below] / PAGING_COST[above]) / math.log(below / above)
    return float(PAGING_COST[above] * (share / above) ** slope)


@dataclass(frozen=True)
class Asked:
    """A model, the lengths of what it is asked and answers, and how its weights are stored.

    What the precision leaves open: the `group` that shares a scale of int4, routed experts as
    `deltas`, and what shares a scale of a `vision` transformer in 8 bits.
    """

    config: ModelConfig
    prompt: int
    new_tokens: int = NEW_TOKENS
    group: int = GROUP
    deltas: Deltas | None = None
    vision: VisionScales = "groups"

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Self:
        """As a bundle stores them, for a short question about one image; raises `BundleError`."""
        stored = bundle.manifest.get("quantisation", {})
        groups = [each["group"] for each in stored.get("matrices", ())]
        return cls(
            bundle.config,
            prompt_tokens(bundle.config),
            group=max(filter(None, groups), default=GROUP),
            deltas=Deltas.of_bundle(bundle),
            vision="tokens" if stored.get("vision") == VISION_TOKENS else "groups",
        )


def decoder_bytes(asked: Asked, precision: Precision) -> int:
    """Bytes of the decoder's weights as stored, without the embedding, which is mapped."""
    return _bytes(
        asked.config, lambda kind: bits_per_weight(kind, precision, asked.group, asked.deltas)
    )


def experts_bytes(asked: Asked, precision: Precision) -> int:
    """Stored bytes of the routed experts, which paging may leave on disk."""
    part = decoder_parts(asked.config).get("experts")
    bits = bits_per_weight("experts", precision, asked.group, asked.deltas)
    return round(part.weights * bits / 8) if part else 0


def switch_bytes(asked: Asked, precision: Precision) -> int:
    """Stored bytes of the experts that every layer chooses for one token: all of one modality.

    Paging moves them where a question is about another modality than the one before.
    """
    moe = asked.config.moe
    return experts_bytes(asked, precision) * moe.top_k // moe.num_experts if moe else 0


def _bytes(config: ModelConfig, bits: Callable[[str], float]) -> int:
    parts = decoder_parts(config).items()
    return round(sum(part.weights * bits(kind) / 8 for kind, part in parts if kind != "embedding"))


def held_ratio(kind: Kind, precision: Precision, asked: Asked) -> float:
    """How many bytes of memory a stored byte of an expert takes."""
    if kind != "cpu":
        return 1.0
    held = held_bits("experts", precision, asked.group, asked.deltas)
    stored = bits_per_weight("experts", precision, asked.group, asked.deltas)
    return held / stored if stored else 1.0


def held_experts(asked: Asked, precision: Precision) -> int:
    """Bytes that the routed experts take in the memory of a process on a CPU."""
    return round(experts_bytes(asked, precision) * held_ratio("cpu", precision, asked))


def memory_run(asked: Asked, kind: Kind, precision: Precision) -> int:
    """Peak bytes while running: process, weights, KV cache, activations of the prefill."""
    config, number = asked.config, NUMBER[kind]
    decoder, held = config.decoder, held_bits if kind == "cpu" else bits_per_weight
    weights = _bytes(config, lambda part: held(part, precision, asked.group, asked.deltas))
    rows = min(asked.prompt, PREFILL_AT_ONCE) if kind == "cpu" else asked.prompt
    live = rows * (8 * decoder.hidden_size + 3 * decoder.intermediate_size)
    cache = cache_values(config, asked.prompt + asked.new_tokens)
    vision = vision_bytes(config, precision, number, asked.vision)
    activations = ACTIVATIONS[kind] * live
    return PROCESS[kind] + weights + vision + number * (cache + activations)
