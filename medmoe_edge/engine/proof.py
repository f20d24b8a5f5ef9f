"""Where a bundle was verified, and whether that holds on this machine.

A proof made on one kind of processor says little of another: their int8 arithmetic may differ. What
was verified on this machine is kept in the manifest, or, for bundles that are not the user's to
change, in the user's cache, under the bundle's hash.
"""

import contextlib
import json
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from medmoe_edge.atomic import atomic_file
from medmoe_edge.bundle.bundle import AnyBundle, Status, status_of
from medmoe_edge.bundle.machine import Machine, cpu_flags, cpu_name
from medmoe_edge.errors import MedMoEError

REFERENCE = "reference"  # a checkpoint, which bundles are verified against


@dataclass(frozen=True)
class Proven:
    """What is known of a bundle's fidelity, and where it was found out.

    `status` is "passed", "not decided" (on too few questions), "failed" or "not measured";
    `machine` is None where it was not recorded.
    `here`: it holds on this machine.
    """

    status: Status
    machine: Machine | None
    here: bool

    @property
    def elsewhere(self) -> bool:
        """Whether it did not fail, but was verified on another kind of machine."""
        return self.status in ("passed", "not decided") and not self.here

    @property
    def hint(self) -> str:
        """One line for people about a proof that was made elsewhere; else empty."""
        if not self.elsewhere:
            return ""
        where = f"on {self.machine}" if self.machine else "on a machine that was not recorded"
        return f"Verified elsewhere: {where}. To prove it here: medmoe-edge verify --quick"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        machine = self.machine.to_json() if self.machine else None
        return {"here": self.here, "machine": machine}


def describe(name: str, sha256: str, known: Proven | None, runtime: str) -> dict[str, Any]:
    """What an answer says of the model: `verification` is "reference" of a checkpoint, and then
    `verified` is None.
    """
    return {
        "name": name,
        "sha256": sha256,
        "verification": known.status if known else REFERENCE,
        "verified": known.to_json() if known else None,
        "runtime": runtime,
    }


@cache
def this_machine() -> Machine:
    """The machine that runs this; takes some milliseconds, once."""
    import onnxruntime

    from medmoe_edge.runtimes.arithmetic import int8_arithmetic

    return Machine(
        cpu_name(), platform.machine(), cpu_flags(), onnxruntime.__version__, int8_arithmetic()
    )


def proven(bundle: AnyBundle[Any]) -> Proven:
    """What this kind of machine found last of a bundle, else what its manifest says."""
    here = this_machine()
    if local := remembered(bundle):
        machine = Machine.from_json(local["machine"])
        if machine.computes_like(here):
            return Proven(status_of(local), machine, here=True)
    there = bundle.verified_on
    return Proven(bundle.proof, there, here=there is not None and there.computes_like(here))


def remember(bundle: AnyBundle[Any], record: dict[str, Any]) -> None:
    """Keep a record (`passed`, `machine` and whatever else) of this bundle in the user's cache.

    Where that cannot be written, nothing is kept.
    """
    path = _path(bundle)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(record).encode())


def remembered(bundle: AnyBundle[Any]) -> dict[str, Any] | None:
    """What `remember` kept of this very bundle; None where nothing was, or it is damaged."""
    try:
        record = json.loads(_path(bundle).read_bytes())
        sound = isinstance(record["passed"], bool | None) and bool(
            Machine.from_json(record["machine"])
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError, MedMoEError):
        return None
    return dict(record) if sound else None


def _path(bundle: AnyBundle[Any]) -> Path:
    import platformdirs

    return platformdirs.user_cache_path("medmoe-edge") / "verified" / f"{bundle.sha256}.json"
