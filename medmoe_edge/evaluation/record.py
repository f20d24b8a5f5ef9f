"""The record of a verification, as manifests and reports hold it: what, where, and how it went."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medmoe_edge.bundle.bundle import (
    MANIFEST,
    AnyBundle,
    AnyBundleT,
    ModalityBundle,
    write_verification,
)
from medmoe_edge.bundle.machine import Machine
from medmoe_edge.bundle.recorded import Recorded, renew_recorded
from medmoe_edge.bundle.trust import is_signed
from medmoe_edge.config import Config
from medmoe_edge.embedded import is_installed
from medmoe_edge.engine.loading import remember, this_machine
from medmoe_edge.errors import ConfigError
from medmoe_edge.evaluation.gates import GateResult, Outcome, outcome_of
from medmoe_edge.evaluation.metrics import Fidelity
from medmoe_edge.evaluation.mutations import Mutations

PASSED: dict[Outcome, bool | None] = {"passed": True, "not decided": None, "failed": False}


@dataclass(frozen=True)
class Source(Config):
    """The data that a verification ran on, by name and hash."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Record(Config):
    """One verification of a bundle; its figures are those of the bundle's family, see below.

    `passed` is None where there were too few questions to decide. `when` is in ISO 8601, UTC;
    `faults` are parts that are not finite and scales of 0; `machine` is None in records of versions
    that did not keep it. `mutations` says which damage to experts the answers would tell; None
    where that was not measured.
    """

    passed: bool | None
    when: str
    checkpoint_sha256: str
    data: Source
    runtime: str
    machine: Machine | None = None
    gates: tuple[GateResult, ...]
    faults: tuple[str, ...]
    mutations: Mutations | None = None

    def gate(self, name: str) -> GateResult:
        """The result of one gate."""
        return next(gate for gate in self.gates if gate.name == name)


@dataclass(frozen=True, kw_only=True)
class AnswersRecord(Record):
    """Of a Med-MoE."""

    figures: Fidelity


@dataclass(frozen=True)
class ContrastiveFigures(Config):
    """Of a MedMoE: shares of images with the same modality and label, and cosines.

    The cosines are of pooled features, of regions and of texts: their means, and the least.
    """

    images: int
    texts: int
    modality_agreement: float
    zero_shot_agreement: float
    pooled_cosine: float
    region_cosine: float
    text_cosine: float
    pooled_cosine_min: float
    region_cosine_min: float
    text_cosine_min: float


@dataclass(frozen=True, kw_only=True)
class ContrastiveRecord(Record):
    """Of a MedMoE."""

    figures: ContrastiveFigures


AnyRecord = AnswersRecord | ContrastiveRecord


def new_record(
    bundle: AnyBundle[Any],
    data: Source,
    gates: Sequence[GateResult],
    faults: Sequence[str],
    figures: Fidelity | ContrastiveFigures,
    mutations: Mutations | None = None,
) -> AnyRecord:
    """The record of a verification that ended just now, on this machine, in ONNX Runtime."""
    common: dict[str, Any] = {
        "passed": PASSED[outcome_of(gates)],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint_sha256": str(bundle.manifest["source"]["checkpoint_sha256"]),
        "data": data,
        "runtime": "onnxruntime",
        "machine": this_machine(),
        "gates": tuple(gates),
        "faults": tuple(faults),
        "mutations": mutations,
    }
    if isinstance(figures, Fidelity):
        return AnswersRecord(**common, figures=figures)
    return ContrastiveRecord(**common, figures=figures)


def read_record(bundle: AnyBundle[Any]) -> AnyRecord | None:
    """The record in a bundle's manifest; None where it was never measured.

    Raises `ConfigError` for one that cannot be read.
    """
    if bundle.verification is None:
        return None
    where = f"{MANIFEST} verification"
    if isinstance(bundle, ModalityBundle):
        return ContrastiveRecord.from_json(bundle.verification, where)
    return AnswersRecord.from_json(bundle.verification, where)


def read_mutations(bundle: AnyBundle[Any]) -> Mutations | None:
    """Which damage the bundle's answers would tell; None where no record says it."""
    try:
        record = read_record(bundle)
    except ConfigError:
        return None
    return record.mutations if record else None


def keep_record(
    bundle: AnyBundleT,
    record: AnyRecord,
    into_bundle: bool | None = None,
    inputs: Recorded | None = None,
) -> tuple[AnyBundleT, bool]:
    """Put a record into the bundle's manifest; where that may not be, into the user's cache.

    Without a word on `into_bundle`, bundles are written to in a place of their own (`may_record`).
    `inputs` then take the place of those that travel with the bundle. Returns the bundle as it is
    now, and whether the record is in it. Raises `ResourceError` where it was to be written and
    cannot be.
    """
    if may_record(bundle.folder) if into_bundle is None else into_bundle:
        if inputs is None:
            return write_verification(bundle, record.to_json()), True
        return renew_recorded(bundle, inputs, record.to_json()), True
    remember(bundle, record.to_json())
    return bundle, False


def may_record(folder: Path) -> bool:
    """Whether a record goes into a bundle without a word on it.

    Its folder is the user's own: writable, not part of an installation, and not signed, for what
    is written afterwards is not what was signed.
    """
    return not is_installed(folder) and not is_signed(folder) and os.access(folder, os.W_OK)
