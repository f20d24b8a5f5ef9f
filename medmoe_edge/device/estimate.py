"""`medmoe-edge plan`: what a model will need and how fast it will be, before it is exported.

A roofline: each part of the decoder takes as long as its bytes and its operations do (on a CPU
whichever is longer), and each layer a fixed time beside that (Williams et al., CACM 52(4), 2009).
Of a named device the rates are the maker's figures times what programs reach of them; of this
machine they are measured (`device.measure`). Only configurations are read, never weights.

A model that does not fit whole is forecast with the experts that fit, and then costs what paging
costs.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.checkpoint.keys import decoder_parameters
from medmoe_edge.config import ModelConfig
from medmoe_edge.device.costs import (
    GROUP,
    NEW_TOKENS,
    Precision,
    Speed,
    bits_per_weight,
    cache_values,
    decoder_parts,
    held_bits,
    prompt_tokens,
    step_seconds,
    vision_bytes,
    vision_in_8_bits,
    vision_operations,
)
from medmoe_edge.device.hardware import DEVICES, HERE, Device, find_device
from medmoe_edge.embedded import EMBEDDED, bundle_path
from medmoe_edge.errors import (
    InputError,
    ModelError,
    ResourceError,
    did_you_mean,
    needs,
    shown_bytes,
)
from medmoe_edge.export.gpus import build_memory
from medmoe_edge.presets import PRESETS

if TYPE_CHECKING:
    from medmoe_edge.device.measure import Comparison

CONVOLUTION = 0.5  # of matrix products' rate: depthwise layers are bound by memory
VISION_INT8 = 1.5  # times the rate of fp32: a transformer with its matrices in 8 bits, measured
NUMBER = {"gpu": 2, "jetson": 2, "cpu": 4}  # bytes of an activation: fp16, or fp32
# Bytes of the process without a model: Python and ONNX Runtime; CUDA's context and TensorRT besides
PROCESS = {"gpu": 600 * 10**6, "jetson": 600 * 10**6, "cpu": 110 * 10**6}
PREFILL_AT_ONCE = 384  # tokens of a prefill that a CPU computes together
# Activations of a prefill are held so many times over, by kernels and the allocator: measured on a
# CPU at full size, assumed elsewhere.
ACTIVATIONS = {"gpu": 1, "jetson": 1, "cpu": 5}
# How much longer a question takes where a share of the experts is resident: the worse of the same
# and another modality, measured at full size on a CPU (docs/benchmarks.md).
PAGING_COST = {1.0: 1.0, 0.5: 1.24, 0.25: 2.8}
EXPORT_BYTES = 300 * 10**6  # Python and PyTorch, beside the largest tensor in fp32
CPU_PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "mixed", "fp32")
GPU_PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "mixed", "fp16")


@dataclass(frozen=True)
class Forecast:
    """One precision on one device: bytes, seconds, and whether it fits.

    `memory_run` is the peak with all experts resident; `weights`, of which `experts` are the routed
    ones', are the decoder's bytes as they are stored. `memory_build` bounds the export's or the
    engine builder's. `first_token` is vision and prefill. `group` weights of int4 share a scale.
    `expert_budget` is what `--memory-budget` may keep resident of `experts`: None where the model
    fits whole, 0 where it does not fit even so, and then `short` bytes are missing. The seconds
    are `paging_cost` times what they would be with all experts resident (1 where it does not fit).
    """

    precision: Precision
    group: int
    weights: int
    experts: int
    memory_run: int
    memory_build: int
    vision: float
    prefill: float
    first_token: float
    token: float
    tokens_per_second: float
    expert_budget: int | None
    short: int
    paging_cost: float

    def answer(self, new_tokens: int) -> float:
        """Seconds from a question to an answer of so many tokens."""
        return self.first_token + (new_tokens - 1) * self.token

    @property
    def fits(self) -> bool:
        """Whether it runs on the device, be it with paging."""
        return not self.short


@dataclass(frozen=True)
class Plan:
    """The forecasts of all precisions for one model and device."""

    model: str
    device: Device
    prompt_tokens: int
    new_tokens: int
    forecasts: tuple[Forecast, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; bytes and seconds."""
        own = asdict(self)
        own["device"] |= {"usable": self.device.usable}
        for told, forecast in zip(own["forecasts"], self.forecasts, strict=True):
            told["fits"] = forecast.fits
        return own

    def error(self) -> ResourceError | None:
        """Where nothing fits: by how much, and what would."""
        if any(forecast.fits for forecast in self.forecasts):
            return None
        least = min(self.forecasts, key=lambda forecast: forecast.short)
        needed = self.device.usable + least.short
        rooms = [device for device in DEVICES.values() if device.usable >= needed]
        larger = min(rooms, key=lambda device: device.usable).name if rooms else "a larger device"
        return ResourceError(
            f"{self.model} does not fit {self.device.name}: even in {least.precision} with paged "
            f"experts it lacks {shown_bytes(least.short)}.",
            f"It would fit {larger}, or any with {shown_bytes(needed)} free.",
        )


@dataclass(frozen=True)
class PlanOptions:
    """What is planned.

    Attributes:
        device: A name of `devices.DEVICES`, a file that describes one (`devices.read_device`), or
            "here" for this CPU, which is measured for a few seconds and needs the extra `export`.
        precision: Only this one; all that the device offers by default.
        group: Weights of int4 that share a scale: 32, 64 or 128.
        prompt_tokens: Positions of the prompt, those of the image among them; None: a short
            question about one image.
        new_tokens: Tokens of the answer.
    """

    device: str
    precision: Precision | None = None
    group: int = GROUP
    prompt_tokens: int | None = None
    new_tokens: int = NEW_TOKENS


def plan(model: str, options: PlanOptions) -> Plan:
    """Predict what a model needs on a device, and how fast it will be.

    Args:
        model: A bundle, a checkpoint folder, an embedded model or a preset. A checkpoint needs the
            extra `export`.
        options: The device, and what is asked of it.

    Returns:
        A forecast for each precision.

    Raises:
        InputError: The device is unknown, does not offer the precision, or the prompt is too long.
        ModelError: The model is unknown.
        MissingDependencyError: The extra is not installed.
    """
    found = find_device(options.device)
    name, config = model_config(model)
    wanted = precisions(found, options.precision)
    if found.ratings is not None:
        return make_plan(name, config, found, options)
    with needs("export"):
        from medmoe_edge.device.measure import measure_speeds
    speeds = measure_speeds(config, {*wanted, "fp32"})
    return make_plan(name, config, found, options, speeds=speeds)


def plan_and_measure(model: str) -> tuple[Plan, "Comparison"]:
    """Plan a bundle on this CPU in its own precision, and run it beside the prediction."""
    folder = bundle_path(model)
    if not (folder / MANIFEST).exists():
        raise InputError(
            f"{folder} is no bundle, so there is nothing to run.",
            "Export it first: medmoe-edge export CHECKPOINT.",
        )
    bundle = Bundle.open(folder)
    with needs("export"):
        from medmoe_edge.device.measure import compare, measure_speeds
    precision: Precision = bundle.manifest["quantisation"]["precision"]
    comparison, speed = compare(bundle)
    speeds = measure_speeds(bundle.config, ["fp32"])
    speeds[precision] = speed
    device, options = find_device(HERE), PlanOptions(HERE, precision)
    return make_plan(bundle.name, bundle.config, device, options, speeds=speeds), comparison


def model_config(model: str) -> tuple[str, ModelConfig]:
    """Name and configuration of a model; no weights are read."""
    if model in EMBEDDED or Path(model).is_dir():
        folder = bundle_path(model)
        if (folder / MANIFEST).exists():
            bundle = Bundle.open(folder, verify=False)
            return bundle.name, bundle.config
        with needs("export"):
            from medmoe_edge.checkpoint.reader import read_checkpoint
        return folder.resolve().name, read_checkpoint(folder).config
    if model not in PRESETS:
        names = list(dict.fromkeys((*EMBEDDED, *PRESETS)))
        raise ModelError(
            f"There is no model {model!r}.",
            f"{did_you_mean(model, names)}Give a bundle or checkpoint folder, or: "
            f"{', '.join(names)}.",
        )
    return model, PRESETS[model]


def make_plan(
    model: str,
    config: ModelConfig,
    device: Device,
    options: PlanOptions,
    *,
    speeds: Mapping[Precision, Speed] | None = None,
) -> Plan:
    """Forecast a model on a device, for one precision or all that it offers.

    `speeds`, by precision and with those of fp32 for the vision tower, are the measured ones of a
    device without ratings. Raises `InputError` for a precision that it does not offer, and for a
    prompt that leaves no room for an answer.
    """
    prompt = options.prompt_tokens or prompt_tokens(config)
    image, most = config.vision.image_tokens, config.decoder.max_positions
    if not image < prompt <= most - options.new_tokens:
        raise InputError(
            f"A prompt of {prompt} tokens and an answer of {options.new_tokens} do not go with "
            f"{image} image tokens and {most} positions.",
            f"Give a prompt of {image + 1} to {most - options.new_tokens} tokens.",
        )
    speeds = speeds or nominal_speeds(device)
    work = Asked(config, prompt, options.new_tokens, options.group)
    forecasts = tuple(
        forecast(work, device, each, speeds) for each in precisions(device, options.precision)
    )
    return Plan(model, device, prompt, options.new_tokens, forecasts)


@dataclass(frozen=True)
class Asked:
    """A model, and the lengths of what it is asked and answers."""

    config: ModelConfig
    prompt: int
    new_tokens: int = NEW_TOKENS
    group: int = GROUP


def precisions(device: Device, wanted: Precision | None = None) -> tuple[Precision, ...]:
    """What a device offers, or of these the one that is wanted."""
    offered = CPU_PRECISIONS if device.kind == "cpu" else GPU_PRECISIONS
    if wanted is None:
        return offered
    if wanted not in offered:
        raise InputError(
            f"{device.name} is not planned in {wanted}.", f"Use one of: {', '.join(offered)}."
        )
    return (wanted,)


def nominal_speeds(device: Device) -> dict[Precision, Speed]:
    """A device's rates from its maker's figures.

    On a GPU weights are dequantised and multiplied in fp16, as our kernels do; on a CPU int8 is
    W8A8, and int4 is multiplied at the rate of floats.
    """
    rated, reached = device.ratings, device.reached
    assert rated is not None
    byte = 1 / (rated.bandwidth * reached.bandwidth)
    floats = 1 / (rated.fp16 * reached.floats)
    cpu = device.kind == "cpu"
    integers = 1 / ((rated.int8 if cpu else rated.fp16) * reached.integers)

    def speed(operation: float) -> Speed:
        return Speed(
            byte,
            operation,
            floats,
            dense=reached.layer,
            moe=2 * reached.layer,
            prefill=reached.prefill_layer,
            number=NUMBER[device.kind],
            overlaps=cpu,
        )

    if cpu:
        return {name: speed(integers if name == "int8" else floats) for name in CPU_PRECISIONS}
    return {
        name: speed(floats if name in ("fp16", "fp32") else integers)
        for name in (*GPU_PRECISIONS, "fp32")
    }


def forecast(
    asked: Asked, device: Device, precision: Precision, speeds: Mapping[Precision, Speed]
) -> Forecast:
    """Predict memory and time of one precision."""
    config, prompt, group = asked.config, asked.prompt, asked.group
    speed = speeds[precision]
    middle = prompt + asked.new_tokens // 2  # the cache is as long as that on average
    weights, experts = (
        decoder_bytes(config, precision, group),
        experts_bytes(config, precision, group),
    )
    memory = memory_run(asked, device, precision)
    budget, short = _expert_budget(asked, device, precision, memory)
    cost = 1.0 if not budget else paging_cost(budget / experts)
    vision = cost * vision_seconds(config, precision, NUMBER[device.kind], speeds["fp32"])
    prefill = cost * step_seconds(config, precision, speed, prompt, 0, group)
    token = cost * step_seconds(config, precision, speed, 1, middle, group)
    return Forecast(
        precision=precision,
        group=group,
        weights=weights,
        experts=experts,
        memory_run=memory,
        memory_build=_build_memory(config, device, weights),
        vision=vision,
        prefill=prefill,
        first_token=vision + prefill,
        token=token,
        tokens_per_second=1 / token,
        expert_budget=budget,
        short=short,
        paging_cost=cost,
    )


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


def vision_seconds(config: ModelConfig, precision: Precision, number: int, speed: Speed) -> float:
    """Seconds of the vision tower and the projector, from the speed of floats of `number` bytes."""
    rate = 1.0 if config.vision.kind == "clip" else CONVOLUTION
    if vision_in_8_bits(config, precision, number):
        rate = VISION_INT8
    return vision_operations(config) * speed.operation / rate


def decoder_bytes(config: ModelConfig, precision: Precision, group: int = GROUP) -> int:
    """Bytes of the decoder's weights as stored, without the embedding, which is mapped."""
    return _bytes(config, lambda kind: bits_per_weight(kind, precision, group))


def experts_bytes(config: ModelConfig, precision: Precision, group: int = GROUP) -> int:
    """Stored bytes of the routed experts, which paging may leave on disk."""
    part = decoder_parts(config).get("experts")
    return round(part.weights * bits_per_weight("experts", precision, group) / 8) if part else 0


def _bytes(config: ModelConfig, bits: Callable[[str], float]) -> int:
    parts = decoder_parts(config).items()
    return round(sum(part.weights * bits(kind) / 8 for kind, part in parts if kind != "embedding"))


def held_ratio(device: Device, precision: Precision, group: int) -> float:
    """How many bytes of memory a stored byte of an expert takes."""
    if device.kind != "cpu":
        return 1.0
    held = held_bits("experts", precision, group)
    return held / bits_per_weight("experts", precision, group)


def memory_run(asked: Asked, device: Device, precision: Precision) -> int:
    """Peak bytes while running: process, weights, KV cache, activations of the prefill."""
    config, number = asked.config, NUMBER[device.kind]
    decoder, group = config.decoder, asked.group
    held = held_bits if device.kind == "cpu" else bits_per_weight
    weights = _bytes(config, lambda kind: held(kind, precision, group))
    rows = min(asked.prompt, PREFILL_AT_ONCE) if device.kind == "cpu" else asked.prompt
    live = rows * (8 * decoder.hidden_size + 3 * decoder.intermediate_size)
    cache = cache_values(config, asked.prompt + asked.new_tokens)
    vision = vision_bytes(config, precision, number)
    activations = ACTIVATIONS[device.kind] * live
    return PROCESS[device.kind] + weights + vision + number * (cache + activations)


def _build_memory(config: ModelConfig, device: Device, weights: int) -> int:
    """Peak bytes of the export, which streams, or of an engine's build."""
    if device.kind != "cpu":
        return build_memory(weights)
    largest = max(rows[0] * rows[-1] for rows in decoder_parameters(config).values())
    return EXPORT_BYTES + 4 * largest


def _expert_budget(
    asked: Asked, device: Device, precision: Precision, memory: int
) -> tuple[int | None, int]:
    """What paging may keep of the stored experts, and how many bytes of memory are missing.

    At least the experts that one layer chooses for a token must be resident.
    """
    spare = device.usable - memory
    if spare >= 0:
        return None, 0
    moe = asked.config.moe
    if moe is None:
        return 0, -spare
    experts = experts_bytes(asked.config, precision, asked.group)
    ratio = held_ratio(device, precision, asked.group)
    least = experts * moe.top_k // (moe.num_experts * len(moe.layers))
    budget = experts + math.floor(spare / ratio)
    return (budget, 0) if budget >= least else (0, round((least - budget) * ratio))
