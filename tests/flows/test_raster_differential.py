"""A fixed handful of the files of `raster_differential`, whose long run is a command of its own."""

from raster_differential import run


def test_pictures_are_as_other_decoders_have_them() -> None:
    found = run(range(120))
    assert found["differs"] == 0
    assert found["agrees"] >= 100
