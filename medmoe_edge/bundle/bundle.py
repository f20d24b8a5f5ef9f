"""The deployable folder: graphs, weights, tokenizer and a manifest that vouches for them.

    manifest.json    format, model configuration, quantisation, source, licence, all hashes, a seal;
                     after `verify`, the record of its verification; after `eval
                     --fit-confidence`, how often its answers are right
    tokenizer.json
    embedding.npy    token embeddings [V, D], read row by row
    vision.onnx      pixels [1, 3, S, S] -> image tokens [1, N, D]         (+ vision.data)
    decoder.onnx     one step of the decoder, KV cache written in place    (+ decoder.data)
    segment.N.onnx   the same without the routed experts, cut there, and   (+ decoder.data)
    expert.N.onnx    one expert of each shape and format: for a runtime that pages experts
    experts.data     the experts of a bundle that pages them in a GPU's memory, in its layout
    recorded-*.npz   inputs and what the checkpoint made of them: `bundle/recorded.py`
    manifest.sig     a signature of manifest.json, if there is one: `bundle/trust.py`

The bundle of a MedMoE, which its manifest calls another `kind`, holds in their place

    image.onnx       pixels [1, 3, S, S] -> regions, pooled, router_logits (+ image.data)
    text.onnx        ids, words, seen -> word_features, pooled, mask       (+ text.data)

and `scores` in its manifest: how similarities become scores.
The same checkpoint and options give the same bytes. Nothing in a bundle is ever unpickled.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from medmoe_edge.atomic import MOST_TEXT, atomic_file, file_sha256, read_small
from medmoe_edge.bundle import trust
from medmoe_edge.bundle.machine import Machine
from medmoe_edge.config import Confidence, Config, ModelConfig
from medmoe_edge.config_contrastive import ModalityConfig, Scores
from medmoe_edge.errors import (
    BundleError,
    ConfigError,
    Notice,
    ResourceError,
    VerificationError,
    of_file,
)

TargetName = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
DType = Literal["fp32", "fp16", "bf16"]
DEFAULT: TargetName = "onnxruntime"


@dataclass(frozen=True)
class Target(Config):
    """The manifest's `target`; a bundle without one is for ONNX Runtime on a CPU.

    `dtype` is that of activations. Engines serve one `gpu` (a compute capability, sm89) and the
    `library_version` that built them; their cache holds `capacity` positions, and one prefill step
    at most `prefill` of them. Of a `paged` target the experts lie in a file of their own, and are
    brought into slots of the GPU's memory as they are needed. The decoder is in so many `engines`,
    each of some layers in a row, where building it in one would take more memory than there was.
    """

    name: TargetName = DEFAULT
    dtype: DType = "fp32"
    gpu: str = ""
    library_version: str = ""
    capacity: int = 0
    prefill: int = 0
    paged: bool = False
    engines: int = 1

    def __post_init__(self) -> None:
        if self.is_engine and not (self.gpu and 0 < self.prefill <= self.capacity):
            raise ConfigError(
                f"The target {self.name} names no GPU, or a prefill of {self.prefill} in "
                f"{self.capacity} positions.",
                "Export the bundle again.",
            )

    @property
    def decoders(self) -> tuple[str, ...]:
        """The names of the decoder's engines, without their suffix, in the order of its layers."""
        if self.engines == 1:
            return ("decoder",)
        return tuple(f"decoder.{index}" for index in range(self.engines))

    def layers(self, count: int) -> list[range]:
        """Which of a decoder's layers each engine holds."""
        ends = [count * index // self.engines for index in range(self.engines + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)]

    @property
    def is_engine(self) -> bool:
        """Whether the bundle holds engines in the place of graphs."""
        return self.name.startswith("tensorrt")

    @property
    def runtime(self) -> str:
        """What runs it and where, for people."""
        if self.is_engine:
            title = "TensorRT" if self.name == "tensorrt" else "TensorRT for RTX"
            return f"{title} {self.library_version}, on a GPU of {self.gpu}"
        return "ONNX Runtime, on any CPU" if self.name == DEFAULT else "ONNX Runtime, on CUDA"

    def __str__(self) -> str:
        # of the portable bundle the type of activations is no choice, and told with its weights
        dtype = "" if self.name == DEFAULT else self.dtype
        parts = (self.name, self.gpu, dtype, "paged" if self.paged else "")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Gates(Config):
    """Bounds, all from 0 to 1: the least agreement and cosine, the most loss and flips."""

    answer_agreement: float
    accuracy_drop: float
    routing_flips: float
    vision_cosine: float = 0.99


DEFAULT_GATES: dict[str, Gates] = {
    "fp32": Gates(0.999, 0.001, 0.001, 0.9999),
    "int8": Gates(0.99, 0.003, 0.005),
    "int4": Gates(0.97, 0.01, 0.02),
    "mixed": Gates(0.97, 0.01, 0.02),
}

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
REQUIRED = ("format_version", "name", "config", "quantisation", "files", "source", "licence")
FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # leads nowhere outside the folder
SEAL = "seal"
VERIFICATION = "verification"
CONFIDENCE, REFUSALS = "confidence", "refusals"
Kind = Literal["med-moe", "modality-moe"]
Status = Literal["passed", "not decided", "failed", "not measured"]

KINDS: dict[Kind, str] = {  # and the verbs that run them
    "med-moe": "ask",
    "modality-moe": "classify, locate, index and retrieve",
}

NOTICE = "Research demonstration, not a medical device: never base a clinical decision on it."

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class AnyBundle(Generic[C]):
    """An opened bundle of one kind.

    `sha256` is the manifest's own hash and so stands for the whole folder.
    """

    kind: ClassVar[Kind]

    folder: Path
    manifest: Mapping[str, Any]
    config: C
    sha256: str

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Self:
        """Read the manifest and, with `verify`, check size and hash of every file.

        Raises `BundleError` for anything missing, damaged, changed, or of another version or kind,
        and where keys are trusted for what none of them signed.
        """
        text = _read(folder / MANIFEST)
        trust.check_signature(folder, text)
        manifest = _parse(folder, text)
        if (kind := manifest_kind(manifest)) != cls.kind:
            raise BundleError(
                f"{folder} holds a {kind} model, and this needs one of {cls.kind}.",
                f"Its verbs are: {KINDS[kind]}.",
            )
        config = cls._read_config(manifest["config"])
        bundle = cls(folder, manifest, config, hashlib.sha256(text).hexdigest())
        for name in manifest["files"] if verify else ():
            bundle.check_file(name)
        return bundle

    @classmethod
    def _read_config(cls, data: Mapping[str, Any]) -> C:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.manifest["name"])

    @property
    def verification(self) -> Mapping[str, Any] | None:
        """The record of the last `verify` against the checkpoint, as JSON (`evaluation.record`)."""
        record: Mapping[str, Any] | None = self.manifest.get(VERIFICATION)
        return record

    @property
    def proof(self) -> Status:
        """What that record says of the bundle's fidelity to its checkpoint."""
        return "not measured" if self.verification is None else status_of(self.verification)

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What its checkpoint had to say of itself: it holds of the bundle's answers, too."""
        return tuple(Notice(**each) for each in self.manifest.get("warnings", ()))

    @property
    def verified_on(self) -> Machine | None:
        """The machine of that record; None where none was recorded. Raises `ConfigError`."""
        machine = (self.verification or {}).get("machine")
        return None if machine is None else Machine.from_json(machine, f"{MANIFEST} machine")

    @functools.cached_property
    def target(self) -> Target:
        """What its graphs or engines run on; raises `ConfigError` for one that is unknown."""
        return Target.from_json(self.manifest.get("target", {}), f"{MANIFEST} target")

    def check_portable(self) -> None:
        """Raise `BundleError` unless it is for ONNX Runtime's CPU, as all others' source is."""
        if self.target.name != DEFAULT:
            raise BundleError(
                f"{self.folder} is made for {self.target}.",
                "Give the portable bundle that it was made from, or the checkpoint.",
            )

    def path(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        if name not in self.manifest["files"]:
            raise BundleError(f"{self.folder} has no {name}.", "Export the model again.")
        return self.folder / name

    def check_file(self, name: str) -> None:
        """Raise `BundleError` unless a file has the size and the hash that the manifest tells."""
        path, entry = self.folder / name, self.manifest["files"][name]
        try:
            same = path.stat().st_size == entry["bytes"] and path.is_file()
            intact = same and _hashes_to(path, entry["sha256"])
        except OSError as error:
            what = f"{path} cannot be read ({error.strerror})."
            gone = BundleError(what, "Copy or export the bundle again.")
            raise of_file(str(path), error, gone) from error
        if not intact:
            raise BundleError(
                f"{path} was changed or is incomplete: it does not match the manifest.",
                "Copy or export the bundle again.",
            )


@dataclass(frozen=True)
class Bundle(AnyBundle[ModelConfig]):
    """An opened bundle of a Med-MoE."""

    kind = "med-moe"

    @classmethod
    def _read_config(cls, data: Mapping[str, Any]) -> ModelConfig:
        return ModelConfig.from_json(data, f"{MANIFEST} config")

    @property
    def gates(self) -> Gates:
        """What a verification must find; raises `BundleError` where none are recorded."""
        gates = self.manifest.get("gates")
        if gates is None:
            raise BundleError(
                f"{self.folder} records no gates for its verification.", "Export it again."
            )
        return Gates.from_json(gates, f"{MANIFEST} gates")

    @property
    def confidence(self) -> Confidence | None:
        """How often its answers are right, where that was fitted; raises `ConfigError`."""
        fitted = self.manifest.get(CONFIDENCE)
        return None if fitted is None else Confidence.from_json(fitted, f"{MANIFEST} {CONFIDENCE}")

    @property
    def refusals(self) -> Mapping[str, float]:
        """By its code, the probability from which on a refusal of its model counts.

        Empty where the manifest says none; raises `ConfigError` for one that is impossible.
        """
        found: Any = self.manifest.get(REFUSALS, {})
        known = self.config.codes
        if not isinstance(found, Mapping) or not all(
            code in known and type(value) in (int, float) and 0 <= value <= 1
            for code, value in found.items()
        ):
            raise ConfigError(
                f"{MANIFEST} has {REFUSALS} = {found!r}.",
                "Give each code that the model knows a probability from 0 to 1.",
            )
        return {code: float(value) for code, value in found.items()}


AnyBundleT = TypeVar("AnyBundleT", bound=AnyBundle[Any])


def model_kind(folder: Path) -> Kind:
    """What a bundle or checkpoint holds, by its manifest or its `config.json`; med-moe in doubt.

    Raises `BundleError` for a damaged manifest.
    """
    if (folder / MANIFEST).exists():
        return manifest_kind(_parse(folder, _read(folder / MANIFEST)))
    try:
        kind = json.loads(read_small(folder / "config.json"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return Bundle.kind  # whoever reads it says what is wrong
    return "modality-moe" if kind == "modality-moe" else Bundle.kind


def manifest_kind(manifest: Mapping[str, Any]) -> Kind:
    """The kind in a manifest that was read; the first bundles say none."""
    kind: Kind = manifest.get("kind", Bundle.kind)
    return kind


def write_manifest(folder: Path, contents: Mapping[str, Any]) -> None:
    """Hash every file of `folder` and write the manifest, the last file of a new bundle."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    _store(folder, {"format_version": FORMAT_VERSION, **contents, "files": files})


def write_derived_manifest(
    folder: Path, bundle: Bundle, target: Target, places: Mapping[str, Any]
) -> None:
    """The manifest of a folder made from `bundle` for another target.

    `places` are its entries `experts`, where each lies in the weights, and `paging`, where they are
    paged; neither where an engine holds them. What was proven of the bundle is not proven of the
    target: it names the bundle instead.
    """
    own = {"format_version", "files", SEAL, VERIFICATION, "experts", "paging"}
    kept = {name: value for name, value in bundle.manifest.items() if name not in own}
    stored, dtype = bundle.manifest["quantisation"], target.dtype
    decoder = f"{stored['precision']} weights of the portable bundle, {dtype} activations"
    vision = f"weights of the portable bundle in {dtype}"
    kept["quantisation"] = {**stored, "decoder": decoder, "vision": vision}
    source = {**bundle.manifest["source"], "bundle_sha256": bundle.sha256}
    write_manifest(folder, {**kept, **places, "source": source, "target": target.to_json()})


def write_verification(
    bundle: AnyBundleT,
    record: Mapping[str, Any],
    added: Mapping[str, bytes] | None = None,
    *,
    without: str | None = None,
) -> AnyBundleT:
    """Put the record of a verification (`passed` and what else is to be kept) into the manifest.

    Files that are `added` are written first, and one that the bundle is to go `without` leaves the
    manifest; the manifest is replaced whole or not at all. Returns the bundle as it is now, under a
    new hash; raises `ResourceError` where its folder cannot be written.
    """
    return _rewrite(bundle, {VERIFICATION: record}, added or {}, without)


def write_confidence(
    bundle: Bundle, confidence: Confidence, refusals: Mapping[str, float]
) -> Bundle:
    """Put what was fitted into the manifest: it stays there when the bundle is verified again.

    `refusals` are thresholds by their codes. Returns and raises what `write_verification` does.
    """
    fitted = {CONFIDENCE: confidence.to_json(), **({REFUSALS: dict(refusals)} if refusals else {})}
    return _rewrite(bundle, fitted, {}, None)


def _rewrite(
    bundle: AnyBundleT,
    changed: Mapping[str, Any],
    added: Mapping[str, bytes],
    without: str | None,
) -> AnyBundleT:
    files = {name: entry for name, entry in bundle.manifest["files"].items() if name != without}
    try:
        for name, content in added.items():
            with atomic_file(bundle.folder / name) as file:
                file.write(content)
            sha256 = hashlib.sha256(content).hexdigest()
            files[name] = {"bytes": len(content), "sha256": sha256}
        files = dict(sorted(files.items()))
        written = _store(bundle.folder, {**bundle.manifest, **changed, "files": files})
    except OSError as error:
        raise ResourceError(
            f"{bundle.folder / MANIFEST} cannot be written ({error.strerror}).",
            "Work on a copy of the bundle that you may write to.",
        ) from error
    made = type(bundle).open(bundle.folder, verify=False)
    _check_same(bundle.folder, written, made.sha256)
    return made


def _check_same(folder: Path, verified: str | None, sha256: str) -> None:
    if verified not in (None, sha256):
        raise BundleError(
            f"{folder / MANIFEST} is not what was verified: it was changed meanwhile.",
            "Find out who wrote to the bundle, and verify it again.",
        )


def sign_bundle(folder: Path, key: Path, verified: str | None = None) -> None:
    """Sign a bundle of either kind by its manifest, which holds the hashes of all its files.

    Verify it first: this checks no file. `verified` is the hash of the manifest that was. Raises
    `BundleError` for another or a damaged one, `VerificationError` for a bundle that failed its
    verification, `InputError` for a key, and `ResourceError` for a folder that cannot be used.
    """
    private, text = trust.read_private_key(key), _read(folder / MANIFEST)
    _check_same(folder, verified, hashlib.sha256(text).hexdigest())
    record = _parse(folder, text).get(VERIFICATION)
    if record is not None and status_of(record) == "failed":
        raise VerificationError(
            f"{folder} failed its verification, and is not signed.",
            "Export it in another precision or with calibration, and sign that.",
        )
    try:
        trust.write_signature(folder, text, private)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be written ({error.strerror}).", "Sign a copy of the bundle."
        ) from error


def _store(folder: Path, manifest: Mapping[str, Any]) -> str:
    sealed = {**manifest, SEAL: _seal(manifest)}
    text = (json.dumps(sealed, indent=1) + "\n").encode()
    with atomic_file(folder / MANIFEST) as file:
        file.write(text)
    trust.vouch_for(text)
    return hashlib.sha256(text).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if path.is_file():  # here, as each start reads it; what is too long is cut, and so damaged
            with path.open("rb") as file:
                return file.read(MOST_TEXT)
        return read_small(path)  # which says why not
    except OSError as error:
        what = f"{path} cannot be read ({error.strerror})."
        missing = BundleError(what, "Give a bundle folder, made by: medmoe-edge export")
        raise of_file(str(path), error, missing) from error


def _parse(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
        current = version == FORMAT_VERSION
        sound = isinstance(version, int) and (not current or _is_sound(manifest))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder) from error
    if not sound:
        raise _damaged(folder)
    if not current:
        raise BundleError(
            f"{folder} is a bundle of format {version}, this version reads {FORMAT_VERSION}.",
            "Export the checkpoint again with this version.",
        )
    return dict(manifest)


def _damaged(folder: Path) -> BundleError:
    what = f"{folder / MANIFEST} is damaged or was edited."
    return BundleError(what, "Copy or export the bundle again.")


def _is_sound(manifest: dict[str, Any]) -> bool:
    return (
        all(key in manifest for key in REQUIRED)
        and manifest.get("kind", Bundle.kind) in KINDS
        and all(
            FILE_NAME.fullmatch(name)
            and isinstance(entry["bytes"], int)
            and isinstance(entry["sha256"], str)
            for name, entry in manifest["files"].items()
        )
        and isinstance(manifest.get(VERIFICATION, {"passed": False})["passed"], bool | None)
        and manifest[SEAL] == _seal(manifest)
    )


def status_of(record: Mapping[str, Any]) -> Status:
    """What the record of a verification says under `passed`: null is too few questions to tell."""
    passed = record["passed"]
    return "not decided" if passed is None else "passed" if passed else "failed"


def _seal(manifest: Mapping[str, Any]) -> str:
    """The hash of all else in a manifest, which it carries: against damage, not forgery."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def _hashes_to(path: Path, sha256: str) -> bool:
    if path.stat().st_size >= trust.LARGE:
        return trust.hashes_to(path, sha256)
    with path.open("rb") as file:  # here, as each file passes at each start
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


@dataclass(frozen=True)
class ModalityGates(Config):
    """What a verification must find, all 0 to 1: the least agreement with the checkpoint.

    The agreements are shares of images; the cosines are means over images, of their pooled features
    and of all their regions, and over texts.
    """

    modality_agreement: float
    zero_shot_agreement: float
    pooled_cosine: float
    region_cosine: float
    text_cosine: float


MODALITY_GATES: dict[str, ModalityGates] = {
    "fp32": ModalityGates(0.999, 0.999, 0.9999, 0.9999, 0.9999),
    "int8": ModalityGates(0.995, 0.98, 0.995, 0.99, 0.995),
}


@dataclass(frozen=True)
class ModalityBundle(AnyBundle[ModalityConfig]):
    """An opened bundle of a MedMoE."""

    kind = "modality-moe"

    @classmethod
    def _read_config(cls, data: Mapping[str, Any]) -> ModalityConfig:
        return ModalityConfig.from_json(data, f"{MANIFEST} config")

    @property
    def scores(self) -> Scores:
        """How similarities become scores; raises `ConfigError`."""
        return Scores.from_json(self.manifest.get("scores", {}), f"{MANIFEST} scores")

    @property
    def gates(self) -> ModalityGates:
        """What a verification must find; raises `ConfigError` where none are recorded."""
        return ModalityGates.from_json(self.manifest.get("gates", {}), f"{MANIFEST} gates")
