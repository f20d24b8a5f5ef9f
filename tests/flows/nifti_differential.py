"""Generated NIfTI files against ITK: does `load_image` show the slice that a viewer shows?

    python -m tests.flows.nifti_differential --count 2000 [--first 0] [--keep FOLDER]

File N is made from the number N alone. Each draws from the product of version, byte order, packing,
kind of voxels, axes, sform, qform, sizes, units, scaling, display range and extensions, with odd
values among them. ITK (SimpleITK) reads the voxels, scales them and turns them to LPS; from there
to grey levels the formulas are written out here a second time. A picture agrees if it has the same
size and no value is further than 2 grey levels from that. A disagreement of a kind in `EXPLAINED`
has to agree with what nibabel makes of the file instead; every other is printed and fails the run.
"""

import argparse
import collections
import dataclasses
import gzip
import math
import random
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import SimpleITK

from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import load_image

Array = npt.NDArray[Any]
NEAR = 2  # grey levels

# What is not as ITK shows it, and why we are right; which of them a file can be, its traits tell.
EXPLAINED = {
    "no orientation": "Neither form is stated: ITK takes the axes for RAS without a word, we for "
    "LAS as nibabel and FSL do, with a warning that sides are not known.",
    "bad form": "ITK refuses a form that is no rotation; we take the next one, or say that sides "
    "are not known.",
    "two forms": "The forms contradict each other: ITK prefers the qform, we the sform as nibabel "
    "and the standard's authors advise.",
    "sheared": "ITK cannot express an sform that shears, and takes the qform or refuses.",
    "sizes": "The sform's voxels are of another size than pixdim says: ITK goes by pixdim, we by "
    "the form that places them.",
    "kind": "ITK does not read 64-bit integers as nifti1.h has them, nor colours in five axes.",
    "not finite": "ITK takes what is not finite for 0; we show infinite values white and black.",
    "scaled colours": "ITK scales colours, which nifti1.h says are not scaled.",
    "flat": "ITK leaves a plane's third direction out, and refuses what is then no rotation.",
}
KINDS = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    128: "rgb",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
    2304: "rgba",
}


@dataclasses.dataclass
class Made:
    """A file, its display range, and of which kinds in `EXPLAINED` it may be.

    `twin` is the same as NIfTI-1, for ITK, which does not read NIfTI-2.
    """

    data: bytes
    twin: bytes
    limits: tuple[float, float]
    traits: set[str]
    about: str


def made(number: int) -> Made:
    """The file of a number."""
    draw = random.Random(number)
    traits: set[str] = set()
    order, version = draw.choice("<>"), draw.choice((1, 1, 1, 2))
    code = draw.choice(list(KINDS))
    count = draw.choice((2, 3, 3, 3, 3, 4, 5))
    shape = [draw.randint(3, 24) for _ in range(min(count, 3))]
    shape += [draw.choice((1, 2, 3)) for _ in range(count - len(shape))]
    sizes = draw.choice(((1.0, 1.0, 1.0), (0.5, 0.5, 3.0), (1.0, 2.0, 1.5), (0.7, 0.7, 0.7)))
    first = math.prod(shape[:3])
    voxels = _voxels(draw, code, math.prod(shape), order)
    fields = _Fields(version, order, code, shape, sizes)
    _orient(draw, fields, traits)
    slope, intercept = draw.choice(
        ((0.0, 0.0), (1.0, 0.0), (2.5, -1024.0), (-1.0, 10.0), (math.nan, 0.0), (0.001, 0.5))
    )
    fields.scale = slope, intercept
    scaled = slope not in (0.0,) and not math.isnan(slope)
    values = voxels[:first].astype(float) if KINDS[code][0] != "r" else np.zeros(1)
    values = values[np.isfinite(values)] * (slope if scaled else 1) + (intercept if scaled else 0)
    middle = float(np.median(values)) if values.size else 0.0
    spread = float(np.ptp(values)) if values.size else 1.0
    fields.shown = draw.choice(
        (
            *((0.0, 0.0), (0.0, 0.0), (5.0, 5.0), (9.0, -9.0), (math.nan, 1.0), (0.0, math.inf)),
            *((middle - spread / 4, middle + spread / 4), (middle, middle + spread)),
        )
    )
    extension = draw.choice((b"", b"", struct.pack(f"{order}ii", 32, 6) + b"note".ljust(24, b"\0")))
    data = fields.header(extension) + extension + voxels.tobytes()
    fields.version = 1
    twin = fields.header(extension) + extension + voxels.tobytes()
    if KINDS[code] in ("i8", "u8") or (KINDS[code].startswith("rgb") and len(shape) == 5):
        traits.add("kind")
    if KINDS[code].startswith("rgb") and scaled:
        traits.add("scaled colours")
    if len(shape) == 2:
        traits.add("flat")
    if KINDS[code][0] == "f" and not np.isfinite(voxels).all():
        traits.add("not finite")
    if draw.random() < 0.4:
        data = gzip.compress(data, 1)
    return Made(data, twin, fields.shown, traits, f"{KINDS[code]}{order} {shape} {fields}")


@dataclasses.dataclass
class _Fields:
    """What a header says, but for its sizes."""

    version: int
    order: str
    code: int
    shape: list[int]
    sizes: Sequence[float]
    units: int = 2
    scale: tuple[float, float] = (1.0, 0.0)
    shown: tuple[float, float] = (0.0, 0.0)
    qform: tuple[int, float, Sequence[float], Sequence[float]] = (0, 1.0, (0, 0, 0), (0, 0, 0))
    sform: tuple[int, Array] = (0, np.zeros((3, 4)))

    def header(self, extension: bytes) -> bytes:
        """The header, by nifti1.h or nifti2.h, and four bytes that announce the extension."""
        dims = [len(self.shape), *self.shape] + [1] * (7 - len(self.shape))
        code, qfac, quaternion, offset = self.qform
        pixdim = [qfac, *self.sizes, 1, 1, 1, 1]
        rows = self.sform[1].ravel()
        bits = {"rgb": 24, "rgba": 32}.get(KINDS[self.code]) or int(KINDS[self.code][1]) * 8
        low, high = self.shown
        if self.version == 1:
            start = 352 + len(extension)
            head = struct.pack(
                f"{self.order}i35xc8h3fhhhh8f3fhbb2f2f2i80s24shh3f3f12f16s4s",
                *(348, b"\0", *dims, 0, 0, 0, 0, self.code, bits, 0, *pixdim, start, *self.scale),
                *(0, 0, self.units, high, low, 0, 0, 0, 0, b"", b"", code, self.sform[0]),
                *(*quaternion, *offset, *rows, b"", b"n+1\0"),
            )
        else:
            start = 544 + len(extension)
            head = struct.pack(
                f"{self.order}i8shh8q3d8dq2d2d2d2q80s24sii3d3d12diii16sc15x",
                *(540, b"n+2\0\r\n\x1a\n", self.code, bits, *dims, 0, 0, 0, *pixdim, start),
                *(*self.scale, high, low, 0, 0, 0, 0, b"", b"", code, self.sform[0]),
                *(*quaternion, *offset, *rows, 0, self.units, 0, b"", b"\0"),
            )
        return head + bytes((bool(extension), 0, 0, 0))


def _voxels(draw: random.Random, code: int, count: int, order: str) -> Array:
    """Voxels of a kind, with a few that are not finite."""
    random_ = np.random.default_rng(draw.getrandbits(32))
    kind = KINDS[code]
    if kind.startswith("rgb"):
        return random_.integers(0, 256, (count, len(kind)), np.uint8)
    dtype = np.dtype(order + kind)
    if dtype.kind == "f":
        values = random_.normal(100, 400, count)
        if draw.random() < 0.3:
            values[random_.integers(0, count, 5)] = draw.choice((math.nan, math.inf, -math.inf))
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    low, high = max(int(limits.min), -2000), min(int(limits.max), 30_000)
    return random_.integers(low, high, count).astype(dtype)


def _orient(draw: random.Random, fields: _Fields, traits: set[str]) -> None:
    """Draw the two forms: absent, alike, different, singular, oblique or sheared."""
    turn = _rotation(draw)
    sizes = np.asarray(fields.sizes)
    place = [draw.uniform(-100, 100) for _ in range(3)]
    ways = draw.choice(("q", "s", "both", "both", "other", "none", "bad", "sheared", "sizes"))
    quaternion, qfac = _quaternion(turn)
    if ways in ("q", "both", "other", "sizes", "sheared"):
        fields.qform = draw.choice((1, 2)), qfac, quaternion, place
    if ways in ("s", "both"):
        fields.sform = draw.choice((1, 2, 3, 4)), np.column_stack((turn * sizes, place))
    elif ways == "other":
        fields.sform = 2, np.column_stack((_rotation(draw) * sizes, place))
        traits.add("two forms")
    elif ways == "none":
        traits.add("no orientation")
    elif ways == "bad":
        fields.sform = 1, np.zeros((3, 4))
        traits |= {"bad form", "no orientation"}
    elif ways == "sheared":
        shear = np.eye(3)
        shear[0, 1] = 0.2
        fields.sform = 1, np.column_stack((turn @ shear * sizes, place))
        traits |= {"sheared", "sizes"}
    elif ways == "sizes":
        fields.sform = 1, np.column_stack((turn * sizes * (1, 1, 2), place))
        traits.add("sizes")


def _rotation(draw: random.Random) -> Array:
    """Axes in any order and direction, perhaps a little oblique."""
    order = draw.sample(range(3), 3)
    turn = np.zeros((3, 3))
    for row, column in enumerate(order):
        turn[row, column] = draw.choice((-1, 1))
    angle = draw.choice((0.0, 0.0, 0.2, -0.3))
    tilt = np.eye(3)
    tilt[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return np.asarray(tilt @ turn)


def _quaternion(turn: Array) -> tuple[tuple[float, float, float], float]:
    """b, c, d and qfac of a matrix, by the method of nifti1.h."""
    qfac = 1.0 if np.linalg.det(turn) > 0 else -1.0
    r = turn * (1, 1, qfac)
    values, vectors = np.linalg.eigh(
        np.array(
            [
                [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
                [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
                [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], 0],
                [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
            ]
        )
        / 3
    )
    b, c, d, a = vectors[:, np.argmax(values)]
    sign = 1 if a >= 0 else -1
    return (sign * b, sign * c, sign * d), qfac


def by_itk(path: Path, limits: tuple[float, float], near: Array) -> Array:
    """The middle slice as ITK has it, and the formulas of a viewer."""
    itk: Any = SimpleITK
    image = itk.ReadImage(str(path))
    while image.GetDimension() > 3:
        image = image[..., 0] if image.GetDimension() == 4 else image[..., 0, 0]
    if image.GetDimension() == 2:
        image = itk.JoinSeries(image)
    image = itk.DICOMOrient(image, "LPS")
    x, y = _across_and_down(image.GetSize())
    down, across = image.GetSpacing()[y], image.GetSpacing()[x]
    voxels = itk.GetArrayFromImage(image)
    through = 3 - x - y
    plane = voxels.take((image.GetSize()[through] - 1) // 2, axis=2 - through)
    plane = plane[::-1] if y == 2 else plane  # the head is above
    if plane.ndim == 3:
        shown = plane[..., :3].astype(float)
        if plane.shape[2] == 4:
            shown = shown * plane[..., 3:] / 255
    else:
        shown = _shown(plane.astype(float), limits)
    return _square(np.rint(shown), down / across, near)


def by_nibabel(path: Path, limits: tuple[float, float], near: Array) -> Array:
    """The middle slice as nibabel has it, and the formulas of a viewer."""
    peer: Any = nibabel
    image = peer.load(path)
    if image.header["sform_code"] and not image.header.get_sform()[:3].any():
        image.header["sform_code"] = 0
    affine = image.header.get_best_affine()
    shape = image.shape[:3] + (1,) * (3 - len(image.shape))
    colours = image.get_data_dtype().names is not None
    voxels = image.dataobj.get_unscaled() if colours else np.asanyarray(image.dataobj)
    volume = voxels.reshape(*shape, -1, order="F")[..., 0]
    turned = peer.apply_orientation(volume, peer.io_orientation(affine))
    sizes = peer.affines.voxel_sizes(
        affine @ peer.orientations.inv_ornt_aff(peer.io_orientation(affine), shape)
    )
    x, y = _across_and_down(turned.shape)
    through = 3 - x - y
    plane = turned.take((turned.shape[through] - 1) // 2, axis=through)[::-1, ::-1].T
    if colours:
        shown = np.stack([plane[name] for name in "RGB"], -1).astype(float)
        if "A" in plane.dtype.names:
            shown *= plane["A"][..., None] / 255
    else:
        shown = _shown(plane.astype(float), limits)
    return _square(np.rint(shown), sizes[y] / sizes[x], near)


def _across_and_down(shape: Sequence[int]) -> tuple[int, int]:
    """The axes of the picture: an axial slice, or the only one of a file that has just one."""
    single = [axis for axis in range(3) if shape[axis] == 1]
    through = single[0] if len(single) == 1 else 2
    x, y = (axis for axis in range(3) if axis != through)
    return x, y


def _shown(plane: Array, limits: tuple[float, float]) -> Array:
    low, high = limits
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        known = plane[np.isfinite(plane)]
        low, high = np.percentile(known, 1), np.percentile(known, 99)
    return np.clip(np.nan_to_num((plane - low) / (high - low), nan=0.0), 0, 1) * 255


def _square(shown: Array, ratio: float, near: Array) -> Array:
    """Each pixel again and again, until rows are as far apart as columns.

    A side that ends in half a pixel may be rounded as that of the picture `near` is.
    """
    rows, columns = shown.shape[:2]
    if abs(ratio - 1) < 0.005:
        return shown
    sides = rows * max(1, ratio), columns * max(1, 1 / ratio)
    height, width = (
        there if abs(side - there) < 0.51 else round(side)
        for side, there in zip(sides, near.shape[:2], strict=True)
    )
    y = np.minimum(((np.arange(height) + 0.5) * rows / height).astype(int), rows - 1)
    x = np.minimum(((np.arange(width) + 0.5) * columns / width).astype(int), columns - 1)
    return np.asarray(shown[y][:, x])


def judged(made: Made, path: Path) -> str:
    """What becomes of a file: "agrees", a kind in `EXPLAINED`, or what is wrong."""
    path.write_bytes(made.data)
    twin = path.with_name("twin.nii")
    twin.write_bytes(made.twin)
    try:
        pixels: Array = load_image(path).pixels
    except ImageError as error:
        return f"refused: {error.what}"
    try:
        wrong = difference(pixels, by_itk(twin, made.limits, pixels))
    except RuntimeError:
        wrong = "ITK does not read it"
    if not wrong:
        return "agrees"
    for kind in EXPLAINED:
        if kind in made.traits:
            wrong = difference(pixels, by_nibabel(path, made.limits, pixels))
            return f"{kind}, and {wrong}" if wrong else kind
    return wrong


def difference(pixels: Array, wanted: Array) -> str:
    """What is wrong with a picture; nothing if it is near enough."""
    wanted = wanted if wanted.ndim == 3 else np.repeat(wanted[..., None], 3, axis=2)
    if wanted.shape != pixels.shape:
        return f"is {pixels.shape}, not {wanted.shape}"
    away = np.abs(wanted - pixels)
    return "" if away.max() <= NEAR else f"differs by {away.mean():.1f} grey levels"


def run(numbers: Sequence[int], keep: Path | None = None) -> collections.Counter[str]:
    """Judge the files of these numbers; those that differ are printed, and kept in a folder."""
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            file = made(number)
            packed = file.data.startswith(b"\x1f\x8b")
            path = Path(keep or folder, f"{number}.nii{'.gz' * packed}")
            verdict = judged(file, path)
            good = verdict == "agrees" or verdict in EXPLAINED
            found[verdict if good else "differs"] += 1
            if not good:
                print(f"{number}: {verdict}; {file.about}")
            if good or keep is None:
                path.unlink()
    return found


def main() -> int:
    """The command line; 1 where a picture differs and nothing explains it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    found = run(range(options.first, options.first + options.count), options.keep)
    for verdict, count in found.most_common():
        print(f"{count:6} {verdict}  {EXPLAINED.get(verdict, '')}")
    return 1 if found["differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
