"""Where a phrase lies, as a picture that a person can read: the image under a translucent map.

Below it stand the phrase, the scale of colours, how sure the model is, and the notices: they are
part of the picture, wherever it goes. An answer that does not rest on the picture gets no map.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from medmoe_edge._types import Floats
from medmoe_edge.contrastive.features import Location
from medmoe_edge.engine.answer import Answer
from medmoe_edge.image.pixels import Pixels

PAPER, INK, QUIET, WARNING = (24, 24, 24), (240, 240, 240), (170, 170, 170), (255, 200, 80)
PHRASE_LINES = 2  # of a long phrase; the whole stands in what the command prints
UNFAMILIAR = "Unfamiliar image: unlike those the model knows. Do not rely on this."
NO_FINDING = "Not a finding: what is not in the image has a place most alike, too."
# A black picture must make an answer less likely, in odds, by this factor.
FACTOR = 2.0
REFUSED = frozenset({"not_a_scan", "not_answerable", "language", "empty_answer"})
NO_MAP = (
    "No map: the answer does not rest on the picture. The model answers a black picture alike, or "
    "has no answer."
)
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

# For letters that Pillow's own font lacks; by the names under which systems find them.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf"),
    *("arial.ttf", "msyh.ttc", "wqy-zenhei.ttc", "unifont.ttf"),
)
NO_FONT = "(a phrase in letters that no font here has)"
NO_LETTER = "\U0010ffff"  # fonts draw it as they draw every letter that they lack

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]


def rests_on_picture(answer: Answer, blind: Answer) -> bool:
    """Whether an answer comes from its picture, and not from the words of the question alone.

    It does where a black picture gets another answer, or makes the odds of the same one half as
    large or less; it does not where the model finds no answer.

    Args:
        answer: The answer about the picture.
        blind: The same engine's, to the same question about a black picture.
    """
    if any(notice.code in REFUSED for notice in answer.warnings):
        return False
    if answer.text.strip().lower() != blind.text.strip().lower():
        return True
    with_picture, without = answer.confidence, blind.confidence
    return without < 1 and with_picture * (1 - without) >= FACTOR * without * (1 - with_picture)


def legend(location: Location, bar: Pillow.Image, width: int, unit: float) -> Pillow.Image:
    """The strip below a map: `width` pixels wide, of lines that are `unit` times 14 and 11 high.

    `bar` are the colours from cold to hot, one pixel high.
    """
    margin, large, small = round(10 * unit), round(14 * unit), round(11 * unit)
    room = width - 2 * margin
    lines = list(_lines(location, large, small, room))
    bar_height = round(10 * unit)
    scale_height = bar_height + round(1.6 * small)
    height = 3 * margin + scale_height + sum(round(1.4 * size) for _, size, _, _ in lines)
    strip = Pillow.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(strip)
    strip.paste(bar.resize((room, bar_height)), (margin, margin))
    font, below = ImageFont.load_default(small), margin + round(1.2 * bar_height)
    low, high = f"{location.heat.min():.2f} least alike", f"most alike {location.heat.max():.2f}"
    draw.text((margin, below), low, QUIET, font)
    draw.text((width - margin, below), high, QUIET, font, anchor="ra")
    y = 2 * margin + scale_height
    for text, size, colour, font in lines:
        draw.text((margin, y), text, colour, font)
        y += round(1.4 * size)
    return strip


def _lines(
    location: Location, large: int, small: int, room: int
) -> Iterator[tuple[str, int, Colour, Font]]:
    reading = location.reading
    font = font_for(location.phrase, large)
    phrase = location.phrase if font else NO_FONT
    plain = ImageFont.load_default(small)
    for line in wrapped(phrase, font or plain, room, PHRASE_LINES):
        yield line, large, INK, font or plain
    likely = f"{reading.modality} {reading.probabilities[reading.modality]:.0%}"
    said = f"Similarity to the whole image {location.similarity:.2f}. Ring: the place most alike."
    paragraphs = [(said, INK), (f"Image read as {likely}.", INK), (NO_FINDING, WARNING)]
    paragraphs.append((location.notice, QUIET))
    if reading.unfamiliar:
        paragraphs.insert(0, (UNFAMILIAR, WARNING))
    for text, colour in paragraphs:
        for line in wrapped(text, plain, room, 10):
            yield line, small, colour, plain


def wrapped(text: str, font: Font, room: int, most: int) -> list[str]:
    """The text in lines that fit, at most so many, an ellipsis where there is more."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= room:
            lines[-1] = longer
        elif len(lines) == most:
            lines[-1] += f" {ELLIPSIS}"
            break
        else:
            lines.append(word)
    return [_fitted(line, font, room) for line in lines]


def font_for(text: str, size: int) -> Font | None:
    """Pillow's own font, or one of the system's, that has all letters of a text."""
    for name in ("", *FONTS):
        font = _font(name, size)
        if font and _has_letters(font, text):
            return font
    return None


@functools.lru_cache(32)
def _font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


def _has_letters(font: Font, text: str) -> bool:
    missing = _drawn(font, NO_LETTER)
    return all(_drawn(font, mark) != missing for mark in set(text) if not mark.isspace())


def _drawn(font: Font, mark: str) -> bytes:
    picture = Pillow.new("L", (64, 64))
    ImageDraw.Draw(picture).text((0, 0), mark, 255, font)
    return picture.tobytes()


def _fitted(line: str, font: Font, room: int) -> str:
    """A line of one long word (or of a script without spaces), cut off where it must be."""
    if font.getlength(line) <= room:
        return line
    widths = (font.getlength(line[:end] + ELLIPSIS) for end in range(len(line)))
    fits = sum(1 for _ in itertools.takewhile(lambda width: width <= room, widths))
    return line[: max(fits - 1, 0)] + ELLIPSIS


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
