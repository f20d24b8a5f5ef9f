"""The one training loop: cosine, accumulation, adapters, logs, and resuming from disk.

Muon trains the matrices inside decoder, Swin and BERT, AdamW the rest. Muon orthogonalises the
momentum of a matrix (https://kellerjordan.github.io/posts/muon), which reaches a given loss in
clearly fewer steps when a small model starts from nothing. Its steps are scaled to AdamW's
(https://arxiv.org/abs/2502.16982), so one learning rate serves both.

Weights and optimiser moments are kept as safetensors, written atomically. Accelerate's own
`save_state` pickles; nothing here is ever unpickled.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.data import DataLoader

from medmoe_edge.checkpoint.keys import is_router
from medmoe_edge.errors import DataError, MissingDependencyError, ResourceError, of_machine
from medmoe_edge.training.recipe import PrecisionChoice, Schedule
from medmoe_edge.training.report import (
    LOG,
    PRECISION,
    ChosenPrecision,
    RunReport,
    Say,
    choose_precision,
    described,
)

_INNER = ("model.decoder.layers.", "model.text.layers.", "model.vision.stages.")


class Fp32Muon(Muon):
    """Muon that orthogonalises in fp32; torch's does in bf16, which many processors emulate.

    Takes the groups, options and state of `torch.optim.Muon` with `adjust_lr_fn` "match_rms_adamw".
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; `closure` is not called, as none of our callers has one."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(buffer, momentum)  # Nesterov
                update = _orthogonal(update, group["ns_coefficients"], group["ns_steps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate * 0.2 * math.sqrt(max(parameter.shape)))


def _orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Nearly the orthogonal factor of a matrix, by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    x = matrix / matrix.norm().clamp(min=1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    result: Tensor = wide if x.shape[0] <= x.shape[1] else wide.T
    return result


def make_optimisers(objective: nn.Module, phase: Schedule, *, bf16: bool = True) -> list[Optimizer]:
    """The optimisers of what `phase` trains; a group's `rate` is its share of the learning rate.

    Without `bf16` none of them computes in it.
    """
    learning = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    muons = {name for name, p in learning if phase.optimiser == "muon" and _for_muon(name, p)}
    matrices = [p for name, p in learning if name in muons]
    others = [(name, p) for name, p in learning if name not in muons]
    optimisers: list[Optimizer] = []
    if matrices:
        group = {"params": matrices, "rate": phase.matrix_rate}
        muon = (Muon if bf16 else Fp32Muon)(
            [group],
            phase.learning_rate,
            weight_decay=phase.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimisers.append(muon)
    if others:
        optimisers.append(AdamW(_groups(others, phase), phase.learning_rate, (0.9, 0.98)))
    return optimisers


def set_learning_rate(optimisers: list[Optimizer], rate: float) -> None:
    """Give every group its share of `rate`."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate * group["rate"]


def _for_muon(name: str, parameter: nn.Parameter) -> bool:
    # a Swin's offset biases are a table, an adapter's two matrices are one in two parts, and the
    # kernels of a convolutional tower have four dimensions
    if name.endswith("offset_bias") or ".lora_" in name:
        return False
    return name.startswith(_INNER) and parameter.ndim == 2


def _groups(parameters: list[tuple[str, nn.Parameter]], phase: Schedule) -> list[dict[str, object]]:
    """Matrices decay, vectors do not; the tower learns at its own rate."""

    def kind(item: tuple[str, nn.Parameter]) -> tuple[bool, bool]:
        return item[0].startswith("model.vision."), item[1].ndim > 1

    return [
        {
            "params": [parameter for _, parameter in group],
            "rate": phase.tower_rate if tower else 1.0,
            "weight_decay": phase.weight_decay if decays else 0.0,
        }
        for (tower, decays), group in groupby(sorted(parameters, key=kind), kind)
    ]


RANDOM = "random_state"


def save_state(
    path: Path, module: nn.Module, optimisers: Sequence[torch.optim.Optimizer], epoch: int
) -> None:
    """Write everything needed to go on after `epoch` epochs; a killed write leaves the old file.

    Raises `ResourceError` where it cannot be written.
    """
    # copies: of a weight that two layers share the file holds one for each
    tensors = {
        f"module.{key}": value.clone().contiguous() for key, value in module.state_dict().items()
    }
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
        other = DataError(
            f"The training state {path.name} is damaged or of another recipe.",
            "Use the recipe it was made with, or start in a new folder.",
        )
        raise (of_machine(str(path), error) or other) from error
    return epoch


def _moments(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """An optimiser's state of one parameter; empty if it never learned, as an unused expert."""
    keys = (key.split(".", 2) for key in tensors if key.startswith("optimiser."))
    return {moment: tensors[f"optimiser.{moment}.{own}"] for _, moment, own in keys if own == name}


def accelerated(precision: PrecisionChoice, kept: Path) -> tuple[Accelerator, ChosenPrecision]:
    """What computes in the faster precision here, or in that of the file `kept`; and which."""
    device = PartialState().device
    with PartialState().main_process_first():
        chosen = choose_precision(precision, device, kept)
    AcceleratorState._reset_state()  # an earlier run of this process may be in another
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    mixed: Literal["bf16", "no"] = "bf16" if chosen.name == "bf16" else "no"
    return Accelerator(mixed_precision=mixed, kwargs_handlers=[unused]), chosen


# As torch names it, by its items; it yields batches that have `to(device)`.
Loader = DataLoader[Any]
Objective = TypeVar("Objective", bound=nn.Module)  # its forward gives the loss of a batch


@dataclass(frozen=True)
class Session:
    """What the phases of one run share: where it writes, on what it runs, who watches."""

    folder: Path
    seed: int
    accelerator: Accelerator
    report: RunReport

    @classmethod
    def begin(
        cls,
        folder: Path,
        seed: int,
        progress: Progress,
        precision: PrecisionChoice = "auto",
        say: Say = lambda line: None,
        *,
        tensorboard: bool = False,
    ) -> Self:
        """On what `accelerate launch` gave, in the faster precision; `folder` is made.

        A run that is resumed keeps the precision it was begun in.
        """
        folder.mkdir(parents=True, exist_ok=True)
        accelerator, chosen = accelerated(precision, folder / PRECISION)
        main = accelerator.is_main_process
        report = RunReport(folder, progress, say if main else lambda line: None, tensorboard)
        session = cls(folder, seed, accelerator, report)
        session.say(f"Training on {described(accelerator.device)}, {chosen}.")
        return session

    @property
    def say(self) -> Say:
        """Tells in a line what is done."""
        return self.report.say

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file of the folder, made by the main process unless an earlier run did."""
        file = self.folder / name
        with self.accelerator.main_process_first():
            if not file.exists():
                make(file)
        return file


def fit(
    name: str,
    objective: Objective,
    phase: Schedule,
    epoch_batches: Callable[[int], Loader],
    validate: Callable[[Objective], dict[str, float]],
    session: Session,
) -> None:
    """Train `objective` in place for one phase; goes on where `name.safetensors` left off.

    Runs unchanged under `accelerate launch`: everything distributed is Accelerate's.

    Raises `DataError` where it diverges; the state of the epoch before stays.
    """
    accelerator, report = session.accelerator, session.report
    accelerator.gradient_accumulation_steps = phase.accumulation
    prepare_parameters(objective, phase)
    adapted = add_adapters(objective, phase)
    optimisers = make_optimisers(objective, phase, bf16=accelerator.mixed_precision == "bf16")
    state = session.folder / f"{name}.safetensors"
    done = load_state(state, objective, optimisers) if state.exists() else 0
    if done < phase.epochs:
        wrapped, *prepared = accelerator.prepare(objective, *optimisers)
        report.begin(name, phase.epochs, done)
        for epoch in range(done, phase.epochs):
            started = time.perf_counter()
            torch.manual_seed(session.seed * 1000 + epoch)  # dropout, the same after a resume
            loader = accelerator.prepare(epoch_batches(epoch))
            objective.train()
            loss = _epoch(wrapped, prepared, loader, phase, epoch, session)
            objective.eval()
            check_finite(name, epoch, loss, objective)
            if accelerator.is_main_process:
                save_state(state, objective, optimisers, epoch + 1)
            with torch.random.fork_rng([]):  # the state is saved: a resumed run does not validate
                scores = validate(objective)
            if accelerator.is_main_process:
                seconds = round(time.perf_counter() - started, 1)
                row = {"phase": name, "epoch": epoch, "loss": loss, "seconds": seconds} | scores
                _append(session.folder / LOG, row)
                report.epoch_done(row)
    objective.eval()
    merge_adapters(objective, adapted)
    accelerator.free_memory()  # it would keep this phase's optimiser


def check_finite(phase: str, epoch: int, loss: float, objective: nn.Module) -> None:
    """Raise `DataError` where an epoch left a loss or weights that are no numbers."""
    weights = (bool(torch.isfinite(each).all()) for each in objective.parameters())
    if not (math.isfinite(loss) and all(weights)):
        raise DataError(
            f"The training has diverged: epoch {epoch + 1} of the phase {phase} ended without "
            "finite numbers, and was not kept.",
            "Lower its learning_rate or raise its warmup in the recipe, and start in a new folder.",
        )


def prepare_parameters(objective: nn.Module, phase: Schedule) -> None:
    """Freeze what the phase does not train, and set its dropout.

    Raises `DataError` for a pattern of `phase.train` that no parameter matches.
    """
    parameters = {
        name.removeprefix("model."): parameter for name, parameter in objective.named_parameters()
    }
    for parameter in parameters.values():
        parameter.requires_grad = False
    for pattern in phase.train:
        names = matching(parameters, pattern)
        if not names:
            raise DataError(
                f"The recipe trains {pattern!r}, which matches no parameter.", "Correct it."
            )
        for name in names:
            # the routers inside are one, trained apart: "decoder.*" does not mean them
            meant = pattern == "*" or "router" in pattern or not is_router(name)
            parameters[name].requires_grad |= meant
    for module in objective.modules():
        if isinstance(module, nn.Dropout):
            module.p = phase.dropout


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` and `warmup` are fractions of the run."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _epoch(
    objective: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    loader: Loader,
    phase: Schedule,
    epoch: int,
    session: Session,
) -> float:
    accelerator = session.accelerator
    total, steps = 0.0, len(loader)
    session.report.begin_epoch(epoch, steps)
    for step, batch in enumerate(loader):
        factor = learning_rate_factor((epoch + (step + 1) / steps) / phase.epochs, phase.warmup)
        set_learning_rate(optimisers, phase.learning_rate * factor)
        with accelerator.accumulate(objective):
            loss = objective(batch.to(accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(objective.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
        total += float(loss.detach())
        if not math.isfinite(total) and accelerator.num_processes == 1:  # others would wait
            break
        session.report.step(len(batch.pixels) * accelerator.num_processes)
    return total / max(steps, 1)


def _append(path: Path, row: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def add_adapters(objective: nn.Module, phase: Schedule) -> list[str]:
    """Give the decoder's matrices that the phase trains LoRA adapters, which learn in their place.

    The rest of the decoder is frozen: embeddings and head would take most of the memory that
    adapters save. Returns the adapted modules' names. LoRA: https://arxiv.org/abs/2106.09685, by
    the package peft.

    Raises `MissingDependencyError` without peft.
    """
    if not phase.lora_rank:
        return []
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependencyError("peft", "train") from error
    decoder = objective.get_submodule("model.decoder")
    names = [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name != "head" and module.weight.requires_grad
    ]
    if not names:
        return []
    config = LoraConfig(
        r=phase.lora_rank,
        lora_alpha=phase.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=phase.dropout,
        target_modules=names,
    )
    inject_adapter_in_model(config, decoder)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad = ".lora_" in name
    return names


def merge_adapters(objective: nn.Module, names: Sequence[str]) -> None:
    """Add what adapters have learned to the matrices, which take their places again."""
    if not names:
        return
    decoder = objective.get_submodule("model.decoder")
    for name in names:
        layer: Any = decoder.get_submodule(name)
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(decoder.get_submodule(parent), child, layer.get_base_layer())
    del decoder.peft_config  # what injection left: the next phase has adapters of its own
