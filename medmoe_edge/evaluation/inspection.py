"""What is in a checkpoint or bundle of either family, and what changed from one bundle to another.

To look into one no weights are read, unless trusted keys are configured: then every file is
checked against the signed manifest, or "trusted" would not be true. To compare two, all that are
stored are read.
"""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medmoe_edge.bundle.bundle import (
    MANIFEST,
    SEAL,
    VERIFICATION,
    AnyBundle,
    Bundle,
    ModalityBundle,
    Target,
    model_kind,
)
from medmoe_edge.bundle.recorded import DELTA, read_recorded, recorded_file, stored_weights
from medmoe_edge.bundle.trust import Signed, keys_are_trusted, signed
from medmoe_edge.calibration.quantisers import Format
from medmoe_edge.checkpoint.keys import Shape, decoder_parameters, expected_parameters
from medmoe_edge.config import ModelConfig
from medmoe_edge.config_contrastive import (
    BertConfig,
    ModalityConfig,
    Scores,
    SwinConfig,
    read_scores,
)
from medmoe_edge.engine.loading import proven
from medmoe_edge.errors import BundleError, InputError, MissingDependencyError, Notice, Told, needs
from medmoe_edge.evaluation.recording import unpack_recording
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.costs import Deltas, decoder_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inspected(Told):
    """What is told of a model of either family; what only a bundle has is None of a checkpoint."""

    kind: Literal["checkpoint", "bundle"]
    name: str
    bytes: int
    files: dict[str, int]
    bits_per_weight: float | None = None
    target: Target | None = None
    runtime: str | None = None
    quantisation: Any = None
    source: Any = None
    licence: Any = None
    verification: str | None = None
    verified: dict[str, Any] | None = None
    signature: Signed | None = None
    damaged: tuple[str, ...] = ()

    def error(self) -> BundleError | None:
        """For files of a bundle that are missing or of another size; `verify` reads their bytes."""
        if not self.damaged:
            return None
        return BundleError(
            f"Missing, or of another size than the manifest says: {', '.join(self.damaged)}.",
            "Copy or export the bundle again.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection(_Inspected):
    """A model's make-up.

    `parameters_total` counts every tensor, the vision tower included (None where counting the
    tower needs torch, which is not installed); `parameters_language` the decoder without tower
    and projector, and `parameters_activated` what of it runs for one token: the router, the
    top-k experts and the meta expert, but not the other experts. `tensors` counts the official
    layout's tensors, `types` them by number type; `bytes` are those of all files.
    `bits_per_weight` is the mean over the decoder's matrices, scales and zero points included, of a
    checkpoint over all tensors. `target` is what a bundle is made for and `runtime` what runs it,
    in words; `verification` its outcome: "passed", "failed" or "not measured"; `verified`
    says on which `machine` and whether that holds `here`. `damaged` are files of a bundle that are
    missing or have another size than its manifest says. `signature` is a bundle's: "none",
    "trusted" (every file is as the signed manifest says), or "not checked" where no keys are
    configured. `warnings` are the checkpoint's, of which a bundle keeps them.
    """

    config: ModelConfig
    parameters_total: int | None
    parameters_language: int
    parameters_activated: int
    experts_per_layer: dict[int, int]
    tensors: int | None = None
    types: dict[str, int] | None = None
    shared_router: bool | None = None
    warnings: tuple[Notice, ...] = ()


def inspect_model(path: Path, *, vision_tower: Path | None = None) -> Inspection:
    """Look into a checkpoint folder or a bundle.

    `vision_tower` is handed to `read_checkpoint`. Raises `InputError` where there is no folder,
    `ModelError` for a damaged model.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder.", "Give a bundle or a checkpoint folder.")
    if (path / "manifest.json").exists():
        return _inspect_bundle(path)
    return _inspect_checkpoint(path, vision_tower)


def activated_parameters(config: ModelConfig) -> int:
    """Parameters of the language part that run for one token."""
    shapes = decoder_parameters(config)
    experts = _total({name: shape for name, shape in shapes.items() if ".ffn.experts." in name})
    if config.moe is None or config.moe.merged:
        return _total(shapes)
    return _total(shapes) - experts + experts * config.moe.top_k // config.moe.num_experts


def _inspect_checkpoint(path: Path, vision_tower: Path | None) -> Inspection:
    with needs("export"):
        from medmoe_edge.checkpoint.reader import read_checkpoint
    checkpoint = read_checkpoint(path, vision_tower=vision_tower)
    stored = [*checkpoint.stored.values(), *checkpoint.twins.values()]
    return Inspection(
        parameters_total=_total({n: tensor.shape for n, tensor in checkpoint.names.items()}),
        tensors=len(stored),
        types=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in stored)),
        shared_router=checkpoint.shared_router if checkpoint.config.moe else None,
        warnings=checkpoint.warnings,
        bits_per_weight=_mean(
            (8.0 * tensor.dtype.itemsize, math.prod(tensor.shape))
            for tensor in checkpoint.names.values()
        ),
        runtime="PyTorch: the reference, to be exported",
        **_about_checkpoint(path, {tensor.file for tensor in stored}),
        **_about_language(checkpoint.config),
    )


def _inspect_bundle(path: Path) -> Inspection:
    bundle = Bundle.open(path, verify=keys_are_trusted())
    config = ModelConfig.from_json(bundle.manifest["config"], "manifest.json config")
    try:
        total = _total(expected_parameters(config))
    except MissingDependencyError:
        total = None
    return Inspection(
        parameters_total=total,
        bits_per_weight=_bits_per_weight(bundle),
        warnings=bundle.warnings,
        **_about_bundle(bundle),
        **_about_language(config),
    )


def _about_bundle(bundle: AnyBundle[Any]) -> dict[str, Any]:
    manifest, known = bundle.manifest, proven(bundle)
    files = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    return {
        "kind": "bundle",
        "name": bundle.folder.absolute().name,
        "bytes": sum(files.values()),
        "files": files,
        "damaged": tuple(n for n, size in files.items() if not _is_file(bundle.folder / n, size)),
        "target": bundle.target,
        "runtime": bundle.target.runtime,
        "quantisation": manifest.get("quantisation"),
        "source": manifest.get("source"),
        "licence": manifest.get("licence"),
        "verification": known.status,
        "verified": known.to_json(),
        "signature": signed(bundle.folder),
    }


def _is_file(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _about_checkpoint(folder: Path, weights: Iterable[Path]) -> dict[str, Any]:
    files = {path.name: path.stat().st_size for path in sorted(weights)}
    about = {"kind": "checkpoint", "name": folder.absolute().name}
    return {**about, "bytes": sum(files.values()), "files": files}


def _about_language(config: ModelConfig) -> dict[str, Any]:
    experts = config.moe.num_experts if config.moe else 0
    return {
        "config": config,
        "parameters_language": _total(decoder_parameters(config)),
        "parameters_activated": activated_parameters(config),
        "experts_per_layer": dict.fromkeys(config.moe_layers, experts),
    }


def _bits_per_weight(bundle: Bundle) -> float | None:
    """Of the decoder's matrices and deltas, as the manifest and the files tell; None if not."""
    parts = decoder_parts(bundle.config)
    try:
        stored, deltas = bundle.manifest["quantisation"], Deltas.of_bundle(bundle)
        if "experts" in stored and deltas is None:
            return None  # they are within an engine
        shapes = decoder_parameters(bundle.config)
        told = [
            (Format(each["bits"], each["group"]).bits_per_weight(width), rows * width)
            for each in stored.get("matrices") or ()
            if DELTA not in each["name"]
            for rows, width in [shapes[each["name"]]]
        ]
        if stored["precision"] == "fp32":
            whole = parts.keys() & {"attention", "ffn", "meta", "head"}
            told = [(32.0, parts[kind].weights) for kind in whole]
        if deltas is not None:
            told.append((deltas.stored, parts["experts"].weights))
        return _mean(told) if told else None
    except (AttributeError, LookupError, TypeError, ValueError, BundleError):
        return None  # of another version, or damaged


def _mean(values: Iterable[tuple[float, int]]) -> float:
    """Of values, each with its weight."""
    bits = weights = 0.0
    for value, weight in values:
        bits, weights = bits + value * weight, weights + weight
    return bits / max(weights, 1)


def _total(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


ROUTER_SIZE = 128  # as in models.modality_moe, which needs torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModalityInspection(_Inspected):
    """A MedMoE's make-up; `parameters` by part.

    `parameters_activated` is what runs for one image and one text: of the experts, one.
    `bits_per_weight` is of all that is stored, graphs included.
    `verification` is a bundle's proof of fidelity: "passed", "failed" or "not measured"; `verified`
    says on which `machine` and whether that holds `here`; `signature` is as in `Inspection`.
    """

    TOLD = ("parameters_total", "parameters_activated", "warnings")

    config: ModalityConfig
    parameters: dict[str, int]
    scores: Scores

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What must be known of every answer."""
        return self.scores.warnings

    @property
    def parameters_total(self) -> int:
        """Of all parts."""
        return sum(self.parameters.values())

    @property
    def parameters_activated(self) -> int:
        """Of what runs for one image and one text."""
        experts = self.parameters["experts"]
        return self.parameters_total - experts + experts // self.config.experts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return super().to_json() | {"target": str(self.target) if self.target else None}


def inspect_modality(folder: Path) -> ModalityInspection:
    """Look into a checkpoint folder or a bundle; raises `ModelError` for a damaged one."""
    if (folder / MANIFEST).exists():
        bundle = ModalityBundle.open(folder, verify=keys_are_trusted())
        about = _about_bundle(bundle)
        sizes = about["files"].items()
        stored = sum(size for name, size in sizes if not name.endswith((".json", ".md")))
        return ModalityInspection(
            config=bundle.config,
            parameters=parameters(bundle.config),
            scores=bundle.scores,
            bits_per_weight=8 * stored / sum(parameters(bundle.config).values()),
            **about,
        )
    with needs("export"):
        from medmoe_edge.checkpoint.contrastive import match_checkpoint
    config, tensors = match_checkpoint(folder)
    return ModalityInspection(
        config=config,
        parameters=parameters(config),
        scores=read_scores(folder),
        **_about_checkpoint(folder, {tensor.file for tensor in tensors.values()}),
    )


def parameters(config: ModalityConfig) -> dict[str, int]:
    """How many parameters each part has."""
    size, last = config.size, config.vision.channels[-1]
    router = _linear(last, ROUTER_SIZE) + _linear(ROUTER_SIZE, len(config.modalities))
    projections = sum(_linear(channels, size) for channels in config.vision.channels)
    expert = projections + _linear(size, size // 2) + _linear(size // 2, 1)
    return {
        "image tower": _swin(config.vision),
        "router": router,
        "experts": config.experts * expert,
        "text tower": _bert(config.text),
    }


def _swin(config: SwinConfig) -> int:
    total = _linear(3 * config.patch_size**2, config.embed_size) + 2 * config.embed_size
    offsets = (2 * config.window_size - 1) ** 2
    for size, depth, heads in zip(config.channels, config.depths, config.heads, strict=True):
        inner = config.mlp_ratio * size
        feed_forward = _linear(size, inner) + _linear(inner, size)
        total += depth * (4 * _linear(size, size) + offsets * heads + feed_forward + 4 * size)
    for size in config.channels[:-1]:
        total += 4 * size * 2 * size + 2 * 4 * size  # merging: reduction without bias, and a norm
    return total + 2 * config.channels[-1]


def _bert(config: BertConfig) -> int:
    size, inner = config.hidden_size, config.intermediate_size
    embeddings = (config.vocab_size + config.max_positions + 2) * size + 2 * size
    layer = 4 * _linear(size, size) + _linear(size, inner) + _linear(inner, size) + 4 * size
    return embeddings + config.layers * layer


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


PARTS: Mapping[str, tuple[str, ...]] = {  # of a manifest, under the headings of a change record
    "precision": ("quantisation", "target"),
    "gates": ("gates",),
    "thresholds": ("scores", "confidence", "refusals"),
    "verification": (VERIFICATION,),
}
COMPARED_APART = {"files", SEAL, "name"}
GRAPHS = ("vision.onnx", "decoder.onnx", "image.onnx", "text.onnx")


class Change(NamedTuple):
    """One value that differs; None where the bundle has none. `name` is its place, with dots."""

    name: str
    before: Any
    after: Any


@dataclasses.dataclass(frozen=True)
class Changes(Told):
    """A change record: what differs between two bundles, by their manifests and stored weights.

    Attributes:
        before: The first bundle: name, hash, checkpoint, and how it was verified.
        after: The second one.
        weights: Stored tensors by whether they are the "same", "changed", "added" or "removed";
            the names of all but the first. None where a bundle holds engines.
        files: The same of the bundle's files, by their hashes.
        precision: How weights and activations are stored, each matrix, and the target.
        gates: The bounds that a verification must keep.
        thresholds: What decides how an answer is told.
        verification: Every figure, gate and circumstance of the two records.
        other: All else in the manifests.
        asked: Questions that both carry with the answer of their checkpoints.
        answers: Of these the ones that the checkpoints answer differently.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    weights: dict[str, Any] | None
    files: dict[str, Any]
    precision: tuple[Change, ...]
    gates: tuple[Change, ...]
    thresholds: tuple[Change, ...]
    verification: tuple[Change, ...]
    other: tuple[Change, ...]
    asked: int
    answers: tuple[Change, ...]


def compare_bundles(before: Path, after: Path) -> Changes:
    """What changed from one bundle to another of the same family; every file of both is checked.

    Raises `BundleError` for a damaged bundle and `InputError` for two that cannot be compared.
    """
    for folder in (before, after):
        if not (folder / MANIFEST).exists():
            raise InputError(f"{folder} is not a bundle.", "Give two bundles to compare.")
    kind = Bundle if model_kind(before) == Bundle.kind else ModalityBundle
    if model_kind(after) != kind.kind:
        raise InputError(
            "The two bundles are of different families.", "Compare bundles that do the same work."
        )
    old, new = kind.open(before), kind.open(after)
    found = list(_differences(_comparable(old), _comparable(new)))
    by_part: dict[str, tuple[Change, ...]] = {
        part: tuple(each for each in found if each.name.split(".")[0] in names)
        for part, names in PARTS.items()
    }
    known = {each.name for changes in by_part.values() for each in changes}
    said = _recorded_answers(old), _recorded_answers(new)
    common = [key for key in said[0] if key in said[1]]
    return Changes(
        before=_identity(old),
        after=_identity(new),
        weights=None
        if old.target.is_engine or new.target.is_engine  # these hold no graphs
        else _compared(*map(_weights, (old, new))),
        files=_compared(*map(_files, (old, new))),
        **by_part,
        other=tuple(each for each in found if each.name not in known),
        asked=len(common),
        answers=tuple(
            Change(question, said[0][picture, question], said[1][picture, question])
            for picture, question in common
            if said[0][picture, question] != said[1][picture, question]
        ),
    )


def _identity(bundle: AnyBundle[Any]) -> dict[str, Any]:
    record = bundle.verification or {}
    return {
        "name": bundle.name,
        "sha256": bundle.sha256,
        "checkpoint_sha256": bundle.manifest["source"].get("checkpoint_sha256"),
        "verification": bundle.proof,
        "verified": record.get("when"),
        "data": (record.get("data") or {}).get("name"),
        "signature": signed(bundle.folder),
    }


def _comparable(bundle: AnyBundle[Any]) -> dict[str, Any]:
    """The manifest with its lists of named things as objects, so that their order counts not."""
    kept = {key: value for key, value in bundle.manifest.items() if key not in COMPARED_APART}
    return {key: _by_name(value) for key, value in kept.items()}


def _by_name(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _by_name(part) for key, part in value.items()}
    if (
        isinstance(value, list)
        and value
        and all(isinstance(x, dict) and "name" in x for x in value)
    ):
        return {
            str(part["name"]): {key: _by_name(x) for key, x in part.items() if key != "name"}
            for part in value
        }
    return value


def _differences(before: Any, after: Any, name: str = "") -> Iterator[Change]:
    """The leaves of two JSON values that differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            place = f"{name}.{key}" if name else str(key)
            yield from _differences(before.get(key), after.get(key), place)
    elif before != after:
        yield Change(name, before, after)


def _compared(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    common = [name for name in before if name in after]
    return {
        "same": sum(before[name] == after[name] for name in common),
        "changed": [name for name in common if before[name] != after[name]],
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
    }


def _files(bundle: AnyBundle[Any]) -> dict[str, str]:
    return {name: str(entry["sha256"]) for name, entry in bundle.manifest["files"].items()}


def _weights(bundle: AnyBundle[Any]) -> dict[str, str]:
    """SHA-256 of every stored tensor, under the graph's name for it."""
    return {
        f"{graph.removesuffix('.onnx')}: {name}": hashlib.sha256(array.tobytes()).hexdigest()
        for graph in GRAPHS
        if graph in bundle.manifest["files"]
        for name, array in stored_weights(bundle.path(graph))
    }


def _recorded_answers(bundle: AnyBundle[Any]) -> dict[tuple[str, str], str]:
    """What the checkpoint answers to the questions that travel with a bundle.

    By the picture's hash and the question; empty where no answers travel with it.
    """
    if not isinstance(bundle, Bundle) or recorded_file(bundle) is None:
        return {}
    recorded = read_recorded(bundle)
    if "questions" not in recorded.about:
        return {}
    recording, _ = unpack_recording(bundle, recorded)
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    ends = bundle.config.decoder.end_tokens
    found = {}
    for key, examples in recording.examples.items():
        picture = hashlib.sha256(recording.load(key).pixels.tobytes()).hexdigest()
        for example in examples:
            tokens = [
                token for token in recording.questions[example.id].tokens if token not in ends
            ]
            found[picture, example.question] = tokenizer.decode(tokens)
    return found
