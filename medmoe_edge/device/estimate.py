"""`medmoe-edge plan`: what a model will need and how fast it will be, before it is exported.

A roofline: each part of the decoder takes as long as its bytes or its operations do, whichever is
longer, and each layer a fixed time beside that (Williams et al., CACM 52(4), 2009). Of a named
device the rates are the maker's figures times what programs reach of them; of this machine they are
measured (`device.measure`). Only configurations are read, never weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.checkpoint.keys import decoder_parameters
from medmoe_edge.config import ModelConfig
from medmoe_edge.device.costs import (
    NEW_TOKENS,
    Precision,
    Speed,
    bits_per_weight,
    cache_values,
    decoder_parts,
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
# What programs reach of a maker's figures; assumed, to be measured on the device.
REACHED_BANDWIDTH = {"gpu": 0.75, "jetson": 0.65, "cpu": 0.6}
REACHED_COMPUTE = {"gpu": 0.5, "jetson": 0.4, "cpu": 0.4}
CONVOLUTION = 0.5  # of matrix products' rate: depthwise layers are bound by memory
VISION_INT8 = 1.5  # times the rate of fp32: a transformer with its matrices in 8 bits, measured
LAYER_SECONDS = {"gpu": 30e-6, "jetson": 60e-6, "cpu": 60e-6}  # launches or dispatch of a layer
NUMBER = {"gpu": 2, "jetson": 2, "cpu": 4}  # bytes of an activation: fp16, or fp32
# Bytes of the process without a model: Python and ONNX Runtime; CUDA's context and TensorRT besides
PROCESS = {"gpu": 600 * 10**6, "jetson": 600 * 10**6, "cpu": 110 * 10**6}
EXPORT_BYTES = 300 * 10**6  # Python and PyTorch, beside the largest tensor in fp32
CPU_PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "mixed", "fp32")
GPU_PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "mixed", "fp16")


@dataclass(frozen=True)
class Forecast:
    """One precision on one device: bytes, seconds, and whether it fits.

    `memory_run` is the peak with all experts resident, of which `weights` are the decoder's;
    `memory_build` bounds the export's or the engine builder's. `first_token` is vision and prefill.
    `expert_budget` is what paging may keep resident of `experts` bytes: None where the model fits
    whole, 0 where it does not fit even so, and then `short` bytes are missing.
    """

    precision: Precision
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
    forecasts: tuple[Forecast, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; bytes and seconds."""
        own = asdict(self)
        own["device"] |= {"usable": self.device.usable}
        for told, forecast in zip(own["forecasts"], self.forecasts, strict=True):
            told["fits"] = forecast.fits
        return {**own, "new_tokens": NEW_TOKENS}

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


def plan(model: str, device: str, precision: Precision | None = None) -> Plan:
    """Predict what a model needs on a device, and how fast it will be.

    Args:
        model: A bundle, a checkpoint folder, an embedded model or a preset. A checkpoint needs the
            extra `export`.
        device: A name of `devices.DEVICES`, or "here" for this CPU, which is measured for a few
            seconds and needs the extra `export`.
        precision: Only this one; all that the device offers by default.

    Returns:
        A forecast for each precision.

    Raises:
        InputError: The device is unknown, or does not offer the precision.
        ModelError: The model is unknown.
        MissingDependencyError: The extra is not installed.
    """
    found = find_device(device)
    name, config = model_config(model)
    wanted = precisions(found, precision)
    if found.ratings is not None:
        return make_plan(name, config, found, precision=precision)
    with needs("export"):
        from medmoe_edge.device.measure import measure_speeds
    speeds = measure_speeds(config, {*wanted, "fp32"})
    return make_plan(name, config, found, precision=precision, speeds=speeds)


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
    device = find_device(HERE)
    made = make_plan(bundle.name, bundle.config, device, precision=precision, speeds=speeds)
    return made, comparison


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
    *,
    precision: Precision | None = None,
    speeds: Mapping[Precision, Speed] | None = None,
) -> Plan:
    """Forecast a model on a device, for one precision or all that it offers.

    `speeds`, by precision and with those of fp32 for the vision tower, are the measured ones of a
    device without ratings. Raises `InputError` for a precision that it does not offer.
    """
    speeds = speeds or nominal_speeds(device)
    forecasts = tuple(
        forecast(config, device, each, speeds) for each in precisions(device, precision)
    )
    return Plan(model, device, prompt_tokens(config), forecasts)


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
    rated = device.ratings
    assert rated is not None
    byte = 1 / (rated.bandwidth * REACHED_BANDWIDTH[device.kind])
    floats = 1 / (rated.fp16 * REACHED_COMPUTE[device.kind])
    integers = 1 / (rated.int8 * REACHED_COMPUTE[device.kind])
    layer, number = LAYER_SECONDS[device.kind], NUMBER[device.kind]

    def speed(operation: float) -> Speed:
        return Speed(byte, operation, floats, dense=layer, moe=2 * layer, number=number)

    if device.kind == "cpu":
        return {name: speed(integers if name == "int8" else floats) for name in CPU_PRECISIONS}
    return {name: speed(floats) for name in (*GPU_PRECISIONS, "fp32")}


def forecast(
    config: ModelConfig, device: Device, precision: Precision, speeds: Mapping[Precision, Speed]
) -> Forecast:
    """Predict memory and time of one precision."""
    prompt, speed = prompt_tokens(config), speeds[precision]
    prefill = step_seconds(config, precision, speed, prompt, 0)
    token = step_seconds(config, precision, speed, 1, prompt + NEW_TOKENS // 2)
    vision = vision_seconds(config, precision, NUMBER[device.kind], speeds["fp32"])
    weights, experts = decoder_bytes(config, precision), experts_bytes(config, precision)
    memory = _memory(config, device, precision, weights)
    budget, short = _expert_budget(config, device.usable - memory, experts)
    return Forecast(
        precision,
        weights,
        experts,
        memory,
        _build_memory(config, device, weights),
        vision,
        prefill,
        vision + prefill,
        token,
        1 / token,
        budget,
        short,
    )


def vision_seconds(config: ModelConfig, precision: Precision, number: int, speed: Speed) -> float:
    """Seconds of the vision tower and the projector, from the speed of floats of `number` bytes."""
    rate = 1.0 if config.vision.kind == "clip" else CONVOLUTION
    if vision_in_8_bits(config, precision, number):
        rate = VISION_INT8
    return vision_operations(config) * speed.operation / rate


def decoder_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes of the decoder's weights without the embedding, which is mapped, not loaded."""
    return round(
        sum(
            part.weights * bits_per_weight(kind, precision) / 8
            for kind, part in decoder_parts(config).items()
            if kind != "embedding"
        )
    )


def experts_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes of the routed experts, which paging may leave on disk."""
    part = decoder_parts(config).get("experts")
    return round(part.weights * bits_per_weight("experts", precision) / 8) if part else 0


def _memory(config: ModelConfig, device: Device, precision: Precision, weights: int) -> int:
    """Peak bytes while running: process, weights, KV cache, activations of the prefill."""
    number = NUMBER[device.kind]
    prompt, decoder = prompt_tokens(config), config.decoder
    cache = cache_values(config, prompt + NEW_TOKENS)
    live = prompt * (8 * decoder.hidden_size + 3 * decoder.intermediate_size)
    vision = vision_bytes(config, precision, number)
    return PROCESS[device.kind] + weights + vision + number * (cache + live)


def _build_memory(config: ModelConfig, device: Device, weights: int) -> int:
    """Peak bytes of the export, which streams, or of an engine's build."""
    if device.kind != "cpu":
        return build_memory(weights)
    largest = max(rows[0] * rows[-1] for rows in decoder_parameters(config).values())
    return EXPORT_BYTES + 4 * largest


def _expert_budget(config: ModelConfig, spare: int, experts: int) -> tuple[int | None, int]:
    """What paging may keep of the experts, and what is missing; `spare` is negative if too large.

    At least the experts that one layer chooses for a token must be resident.
    """
    if spare >= 0:
        return None, 0
    moe = config.moe
    if moe is None:
        return 0, -spare
    least = experts * moe.top_k // (moe.num_experts * len(moe.layers))
    budget = experts + spare
    return (budget, 0) if budget >= least else (0, least - budget)
