"""Where a phrase lies, as a picture that a person can read: the image under a translucent map."""

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageDraw

from medmoe_edge.contrastive.legend import PAPER, legend
from medmoe_edge.contrastive.results import Location
from medmoe_edge.image.loading import Pixels
from medmoe_edge.runtimes.contrastive import Floats

# Viridis (matplotlib, CC0) at equal steps: the hotter the lighter, to the colour-blind as well.
COLOURS = np.array(
    [
        *([68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142]),
        *([31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]),
    ],
    np.float64,
)
COVER = 0.6  # of the hottest place; the coldest is left as it is
SMALLEST, LARGEST = 512, 2048  # pixels of the longer side, so that map and legend can be read
SMOOTH = Pillow.Resampling.BICUBIC


def heat_picture(pixels: Pixels, location: Location) -> Pillow.Image:
    """The picture `[H, W, 3]` that was looked at with its heat, its peak and a legend, as RGB.

    It is shown in grey, so that every colour is heat, from the coldest to the hottest place of this
    picture; the bar gives both values.
    Small pictures are enlarged, those above 2,048 pixels made smaller.
    """
    height, width = pixels.shape[:2]
    scale = min(max(height, width, SMALLEST), LARGEST) / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    unit = max(size) / SMALLEST  # what is one pixel in the smallest picture
    grey = Pillow.fromarray(pixels).convert("L").convert("RGB").resize(size, SMOOTH)
    shown = _covered(grey, _shares(location.heat))
    _mark(shown, [(at + 0.5) * scale for at in location.peak], unit)
    bar = _covered(Pillow.new("RGB", (256, 1), "grey"), np.linspace(0, 1, 256)[None])
    below = legend(location, bar, max(size[0], round(0.75 * SMALLEST * unit)), unit)
    whole = Pillow.new("RGB", (below.width, size[1] + below.height), PAPER)
    whole.paste(shown, ((below.width - size[0]) // 2, 0))
    whole.paste(below, (0, size[1]))
    return whole


def colours(share: npt.NDArray[np.float64]) -> Pixels:
    """RGB `[..., 3]` of values 0 to 1."""
    steps = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(share, steps, COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def _covered(picture: Pillow.Image, share: npt.NDArray[np.float64]) -> Pillow.Image:
    """A picture beneath the colours of `share` `[H, W]`, which cover it the more the hotter."""
    colour = Pillow.fromarray(colours(share)).resize(picture.size, SMOOTH)
    cover = Pillow.fromarray(np.uint8(255 * COVER * share)).resize(picture.size, SMOOTH)
    return Pillow.composite(colour, picture, cover)


def _shares(heat: Floats) -> npt.NDArray[np.float64]:
    """0 at the coldest place to 1 at the hottest; all 0 where they are the same."""
    low, high = float(heat.min()), float(heat.max())
    return (heat.astype(np.float64) - low) / ((high - low) or 1.0)


def _mark(picture: Pillow.Image, peak: list[float], unit: float) -> None:
    """A ring around the peak, white in black, to be seen on anything; the peak stays free."""
    draw = ImageDraw.Draw(picture)
    for radius, width, colour in ((13, 5, "black"), (12, 3, "white")):
        (x, y), reach = peak, radius * unit
        box = (x - reach, y - reach, x + reach, y + reach)
        draw.ellipse(box, outline=colour, width=max(1, round(width * unit)))
