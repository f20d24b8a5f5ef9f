"""From the names of a model and a device to a plan."""

from pathlib import Path
from typing import TYPE_CHECKING

from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.config import ModelConfig
from medmoe_edge.device.costs import Precision
from medmoe_edge.device.devices import HERE, find_device
from medmoe_edge.device.estimate import Plan, make_plan, precisions
from medmoe_edge.embedded import EMBEDDED, bundle_path
from medmoe_edge.errors import InputError, MissingDependencyError, ModelError
from medmoe_edge.presets import PRESETS

if TYPE_CHECKING:
    from medmoe_edge.device.measured import Comparison


def plan(model: str, device: str, precision: Precision | None = None) -> Plan:
    """Plan a bundle, a checkpoint folder, an embedded model or a preset on a device.

    The device `here` is this CPU: measured, a few seconds. It, checkpoints and presets need the
    extra `export`. Raises `InputError` for an unknown device, `ModelError` for an unknown model.
    """
    found = find_device(device)
    name, config = model_config(model)
    wanted = precisions(found, precision)
    if found.ratings is not None:
        return make_plan(name, config, found, precision=precision)
    try:
        from medmoe_edge.device.measure import measure_speeds
    except ModuleNotFoundError as error:
        raise _missing(error) from error
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
    try:
        from medmoe_edge.device.measure import measure_speeds
        from medmoe_edge.device.measured import compare
    except ModuleNotFoundError as error:
        raise _missing(error) from error
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
        return folder.resolve().name, _checkpoint_config(folder)
    if model not in PRESETS:
        known = ", ".join(dict.fromkeys((*EMBEDDED, *PRESETS)))
        raise ModelError(
            f"There is no model {model!r}.", f"Give a bundle or checkpoint folder, or: {known}."
        )
    return model, PRESETS[model]


def _checkpoint_config(folder: Path) -> ModelConfig:
    try:
        from medmoe_edge.checkpoint.reader import read_checkpoint
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return read_checkpoint(folder).config


def _missing(error: ModuleNotFoundError) -> MissingDependencyError:
    return MissingDependencyError((error.name or "torch").partition(".")[0], "export")
