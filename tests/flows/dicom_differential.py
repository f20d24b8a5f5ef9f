"""Generated DICOM files against DCMTK: does `load_image` show what a viewer shows?

    python -m tests.flows.dicom_differential --count 5000 [--first 0] [--keep FOLDER]
    python -m tests.flows.dicom_differential --files

File N is made from the number N alone: `--first N --count 1` makes it again. Each draws from the
product of photometric interpretation, bits, sign, what lies in unused bits, rescale, tables,
windows, padding, proportions, transfer syntax, frames, fragments and offset tables. DCMTK's
dcm2pnm, dcmj2pnm and dcml2pnm show them; what they do not decode (JPEG 2000), GDCM's gdcmconv
decompresses first. A picture agrees if no value is further than 2 grey levels from DCMTK's, where
the compression is lossless, and on the average where it is not. A disagreement of a kind in
`EXPLAINED` has to agree with the standard's formulas instead, written out here a second time; every
other is printed and fails the run. DCMTK is told the window that the picture says it was shown in,
where the file states none: which window that is, unit tests decide.

`--files` does the same with the test files of pydicom, pydicom-data and highdicom.
"""

import argparse
import collections
import copy
import dataclasses
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from pydicom import Dataset, dcmread, dcmwrite, uid
from pydicom.data import get_testdata_files
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import RLELosslessEncoder

from medmoe_edge.errors import ImageError
from medmoe_edge.image.dicom_display import SOFT_TISSUE
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image, Window

Array = npt.NDArray[Any]
TOOLS = ("dcm2pnm", "dcmj2pnm", "dcml2pnm", "gdcmconv")
NEAR = 2  # grey levels

# What is not as DCMTK shows it, and why we are right; which of them a file can be, its traits tell.
EXPLAINED = {
    "exact": "DCMTK 3.6.7 takes LINEAR_EXACT for LINEAR (PS3.3 C.11.2.1.3.2).",
    "fraction": "DCMTK rounds rescaled values, or a slope, to less than the window shows.",
    "few bits": "Without a window, DCMTK shifts fewer than 8 bits to 8: white is 128 to 252.",
    "depth": "DCMTK reads a codestream of 8 bits as cells of 16, as its header has them allocated.",
    "long": "DCMTK does not read a table that is too long for its VR, and so written as UN.",
    "overshoot": "Near-lossless values beyond those stored begin anew at 0 in DCMTK: black spots.",
    "32 bits": "DCMTK adds the intercept to 32-bit values in 32 bits, where it overflows.",
    "big endian": "DCMTK takes 32-bit cells as two 16-bit words in the order of little endian.",
}

NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
COMPRESSED = (
    uid.RLELossless,
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEGLSNearLossless,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
)
LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000)


@dataclasses.dataclass
class Made:
    """A file that was made, and how DCMTK is to show the frame `index` of it.

    `plain` is the same without fragments and offset tables to puzzle over.
    """

    dataset: Dataset
    plain: Dataset
    index: int
    options: list[str]
    shown: Callable[[Array, Window | None], Array] | None  # values as the standard shows them
    values: Array
    ratio: float
    padding: Array | None  # the frame's padded pixels
    traits: dict[str, Any]


def make(number: int) -> Made:
    """The file of this number."""
    draw = random.Random(number)
    syntax = draw.choice(NATIVE) if draw.random() < 0.45 else draw.choice(COMPRESSED)
    photometric = draw.choice(
        ["MONOCHROME1", "MONOCHROME2", "MONOCHROME2", "RGB", "YBR_FULL", "PALETTE COLOR"]
    )
    traits: dict[str, Any] = {"syntax": syntax.name, "photometric": photometric}
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3"
    dataset.Modality = draw.choice(["CT", "MR", "DX", "OT"])
    dataset.PhotometricInterpretation = photometric
    dataset.Rows, dataset.Columns = 2 * draw.randint(4, 20), 2 * draw.randint(4, 20)
    frames = draw.choice([1, 1, 2, 3])
    if frames > 1:
        dataset.NumberOfFrames = frames
    grey = photometric.startswith("MONO")
    _draw_bits(draw, dataset, syntax, grey, traits)
    values = _draw_values(draw, dataset, frames)
    if photometric == "PALETTE COLOR":
        _draw_palette(draw, dataset, traits)
    padding = _draw_padding(draw, dataset, values, syntax, traits) if grey else None
    options, shown = _draw_display(draw, dataset, traits) if grey else ([], None)
    ratio = _draw_proportions(draw, dataset, traits)
    plain = _store(draw, dataset, values, syntax, traits)
    index = (frames - 1) // 2
    hidden = None if padding is None else padding[index]
    return Made(dataset, plain, index, options, shown, values[index], ratio, hidden, traits)


def _draw_bits(
    draw: random.Random, dataset: Dataset, syntax: uid.UID, grey: bool, traits: dict[str, Any]
) -> None:
    eight = not grey or syntax == uid.JPEGBaseline8Bit or draw.random() < 0.25
    least = 8 if not grey or syntax in LOSSY else 2
    allocated = 8 if eight else 16
    if grey and syntax in NATIVE and draw.random() < 0.1:
        allocated = 32
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        stored = 8 if allocated == 8 else 12
    elif syntax == uid.JPEG2000:  # its encoder measures the loss by all of the bits allocated
        stored = allocated
    elif allocated == 32:
        stored = draw.choice([17, 24, 32])
    else:
        stored = draw.randint(least, allocated)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        allocated = stored = 8
    high = stored - 1
    if syntax in NATIVE and draw.random() < 0.3:
        high = draw.randint(stored - 1, allocated - 1)
    signed = grey and syntax not in LOSSY and draw.random() < 0.3
    dataset.SamplesPerPixel = 1 if grey or traits["photometric"] == "PALETTE COLOR" else 3
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, high
    dataset.PixelRepresentation = int(signed)
    traits.update(bits=(allocated, stored, high), signed=signed)


def _draw_values(draw: random.Random, dataset: Dataset, frames: int) -> Array:
    """Values [F, H, W] or [F, H, W, 3]: a slope, a disc and some noise, over all of the range."""
    noise = np.random.default_rng(draw.randrange(2**32))
    rows, columns, samples = dataset.Rows, dataset.Columns, dataset.SamplesPerPixel
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    planes = []
    for _ in range(frames * samples):
        plane = x * draw.uniform(-1, 1) + y * draw.uniform(-1, 1) + 1.5 * (x**2 + y**2 < 0.4)
        plane += noise.normal(0, draw.choice([0, 0.02, 0.1]), plane.shape)
        planes.append((plane - plane.min()) / (np.ptp(plane) or 1))
    shares = np.stack(planes).reshape(frames, samples, rows, columns).transpose(0, 2, 3, 1)
    span = 2**dataset.BitsStored - 1
    values = np.rint(shares * span).astype(np.int64)
    if dataset.PixelRepresentation:
        values -= 2 ** (dataset.BitsStored - 1)
    return np.asarray(values if samples > 1 else values[..., 0])


def _words(values: Array, bits: int, little: bool) -> bytes:
    data = np.asarray(values)
    if bits <= 8:  # packed, two to a word
        octets = data.astype(np.uint8).tobytes()
        octets += b"\0" * (len(octets) % 2)
        return octets if little else np.frombuffer(octets, "<u2").astype(">u2").tobytes()
    return data.astype("<u2" if little else ">u2").tobytes()


def _draw_palette(draw: random.Random, dataset: Dataset, traits: dict[str, Any]) -> None:
    little = dataset.file_meta.TransferSyntaxUID != uid.ExplicitVRBigEndian
    count, first, bits = draw.choice([256, 200, 17]), draw.choice([0, 0, 10]), draw.choice([8, 16])
    for colour in ("Red", "Green", "Blue"):
        table = np.array([draw.randrange(2**bits) for _ in range(count)])
        table[0] = 2**bits - 1
        keyword = f"{colour}PaletteColorLookupTable"
        dataset.add_new(f"{keyword}Descriptor", "US", [count, first, bits])
        dataset.add_new(f"{keyword}Data", "OW", _words(table, bits, little))
    traits["palette"] = (count, first, bits)


def _table(
    draw: random.Random, first: int, count: int, bits: int, dataset: Dataset
) -> tuple[Dataset, Array]:
    """A sequence's item with a table, and its entries."""
    little = dataset.file_meta.TransferSyntaxUID != uid.ExplicitVRBigEndian
    entries = np.rint(np.linspace(0, 1, count) ** draw.choice([0.5, 1, 2]) * (2**bits - 1))
    item = Dataset()
    vr = "SS" if first < 0 else "US"
    item.add_new("LUTDescriptor", vr, [count % 2**16, first, bits])
    if bits > 8 and draw.random() < 0.5:
        item.add_new("LUTData", "US", entries.astype(int).tolist())
    else:
        item.add_new("LUTData", "OW", _words(entries, bits, little))
    return item, entries


def _draw_padding(
    draw: random.Random,
    dataset: Dataset,
    values: Array,
    syntax: uid.UID,
    traits: dict[str, Any],
) -> Array | None:
    if draw.random() > 0.2 or dataset.BitsAllocated > 16 or syntax in LOSSY:
        return None
    vr = "SS" if dataset.PixelRepresentation else "US"
    low = int(values.min())
    high = low + draw.choice([0, 0, 1])
    dataset.add_new("PixelPaddingValue", vr, low)
    if high > low:
        dataset.add_new("PixelPaddingRangeLimit", vr, high)
    traits["padding"] = high - low
    return np.asarray((values >= low) & (values <= high))


def _draw_display(
    draw: random.Random, dataset: Dataset, traits: dict[str, Any]
) -> tuple[list[str], Callable[[Array, Window | None], Array]]:
    """Modality, VOI and presentation: DCMTK's options for them, and the standard's formulas."""
    stored = dataset.BitsStored
    low = -(2 ** (stored - 1)) if dataset.PixelRepresentation else 0
    bounds = (float(low), float(low + 2**stored - 1))
    kind = draw.choice(["none", "identity", "rescale", "rescale", "table"])
    if kind == "table" and (stored > 16 or stored < 4):
        kind = "none"
    slope, intercept = 1.0, 0.0
    if kind == "rescale":
        slope = draw.choice([1.0, 2.0, 0.5, 0.25, 3.7])
        intercept = draw.choice([-1024.0, 0.0, 10.0, 0.5])
    traits["fraction"] = slope % 1 != 0 or intercept % 1 != 0
    if kind in ("rescale", "identity"):
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        bounds = bounds[0] * slope + intercept, bounds[1] * slope + intercept

    def modality(values: Array) -> Array:
        return np.asarray(values * slope + intercept)

    if kind == "table":
        bits = draw.choice([8, 10, 16])
        item, entries = _table(draw, low, min(2**stored, 2**16 - 1), bits, dataset)
        item.ModalityLUTType = "US"
        dataset.ModalityLUTSequence = [item]
        bounds = (0.0, 2.0**bits - 1)

        def modality(values: Array) -> Array:
            return np.asarray(entries[np.clip(values - low, 0, len(entries) - 1)])

    shape = draw.choice([None, None, None, "IDENTITY", "INVERSE"])
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if shape is not None:
        dataset.PresentationLUTShape = traits["shape"] = shape
        inverted = shape == "INVERSE"
    traits["modality"] = kind
    options, voi = _draw_voi(draw, dataset, bounds, traits)

    def shown(values: Array, window: Window | None) -> Array:
        if voi is not None:
            grey = voi(modality(values))
        elif window is None:
            grey = (values - low) * (255 / (2**stored - 1))
        else:
            least = window[0] - window[1] / 2
            grey = np.clip((modality(values) - least) / window[1], 0, 1) * 255
        return 255 - grey if inverted else grey

    return options, shown


def _draw_voi(
    draw: random.Random, dataset: Dataset, bounds: tuple[float, float], traits: dict[str, Any]
) -> tuple[list[str], Callable[[Array], Array] | None]:
    """A table or window of interest: DCMTK's options for it, and what is shown of values."""
    low, high = bounds
    kind = draw.choice(["none", "window", "window", "windows", "table"])
    fits = 15 <= high - low <= 2**16 - 2 and low >= -(2**15)
    if kind == "table" and (not fits or traits["fraction"]):
        kind = "window"
    traits["voi"] = kind
    if kind == "none":
        return [], None
    if kind == "table":
        count, bits = int(high - low) + 1, draw.choice([8, 12, 16])
        item, entries = _table(draw, int(low), count, bits, dataset)
        dataset.VOILUTSequence = [item]
        return (
            ["+Wl", "1"],
            lambda values: (
                entries[np.clip(np.rint(values - low).astype(int), 0, count - 1)]
                * 255
                / (2**bits - 1)
            ),
        )
    function = draw.choice([None, None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
    if function:
        dataset.VOILUTFunction = traits["function"] = function
    centres = [round(draw.uniform(low, high), 2) for _ in range(1 + (kind == "windows"))]
    widths = [max(1.0, round(draw.uniform(0.05, 1.5) * (high - low), 2)) for _ in centres]
    dataset.WindowCenter, dataset.WindowWidth = centres, widths
    centre, width = centres[0], widths[0]

    def voi(values: Array) -> Array:  # PS3.3 C.11.2.1.2 and C.11.2.1.3
        if function == "SIGMOID":
            return np.asarray(255 / (1 + np.exp(-4 * (values - centre) / width)))
        if function == "LINEAR_EXACT":
            return np.asarray(np.clip((values - centre) / width + 0.5, 0, 1) * 255)
        if width == 1:
            return np.where(values > centre - 0.5, 255.0, 0.0)
        return np.asarray(np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255)

    return ["+Wi", "1"], voi


def _draw_proportions(draw: random.Random, dataset: Dataset, traits: dict[str, Any]) -> float:
    """The distance between rows divided by that between columns."""
    kind = draw.choice(["none", "none", "none", "square", "spacing", "imager", "aspect"])
    ratio = 1.0 if kind in ("none", "square") else draw.choice([2.0, 3.0, 0.5])
    traits["proportions"] = (kind, ratio)
    if kind in ("square", "spacing"):
        dataset.PixelSpacing = [0.5 * ratio, 0.5]
    elif kind == "imager":
        dataset.ImagerPixelSpacing = [0.2 * ratio, 0.2]
    elif kind == "aspect":
        dataset.PixelAspectRatio = [int(2 * ratio), 2]
    return ratio


def _store(
    draw: random.Random, dataset: Dataset, values: Array, syntax: uid.UID, traits: dict[str, Any]
) -> Dataset:
    """Cells of the values, with whatever may lie in unused bits, or codestreams of them."""
    allocated, stored, high = dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit
    shift = high + 1 - stored
    cells = (values.astype(np.int64) & (2**stored - 1)) << shift
    planar = dataset.SamplesPerPixel == 3 and draw.random() < 0.5 and syntax in NATIVE
    if syntax in NATIVE and draw.random() < 0.5:  # overlays, or rubbish
        noise = np.random.default_rng(draw.randrange(2**32))
        junk = noise.integers(0, 2**allocated, cells.shape, dtype=np.uint64).astype(np.int64)
        cells |= junk & ~(((1 << stored) - 1) << shift) & ((1 << allocated) - 1)
        traits["junk"] = True
    kind = np.dtype(f"u{allocated // 8}")
    cells = cells.astype(kind)
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = int(planar)
    if syntax in NATIVE:
        ordered = cells.transpose(0, 3, 1, 2) if planar else cells
        big = syntax == uid.ExplicitVRBigEndian
        data = ordered.astype(kind.newbyteorder(">" if big else "<")).tobytes()
        data += b"\0" * (len(data) % 2)
        vr = "OB" if allocated == 8 and syntax != uid.ImplicitVRLittleEndian else "OW"
        if allocated == 8 and vr == "OB" and draw.random() < 0.3:
            vr = "OW"
            data = np.frombuffer(data, "<u2").astype(">u2").tobytes() if big else data
        dataset.add_new("PixelData", vr, data)
        return dataset
    pieces = [_compress(frame, dataset, syntax) for frame in cells]
    dataset.add_new("PixelData", "OB", _encapsulate(draw, pieces, syntax, traits))
    dataset["PixelData"].is_undefined_length = True
    plain = copy.deepcopy(dataset)
    if syntax == uid.JPEG2000Lossless:  # GDCM refuses many: what was compressed is known
        plain.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        plain.add_new("PixelData", "OW", cells.tobytes() + b"\0" * (cells.nbytes % 2))
        plain["PixelData"].is_undefined_length = False
    else:
        plain.PixelData = encapsulate(pieces)
    return plain


def _compress(frame: Array, dataset: Dataset, syntax: uid.UID) -> bytes:
    frame = np.ascontiguousarray(frame)
    bits = dataset.BitsStored
    if syntax == uid.RLELossless:
        return bytes(
            RLELosslessEncoder.encode(
                frame,
                rows=dataset.Rows,
                columns=dataset.Columns,
                samples_per_pixel=dataset.SamplesPerPixel,
                bits_allocated=dataset.BitsAllocated,
                bits_stored=dataset.BitsAllocated,
                number_of_frames=1,
                photometric_interpretation=dataset.PhotometricInterpretation,
                pixel_representation=0,
                planar_configuration=0,
                encoding_plugin="pydicom",
            )
        )
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        space = {"RGB": "RGB", "YBR_FULL": "YCBCR"}.get(dataset.PhotometricInterpretation)
        options: dict[str, Any] = {"colorspace": space, "outcolorspace": space} if space else {}
        return bytes(imagecodecs.jpeg8_encode(frame, level=98, bitspersample=bits, **options))
    if syntax == uid.JPEGLosslessSV1:
        options = {"colorspace": "RGB", "outcolorspace": "RGB"} if frame.ndim == 3 else {}
        bits = next(depth for depth in (8, 12, 16) if depth >= bits)
        frame = frame.astype(np.uint8 if bits == 8 else np.uint16)
        return bytes(
            imagecodecs.jpeg8_encode(
                frame, lossless=True, predictor=1, bitspersample=bits, **options
            )
        )
    if syntax in (uid.JPEGLSLossless, uid.JPEGLSNearLossless):
        level = 2 if syntax == uid.JPEGLSNearLossless else 0
        return bytes(imagecodecs.jpegls_encode(frame, level=level))
    lossless = syntax == uid.JPEG2000Lossless
    return bytes(
        imagecodecs.jpeg2k_encode(
            frame,
            level=0 if lossless else 60,
            reversible=lossless,
            codecformat="J2K",
            bitspersample=bits,
            mct=False,
        )
    )


def _encapsulate(
    draw: random.Random, pieces: list[bytes], syntax: uid.UID, traits: dict[str, Any]
) -> bytes:
    """Fragments with a table of offsets that is right, absent, of every fragment, or nonsense."""
    frames: list[list[bytes]] = []
    for piece in pieces:
        piece += b"\0" * (len(piece) % 2)
        count = draw.choice([1, 1, 2, 3])
        if syntax == uid.RLELossless or len(piece) < 40 * count:
            count = 1
        step = (len(piece) // count + 1) // 2 * 2
        frames.append(
            [piece[i * step : (i + 1) * step if i < count - 1 else None] for i in range(count)]
        )
    kind = draw.choice(["empty", "right", "fragments", "nonsense"])
    starts, every, at = [], [], 0
    for fragments in frames:
        starts.append(at)
        for fragment in fragments:
            every.append(at)
            at += 8 + len(fragment)
    table = {
        "empty": [],
        "right": starts,
        "fragments": every,
        "nonsense": [draw.randrange(at) for _ in starts],
    }[kind]
    traits.update(table=kind, fragments=[len(fragments) for fragments in frames])
    items = [np.array(table, "<u4").tobytes()]
    items += [fragment for fragments in frames for fragment in fragments]
    return b"".join(b"\xfe\xff\x00\xe0" + len(item).to_bytes(4, "little") + item for item in items)


# --- Both sides --------------------------------------------------------------


def shown_by_dcmtk(path: Path, made: Made, image: Image) -> Array | str:
    """The frame as DCMTK shows it [H, W, 3], or what it says instead."""
    source = path.with_suffix(".plain.dcm")
    dcmwrite(source, made.plain, enforce_file_format=True)
    options = made.options or window_options(image)
    if made.dataset.file_meta.TransferSyntaxUID == uid.JPEG2000:
        return decompressed_and_drawn(source, path.with_suffix(".png"), made.index, options)
    return drawn(source, path.with_suffix(".png"), made.index, options)


def window_options(image: Image) -> list[str]:
    """DCMTK's options for the window that a picture says it is shown in."""
    if image.window is None:
        return []
    centre, width = image.window
    if image.window != SOFT_TISSUE:  # from the least to the greatest value, exactly
        centre, width = centre + 0.5, width + 1
    return ["+Ww", f"{centre:.6f}", f"{width:.6f}"]


def decompressed_and_drawn(
    source: Path, output: Path, index: int, options: list[str]
) -> Array | str:
    """What GDCM decompresses, as DCMTK draws it."""
    raw = output.with_suffix(".raw.dcm")
    raw.unlink(missing_ok=True)
    done = subprocess.run(["gdcmconv", "--raw", source, raw], capture_output=True, check=False)
    if done.returncode or not raw.exists():
        return "gdcmconv refuses it"
    return drawn(raw, output, index, options)


def drawn(source: Path, output: Path, index: int, options: list[str]) -> Array | str:
    """A frame as DCMTK draws it [H, W, 3], or the last that its tools say instead."""
    output.unlink(missing_ok=True)
    said = ""
    for tool in ("dcm2pnm", "dcmj2pnm", "dcml2pnm"):
        command = [tool, "-O", "-S", "+Ma", "+on", "+F", str(index + 1), *options, source, output]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        if output.exists():
            return np.asarray(Pillow.open(output).convert("RGB")).astype(int)
    return said.strip().rpartition("\n")[2]


def differs(made: Made, image: Image, peer: Array) -> str | None:
    """What differs from a peer's picture [H, W, 3]; None if nothing does."""
    wide, high = (int(max(1.0, r)) for r in (1 / made.ratio, made.ratio))
    stretched = peer.repeat(high, axis=0).repeat(wide, axis=1)
    if stretched.shape != image.pixels.shape:
        return f"shape {image.pixels.shape} against {stretched.shape}"
    difference = np.abs(stretched - image.pixels.astype(float)).max(axis=2)
    if made.padding is not None:
        padded = made.padding.repeat(high, axis=0).repeat(wide, axis=1)
        if image.pixels[padded].any():
            return "padding is not black"
        difference = np.where(padded, 0, difference)
    lossy = made.dataset.file_meta.TransferSyntaxUID in LOSSY
    furthest, mean = float(difference.max()), float(difference.mean())
    if (mean if lossy else furthest) <= NEAR:
        return None
    return f"mean {mean:.2f}, furthest {furthest:.0f}"


def explanation(made: Made, image: Image) -> str | None:
    """Which of `EXPLAINED` a disagreement with DCMTK is, if the standard's formulas agree."""
    traits, dataset = made.traits, made.dataset
    syntax = dataset.file_meta.TransferSyntaxUID
    kinds = {
        "exact": traits.get("function") == "LINEAR_EXACT",
        "few bits": traits.get("voi") == "none" and dataset.BitsStored < 8,
        "depth": syntax not in NATIVE and dataset.BitsAllocated == 16 and dataset.BitsStored <= 8,
        "big endian": syntax == uid.ExplicitVRBigEndian and dataset.BitsAllocated == 32,
        "overshoot": syntax == uid.JPEGLSNearLossless and dataset.BitsStored % 8 != 0,
        "32 bits": dataset.BitsAllocated == 32 and traits.get("modality") == "rescale",
        "long": any(
            item["LUTData"].VR == "US" and len(item.LUTData) >= 2**15
            for keyword in ("ModalityLUTSequence", "VOILUTSequence")
            for item in dataset.get(keyword, [])
        ),
        "fraction": traits.get("fraction", False),
    }
    kind = next((kind for kind, applies in kinds.items() if applies), None)
    if kind is None or made.shown is None:
        return None
    peer = np.rint(made.shown(made.values, image.window))[..., None].repeat(3, axis=2)
    return kind if differs(made, image, peer) is None else None


def run(
    first: int, count: int, keep: Path | None = None
) -> tuple[collections.Counter[str], list[str]]:
    """Make files, compare them; what came of them, and the disagreements without explanation."""
    results: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "made.dcm")
        for number in range(first, first + count):
            made = make(number)
            dcmwrite(path, made.dataset, enforce_file_format=True)
            result, fault = _compared(path, made)
            results[result] += 1
            if fault:
                faults.append(f"{number}: {fault} {made.traits}")
                if keep is not None:
                    shutil.copy(path, keep / f"{number}.dcm")
    return results, faults


def _compared(path: Path, made: Made) -> tuple[str, str | None]:
    try:
        image = load_image(path)
    except ImageError as error:
        return "refused", f"refused: {error}"
    peer = shown_by_dcmtk(path, made, image)
    if isinstance(peer, str):
        return f"DCMTK is silent: {peer[:60]}", None
    difference = differs(made, image, peer)
    if difference is None:
        return "agrees", None
    reason = explanation(made, image)
    if reason is not None:
        return f"explained: {reason}", None
    return "differs", difference


def real_files() -> list[Path]:
    """The test files of pydicom, pydicom-data and highdicom."""
    found = {Path(str(file)) for file in get_testdata_files()}
    found |= set(Path(highdicom.__file__).parent.rglob("*.dcm"))
    return sorted(file for file in found if file.is_file() and _has_pixels(file))


def _has_pixels(file: Path) -> bool:
    try:
        dataset = dcmread(file)
    except Exception:  # no DICOM file, or too odd for pydicom
        return False
    return "PixelData" in dataset


def compare_files() -> list[str]:
    """What `load_image` makes of each real file, where it is not as DCMTK or GDCM shows it."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for path in real_files():
            try:
                image = load_image(path)
            except ImageError as error:
                lines.append(f"{path.name}: refused: {error}")
                continue
            peer = _peer_of_file(path, image, Path(folder, "a.png"))
            if isinstance(peer, str):
                lines.append(f"{path.name}: DCMTK is silent: {peer[:70]}")
                continue
            high, wide = (
                max(1, round(a / b))
                for a, b in zip(image.pixels.shape[:2], peer.shape[:2], strict=True)
            )
            peer = peer.repeat(high, axis=0).repeat(wide, axis=1)
            if peer.shape != image.pixels.shape:
                lines.append(f"{path.name}: {image.pixels.shape} and not {peer.shape}")
                continue
            mean = float(np.abs(peer - image.pixels).mean())
            if mean > NEAR:
                lines.append(f"{path.name}: differs by {mean:.1f} grey levels on the average")
    return lines


def _peer_of_file(path: Path, image: Image, output: Path) -> Array | str:
    header = dcmread(path, stop_before_pixels=True)
    options = window_options(image)
    if header.get("VOILUTSequence"):
        options = ["+Wl", "1"]
    elif header.get("WindowWidth"):
        options = ["+Wi", "1"]
    index = (image.frames - 1) // 2
    peer = drawn(path, output, index, options)
    return decompressed_and_drawn(path, output, index, options) if isinstance(peer, str) else peer


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the files that differ")
    parser.add_argument("--files", action="store_true", help="the test files of pydicom instead")
    options = parser.parse_args()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        print("Not installed:", ", ".join(missing))
        return 5
    if options.files:
        print(*compare_files(), sep="\n")
        return 0
    results, faults = run(options.first, options.count, options.keep)
    for fault in faults:
        print(fault)
    for result, count in results.most_common():
        print(f"{count:6}  {result}")
    return 4 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
