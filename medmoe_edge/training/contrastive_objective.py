"""What MedMoE's training minimises."""

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from medmoe_edge.models.contrastive import ImageFeatures, ModalityMoE
from medmoe_edge.models.contrastive_losses import GROUNDING_WEIGHT, grounding_loss, losses
from medmoe_edge.training.contrastive_batches import ModalityBatch

POOLED = 2  # regions a side that the local loss sees as one: a quarter of the work, as good


class ModalityObjective(nn.Module):
    """Wraps the model so that one forward gives the loss (which is what DDP needs)."""

    def __init__(self, model: ModalityMoE) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ModalityBatch) -> Tensor:
        """The loss of a batch, a scalar."""
        images = self.model.encode_image(batch.pixels)
        texts = self.model.encode_text(*batch.texts)
        loss = losses(coarser(images), texts, batch.fits, batch.modality).total
        if found := batch.grounding:
            phrases = self.model.encode_text(*found.texts)
            grounding = grounding_loss(images.regions[found.rows], phrases, found.boxes)
            loss = loss + GROUNDING_WEIGHT * grounding
        return loss


def coarser(images: ImageFeatures) -> ImageFeatures:
    """The mean of each square of neighbouring regions; a grid too small for it stays."""
    regions = images.regions
    if regions.shape[1] < 2 * POOLED:
        return images
    return images._replace(
        regions=avg_pool2d(regions.permute(0, 3, 1, 2), POOLED).permute(0, 2, 3, 1)
    )
