"""kill -9 at any moment: no study is lost, none is answered twice. The full one: stress_listen."""

import sys
from pathlib import Path

import pytest
from stress_listen import stress

# pynetdicom leaves a socket to the garbage collector where its peer hung up first.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_every_study_is_answered_exactly_once(tmp_path: Path) -> None:
    found = stress(tmp_path, studies=6, kills=2, seconds=0.02, slices=3)
    assert (found["reports"], found["kills"], found["unsent"]) == (6, 2, 0)
