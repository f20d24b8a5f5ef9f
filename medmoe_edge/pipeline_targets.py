"""A model made ready for another target: its portable bundle first, if it is a checkpoint."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoe_edge.atomic import check_target
from medmoe_edge.bundle import MANIFEST, Bundle
from medmoe_edge.bundle_target import DType, Target, TargetName
from medmoe_edge.export.targets import export_target, plan_target
from medmoe_edge.export.tensorrt_builder import Built

Progress = Callable[[str, int, int], None]


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
    memory_limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> TargetExport:
    """Write the bundle `out` of `model` for the target `name`.

    `model` is a portable bundle, or a checkpoint that `portable` exports to a folder first. For the
    rest and the errors see `export.targets`.
    """
    check_target(out, force=force, marker=MANIFEST)
    with tempfile.TemporaryDirectory(
        dir=_existing(out.resolve().parent), prefix=".portable."
    ) as at:
        folder = model
        if not (model / MANIFEST).exists():
            folder = Path(at) / "bundle"
            portable(folder)
        bundle = Bundle.open(folder)
        target = plan_target(bundle, name, gpu=gpu, dtype=dtype, capacity=positions)
        engines = export_target(
            bundle, out, target, memory_limit=memory_limit, force=force, progress=progress
        )
    return TargetExport(out, target, engines)


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
