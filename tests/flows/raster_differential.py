"""Generated PNG, JPEG, TIFF, WebP, BMP and GIF files against other decoders than Pillow.

    python -m tests.flows.raster_differential --count 3000 [--first 0] [--keep FOLDER]

File N is made from the number N alone: kind, bits, sign, colours, palette, transparency, planes,
tiles, compression, byte order, interlacing, pages, orientation and density. imagecodecs (libpng,
libjpeg-turbo, libwebp, giflib), tifffile and a few lines for BMP decode them; what a viewer shows
of the values is written out here a second time. A picture agrees if it has the same size and no
value is further than 2 grey levels from that, 4 on the average where the compression is lossy. A
file that is refused has to be of a kind in `REFUSED`. Every other is printed and fails the run.
"""

import argparse
import collections
import dataclasses
import io
import random
import struct
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image as Pillow

from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import load_image

Array = npt.NDArray[Any]
NEAR, LOSSY = 2, 4  # grey levels: each, and on the average

# What is refused by name, and why.
REFUSED = {
    "of a kind that is not read": "Pillow has no mode for the samples of this TIFF.",
    "big-endian BigTIFF": "Pillow takes its first directory for another.",
}


@dataclasses.dataclass
class Made:
    """A file, and how its peer is to read it.

    `values` come from another decoder: `[H, W]` or `[H, W, samples]`. `inverted`: zero is white.
    `turn` is EXIF's orientation, `ratio` the distance of rows over that of columns in the file.
    """

    data: bytes
    suffix: str
    values: Array
    about: str
    deep: bool = False
    inverted: bool = False
    lossy: bool = False
    turn: int = 1
    ratio: float = 1.0
    cmyk: bool = False


def made(number: int) -> Made:
    """The file of a number."""
    draw = random.Random(number)
    return draw.choice((_png, _png, _jpeg, _tiff, _tiff, _tiff, _webp, _bmp, _gif))(draw)


def _scene(draw: random.Random, samples: int, most: float) -> Array:
    """Smooth shades and a few edges `[H, W, samples]`, from 0 to `most`."""
    height, width = draw.randint(9, 70), draw.randint(9, 70)
    y, x = np.mgrid[:height, :width]
    scene = np.empty((height, width, samples))
    for sample in range(samples):
        a, b, c = (draw.uniform(0.02, 0.2) for _ in range(3))
        scene[..., sample] = 0.5 + 0.25 * np.sin(a * x + c) + 0.25 * np.cos(b * y + a * x)
    scene[height // 3 : height // 2, width // 4 : width // 2] *= draw.uniform(0.3, 1)
    return np.rint(scene * most)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(draw: random.Random) -> Made:
    """A PNG of any kind that the standard allows, written here."""
    colour = draw.choice((0, 0, 2, 3, 4, 6))
    depth = draw.choice({0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(colour, (8, 16)))
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    values = _scene(draw, samples, 2**depth - 1).astype(np.uint16)
    if samples in (2, 4) and draw.random() < 0.5:
        values[..., -1] = 2**depth - 1
    height, width = values.shape[:2]
    interlaced = draw.random() < 0.3
    chunks = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    ]
    ratio = 1.0
    if draw.random() < 0.4:
        across, down, unit = draw.choice(((2, 1, 0), (1, 2, 0), (2835, 2835, 1), (3000, 4500, 1)))
        chunks.append(_chunk(b"pHYs", struct.pack(">IIB", across, down, unit)))
        ratio = across / down
    turn = draw.choice((1, 1, 1, *range(1, 9)))
    if turn != 1:
        exif = Pillow.Exif()
        exif[274] = turn
        chunks.append(_chunk(b"eXIf", exif.tobytes()[6:]))
    if colour == 3:
        palette = bytes(draw.randrange(256) for _ in range(3 * 2**depth))
        chunks.append(_chunk(b"PLTE", palette))
        if draw.random() < 0.5:
            chunks.append(_chunk(b"tRNS", bytes(draw.randrange(256) for _ in range(2**depth))))
    rows = b"".join(_png_passes(values, depth, interlaced))
    chunks += [_chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    read = imagecodecs.png_decode(data)
    deep = colour == 0 and depth == 16
    if read.dtype == np.uint16 and not deep:
        read = (read >> 8).astype(np.uint8)
    about = f"png colour {colour}, {depth} bits, interlaced {interlaced}, turn {turn}"
    return Made(data, ".png", read, about, deep=deep, turn=turn, ratio=ratio)


def _png_passes(values: Array, depth: int, interlaced: bool) -> list[bytes]:
    """The filtered rows (no filter) of the seven passes of Adam7, or of all at once."""
    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    rows = []
    for left, top, across, down in (*steps, (0, 1, 1, 2)) if interlaced else ((0, 0, 1, 1),):
        for row in values[top::down, left::across]:
            if not row.size:
                continue
            if depth == 16:
                packed = row.astype(">u2").tobytes()
            else:
                bits = row.reshape(-1, 1) >> np.arange(depth - 1, -1, -1) & 1
                packed = np.packbits(bits.astype(np.uint8)).tobytes()
            rows.append(b"\0" + packed)
    return rows


def _jpeg(draw: random.Random) -> Made:
    mode = draw.choice(("L", "RGB", "RGB", "CMYK"))
    values = _scene(draw, len(mode), 255).astype(np.uint8)
    options: dict[str, Any] = {
        "quality": draw.choice((60, 85, 97)),
        "progressive": draw.random() < 0.4,
        "optimize": draw.random() < 0.4,
        "subsampling": draw.choice((0, 1, 2)),
    }
    if draw.random() < 0.3:
        options["restart_marker_blocks"] = draw.choice((1, 3))
    turn = draw.choice((1, 1, *range(1, 9)))
    if turn != 1:
        options["exif"] = Pillow.Exif()
        options["exif"][274] = turn
    file = io.BytesIO()
    Pillow.fromarray(values[..., 0] if mode == "L" else values, mode).save(file, "JPEG", **options)
    data, ratio = bytearray(file.getvalue()), 1.0
    if data[6:10] == b"JFIF" and draw.random() < 0.5:
        unit, across, down = draw.choice(((0, 2, 1), (0, 1, 2), (1, 300, 150), (2, 30, 30)))
        struct.pack_into(">BHH", data, 13, unit, across, down)
        ratio = across / down
    space = "CMYK" if mode == "CMYK" else None
    read = imagecodecs.jpeg8_decode(bytes(data), outcolorspace=space)
    if mode == "CMYK":
        read = 255 - read  # as Adobe stores them
    about = f"jpeg {mode} {options}"
    return Made(
        *(bytes(data), ".jpg", read, about),
        **{"lossy": True, "turn": turn, "ratio": ratio, "cmyk": mode == "CMYK"},
    )


def _tiff(draw: random.Random) -> Made:
    kind = draw.choice(
        ("grey", "grey", "grey", "rgb", "rgba", "palette", "cmyk", "bilevel", "extra")
    )
    dtype = np.dtype(draw.choice(("u1", "u1", "u2", "i1", "i2", "u4", "i4", "f4", "f8", "f2")))
    if kind != "grey":
        dtype = np.dtype(draw.choice(("u1", "u1", "u2") if kind in ("rgb", "rgba") else ("u1",)))
    samples = {"rgb": 3, "rgba": 4, "cmyk": 4, "extra": 4}.get(kind, 1)
    most = {"u1": 255, "u2": 65535, "i1": 200, "f2": 60, "f4": 3, "f8": 3}.get(dtype.str[1:], 9000)
    values = _scene(draw, samples, 1e4) / 1e4 * most
    if dtype.kind == "i":
        values -= most / 2
    values = (np.rint(values) if dtype.kind != "f" else values).astype(dtype)
    inverted = kind in ("grey", "bilevel") and draw.random() < 0.3
    options: dict[str, Any] = {
        "byteorder": draw.choice("<>"),
        "bigtiff": draw.random() < 0.2,
        "compression": draw.choice((None, None, "zlib", "lzw", "packbits", "zstd", "lzma")),
        "photometric": "miniswhite" if inverted else "minisblack",
    }
    if kind in ("rgb", "rgba", "extra"):
        options["photometric"] = "rgb"
    if kind == "rgba":
        options["extrasamples"] = ["unassalpha"]
        if draw.random() < 0.5:
            values[..., 3] = np.iinfo(dtype).max
    if kind == "extra":
        options["extrasamples"] = ["unspecified"]
    if kind == "cmyk":
        options["photometric"] = "separated"
    if kind == "palette":
        options["photometric"] = "palette"
        table = np.array([[draw.randrange(256) for _ in range(256)] for _ in range(3)])
        options["colormap"] = (table * 257).astype(np.uint16)
    if draw.random() < 0.4 and kind != "bilevel":
        options["tile"] = (16 * draw.randint(1, 3), 16 * draw.randint(1, 3))
    elif draw.random() < 0.6:
        options["rowsperstrip"] = draw.randint(1, 20)
    if options["compression"] in ("zlib", "lzw", "zstd") and dtype.kind != "f" and kind == "grey":
        options["predictor"] = draw.choice((False, True))
    planes = samples > 1 and draw.random() < 0.4
    options["planarconfig"] = "separate" if planes else "contig"
    ratio = 1.0
    if draw.random() < 0.3:
        across, down = draw.choice(((300, 150), (72, 72), (100, 200)))
        options["resolution"], options["resolutionunit"] = (across, down), draw.choice((1, 2, 3))
        ratio = across / down
    turn = draw.choice((1, 1, 1, *range(1, 9)))
    if turn != 1:
        options["extratags"] = [(274, 3, 1, turn, True)]
    pages = draw.choice((1, 1, 1, 2, 3))
    file = io.BytesIO()
    with tifffile.TiffWriter(
        file, byteorder=options.pop("byteorder"), bigtiff=options.pop("bigtiff")
    ) as writer:
        for page in range(pages):
            stored: Array = np.roll(values, page, axis=0)
            stored = stored[..., 0] if samples == 1 else stored
            if kind == "bilevel":
                stored = stored > 99
            writer.write(np.moveaxis(stored, -1, 0) if planes else stored, **options)
    data = file.getvalue()
    with tifffile.TiffFile(io.BytesIO(data)) as read:
        array = read.pages[(pages - 1) // 2].asarray()
    array = np.moveaxis(array, 0, -1) if planes else array
    if kind == "palette":
        array = table.T.astype(np.uint8)[array]
    elif kind == "bilevel":
        array = array.astype(np.uint8) * 255
    elif kind == "extra":
        array = array[..., :3]
    deep = kind == "grey" and dtype != np.uint8
    if array.dtype == np.uint16 and not deep:
        array = (array >> 8).astype(np.uint8)
    about = f"tiff {kind} {dtype} {options} turn {turn}, {pages} pages"
    return Made(
        *(data, ".tif", array, about, deep, inverted),
        **{"turn": turn, "ratio": ratio, "cmyk": kind == "cmyk"},
    )


def _webp(draw: random.Random) -> Made:
    mode = draw.choice(("RGB", "RGBA"))
    values = _scene(draw, len(mode), 255).astype(np.uint8)
    lossless = draw.random() < 0.5
    turn = draw.choice((1, 1, *range(1, 9)))
    exif = Pillow.Exif()
    exif[274] = turn
    file = io.BytesIO()
    Pillow.fromarray(values).save(file, "WEBP", lossless=lossless, exact=True, exif=exif)
    read = imagecodecs.webp_decode(file.getvalue())
    about = f"webp {mode}, lossless {lossless}, turn {turn}"
    return Made(file.getvalue(), ".webp", read, about, lossy=not lossless, turn=turn)


def _bmp(draw: random.Random) -> Made:
    """A BMP of 8, 24 or 32 bits, from above or below, written here."""
    bits, upwards = draw.choice((8, 24, 32)), draw.random() < 0.7
    values = _scene(draw, 1 if bits == 8 else 3, 255).astype(np.uint8)
    height, width = values.shape[:2]
    palette = b"".join(bytes((i, 255 - i, i // 2, 0)) for i in range(256)) if bits == 8 else b""
    across, down = draw.choice(((0, 0), (2835, 2835), (4000, 2000), (1000, 3000)))
    start = 54 + len(palette)
    stored = values[..., ::-1] if bits > 8 else values
    if bits == 32:
        stored = np.dstack((stored, np.zeros((height, width), np.uint8)))
    rows = [row.tobytes() + bytes(-row.nbytes % 4) for row in (stored[::-1] if upwards else stored)]
    pixels = b"".join(rows)
    head = struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start)
    info = struct.pack(
        "<IiiHHIIiiII",
        *(40, width, height if upwards else -height, 1, bits, 0, len(pixels), across, down, 0, 0),
    )
    shown = values
    if bits == 8:
        index = values[..., 0]
        shown = np.stack([index // 2, 255 - index, index], -1)
    ratio = across / down if across else 1.0
    about = f"bmp {bits} bits, upwards {upwards}, density {across} x {down}"
    return Made(head + info + palette + pixels, ".bmp", shown, about, ratio=ratio)


def _gif(draw: random.Random) -> Made:
    values = _scene(draw, 1, 255).astype(np.uint8)[..., 0]
    picture = Pillow.fromarray(values, "P")
    picture.putpalette([draw.randrange(256) for _ in range(768)])
    file = io.BytesIO()
    picture.save(file, "GIF", interlace=draw.choice((0, 1)))
    data, ratio = bytearray(file.getvalue()), 1.0
    if draw.random() < 0.5:
        data[12] = draw.choice((49, 113))
        ratio = 64 / (data[12] + 15)  # the byte says width over height
    read = imagecodecs.gif_decode(bytes(data))
    return Made(bytes(data), ".gif", read, f"gif, ratio {ratio}", ratio=ratio)


def expected(file: Made, near: Array) -> Array:
    """What a viewer shows of the peer's values; `near` decides where a side ends in a half."""
    values = file.values if file.values.ndim == 3 else file.values[..., None]
    shown = values.astype(float)
    if file.deep:
        low, high = np.percentile(shown, 1), np.percentile(shown, 99)
        shown = np.clip((shown - low) / (high - low), 0, 1) * 255
    if file.cmyk:
        shown = (255 - shown[..., :3]) * (255 - shown[..., 3:]) / 255
    elif shown.shape[2] in (2, 4):
        colours, cover = shown[..., :-1], shown[..., -1:] / 255
        shown = colours * cover
        if shown.max() < 32:  # on black nothing would be left to see
            shown += 255 * (1 - cover)
    if file.inverted and (file.deep or file.suffix == ".tif"):
        shown = 255 - shown
    shown = np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown
    turned = _turned(np.rint(shown), file.turn)
    ratio = 1 / file.ratio if file.turn >= 5 else file.ratio
    return _square(turned, ratio, near)


def _turned(shown: Array, turn: int) -> Array:
    """Upright, by the table of TIFF 6.0 and EXIF 2.3."""
    if turn >= 5:
        shown = shown.swapaxes(0, 1)  # rows and columns change places
    mirrored = {2: (False, True), 3: (True, True), 4: (True, False)}
    mirrored |= {6: (False, True), 7: (True, True), 8: (True, False)}
    down, across = mirrored.get(turn, (False, False))
    return shown[:: -1 if down else 1, :: -1 if across else 1]


def _square(shown: Array, ratio: float, near: Array) -> Array:
    """Each pixel again and again, until rows are as far apart as columns."""
    rows, columns = shown.shape[:2]
    sides = rows * max(1, ratio), columns * max(1, 1 / ratio)
    height, width = (
        there if abs(side - there) < 0.51 else round(side)
        for side, there in zip(sides, near.shape[:2], strict=True)
    )
    y = np.minimum(((np.arange(height) + 0.5) * rows / height).astype(int), rows - 1)
    x = np.minimum(((np.arange(width) + 0.5) * columns / width).astype(int), columns - 1)
    return np.asarray(shown[y][:, x])


def judged(file: Made, path: Path) -> str:
    """What becomes of a file: "agrees", a kind in `REFUSED`, or what is wrong."""
    path.write_bytes(file.data)
    try:
        pixels: Array = load_image(path).pixels
    except ImageError as error:
        return next((kind for kind in REFUSED if kind in error.what), f"refused: {error.what}")
    wanted = expected(file, pixels)
    if wanted.shape != pixels.shape:
        return f"is {pixels.shape}, not {wanted.shape}"
    away = np.abs(wanted - pixels)
    good = away.mean() <= LOSSY if file.lossy else away.max() <= NEAR
    return "agrees" if good else f"differs by {away.mean():.1f}, at most {away.max():.0f}"


def run(numbers: Sequence[int], keep: Path | None = None) -> collections.Counter[str]:
    """Judge the files of these numbers; those that differ are printed, and kept in a folder."""
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            file = made(number)
            path = Path(keep or folder, f"{number}{file.suffix}")
            verdict = judged(file, path)
            good = verdict == "agrees" or verdict in REFUSED
            found[verdict if good else "differs"] += 1
            if not good:
                print(f"{number}: {verdict}; {file.about}")
            if good or keep is None:
                path.unlink()
    return found


def main() -> int:
    """The command line; 1 where a picture differs, or is refused without a name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    found = run(range(options.first, options.first + options.count), options.keep)
    for verdict, count in found.most_common():
        print(f"{count:6} {verdict}  {REFUSED.get(verdict, '')}")
    return 1 if found["differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
