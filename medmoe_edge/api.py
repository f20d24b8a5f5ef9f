"""The library's functions, one for each step from a checkpoint to answers.

    load           an engine that answers, or one that classifies and locates
    train          a recipe and data in, a checkpoint out
    calibrate      a checkpoint and images in, the statistics that quantisation needs out
    export_model   a checkpoint in, a bundle out that answers without torch
    verify         what did quantisation cost?
    evaluate       how well does a model answer?

What each takes besides is in a frozen options object. (`medmoe_edge.export` is the subpackage that
does the exporting.) Whatever goes wrong is a
`MedMoEError`, which says what was wrong and what to do.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.atomic import check_apart
from medmoe_edge.bundle.bundle import model_kind
from medmoe_edge.bundle.machine import system_error
from medmoe_edge.embedded import EMBEDDED, bundle_path, checkpoint_path
from medmoe_edge.errors import InputError, check_all, checked, needs
from medmoe_edge.families import AnswerScores, check_calibratable, family_of
from medmoe_edge.pipeline import (
    CalibrateOptions,
    EvaluateOptions,
    ExportOptions,
    VerifyOptions,
    check_output,
)

if TYPE_CHECKING:
    from medmoe_edge.config import Device, RuntimeName
    from medmoe_edge.contrastive.engine import ModalityEngine
    from medmoe_edge.contrastive.evaluate import ModalityEvaluation
    from medmoe_edge.engine.engine import Engine
    from medmoe_edge.evaluation.verify import Verification
    from medmoe_edge.pipeline.med_moe import Calibrated, Export
    from medmoe_edge.runtimes.paging.pager import Budget
    from medmoe_edge.training.report import TrainOptions

PathLike = str | os.PathLike[str]
P = ParamSpec("P")
R = TypeVar("R")


def _in_our_words(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, whose every error of the system is a `MedMoEError`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if found := system_error(error):
                raise found from error
            raise

    return call


def _named(model: PathLike, name: str) -> str:
    """An embedded model's name or a folder's, as it was given; raises `InputError`."""
    checked(model, Path, name)
    return os.fspath(model)


@overload
def load(
    model: Literal["nano"] = "nano",
    *,
    runtime: "RuntimeName" = ...,
    device: "Device" = ...,
    memory_budget: "Budget | None" = ...,
    drop_pages: bool = ...,
    prefix_cache: PathLike | None = ...,
    allow_repetition: bool = ...,
) -> "Engine": ...
@overload
def load(
    model: Literal["modality-nano"], *, runtime: "RuntimeName" = ..., device: "Device" = ...
) -> "ModalityEngine": ...
@overload
def load(
    model: PathLike,
    *,
    runtime: "RuntimeName" = ...,
    device: "Device" = ...,
    memory_budget: "Budget | None" = ...,
    drop_pages: bool = ...,
    prefix_cache: PathLike | None = ...,
    allow_repetition: bool = ...,
) -> "Any": ...


@_in_our_words
def load(
    model: PathLike = "nano",
    *,
    runtime: "RuntimeName" = "auto",
    device: "Device" = "auto",
    memory_budget: "Budget | None" = None,
    drop_pages: bool = False,
    prefix_cache: PathLike | None = None,
    allow_repetition: bool = False,
) -> "Engine | ModalityEngine":
    """Load a model: a Med-MoE to ask, a MedMoE to classify and locate.

    A device that a bundle was made for and that is not there is an error, never a silent fall back;
    asking for the CPU is how to allow one. A bundle whose verification failed is loaded with a
    warning.

    Args:
        model: The name of an embedded model ("nano", "modality-nano"), the folder of a bundle, or
            (with torch) the folder of a checkpoint.
        runtime: What runs it. "auto" takes what a bundle was made for, and torch for a checkpoint;
            "torch" runs portable bundles too.
        device: Where ONNX Runtime or torch computes: "cpu", "cuda", or "auto" for what the model
            was made for.
        memory_budget: How much memory routed experts may take: bytes, as "1500MB" or "2GiB", or a
            share of them all, as "50%". The others wait in storage; answers stay the same bits.
            "auto" looks at free memory, that of a container included, and has all of them resident
            where they fit, else as many as do; `Engine.memory` says which.
        drop_pages: With a memory budget, have the kernel forget what it read of experts, so that
            the memory is really free; one that comes back is read from storage again.
        prefix_cache: A folder for what the model makes of images: later questions about the last
            image, and in other processes about any of them, skip that. It is patient data.
        allow_repetition: Let an answer that repeats itself go on, rather than end it there.

    Returns:
        An `Engine`, or of a MedMoE a `ModalityEngine`; both are context managers.

    Raises:
        ModelError: The bundle or checkpoint is incomplete, damaged or of another version.
        ResourceError: Memory (of "auto": it says the least that works), the device, or an optional
            package is missing.
        InputError: The options do not go together, or the budget is too small.
    """
    check_all(
        model=(model, Path),
        drop_pages=(drop_pages, bool),
        allow_repetition=(allow_repetition, bool),
    )
    name = os.fspath(model)
    if _kind(name) != "modality-moe":
        from medmoe_edge.engine.engine import load as load_engine

        return load_engine(
            name,
            runtime=runtime,
            device=device,
            memory_budget=memory_budget,
            drop_pages=drop_pages,
            prefix_cache=prefix_cache,
            allow_repetition=allow_repetition,
        )
    unfit = {
        "memory_budget": memory_budget,
        "drop_pages": drop_pages,
        "prefix_cache": prefix_cache,
        "allow_repetition": allow_repetition,
        "device": device == "cuda",
        "runtime": runtime == "tensorrt",
    }
    if given := next((name for name, value in unfit.items() if value), None):
        raise InputError(f"{given} does not go with a modality-moe model.", "Leave it out.")
    from medmoe_edge.contrastive.engine import load_modality
    from medmoe_edge.engine.loading import check_place

    check_place(runtime, device)
    assert runtime != "tensorrt"
    return load_modality(name, runtime=runtime)


def _kind(name: str) -> str:
    """The family; what is no model at all is left to the engine of Med-MoE, which says so."""
    folder = bundle_path(name) if name in EMBEDDED else Path(name)
    known = any(os.path.exists(folder / file) for file in ("manifest.json", "config.json"))
    return model_kind(folder) if known else "med-moe"


@_in_our_words
def calibrate(
    checkpoint: PathLike,
    out: PathLike,
    options: CalibrateOptions,
    *,
    progress: Progress = no_progress,
) -> "Calibrated":
    """Gather the statistics that quantisation needs; an interrupted run goes on where it was.

    Args:
        checkpoint: The folder of a Med-MoE checkpoint, or "nano".
        out: The file of statistics, for `ExportOptions(stats=...)`.
        options: On which data.
        progress: Told of `(step, done, total)`.

    Returns:
        The statistics, whose `coverage` says what each expert saw and `samples` how many questions
        of each modality there were, and the images that could not be read.

    Raises:
        InputError: The data cannot be used, or `out` exists.
        ModelError: The checkpoint cannot be used.
        VerificationError: With `strict`, an expert was not reached.
        ResourceError: The disk is full, or the extra `export` is not installed.
    """
    folder, file = checkpoint_path(_named(checkpoint, "checkpoint")), checked(out, Path, "out")
    asked: CalibrateOptions = checked(options, CalibrateOptions, "options")
    check_output(file, asked.force, folder, asked.vision_tower, around=(asked.data,))
    check_calibratable(folder)
    with needs("export"):
        from medmoe_edge.pipeline.med_moe import calibrate_on
    return calibrate_on(folder, file, asked, progress)


@_in_our_words
def export_model(
    checkpoint: PathLike,
    out: PathLike,
    options: ExportOptions | None = None,
    *,
    progress: Progress = no_progress,
) -> "Export":
    """Turn a checkpoint into a portable bundle; with data it is verified before it appears.

    Args:
        checkpoint: The folder of a checkpoint of either family, or an embedded model's name.
        out: The bundle's folder.
        options: The precision, int8 by default, and the data to calibrate and prove on.
        progress: Told of `(step, done, total)`.

    Returns:
        The bundle's folder and its verification.

    Raises:
        VerificationError: A gate failed; there is no bundle then.
        InputError: The options or the data cannot be used, or `out` exists.
        ModelError: The checkpoint cannot be used.
        ResourceError: The disk is full, or the extra `export` is not installed.
    """
    chosen = checked(options, ExportOptions | None, "options") or ExportOptions()
    folder, place = checkpoint_path(_named(checkpoint, "checkpoint")), checked(out, Path, "out")
    family = family_of(folder)
    family.check_export(chosen, "onnxruntime")
    check_apart(place, folder, chosen.vision_tower, around=(chosen.calibrate_on, chosen.stats))
    return family.export(folder, place, chosen, progress)


@_in_our_words
def verify(
    bundle: PathLike, options: VerifyOptions | None = None, *, progress: Progress = no_progress
) -> "Verification":
    """Check a bundle; with `VerifyOptions(against=...)`, measure what quantisation cost.

    Args:
        bundle: The folder of a bundle, or an embedded model's name.
        options: The checkpoint to measure against, and the data.
        progress: Told of `(step, done, total)`.

    Returns:
        What was found; its `outcome` is "passed", "not decided", "failed" or "not measured". A
        failed gate is no exception here: see `Verification.error`.

    Raises:
        ModelError: The bundle is damaged, or was made from another checkpoint.
        InputError: The data cannot be used.
        ResourceError: The record cannot be written, or the extra `export` is not installed.
    """
    folder = bundle_path(_named(bundle, "bundle"))
    asked: VerifyOptions = checked(options, VerifyOptions | None, "options") or VerifyOptions()
    if asked.report is not None:
        check_output(asked.report, True, folder, around=(asked.data,))
    return family_of(folder).verify(folder, asked, progress)


@_in_our_words
def evaluate(
    model: PathLike, options: EvaluateOptions, *, progress: Progress = no_progress
) -> "AnswerScores | ModalityEvaluation":
    """Score a model's answers with the papers' metrics and exact match.

    Args:
        model: What `load` takes.
        options: The questions, and how they are asked.
        progress: Told of `(step, done, total)`.

    Returns:
        The figures; of a MedMoE how it routes, classifies, retrieves and locates.

    Raises:
        InputError: The data cannot be used.
        ModelError: The model cannot be used.
        ResourceError: Memory (of "auto": it says the least that works), the device, or an optional
            package is missing.
    """
    name, asked = _named(model, "model"), checked(options, EvaluateOptions, "options")
    if asked.predictions is not None:
        about = (asked.data, asked.labels, asked.findings, asked.languages, asked.paraphrases)
        check_output(asked.predictions, True, Path(name), around=filter(None, about))
    return family_of(name).evaluate(name, asked, progress)


@_in_our_words
def train(
    data: PathLike,
    out: PathLike,
    recipe: PathLike = "nano",
    options: "TrainOptions | None" = None,
) -> Path:
    """Train a model by a recipe, or go on where a run was interrupted.

    Args:
        data: The folder of a dataset, or a file of questions alone.
        out: The run's folder; what it holds of the same run is gone on with.
        recipe: The name of a recipe that ships ("nano", "modality-nano", "fine-tune"), or its file.
        options: A `medmoe_edge.training.report.TrainOptions`: the checkpoint to go on from,
            precision, LoRA.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: The recipe or the data cannot be used.
        ResourceError: The disk is full, or the extra `train` is not installed.
    """
    with needs("train"):
        from medmoe_edge.training.contrastive import (
            is_modality_recipe,
            read_modality_recipe,
            train_modality,
        )
        from medmoe_edge.training.recipe import read_recipe
        from medmoe_edge.training.report import TrainOptions
        from medmoe_edge.training.run import train as train_answers
    from rich.progress import Progress as Bars

    given, run = checked(data, Path, "data"), checked(out, Path, "out")
    by = _named(recipe, "recipe")
    checked(options, TrainOptions | None, "options")
    with Bars(disable=True) as bars:
        if is_modality_recipe(by):
            return train_modality(read_modality_recipe(by), given, run, bars, options)
        return train_answers(read_recipe(by), given, run, bars, options)
