"""Random views of an image: small rotations, scalings, shifts and changes of light.

No mirroring: left and right are what many questions are about.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

ROTATION = math.radians(12)
SCALE = 0.15
SHIFT = 0.08
LIGHT = 0.2


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised pixels `[B, 3, S, S]` (roughly -1 to 1), each image changed on its own.

    Further channels, such as masks, are moved with the first three and keep their values.
    """
    batch = len(pixels)

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(batch, *shape, generator=generator) * 2 - 1) * limit

    angle, zoom = uniform(ROTATION), 1 + uniform(SCALE)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = uniform(SHIFT, 2)
    rows = (torch.stack((cos, -sin, shift[:, 0]), -1), torch.stack((sin, cos, shift[:, 1]), -1))
    grid = affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast, brightness = 1 + uniform(LIGHT, 1, 1, 1), uniform(LIGHT / 2, 1, 1, 1)
    moved[:, :3] = moved[:, :3] * contrast + brightness
    return moved
