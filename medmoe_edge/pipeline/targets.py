"""A model made ready for another target, and all targets held against each other: without torch."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoe_edge._types import Progress
from medmoe_edge.atomic import check_target
from medmoe_edge.bundle.bundle import MANIFEST, Bundle, DType, Target, TargetName
from medmoe_edge.calibration.data import read_calibration
from medmoe_edge.evaluation.targets import Agreement, agree_on_targets
from medmoe_edge.export.targets import check_request, export_target, plan_target
from medmoe_edge.export.tensorrt_builder import Built
from medmoe_edge.pipeline.med_moe import as_examples


@dataclass(frozen=True)
class TargetExport:
    """A bundle for a target, and what its engines took to build; none for graphs."""

    bundle: Path
    target: Target
    engines: Mapping[str, Built]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        engines = {
            name: {
                "bytes": built.bytes,
                "seconds": built.seconds,
                "peak_memory": built.peak_memory,
                "cached": built.cached,
            }
            for name, built in self.engines.items()
        }
        return {"bundle": str(self.bundle), "target": self.target.to_json(), "engines": engines}


def export_for(
    name: TargetName,
    model: Path,
    out: Path,
    *,
    portable: Callable[[Path], object],
    gpu: str | None = None,
    dtype: DType = "fp16",
    positions: int | None = None,
    paged: bool = False,
    memory_limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> TargetExport:
    """Write the bundle `out` of `model` for the target `name`.

    `model` is a portable bundle, or a checkpoint that `portable` exports to a folder first. For the
    rest and the errors see `export.targets`.
    """
    check_target(out, force=force, marker=MANIFEST)
    check_request(name, gpu=gpu, dtype=dtype, capacity=positions)
    with tempfile.TemporaryDirectory(
        dir=_existing(out.resolve().parent), prefix=".portable."
    ) as at:
        folder = model
        if not (model / MANIFEST).exists():
            folder = Path(at) / "bundle"
            portable(folder)
        bundle = Bundle.open(folder)
        target = plan_target(bundle, name, gpu=gpu, dtype=dtype, capacity=positions, paged=paged)
        engines = export_target(
            bundle, out, target, memory_limit=memory_limit, force=force, progress=progress
        )
    return TargetExport(out, target, engines)


def agree(bundle: Path, source: str, *, progress: Progress | None = None) -> list[Agreement]:
    """Hold every target's form of a portable bundle against its specification; see `agreement`.

    `source` names questions as for `verify`. Raises `ModelError` for a bundle of another target.
    """
    model = Bundle.open(bundle)
    names = model.config.moe.expert_names if model.config.moe else ()
    data = read_calibration(source, known_modalities=names)
    with tempfile.TemporaryDirectory() as folder:
        examples = list(as_examples(data.draw(len(data.samples)), Path(folder)))
        return agree_on_targets(model, examples, progress=progress)


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
