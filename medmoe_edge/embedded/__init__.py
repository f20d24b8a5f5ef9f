"""The models that ship inside the package, by name."""

import functools
import logging
import os
import site
import sysconfig
from pathlib import Path

from medmoe_edge.atomic import check_unicode
from medmoe_edge.errors import ModelError, did_you_mean

FOLDER = Path(__file__).parent
EMBEDDED = ("nano", "modality-nano")

logger = logging.getLogger(__name__)


def bundle_path(model: str) -> Path:
    """The bundle folder of an embedded model, or the folder `model`; raises `ModelError`."""
    return _resolve(model, "bundle")


def checkpoint_path(model: str) -> Path:
    """The checkpoint folder of an embedded model, or the folder `model`; raises `ModelError`."""
    return _resolve(model, "checkpoint")


def is_installed(folder: Path) -> bool:
    """Whether a folder is part of an installation: inside this package or a site's packages.

    Such folders are not ours to change: a package manager checks, shares and replaces them.
    """
    places = [FOLDER.parent, *map(Path, _site_packages())]
    resolved = folder.resolve()
    return any(resolved.is_relative_to(place.resolve()) for place in places)


def _site_packages() -> list[str]:
    paths = sysconfig.get_paths()
    return [paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()]


@functools.cache  # once a place: one command resolves a name more than once
def _note_namesake(model: str, _place: Path) -> None:
    logger.warning("%s is the embedded model; ./%s is the folder here.", model, model)


def _resolve(model: str, kind: str) -> Path:
    if model in EMBEDDED:
        if Path(model).is_dir():
            _note_namesake(model, Path.cwd())
        folder = FOLDER / f"{model}-{kind}"
        if not folder.is_dir():
            raise ModelError(
                f"This installation holds no {kind} of {model}.",
                "Give the folder of a bundle or checkpoint.",
            )
        return folder
    if os.path.isdir(model):  # of an empty name, pathlib makes the current folder
        check_unicode(Path(model))
        return Path(model)
    raise ModelError(
        f"There is no model folder {model!r}.",
        f"{did_you_mean(model, EMBEDDED)}Give a bundle or checkpoint folder, or one of: "
        f"{', '.join(EMBEDDED)}.",
    )
