"""A fixed handful of the files of `nifti_differential`, whose long run is a command of its own."""

import pytest

pytest.importorskip("SimpleITK", reason="needs SimpleITK")
from nifti_differential import run


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_slices_are_as_itk_and_nibabel_have_them() -> None:
    found = run(range(80))
    assert found["differs"] == 0
    assert found["agrees"] >= 30
