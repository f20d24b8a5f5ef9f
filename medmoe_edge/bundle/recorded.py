"""What travels with a bundle so that it can be proven anywhere, without its checkpoint.

    recorded-HASH.npz    signature   marks of the checkpoint's matrices (`bundle_signature`)
                         about       JSON: inputs in words, the reference's answers, limits
                         others      arrays: inputs as pictures, and what the reference computed

Uncompressed it has at most 64 MB; it holds plain arrays, and nothing in it is ever unpickled. Its
name changes with its content, so that a bundle whose record is renewed is whole at every moment.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import AnyBundle, AnyBundleT, write_verification
from medmoe_edge.bundle.signature import MarkedMatrix, Signature
from medmoe_edge.errors import BundleError, ConfigError

RECORDED = re.compile(r"recorded-[0-9a-f]{8}\.npz")
MOST = 2**26  # bytes of all arrays
ABOUT, MATRICES = "about", "matrices"
REMEDY = "Copy or export the bundle again."


@dataclass(frozen=True)
class Recorded:
    """The signature, None where it was never made; JSON values and arrays of recorded inputs."""

    signature: Signature | None
    about: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def pack(self) -> tuple[str, bytes]:
        """The file's name and content; the same content gives the same bytes."""
        about: dict[str, Any] = {ABOUT: dict(self.about), MATRICES: None}
        arrays = dict(self.arrays)
        if self.signature is not None:
            about[MATRICES] = [matrix.to_json() for matrix in self.signature.matrices]
            arrays |= {"norms": self.signature.norms, "sums": self.signature.sums}
        arrays[ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        content = file.getvalue()
        return f"recorded-{hashlib.sha256(content).hexdigest()[:8]}.npz", content


def write_recorded(folder: Path, recorded: Recorded) -> None:
    """Put it into the folder of a new bundle, which has no manifest yet."""
    name, content = recorded.pack()
    (folder / name).write_bytes(content)


def renew_recorded(bundle: AnyBundleT, recorded: Recorded, record: Mapping[str, Any]) -> AnyBundleT:
    """Put new recorded inputs in the place of a bundle's own, and `record` into its manifest.

    The bundle is whole at every moment. Raises `ResourceError` where it cannot be written.
    """
    old = recorded_file(bundle)
    name, content = recorded.pack()
    made = write_verification(bundle, record, {name: content}, without=old)
    if old not in (None, name):
        (bundle.folder / str(old)).unlink(missing_ok=True)
    return made


def recorded_file(bundle: AnyBundle[Any]) -> str | None:
    """The name of the bundle's recorded file; None of a bundle that has none."""
    return next(filter(RECORDED.fullmatch, bundle.manifest["files"]), None)


def signature_of(bundle: AnyBundle[Any]) -> Signature | None:
    """The checkpoint's marks that travel with a bundle; None where none do.

    Raises `BundleError` for a damaged file.
    """
    return None if recorded_file(bundle) is None else read_recorded(bundle).signature


def read_recorded(bundle: AnyBundle[Any]) -> Recorded:
    """What travels with a bundle; raises `BundleError` where nothing does, or it is damaged."""
    name = recorded_file(bundle)
    if name is None:
        raise BundleError(
            f"{bundle.folder} carries no recorded inputs: an earlier version exported it.",
            "Export it again, or add them: medmoe-edge verify BUNDLE --against CHECKPOINT --record",
        )
    path = bundle.path(name)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST:
                raise BundleError(f"{path} holds more than {MOST:,} bytes.", REMEDY)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        about = json.loads(arrays.pop(ABOUT).tobytes())
        signature = None
        if about[MATRICES] is not None:
            matrices = tuple(
                MarkedMatrix.from_json(values, f"{path} matrix") for values in about[MATRICES]
            )
            signature = Signature(matrices, arrays.pop("norms"), arrays.pop("sums"))
        return Recorded(signature, dict(about[ABOUT]), arrays)
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError),
        *(zipfile.BadZipFile, RecursionError, ConfigError),
    ) as error:
        raise BundleError(f"{path} is damaged ({type(error).__name__}).", REMEDY) from error
