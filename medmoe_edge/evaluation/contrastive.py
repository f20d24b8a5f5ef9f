"""A bundle of MedMoE held against its checkpoint: same modality, same label, same directions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Counting, Floats, Progress, no_progress
from medmoe_edge.bundle.bundle import ModalityBundle, ModalityGates
from medmoe_edge.bundle.recorded import Recorded, signature_of, stored_weights
from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.contrastive.engine import open_bundle, open_checkpoint
from medmoe_edge.contrastive.features import similarity, unit
from medmoe_edge.errors import DataError, ModelError
from medmoe_edge.evaluation.gates import (
    GateResult,
    compare_weights,
    judge_weights,
    judged,
    outcome_of,
    too_few,
    wilson,
)
from medmoe_edge.evaluation.metrics import Share, bootstrap_interval
from medmoe_edge.evaluation.mutations import (
    QUESTIONS,
    Effect,
    Mutations,
    mutated_weights,
    mutations_of,
)
from medmoe_edge.evaluation.record import (
    ContrastiveFigures,
    Source,
    keep_record,
    new_record,
    read_mutations,
    read_record,
)
from medmoe_edge.evaluation.recording import Seen, pack_seen
from medmoe_edge.evaluation.verify import Verification
from medmoe_edge.image.loading import preprocess
from medmoe_edge.image.pixels import Image
from medmoe_edge.runtimes.contrastive import (
    IMAGE,
    ImageFeatures,
    ModalityRuntime,
    TextFeatures,
    run_expert,
    run_replaced,
)

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


def verify_modality(
    folder: Path,
    checkpoint: Path | None = None,
    pictures: Pictures | None = None,
    *,
    record: bool | None = None,
    inputs: Sequence[Callable[[], Image]] = (),
    progress: Progress = no_progress,
) -> Verification:
    """Check hashes and every expert and, with `checkpoint` and `pictures`, measure the fidelity.

    What was measured, and `inputs`, are kept as `verify.verify` keeps them. Raises `ModelError` for
    a damaged bundle or another checkpoint than its own, `DataError` for no pictures,
    `ResourceError` where the manifest was to be written and cannot be.
    """
    progress("hashes", 0, 1)
    bundle = ModalityBundle.open(folder)
    bundle.check_portable()
    progress("weights", 0, 1)
    weights = compare_weights(bundle)
    progress("experts", 0, 1)
    faults = sweep_modality(bundle)
    if checkpoint is None or pictures is None:
        return Verification(bundle, faults, read_record(bundle), weights=weights)
    if not pictures.load:
        raise DataError("There are no images to compare on.", "Give at least one.")
    reference = open_checkpoint(checkpoint, as_published=bundle.config.as_published)
    if bundle.manifest["source"].get("checkpoint_sha256") != reference.sha256:
        raise ModelError(
            f"{folder} was not made from the checkpoint {checkpoint}.",
            "Give the checkpoint it was exported from, or export this one.",
        )
    runtimes = reference.runtime, open_bundle(bundle)
    texts = [runtime.encode_texts(PHRASES) for runtime in runtimes]

    def pairs() -> Iterator[tuple[Seen, Seen]]:
        for done, load in enumerate(pictures.load, start=1):
            image = load()
            expected, given = (look(*each, image) for each in zip(runtimes, texts, strict=True))
            yield expected, given
            progress("images", done, len(pictures.load))

    seen = texts[0].mask
    words = texts[0].words[seen], texts[1].words[seen]
    figures, results = judge_seen(pairs(), words, bundle.gates, faults)
    results = [*judge_weights(weights), *results]
    mutations = read_mutations(bundle)
    if mutations is None and outcome_of(results) != "failed":
        told = partial(progress, "damaged models")
        mutations = _measure_mutations(bundle, texts[1], pictures.load, told)
    source = Source(pictures.name, pictures.sha256)
    made = new_record(bundle, source, results, faults, figures, mutations)
    packed = None
    if inputs and record is not False:
        images = [load() for load in inputs]
        looked = [look(runtimes[0], texts[0], image) for image in images]
        content = pack_seen(looked, images, words[0], bundle.config.vision)
        packed = Recorded(signature_of(bundle), *content)
    bundle, recorded = keep_record(bundle, made, record, packed)
    return Verification(bundle, faults, made, recorded=recorded, weights=weights)


def _measure_mutations(
    bundle: ModalityBundle,
    texts: TextFeatures,
    pictures: Sequence[Callable[[], Image]],
    progress: Counting,
) -> Mutations:
    """What `evaluation.mutations` does, of a MedMoE: on a few images, its texts as they are."""
    images = [load() for load in pictures[:QUESTIONS]]
    held = dict(stored_weights(bundle.path(IMAGE)))
    whole = run_replaced(bundle, {})
    expected = [_look(whole, bundle.config, texts, image) for image in images]
    counts = np.bincount([one.modality for one in expected], minlength=bundle.config.experts)
    found = list(mutations_of(held, {"": counts.tolist()}))
    effects = []
    for done, mutation in enumerate(found):
        progress(done, len(found))
        run = run_replaced(bundle, mutated_weights(held, mutation) or {})
        given = [_look(run, bundle.config, texts, image) for image in images]
        pairs, words = list(zip(expected, given, strict=True)), texts.words[texts.mask]
        figures, results = judge_seen(pairs, (words, words), bundle.gates, ())
        answers = sum(one.best != other.best for one, other in pairs)
        routing = sum(one.modality != other.modality for one, other in pairs)
        effects.append(
            Effect(
                mutation,
                answers=Share.of(answers, len(images)),
                routing=Share.of(routing, len(images)),
                seen=not all(gate.passed for gate in results),
                cosine=figures.region_cosine,
            )
        )
    return Mutations(tuple(effects))


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


def look(runtime: ModalityRuntime, texts: TextFeatures, image: Image) -> Seen:
    """What a model makes of an image, beside the features of `PHRASES`."""
    return _look(runtime.encode_images, runtime.config, texts, image)


def _look(
    encode: Callable[[Floats], ImageFeatures],
    config: ModalityConfig,
    texts: TextFeatures,
    image: Image,
) -> Seen:
    features = encode(preprocess(image, config.vision))
    return Seen(
        int(features.router_logits[0].argmax()),
        int(similarity(features, texts, as_published=config.as_published)[0].argmax()),
        features.pooled[0],
        features.regions[0].reshape(-1, features.regions.shape[-1]),
    )


def judge_seen(
    pairs: Iterable[tuple[Seen, Seen]],
    words: tuple[Floats, Floats],
    gates: ModalityGates,
    faults: Sequence[str],
) -> tuple[ContrastiveFigures, list[GateResult]]:
    """Hold what was given against what was expected: of images, and the words of texts `[T, D]`."""
    agreed, chosen, pooled, regions, finite = [], [], [], [], np.isfinite(words[1]).all()
    for expected, given in pairs:
        agreed.append(expected.modality == given.modality)
        chosen.append(expected.best == given.best)
        pooled.append(float(_cosines(expected.pooled, given.pooled)))
        regions.append(float(_cosines(expected.regions, given.regions).mean()))
        finite &= given.finite
    shares = {
        "modality_agreement": Share.of(sum(agreed), len(agreed)),
        "zero_shot_agreement": Share.of(sum(chosen), len(chosen)),
    }
    cosines = {
        "pooled_cosine": pooled,
        "region_cosine": regions,
        "text_cosine": _cosines(*words).tolist(),
    }
    means = {name: float(np.mean(values)) for name, values in cosines.items()}
    least = {f"{name}_min": float(np.min(values)) for name, values in cosines.items()}
    agreements = {name: share.share for name, share in shares.items()}
    figures = ContrastiveFigures(len(agreed), len(PHRASES), **agreements, **means, **least)
    results = [judged("finite", len(faults) + (not finite), 0, (), at_least=False)]
    for name, share in shares.items():
        bound = _bound(gates, name)
        note = too_few(share, bound, "images")
        results.append(judged(name, share.share, bound, wilson(share), note=note))
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
