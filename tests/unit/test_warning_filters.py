"""Which warnings fail a test: those of our own modules, and what anyone leaves open."""

import gc
import warnings
from typing import Any

import pytest

CATEGORIES = [DeprecationWarning, FutureWarning, RuntimeWarning, UserWarning]


def warn(category: type[Warning], module: str) -> None:
    warnings.warn_explicit("something", category, f"{module}.py", 1, module)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize(
    "module",
    ["medmoe_edge", "medmoe_edge.engine.engine", "conftest", "graphs", "stress_serve", __name__],
)
def test_a_warning_of_our_own_modules_is_an_error(category: type[Warning], module: str) -> None:
    with pytest.raises(category, match="something"):
        warn(category, module)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("module", ["transformers.utils", "torch", "graphs_of_others", "ast"])
def test_a_warning_of_others_is_not(category: type[Warning], module: str) -> None:
    with warnings.catch_warnings(record=True) as told:  # the filters stay
        warn(category, module)
    assert len(told) == 1


def test_our_use_of_what_others_call_deprecated_is_an_error() -> None:
    """They say so of the line that calls them, by the level of their stack."""
    other: dict[str, Any] = {"__name__": "another.package", "warnings": warnings}
    exec("def old(level): warnings.warn('old', DeprecationWarning, stacklevel=level)", other)
    with pytest.raises(DeprecationWarning):
        other["old"](2)
    with warnings.catch_warnings(record=True) as told:
        other["old"](1)
    assert len(told) == 1


def test_a_file_left_open_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised where nobody can catch it, and told to a hook: there pytest fails the test."""
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda found: told.append(found.exc_type))
    open(__file__).read()  # noqa: SIM115
    gc.collect()
    assert told == [ResourceWarning]
