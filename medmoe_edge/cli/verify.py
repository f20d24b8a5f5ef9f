"""The verbs that prove: `verify`, `eval` and `inspect` of models, `audit` of what was answered."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medmoe_edge.bundle.bundle import MANIFEST, sign_bundle
from medmoe_edge.bundle.trust import SIGNATURE, read_private_key, vouch_for
from medmoe_edge.cli.common import (
    AllowRepetition,
    BundleArgument,
    Device,
    Force,
    Json,
    Runtime,
    Sign,
    VisionTower,
    app,
    complete_data,
    complete_models,
    file_option,
    tell,
    verb,
)
from medmoe_edge.embedded import bundle_path, checkpoint_path, is_installed
from medmoe_edge.errors import InputError, MedMoEError, VerificationError, needs
from medmoe_edge.families import AnswerScores, family_of, score_file
from medmoe_edge.pipeline import EvaluateOptions, VerifyOptions, check_output
from medmoe_edge.render import console as render
from medmoe_edge.render import contrastive as render_contrastive
from medmoe_edge.render import verification as render_verification

if TYPE_CHECKING:
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
        file_option(
            "Questions: our JSONL or a LLaVA-style list. For a modality-moe the folder of "
            "labels.jsonl, vqa_val.jsonl and slake_boxes.json.",
            "FILE|DIR",
        ),
    ] = None,
    labels: Annotated[
        Path | None, file_option("Labelled images; those to train on are left out.")
    ] = None,
    predictions: Annotated[
        Path | None,
        file_option(
            "Where to write every answer; with --references the answers to score.", "FILE.jsonl"
        ),
    ] = None,
    references: Annotated[
        Path | None,
        file_option(
            "Score the answers of --predictions (ours, or the official question_id and text) "
            "against these questions, with no model."
        ),
    ] = None,
    blind: Annotated[
        bool,
        typer.Option("--blind", help="Ask everything about a black picture too, for comparison."),
    ] = False,
    findings: Annotated[
        Path | None,
        file_option(
            "Images with what is present and absent, and pictures that are no scans: how well "
            "each finding is seen. Those to train on are left out.",
            "FILE.jsonl",
        ),
    ] = None,
    languages: Annotated[
        Path | None,
        file_option(
            "Questions in several languages: answered as in English, or marked as unsure?",
            "FILE.json",
        ),
    ] = None,
    paraphrases: Annotated[
        Path | None,
        file_option("The questions of --data in other words: what do they cost?", "FILE.json"),
    ] = None,
    fit_confidence: Annotated[
        bool,
        typer.Option(
            "--fit-confidence",
            help="Keep in the bundle how often its answers are right: confidence is then that "
            "chance, and what is likely wrong is marked as unsure.",
        ),
    ] = False,
    selective_accuracy: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="How many of the answers that are not unsure should be right, from 0 to 1.",
            show_default="what being unsure of 22% gives",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Ask so many questions, drawn by --seed.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what --limit draws.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=2048, help="Longest answer; the papers' runs allow 2048.")
    ] = 32,
    allow_repetition: AllowRepetition = False,
    runtime: Runtime = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score a model's answers with the papers' metrics and exact match.

    The papers' open recall is printed as the official scorer computes it, beside ours, which counts
    no repeated word twice. Of a modality-moe: how it routes, classifies, retrieves and locates.

    --fit-confidence writes into the bundle; verifying it again later leaves that as it is.
    """
    found: AnswerScores | ModalityEvaluation
    if references is not None:
        unused = (
            *(bundle, data, labels, blind, runtime != "auto", device != "auto", force),
            *(findings, languages, paraphrases, fit_confidence, selective_accuracy),
            *(allow_repetition, max_new_tokens != EvaluateOptions.max_new_tokens),
        )
        found = _score_file(predictions, references, limit, seed, others=any(unused))
    elif data is None and labels is None and findings is None:
        raise InputError(
            "Neither --data nor --references was given.", "See: medmoe-edge eval --help"
        )
    else:
        model = bundle or "nano"
        family = family_of(model)
        options = EvaluateOptions(
            *(data, labels, predictions, runtime, device, blind, limit, seed, max_new_tokens),
            *(findings, languages, paraphrases, fit_confidence, selective_accuracy),
            allow_repetition,
        )
        if predictions:
            about = (data, labels, findings, languages, paraphrases)
            check_output(predictions, force, Path(model), around=about)
        with render.working("Loading") as report:
            found = family.evaluate(model, options, report)
    tell(found, as_json, _show_scores)


def _show_scores(found: "AnswerScores | ModalityEvaluation") -> None:
    if isinstance(found, AnswerScores):
        render.show_evaluation(found)
        render_verification.show_seen(found)
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
    bundle: BundleArgument = "nano",
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
        mixed = bool(against or beside or report or vision_tower) or record is not None
        _verify_targets(bundle, data or "builtin", as_json, others=mixed)
        return
    if against is None and data:
        raise InputError(
            "--data, --beside and --vision-tower are to measure against a checkpoint.",
            "Add --against CHECKPOINT.",
        )
    checkpoint = None if against is None else checkpoint_path(against)
    if sign is not None and against is not None and record is None:
        record = True
    options = VerifyOptions(
        *(checkpoint, data or "builtin", beside or [], report, vision_tower, record),
        signing=sign is not None,
    )
    folder = bundle_path(bundle)
    if report is not None:
        check_output(report, force, folder, around=(data,))
    with render.working("Reading") as progress:
        found = family_of(folder).verify(folder, options, progress)

    def show(found: "Verification") -> None:
        render_verification.show_verification(found)
        if report:
            render.wrote("the report", report)

    error: MedMoEError | None = found.error()
    if sign is not None and error is None:
        try:
            sign_bundle(folder, sign, found.bundle.sha256)
        except MedMoEError as failed:  # which is told beside what was found
            error = failed
    tell(found, as_json, show, error)
    if sign is not None:
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
    tell(found, as_json, render_verification.show_quick, found.error())


def _verify_targets(bundle: str, data: str, as_json: bool, *, others: bool) -> None:
    if others:
        raise InputError(
            "--targets holds a bundle's targets against each other.",
            "Leave --against, --beside, --report, --record and --vision-tower out.",
        )
    with needs("rtx"):
        from medmoe_edge.pipeline.med_moe import agree
    with render.working("Reading") as progress:
        found = agree(bundle_path(bundle), data, progress=progress)
    told = {"bundle": bundle, "targets": [target.to_json() for target in found]}
    tell(told, as_json, lambda _: render_verification.show_agreement(found))


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
        tell(changes, as_json, render_verification.show_changes)
        return
    found = family_of(folder).inspect(folder, vision_tower)
    if isinstance(found, Inspection):
        tell(found, as_json, render.show_inspection, found.error())
    else:
        tell(found, as_json, render_contrastive.show_modality_inspection, found.error())


audit = typer.Typer(no_args_is_help=True)
app.add_typer(
    audit,
    name="audit",
    rich_help_panel="Deploy",
    help="Verify an audit log or send it on; take the patient out of a DICOM file.",
    epilog="Example: medmoe-edge audit verify audit.jsonl",
)
EXAMPLE = "Example: medmoe-edge audit {}"
AuditLogArgument = Annotated[Path, typer.Argument(metavar="LOG", help="An audit log.")]


@audit.command("verify", epilog=EXAMPLE.format("verify audit.jsonl"))
def verify_log(
    log: AuditLogArgument,
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="A recorded head, to see that no end was cut off."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell whether every line of an audit log is as it was written."""
    from medmoe_edge.bedside.audit import log as chain

    report = chain.verify_log(log, head)
    error = None
    if not report.intact:
        error = VerificationError(
            f"The audit log is not intact ({report.fault}).",
            "The next entry cuts an unfinished line off."
            if report.fault == "torn"
            else "Keep it as it is, and find out who could write it.",
        )

    def show(report: chain.AuditReport) -> None:
        render.show(report.why, "green" if report.intact else "bold red")
        render.show(f"{report.entries:,} entries, head {report.head}")

    tell(report, as_json, show, error)


@audit.command("ship", epilog=EXAMPLE.format("ship audit.jsonl --to logs.example:6514"))
def ship_log(
    log: AuditLogArgument,
    to: Annotated[str, typer.Option(metavar="HOST:PORT", help="A collector of syslog over TLS.")],
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="PEM of its authority.", show_default="this machine's own"
        ),
    ] = None,
    tls_cert: Annotated[Path | None, file_option("PEM of ours, if it wants one.")] = None,
    tls_key: Annotated[Path | None, file_option("PEM.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for further entries.")] = False,
    as_json: Json = False,
) -> None:
    """Send an audit log to a collector, from where the last run ended."""
    with needs("serve"):
        from medmoe_edge.bedside.audit.log import Collector, ship

    files = {"authority": tls_ca, "certificate": tls_cert, "key": tls_key}
    sent = ship(log, Collector.at(to, **files), follow=follow)
    tell({"sent": sent}, as_json, f"{sent:,} entries were sent.")


@audit.command("deidentify", epilog=EXAMPLE.format("deidentify scan.dcm -o example.dcm"))
def deidentify(
    source: Annotated[Path, typer.Argument(metavar="DICOM", help="A DICOM file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    allow_burned_in: Annotated[
        bool, typer.Option("--allow-burned-in", help="Also where the picture shows text.")
    ] = False,
    secret: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Random bytes that nobody else has, the same for a whole study: without them, who "
            "has the original UIDs can tell which became which.",
            show_default="none",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a DICOM image without what identifies its patient (PS3.15, Basic Profile)."""
    check_output(output, force, source, secret)
    with needs("listen"):
        from medmoe_edge.bedside.audit import deidentify as example
    key = secret.read_bytes() if secret else b""
    if secret and not key:
        raise InputError(f"{secret} is empty.", "Make one: openssl rand -out secret 32")
    is_removed = example.deidentify(source, output, allow_burned_in=allow_burned_in, secret=key)
    render.wrote("the example", output)
    if not is_removed:
        what = "Its picture may show text, and was not looked at: the file does not claim that its "
        render.show(f"{what}patient is removed.", "yellow", stderr=True)
