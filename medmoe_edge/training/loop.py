"""The one training loop: cosine, bf16, accumulation, resume, a JSONL log."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader

from medmoe_edge.errors import DataError
from medmoe_edge.training.optimisers import make_optimisers, set_learning_rate
from medmoe_edge.training.recipe import Schedule
from medmoe_edge.training.state import load_state, save_state

log = logging.getLogger(__name__)

# As torch names it, by its items; it yields batches that have `to(device)`.
Loader = DataLoader[Any]
Objective = TypeVar("Objective", bound=nn.Module)  # its forward gives the loss of a batch


@dataclass(frozen=True)
class Session:
    """What the phases of one run share: where it writes, on what it runs, who watches."""

    folder: Path
    seed: int
    accelerator: Accelerator
    progress: Progress

    @classmethod
    def begin(cls, folder: Path, seed: int, progress: Progress) -> Self:
        """In bf16, on what `accelerate launch` gave; `folder` is made."""
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[unused])
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, seed, accelerator, progress)

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
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
    """
    accelerator = session.accelerator
    accelerator.gradient_accumulation_steps = phase.accumulation
    prepare_parameters(objective, phase)
    optimisers = make_optimisers(objective, phase)
    state = session.folder / f"{name}.safetensors"
    done = load_state(state, objective, optimisers) if state.exists() else 0
    wrapped, *prepared = accelerator.prepare(objective, *optimisers)
    task = session.progress.add_task(name, total=phase.epochs, completed=done)
    for epoch in range(done, phase.epochs):
        started = time.perf_counter()
        torch.manual_seed(session.seed * 1000 + epoch)  # dropout, the same after a resume
        loader = accelerator.prepare(epoch_batches(epoch))
        objective.train()
        loss = _epoch(wrapped, prepared, loader, phase, epoch, session)
        objective.eval()
        scores = validate(objective)
        if accelerator.is_main_process:
            save_state(state, objective, optimisers, epoch + 1)
            seconds = round(time.perf_counter() - started, 1)
            row = {"phase": name, "epoch": epoch, "loss": loss, "seconds": seconds} | scores
            _append(session.folder / "log.jsonl", row)
        session.progress.update(task, advance=1)
    objective.eval()
    accelerator.free_memory()  # it would keep this phase's optimiser


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
            parameters[name].requires_grad = True
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
    task = session.progress.add_task(f"epoch {epoch + 1}", total=steps)
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
        session.progress.advance(task)
    session.progress.remove_task(task)
    return total / max(steps, 1)


def _append(path: Path, row: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    log.info("%s", row)
