"""`medmoe-edge plan`: what a model will need and how fast it will be, before it is exported.

A roofline: each part of the decoder takes as long as its bytes and its operations do (on a CPU
whichever is longer), and each layer a fixed time beside that (Williams et al., CACM 52(4), 2009).
Of a named device the rates are the maker's figures times what programs reach of them; of this
machine they are measured (`device.measure`). Only configurations are read, never weights.

A model that does not fit whole is forecast with the experts that fit, and then costs what paging
costs. `fit` goes the other way: from a wished latency to the most exact form that meets it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.bundle.trust import keys_are_trusted
from medmoe_edge.calibration.quantisers import DeltaForm, read_deltas
from medmoe_edge.checkpoint.keys import decoder_parameters
from medmoe_edge.config import ModelConfig, VisionScales
from medmoe_edge.device.hardware import (
    CPU_PRECISIONS,
    DEVICES,
    GPU_PRECISIONS,
    HERE,
    Device,
    engine_of,
    find_device,
    nominal_speeds,
)
from medmoe_edge.embedded import EMBEDDED, bundle_path
from medmoe_edge.errors import (
    InputError,
    ModelError,
    ResourceError,
    Told,
    did_you_mean,
    needs,
    shown_bytes,
)
from medmoe_edge.export.gpus import MOST_ENGINES, build_memory
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.costs import (
    COPIES,
    GROUP,
    NEW_TOKENS,
    NUMBER,
    TEXT_TOKENS,
    Asked,
    Deltas,
    Precision,
    Speed,
    decoder_bytes,
    experts_bytes,
    held_ratio,
    memory_run,
    paging_cost,
    prompt_tokens,
    step_seconds,
    switch_bytes,
    vision_in_8_bits,
    vision_seconds,
)

if TYPE_CHECKING:
    from medmoe_edge.device.measure import Comparison

EXPORT_BYTES = 300 * 10**6  # Python and PyTorch, beside the largest tensor in fp32
EXACT_FIRST: tuple[Precision, ...] = ("fp32", "fp16", "int8", "mixed", "int4")
LARGE_GROUP = 128  # of int4 where groups of 32 are too slow or too large


@dataclass(frozen=True)
class Forecast(Told):
    """One precision on one device: bytes, seconds, and whether it fits.

    `memory_run` is the peak with all experts resident; `weights`, of which `experts` are the routed
    ones', are the decoder's bytes as they are stored. `memory_build` bounds the export's or the
    engine builder's. `first_token` is vision and prefill. `group` weights of int4 share a scale.
    `expert_budget` is what `--memory-budget` may keep resident of `experts`: None where the model
    fits whole, 0 where it does not fit even so, and then `short` bytes are missing. The seconds
    are `paging_cost` times what they would be with all experts resident (1 where it does not fit).
    `switch_bytes` are what paging reads where the modality changes.
    """

    TOLD = ("fits",)

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
    switch_bytes: int

    def answer(self, new_tokens: int) -> float:
        """Seconds from a question to an answer of so many tokens."""
        return self.first_token + (new_tokens - 1) * self.token

    @property
    def fits(self) -> bool:
        """Whether it runs on the device, be it with paging."""
        return not self.short


@dataclass(frozen=True)
class Plan(Told):
    """The forecasts of all precisions for one model and device."""

    model: str
    device: Device
    prompt_tokens: int
    new_tokens: int
    forecasts: tuple[Forecast, ...]
    left_out: tuple[str, ...] = ()  # modalities whose experts the model has no more

    def error(self) -> ResourceError | None:
        """Where nothing fits: by how much, and what would."""
        if any(forecast.fits for forecast in self.forecasts):
            return None
        least = min(self.forecasts, key=lambda forecast: forecast.short)
        needed = self.device.usable + least.short
        rooms = [device for device in DEVICES.values() if device.usable >= needed]
        larger = min(rooms, key=lambda device: device.usable).name if rooms else "a larger device"
        return ResourceError(
            f"{self.model} does not fit {self.device.name}: even in {least.precision} and paged "
            f"where it can be, it lacks {shown_bytes(least.short)}.",
            f"It would fit {larger}, or any with {shown_bytes(needed)} free.",
        )


@dataclass(frozen=True)
class PlanOptions:
    """What is planned.

    Attributes:
        device: A name of `devices.DEVICES`, a file that describes one (`devices.read_device`), or
            "here" for this CPU, which is measured for a few seconds and needs the extra `export`.
        precision: Only this one; all that the device offers by default.
        group: Weights of int4 that share a scale: 32, 64 or 128; None: 32, or as a bundle has them.
        prompt_tokens: Positions of the prompt, those of the image among them; None: a short
            question about one image.
        new_tokens: Tokens of the answer.
        experts: How routed experts are stored, see `read_deltas`; None: whole, or as a bundle has
            them.
        image_tokens: As of `ExportOptions`.
        vision: As of `ExportOptions`; None: "groups", or as a bundle has them.
    """

    device: str
    precision: Precision | None = None
    group: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int = NEW_TOKENS
    experts: str | None = None
    image_tokens: int | None = None
    vision: VisionScales | None = None


def plan(model: str, options: PlanOptions) -> Plan:
    """Predict what a model needs on a device, and how fast it will be.

    Args:
        model: A bundle, a checkpoint folder, an embedded model or a preset. A checkpoint needs the
            extra `export`.
        options: The device, and what is asked of it.

    Returns:
        A forecast for each precision.

    Raises:
        InputError: The device is unknown, does not offer the precision, or the prompt is too long;
            or a bundle is asked for what was decided when it was made.
        ModelError: The model is unknown.
        MissingDependencyError: The extra is not installed.
    """
    found = find_device(options.device)
    name, stored = _planned(model, options)
    wanted = precisions(found, options)
    if found.ratings is not None:
        return make_plan(name, stored, found, options)
    with needs("export"):
        from medmoe_edge.device.measure import measure_speeds
    speeds = measure_speeds(stored.config, {*wanted, "fp32"})
    return make_plan(name, stored, found, options, speeds=speeds)


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
    made = make_plan(bundle.name, Asked.of_bundle(bundle), device, options, speeds=speeds)
    return made, comparison


def model_stored(model: str) -> tuple[str, Asked]:
    """A model's name, and its configuration as a bundle stores it, or as an export does."""
    if model in EMBEDDED or Path(model).is_dir():
        folder = bundle_path(model)
        if (folder / MANIFEST).exists():
            bundle = Bundle.open(folder, verify=keys_are_trusted())
            return bundle.name, Asked.of_bundle(bundle)
        with needs("export"):
            from medmoe_edge.checkpoint.reader import read_checkpoint
        return folder.resolve().name, _usual(read_checkpoint(folder).config)
    if model not in PRESETS:
        names = list(dict.fromkeys((*EMBEDDED, *PRESETS)))
        raise ModelError(
            f"There is no model {model!r}.",
            f"{did_you_mean(model, names)}Give a bundle or checkpoint folder, or: "
            f"{', '.join(names)}.",
        )
    return model, _usual(PRESETS[model])


def _usual(config: ModelConfig) -> Asked:
    """As an export stores a model unless it is asked for something else."""
    return Asked(config, prompt_tokens(config))


def _planned(model: str, options: PlanOptions) -> tuple[str, Asked]:
    """As `model_stored` says, with the image tokens that are asked for."""
    name, stored = model_stored(model)
    decided = (options.experts, options.image_tokens, options.vision)
    if decided != (None, None, None) and _is_bundle(model):
        raise InputError(
            f"{model} is a bundle: its experts, image tokens and tower were decided when it was "
            "made.",
            "Leave --experts, --image-tokens and --vision out, or give the checkpoint.",
        )
    if options.image_tokens is not None:
        vision = stored.config.vision.with_tokens(options.image_tokens)
        stored = _usual(replace(stored.config, vision=vision))
    return name, stored


def _is_bundle(model: str) -> bool:
    """Whether it is a bundle's folder; an embedded model is a checkpoint, too."""
    return model not in EMBEDDED and (Path(model) / MANIFEST).exists()


def make_plan(
    model: str,
    stored: Asked,
    device: Device,
    options: PlanOptions,
    *,
    speeds: Mapping[Precision, Speed] | None = None,
) -> Plan:
    """Forecast a model on a device, for one precision or all that it offers.

    `speeds`, by precision and with those of fp32 for the vision tower, are the measured ones of a
    device without ratings; `stored` is the model as a bundle has it, or an export makes it. Raises
    `InputError` for a precision that it does not offer, for deltas or a scale per token beside what
    runs them, and for a prompt that leaves no room for an answer.
    """
    config, on_cpu = stored.config, device.kind == "cpu"
    prompt = options.prompt_tokens or stored.prompt
    image, most = config.vision.image_tokens, config.decoder.max_positions
    room = most - options.new_tokens
    if not image < prompt <= room:
        answer, asked = (
            f"an answer of at most {most - image - 1}",
            f"a prompt of {image + 1} to {room}",
        )
        raise InputError(
            f"A prompt of {prompt} tokens and an answer of {options.new_tokens} do not go with "
            f"{image} image tokens and {most} positions.",
            f"Give {asked if room > image else answer} tokens.",
        )
    speeds = speeds or nominal_speeds(device)
    moe, form = config.moe, None if options.experts is None else read_deltas(options.experts)
    if form and (moe is None or not moe.meta_expert or moe.merged):
        raise InputError("Deltas are of models with a meta expert.", "Leave --experts out.")
    if options.vision == "tokens" and not vision_in_8_bits(config, "int8", NUMBER[device.kind]):
        raise InputError(
            "A scale per token is for a vision transformer in 8 bits, on a CPU.",
            "Leave --vision out: convolutions, and towers on GPUs, stay in fp16.",
        )

    def work(precision: Precision) -> Asked:
        group = options.group or stored.group
        deltas = Deltas.of(form, config, precision, group) if form else stored.deltas
        deltas = deltas if on_cpu or deltas is None else deltas.on_gpu()
        vision = options.vision or stored.vision
        return Asked(config, prompt, options.new_tokens, group, deltas, vision)

    forecasts = tuple(
        forecast(work(each), device, each, speeds) for each in precisions(device, options)
    )
    left_out = config.moe.left_out if config.moe else ()
    return Plan(model, device, prompt, options.new_tokens, forecasts, left_out)


def precisions(device: Device, options: PlanOptions) -> tuple[Precision, ...]:
    """What a device offers and an export takes beside the form of deltas, or the one wanted."""
    offered = CPU_PRECISIONS if device.kind == "cpu" else GPU_PRECISIONS
    wanted, beside = options.precision, ""
    if options.experts is not None:
        form, beside = read_deltas(options.experts), f" with {options.experts}"
        offered = tuple(each for each in offered if _takes(each, form, options.group or GROUP))
    if options.vision == "tokens":
        beside += " with a scale per token"
        offered = tuple(each for each in offered if each not in ("fp32", "fp16"))
    if wanted is None:
        return offered
    if wanted not in offered:
        raise InputError(
            f"{device.name} is not planned in {wanted}{beside}.",
            f"Use one of: {', '.join(offered)}.",
        )
    return (wanted,)


def _takes(precision: Precision, form: DeltaForm, group: int) -> bool:
    """Whether an export takes a form of deltas; `export.plan.check_deltas` refuses the rest."""
    return precision != "mixed" and not (precision == "int4" and (form.rank or 0) % group)


def forecast(
    asked: Asked, device: Device, precision: Precision, speeds: Mapping[Precision, Speed]
) -> Forecast:
    """Predict memory and time of one precision."""
    config, prompt = asked.config, asked.prompt
    storage = asked.group, asked.deltas
    speed = speeds[precision]
    middle = prompt + asked.new_tokens // 2  # the cache is as long as that on average
    weights, experts = decoder_bytes(asked, precision), experts_bytes(asked, precision)
    memory = memory_run(asked, device.kind, precision)
    budget, short = _expert_budget(asked, device, precision, memory)
    cost = 1.0 if not budget else paging_cost(budget / experts)
    floats = NUMBER[device.kind], speeds["fp32"]
    vision = cost * vision_seconds(config, precision, *floats, asked.vision)
    prefill = cost * step_seconds(config, precision, speed, prompt, 0, *storage)
    token = cost * step_seconds(config, precision, speed, 1, middle, *storage)
    return Forecast(
        precision=precision,
        group=asked.group,
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
        switch_bytes=switch_bytes(asked, precision),
    )


def _build_memory(config: ModelConfig, device: Device, weights: int) -> int:
    """Peak bytes of the export, which streams, or of an engine's build."""
    if device.kind != "cpu":
        whole = build_memory(weights)
        return whole if whole <= device.usable else build_memory(weights // MOST_ENGINES)
    largest = max(rows[0] * rows[-1] for rows in decoder_parameters(config).values())
    return EXPORT_BYTES + 4 * largest


def _expert_budget(
    asked: Asked, device: Device, precision: Precision, memory: int
) -> tuple[int | None, int]:
    """What paging may keep of the stored experts, and how many bytes of memory are missing.

    At least what a token chooses must be resident: on a GPU, whose steps do not stop, in all
    layers; on a CPU in one, beside the loading of one. TensorRT proper pages none.
    """
    spare = device.usable - memory
    if spare >= 0:
        return None, 0
    moe = asked.config.moe
    whole = device.kind != "cpu" and engine_of(device)[0] == "tensorrt"
    if whole or moe is None or moe.merged or (asked.deltas and not asked.deltas.paged):
        return 0, -spare
    experts, layers = experts_bytes(asked, precision), len(moe.layers)
    ratio = held_ratio(device.kind, precision, asked)
    chosen = moe.top_k + COPIES / ratio if device.kind == "cpu" else moe.top_k * layers
    least = math.ceil(experts * chosen / (moe.num_experts * layers))
    budget = experts + math.floor(spare / ratio)
    return (budget, 0) if budget >= least else (0, round((least - budget) * ratio))


@dataclass(frozen=True)
class Fit(Told):
    """What is proposed: `forecast` in `latency` seconds, None where nothing meets it.

    `nearest` is then the fastest that fits in memory, and `image_tokens` the most with which it
    would meet the latency (0: no number that it can have). `resident_experts` of `experts` stay in
    memory. `commands` make and run what is proposed.
    """

    model: str
    device: Device
    latency: float
    new_tokens: int
    forecast: Forecast | None
    nearest: Forecast | None
    image_tokens: int
    experts: int
    resident_experts: int
    commands: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; bytes and seconds."""
        own = super().to_json()
        for name, found in (("forecast", self.forecast), ("nearest", self.nearest)):
            if found is not None:
                own[name]["answer"] = found.answer(self.new_tokens)
        return own

    def error(self) -> ResourceError | None:
        """Where nothing meets the latency: what comes nearest, and what would help."""
        if self.forecast is not None:
            return None
        if self.nearest is None:
            return ResourceError(
                f"{self.model} does not fit {self.device.name} in any precision.",
                f"See how much is missing: medmoe-edge plan {self.model} --device "
                f"{self.device.name}",
            )
        took = self.nearest.answer(self.new_tokens)
        tokens = self.image_tokens
        fewer = f"{tokens} image tokens (export --image-tokens), " if tokens else ""
        return ResourceError(
            f"{self.model} does not answer within {self.latency:g} s on {self.device.name}: "
            f"{self.nearest.precision} takes {took:,.2f} s for {self.new_tokens} tokens.",
            f"It would take {fewer}a shorter answer (--new-tokens) or a faster device.",
        )


def fit(model: str, options: PlanOptions, latency: float) -> Fit:
    """Find the most exact form of a model that answers on a device within `latency` seconds.

    Raises `InputError` for a latency that is none and what `plan` refuses.
    """
    if not 0 < latency < float("inf"):
        raise InputError(f"A latency of {latency:g} s is none.", "Give seconds above 0.")
    config = _planned(model, options)[1].config
    fitting = [each for each in _forecasts(model, options) if each.fits]
    chosen = next((each for each in fitting if each.answer(options.new_tokens) <= latency), None)
    nearest = min(fitting, key=lambda each: each.answer(options.new_tokens), default=None)
    device, tokens = find_device(options.device), config.vision.image_tokens
    shown = chosen or nearest
    total = config.moe.num_experts * len(config.moe_layers) if config.moe else 0
    resident = total
    if shown and shown.expert_budget is not None and shown.experts:
        loading = COPIES if device.kind == "cpu" else 0  # which takes the place of so many
        resident = max(total * shown.expert_budget // shown.experts - loading, 1)
    return Fit(
        model=model,
        device=device,
        latency=latency,
        new_tokens=options.new_tokens,
        forecast=chosen,
        nearest=None if chosen else nearest,
        image_tokens=tokens if chosen else _image_tokens(config, nearest, options, latency),
        experts=total,
        resident_experts=resident,
        commands=_commands(model, device, chosen, options) if chosen else (),
    )


def _forecasts(model: str, options: PlanOptions) -> list[Forecast]:
    """All forms, the most exact first; int4 in groups of 128 last."""
    made = plan(model, options)
    found = sorted(made.forecasts, key=lambda each: EXACT_FIRST.index(each.precision))
    larger = replace(options, precision=None, group=LARGE_GROUP)
    offered = {each.precision for each in found} & {*precisions(made.device, larger)}
    if "int4" in offered and (options.group or GROUP) < LARGE_GROUP:
        found += plan(model, replace(larger, precision="int4")).forecasts
    return found


def _image_tokens(
    config: ModelConfig, nearest: Forecast | None, options: PlanOptions, latency: float
) -> int:
    """The most image tokens, of the numbers that there could be, to meet the latency with: 0, none.

    Prefill is taken as proportional to the tokens; the tower computes the same for any number.
    """
    if nearest is None:
        return 0
    image = config.vision.image_tokens
    prompt = options.prompt_tokens or image + TEXT_TOKENS
    rest = latency - nearest.answer(options.new_tokens) + nearest.prefill * image / prompt
    fewer = [count for count in config.vision.token_counts if count < image]
    return max((count for count in fewer if nearest.prefill * count / prompt <= rest), default=0)


def _commands(
    model: str, device: Device, chosen: Forecast, options: PlanOptions
) -> tuple[str, ...]:
    """What makes and runs the chosen form."""
    if _is_bundle(model):
        return (f'medmoe-edge ask scan.png "Is there effusion?" --model {model}',)
    source = "CHECKPOINT" if model in PRESETS and model not in EMBEDDED else model
    form = {"mixed": "--mixed 6", "fp16": "--fp32"}.get(chosen.precision, f"--{chosen.precision}")
    if chosen.precision == "int4" and chosen.group != 32:
        form += f" --group-size {chosen.group}"
    experts = options.experts
    if experts is not None:
        form += f" --experts {experts}"
    if options.image_tokens is not None:
        form += f" --image-tokens {options.image_tokens}"
    if options.vision == "tokens":
        form += " --vision tokens"
    searched = experts is not None and read_deltas(experts).budget is not None
    if searched or chosen.precision in ("int8", "int4", "mixed"):
        form += " --calibrate DATA"
    export = f"medmoe-edge export {source} {form} -o portable"
    asked = 'medmoe-edge ask scan.png "Is there effusion?" --model '
    budget = ""
    if chosen.expert_budget is not None:
        percent = math.floor(1e4 * chosen.expert_budget / chosen.experts) / 100
        budget = f" --memory-budget {percent:g}%"
    if device.kind == "cpu":
        return (export, f"{asked}portable{budget}")
    target, gpu = engine_of(device)
    paged = " --paged" if budget else ""
    build = f"medmoe-edge export portable --target {target} --gpu {gpu}{paged} -o engines"
    return (export, build, f"{asked}engines{budget}")
