"""`medmoe-edge plan --fit`: the most exact form of a model that meets a device and a latency.

Precisions are tried from the most exact on; the first that fits in memory, be it with paged
experts, and answers in time is proposed, with the commands that make and run it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoe_edge.bundle.bundle import MANIFEST
from medmoe_edge.config import ModelConfig
from medmoe_edge.device.costs import TEXT_TOKENS, Precision
from medmoe_edge.device.estimate import Forecast, Plan, PlanOptions, model_config, plan
from medmoe_edge.device.hardware import Device, find_device
from medmoe_edge.embedded import EMBEDDED
from medmoe_edge.errors import InputError, ResourceError
from medmoe_edge.presets import PRESETS

EXACT_FIRST: tuple[Precision, ...] = ("fp32", "fp16", "int8", "mixed", "int4")
LARGE_GROUP = 128  # of int4 where groups of 32 are too slow or too large


@dataclass(frozen=True)
class Fit:
    """What is proposed: `forecast` in `latency` seconds, None where nothing meets it.

    `nearest` is then the fastest that fits in memory, and `image_tokens` how many it could have to
    meet the latency (0: not even without an image's). `resident_experts` of `experts` stay in
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
        own = dataclasses.asdict(self)
        own["device"] |= {"usable": self.device.usable}
        for name in ("forecast", "nearest"):
            found: Forecast | None = getattr(self, name)
            if found is not None:
                own[name] |= {"fits": found.fits, "answer": found.answer(self.new_tokens)}
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
        fewer = f"an image of at most {self.image_tokens} tokens, " if self.image_tokens else ""
        return ResourceError(
            f"{self.model} does not answer within {self.latency:g} s on {self.device.name}: "
            f"{self.nearest.precision} takes {took:.3g} s for {self.new_tokens} tokens.",
            f"It would take {fewer}a shorter answer (--new-tokens) or a faster device.",
        )


def fit(model: str, options: PlanOptions, latency: float) -> Fit:
    """Find the most exact form of a model that answers on a device within `latency` seconds.

    Raises `InputError` for a latency that is none and what `plan` refuses.
    """
    if not 0 < latency < float("inf"):
        raise InputError(f"A latency of {latency:g} s is none.", "Give seconds above 0.")
    _, config = model_config(model)
    forecasts = _forecasts(model, options)
    chosen = next((each for each in forecasts if _meets(each, options, latency)), None)
    fitting = [each for each in forecasts if each.fits]
    nearest = min(fitting, key=lambda each: each.answer(options.new_tokens), default=None)
    device = find_device(options.device)
    shown = chosen or nearest
    total = config.moe.num_experts * len(config.moe_layers) if config.moe else 0
    share = 1.0
    if shown and shown.expert_budget is not None and shown.experts:
        share = shown.expert_budget / shown.experts
    return Fit(
        model=model,
        device=device,
        latency=latency,
        new_tokens=options.new_tokens,
        forecast=chosen,
        nearest=None if chosen else nearest,
        image_tokens=config.vision.image_tokens
        if chosen
        else _image_tokens(config, nearest, options, latency),
        experts=total,
        resident_experts=int(total * share),
        commands=_commands(model, device, chosen) if chosen else (),
    )


def _forecasts(model: str, options: PlanOptions) -> list[Forecast]:
    """All forms, the most exact first; int4 in groups of 128 last."""
    made: Plan = plan(model, options)
    found = sorted(made.forecasts, key=lambda each: EXACT_FIRST.index(each.precision))
    if any(each.precision == "int4" for each in found) and options.group < LARGE_GROUP:
        larger = dataclasses.replace(options, precision="int4", group=LARGE_GROUP)
        found += plan(model, larger).forecasts
    return found


def _meets(forecast: Forecast, options: PlanOptions, latency: float) -> bool:
    return forecast.fits and forecast.answer(options.new_tokens) <= latency


def _image_tokens(
    config: ModelConfig, nearest: Forecast | None, options: PlanOptions, latency: float
) -> int:
    """The most image tokens with which the nearest would meet the latency.

    Vision and prefill are taken as proportional to the tokens that they are computed for.
    """
    if nearest is None:
        return 0
    image = config.vision.image_tokens
    prompt = options.prompt_tokens or image + TEXT_TOKENS
    text = prompt - image
    rest = latency - (options.new_tokens - 1) * nearest.token - nearest.prefill * text / prompt
    each = nearest.vision / image + nearest.prefill / prompt
    return max(0, min(image, int(rest / each)))


def _commands(model: str, device: Device, chosen: Forecast) -> tuple[str, ...]:
    """What makes and runs the chosen form."""
    if model not in EMBEDDED and (Path(model) / MANIFEST).exists():
        return (f'medmoe-edge ask scan.png "Is there effusion?" --model {model}',)
    source = "CHECKPOINT" if model in PRESETS and model not in EMBEDDED else model
    form = {"mixed": "--mixed 6", "fp16": "--fp32"}.get(chosen.precision, f"--{chosen.precision}")
    if chosen.precision == "int4" and chosen.group != 32:
        form += f" --group-size {chosen.group}"
    if chosen.precision in ("int8", "int4", "mixed"):
        form += " --calibrate DATA"
    export = f"medmoe-edge export {source} {form} -o portable"
    asked = 'medmoe-edge ask scan.png "Is there effusion?" --model '
    budget = ""
    if chosen.expert_budget is not None:
        budget = f" --memory-budget {chosen.expert_budget // 10**6}MB"
    if device.kind == "cpu":
        return (export, f"{asked}portable{budget}")
    target = "tensorrt" if device.kind == "jetson" else "tensorrt-rtx"
    gpu = f" --gpu {device.name}" if device.kind == "gpu" else ""
    paged = " --paged" if budget else ""
    build = f"medmoe-edge export portable --target {target}{gpu}{paged} -o engines"
    return (export, build, f"{asked}engines{budget}")
