"""The verb `export`: a checkpoint to a portable bundle, and either to the bundle of a target."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from medmoe_edge.cli import contrastive_build as cli_modality_build
from medmoe_edge.cli.common import Force, Json, Samples, Strict, VisionTower, verb
from medmoe_edge.cli.errors import needs
from medmoe_edge.errors import InputError
from medmoe_edge.render import console as render
from medmoe_edge.render import device as render_deploy
from medmoe_edge.render import verification as render_proof

if TYPE_CHECKING:
    from collections.abc import Callable

    from medmoe_edge.export.plan import Precision
    from medmoe_edge.pipeline import Export
    from medmoe_edge.pipeline_targets import TargetExport

MB = 10**6


@verb("export", "Build", "export --int8 --calibrate builtin")
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint or nano; with --target a portable bundle too."
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
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Statistics of: medmoe-edge calibrate; no proof."),
    ] = None,
    samples: Samples = 128,
    strict: Strict = False,
    method: Annotated[
        Literal["auto", "rtn"],
        typer.Option(help="auto: the best that the data allow; rtn: plain rounding."),
    ] = "auto",
    target: Annotated[
        Literal["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"],
        typer.Option(help="onnxruntime is the portable bundle: any CPU, and all others' source."),
    ] = "onnxruntime",
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What an engine is built for: rtx-4090, sm89, orin."),
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
            show_default="NAME-PRECISION, or NAME-TARGET-GPU",
        ),
    ] = None,
    vision_tower: VisionTower = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle that answers without torch.

    With --calibrate it is verified before it appears: a failed gate leaves no bundle (exit 4). A
    modality-moe model needs no calibration: there DATA are images that prove the result. For
    another target than onnxruntime the weights are those of the portable bundle; TensorRT for RTX
    needs no GPU to build, TensorRT builds on the device itself.
    """
    from medmoe_edge.bundle.bundle import model_kind
    from medmoe_edge.embedded import EMBEDDED

    precision = _precision(int8=int8, int4=int4, mixed=mixed is not None, fp32=fp32)
    folder = _source(model, target, as_it_is=not (precision or calibrate or stats))
    name = model if model in EMBEDDED else folder.resolve().name
    if target == "onnxruntime" and (gpu or positions or memory_limit):
        raise InputError(
            "--gpu, --positions and --memory-limit are for engines.",
            "Add --target tensorrt-rtx, or leave them out.",
        )
    if target == "onnxruntime" and paged:
        raise InputError(
            "--paged is for GPUs: every portable bundle can be paged.", "Leave it out."
        )
    is_modality = model_kind(folder) == "modality-moe"
    if is_modality:
        given = {"--group-size": group_size, "--stats": stats, "--strict": strict}
        elsewhere = target if target != "onnxruntime" else None
        cli_modality_build.refuse({**given, "--vision-tower": vision_tower, "--target": elsewhere})
    with render.working("Reading") as report:
        common: dict[str, Any] = {
            "precision": precision or "int8",
            "calibrate_on": calibrate,
            "name": name,
            "progress": report,
        }
        portable: Callable[..., Export] = partial(
            _export_portable,
            folder,
            method=method,
            budget_bits=mixed,
            group=group_size,
            samples=samples,
            stats=stats,
            strict=strict,
            vision_tower=vision_tower,
            **common,
        )
        if is_modality:
            portable = partial(cli_modality_build.export_modality, folder, **common)
        if target == "onnxruntime":
            made = portable(output or Path(f"{name}-{precision or 'int8'}"), force=force)
            show = partial(_show_portable, made, name, precision or "int8", as_json)
        else:
            with needs("rtx" if target == "tensorrt-rtx" else "export"):
                from medmoe_edge.pipeline_targets import export_for
            built = export_for(
                target,
                folder,
                output or Path("-".join(filter(None, (name, target, gpu)))),
                portable=portable,
                gpu=gpu,
                dtype=dtype,
                positions=positions,
                paged=paged,
                memory_limit=memory_limit * MB if memory_limit else None,
                force=force,
                progress=report,
            )
            show = partial(_show_target, built, as_json)
    show()


def _show_portable(made: "Export", name: str, precision: str, as_json: bool) -> None:
    if as_json:
        found = made.verification.to_json() if made.verification else None
        bundle = {"bundle": str(made.bundle), "name": name, "precision": precision}
        render.as_json(bundle | {"verification": found})
        return
    if made.verification:
        render_proof.show_verification(made.verification)
    render.wrote("the bundle", made.bundle)
    if made.verification is None:
        render_proof.show_not_measured()


def _show_target(built: "TargetExport", as_json: bool) -> None:
    if as_json:
        render.as_json(built.to_json())
    else:
        render_deploy.show_target(built)


def _precision(**given: bool) -> "Precision | None":
    """The one that was asked for, if any."""
    chosen = [name for name, wanted in given.items() if wanted]
    if len(chosen) > 1:
        raise InputError(f"--{' and --'.join(chosen)} exclude each other.", "Give one of them.")
    return cast("Precision", chosen[0]) if chosen else None


def _source(model: str, target: str, *, as_it_is: bool) -> Path:
    """The checkpoint; for another target the portable bundle, where it is to stay `as_it_is`."""
    from medmoe_edge.bundle.bundle import MANIFEST
    from medmoe_edge.embedded import bundle_path, checkpoint_path

    folder = bundle_path(model) if target != "onnxruntime" and as_it_is else checkpoint_path(model)
    if (folder / MANIFEST).exists() and not as_it_is:
        raise InputError(
            f"{folder} is a bundle: it was quantised and calibrated when it was made.",
            "Leave --int8, --calibrate and their like out, or give the checkpoint.",
        )
    return folder


def _export_portable(checkpoint: Path, out: Path, **options: Any) -> "Export":
    with needs("export"):
        from medmoe_edge import pipeline
    return pipeline.export(checkpoint, out, **options)
