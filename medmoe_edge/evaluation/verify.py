"""A bundle held against the checkpoint it was made from, and the record of it in the manifest.

Every expert of every layer is made to run, in the engine that will run it: is its output finite?

An expert that calibration never reached can be broken for years before some image is routed to it.
Here the router is replaced so that all tokens go to one expert, in all layers at once, and E runs
reach every expert.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmoe_edge._types import Floats, Progress, no_progress, there
from medmoe_edge.bundle.bundle import AnyBundle, Bundle, Status, status_of
from medmoe_edge.bundle.recorded import Recorded, signature_of, sweep_weights
from medmoe_edge.config import Confidence, ModelConfig
from medmoe_edge.data.datasets import Example
from medmoe_edge.errors import (
    BundleError,
    DataError,
    ModelError,
    VerificationError,
    needs,
)
from medmoe_edge.evaluation.fidelity import Recording, compare, record
from medmoe_edge.evaluation.gates import (
    WHOLE,
    Compared,
    GateResult,
    compare_weights,
    judge,
    judge_weights,
    outcome_of,
)
from medmoe_edge.evaluation.metrics import Fidelity
from medmoe_edge.evaluation.mutations import Mutations, measure_mutations
from medmoe_edge.evaluation.record import (
    AnyRecord,
    Source,
    keep_record,
    new_record,
    read_mutations,
    read_record,
)
from medmoe_edge.evaluation.recording import pack_recording, unpack_recording
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Runtime, Step
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

TOKENS = 24
FIRST_CHANNEL = 100  # times the largest value of a prompt, where a norm has no bias
FORCE = np.float32(1e4)  # of logits: the softmax is 1 for the forced expert, and 0 for all others


def sweep_experts(runtime: OrtRuntime) -> list[str]:
    """Parts of its bundle whose output is not finite on random input; empty where all is well.

    Experts are named as in the manifest, with what they serve where that is known; a fault that
    every expert shows is not theirs. Where an expert has several, the first layer is told: what
    follows it cannot be seen.
    """
    bundle, generator = runtime.bundle, np.random.default_rng(0)
    side = bundle.config.vision.image_size
    picture = generator.standard_normal((1, 3, side, side), np.float32)
    faults = [] if np.isfinite(runtime.encode_image(picture)).all() else ["vision"]
    prompt = _random_prompt(runtime, generator)
    logits = _run(runtime, prompt).logits  # the routers as they are
    experts = range(bundle.config.moe.num_experts if bundle.config.moe else 0)
    faulty = {}
    for expert in experts:
        step = _run(OrtRuntime(bundle, _routers_to(bundle.config, expert)), prompt)
        layer = _first_fault(step, _row(bundle.config, expert))
        if layer is not None:
            faulty[expert] = layer
    common = len(experts) > 1 and len(faulty) == len(experts) and len({*faulty.values()}) == 1
    if common or (not faulty and not np.isfinite(logits).all()):
        return [*faults, "decoder"]
    return faults + [_name(bundle.config, layer, expert) for expert, layer in faulty.items()]


def _random_prompt(runtime: OrtRuntime, generator: np.random.Generator) -> Floats:
    """Random tokens, then random vectors of their size where an image would stand, `[S, D]`."""
    vocabulary = runtime.config.decoder.vocab_size
    tokens = runtime.embed(generator.integers(0, vocabulary, TOKENS).tolist())
    prompt = np.concatenate((tokens, generator.permuted(tokens, axis=0)))
    if "bias" not in runtime.config.decoder.norm_parameters:
        prompt[:, 0] = FIRST_CHANNEL * np.abs(prompt).max()  # it leads in every norm's output
    return prompt


def _run(runtime: OrtRuntime, prompt: Floats) -> Step:
    return runtime.step(prompt, runtime.new_cache(len(prompt)))


def _routers_to(config: ModelConfig, expert: int) -> Mapping[str, Floats]:
    """Weights that send every token to one expert.

    A router without a bias gets one through the norm before it, whose first channel is held at 1;
    that of an RMSNorm, which has no bias either, is large in every prompt and positive.
    """
    moe = there(config.moe)
    size, bias = config.decoder.hidden_size, np.zeros(moe.router_rows, np.float32)
    bias[_row(config, expert)] = FORCE
    if moe.router_bias:
        return {f"decoder.layers.{layer}.ffn.router.bias": bias for layer in config.moe_layers}
    first = np.eye(1, size, dtype=np.float32)  # [1, D]: 1 in the first channel
    norm = "input_norm" if config.decoder.parallel else "post_norm"
    arrays = {"ffn.router.weight": first.T * bias}
    if "bias" in config.decoder.norm_parameters:
        arrays |= {f"{norm}.weight": 1 - first[0], f"{norm}.bias": first[0]}
    else:
        arrays[f"{norm}.weight"] = np.ones(size, np.float32)
    return {
        f"decoder.layers.{layer}.{name}": array
        for layer in config.moe_layers
        for name, array in arrays.items()
    }


def _row(config: ModelConfig, expert: int) -> int:
    """The expert's row of the router."""
    rows = config.moe.own_rows if config.moe else None
    return expert if rows is None else rows[expert]


def _first_fault(step: Step, row: int) -> int | None:
    """The first MoE layer (0..M-1) that a row's expert spoils or was not reached in, or None.

    A layer's output is seen in the next layer's router logits, and the last one's in the logits.
    """
    reached = (step.router_logits.argmax(-1) == row).all(0)  # [M]
    for layer, well in enumerate(reached):
        last = layer + 1 == len(reached)
        after = step.logits if last else step.router_logits[:, layer + 1]
        if not (well and np.isfinite(after).all()):
            return layer
    return None


def _name(config: ModelConfig, layer: int, expert: int) -> str:
    name = f"decoder.layers.{config.moe_layers[layer]}.ffn.experts.{expert}"
    names = there(config.moe).expert_names
    return f"{name} ({names[expert]})" if names else name


if TYPE_CHECKING:
    from medmoe_edge.checkpoint.reader import Checkpoint

__all__ = ["Data", "GateResult", "Verification", "judge", "verify"]

FEW = 5  # faults named in an error
# What a bundle's mean KL may be on the inputs that travel with it, times what it was on the machine
# where they were recorded: others that compute exactly stay within 1.5, saturating ones reach 40.
KL_ROOM, KL_LEAST = 4, 1e-5


@dataclass(frozen=True)
class Data:
    """Questions to verify on; the manifest keeps their name and hash, never a path.

    Attributes:
        name: Of the data.
        examples: The questions.
        load: Reads their images, which another step may have decoded already.
        tokens: Gives what the checkpoint's tower made of an image `[N, D]`, or None where no step
            before has asked it.
    """

    name: str
    examples: Sequence[Example]
    load: Callable[[Path], Image] = load_image
    tokens: Callable[[Path], Floats | None] | None = None

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

    Attributes:
        bundle: As it is now.
        faults: Weights and experts that are not finite, and scales of 0, found in this run.
        record: What was just measured, or in the manifest from an earlier run; None where nothing
            was ever measured.
        beside: Other candidates held against the same reference, for comparison.
        recorded: Whether this run wrote the record into the manifest.
        weights: How the stored weights compare with the marks of the checkpoint's; None of a bundle
            that carries none.
    """

    bundle: AnyBundle[Any]
    faults: Sequence[str]
    record: AnyRecord | None
    beside: Mapping[str, Fidelity] = field(default_factory=dict)
    recorded: bool = False
    weights: Compared | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the bundle may be trusted; None where that is not known, see `outcome`."""
        if self.faults or (self.weights and self.weights.wrong):
            return False
        return None if self.record is None else self.record.passed

    @property
    def outcome(self) -> Status:
        """The same in words; `not decided`: measured, on too few questions to tell."""
        if self.record is None and self.passed is None:
            return "not measured"
        return status_of({"passed": self.passed})

    @property
    def fitted(self) -> Confidence | None:
        """What the bundle knows of how often its answers are right; not measured here."""
        return self.bundle.confidence if isinstance(self.bundle, Bundle) else None

    def error(self) -> VerificationError | None:
        """The error to raise for a bundle that failed, naming what failed; else None."""
        if self.passed is not False:
            return None
        reasons = [f"not finite: {', '.join(self.faults[:FEW])}"] if self.faults else []
        if len(self.faults) > FEW:
            reasons[0] += f" and {len(self.faults) - FEW} more"
        for result in judge_weights(self.weights):
            if self.weights and not result.passed:
                named = ", ".join(self.weights.wrong[:FEW])
                reasons.append(f"{result.summary} (such as {named})")
        for result in self.record.gates if self.record else ():
            told = result.name == "weights" or (self.faults and result.name == "finite")
            if not (result.passed or told):
                reasons.append(result.summary)
        remedy = "export again at a higher precision, or with more calibration data."
        failed = [
            gate.name for gate in (self.record.gates if self.record else ()) if not gate.passed
        ]
        if failed and all(name.startswith(WHOLE) for name in failed):
            remedy = "export again with more image tokens."
        if self.weights and self.weights.wrong:
            remedy = "copy or export it again."
        return VerificationError(
            f"{self.bundle.name} failed its verification: {'; '.join(reasons)}.",
            f"Do not use it: {remedy}",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bundle": {"name": self.bundle.name, "sha256": self.bundle.sha256},
            "passed": self.passed,
            "outcome": self.outcome,
            "faults": list(self.faults),
            "weights": self.weights.to_json() if self.weights else None,
            "verification": self.record.to_json() if self.record else None,
            "recorded": self.recorded,
            "confidence": self.fitted.to_json() if self.fitted else None,
            "beside": {name: fidelity.to_json() for name, fidelity in self.beside.items()},
        }


def verify(
    folder: Path,
    checkpoint: "Path | Checkpoint | None" = None,
    data: Data | None = None,
    *,
    beside: Mapping[str, Callable[[], Runtime]] | None = None,
    record: bool | None = None,
    inputs: Sequence[Example] = (),
    progress: Progress = no_progress,
) -> Verification:
    """Check hashes, weights and experts and, with `checkpoint` and `data`, measure the fidelity.

    Args:
        folder: A portable bundle, by whose gates it is judged.
        checkpoint: What it was made from.
        data: What both are asked.
        beside: Makes other runtimes to measure, one after the other.
        record: Whether what was measured is kept in the manifest, also where a gate fails; None:
            where the bundle is the user's own (`keep_record`).
        inputs: Questions whose answers the bundle carries from then on, where the record is written
            into it: never a user's own.
        progress: Told of `(step, done, total)`.

    Returns:
        What was found; a failed gate is no exception, see `Verification.error`.

    Raises:
        ModelError: The bundle is damaged, or was made from another checkpoint.
        InputError: The data cannot be used.
        ResourceError: The manifest was to be written and cannot be.
    """
    progress("hashes", 0, 1)
    bundle = Bundle.open(folder)
    if bundle.target.is_engine:
        raise BundleError(
            f"{folder} is whole, and no more can be told: it holds engines for {bundle.target}.",
            "Verify the portable bundle that it was made from, whose weights they hold.",
        )
    if checkpoint is None or data is None:
        weights, faults = compare_weights(bundle), _unsound_weights(bundle, progress)
        if not any(name.endswith(".scale") for name in faults):  # no runtime would load it
            faults += _unsound_experts(OrtRuntime(bundle), progress)
        return Verification(bundle, faults, read_record(bundle), weights=weights)
    gates, data_sha256 = bundle.gates, data.sha256()
    carried = inputs if record is not False else ()
    known = set(carried) <= set(data.examples)
    asked = [data] if known else [data, Data("inputs", carried)]
    reference, *of_inputs = _reference(bundle, checkpoint, asked, progress)
    if carried and known:  # nothing is asked twice
        of_inputs = [reference.about(carried)]
    weights, faults = compare_weights(bundle), _unsound_weights(bundle, progress)
    runtime = OrtRuntime(bundle)
    faults += _unsound_experts(runtime, progress)
    fidelity = compare(reference, runtime, progress=partial(progress, "the bundle"))
    packed = _packed(bundle, of_inputs[0], runtime) if of_inputs else None
    results = [*judge_weights(weights), *judge(fidelity, gates, faults)]
    mutations = _mutations(runtime, data, results, fidelity, progress)
    del runtime
    others = {
        name: compare(reference, made(), progress=partial(progress, name))
        for name, made in (beside or {}).items()
    }
    source = Source(data.name, data_sha256)
    found = new_record(bundle, source, results, faults, fidelity, mutations)
    bundle, recorded = keep_record(bundle, found, record, packed)
    return Verification(bundle, faults, found, others, recorded, weights)


def _mutations(
    runtime: OrtRuntime,
    data: Data,
    results: Sequence[GateResult],
    fidelity: Fidelity,
    progress: Progress,
) -> Mutations | None:
    """What damage its answers would tell: measured once, and not of a bundle that fails anyway."""
    known = read_mutations(runtime.bundle)
    if known is not None or outcome_of(results) == "failed":
        return known
    limit = max(KL_ROOM * fidelity.overall.kl.mean, KL_LEAST)
    told = partial(progress, "damaged models")
    return measure_mutations(runtime, data.examples, data.load, limit, told)


def _unsound_weights(bundle: Bundle, progress: Progress) -> list[str]:
    """Asked first: an engine that rounds activations may turn a NaN into some number."""
    progress("weights", 0, 1)
    return sweep_weights(bundle)


def _unsound_experts(runtime: OrtRuntime, progress: Progress) -> list[str]:
    progress("experts", 0, 1)
    return sweep_experts(runtime)


def _packed(bundle: Bundle, recording: Recording, runtime: Runtime) -> Recorded:
    """What travels with a bundle; how far it is from its checkpoint here bounds it elsewhere."""
    about, arrays = pack_recording(recording, kl_limit=0.0)
    made = Recorded(signature_of(bundle), about, arrays)
    kl = compare(unpack_recording(bundle, made)[0], runtime).overall.kl.mean
    limit = max(KL_ROOM * kl, KL_LEAST)
    return replace(made, about={**about, "limits": {"kl": limit}})


def _reference(
    bundle: Bundle,
    folder: "Path | Checkpoint",
    asked: Sequence[Data],
    progress: Progress,
) -> list[Recording]:
    """What the checkpoint says to each set, with the experts and image tokens that the bundle has.

    To the first, which is the proof, also with all its own image tokens, where the bundle has
    fewer. It is out of memory again when the bundle is opened.
    """
    with needs("export"):
        from medmoe_edge.checkpoint.reader import as_checkpoint, cut_like, with_all_tokens
        from medmoe_edge.runtimes.torch.eager import EagerRuntime
    checkpoint = cut_like(as_checkpoint(folder), bundle.config)
    source = bundle.manifest["source"]
    if not isinstance(source, Mapping) or source.get("checkpoint_sha256") != checkpoint.sha256():
        raise ModelError(
            f"{bundle.folder} was not made from the checkpoint {checkpoint.folder}.",
            "Give the checkpoint it was exported from, or export this one.",
        )
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    runtime = EagerRuntime(checkpoint)
    recordings = [
        record(
            runtime,
            tokenizer,
            some.examples,
            load=some.load,
            tokens=some.tokens,
            progress=partial(progress, "the checkpoint"),
        )
        for some in asked
    ]
    full = with_all_tokens(checkpoint)
    if full is not None:
        del runtime  # one decoder in memory at a time
        whole = record(
            EagerRuntime(full),
            tokenizer,
            asked[0].examples,
            load=asked[0].load,
            progress=partial(progress, "the checkpoint, with all image tokens"),
        )
        recordings[0] = replace(recordings[0], whole=whole)
    moe = bundle.config.moe
    if moe is None or not moe.merged:
        return recordings
    # What merging changes is measured, too: the reference has its experts apart.
    return [replace(recording, config=bundle.config) for recording in recordings]
