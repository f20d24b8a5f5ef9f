"""NIfTI: the right slice, the right way up, and no more of the file than that."""

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hostile import check_damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_edge.errors import ImageError, MissingDependencyError
from medmoe_edge.image.loading import load_image

nibabel = pytest.importorskip("nibabel", reason="needs nibabel")

# [right, front, up] in the canonical orientation; every value differs
VOLUME = np.random.default_rng(0).permutation(5 * 6 * 7).reshape(5, 6, 7).astype(np.int16)
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])


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
        assert (result.frames, result.spacing, result.modality) == (7, (3, 2), None)
    np.testing.assert_array_equal(load_image(path).pixels, load_image(path, frame=3).pixels)
    for frame in (7, -1):
        with pytest.raises(ImageError, match="has 7 frames; there is no frame"):
            load_image(path, frame=frame)


def test_scaling_and_units(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME, AFFINE)
    image.header.set_slope_inter(2, -100)
    image.header.set_xyzt_units("micron")
    result = load_image(saved(tmp_path, image), frame=0)
    assert result.spacing == pytest.approx((0.003, 0.002))
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
    "no voxels": (header((5, 6, 7)), "damaged"),
    "half": (nibabel.Nifti1Image(VOLUME, AFFINE).to_bytes()[:-300], "damaged"),
    "no size": (header((5, 0, 7)), "has no pixels"),
    "no slices": (header((5, 6, 0)), "has no pixels"),
    "a large slice": (header((20_000, 20_000, 1)), "limit of 100,000,000 pixels"),
    "a large volume": (header((2_000, 2_000, 2_000)), "more than the limit of 1,073,741,824"),
    "far away": (header((5, 6, 7), vox_offset=2.0**40), "more than the limit|damaged"),
    "no orientation": (header((5, 6, 7), sform_code=1), "damaged"),
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
    with pytest.raises(ImageError, match="no plain numbers"):
        load_image(path)


def test_a_gzip_bomb_never_goes_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a small volume come 50 MB of zeros, of which next to nothing is inflated."""
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

    monkeypatch.setattr(gzip, "open", Counted)
    assert load_image(path).frames == 7
    assert 0 < inflated < 10_000


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
