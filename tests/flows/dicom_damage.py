"""Compressed frames, cut off and with single bits turned over: is the picture right, or is it said?

    python -m tests.flows.dicom_damage --count 2000

Half of the damages cut a codestream off, half turn one bit over, in turn over all syntaxes. What
comes of each: refused; warned of; the same picture; another one without a word, by how much it
differs from the whole one. The run fails if a cut goes unnoticed, or if more bits do than
`MOST_SILENT` says: no codestream of DICOM's carries a checksum, and a bit of a value that decodes
to another value leaves no trace (docs/dicom.md).
"""

import argparse
import collections
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmwrite, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import RLELosslessEncoder

from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image

# The share of turned bits after which a picture differs by more than 2 grey levels on the average
# without a word: measured, and half again.
MOST_SILENT = 0.12
Results = collections.Counter[tuple[str, str, str]]  # syntax, damage, what came of it


def picture(bits: int) -> npt.NDArray[Any]:
    """A disc with structure on a black ground, some noise in it [96, 96]."""
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    inside = x**2 + y**2 < 0.8
    shade = 0.5 + 0.3 * np.sin(7 * x) * np.cos(5 * y) + 0.2 * ((x - 0.3) ** 2 + y**2 < 0.05)
    noise = np.random.default_rng(0).normal(0, 0.01, x.shape)
    values = np.rint(np.clip((shade + noise) * inside, 0, 1) * (2**bits - 1))
    return np.asarray(values, np.uint8 if bits <= 8 else np.uint16)


def streams() -> dict[str, tuple[uid.UID, int, bytes]]:
    """A whole codestream of each kind: its syntax, its bits (24: colour) and its bytes."""
    eight, twelve = picture(8), picture(12)
    colour = np.stack([eight, eight // 2, 255 - eight], axis=2)
    rle = RLELosslessEncoder.encode(
        twelve,
        rows=96,
        columns=96,
        samples_per_pixel=1,
        bits_allocated=16,
        bits_stored=16,
        number_of_frames=1,
        photometric_interpretation="MONOCHROME2",
        pixel_representation=0,
        encoding_plugin="pydicom",
    )
    jpeg, j2k = imagecodecs.jpeg8_encode, imagecodecs.jpeg2k_encode
    lossless: dict[str, Any] = {"codecformat": "J2K", "reversible": True}
    made = {
        "RLE": (uid.RLELossless, 12, rle),
        "JPEG baseline": (uid.JPEGBaseline8Bit, 8, jpeg(eight, level=92)),
        "JPEG baseline, colour": (uid.JPEGBaseline8Bit, 24, jpeg(colour, subsampling="422")),
        "JPEG extended": (uid.JPEGExtended12Bit, 12, jpeg(twelve, bitspersample=12)),
        "JPEG lossless": (
            uid.JPEGLosslessSV1,
            12,
            jpeg(twelve, lossless=True, bitspersample=12, predictor=1),
        ),
        "JPEG-LS": (uid.JPEGLSLossless, 12, imagecodecs.jpegls_encode(twelve)),
        "JPEG-LS, near": (uid.JPEGLSNearLossless, 8, imagecodecs.jpegls_encode(eight, level=2)),
        "JPEG 2000 lossless": (uid.JPEG2000Lossless, 12, j2k(twelve, bitspersample=12, **lossless)),
        "JPEG 2000": (uid.JPEG2000, 8, j2k(eight, level=45, codecformat="J2K")),
        "HTJ2K": (uid.HTJ2KLossless, 8, imagecodecs.htj2k_encode(eight, reversible=True)),
    }
    return {kind: (syntax, bits, bytes(data)) for kind, (syntax, bits, data) in made.items()}


def write(path: Path, syntax: uid.UID, bits: int, data: bytes) -> None:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3"
    dataset.Rows = dataset.Columns = 96
    colour = bits == 24
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "YBR_FULL_422" if colour else "MONOCHROME2"
    stored = 8 if colour else bits
    dataset.BitsAllocated, dataset.BitsStored = 16 if stored > 8 else 8, stored
    dataset.HighBit, dataset.PixelRepresentation = stored - 1, 0
    if colour:
        dataset.PlanarConfiguration = 0
    else:
        dataset.WindowCenter, dataset.WindowWidth = 2 ** (stored - 1), 2**stored
    dataset.PixelData = encapsulate([data])
    dataset["PixelData"].VR = "OB"
    dcmwrite(path, dataset, enforce_file_format=True)


def damaged(draw: random.Random, data: bytes, kind: str) -> bytes:
    if kind == "cut":
        cut = data[: draw.randrange(2, len(data) - 2)]
        return cut + draw.choice([b"", b"\xff\xd9"])
    bit = draw.randrange(8 * len(data))
    turned = bytearray(data)
    turned[bit // 8] ^= 1 << bit % 8
    return bytes(turned)


def outcome(path: Path, whole: Image) -> str:
    try:
        image = load_image(path)
    except ImageError:
        return "refused"
    if image.pixels.shape != whole.pixels.shape:
        return "differs everywhere"
    difference = np.abs(image.pixels.astype(int) - whole.pixels)
    if not difference.any():
        return "the same"
    if set(image.notices) - set(whole.notices):
        return "warned of"
    if difference.max() <= 2:
        return "within 2 grey levels"
    return "differs here and there" if difference.mean() <= 2 else "differs everywhere"


def run(count: int) -> Results:
    """Damage frames; what came of them."""
    results: Results = collections.Counter()
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.dcm")
        kinds = streams()
        whole = {}
        for kind, stream in kinds.items():
            write(path, *stream)
            whole[kind] = load_image(path)
        for number in range(count):
            kind = list(kinds)[number % len(kinds)]
            syntax, bits, data = kinds[kind]
            damage = ("cut", "bit")[number // len(kinds) % 2]
            write(path, syntax, bits, damaged(draw, data, damage))
            results[kind, damage, outcome(path, whole[kind])] += 1
    return results


def silent(results: Results, damage: str, *outcomes: str) -> float:
    """The share of damages that had one of these outcomes."""
    all_of_them = sum(count for (_, kind, _), count in results.items() if kind == damage)
    these = sum(
        count for (_, kind, came), count in results.items() if kind == damage and came in outcomes
    )
    return these / max(all_of_them, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    results = run(parser.parse_args().count)
    for (kind, damage, came), count in sorted(results.items()):
        print(f"{count:6}  {damage}  {kind}: {came}")
    other = ("within 2 grey levels", "differs here and there", "differs everywhere")
    print(f"cuts without a word: {silent(results, 'cut', *other):.1%}")
    for came in other:
        print(f"bits without a word, {came}: {silent(results, 'bit', came):.1%}")
    noticed = silent(results, "cut", *other) == 0
    return 0 if noticed and silent(results, "bit", other[-1]) <= MOST_SILENT else 4


if __name__ == "__main__":
    sys.exit(main())
