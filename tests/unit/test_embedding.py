"""Rows of the embedding table, read from the file as they are needed."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.base import EmbeddingTable

TABLE = np.random.default_rng(0).standard_normal((50, 24))


@pytest.fixture(params=[np.float16, np.float32])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    np.save(tmp_path / "embedding.npy", TABLE.astype(request.param))
    return tmp_path / "embedding.npy"


@given(ids=st.lists(st.integers(0, 49), max_size=9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_those_of_the_table(path: Path, ids: list[int]) -> None:
    rows = EmbeddingTable(path)[ids]
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.load(path)[ids].astype(np.float32))


def test_a_system_that_cannot_read_at_a_place_reads_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no `os.pread`."""
    monkeypatch.delattr(os, "pread")
    np.testing.assert_array_equal(EmbeddingTable(path)[[49, 3]], np.load(path)[[49, 3]])


def test_a_file_cut_short_while_it_is_open_is_an_error(path: Path) -> None:
    table = EmbeddingTable(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    assert table[[0]].shape == (1, 24)
    with pytest.raises(BundleError, match=r"embedding\.npy was changed"):
        table[[0, 49]]


def test_a_file_replaced_while_it_is_open_is_not_read(path: Path) -> None:
    table = EmbeddingTable(path)
    before = table[[3]]
    other = path.with_name("other.npy")
    np.save(other, np.zeros((50, 24)))
    other.replace(path)
    np.testing.assert_array_equal(table[[3]], before)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no table"])
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "embedding.npy").write_bytes(content)
    with pytest.raises(BundleError, match=r"embedding\.npy was changed"):
        EmbeddingTable(tmp_path / "embedding.npy")
