"""Which optimiser trains what: Muon the matrices inside decoder, Swin and BERT, AdamW the rest.

Muon orthogonalises the momentum of a matrix (https://kellerjordan.github.io/posts/muon), which
reaches a given loss in clearly fewer steps when a small model starts from nothing. Its steps are
scaled to AdamW's (https://arxiv.org/abs/2502.16982), so one learning rate serves both.
"""

from itertools import groupby

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from medmoe_edge.training.recipe import Schedule

_INNER = ("model.decoder.layers.", "model.text.layers.", "model.vision.stages.")


def make_optimisers(objective: nn.Module, phase: Schedule) -> list[Optimizer]:
    """The optimisers of what `phase` trains; a group's `rate` is its share of the learning rate."""
    learning = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learning if _is_inner_matrix(name, p)]
    others = [(name, p) for name, p in learning if not _is_inner_matrix(name, p)]
    optimisers: list[Optimizer] = []
    if matrices:
        group = {"params": matrices, "rate": phase.matrix_rate}
        muon = Muon(
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


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    # a Swin's offset biases are a table; the kernels of a convolutional tower have four dimensions
    return name.startswith(_INNER) and parameter.ndim == 2 and not name.endswith("offset_bias")


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
