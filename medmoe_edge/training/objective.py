"""What a phase minimises: next-token loss, and the router's modality loss where it is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medmoe_edge.models.med_moe import MedMoE, Output
from medmoe_edge.training.data import IGNORED, IMAGE_ID, SHARED, UNKNOWN, Batch
from medmoe_edge.training.recipe import PhaseConfig


@dataclass(frozen=True)
class Scores:
    """Per-turn exactness under teacher forcing and per-image modality guesses.

    Greedy decoding gives the reference answer exactly when every teacher-forced token is the
    most likely one, so `exact` is the exact-match rate without decoding.
    """

    exact: Tensor  # bool, one per turn
    modality: Tensor | None  # index per image; None while there is no router


class Objective(nn.Module):
    """Wraps the model so that one forward gives the loss (which is what DDP needs).

    While the model is dense, `router` is a head beside it, trained as a modality classifier on the
    feed-forward inputs of the layers that will hold experts, averaged over layers and tokens.
    """

    def __init__(self, model: MedMoE, router: nn.Linear | None, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.router, self.layers = model, router, layers
        self.router_weight = 0.0
        self.label_smoothing = 0.0

    def weigh(self, phase: PhaseConfig) -> None:
        """Weigh the parts of the loss as a phase says."""
        self.router_weight = phase.router_weight
        self.label_smoothing = phase.label_smoothing

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        output = self._run(batch)
        counted = batch.text.labels != IGNORED
        logits = self.model.head(output.hidden[counted])
        loss = cross_entropy(
            logits.float(), batch.text.labels[counted], label_smoothing=self.label_smoothing
        )
        known = batch.modality != UNKNOWN
        if self.router_weight and known.any():
            routed = sum(
                cross_entropy(self._modality_logits(output, where)[known], batch.modality[known])
                for where in self._pools(batch)
            )
            loss = loss + self.router_weight * routed / 2  # the mean of the two pools
        return loss

    @torch.no_grad()
    def scores(self, batch: Batch) -> Scores:
        """How well a batch is answered and its modalities recognised."""
        output = self._run(batch)
        labels, segments = batch.text.labels, batch.text.segments
        right = self.model.head(output.hidden).argmax(-1) == labels
        exact = [
            right[row, (segments[row] == segment) & (labels[row] != IGNORED)].all()
            for row in range(len(labels))
            for segment in range(1, int(segments[row].max()) + 1)
        ]
        if self.router is None and self.model.config.moe is None:
            return Scores(torch.stack(exact), None)
        images = self._pools(batch)[0]
        return Scores(torch.stack(exact), self._modality_logits(output, images).argmax(-1))

    def _run(self, batch: Batch) -> Output:
        ids = batch.text.ids
        images = self.model.encode_image(batch.pixels)
        embeds = self.model.embed(ids.clamp_min(0)).to(images.dtype)
        embeds = embeds.masked_scatter((ids == IMAGE_ID)[..., None], images)
        output: Output = self.model(embeds, positions=batch.text.positions, mask=batch.text.mask())
        return output

    def _pools(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which tokens are averaged: those of the image, and those of the turns after it."""
        return batch.text.ids == IMAGE_ID, batch.text.segments > SHARED

    def _modality_logits(self, output: Output, where: Tensor) -> Tensor:
        weights = where.float() / where.sum(-1, keepdim=True)  # [B, S]
        pooled = [
            torch.einsum("bs,bsd->bd", weights, output.ffn_inputs[layer].float())
            for layer in self.layers
        ]
        mean = torch.stack(pooled).mean(0)  # [B, D]
        if self.router is not None:
            return self.router(mean)  # type: ignore[no-any-return]
        return self.model.moe_layer(self.layers[0]).router_logits(mean)
