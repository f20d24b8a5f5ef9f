"""The verbs that prove: `verify`, `eval` and `inspect`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medmoe_edge.bundle.bundle import MANIFEST, sign_bundle
from medmoe_edge.bundle.signature import SIGNATURE, is_signed, read_private_key, vouch_for
from medmoe_edge.cli.common import (
    Device,
    Force,
    Json,
    Runtime,
    Sign,
    VisionTower,
    check_output,
    complete_data,
    complete_models,
    verb,
)
from medmoe_edge.embedded import bundle_path, checkpoint_path, is_installed
from medmoe_edge.errors import InputError, needs
from medmoe_edge.families import (
    AnswerScores,
    EvaluateOptions,
    VerifyOptions,
    family_of,
    score_file,
)
from medmoe_edge.render import console as render
from medmoe_edge.render import contrastive as render_contrastive
from medmoe_edge.render import verification as render_verification

if TYPE_CHECKING:
    from collections.abc import Callable

    from medmoe_edge.contrastive.evaluate import ModalityEvaluation
    from medmoe_edge.evaluation.verify import Verification


@verb("eval", "Prove", "eval --data slake/test.jsonl --blind")
def evaluate(
    bundle: Annotated[
        str | None,
        typer.Argument(
            metavar="BUNDLE",
            help="A bundle, a checkpoint or an embedded model.",
            show_default="nano",
            autocompletion=complete_models,
        ),
    ] = None,
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Questions: our JSONL or a LLaVA-style list. For a modality-moe the folder of "
            "labels.jsonl, vqa_val.jsonl and slake_boxes.json.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled images; those to train on are left out."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Where to write every answer; with --references the answers to score.",
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Score the answers of --predictions (ours, or the official question_id and text) "
            "against these questions, with no model.",
        ),
    ] = None,
    blind: Annotated[
        bool,
        typer.Option("--blind", help="Ask everything about a black picture too, for comparison."),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Ask so many questions, drawn by --seed.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what --limit draws.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=2048, help="Longest answer; the papers' runs allow 2048.")
    ] = 32,
    runtime: Runtime = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score a model's answers with the papers' metrics and exact match.

    The papers' open recall is printed as the official scorer computes it, beside ours, which counts
    no repeated word twice. Of a modality-moe: how it routes, classifies, retrieves and locates.
    """
    found: AnswerScores | ModalityEvaluation
    if references is not None:
        unused = (bundle, data, labels, blind, runtime != "auto", device != "auto", force)
        found = _score_file(predictions, references, limit, seed, others=any(unused))
    elif data is None and labels is None:
        raise InputError(
            "Neither --data nor --references was given.", "See: medmoe-edge eval --help"
        )
    else:
        model = bundle or "nano"
        family = family_of(model)
        options = EvaluateOptions(
            *(data, labels, predictions, runtime, device, blind, limit, seed, max_new_tokens)
        )
        if predictions:
            check_output(predictions, force)
        with render.working("Loading") as report:
            found = family.evaluate(model, options, report)
    if as_json:
        render.as_json(found.to_json())
    elif isinstance(found, AnswerScores):
        render.show_evaluation(found)
    else:
        render_contrastive.show_modality_evaluation(found)


def _score_file(
    predictions: Path | None, references: Path, limit: int | None, seed: int, *, others: bool
) -> AnswerScores:
    if predictions is None:
        raise InputError("There are no answers to score.", "Add --predictions FILE.")
    if others:
        raise InputError(
            "--references scores answers that lie in a file, with no model.",
            "Give --predictions, --limit and --seed alone.",
        )
    return score_file(predictions, references, limit=limit, seed=seed)


@verb("verify", "Prove", "verify nano --against nano --data builtin")
def verify(
    bundle: Annotated[
        str,
        typer.Argument(metavar="BUNDLE", help="A bundle or nano.", autocompletion=complete_models),
    ] = "nano",
    *,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="What it was exported from: measures with DATA.",
            autocompletion=complete_models,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Questions: a JSONL file, a folder of images, builtin.",
            show_default="builtin",
            autocompletion=complete_data,
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OTHER",
            help="Measured too, for comparison: another bundle, bitsandbytes-nf4 or -int8.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="A page with plots.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Instead: prove it on this machine by what travels with it, in under a minute.",
        ),
    ] = False,
    record: Annotated[
        bool | None,
        typer.Option(
            "--record/--no-record",
            help="Keep the record in the bundle, with inputs for --quick.",
            show_default="yes, but never in an installation",
        ),
    ] = None,
    targets: Annotated[
        Literal["all-available"] | None,
        typer.Option(help="Instead: do the graphs of every target compute the same on DATA?"),
    ] = None,
    vision_tower: VisionTower = None,
    sign: Sign = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Check a bundle; with --against, measure what quantisation cost and record it in the bundle.

    A failed gate ends with exit code 4 and leaves the bundle marked: asking it warns. A bundle that
    was verified on another kind of machine is proven here with --quick. With --sign it is signed
    once nothing failed, after the record was written.
    """
    if sign is not None:
        _check_signing(bundle, sign, alone=not quick and targets is None)
    if quick:
        others = (against, data, beside, report, targets, record, vision_tower)
        _verify_quick(bundle, as_json, others=any(other is not None for other in others))
        return
    if targets is not None:
        mixed = bool(against or beside or report)
        _verify_targets(bundle, data or "builtin", as_json, others=mixed)
        return
    if against is None and (data or beside):
        raise InputError(
            "--data and --beside measure against a checkpoint.", "Add --against CHECKPOINT."
        )
    if against is None and record:
        raise InputError("There is nothing to record.", "Add --against CHECKPOINT.")
    folder = bundle_path(bundle)
    if record and sign is None and is_signed(folder):
        raise InputError(
            f"{folder} is signed: with a new record in it, its signature would not hold.",
            "Sign it again with --sign KEY, or give --no-record.",
        )
    if sign is not None and against is not None and record is None:
        record = True
    family = family_of(folder)
    write_report = _report_writer(report, force)
    with render.working("Reading") as progress:
        checkpoint = None if against is None else checkpoint_path(against)
        options = VerifyOptions(
            checkpoint, data or "builtin", beside or [], report, vision_tower, record
        )
        found = family.verify(folder, options, progress)
    write_report(found)
    if as_json:
        render.as_json(found.to_json(), found.error())
    else:
        render_verification.show_verification(found)
        if report:
            render.wrote("the report", report)
    if error := found.error():
        raise error
    if sign is not None:
        sign_bundle(folder, sign)
        render.show(f"Signed: {folder / SIGNATURE}", stderr=True)


def _check_signing(bundle: str, key: Path, *, alone: bool) -> None:
    """Refuse what cannot be signed before the work, and let it be opened by who signs it."""
    if not alone:
        raise InputError(
            "--quick and --targets prove a bundle that stays as it is.", "Leave --sign out."
        )
    folder = bundle_path(bundle)
    if is_installed(folder):
        raise InputError(
            f"{bundle} is part of an installation, which is not written to.",
            f"Sign a copy: cp -r {folder} my-{bundle}",
        )
    read_private_key(key)
    if (folder / MANIFEST).exists():
        vouch_for((folder / MANIFEST).read_bytes())


def _verify_quick(bundle: str, as_json: bool, *, others: bool) -> None:
    from medmoe_edge.evaluation.quick import verify_quick

    if others:
        raise InputError(
            "--quick proves a bundle by what travels with it.", "Leave the other options out."
        )
    with render.working("Reading") as progress:
        found = verify_quick(bundle_path(bundle), progress=progress)
    if as_json:
        render.as_json(found.to_json(), found.error())
    else:
        render_verification.show_quick(found)
    if error := found.error():
        raise error


def _verify_targets(bundle: str, data: str, as_json: bool, *, others: bool) -> None:
    if others:
        raise InputError(
            "--targets holds a bundle's targets against each other.",
            "Leave --against, --beside and --report out.",
        )
    with needs("rtx"):
        from medmoe_edge.pipeline.targets import agree
    with render.working("Reading") as progress:
        found = agree(bundle_path(bundle), data, progress=progress)
    if as_json:
        render.as_json({"bundle": bundle, "targets": [target.to_json() for target in found]})
    else:
        render_verification.show_agreement(found)


def _report_writer(path: Path | None, force: bool) -> "Callable[[Verification], None]":
    """Looks at once for what the page needs; writes nothing without a path."""
    if path is None:
        return lambda _: None
    check_output(path, force)
    from medmoe_edge.evaluation.report import write_report

    return partial(write_report, path=path)


@verb("inspect", "Prove", "inspect nano")
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A bundle, a checkpoint or an embedded model.",
            autocompletion=complete_models,
        ),
    ] = "nano",
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="OTHER",
            help="Another bundle: show what changed from MODEL to it.",
            show_default="nothing is compared",
            autocompletion=complete_models,
        ),
    ] = None,
    *,
    vision_tower: VisionTower = None,
    as_json: Json = False,
) -> None:
    """Show what is in a checkpoint or bundle: structure, parameters, sizes.

    Of two bundles, a change record: what differs in weights, precision, gates, thresholds, figures
    of their verifications, and in the answers of their checkpoints to the questions they carry.
    """
    from medmoe_edge.evaluation.inspection import Inspection, compare_bundles

    folder = bundle_path(model)
    if other is not None:
        if vision_tower is not None:
            raise InputError("A vision tower is of a checkpoint.", "Leave --vision-tower out.")
        changes = compare_bundles(folder, bundle_path(other))
        if as_json:
            render.as_json(changes.to_json())
        else:
            render_verification.show_changes(changes)
        return
    found = family_of(folder).inspect(folder, vision_tower)
    if as_json:
        render.as_json(found.to_json())
    elif isinstance(found, Inspection):
        render.show_inspection(found)
    else:
        render_contrastive.show_modality_inspection(found)
