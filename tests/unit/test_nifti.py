"""NIfTI: the right slice, the right way up, and no more of the file than that."""

import gzip
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hostile import check_damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from medmoe_edge.errors import ImageError, MissingDependencyError
from medmoe_edge.image.loading import load_image

nibabel = pytest.importorskip("nibabel", reason="needs nibabel")

ROOT = Path(__file__).parents[2]
# [right, front, up] in the canonical orientation; every value differs
VOLUME = np.random.default_rng(0).permutation(5 * 6 * 7).reshape(5, 6, 7).astype(np.int16)
AFFINE = np.diag([2.0, 2.0, 4.0, 1.0])


def shown(plane: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """1st to 99th percentile; rows from the front, columns from the patient's right."""
    low, high = np.percentile(plane, [1, 99])
    pixels = np.clip((plane - low) / (high - low), 0, 1) * 255
    rows = [[pixels[x, y] for x in reversed(range(5))] for y in reversed(range(6))]
    return np.asarray(rows)


def saved(folder: Path, image: Any, name: str = "a.nii") -> Path:
    nibabel.save(image, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SAR", "PIR", "ILP"])
def test_any_orientation_gives_the_same_slices(
    axes: str, kind: str, name: str, tmp_path: Path
) -> None:
    orientations = nibabel.orientations
    image = getattr(nibabel, kind)(VOLUME, AFFINE)
    turn = orientations.ornt_transform(
        orientations.io_orientation(AFFINE), orientations.axcodes2ornt(axes)
    )
    path = saved(tmp_path, image.as_reoriented(turn), name)
    for frame in range(7):
        result = load_image(path, frame=frame)
        assert np.abs(result.pixels[..., 0] - shown(VOLUME[..., frame])).max() <= 0.5001
        assert (result.pixels == result.pixels[..., :1]).all()
        assert (result.frames, result.spacing, result.modality) == (7, (2, 2), None)
    np.testing.assert_array_equal(load_image(path).pixels, load_image(path, frame=3).pixels)
    for frame in (7, -1):
        with pytest.raises(ImageError, match="has 7 frames; there is no frame"):
            load_image(path, frame=frame)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIR", "AIL"])
@pytest.mark.parametrize(
    ("through", "sides"), [(0, ("A", "H", "P", "F")), (1, ("R", "H", "L", "F"))]
)
def test_a_file_of_one_slice_shows_it_whichever_way_it_lies(
    through: int, sides: Any, axes: str, tmp_path: Path
) -> None:
    plane = VOLUME.take(2, through)  # [right or front, up]
    orientations = nibabel.orientations
    image = nibabel.Nifti1Image(np.expand_dims(plane, through), AFFINE)
    turn = orientations.ornt_transform(
        orientations.io_orientation(AFFINE), orientations.axcodes2ornt(axes)
    )
    result = load_image(saved(tmp_path, image.as_reoriented(turn)))
    assert (result.frames, result.sides) == (1, sides)
    low, high = np.percentile(plane, [1, 99])
    expected = np.clip((plane - low) / (high - low), 0, 1).T[::-1, ::-1] * 255
    expected = expected.repeat(2, axis=0)  # voxels are twice as high as wide
    assert np.abs(result.pixels[..., 0] - expected).max() <= 0.5001


def test_scaling_and_units(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME, AFFINE)
    image.header.set_slope_inter(2, -100)
    image.header.set_xyzt_units("micron")
    result = load_image(saved(tmp_path, image), frame=0)
    assert result.spacing == pytest.approx((0.002, 0.002))
    assert result.window is not None
    low, high = np.percentile(VOLUME[..., 0] * 2.0 - 100, [1, 99])
    assert result.window == pytest.approx(((low + high) / 2, high - low))


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 1, 2), (5, 6, 1, 2, 3)])
def test_other_numbers_of_axes(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    result = load_image(saved(tmp_path, nibabel.Nifti1Image(values, AFFINE)))
    first = values.reshape(5, 6, -1)[..., 0]
    assert np.abs(result.pixels[..., 0] - shown(first)).max() <= 0.5001
    assert result.frames == 1


def test_colour(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 2, 3), np.uint8)
    voxels = colours.view([(channel, "u1") for channel in "RGB"])[..., 0]
    result = load_image(saved(tmp_path, nibabel.Nifti1Image(voxels, AFFINE)), frame=1)
    np.testing.assert_array_equal(result.pixels, colours[::-1, ::-1, 1].transpose(1, 0, 2))


def codes(image: Any) -> list[str]:
    return [notice.code for notice in image.notices]


CASE = ROOT.parent / "shared" / "cases" / "20-nifti-cal-range"


@pytest.mark.skipif(not CASE.is_dir(), reason="the cases lie beside a checkout")
def test_the_case_of_a_display_range() -> None:
    """Its header shows -160 as black and 240 as white; it has no expected picture of its own."""
    image = nibabel.load(CASE / "in.nii")
    plane = np.asarray(image.dataobj)[..., 2]  # of five, RAS
    expected = np.clip((plane.T[::-1, ::-1] + 160.0) / 400, 0, 1) * 255
    picture = CASE / "expected.png"
    if picture.exists():
        expected = np.asarray(Pillow.open(picture).convert("L")).astype(float)
    found = load_image(CASE / "in.nii")
    assert np.abs(found.pixels[..., 0] - expected).mean() <= 2
    assert found.window == (40, 400)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_the_display_range_of_the_header(dtype: Any, tmp_path: Path) -> None:
    values = (VOLUME % 200).astype(dtype)
    image = nibabel.Nifti1Image(values, AFFINE)
    image.header["cal_min"], image.header["cal_max"] = 40, 120
    if np.dtype(dtype).kind == "i":
        image.header.set_slope_inter(2, 10)  # the range is one of scaled values
        values = values * 2.0 + 10
    found = load_image(saved(tmp_path, image), frame=3)
    expected = np.clip((values[..., 3].T[::-1, ::-1] - 40.0) / 80, 0, 1) * 255
    assert np.abs(found.pixels[..., 0] - expected).max() <= 1
    assert found.window == (80, 80)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (5, 5), (9, 3), (np.nan, 1), (0, np.inf), (-np.inf, np.inf)],
)
def test_a_display_range_that_is_none(low: float, high: float, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME, AFFINE)
    image.header["cal_min"], image.header["cal_max"] = low, high
    found = load_image(saved(tmp_path, image), frame=2)
    assert np.abs(found.pixels[..., 0] - shown(VOLUME[..., 2])).max() <= 0.5001


def test_a_display_range_beside_all_values_is_said_to_show_nothing(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME, AFFINE)
    image.header["cal_min"], image.header["cal_max"] = 10_000, 20_000
    found = load_image(saved(tmp_path, image))
    assert not found.pixels.any()
    assert codes(found) == ["no_contrast"]


@pytest.mark.parametrize(
    ("slope", "intercept", "scale"),
    [
        *((0, 5, (1, 0)), (np.nan, np.nan, (1, 0)), (np.inf, 0, (1, 0)), (2, np.nan, (2, 0))),
        *((2, np.inf, (2, 0)), (-1.5, 4, (-1.5, 4))),
    ],
)
def test_odd_scaling(
    slope: float, intercept: float, scale: tuple[float, float], tmp_path: Path
) -> None:
    data = bytearray(nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes())
    struct.pack_into("<ff", data, 112, slope, intercept)
    path = tmp_path / "scaled.nii"
    path.write_bytes(data)
    found = load_image(path, frame=0)
    plane = VOLUME[..., 0] * scale[0] + scale[1]
    assert np.abs(found.pixels[..., 0] - shown(plane)).max() <= 0.5001
    assert found.window is not None
    low, high = np.percentile(plane, [1, 99])
    assert found.window == pytest.approx(((low + high) / 2, high - low))


def test_what_is_not_finite_counts_for_nothing(tmp_path: Path) -> None:
    values = VOLUME.astype(np.float32)
    plane = values[..., 3].copy()
    values[0, 0, 3], values[1, 0, 3], values[2, 0, 3] = np.nan, np.inf, -np.inf
    known = values[..., 3][np.isfinite(values[..., 3])]
    low, high = np.percentile(known, [1, 99])
    plane[0, 0], plane[1, 0], plane[2, 0] = low, high, low
    expected = np.clip((plane - low) / (high - low), 0, 1).T[::-1, ::-1] * 255
    found = load_image(saved(tmp_path, nibabel.Nifti1Image(values, AFFINE)), frame=3)
    assert np.abs(found.pixels[..., 0] - expected).max() <= 0.51
    nothing = np.full((5, 6, 1), np.nan, np.float32)
    found = load_image(saved(tmp_path, nibabel.Nifti1Image(nothing, AFFINE), "none.nii"))
    assert codes(found) == ["no_contrast"]


def test_true_proportions(tmp_path: Path) -> None:
    for sizes, shape in (((2, 3, 4), (9, 5)), ((3, 1, 1), (6, 15)), ((1, 1, 9), (6, 5))):
        image = nibabel.Nifti1Image(VOLUME, np.diag([*map(float, sizes), 1.0]))
        found = load_image(saved(tmp_path, image), frame=3)
        assert found.pixels.shape[:2] == shape
        assert found.spacing == pytest.approx((min(sizes[:2]),) * 2)


@pytest.mark.parametrize("kind", ["little", "big"])
@pytest.mark.parametrize(
    "dtype",
    [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64],
)
def test_every_kind_of_voxels(dtype: Any, kind: Any, tmp_path: Path) -> None:
    values = (VOLUME % 120).astype(dtype)
    head = nibabel.Nifti1Header(endianness="<" if kind == "little" else ">")
    head.set_data_dtype(dtype)
    image = nibabel.Nifti1Image(values, AFFINE, header=head, dtype=np.dtype(dtype))
    found = load_image(saved(tmp_path, image), frame=4)
    assert np.abs(found.pixels[..., 0] - shown(values[..., 4])).max() <= 0.5001


def test_colour_with_alpha(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 2, 4), np.uint8)
    colours[..., 3] = 0  # as many programs leave it
    voxels = colours.view([(channel, "u1") for channel in "RGBA"])[..., 0]
    found = load_image(saved(tmp_path, nibabel.Nifti1Image(voxels, AFFINE)), frame=1)
    np.testing.assert_array_equal(found.pixels, colours[::-1, ::-1, 1, :3].transpose(1, 0, 2))
    assert codes(found) == ["transparency_ignored"]


def test_of_several_volumes_the_first_is_shown_and_said(tmp_path: Path) -> None:
    values = np.stack([VOLUME, VOLUME[::-1], VOLUME * 2], axis=-1)
    found = load_image(saved(tmp_path, nibabel.Nifti1Image(values, AFFINE)), frame=1)
    assert np.abs(found.pixels[..., 0] - shown(VOLUME[..., 1])).max() <= 0.5001
    assert codes(found) == ["first_volume"]


def _without_forms(**fields: Any) -> bytes:
    """A file that states no orientation, but for these fields of its header."""
    data = bytes(nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes())
    head: Any = nibabel.Nifti1Header(data[:348], check=False)
    head["sform_code"] = head["qform_code"] = 0
    for name in ("quatern_b", "quatern_c", "quatern_d"):
        head[name] = 0
    for name, value in fields.items():
        head[name] = value
    return bytes(head.binaryblock) + data[348:]


def test_without_orientation_it_is_said(tmp_path: Path) -> None:
    """As nibabel and FSL take it: the first axis runs to the left."""
    found = load_image_of(tmp_path / "none.nii", _without_forms(), 2)
    assert np.abs(found.pixels[..., 0] - shown(VOLUME[::-1, :, 2])).max() <= 0.5001
    assert codes(found) == ["orientation_unknown"]


def test_an_impossible_form_is_passed_over(tmp_path: Path) -> None:
    zero = {"sform_code": 1, "srow_x": 0, "srow_y": 0, "srow_z": 0}
    path = tmp_path / "odd.nii"
    assert codes(load_image_of(path, _without_forms(**zero))) == ["orientation_unknown"]
    # the qform, identity here, is then what counts
    found = load_image_of(path, _without_forms(**zero, qform_code=1), 2)
    assert codes(found) == []
    assert np.abs(found.pixels[..., 0] - shown(VOLUME[..., 2])).max() <= 0.5001
    odd = {"quatern_b": 0.9, "quatern_c": 0.9, "quatern_d": 0.9}  # no quaternion of length 1
    found = load_image_of(path, _without_forms(**odd, qform_code=1))
    assert codes(found) == ["orientation_unknown"]


def test_the_sform_comes_before_the_qform(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME, AFFINE)
    image.set_qform(np.diag([-2.0, -2.0, 4.0, 1.0]), 1)
    image.set_sform(AFFINE, 2)
    found = load_image(saved(tmp_path, image), frame=5)
    assert np.abs(found.pixels[..., 0] - shown(VOLUME[..., 5])).max() <= 0.5001


@pytest.mark.parametrize("pixdim", [(0, 2, 2, 4), (1, -2, 2, 4), (1, 0, 0, 0), (-3, 2, 2, 4)])
def test_odd_sizes(pixdim: tuple[float, ...], tmp_path: Path) -> None:
    data = bytearray(nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes())
    struct.pack_into("<4f", data, 76, *pixdim)
    path = tmp_path / "sizes.nii"
    path.write_bytes(data)
    found = load_image(path, frame=2)  # the sform has its own
    assert np.abs(found.pixels[..., 0] - shown(VOLUME[..., 2])).max() <= 0.5001


@pytest.mark.parametrize("offset", [0.0, 348.0, 352.0, -1.0, np.nan])
def test_odd_offsets(offset: float, tmp_path: Path) -> None:
    data = bytearray(nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes())
    struct.pack_into("<f", data, 108, offset)
    if offset == 348:
        del data[348:352]
    path = tmp_path / "offset.nii"
    path.write_bytes(data)
    found = load_image(path, frame=2)
    assert np.abs(found.pixels[..., 0] - shown(VOLUME[..., 2])).max() <= 0.5001


def test_the_sum_of_what_was_packed_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "packed.nii.gz"
    data = gzip.compress(nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes(), 1)
    assert load_image_of(path, data).notices == ()
    for at in range(len(data) - 8, len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(ImageError, match=r"does not match its own checksum|cut off"):
            load_image_of(path, bytes(damaged))
    for size in range(600, len(data), 37):
        with pytest.raises(ImageError, match="is cut off"):
            load_image_of(path, data[:size])


def load_image_of(path: Path, data: bytes, frame: int | None = None) -> Any:
    path.write_bytes(data)
    return load_image(path, frame=frame)


@pytest.mark.parametrize("axes", ["RAS", "SAR", "ASR"])
def test_one_slice_of_a_large_volume_is_read_and_no_more(axes: str, tmp_path: Path) -> None:
    """128 MB long, whichever axis runs upwards."""
    sizes = {"R": 512, "A": 256, "S": 512}
    shape = tuple(sizes[axis] for axis in axes)
    head = nibabel.Nifti1Header()
    head.set_data_shape(shape)
    head.set_data_dtype(np.int16)
    rows = {"R": "srow_x", "A": "srow_y", "S": "srow_z"}
    for place, axis in enumerate(axes):
        head[rows[axis]] = np.eye(4)[place]
    head["sform_code"] = 1
    head["vox_offset"] = 352
    path = tmp_path / "large.nii"
    with path.open("wb") as file:
        file.write(bytes(head.binaryblock) + bytes(4))
        file.truncate(352 + 2 * 2**26)
    tracemalloc.start()
    found = load_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.pixels.shape == (256, 512, 3)
    assert found.frames == 512
    assert peak < 20e6


def header(shape: tuple[int, ...], **fields: Any) -> bytes:
    """A NIfTI file that says its size and holds not one voxel."""
    head = nibabel.Nifti1Header()
    head.set_data_shape(shape)
    head.set_data_dtype(np.int16)
    head["vox_offset"] = 352
    for name, value in fields.items():
        head[name] = value
    return bytes(head.binaryblock) + bytes(4)


BAD = {
    "no voxels": (header((5, 6, 7)), "cut off"),
    "half": (nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes()[:-300], "cut off"),
    "all but one voxel": (nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes()[:-2], "cut off"),
    "no size": (header((5, 0, 7)), "has no pixels"),
    "no slices": (header((5, 6, 0)), "has no pixels"),
    "a large slice": (header((20_000, 20_000, 1)), "limit of 100,000,000 pixels"),
    "a large volume": (header((2_000, 2_000, 2_000)), "cut off"),
    "far away": (header((5, 6, 7), vox_offset=2.0**40), "cut off"),
    "no axes": (header((5, 6, 7), dim=[0, 5, 6, 7, 1, 1, 1, 1]), "has 0 axes"),
    "eight axes": (header((5, 6, 7), dim=[8, 5, 6, 7, 1, 1, 1, 1]), "8 axes"),
    "bits": (header((5, 6, 7), datatype=1), "single bits"),
    "no kind": (header((5, 6, 7), datatype=0), "of no stated kind"),
    "an unheard-of kind": (header((5, 6, 7), datatype=77), "unread kind, number 77"),
    "a pair": (header((5, 6, 7), magic=b"ni1"), "one half of an .hdr and .img pair"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, packed: bool, tmp_path: Path) -> None:
    data, message = BAD[name]
    path = tmp_path / "brain.nii.gz"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, nibabel.Nifti1Image(VOLUME.astype(np.complex64), AFFINE))
    with pytest.raises(ImageError, match="complex numbers"):
        load_image(path)


def test_a_gzip_bomb_never_goes_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a small volume come 50 MB of zeros, of which little is inflated, and nothing kept."""
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(
        gzip.compress(nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes() + bytes(50 << 20))
    )
    inflated = 0

    class Counted(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal inflated
            data = super().read(size)
            inflated += len(data)
            return data

    monkeypatch.setattr(gzip, "GzipFile", Counted)
    image = load_image(path)
    assert image.frames == 7
    assert [notice.code for notice in image.notices] == ["unchecked"]
    assert 0 < inflated < 2 << 20


def test_without_nibabel_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, nibabel.Nifti1Image(VOLUME, AFFINE))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    monkeypatch.delitem(sys.modules, "medmoe_edge.image.nifti")
    with pytest.raises(MissingDependencyError, match="nibabel"):
        load_image(path)


SEEDS = [
    data
    for plain in (
        nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes(),
        nibabel.Nifti2Image(VOLUME, AFFINE).to_bytes(),
    )
    for data in (plain, gzip.compress(plain, mtime=0))
]
EDITS = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8)


@settings(max_examples=200)
@given(data=st.sampled_from(SEEDS), edits=EDITS, cut=st.none() | st.integers(1, 900))
def test_hostile_files(
    tmp_path_factory: pytest.TempPathFactory,
    data: bytes,
    edits: list[tuple[int, int]],
    cut: int | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.nii"
    check_damaged(path, data, edits, cut)
