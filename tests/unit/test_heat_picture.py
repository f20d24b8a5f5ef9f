"""The picture of a map: colours where the heat is, a mark at its peak, and words to be read."""

from typing import Any

import numpy as np
import pytest
from command_line import answer_to
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive import heatmap as modality_legend
from medmoe_edge.contrastive.features import Location, Reading
from medmoe_edge.contrastive.heatmap import (
    COLOURS,
    NO_FINDING,
    colours,
    font_for,
    heat_picture,
    rests_on_picture,
    wrapped,
)
from medmoe_edge.errors import Notice

MODEL = {"name": "m", "sha256": "0" * 64, "verification": "passed", "runtime": "onnxruntime"}


def spot(height: int, width: int, peak: tuple[int, int]) -> Floats:
    """Heat that falls with the distance from a place (x, y)."""
    y, x = np.mgrid[:height, :width]
    far = np.hypot((x - peak[0]) / width, (y - peak[1]) / height)
    heat: Floats = (0.6 - far).astype(np.float32)
    return heat


def location(heat: Floats, peak: tuple[int, int] = (0, 0), **values: Any) -> Location:
    reading = Reading(
        {}, MODEL, "ct", {"ct": 0.9, "mri": 0.1}, 0.3, values.pop("unfamiliar", False)
    )
    return Location({}, MODEL, values.pop("phrase", "liver"), heat, peak, 0.25, reading)


def picture_of(height: int, width: int, **values: Any) -> Pillow.Image:
    peak = (3 * width // 4, height // 4)
    pixels = np.full((height, width, 3), 100, np.uint8)
    return heat_picture(pixels, location(spot(height, width, peak), peak, **values))


def hue(pixel: Any) -> int:
    """How far a pixel is from grey."""
    values = [int(value) for value in pixel]
    return max(values) - min(values)


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [
        (256, 256, (512, 512)),
        (512, 490, (490, 512)),
        (2400, 300, (256, 2048)),
        (1, 1, (512, 512)),
        (3, 900, (900, 3)),
        (900, 3, (3, 900)),
    ],
)
def test_pictures_of_any_size_have_room_for_map_and_legend(
    height: int, width: int, shown: tuple[int, int]
) -> None:
    picture = picture_of(height, width)
    assert picture.mode == "RGB"
    assert picture.width >= max(shown[0], 384)
    assert shown[1] + 80 < picture.height <= shown[1] + max(shown)


def test_the_hot_place_is_coloured_and_marked_and_the_cold_is_left_as_it_is() -> None:
    picture = picture_of(512, 512)
    assert hue(picture.getpixel((4, 508))) < 10  # the coldest corner: nearly the grey below it
    assert hue(picture.getpixel((384, 128))) > 100  # the peak itself stays free
    ring = [picture.getpixel((384 + step, 128)) for step in range(9, 16)]
    assert (255, 255, 255) in ring
    assert (0, 0, 0) in ring
    assert picture.getpixel((384 - 11, 128)) == (255, 255, 255)


def test_a_coloured_image_lends_the_map_no_colour() -> None:
    pixels = np.zeros((512, 512, 3), np.uint8)
    pixels[..., 0] = 200
    picture = heat_picture(pixels, location(spot(512, 512, (500, 20)), (500, 20)))
    assert hue(picture.getpixel((2, 509))) < 10


def test_a_map_that_is_the_same_everywhere() -> None:
    pixels = np.full((300, 300, 3), 80, np.uint8)
    picture = heat_picture(pixels, location(np.full((300, 300), 0.2, np.float32)))
    assert picture.getpixel((400, 400)) == (80, 80, 80)


def test_hotter_is_lighter_to_every_eye() -> None:
    """Also to those who see no red, or no green: the luminance alone says where it is hot."""
    linear = (colours(np.linspace(0, 1, 64)) / 255.0) ** 2.2
    assert (np.diff(linear @ [0.2126, 0.7152, 0.0722]) > 0).all()
    assert (colours(np.array([0.0, 1.0])) == COLOURS[[0, -1]]).all()


def words(monkeypatch: pytest.MonkeyPatch, **values: Any) -> list[str]:
    """All that a legend says."""
    said: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def text(self: Any, at: Any, line: str, *style: Any, **more: Any) -> None:
        if len(line) > 1:  # single letters are only tried, for whether a font has them
            said.append(line)
        draw(self, at, line, *style, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    picture_of(512, 512, **values)
    return said


def test_the_legend_names_phrase_scale_similarity_and_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = words(monkeypatch)
    assert said[0].endswith("least alike")
    assert said[1] == "most alike 0.60"
    assert said[2] == "liver"
    assert "0.25" in said[3]
    assert said[4] == "Image read as ct 90%."
    assert " ".join(said[5:]) == f"{NO_FINDING} {NOTICE}"


def test_the_legend_warns_of_an_unfamiliar_image(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words(monkeypatch, unfamiliar=True)[3] == modality_legend.UNFAMILIAR


def test_a_phrase_of_letters_that_no_font_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words(monkeypatch, phrase="\U0010fffe")[2] == modality_legend.NO_FONT
    assert font_for("\U0010fffe", 14) is None
    assert font_for("Effusion?", 14) is not None


@pytest.mark.parametrize("text", ["a phrase " * 100, "x" * 1000, "胸水" * 500, ""])
def test_long_phrases_are_cut_to_fit(text: str) -> None:
    font = ImageFont.load_default(14)
    lines = wrapped(text, font, 300, 2)
    assert 1 <= len(lines) <= 2
    assert all(font.getlength(line) <= 300 for line in lines)
    assert not text or lines[-1].endswith("…")
    if " " not in text:  # and no more is cut off than must be
        assert not text or font.getlength(lines[0] + text[0]) > 300


@pytest.mark.parametrize(
    ("text", "confidence", "blind", "blind_confidence", "rests"),
    [
        ("No", 0.9, "Yes", 0.9, True),  # a black picture gets another answer
        ("No", 0.9, "no ", 0.9, False),
        ("No", 0.9, "No", 0.8, True),  # odds of 9 against 4
        ("No", 0.9, "No", 0.85, False),  # against 5.7
        ("No", 1.0, "No", 0.5, True),
        ("No", 1.0, "No", 1.0, False),
    ],
)
def test_an_answer_rests_on_its_picture(
    text: str, confidence: float, blind: str, blind_confidence: float, rests: bool
) -> None:
    answer = answer_to("Is it?", text, confidence=confidence)
    of_black = answer_to("Is it?", blind, confidence=blind_confidence)
    assert rests_on_picture(answer, of_black) is rests
    refused = answer_to("Is it?", text, warnings=(Notice("not_a_scan", "..."),))
    assert not rests_on_picture(refused, answer_to("Is it?", "other"))
