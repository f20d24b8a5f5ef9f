"""The verbs `pull`, `export` and `calibrate`: published weights to a bundle of any target."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from medmoe_edge.atomic import check_apart
from medmoe_edge.bundle.bundle import sign_bundle
from medmoe_edge.bundle.trust import read_private_key
from medmoe_edge.cli.common import (
    Checkpoint,
    Force,
    Json,
    Samples,
    Sign,
    Strict,
    VisionTower,
    complete_data,
    complete_gpus,
    complete_models,
    file_option,
    tell,
    verb,
)
from medmoe_edge.embedded import EMBEDDED, bundle_path, checkpoint_path
from medmoe_edge.errors import InputError, VerificationError, needs, shown_bytes
from medmoe_edge.families import family_of
from medmoe_edge.pipeline import CalibrateOptions, ExportOptions
from medmoe_edge.render import bench as render_bench
from medmoe_edge.render import console as render
from medmoe_edge.render import verification as render_verification

if TYPE_CHECKING:
    from medmoe_edge.config import Precision
    from medmoe_edge.pipeline.med_moe import Export

MB = 10**6


@verb("pull", "Build", "pull med-moe-stablelm-1.6b --dry-run")
def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A published model, or OWNER/REPOSITORY of the Hub, perhaps with /FOLDER.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="The folder.", show_default="NAME's last part"
        ),
    ] = None,
    revision: Annotated[str, typer.Option(help="A branch, a tag or a commit.")] = "main",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be fetched.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fetch published weights, or a bundle, from the Hugging Face Hub.

    All files are those of one commit, compared with the hashes that the Hub states; what broke off
    goes on with the next call. Pickles and code are never fetched. HF_ENDPOINT, HF_TOKEN, HF_HOME
    and HF_HUB_OFFLINE are honoured.
    """
    from medmoe_edge.checkpoint import hub
    from medmoe_edge.checkpoint.published import find_published

    options = hub.PullOptions(revision=revision, force=force)
    out = output or Path(name.rstrip("/").split("/")[-1])
    with needs("hub"), render.working("Asking the Hub") as report:
        if dry_run:
            listing = hub.find_files(find_published(name), options)
        else:
            pulled = hub.pull(name, out, options, progress=report)
    if dry_run:
        found = {file.name: file.size for file in listing.files}
        told = {"repository": listing.source.repository, "path": listing.source.folder}
        told |= {"revision": listing.revision, "commit": listing.commit}
        if as_json:
            render.as_json({**told, "files": found, "bytes": listing.size})
            return
        render.show_table(
            f"{listing.source} at {listing.commit}",
            ["file", "size"],
            [(file, shown_bytes(size)) for file, size in found.items()],
        )
        render.show(f"{listing.size / 1e9:.2f} GB in all")
        return
    told = {"folder": str(out), **pulled.to_json()}
    tell(told, as_json, lambda _: render.wrote(f"{pulled} to", out))


@verb("export", "Build", "export --int8 --calibrate builtin")
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint or nano; with --target a portable bundle too.",
            autocompletion=complete_models,
        ),
    ] = "nano",
    int8: Annotated[bool, typer.Option("--int8", help="W8A8; the default.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="Groups of weights.")] = False,
    group_size: Annotated[
        Literal[32, 64, 128] | None,
        typer.Option(
            help="Of --int4: large ones are faster and smaller, small ones closer to the original.",
            show_default="32",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="delta, delta:rank=R, delta:bits=B or, calibrated, delta:auto=BITS: routed "
            "experts as what they add to the meta expert.",
            show_default="whole",
        ),
    ] = None,
    vision: Annotated[
        Literal["groups", "tokens"],
        typer.Option(
            help="Of a vision transformer in 8 bits, what shares a scale: groups of 32 channels, "
            "or tokens, faster; --calibrate proves it.",
        ),
    ] = "groups",
    mixed: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="So many bits a weight, spent where they matter."),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Not quantised.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images, a question file or builtin: to calibrate on, and to prove the result.",
            autocompletion=complete_data,
        ),
    ] = None,
    stats: Annotated[
        Path | None, file_option("Statistics of: medmoe-edge calibrate; no proof.")
    ] = None,
    samples: Samples = 128,
    strict: Strict = False,
    method: Annotated[
        Literal["auto", "rtn"],
        typer.Option(help="auto: the best that the data allow; rtn: plain rounding."),
    ] = "auto",
    target: Annotated[
        Literal["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"],
        typer.Option(
            metavar="TARGET",
            help="onnxruntime: the portable bundle, any CPU, and all others' source. For GPUs: "
            "onnxruntime-cuda, tensorrt-rtx, tensorrt.",
        ),
    ] = "onnxruntime",
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What an engine is built for: rtx-4090, sm89, orin.",
            autocompletion=complete_gpus,
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp16", "bf16"], typer.Option(help="Of a GPU's activations and cache.")
    ] = "fp16",
    positions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of an engine's cache: image, question and answer.",
            show_default="1024, or the model's",
        ),
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="MB", help="Of an engine's intermediate results."),
    ] = None,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published", help="Of a modality-moe: compute what its authors' code computes."
        ),
    ] = False,
    modality: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Only the experts of these, with commas between them: xray,ct. Answers about "
            "images of others say so.",
            show_default="all",
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="With one --modality: its expert and the meta expert become one."
        ),
    ] = False,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of an image: squares of its features are averaged, so that fewer are read.",
            show_default="all",
        ),
    ] = None,
    paged: Annotated[
        bool,
        typer.Option("--paged", help="For a GPU: keep experts apart, for ask --memory-budget."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="The bundle.",
            show_default="NAME-OPTIONS-PRECISION, or NAME-TARGET-GPU",
        ),
    ] = None,
    vision_tower: VisionTower = None,
    sign: Sign = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle that answers without torch.

    With --calibrate it is verified before it appears: a failed gate leaves no bundle (exit 4). A
    modality-moe model needs no calibration: there DATA are images that prove the result. For
    another target than onnxruntime the weights are those of the portable bundle; TensorRT for RTX
    needs no GPU to build, TensorRT builds on the device itself.
    """
    given = {"int8": int8, "int4": int4, "mixed": mixed is not None, "fp32": fp32}
    chosen = cast("list[Precision]", [name for name, wanted in given.items() if wanted])
    if len(chosen) > 1:
        raise InputError(f"--{' and --'.join(chosen)} exclude each other.", "Give one of them.")
    precision = chosen[0] if chosen else None
    cut = tuple(name.strip().lower() for name in modality.split(",")) if modality else ()
    made_anew = precision or calibrate or stats or cut or merge or image_tokens or experts
    as_it_is = not (made_anew or vision != "groups" or strict or vision_tower or method != "auto")
    folder = _source(model, target, as_it_is=as_it_is)
    if target == "onnxruntime" and (gpu or positions or memory_limit or dtype != "fp16"):
        raise InputError(
            "--gpu, --positions, --memory-limit and --dtype are for GPUs.",
            "Add --target tensorrt-rtx, or leave them out.",
        )
    if paged and experts:
        raise InputError("No GPU pages experts as deltas.", "Leave --experts or --paged out.")
    if sign is not None:
        read_private_key(sign)  # found out before the work
    if target == "onnxruntime" and paged:
        raise InputError(
            "--paged is for GPUs: every portable bundle can be paged.", "Leave it out."
        )
    options = ExportOptions(
        precision=precision or "int8",
        method=method,
        budget_bits=mixed,
        group=group_size,
        experts=experts,
        vision=vision,
        calibrate_on=calibrate,
        samples=samples,
        stats=stats,
        strict=strict,
        name=model if model in EMBEDDED else folder.resolve().name,
        vision_tower=vision_tower,
        as_published=as_published,
        modalities=cut,
        merge=merge,
        image_tokens=image_tokens,
        force=force and target == "onnxruntime",
    )
    family = family_of(folder)
    family.check_export(options, target)
    tokens = f"{image_tokens}-tokens" if image_tokens else ""
    how = (*cut, tokens, options.precision) if target == "onnxruntime" else (target, gpu)
    out = output or Path("-".join(filter(None, (options.name, *how))))
    try:
        check_apart(out, folder, vision_tower, around=(calibrate, stats, sign))
    except InputError as error:
        if output is not None:
            raise
        elsewhere = folder.resolve().parent / out.name
        raise InputError(error.what, f"Name another place: -o {elsewhere}") from error
    with render.working("Reading") as report:
        if target == "onnxruntime":
            try:
                made = family.export(folder, out, options, report)
                verified = made.verification.bundle.sha256 if made.verification else None
            except VerificationError as error:
                _show_failed(error, as_json)
                raise
        else:
            from medmoe_edge.export.gpus import EXTRAS

            with needs("export" if target == "onnxruntime-cuda" else EXTRAS[target]):
                from medmoe_edge.export.targets import TargetOptions, export_for
            limit = memory_limit * MB if memory_limit else None
            asked = TargetOptions(target, gpu, dtype, positions, paged, limit, force)
            portable = partial(family.export, folder, options=options, progress=report)
            built, verified = export_for(folder, out, asked, portable, report), None
        if sign is not None:
            sign_bundle(out, sign, verified)
    if target == "onnxruntime":
        _show_portable(made, options, as_json)
    else:
        tell(built, as_json, render_bench.show_target)


def _show_failed(error: VerificationError, as_json: bool) -> None:
    """What was measured of a bundle that is not kept: which gate failed, and by what."""
    if error.found is None:
        return
    if as_json:
        render.as_json({"bundle": None, "verification": error.found.to_json()}, error)
    else:
        render_verification.show_verification(error.found)


def _show_portable(made: "Export", options: ExportOptions, as_json: bool) -> None:
    if as_json:
        found = made.verification.to_json() if made.verification else None
        bundle = {"name": options.name, "precision": options.precision, "verification": found}
        render.as_json({"bundle": str(made.bundle)} | bundle)
        return
    if made.verification:
        render_verification.show_verification(made.verification)
    render.wrote("the bundle", made.bundle)
    if made.verification is None:
        render_verification.show_not_measured()


def _source(model: str, target: str, *, as_it_is: bool) -> Path:
    """The checkpoint; for another target the portable bundle, where it is to stay `as_it_is`."""
    from medmoe_edge.bundle.bundle import MANIFEST

    folder = bundle_path(model) if target != "onnxruntime" and as_it_is else checkpoint_path(model)
    if (folder / MANIFEST).exists() and not as_it_is:
        raise InputError(
            f"{folder} is a bundle: it was quantised and calibrated when it was made.",
            "Leave --int8, --calibrate and their like out, or give the checkpoint.",
        )
    return folder


@verb("calibrate", "Build", "calibrate nano --data builtin -o nano.stats")
def calibrate(
    checkpoint: Checkpoint = "nano",
    *,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A folder of images, a question file or builtin.",
            autocompletion=complete_data,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="STATS", help="The file.")],
    samples: Samples = 128,
    hessians: Annotated[
        bool, typer.Option(help="Second moments, for GPTQ; much the largest part.")
    ] = True,
    strict: Strict = False,
    vision_tower: VisionTower = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Gather the statistics that quantisation needs; an interrupted run goes on where it was.

    Of images in a folder, DICOM files say their modality, else the folder's name does; where
    neither does, the model's own router reads it, and its shares are told.
    """
    from medmoe_edge.api import calibrate as gather

    options = CalibrateOptions(data, samples, hessians, strict, vision_tower, force)
    with render.working("Reading") as report:
        found = gather(checkpoint, output, options, progress=report)

    def show(_: object) -> None:
        render_verification.show_coverage(found.statistics, found.expert_names, found.skipped)
        render.wrote("the statistics", output)

    tell({"statistics": str(output)} | found.statistics.summary(), as_json, show)
