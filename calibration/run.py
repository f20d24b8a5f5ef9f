"""`medmoe-edge calibrate`: a checkpoint and calibration data in, a statistics file out."""

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.atomic import refuse_existing
from medmoe_edge.calibration.collect import RUN, Collected, Pictures, collect, read_modalities
from medmoe_edge.calibration.coverage import (
    EXTRA_ROUNDS,
    ExpertCoverage,
    assess,
    floor,
    refusal,
    samples_to_draw,
    settle,
    shown,
)
from medmoe_edge.calibration.data import CalibrationData, Sample
from medmoe_edge.calibration.routing import UNKNOWN, RoutingProfile
from medmoe_edge.calibration.statistics import Source, Statistics, StatisticsFiles
from medmoe_edge.checkpoint.reader import Checkpoint, as_checkpoint
from medmoe_edge.errors import InputError, ResourceError

logger = logging.getLogger(__name__)
ROUTED = 2  # pictures that the router reads, for each that is drawn: so that it can be drawn evenly


def calibrate(
    checkpoint: Path | Checkpoint,
    data: CalibrationData,
    out: Path,
    *,
    samples: int = 128,
    hessians: bool = True,
    strict: bool = False,
    work: Path | None = None,
    pictures: Pictures | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Statistics:
    """Run `samples` drawn from `data` through the checkpoint and write the statistics to `out`.

    Experts that too few tokens reach are treated as `coverage` describes; `strict` raises
    `VerificationError` instead of borrowing tokens or going data-free. An interrupted run goes on
    where it was, from the folder `work`, by default a hidden one beside `out`; a run that ends
    removes it. `pictures` keeps the image tokens. `progress` is called with `(step, done, total)`.

    Raises `InputError` for data that cannot be used or an `out` that exists, `ModelError` for the
    checkpoint, and `ResourceError` where the disk does not take it.
    """
    refuse_existing(out, force=force)
    if samples < 1:
        raise InputError(f"{samples} samples are asked for.", "Ask for one at least.")
    source = as_checkpoint(checkpoint)
    work = work or out.with_name(f".{out.name}.work")
    run = _Run(source, data, work, hessians, pictures or Pictures(data.load), progress)
    try:
        statistics = run.statistics(samples, strict)
        statistics.save(out, force=force)
    except ResourceError:  # it may go on when there is space again
        raise
    except Exception:
        _clear(work)
        raise
    _clear(work)
    return Statistics.open(out)


class _Run:
    """Rounds of collecting, each in a folder of its own under `work`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: CalibrationData,
        work: Path,
        hessians: bool,
        pictures: Pictures,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.data, self.work = checkpoint, data, work
        self.hessians, self.pictures, self.progress = hessians, pictures, progress
        self.samples: list[Sample] = []
        self.rounds: list[Collected] = []
        moe = checkpoint.config.moe
        self.expert_names = moe.expert_names if moe else ()

    def statistics(self, count: int, strict: bool) -> Statistics:
        """All rounds, as the coverage contract asks for them."""
        self._label(ROUTED * count)
        self._collect(self.data.draw(count, progress=self.progress))
        first = self._assess()
        for _ in range(EXTRA_ROUNDS):
            more = self._draw_more(count)
            if not more:
                break
            self._collect(more)
        last = self._assess()
        shortfalls = [record for record in last if record.short]
        if shortfalls and strict:
            raise refusal(shortfalls, self.expert_names)
        borrowed, files = self._borrow(shortfalls)
        coverage = settle(first, last, borrowed)
        for record in coverage:
            if record.status == "data-free":
                seen = shown(record, self.expert_names)
                logger.warning("To be quantised data-free: %s.", seen)
        return Statistics(
            self.checkpoint.sha256(),
            Source(
                self.data.name,
                self.data.sha256,
                tuple(sample.sha256 for sample in self.samples),
                len(self.data.skipped),
                dict(Counter(s.labelled_by for s in self.samples if s.modality)),
            ),
            self._routing(),
            coverage,
            StatisticsFiles([*(file for done in self.rounds for file in done.files), *files]),
        )

    def _label(self, count: int) -> None:
        """Let the router read pictures whose modality nobody told: experts need their own."""
        if not self.expert_names:
            return
        unknown = self.data.unlabelled(count, self.progress)
        if not unknown:
            return
        found = read_modalities(
            self.checkpoint,
            unknown,
            self.work / "router",
            pictures=self.pictures,
            progress=self.progress,
        )
        self.data.label(found)
        shares = Counter(found.values())
        told = ", ".join(f"{name} {n / len(found):.0%}" for name, n in shares.most_common())
        logger.warning(
            "Of %d images nobody says the modality: the model's own router reads %s.",
            len(found),
            told,
        )

    def _collect(self, samples: Sequence[Sample]) -> None:
        folder = self.work / f"round-{len(self.rounds)}"
        self.samples += samples
        self.rounds.append(
            collect(
                self.checkpoint,
                samples,
                folder,
                hessians=self.hessians,
                pictures=self.pictures,
                progress=self.progress,
            )
        )

    def _routing(self) -> RoutingProfile:
        return reduce(RoutingProfile.merge, (done.routing for done in self.rounds))

    def _assess(self) -> tuple[ExpertCoverage, ...]:
        needed = floor(self.checkpoint.config.decoder.hidden_size, hessians=self.hessians)
        return assess(self._routing(), self.expert_names, needed)

    def _draw_more(self, limit: int) -> list[Sample]:
        """At most `limit` samples of the modalities that feed the experts which are short."""
        shortfalls = [record for record in self._assess() if record.short]
        wanted = samples_to_draw(shortfalls, self._routing(), self.expert_names)
        more: list[Sample] = []
        for modality, count in sorted(wanted.items()):
            more += self.data.draw(
                min(count, max(limit // len(wanted), 1)),
                modalities=None if modality == UNKNOWN else [modality],
                exclude=[*self.samples, *more],
            )
        return more

    def _borrow(
        self, shortfalls: Sequence[ExpertCoverage]
    ) -> tuple[Mapping[tuple[int, int], int], tuple[Path, ...]]:
        """What each (layer, expert) borrowed, and the files that hold it."""
        wanted = {record.pair: record.may_borrow for record in shortfalls if record.may_borrow}
        if not wanted:
            return {}, ()
        done = collect(
            self.checkpoint,
            self.samples,
            self.work / "borrowed",
            hessians=self.hessians,
            pictures=self.pictures,
            borrow=wanted,
            progress=self.progress,
        )
        inputs = StatisticsFiles(done.files)
        names = {pair: f"decoder.layers.{pair[0]}.ffn.experts.{pair[1]}.in" for pair in wanted}
        borrowed = {pair: inputs.counts(name)[1] for pair, name in names.items() if name in inputs}
        return borrowed, done.files


def _clear(work: Path) -> None:
    """Remove the passes in `work`, and the folder itself if nothing else is in it."""
    for folder in work.glob("*"):
        if (folder / RUN).is_file():
            shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        work.rmdir()
