"""NIfTI: one axial slice of a volume, as a radiologist looks at it."""

import gzip
import io
import math
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import ImageError, MissingDependencyError
from medmoe_edge.image.loading import (
    GZIP_SIGNATURE,
    KINDS,
    MAX_BYTES,
    Image,
    Pixels,
    Window,
    as_pixels,
    check_size,
    is_nifti,
    pick_frame,
    show_percentiles,
    shown_name,
)

try:
    import nibabel
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.orientations import io_orientation
except ImportError:
    raise MissingDependencyError("nibabel", "images") from None

HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}  # anything else is taken for mm


def read_nifti(path: Path, frame: int | None) -> Image:
    """Read a slice of a .nii or .nii.gz file; of a 4-D one, of its first volume.

    Slices count from the feet upwards: along the last axis of the canonical orientation, RAS+.
    Of a gzip file only what lies before the slice's end is inflated, and nothing of it is kept.
    Errors as of `medmoe_edge.image.loading.load_image`, and whatever nibabel raises.
    """
    name = shown_name(path)
    with _open(path) as file:
        header = _read_header(file, name)
        shape = _shape(header, name)
        (right, front, up), sign = _axes(header)
        check_size(name, shape[front], shape[right])
        index = pick_frame(name, frame, shape[up])
        wanted: list[int | slice] = [slice(None)] * 3 + [0] * (len(shape) - 3)
        wanted[up] = index if sign[up] > 0 else shape[up] - 1 - index
        plane = _read(file, header, shape, tuple(wanted))
    plane = plane.T if right < front else plane
    # Radiological convention [H, W]: the patient's front above, the right hand on the left.
    pixels, window = _show(plane[:: -sign[front], :: -sign[right]], name)
    sizes = _voxel_size(header)
    spacing = (sizes[front], sizes[right]) if min(sizes) > 0 else None
    return Image(as_pixels(pixels), None, window, spacing, shape[up])


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_SIGNATURE
    return cast(IO[bytes], gzip.open(path)) if packed else path.open("rb")


def _read_header(file: IO[bytes], name: str) -> Any:
    head = file.read(HEADER_BYTES)
    if not is_nifti(head):
        raise ImageError(f"{name} is not an image that can be read.", f"Give {KINDS}.")
    second = head[4:7] in (b"n+2", b"ni2")
    kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
    header: Any = kind.from_fileobj(io.BytesIO(head))  # type: ignore[no-untyped-call]
    if header["magic"].item().startswith(b"ni"):
        raise ImageError(f"{name} is one half of an .hdr and .img pair.", "Save it as .nii.")
    return header


def _shape(header: Any, name: str) -> tuple[int, ...]:
    """The volume's shape with at least three axes, after its size was checked."""
    shape = tuple(int(n) for n in header.get_data_shape())
    shape += (1,) * (3 - len(shape))
    if min(shape) < 1:
        raise ImageError(f"{name} has no pixels.", "Give an image with at least one pixel.")
    size = math.prod(shape) * int(header.get_data_dtype().itemsize)
    if max(size, int(header.get_data_offset())) > MAX_BYTES:
        raise ImageError(
            f"{name} holds {' x '.join(map(str, shape))} voxels, more than the limit of "
            f"{MAX_BYTES:,} bytes.",
            "Split or crop the volume.",
        )
    return shape


def _axes(header: Any) -> tuple[list[int], list[int]]:
    """The file's axes that run most to the right, front and top; each file axis's sign there."""
    found = io_orientation(header.get_best_affine())  # type: ignore[no-untyped-call]
    canonical, sign = found.T  # NaN where the affine drops an axis
    return [canonical.tolist().index(axis) for axis in range(3)], [int(s) for s in sign]


def _read(
    file: IO[bytes], header: Any, shape: tuple[int, ...], wanted: tuple[int | slice, ...]
) -> npt.NDArray[Any]:
    slope, intercept = header.get_slope_inter()
    scale = (1.0 if slope is None else slope, 0.0 if intercept is None else intercept)
    spec = (shape, header.get_data_dtype(), header.get_data_offset(), *scale)
    proxy = ArrayProxy(file, spec)  # type: ignore[no-untyped-call]
    return np.asarray(proxy[wanted])


def _show(plane: npt.NDArray[Any], name: str) -> tuple[Pixels, Window | None]:
    if plane.dtype.names:  # RGB24 or RGBA32
        return np.stack([plane[channel] for channel in "RGB"], axis=-1).astype(np.uint8), None
    if plane.dtype.kind not in "iuf":
        raise ImageError(f"{name} holds no plain numbers.", "Save its magnitude.")
    return show_percentiles(plane)


def _voxel_size(header: Any) -> list[float]:
    """Millimetres along the file's first three axes; 0 where unknown."""
    factor = MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    zooms = [float(zoom) * factor for zoom in header.get_zooms()[:3]]
    zooms += [1.0] * (3 - len(zooms))
    return [zoom if math.isfinite(zoom) else 0.0 for zoom in zooms]
