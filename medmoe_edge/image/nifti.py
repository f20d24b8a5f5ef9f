"""NIfTI: one axial slice of a volume, or its only slice, as a radiologist looks at it.

The header is read as nifti1.h says and as its reference library does, which takes many an odd value
for an absent one; nibabel's own checks refuse some of these files.
"""

import dataclasses
import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from medmoe_edge.errors import ImageError, MissingDependencyError, Notice
from medmoe_edge.image.pixels import (
    GZIP,
    MAX_BYTES,
    MAX_PIXELS,
    Image,
    Window,
    as_pixels,
    check_size,
    is_nifti,
    pick_frame,
    show_percentiles,
    show_range,
    shown_name,
    square_pixels,
    unknown,
)
from medmoe_edge.image.raster_display import show

try:
    import nibabel
    from nibabel.orientations import io_orientation
except ImportError:
    raise MissingDependencyError("nibabel", "images") from None

HEADER_BYTES = {1: 348, 2: 540}  # by the version of NIfTI
UNITS = {1: 1000.0, 3: 0.001}  # metres and micrometres in mm; anything else is taken for mm
UNREAD = {0: "of no stated kind", 1: "single bits"}
UNREAD |= dict.fromkeys((32, 1792, 2048), "complex numbers")
KNOWN = (2, 4, 8, 16, 64, 128, 256, 512, 768, 1024, 1280, 1536, 2304)
MAX_RATIO = 1100  # deflate makes nothing smaller by more than 1,032 times
MAX_INFLATED = 2**32  # bytes of a gzip file until the end of the slice
MAX_SUMMED = 2**29  # bytes that are inflated only to compare the sum of what was packed
MAX_TRAILING = 2**20  # bytes after the last voxel
CHUNK = 2**22
# Where pictures begin, at the left or above, along axes to the right, front and top; the opposite.
BEGIN, END = "RAH", "LPF"
CUT = "Copy it again from where it came, whole."


def read_nifti(path: Path, frame: int | None, most_pixels: int = MAX_PIXELS) -> Image:
    """Read a slice of a .nii or .nii.gz file; of a 4-D one, of its first volume.

    Slices count from the feet upwards: along the last axis of the canonical orientation, RAS+. A
    coronal or sagittal file of one slice shows that slice: across it there is but a line of voxels.
    Whatever the size of the volume, only the slice is kept in memory. The errors of `load_image`,
    and whatever nibabel raises.
    """
    name = shown_name(path)
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        try:
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
            return _read(_Volume(file, name), packed, path.stat().st_size, frame, most_pixels)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            if isinstance(error, EOFError):
                raise ImageError(f"{name} is cut off within its packed data.", CUT) from None
            raise ImageError(
                f"{name} is damaged: it does not match its own checksum.",
                "Copy it again from where it came.",
            ) from None


class _Volume:
    """An open file and its header."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file, self.name = file, name
        head = file.read(HEADER_BYTES[2])
        if not is_nifti(head):
            raise unknown(f"What is packed in {name}" if head[:2] != GZIP else name, head)
        self.version = 2 if head[4:7] in (b"n+2", b"ni2") else 1
        kind = nibabel.Nifti2Header if self.version == 2 else nibabel.Nifti1Header
        size = HEADER_BYTES[self.version]
        if len(head) < size:
            raise ImageError(f"{name} is cut off within its header.", CUT)
        self.header: Any = kind(head[:size], check=False)  # type: ignore[no-untyped-call]
        if self.header["magic"].item().startswith(b"ni"):
            raise ImageError(
                f"{name} is one half of an .hdr and .img pair.", "Save both as one .nii file."
            )
        self.shape, self.volumes = self._shape()
        self.dtype = self._dtype()
        stated, least = float(self.header["vox_offset"]), HEADER_BYTES[self.version]
        # absent, or nothing that can be meant: behind the four bytes that announce extensions
        self.offset = int(stated) if least <= stated < 2**62 else least + 4
        self.bytes = math.prod(self.shape) * self.volumes * self.dtype.itemsize
        self.affine, self.notices = self._affine()
        self.sides_known = not self.notices
        if self.volumes > 1:
            first = f"The file holds {self.volumes} volumes; the first of them is shown."
            self.notices += (Notice("first_volume", first),)

    def _shape(self) -> tuple[tuple[int, int, int], int]:
        """Voxels along the file's first three axes, and how many such volumes there are."""
        count, *sizes = (int(n) for n in self.header["dim"])
        if not 1 <= count <= 7:
            raise ImageError(
                f"{self.name} says that it has {count} axes, where a volume has 1 to 7.",
                "Its header is damaged: export it again.",
            )
        first = tuple(sizes[:count][:3]) + (1,) * (3 - count)
        if min(first) < 1:
            raise ImageError(
                f"{self.name} has no pixels.", "Give an image with at least one pixel."
            )
        # as the reference library does: any other axis of less than one has one
        return cast(tuple[int, int, int], first), math.prod(max(1, n) for n in sizes[3:count])

    def _dtype(self) -> np.dtype[Any]:
        code = int(self.header["datatype"])
        if code in UNREAD:
            raise ImageError(
                f"The voxels of {self.name} are {UNREAD[code]}.",
                "Save what should be seen of them, such as the magnitude, as plain numbers.",
            )
        found: np.dtype[Any] | None = self.header.get_data_dtype() if code in KNOWN else None
        if found is None or not found.itemsize:  # where the machine has no such float
            raise ImageError(
                f"The voxels of {self.name} are of an unread kind, number {code}.",
                "Save them as integers or 32-bit float.",
            )
        return found

    def _affine(self) -> tuple[npt.NDArray[np.float64], tuple[Notice, ...]]:
        """From voxels to mm, RAS+: the sform, else the qform, else the sizes of voxels alone."""
        header = self.header
        sizes = np.abs(header["pixdim"][1:4])
        header["pixdim"][1:4] = np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1)
        header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
        ways = (("sform_code", header.get_sform), ("qform_code", header.get_qform))
        for code, get in ways:
            if header[code] > 0:
                try:
                    found = np.asarray(get(), np.float64)
                except (ValueError, nibabel.spatialimages.HeaderDataError):
                    continue  # the quaternion is none
                # each axis of a volume runs somewhere else
                if np.isfinite(found).all() and np.linalg.matrix_rank(found[:3, :3]) == 3:
                    return found, ()
        unknown_sides = Notice(
            "orientation_unknown",
            "The file does not say where left and right are; they may be swapped.",
        )
        return np.asarray(header.get_base_affine(), np.float64), (unknown_sides,)

    def axes(self) -> tuple[list[int], list[int]]:
        """The axes that run most to the right, front and top; each file axis's sign there."""
        found = io_orientation(self.affine)  # type: ignore[no-untyped-call]
        canonical, sign = found.T
        return [canonical.tolist().index(axis) for axis in range(3)], [int(s) for s in sign]

    def sizes(self) -> list[float]:
        """Millimetres between voxels along the file's first three axes."""
        factor = UNITS.get(int(self.header["xyzt_units"]) & 7, 1.0)
        return [float(size) * factor for size in np.linalg.norm(self.affine[:3, :3], axis=0)]

    def scale(self) -> tuple[float, float]:
        """What stored values are multiplied by, and what is added to them."""
        slope, intercept = float(self.header["scl_slope"]), float(self.header["scl_inter"])
        if not math.isfinite(slope) or slope == 0:
            return 1.0, 0.0
        return slope, intercept if math.isfinite(intercept) else 0.0

    def range(self) -> Window | None:
        """The values that are shown black and white, if the file says so: cal_min and cal_max."""
        low, high = float(self.header["cal_min"]), float(self.header["cal_max"])
        return (low, high) if math.isfinite(high - low) and low < high else None


def _read(
    volume: _Volume, packed: bool, file_bytes: int, frame: int | None, most_pixels: int
) -> Image:
    axes, sign = volume.axes()
    shape, name = volume.shape, volume.name
    single = [way for way in range(3) if shape[axes[way]] == 1]
    through = single[0] if len(single) == 1 else 2
    x, y = (way for way in range(3) if way != through)  # of the picture: across and down
    across, down, depth = axes[x], axes[y], axes[through]
    check_size(name, shape[down], shape[across], most_pixels)
    index = pick_frame(name, frame, shape[depth])
    notices = volume.notices
    if volume.offset + volume.bytes > file_bytes * (MAX_RATIO if packed else 1):
        raise ImageError(f"{name} is cut off: voxels that its header states are missing.", CUT)
    plane = _plane(volume, depth, index if sign[depth] > 0 else shape[depth] - 1 - index, packed)
    if packed and not _matches_sum(volume):
        unchecked = "The file is too large to be compared with its own checksum."
        notices += (Notice("unchecked", unchecked),)
    plane = plane.T if across < down else plane
    # Radiological convention [H, W]: front or head above, the right hand or the front on the left.
    image = _shown(volume, plane[:: -sign[down], :: -sign[across]])
    sizes = volume.sizes()
    spacing = sizes[down], sizes[across]
    sides = BEGIN[x], BEGIN[y], END[x], END[y]
    image = dataclasses.replace(
        image,
        spacing=spacing,
        frames=shape[depth],
        notices=notices + image.notices,
        sides=sides if volume.sides_known else None,
    )
    return square_pixels(image, spacing[0] / spacing[1], most_pixels)


def _plane(volume: _Volume, axis: int, index: int, packed: bool) -> npt.NDArray[Any]:
    """The voxels at `index` along an axis of the file, `[lower, higher]` of the other two.

    In a file, the first axis runs fastest. Read line by line where the plane does not lie in one
    piece: nibabel would take all of the volume into memory.
    """
    first, second, third = volume.shape
    item = volume.dtype.itemsize
    if math.prod(volume.shape) // volume.shape[axis] * item > MAX_BYTES:
        raise ImageError(
            f"One slice of {volume.name} has more than the limit of {MAX_BYTES:,} bytes.",
            "Save it as 8 or 16 bit integers, or crop it.",
        )
    if packed and volume.offset + first * second * third * item > MAX_INFLATED:
        raise ImageError(f"{volume.name} unpacks to too much.", "Unpack it with gunzip first.")
    if axis == 2:
        data = _exactly(volume, index * first * second * item, first * second * item)
        return np.frombuffer(data, volume.dtype).reshape(second, first).T
    if axis == 1:
        lines = [
            _exactly(volume, (k * second + index) * first * item, first * item)
            for k in range(third)
        ]
        return np.frombuffer(b"".join(lines), volume.dtype).reshape(third, first).T
    plane = np.empty(second * third, volume.dtype)
    step = max(1, CHUNK // (first * item))
    for line in range(0, second * third, step):
        count = min(step, second * third - line)
        data = _exactly(volume, line * first * item, count * first * item)
        plane[line : line + count] = np.frombuffer(data, volume.dtype)[index::first]
    return plane.reshape(third, second).T


def _exactly(volume: _Volume, start: int, size: int) -> bytes:
    volume.file.seek(volume.offset + start)
    data = volume.file.read(size)
    if len(data) < size:
        raise ImageError(f"{volume.name} is cut off within its voxels.", CUT)
    return data


def _matches_sum(volume: _Volume) -> bool:
    """Inflate the rest, so that gzip compares its sum; False where that would take too long."""
    end = volume.offset + volume.bytes
    if end > MAX_SUMMED:
        return False
    left = end + MAX_TRAILING - volume.file.tell()
    while left > 0:
        data = volume.file.read(min(left, CHUNK))
        if not data:
            if volume.file.tell() < end:
                raise ImageError(f"{volume.name} is cut off within its voxels.", CUT)
            return True
        left -= len(data)
    return False


def _shown(volume: _Volume, plane: npt.NDArray[Any]) -> Image:
    """A plane `[H, W]` made visible: pixels, window and notices."""
    if plane.dtype.names:  # RGB24 or RGBA32
        channels = np.stack([plane[channel] for channel in plane.dtype.names], axis=-1)
        shown = show(Pillow.fromarray(channels.astype(np.uint8)))
        return Image(shown.pixels, notices=shown.notices)
    slope, intercept = volume.scale()
    values = plane if (slope, intercept) == (1, 0) else plane.astype(float) * slope + intercept
    limits = volume.range()
    if limits is None:
        pixels, window = show_percentiles(values)
    else:
        low, high = limits
        pixels, window = show_range(values, low, high), ((low + high) / 2, high - low)
    return Image(as_pixels(pixels), window=window)
