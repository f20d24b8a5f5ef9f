"""Pictures for browsers: what the model is shown, and the values below any window."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from dicom_files import NAME, made
from fastapi import FastAPI
from highdicom.spatial import get_closest_patient_orientation
from PIL import Image as Pillow
from pydicom import Dataset, dcmread, dcmwrite, uid
from pydicom.data import get_testdata_file
from serving import StandIn, app_over, client_of, png
from starlette.testclient import TestClient

from medmoe_edge.bedside.serve import routes
from medmoe_edge.bedside.serve.routes import LARGEST, Codes, Picture, picture_of
from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.worker import Bounds


def file_of(array: npt.NDArray[Any], **attributes: Any) -> bytes:
    """A DICOM file of frames `[F, H, W]`."""
    kind = uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    file = io.BytesIO()
    dataset = made(array, SOPClassUID=kind, Modality="MR", **attributes)
    dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def shown(data: bytes, frame: int | None = None) -> Picture:
    return picture_of(data, frame, Bounds())


def values_of(picture: Picture) -> npt.NDArray[np.float64]:
    codes = picture.codes
    assert codes is not None
    stored = np.frombuffer(base64.b64decode(codes.data), "<u2").reshape(picture.height, -1)
    return codes.offset + codes.scale * stored.astype(np.float64)


def pixels_of(picture: Picture) -> npt.NDArray[np.uint8]:
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(picture.png))))


def windowed(values: npt.NDArray[np.float64], codes: Codes) -> npt.NDArray[np.float64]:
    """What the page draws: LINEAR_EXACT."""
    centre, width = codes.window
    share = np.clip((values - centre) / width + 0.5, 0, 1)
    return 255 * (1 - share if codes.inverted else share)


FRAMES = np.arange(-1000, 1000, dtype=np.int16).reshape(2, 25, 40)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_values_of_a_dicom_are_exact_beyond_its_window(kind: str) -> None:
    window = {"WindowCenter": -300, "WindowWidth": 400, "PhotometricInterpretation": kind}
    data = file_of(FRAMES, RescaleSlope=2, RescaleIntercept=-24, **window)
    for frame in (0, 1):
        picture = shown(data, frame)
        assert (picture.frame, picture.frames, picture.modality) == (frame, 2, "mri")
        assert picture.size == (picture.width, picture.height) == (40, 25)
        np.testing.assert_array_equal(values_of(picture), FRAMES[frame] * 2.0 - 24)
        assert picture.codes is not None
        assert list(picture.codes.window) == [-300, 400]
        assert picture.codes.inverted is (kind == "MONOCHROME1")
        drawn = windowed(values_of(picture), picture.codes)
        assert np.abs(drawn - pixels_of(picture)).max() <= 1.5  # the file's own is LINEAR


def test_values_without_end_fit_in_sixteen_bits() -> None:
    data = file_of(np.array([[[0, 65535, 1]]], np.uint16), RescaleSlope=0.3, RescaleIntercept=5)
    values = values_of(shown(data))
    np.testing.assert_allclose(values, [[5, 19665.5, 5.3]], atol=0.3)
    flat = shown(file_of(np.full((1, 2, 2), 7, np.uint16)))
    assert (values_of(flat) == 7).all()
    assert flat.codes is not None
    assert flat.codes.window[1] > 0


def test_a_dicom_without_a_window_has_its_whole_range() -> None:
    picture = shown(file_of(np.array([[[10, 20], [30, 110]]], np.uint8)))
    assert picture.codes is not None
    assert list(picture.codes.window) == [60, 100]


def test_a_real_enhanced_dicom_has_the_values_that_pydicom_reads() -> None:
    path = Path(str(get_testdata_file("emri_small.dcm", download=False)))
    picture = shown(path.read_bytes(), 3)
    np.testing.assert_array_equal(values_of(picture), dcmread(path).pixel_array[3])
    np.testing.assert_array_equal(pixels_of(picture), load_image(path, frame=3).pixels[..., 0])


def test_grey_pictures_have_their_own_values_and_colour_has_none() -> None:
    file = io.BytesIO()
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Pillow.fromarray(grey).save(file, "PNG")
    picture = shown(file.getvalue())
    np.testing.assert_array_equal(values_of(picture), grey)
    assert picture.codes is not None
    assert list(picture.codes.window) == [127.5, 255]
    np.testing.assert_array_equal(pixels_of(picture), grey)

    file = io.BytesIO()
    Pillow.new("RGB", (3, 2), (200, 20, 20)).save(file, "PNG")
    picture = shown(file.getvalue())
    assert picture.codes is None
    assert pixels_of(picture).tolist() == [[[200, 20, 20]] * 3] * 2


def test_sixteen_bit_pictures_keep_their_unit_within_their_window() -> None:
    file = io.BytesIO()
    ramp = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    Pillow.fromarray(ramp).save(file, "PNG")
    picture = shown(file.getvalue())
    low, high = np.percentile(ramp, [1, 99])
    np.testing.assert_allclose(
        values_of(picture), np.clip(ramp, low, high), atol=(high - low) / 255
    )


def test_large_pictures_come_smaller() -> None:
    frames = np.tile(FRAMES[:1, :20], (1, 4, 2 * LARGEST // FRAMES.shape[2]))
    _, height, width = frames.shape
    picture = shown(file_of(frames), 0)
    assert picture.size == (width, height)
    assert (picture.width, picture.height) == (LARGEST, round(height * LARGEST / width))
    shape = (picture.height, picture.width)
    assert pixels_of(picture).shape == values_of(picture).shape == shape
    assert values_of(picture).mean() == pytest.approx(frames.mean(), abs=1)


@pytest.fixture
def client() -> Iterator[TestClient]:
    app: FastAPI = app_over(StandIn(), limits=Limits(pixels=100))
    with client_of(app) as client:
        yield client


def test_the_service_decodes_and_keeps_to_its_limits(client: TestClient) -> None:
    def sent(data: bytes, **fields: str) -> Any:
        return client.post("/v1/picture", files={"image": (f"{NAME}.dcm", data)}, data=fields)

    found = sent(file_of(FRAMES[:, :5, :5]), frame="1")
    assert found.status_code == 200
    assert Picture.model_validate(found.json()).frame == 1
    assert NAME not in found.text
    refused: list[tuple[Callable[[], Any], int, str]] = [
        (lambda: sent(b"no image"), 400, "bad_image"),
        (lambda: sent(png(11, 11)), 400, "bad_image"),
        (lambda: sent(png(), frame="1"), 400, "bad_image"),
        (lambda: sent(png(), frame="-1"), 422, "invalid_request"),
        (lambda: sent(png(), window="3"), 422, "invalid_request"),
    ]
    for send, status, code in refused:
        response = send()
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert NAME not in response.text


def test_a_picture_says_what_it_warns_of() -> None:
    odd = file_of(FRAMES, WindowCenter=0, WindowWidth=2000)
    assert shown(odd).warnings == []
    unknown = dcmread(io.BytesIO(odd))
    unknown.Modality = "NM"
    file = io.BytesIO()
    dcmwrite(file, unknown, enforce_file_format=True)
    (warned,) = shown(file.getvalue()).warnings
    assert warned.code == "unknown_modality"
    assert "nuclear medicine" in warned.message


def sides_of(**attributes: Any) -> tuple[str, str, str, str] | None:
    return shown(file_of(FRAMES[:1], **attributes)).sides


def test_the_sides_are_those_of_highdicom() -> None:
    generator = np.random.default_rng(5)
    for _ in range(8):
        turned, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        row, column = turned[:, 0], turned[:, 1]
        sides = sides_of(ImageOrientationPatient=[f"{v:.6f}" for v in (*row, *column)])
        assert sides is not None
        affine = np.eye(4)
        affine[:3, :3] = turned
        right, down, _ = (value.value for value in get_closest_patient_orientation(affine))
        # the closest axes are told apart, of two that are both closest to one it takes the nearer
        letters = {"right": right, "down": down}
        assert letters["right"] in sides[2] or letters["down"] in sides[3]
        for here, there in ((sides[0], sides[2]), (sides[1], sides[3])):
            opposite = str.maketrans("LRAPHF", "RLPAFH")
            assert here == there.translate(opposite)


@pytest.mark.parametrize(
    ("attributes", "sides"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, ("R", "A", "L", "P")),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, ("R", "H", "L", "F")),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, ("A", "H", "P", "F")),
        ({"ImageOrientationPatient": [-1, 0, 0, 0, -1, 0]}, ("L", "P", "R", "A")),  # prone
        (
            {"ImageOrientationPatient": ["0.8", "0.6", 0, 0, 0, -1]},
            ("RA", "H", "LP", "F"),
        ),
        ({"PatientOrientation": ["L", "F"]}, ("R", "H", "L", "F")),
        ({"PatientOrientation": ["AR", "FA"]}, ("PL", "HP", "AR", "FA")),
        ({"PatientOrientation": ["LE", "RT"]}, None),  # an animal's
        ({"PatientOrientation": ["L"]}, None),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, None),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, None),
        (
            {
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "AnatomicalOrientationType": "QUADRUPED",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_a_picture_says_where_left_and_right_are(
    attributes: dict[str, Any], sides: tuple[str, str, str, str] | None
) -> None:
    assert sides_of(**attributes) == sides


def test_each_frame_of_an_enhanced_dicom_has_sides() -> None:
    groups = []
    for orientation in ([1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]):
        plane, group = Dataset(), Dataset()
        plane.ImageOrientationPatient = orientation
        group.PlaneOrientationSequence = [plane]
        groups.append(group)
    data = file_of(FRAMES, PerFrameFunctionalGroupsSequence=groups)
    assert shown(data, 0).sides == ("R", "A", "L", "P")
    assert shown(data, 1).sides == ("A", "H", "P", "F")


def test_whose_picture_it_is_is_told_on_request_alone(client: TestClient) -> None:
    name = "Wang^XiaoDong=王^小东="
    data = file_of(
        FRAMES[:, :5, :5],
        SpecificCharacterSet="GB18030",
        PatientName=name,
        PatientBirthDate="19700203",
        PatientSex="M",
        SeriesInstanceUID="1.2.826.0.4711",
        StudyDescription="Thorax\n<b>nativ</b>",
        InstanceNumber=7,
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ImagePositionPatient=[0, 0, -12.5],
    )

    def told(data: bytes, **fields: str) -> Any:
        return client.post("/v1/picture", files={"image": data}, data=fields).json()

    silent = told(data)
    assert silent["patient"] is silent["series"] is silent["position"] is None
    found = told(data, patient="true")
    assert found["patient"] == {
        "name": "Wang, XiaoDong · 王, 小东",
        "id": "MRN-4711",
        "birth_date": "1970-02-03",
        "sex": "M",
        "study": "Thorax <b>nativ</b>",
    }
    assert (found["position"], found["instance"]) == (-12.5, 7)
    assert "1.2.826" not in json.dumps(found)
    same = told(file_of(FRAMES[:, :5, :5], SeriesInstanceUID="1.2.826.0.4711"), patient="true")
    assert same["series"] != found["series"]  # another patient's
    assert told(png(), patient="true")["patient"] == {}


def test_one_upload_shows_all_frames_the_middle_one_first(client: TestClient) -> None:
    data = file_of(np.arange(5, dtype=np.int16).repeat(9).reshape(5, 3, 3))
    response = client.post("/v1/picture", files={"image": data}, data={"stream": "true"})
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in block.splitlines())
              for block in response.text.strip().split("\n\n")]  # fmt: skip
    assert [block["event"] for block in blocks] == ["picture"] * 5 + ["done"]
    pictures = [Picture.model_validate_json(block["data"]) for block in blocks[:-1]]
    assert [picture.frame for picture in pictures] == [2, 1, 3, 0, 4]
    assert all((values_of(picture) == picture.frame).all() for picture in pictures)

    refused = client.post("/v1/picture", files={"image": b"none"}, data={"stream": "true"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_image")


def test_what_goes_wrong_after_the_first_frame_is_an_event(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Path, frame: int | None, bounds: Bounds, *, patient: bool) -> Picture:
        if frame == 1:
            raise ImageError("The image is damaged.", "Copy it again.")
        return picture_of(source, frame, bounds, patient=patient)

    monkeypatch.setattr(routes, "picture_of", broken)
    files = {"image": file_of(FRAMES[:, :5, :5])}
    text = client.post("/v1/picture", files=files, data={"stream": "true"}).text
    assert [line for line in text.splitlines() if line.startswith("event")] == [
        "event: picture",
        "event: error",
    ]
    assert "The image is damaged." in text
