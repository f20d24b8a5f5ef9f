"""What `export`, `verify` and `inspect` do with a MedMoE."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from medmoe_edge.cli.errors import needs
from medmoe_edge.errors import InputError
from medmoe_edge.render import console as render

if TYPE_CHECKING:
    from medmoe_edge.evaluation.verify import Verification
    from medmoe_edge.pipeline import Export


Progress = Callable[[str, int, int], None]


def refuse(options: Mapping[str, object]) -> None:
    """Raise `InputError` for the first option that was given: they are Med-MoE's."""
    for option, value in options.items():
        if value:
            raise InputError(f"{option} does not go with a modality-moe model.", "Leave it out.")


def export_modality(
    checkpoint: Path,
    out: Path,
    *,
    precision: str,
    calibrate_on: str | None,
    name: str,
    progress: Progress,
    force: bool = False,
) -> "Export":
    """Export a checkpoint in fp32 or int8; raises `InputError` for another precision."""
    if precision not in ("fp32", "int8"):
        raise InputError(
            f"A modality-moe model is not exported in {precision}.", "Use --int8 or --fp32."
        )
    with needs("export"):
        from medmoe_edge import pipeline_contrastive as pipeline_modality
    return pipeline_modality.export_modality(
        checkpoint,
        out,
        precision="fp32" if precision == "fp32" else "int8",
        prove_on=calibrate_on,
        name=name,
        force=force,
        progress=progress,
    )


def verify_modality(
    folder: Path, against: Path | None, data: str, progress: Progress
) -> "Verification":
    """Check a bundle and, with the checkpoint `against`, measure what quantisation cost."""
    if against is None:
        from medmoe_edge.evaluation.contrastive import verify_modality as check

        return check(folder, progress=progress)
    with needs("export"):
        from medmoe_edge import pipeline_contrastive as pipeline_modality
    return pipeline_modality.verify_modality_on(folder, against, data, progress=progress)


def inspect_modality(folder: Path, as_json: bool) -> None:
    """Show what is in a checkpoint or bundle."""
    from medmoe_edge.evaluation.inspection_contrastive import inspect_modality as look
    from medmoe_edge.render.inspection import show_modality_inspection

    found = look(folder)
    if as_json:
        render.as_json(found.to_json())
    else:
        show_modality_inspection(found)
