"""A training run on disk: weights and optimiser moments as safetensors, written atomically.

Accelerate's own `save_state` pickles; nothing here is ever unpickled.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medmoe_edge.errors import DataError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, epoch: int) -> None:
    """Write everything needed to go on after `epoch`; a killed write leaves the old file."""
    tensors = {f"module.{key}": value.contiguous() for key, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for moment, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{moment}.{name}"] = value.contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"epoch": str(epoch)})
    os.replace(partial, path)


def load_state(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Continue from `path`; returns the number of epochs that are done."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # safe_open is no dict
            epoch = int(file.metadata()["epoch"])
        module.load_state_dict(
            {key.removeprefix("module."): t for key, t in tensors.items() if key.startswith("module.")}
        )
        for name, parameter in module.named_parameters():
            # a parameter that never learned, such as an expert no token reached, has no moments
            if f"optimiser.step.{name}" in tensors:
                optimiser.state[parameter] = {
                    moment: tensors[f"optimiser.{moment}.{name}"] for moment in MOMENTS
                }
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise DataError(
            f"The training state {path.name} does not fit this recipe.",
            "Use the recipe it was made with, or start in a new folder.",
        ) from error
    return epoch

