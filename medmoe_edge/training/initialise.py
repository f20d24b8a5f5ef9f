"""Random checkpoints of named configurations: what has the right shapes and knows nothing."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from medmoe_edge.checkpoint.contrastive import write_modality_checkpoint
from medmoe_edge.checkpoint.keys import Shape, expected_parameters
from medmoe_edge.checkpoint.reader import write_checkpoint
from medmoe_edge.config import ModelConfig
from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.errors import InputError
from medmoe_edge.models.contrastive import ModalityMoE
from medmoe_edge.presets import MODALITY_PRESETS, PRESETS

WEIGHT_STD = 0.02

_CHUNK = 2**22  # values drawn at a time: bounds the fp32 scratch memory


def initialise(preset: str, out: Path, seed: int = 0, force: bool = False) -> None:
    """Write a random checkpoint of a preset in the official layout, one tensor in memory.

    Norms are ones and zeros, everything else is normal with standard deviation 0.02. Each tensor
    depends on the seed and its name alone; the router is one for all layers, as in the official
    checkpoints. A MedMoE is written in the folder of `write_modality_checkpoint`, as
    `random_modality_model` makes it.
    """
    if preset in MODALITY_PRESETS:
        model = random_modality_model(MODALITY_PRESETS[preset], seed)
        write_modality_checkpoint(out, model, force=force)
        return
    if preset not in PRESETS:
        known = ", ".join((*PRESETS, *MODALITY_PRESETS))
        raise InputError(f"There is no preset {preset!r}.", f"Use one of: {known}.")
    config = PRESETS[preset]
    write_checkpoint(out, config, random_tensors(config, seed), force=force)


def random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of `config` in bf16, routers in fp32, as `initialise` writes them."""
    for name, shape in expected_parameters(config).items():
        yield name, _random(name, shape, seed)


def _random(name: str, shape: Shape, seed: int) -> torch.Tensor:
    module, _, part = name.rpartition(".")
    if "norm" in module.rpartition(".")[-1]:  # norm, input_norm, norm1
        return torch.full(shape, float(part == "weight"), dtype=torch.bfloat16)
    router = module.endswith(".router")
    source = f"router.{part}" if router else name
    digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    tensor = torch.empty(shape, dtype=torch.float32 if router else torch.bfloat16)
    flat = tensor.view(-1)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        chunk.copy_(torch.randn(len(chunk), generator=generator) * WEIGHT_STD)
    return tensor


def random_modality_model(config: ModalityConfig, seed: int) -> ModalityMoE:
    """A MedMoE that knows nothing, ready to be trained.

    The towers' matrices are normal with standard deviation 0.02 and their biases zero, as in their
    papers; router and experts are as PyTorch makes them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ModalityMoE(config)
        for tower in (model.vision, model.text):
            for name, parameter in tower.named_parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=WEIGHT_STD)
                elif name.endswith("bias"):
                    torch.nn.init.zeros_(parameter)
    return model
