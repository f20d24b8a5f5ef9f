"""The names that `import medmoe_edge` promises."""

import pytest

import medmoe_edge

NAMES = [
    *("Answer", "CalibrateOptions", "Engine", "EvaluateOptions", "ExportOptions", "Image"),
    *("MedMoEError", "ModalityEngine", "VerifyOptions", "__version__", "calibrate", "evaluate"),
    *("export_model", "load", "train", "verify"),
]


def test_all_is_pinned() -> None:
    assert sorted(medmoe_edge.__all__) == sorted(NAMES)
    assert dir(medmoe_edge) == sorted(NAMES)


@pytest.mark.parametrize("name", medmoe_edge.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(medmoe_edge, name) is not None


def test_the_engines_are_those_of_the_families() -> None:
    assert medmoe_edge.Engine.__module__ == "medmoe_edge.engine.engine"
    assert medmoe_edge.ModalityEngine.__module__ == "medmoe_edge.contrastive.engine"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        medmoe_edge.lode  # type: ignore[attr-defined]  # noqa: B018 - the access is the test
