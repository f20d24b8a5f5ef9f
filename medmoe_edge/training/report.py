"""What is told of a run: where and how precisely it computes, how far it is, and when it ends.

Beside `log.jsonl`, which the loop writes, a run keeps `log.csv` and, where asked, TensorBoard's
files. Lines are told with or without a terminal.
"""

import csv
import io
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn

from medmoe_edge.atomic import atomic_file
from medmoe_edge.errors import DataError, MissingDependencyError, Options, of_machine
from medmoe_edge.training.recipe import PrecisionChoice

LOG, TABLE, PRECISION, RUN = "log.jsonl", "log.csv", "precision.json", "run.json"
Say = Callable[[str], None]
"""Told one line."""


@dataclass(frozen=True)
class TrainOptions(Options):
    """What a run adds to its recipe.

    Attributes:
        base: The checkpoint to start from; None: from nothing, by the recipe's preset.
        vision_tower: A folder with the base's tower, where it holds none.
        precision: In place of the recipe's.
        lora_rank: In place of the recipe's, in the phases that train the decoder; None: as it says.
        tensorboard: Whether to write logs for TensorBoard too.
        say: Told in a line what is done and how far it is.
    """

    base: Path | None = None
    vision_tower: Path | None = None
    precision: PrecisionChoice | None = None
    lora_rank: int | None = None
    tensorboard: bool = False
    say: Callable[[str], None] = lambda line: None


def begin_run(
    folder: Path, told: Mapping[str, Any], phases: Iterable[str], made: Iterable[str]
) -> None:
    """Note what the run in a folder is; where no epoch is done yet it may become another's.

    Args:
        folder: Of the run, which is made.
        told: What it is made of, as JSON values.
        phases: By whose names the states of its epochs are called.
        made: Files that an earlier run may have left before its first epoch, and that go then.

    Raises:
        DataError: A run was begun by another recipe, from another checkpoint or on other data.
    """
    file, own = folder / RUN, json.loads(json.dumps(told))
    if file.exists():
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            damaged = DataError(f"{file} is damaged.", "Start in a new folder.")
            raise (of_machine(str(file), error) or damaged) from error
        if begun == own:
            return
        if any((folder / f"{phase}.safetensors").exists() for phase in phases):
            raise DataError(
                f"The run in {folder} was begun by another recipe, from another checkpoint or on "
                "other data.",
                "Use what it was made with, or start in a new folder.",
            )
        for name in (*made, LOG, TABLE):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as stream:
        stream.write(json.dumps(own, indent=1).encode() + b"\n")


_PROBE = (128, 512, 1024)  # rows, and the sizes of a feed-forward layer that is timed
_TIMES = 5
_HOPELESS = 4  # times slower, and it is not timed again
_WINS_BY = 1.1  # bf16 costs digits: it must win clearly
_LINE_EVERY = 60.0  # seconds, within an epoch
_FIRST_GUESS = 5.0  # seconds of a phase after which its length is told


@dataclass(frozen=True)
class ChosenPrecision:
    """A precision, and how fast bf16 is against fp32 here; None where it was not timed."""

    name: Literal["fp32", "bf16"]
    ratio: float | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return f"in {self.name}"
        faster = self.ratio if self.ratio >= 1 else 1 / self.ratio
        how = "faster" if self.ratio >= 1 else "slower"
        return f"in {self.name} (bf16 is {faster:.1f} times {how} than fp32 here)"


def choose_precision(choice: PrecisionChoice, device: torch.device, kept: Path) -> ChosenPrecision:
    """The precision of a run: what was asked for, or what is timed to be faster on `device`.

    It is written to the file `kept`, from which a resumed run takes it. Raises `DataError` where
    that was begun in another than the one asked for.
    """
    if kept.exists():
        try:
            data = json.loads(kept.read_text(encoding="utf-8"))
            begun = ChosenPrecision(data["name"], data["ratio"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged = DataError(f"{kept} is damaged.", "Start in a new folder.")
            raise (of_machine(str(kept), error) or damaged) from error
        if choice not in ("auto", begun.name):
            raise DataError(
                f"The run in {kept.parent} was begun in {begun.name}.",
                f"Go on in {begun.name}, or start in a new folder.",
            )
        return begun
    if choice == "auto" and device.type in ("cpu", "cuda"):
        ratio = bf16_speed(device)
        chosen = ChosenPrecision("bf16" if ratio >= _WINS_BY else "fp32", round(ratio, 2))
    else:
        chosen = ChosenPrecision("bf16" if choice == "bf16" else "fp32")
    with atomic_file(kept) as file:
        file.write(json.dumps(vars(chosen)).encode() + b"\n")
    return chosen


def bf16_speed(device: torch.device) -> float:
    """How many times faster a feed-forward layer trains in bf16 than in fp32; takes a second.

    Weights stay in fp32 and are converted as autocast does, which is part of the cost. On a CPU one
    thread's own time is taken, which other programs do not lengthen.
    """
    rows, size, middle = _PROBE
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(size, middle), nn.GELU(), nn.Linear(middle, size)).to(device)
    x = torch.randn(rows, size, generator=generator).to(device)
    best = {False: float("inf"), True: float("inf")}
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(2 * (_TIMES + 1)):
            bf16 = bool(turn % 2)
            started = clock()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss: Tensor = layer(x).float().square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = clock() - started
            if bf16 and taken > _HOPELESS * best[False]:
                return best[False] / taken  # emulated: more turns would take long to say the same
            if turn != 1:  # the first in bf16 makes what is kept
                best[bf16] = min(best[bf16], taken)
    finally:
        torch.set_num_threads(threads)
    return best[False] / best[True]


def described(device: torch.device) -> str:
    """A device for people."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    return f"{device.type} ({platform.machine()}, {kind}, {threads} thread{'s' * (threads > 1)})"


@dataclass(frozen=True)
class Planned:
    """A phase: how many epochs, and how many images each sees."""

    name: str
    epochs: int
    images: int


class RunReport:
    """Tells of a run's phases, epochs and steps, and when it will end."""

    def __init__(self, folder: Path, progress: Progress, say: Say, tensorboard: bool) -> None:
        self.folder, self.say = folder, say
        self._progress = progress
        self._plan: Sequence[Planned] = ()
        self._phase, self._epochs, self._epoch, self._steps = "", 0, 0, 0
        self._step = self._images = 0  # of the epoch; of the phase since it began
        self._phase_started = self._told = time.perf_counter()
        self._guessed = False
        self._bars: list[TaskID] = []
        self._writer = _summary_writer(folder) if tensorboard else None

    def plan(self, phases: Sequence[Planned]) -> None:
        """Say beforehand what the run will do, so that its end can be told."""
        self._plan = phases

    def begin(self, phase: str, epochs: int, done: int) -> None:
        """A phase begins, `done` of its epochs having been done by an earlier run."""
        self._phase, self._epochs, self._epoch = phase, epochs, done
        self._images, self._guessed = 0, False
        self._phase_started = self._told = time.perf_counter()
        self._clear()
        self._bars = [self._progress.add_task(phase, total=epochs, completed=done)]

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """An epoch of so many steps begins."""
        self._epoch, self._steps, self._step = epoch, steps, 0
        for bar in self._bars[1:]:
            self._progress.remove_task(bar)
        self._bars[1:] = [self._progress.add_task(f"epoch {epoch + 1}", total=steps)]

    def step(self, images: int) -> None:
        """A step over so many images is done."""
        self._step += 1
        self._images += images
        for bar in self._bars[1:]:
            self._progress.advance(bar)
        now = time.perf_counter()
        if not self._guessed and (now - self._phase_started >= _FIRST_GUESS):
            self._guessed, self._told = True, now
            self.say(
                f"{self._phase}: {self._epochs} epoch{'s' * (self._epochs > 1)} of "
                f"{self._steps} steps, about {_spoken(self._seconds_of(self._phase))} each"
                f"{self._ending()}"
            )
        elif now - self._told >= _LINE_EVERY:
            self._told = now
            self.say(
                f"{self._phase} {self._epoch + 1}/{self._epochs}: step {self._step} of "
                f"{self._steps}{self._ending()}"
            )

    def epoch_done(self, row: Mapping[str, Any]) -> None:
        """The epoch that `row` of the log tells of is done."""
        self._guessed, self._told = True, time.perf_counter()
        self._epoch, self._step = self._epoch + 1, 0
        for bar in self._bars[:1]:
            self._progress.advance(bar)
        scores = {k: v for k, v in row.items() if k not in ("phase", "epoch", "loss", "seconds")}
        told = "".join(f", {name} {value:.1%}" for name, value in scores.items())
        self.say(
            f"{row['phase']} {row['epoch'] + 1}/{self._epochs}: loss {row['loss']:.3f}{told}, "
            f"{_spoken(row['seconds'])}{self._ending()}"
        )
        _write_table(self.folder)
        if self._writer is not None:
            for name, value in {"loss": row["loss"], **scores}.items():
                self._writer.add_scalar(f"{row['phase']}/{name}", value, row["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """The run has ended."""
        self._clear()
        if self._writer is not None:
            self._writer.close()

    def _clear(self) -> None:
        for bar in self._bars:
            self._progress.remove_task(bar)
        self._bars = []

    def _seconds_of(self, phase: str) -> float:
        """Of an epoch of a phase, by what this one took for an image; 0 while nothing is known."""
        planned = next((each for each in self._plan if each.name == phase), None)
        images = planned.images if planned else 0
        if phase == self._phase and not images:
            images = self._steps * self._images // max(1, self._step)
        passed = time.perf_counter() - self._phase_started
        return images * passed / self._images if self._images else 0.0

    def _ending(self) -> str:
        """When the whole run ends, at the pace of this phase."""
        names = [each.name for each in self._plan]
        if self._phase not in names or not self._images:
            return ""
        later = self._plan[names.index(self._phase) + 1 :]
        share = self._step / max(1, self._steps)
        left = (self._epochs - self._epoch - share) * self._seconds_of(self._phase)
        left += sum(each.epochs * self._seconds_of(each.name) for each in later)
        if left < 1:
            return ""
        end = datetime.now() + timedelta(seconds=left)
        day = "" if end.date() == datetime.now().date() else f" on {end:%d %B}"
        return f"; the run ends about {end:%H:%M}{day}"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a run so far; raises `DataError` where the folder is no run's."""
    file = folder / LOG
    if not file.is_file() and not (folder / RUN).is_file():
        raise DataError(f"{folder} is no run's folder.", "Give what was: train -o RUN")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the last line of a run that was killed
    return rows


def _write_table(folder: Path) -> None:
    """`log.csv`: the log with one column a score, whichever phase has it."""
    rows = read_log(folder)
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(folder / TABLE) as file:
        file.write(text.getvalue().encode())


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("tensorboard", "tensorboard") from error
    return SummaryWriter(os.fspath(folder / "tensorboard"))


def _spoken(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
