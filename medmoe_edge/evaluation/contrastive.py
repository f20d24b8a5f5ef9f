"""A bundle of MedMoE held against its checkpoint: same modality, same label, same directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import write_verification
from medmoe_edge.bundle.contrastive import ModalityBundle, ModalityGates
from medmoe_edge.contrastive.features import similarity, unit
from medmoe_edge.contrastive.loading import open_bundle, open_checkpoint
from medmoe_edge.errors import DataError, ModelError
from medmoe_edge.evaluation.fidelity import Share
from medmoe_edge.evaluation.gates import GateResult, judged, wilson
from medmoe_edge.evaluation.metrics import bootstrap_interval
from medmoe_edge.evaluation.verify import Verification
from medmoe_edge.image.loading import Image, preprocess
from medmoe_edge.runtimes.contrastive import Floats, ImageFeatures, ModalityRuntime
from medmoe_edge.runtimes.ort.contrastive import run_expert

Progress = Callable[[str, int, int], None]

# What images are told apart by: kinds of image, and findings that are seen in them.
PHRASES = (
    *("chest x-ray", "abdominal ct", "brain mri", "ultrasound", "pathology slide", "fundus"),
    *("no finding", "pleural effusion", "pneumonia", "cardiomegaly", "fracture", "tumor"),
    *("lung", "liver", "heart", "kidney"),
)


@dataclass(frozen=True)
class Pictures:
    """Images to verify on; the manifest keeps their name and hash, never a path."""

    name: str
    sha256: str
    load: Sequence[Callable[[], Image]]


class _Seen(NamedTuple):
    """What is compared of one image."""

    features: ImageFeatures
    best: int  # of the phrases

    @property
    def modality(self) -> int:
        return int(self.features.router_logits[0].argmax())


def verify_modality(
    folder: Path,
    checkpoint: Path | None = None,
    pictures: Pictures | None = None,
    *,
    progress: Progress | None = None,
) -> Verification:
    """Check hashes and every expert and, with `checkpoint` and `pictures`, measure the fidelity.

    What was measured is written into the manifest, also where a gate fails: see
    `Verification.error`. Raises `ModelError` for a damaged bundle or another checkpoint than its
    own, `DataError` for no pictures, `ResourceError` where the manifest cannot be written.
    """
    report = progress or (lambda step, done, total: None)
    report("hashes", 0, 1)
    bundle = ModalityBundle.open(folder)
    bundle.check_portable()
    report("experts", 0, 1)
    faults = sweep_modality(bundle)
    if checkpoint is None or pictures is None:
        return Verification(bundle, faults, bundle.verification)
    if not pictures.load:
        raise DataError("There are no images to compare on.", "Give at least one.")
    reference = open_checkpoint(checkpoint)
    if bundle.manifest["source"].get("checkpoint_sha256") != reference.sha256:
        raise ModelError(
            f"{folder} was not made from the checkpoint {checkpoint}.",
            "Give the checkpoint it was exported from, or export this one.",
        )
    figures, results = _measure(reference.runtime, bundle, faults, pictures, report)
    record = {
        "passed": all(result.passed for result in results),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint_sha256": reference.sha256,
        "data": {"name": pictures.name, "sha256": pictures.sha256},
        "runtime": "onnxruntime",
        "gates": [result.to_json() for result in results],
        "faults": faults,
        "figures": figures,
    }
    bundle = write_verification(bundle, record)
    return Verification(bundle, faults, bundle.verification)


def sweep_modality(bundle: ModalityBundle) -> list[str]:
    """Parts of the bundle whose output on random input is not finite; experts by modality.

    An expert that no image was routed to can be broken for years. Here the router is replaced so
    that each in turn is chosen.
    """
    names = bundle.config.modalities[: bundle.config.experts]
    side = bundle.config.vision.image_size
    picture = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    broken = []
    for index, name in enumerate(names):
        if not all(np.isfinite(part).all() for part in run_expert(bundle, index, picture)):
            broken.append(f"the expert of {name}")
    texts = open_bundle(bundle).encode_texts(PHRASES)
    text = [] if np.isfinite(texts.words).all() else ["the text tower"]
    return (["the image tower"] if len(broken) == len(names) else broken) + text


def _measure(
    reference: ModalityRuntime,
    bundle: ModalityBundle,
    faults: Sequence[str],
    pictures: Pictures,
    report: Progress,
) -> tuple[dict[str, Any], list[GateResult]]:
    gates, candidate = bundle.gates, open_bundle(bundle)
    texts = [runtime.encode_texts(PHRASES) for runtime in (reference, candidate)]
    text = _cosines(texts[0].words[texts[0].mask], texts[1].words[texts[1].mask])
    agreed, chosen, pooled, regions = [], [], [], []
    finite = True
    for done, load in enumerate(pictures.load):
        pixels = preprocess(load(), bundle.config.vision)
        found = []
        for runtime, own in zip((reference, candidate), texts, strict=True):
            features = runtime.encode_images(pixels)
            finite &= all(bool(np.isfinite(part).all()) for part in features)
            found.append(_Seen(features, int(similarity(features, own)[0].argmax())))
        expected, given = found
        agreed.append(expected.modality == given.modality)
        chosen.append(expected.best == given.best)
        pooled.append(float(_cosines(expected.features.pooled, given.features.pooled).mean()))
        regions.append(float(_cosines(expected.features.regions, given.features.regions).mean()))
        report("images", done + 1, len(pictures.load))
    shares = {
        "modality_agreement": Share.of(sum(agreed), len(agreed)),
        "zero_shot_agreement": Share.of(sum(chosen), len(chosen)),
    }
    cosines = {"pooled_cosine": pooled, "region_cosine": regions, "text_cosine": text.tolist()}
    means = {name: float(np.mean(values)) for name, values in cosines.items()}
    least = {f"{name}_min": float(np.min(values)) for name, values in cosines.items()}
    figures = {"images": len(agreed), "texts": len(PHRASES), **means, **least}
    figures |= {name: share.share for name, share in shares.items()}
    broken = len(faults) + (not finite)
    results = [judged("finite", broken, 0, (), at_least=False)]
    for name, share in shares.items():
        results.append(judged(name, share.share, _bound(gates, name), wilson(share)))
    for name, values in cosines.items():
        interval = bootstrap_interval(values, np.arange(len(values)))
        results.append(judged(name, means[name], _bound(gates, name), interval))
    return figures, results


def _bound(gates: ModalityGates, name: str) -> float:
    return float(gates.to_json()[name])


def _cosines(expected: Floats, found: Floats) -> npt.NDArray[np.float64]:
    """Of vectors along the last axis."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    cosines: npt.NDArray[np.float64] = (unit(a) * unit(b)).sum(-1)
    return cosines
