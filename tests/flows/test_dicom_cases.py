"""Files from public bug reports, each with the picture that a viewer shows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import load_image

CASES = Path(__file__).parents[3] / "shared" / "cases"
FILES = [
    "01-voilut-narrower/in.dcm",
    "02-voilut-empty-item/in.dcm",
    "04-voilut-first-value-sign/in.dcm",
    "09-ct-8bit-capture-rescale1/in.dcm",
    "09-ct-8bit-capture-rescale1/without_rescale.dcm",
    "10-highbit15-stored12/in.dcm",
    "12-jpeg-8bit-allocated16/in.dcm",
    "14-bot-per-fragment-single-frame/in.dcm",
    "17-no-preamble-with-meta/big_endian.dcm",
    "17-no-preamble-with-meta/group2.dcm",
    "18-nonsquare-pixels/in.dcm",
]
CUT_OFF = [f"15-compressed-frame-truncated/{kind}.dcm" for kind in ("jpeg", "jls", "ll")]

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs the cases beside the checkout")


@pytest.mark.parametrize("file", FILES)
def test_a_case_is_shown_as_a_viewer_shows_it(file: str) -> None:
    path = CASES / file
    expected = np.asarray(Pillow.open(path.parent / "expected.png").convert("RGB"))
    pixels = load_image(path).pixels
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(float) - expected).mean() <= 2


@pytest.mark.parametrize("file", CUT_OFF)
def test_half_a_picture_is_refused(file: str) -> None:
    with pytest.raises(ImageError, match="cut off or damaged"):
        load_image(CASES / file)
