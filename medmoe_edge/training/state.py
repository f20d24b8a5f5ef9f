"""A training run on disk: weights and optimiser moments as safetensors, written atomically.

Accelerate's own `save_state` pickles; nothing here is ever unpickled.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medmoe_edge.errors import DataError, ResourceError

RANDOM = "random_state"


def save_state(
    path: Path, module: nn.Module, optimisers: Sequence[torch.optim.Optimizer], epoch: int
) -> None:
    """Write everything needed to go on after `epoch` epochs; a killed write leaves the old file.

    Raises `ResourceError` where it cannot be written.
    """
    tensors = {f"module.{key}": value.contiguous() for key, value in module.state_dict().items()}
    tensors[RANDOM] = torch.get_rng_state()  # the next phase may draw its first weights from here
    for name, parameter in module.named_parameters():
        for optimiser in optimisers:
            for moment, value in optimiser.state.get(parameter, {}).items():
                tensors[f"optimiser.{moment}.{name}"] = value.contiguous()
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"epoch": str(epoch)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"The training state {path.name} cannot be written ({error}).",
            "Free some space and start again: training goes on where it was.",
        ) from error


def load_state(path: Path, module: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> int:
    """Continue from `path`; returns the number of epochs that are done.

    Raises `DataError` for a damaged file or one of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # safe_open is no dict
            epoch = int(file.metadata()["epoch"])
        own = {key: tensor for key, tensor in tensors.items() if key.startswith("module.")}
        module.load_state_dict({key.removeprefix("module."): t for key, t in own.items()})
        names = {parameter: name for name, parameter in module.named_parameters()}
        for optimiser in optimisers:
            for parameter in (p for group in optimiser.param_groups for p in group["params"]):
                optimiser.state[parameter] = _moments(tensors, names[parameter])
        if RANDOM in tensors:
            torch.set_rng_state(tensors[RANDOM])
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"The training state {path.name} is damaged or of another recipe.",
            "Use the recipe it was made with, or start in a new folder.",
        ) from error
    return epoch


def _moments(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """An optimiser's state of one parameter; empty if it never learned, as an unused expert."""
    keys = (key.split(".", 2) for key in tensors if key.startswith("optimiser."))
    return {moment: tensors[f"optimiser.{moment}.{own}"] for _, moment, own in keys if own == name}
