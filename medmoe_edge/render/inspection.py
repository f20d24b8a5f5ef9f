"""What `inspect` shows of a MedMoE."""

from typing import TYPE_CHECKING

from medmoe_edge.render.console import megabytes, show_table, told

if TYPE_CHECKING:
    from medmoe_edge.evaluation.inspection_contrastive import ModalityInspection


def show_modality_inspection(inspection: "ModalityInspection") -> None:
    """A MedMoE's make-up."""
    config, scores = inspection.config, inspection.scores
    swin, bert = config.vision, config.text
    experts = "one, shared by all" if config.shared_expert else f"{config.experts}, of which 1 runs"
    rows: list[tuple[str, object]] = [
        ("kind", inspection.kind),
        *([("target", inspection.target)] if inspection.target else []),
        ("size", f"{megabytes(inspection.bytes)} in {len(inspection.files)} files"),
        ("parameters", f"{inspection.parameters_total:,}"),
        *((f"  of the {part}", f"{count:,}") for part, count in inspection.parameters.items()),
        ("  activated", f"{inspection.parameters_activated:,}"),
        ("image tower", f"Swin, {swin.image_size} pixels, {len(swin.depths)} scales"),
        ("text tower", f"BERT, {bert.layers} layers of {bert.hidden_size}"),
        ("experts", experts),
        ("  for", ", ".join(config.modalities)),
        ("temperature", f"{scores.temperature:g}"),
        (
            "unfamiliar",
            f"entropy > {scores.entropy_limit:.2g}, evidence < {scores.evidence_limit:.2g}",
        ),
    ]
    for name in ("quantisation", "source", "licence", "verification"):
        rows += told(name, getattr(inspection, name))
    show_table(inspection.name, ["", ""], rows, left=2)
