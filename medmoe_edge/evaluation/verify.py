"""A bundle held against the checkpoint it was made from, and the proof of it in the manifest."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medmoe_edge.bundle.bundle import AnyBundle, Bundle, write_verification
from medmoe_edge.bundle.weights import sweep_weights
from medmoe_edge.data.datasets import Example
from medmoe_edge.errors import (
    BundleError,
    DataError,
    MissingDependencyError,
    ModelError,
    VerificationError,
)
from medmoe_edge.evaluation.fidelity import Fidelity, Recording, compare, record
from medmoe_edge.evaluation.gates import GateResult, judge
from medmoe_edge.evaluation.sweep import sweep_experts
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

__all__ = ["Data", "GateResult", "Verification", "judge", "verify"]

Progress = Callable[[str, int, int], None]
FEW = 5  # faults named in an error


@dataclass(frozen=True)
class Data:
    """Questions to verify on; the manifest keeps their name and hash, never a path."""

    name: str
    examples: Sequence[Example]

    def sha256(self) -> str:
        """Hash over every question with its answer and the bytes of its image, in order.

        Raises `DataError` for an image that cannot be read.
        """
        images = {example.image: b"" for example in self.examples}
        for image in images:
            try:
                with image.open("rb") as file:
                    images[image] = hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise DataError(f"{image} cannot be read.", "Check the data.") from error
        total = hashlib.sha256()
        for example in self.examples:
            text = [example.id, example.question, example.answer, example.answer_type]
            total.update(json.dumps([*text, example.modality]).encode())
            total.update(images[example.image])
        return total.hexdigest()


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    `faults` are weights and experts that are not finite, and scales of 0, found in this run;
    `record` is the proof in the manifest, just written or of an earlier run, None where nothing was
    ever measured; `beside` are other candidates held against the same reference, for comparison.
    """

    bundle: AnyBundle[Any]
    faults: Sequence[str]
    record: Mapping[str, Any] | None
    beside: Mapping[str, Fidelity] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether the bundle may be trusted; None where it was never measured."""
        if self.faults:
            return False
        return None if self.record is None else bool(self.record["passed"])

    def error(self) -> VerificationError | None:
        """The error to raise for a bundle that failed, naming what failed; else None."""
        if self.passed is not False:
            return None
        reasons = [f"not finite: {', '.join(self.faults[:FEW])}"] if self.faults else []
        if len(self.faults) > FEW:
            reasons[0] += f" and {len(self.faults) - FEW} more"
        for gate in self.record["gates"] if self.record else ():
            result = GateResult.from_json(gate)
            if not result.passed and not (self.faults and result.name == "finite"):
                reasons.append(result.summary)
        return VerificationError(
            f"{self.bundle.name} failed its verification: {'; '.join(reasons)}.",
            "Do not use it: export again at a higher precision, or with more calibration data.",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bundle": {"name": self.bundle.name, "sha256": self.bundle.sha256},
            "passed": self.passed,
            "faults": list(self.faults),
            "verification": self.record,
            "beside": {name: fidelity.to_json() for name, fidelity in self.beside.items()},
        }


def verify(
    folder: Path,
    checkpoint: Path | None = None,
    data: Data | None = None,
    *,
    beside: Mapping[str, Callable[[], Runtime]] | None = None,
    vision_tower: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check hashes, weights and experts and, with `checkpoint` and `data`, measure the fidelity.

    What was measured is written into the manifest, also where a gate fails: see
    `Verification.error`. The gates are those of the bundle's manifest; `beside` makes other
    runtimes to measure, one after the other. `progress` is called with `(step, done, total)`.
    Raises `ModelError` for a damaged bundle or another checkpoint than the bundle's own,
    `InputError` for data that cannot be used, `ResourceError` where the manifest cannot be written.
    """
    report = progress or (lambda step, done, total: None)
    report("hashes", 0, 1)
    bundle = Bundle.open(folder)
    if bundle.target.is_engine:
        raise BundleError(
            f"{folder} is whole, and no more can be told: it holds engines for {bundle.target}.",
            "Verify the portable bundle that it was made from, whose weights they hold.",
        )
    if checkpoint is None or data is None:
        return Verification(bundle, _faults(bundle, report), bundle.verification)
    gates, data_sha256 = bundle.gates, data.sha256()
    reference = _record(bundle, checkpoint, data, vision_tower, report)
    faults = _faults(bundle, report)
    fidelity = compare(
        reference, OrtRuntime(bundle), progress=lambda *at: report("the bundle", *at)
    )
    others = {
        name: compare(reference, runtime(), progress=lambda *at, name=name: report(name, *at))
        for name, runtime in (beside or {}).items()
    }
    results = judge(fidelity, gates, faults)
    entry = {
        "passed": all(result.passed for result in results),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint_sha256": bundle.manifest["source"]["checkpoint_sha256"],
        "data": {"name": data.name, "sha256": data_sha256},
        "runtime": OrtRuntime.name,
        "gates": [result.to_json() for result in results],
        "faults": faults,
        "figures": fidelity.to_json(),
    }
    bundle = write_verification(bundle, entry)
    return Verification(bundle, faults, bundle.verification, others)


def _faults(bundle: Bundle, report: Progress) -> list[str]:
    """Weights first: an engine that rounds activations may turn a NaN into some number."""
    report("weights", 0, 1)
    weights = sweep_weights(bundle)
    if any(name.endswith(".scale") for name in weights):
        return weights  # no runtime would load it
    report("experts", 0, 1)
    return weights + sweep_experts(bundle)


def _record(
    bundle: Bundle, folder: Path, data: Data, vision_tower: Path | None, report: Progress
) -> Recording:
    """What the checkpoint says; it is out of memory again when the bundle is opened."""
    try:
        from medmoe_edge.checkpoint.reader import read_checkpoint
        from medmoe_edge.runtimes.torch.eager import EagerRuntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "torch", "export") from error
    checkpoint = read_checkpoint(folder, vision_tower=vision_tower)
    source = bundle.manifest["source"]
    if not isinstance(source, Mapping) or source.get("checkpoint_sha256") != checkpoint.sha256():
        raise ModelError(
            f"{bundle.folder} was not made from the checkpoint {folder}.",
            "Give the checkpoint it was exported from, or export this one.",
        )
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    return record(
        EagerRuntime(checkpoint),
        tokenizer,
        data.examples,
        progress=lambda *at: report("the checkpoint", *at),
    )
