"""`verify --quick`: a bundle proven on this machine by what travels with it, without a checkpoint.

Its stored weights are held against the marks of the checkpoint's (which alone can tell a damaged
expert where experts are nearly alike), and what it computes here against what the checkpoint
computed in fp32: answers, their probabilities and the routing of up to 64
questions; of a MedMoE the modality, the nearest phrase and the features of a few images. The gates
are those of the bundle, and two more: no matrix unlike the checkpoint's, and a mean KL of at most 4
times what it was where the inputs were recorded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.bundle.bundle import AnyBundle, Bundle, ModalityBundle, model_kind, status_of
from medmoe_edge.bundle.machine import Machine
from medmoe_edge.bundle.recorded import Recorded, read_recorded, sweep_weights
from medmoe_edge.contrastive.engine import open_bundle
from medmoe_edge.engine.loading import remember, this_machine
from medmoe_edge.errors import BundleError, VerificationError
from medmoe_edge.evaluation.contrastive import PHRASES, judge_seen, look
from medmoe_edge.evaluation.fidelity import compare
from medmoe_edge.evaluation.gates import (
    Compared,
    GateResult,
    compare_weights,
    judge,
    judge_weights,
    judged,
)
from medmoe_edge.evaluation.metrics import Fidelity
from medmoe_edge.evaluation.mutations import Mutations
from medmoe_edge.evaluation.record import ContrastiveFigures, read_mutations
from medmoe_edge.evaluation.recording import unpack_recording, unpack_seen
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

FEW = 3  # matrices named in an error


@dataclass(frozen=True)
class Quick:
    """What a quick verification found on `machine`, this one.

    Its gates of shares only look for failures, for 64 questions decide none of them; what is exact,
    weights and KL, carries the proof of the full verification over to here.
    `weights` is None of a bundle that carries no marks of its checkpoint's weights; `figures` is
    None where the weights could not be run.
    """

    bundle: AnyBundle[Any]
    machine: Machine
    when: str
    gates: tuple[GateResult, ...]
    faults: tuple[str, ...]
    weights: Compared | None
    figures: Fidelity | ContrastiveFigures | None

    @property
    def mutations(self) -> Mutations | None:
        """Which damage the answers would tell, as it was measured when the bundle was made."""
        return read_mutations(self.bundle)

    @property
    def passed(self) -> bool | None:
        """Whether no gate failed; None where the full verification decided nothing.

        What the full verification refused, 64 questions do not make good.
        """
        if self.bundle.proof == "failed" or not all(gate.passed for gate in self.gates):
            return False
        return True if self.bundle.proof == "passed" else None

    def error(self) -> VerificationError | None:
        """The error to raise for a bundle that failed, naming what failed; else None."""
        if self.passed is not False:
            return None
        reasons = [gate.summary for gate in self.gates if not gate.passed]
        reasons = reasons or ["its full verification failed"]
        named = [*self.faults, *(self.weights.wrong if self.weights else ())][:FEW]
        if named:
            reasons[0] += f" (such as {', '.join(named)})"
        return VerificationError(
            f"{self.bundle.name} does not hold on this machine: {'; '.join(reasons)}.",
            "Do not use it here: copy or export it again. If only the answers differ, the "
            "processor may compute otherwise: see medmoe-edge doctor.",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bundle": {"name": self.bundle.name, "sha256": self.bundle.sha256},
            "passed": self.passed,
            "outcome": status_of({"passed": self.passed}),
            "when": self.when,
            "machine": self.machine.to_json(),
            "gates": [gate.to_json() for gate in self.gates],
            "faults": list(self.faults),
            "weights": self.weights.to_json() if self.weights else None,
            "figures": self.figures.to_json() if self.figures else None,
            "mutations": self.mutations.to_json() if self.mutations else None,
        }


def verify_quick(folder: Path, *, progress: Progress = no_progress) -> Quick:
    """Prove a bundle on this machine; the outcome is kept in the user's cache, and asking tells it.

    Raises `BundleError` for a bundle that is damaged, carries no recorded inputs, or holds engines.
    """
    progress("hashes", 0, 1)
    kind = ModalityBundle if model_kind(folder) == ModalityBundle.kind else Bundle
    bundle = kind.open(folder)
    bundle.check_portable()
    recorded = read_recorded(bundle)
    if not recorded.about:
        raise BundleError(
            f"{folder} carries no recorded inputs: it was exported without data to prove it on.",
            "Add them: medmoe-edge verify BUNDLE --against CHECKPOINT --record",
        )
    progress("weights", 0, 1)
    faults = tuple(sweep_weights(bundle)) if isinstance(bundle, Bundle) else ()
    weights = compare_weights(bundle)
    gates, figures = _run(bundle, recorded, faults, progress)
    found = Quick(
        bundle=bundle,
        machine=this_machine(),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        gates=(*judge_weights(weights), *gates),
        faults=faults,
        weights=weights,
        figures=figures,
    )
    remember(bundle, found.to_json())
    return found


def _run(
    bundle: Bundle | ModalityBundle, recorded: Recorded, faults: Sequence[str], progress: Progress
) -> tuple[list[GateResult], Fidelity | ContrastiveFigures | None]:
    if isinstance(bundle, ModalityBundle):
        return _see(bundle, recorded, progress)
    if any(name.endswith(".scale") for name in faults):  # no runtime would load it
        return [judged("finite", len(faults), 0, (), at_least=False)], None
    recording, limit = unpack_recording(bundle, recorded)
    runtime = OrtRuntime(bundle)
    fidelity = compare(recording, runtime, progress=partial(progress, "questions"))
    kl = judged("kl", fidelity.overall.kl.mean, limit, (), at_least=False)
    return [*judge(fidelity, bundle.gates, faults), kl], fidelity


def _see(
    bundle: ModalityBundle, recorded: Recorded, progress: Progress
) -> tuple[list[GateResult], ContrastiveFigures]:
    pairs, regions, words = unpack_seen(bundle, recorded)
    runtime = open_bundle(bundle)
    texts = runtime.encode_texts(PHRASES)
    seen = []
    for done, (image, expected) in enumerate(pairs, start=1):
        given = look(runtime, texts, image)
        seen.append((expected, given._replace(regions=given.regions[regions])))
        progress("images", done, len(pairs))
    own = texts.words[texts.mask]
    if own.shape != words.shape:
        raise BundleError(
            f"{bundle.folder} carries recorded texts of another version.", "Export it again."
        )
    figures, results = judge_seen(seen, (words, own), bundle.gates, ())
    return results, figures
