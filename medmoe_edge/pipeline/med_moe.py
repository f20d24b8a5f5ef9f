"""From a checkpoint to a bundle that carries its proof, and on to other targets.

Each begins with what can be refused at once, for the work may take an hour.
"""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image as Picture

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.atomic import atomic_folder, check_target, writing
from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.bundle.trust import is_signed
from medmoe_edge.calibration.collect import Pictures
from medmoe_edge.calibration.coverage import check_covered
from medmoe_edge.calibration.data import BUILTIN, CalibrationData, Sample, Skipped, read_calibration
from medmoe_edge.calibration.quantisers import read_deltas
from medmoe_edge.calibration.run import calibrate
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint.reader import (
    Checkpoint,
    cut_checkpoint,
    cut_like,
    read_checkpoint,
    with_tokens,
)
from medmoe_edge.data.datasets import Example
from medmoe_edge.embedded import EMBEDDED, bundle_path, is_installed
from medmoe_edge.errors import InputError, MissingDependencyError, ModelError, ResourceError
from medmoe_edge.evaluation import verify as verification
from medmoe_edge.evaluation.record import may_record
from medmoe_edge.evaluation.recording import QUESTIONS
from medmoe_edge.evaluation.targets import Agreement, agree_on_targets
from medmoe_edge.evaluation.verify import Data, Verification
from medmoe_edge.export.build import BuildOptions, check_exportable, write_bundle
from medmoe_edge.image.pixels import Image
from medmoe_edge.pipeline import (
    CalibrateOptions,
    ExportOptions,
    VerifyOptions,
    collector_paused,
)
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

logger = logging.getLogger(__name__)


def as_examples(samples: Iterable[Sample], folder: Path) -> Iterator[Example]:
    """Samples as the questions that verification reads; parts of files are written to `folder`."""
    cut: dict[object, Path] = {}
    for sample in samples:
        image = sample.image
        if sample.frame is not None or sample.field is not None:
            image = cut.setdefault(sample.picture, folder / f"{len(cut)}.png")
            if not image.exists():
                Picture.fromarray(sample.load().pixels).save(image)
        yield Example(
            id=sample.id,
            image=image,
            question=sample.question,
            answer=sample.answer,
            answer_type=sample.answer_type,
            modality=sample.modality,
            body=None,
            content=None,
            source="calibration",
        )


def recorded_inputs(folder: Path) -> list[Example]:
    """The questions whose answers a bundle carries, for `verify --quick`.

    They are about public pictures of installed packages: a user's own may be of patients.

    Args:
        folder: Parts of picture files are written here.

    Returns:
        None where those packages are absent.
    """
    folder.mkdir(exist_ok=True)
    return list(as_examples(_public(), folder))


def as_asked(inputs: Iterable[Example], asked: Iterable[Example]) -> list[Example]:
    """Inputs as they are `asked` of the same data, where they are: under the same image's path."""
    nowhere = Path()
    known = {dataclasses.replace(example, image=nowhere): example for example in asked}
    return [known.get(dataclasses.replace(one, image=nowhere), one) for one in inputs]


def recorded_pictures() -> list[Callable[[], Image]]:
    """The pictures of those questions, each loaded when it is called."""
    return [sample.load for sample in {sample.picture: sample for sample in _public()}.values()]


def _public() -> list[Sample]:
    try:
        return read_calibration(BUILTIN).draw(QUESTIONS)
    except MissingDependencyError as error:
        logger.warning("The bundle will not carry inputs for a quick verification: %s", error.what)
        return []


PROOF_SAMPLES = 300  # to verify on; fewer where there are no more
FEWEST_HELD_OUT = 100  # else the proof is on all samples, those of the calibration included

BASELINES: dict[str, Literal["nf4", "int8"]] = {
    "bitsandbytes-nf4": "nf4",
    "bitsandbytes-int8": "int8",
}


@dataclasses.dataclass(frozen=True)
class Export:
    """A new bundle.

    Attributes:
        bundle: Its folder.
        verification: None where no data was given to verify it on.
    """

    bundle: Path
    verification: Verification | None


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What a calibration gave.

    Attributes:
        statistics: What was gathered.
        expert_names: The modality that each expert serves.
        skipped: The images that could not be read.
    """

    statistics: Statistics
    expert_names: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def calibrate_on(
    checkpoint: Path,
    out: Path,
    options: CalibrateOptions,
    progress: Progress = no_progress,
) -> Calibrated:
    """Gather the statistics of a checkpoint.

    Args:
        checkpoint: Its folder.
        out: The file of statistics.
        options: On what.
        progress: Told of every step.

    Raises:
        MedMoEError: As of `calibration.run.calibrate`.
    """
    model = read_checkpoint(checkpoint, vision_tower=options.vision_tower)
    data = _data_for(model, options.data)
    statistics = calibrate(
        model,
        data,
        out,
        samples=options.samples,
        hessians=options.hessians,
        strict=options.strict,
        force=options.force,
        progress=progress,
    )
    return Calibrated(statistics, _modalities(model), tuple(data.skipped))


def export(
    checkpoint: Path,
    out: Path,
    options: ExportOptions,
    progress: Progress = no_progress,
) -> Export:
    """Export a checkpoint; calibrated and verified where `options.calibrate_on` names data.

    The checkpoint is opened once, for all steps.

    Args:
        checkpoint: The folder of a checkpoint.
        out: The bundle's folder.
        options: How; all but `as_published`.
        progress: Told of every step.

    Returns:
        The bundle and its verification.

    Raises:
        VerificationError: A gate failed, and there is no bundle.
        ModelError: The checkpoint cannot be used.
        InputError: The options or the data cannot be used.
        ResourceError: The disk is full.
    """
    check_target(out, force=options.force, marker=MANIFEST)
    _check_options(options)
    with collector_paused():  # shapes of an EfficientNet are PyTorch's to tell, which imports more
        source = read_checkpoint(checkpoint, vision_tower=options.vision_tower)
    if options.modalities:
        source = cut_checkpoint(source, options.modalities, merge=options.merge)
    if options.image_tokens is not None:
        source = with_tokens(source, options.image_tokens)
    for notice in source.warnings:
        logger.warning("%s", notice.message)
    build = BuildOptions(
        options.precision,
        options.method,
        options.budget_bits,
        options.group,
        options.name,
        None if options.experts is None else read_deltas(options.experts),
        options.vision,
    )
    calibrated = options.calibrate_on is not None or options.stats is not None
    check_exportable(source, build, calibrated=calibrated)
    if options.calibrate_on is not None:
        made = _export_verified(source, out, build, options, options.calibrate_on, progress)
    else:
        statistics = Statistics.open(options.stats) if options.stats else None
        if statistics is not None and options.strict:
            check_covered(statistics.coverage, _modalities(source))
        staged = atomic_folder(out, force=options.force, marker=MANIFEST)
        with collector_paused(), staged as staging:
            write_bundle(source, staging, build, statistics=statistics, progress=progress)
        made = Export(out, None)
    progress("done", 1, 1)
    return made


def _check_options(options: ExportOptions) -> None:
    """Raise `InputError` for options that exclude each other."""
    if options.calibrate_on is not None and options.stats is not None:
        raise InputError("Both data and statistics were given.", "Give one of the two.")
    if options.strict and options.calibrate_on is None and options.stats is None:
        raise InputError(
            "What experts are reached is told by a calibration, and none was given.",
            "Add --calibrate DATA or --stats FILE, or leave --strict out.",
        )
    if options.merge and not options.modalities:
        raise InputError("What is to be merged?", "Name its modality: --modality xray --merge.")
    if options.merge and options.experts is not None:
        raise InputError(
            "A merged expert is no delta: it is one feed-forward with the meta expert.",
            "Leave --merge or --experts out.",
        )
    left_out = "experts" if options.modalities else "image tokens" if options.image_tokens else ""
    if left_out and options.stats is not None:
        raise InputError(
            f"The statistics are those of the whole model, and {left_out} are to be left out.",
            "Calibrate what is left: --calibrate DATA in place of --stats.",
        )


def _export_verified(
    source: Checkpoint,
    out: Path,
    build: BuildOptions,
    options: ExportOptions,
    calibrate_on: str | Path,
    progress: Progress,
) -> Export:
    data = _data_for(source, calibrate_on)
    pictures = Pictures(data.load)
    with _work_folder(out) as work:
        statistics = calibrate(
            source,
            data,
            work / "statistics",
            samples=options.samples,
            hessians=options.precision != "fp32" or options.experts is not None,
            strict=options.strict,
            pictures=pictures,
            progress=progress,
        )
        staged = atomic_folder(out, force=options.force, marker=MANIFEST)
        with staged as staging:
            with collector_paused():
                write_bundle(source, staging, build, statistics=statistics, progress=progress)
            proof = proof_data(data, statistics, work, pictures)
            inputs = recorded_inputs(work / "recorded")
            if calibrate_on == BUILTIN:  # the same questions about the same pictures
                inputs = as_asked(inputs, proof.examples)
            found = verification.verify(
                staging, source, proof, record=True, inputs=inputs, progress=progress
            )
            if error := found.error():
                error.found = found
                raise error
    return Export(
        out, dataclasses.replace(found, bundle=dataclasses.replace(found.bundle, folder=out))
    )


def proof_data(
    data: CalibrationData,
    statistics: Statistics,
    folder: Path,
    pictures: Pictures | None = None,
) -> Data:
    """What a bundle with these statistics is verified on; its name says if it is not held out."""
    drawn = set(statistics.source.drawn)
    used = [sample for sample in data.samples if sample.sha256 in drawn]
    chosen, name = data.draw(PROOF_SAMPLES, exclude=used), data.name
    if len(chosen) < FEWEST_HELD_OUT:
        chosen, name = data.draw(PROOF_SAMPLES), f"{name}, on which it was calibrated"
    return _asked(name, data, chosen, folder, pictures)


def _asked(
    name: str,
    data: CalibrationData,
    samples: Sequence[Sample],
    folder: Path,
    pictures: Pictures | None = None,
) -> Data:
    """Samples as what is verified on; what is decoded or encoded already is not so again."""
    examples = list(as_examples(samples, folder))
    of = {example.image: sample for example, sample in zip(examples, samples, strict=True)}
    tokens = (lambda image: pictures.kept(of[image])) if pictures else None
    return Data(name, examples, lambda image: data.load(of[image]), tokens)


def verify(
    bundle: Path, checkpoint: Path, options: VerifyOptions, progress: Progress = no_progress
) -> Verification:
    """Measure a bundle against its checkpoint on every question of `options.data`.

    Args:
        bundle: The folder of a portable bundle.
        checkpoint: The folder of the checkpoint it was made from.
        options: On what, beside what, and whether the record is kept.
        progress: Told of every step.

    Raises:
        ModelError: As `evaluation.verify` says.
        InputError: The data cannot be used, or `check_recordable` refuses the record.
        ResourceError: The record cannot be written.
    """
    check_recordable(bundle, options)
    carries = options.record or (options.record is None and may_record(bundle))
    read = read_checkpoint(checkpoint, vision_tower=options.vision_tower)
    model = cut_like(read, Bundle.open(bundle, verify=False).config)
    others = {_label(name): _peer(name, model) for name in options.beside}
    data = _data_for(model, options.data)
    with tempfile.TemporaryDirectory() as folder:
        samples = data.draw(len(data.samples))
        return verification.verify(
            bundle,
            model,
            _asked(data.name, data, samples, Path(folder)),
            beside=others,
            record=options.record,
            inputs=recorded_inputs(Path(folder, "recorded")) if carries else (),
            progress=progress,
        )


def _data_for(checkpoint: Checkpoint, source: str | Path) -> CalibrationData:
    """Of a checkpoint that was cut, samples of modalities that were left out are none."""
    moe, vision = checkpoint.config.moe, checkpoint.config.vision
    data = read_calibration(source, known_modalities=_modalities(checkpoint), vision=vision)
    if moe is None or not moe.left_out:
        return data
    kept = tuple(sample for sample in data.samples if sample.modality not in moe.left_out)
    name = f"{data.name}, {' and '.join(moe.expert_names)} alone"
    return dataclasses.replace(data, samples=kept, name=name)


def _modalities(checkpoint: Checkpoint) -> tuple[str, ...]:
    return checkpoint.config.moe.expert_names if checkpoint.config.moe else ()


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, whose disk has room, for what calibration keeps meanwhile."""
    with writing(out):
        parent = out.resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}.")
    with folder as name:
        yield Path(name)


def check_recordable(bundle: Path, options: VerifyOptions) -> None:
    """Raise `InputError` where a record is wanted in a bundle that is installed, or signed.

    Raises `ResourceError` where one is wanted and the folder cannot be written.
    """
    if not options.record:
        return
    if is_signed(bundle) and not options.signing:
        raise InputError(
            f"{bundle} is signed: with a new record in it, its signature would not hold.",
            "Sign it again with --sign KEY, or give --no-record.",
        )
    if is_installed(bundle):
        raise InputError(
            f"{bundle} is part of an installation, whose files are not changed.",
            "Leave --record out, or verify a copy of the bundle.",
        )
    try:
        with tempfile.TemporaryFile(dir=bundle):
            pass
    except OSError as error:
        raise ResourceError(
            f"{bundle} cannot be written ({error.strerror}), and the record was to be kept in it.",
            "Leave --record out, or verify a copy of the bundle.",
        ) from error


def _label(name: str) -> str:
    return name if name in BASELINES or name in EMBEDDED else Path(name).resolve().name


def _peer(name: str, checkpoint: Checkpoint) -> Callable[[], Runtime]:
    """Makes the runtime of another candidate, which is looked for at once."""
    if name in BASELINES:
        from medmoe_edge.runtimes.torch.eager import BitsAndBytesRuntime, bitsandbytes

        bitsandbytes()  # missed at once
        return partial(BitsAndBytesRuntime, checkpoint, BASELINES[name])
    if name not in EMBEDDED and not Path(name).is_dir():
        raise InputError(
            f"There is no {name!r} to measure beside the bundle.",
            f"Give a bundle folder, or one of: {', '.join((*EMBEDDED, *BASELINES))}.",
        )
    bundle = Bundle.open(bundle_path(name))
    if bundle.config != checkpoint.config:
        raise ModelError(
            f"{bundle.folder} is a bundle of another model than {checkpoint.folder}.",
            "Measure bundles of one checkpoint beside each other.",
        )
    return partial(OrtRuntime, bundle)


def agree(bundle: Path, source: str, *, progress: Progress = no_progress) -> list[Agreement]:
    """Hold every target's form of a portable bundle against its specification.

    Args:
        bundle: The folder of a portable bundle.
        source: Names questions, as of `CalibrateOptions.data`.
        progress: Told of every target.

    Raises:
        ModelError: It is a bundle of another target.
    """
    model = Bundle.open(bundle)
    names = model.config.moe.expert_names if model.config.moe else ()
    data = read_calibration(source, known_modalities=names)
    with tempfile.TemporaryDirectory() as folder:
        examples = list(as_examples(data.draw(len(data.samples)), Path(folder)))
        return agree_on_targets(model, examples, progress=progress)
