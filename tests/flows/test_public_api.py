"""The names that `import medmoe_edge` promises."""

from typing import get_type_hints

import pytest

import medmoe_edge


def test_all_is_pinned() -> None:
    assert sorted(medmoe_edge.__all__) == ["Answer", "Engine", "__version__", "load"]


@pytest.mark.parametrize("name", medmoe_edge.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(medmoe_edge, name) is not None


def test_the_engine_is_what_load_returns() -> None:
    assert get_type_hints(medmoe_edge.load)["return"] is medmoe_edge.Engine
    assert medmoe_edge.Engine.__module__ == "medmoe_edge.engine.engine"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        medmoe_edge.lode  # type: ignore[attr-defined]  # noqa: B018 - the access is the test
