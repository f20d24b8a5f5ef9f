"""The verbs that ask a model; whatever only one of them needs is imported inside it."""

from pathlib import Path
from typing import Annotated

import typer

from medmoe_edge import render
from medmoe_edge.cli_app import Device, Json, MemoryBudget, Runtime, verb


@verb("ask", "Ask", 'ask scan.png "Is there effusion?"')
def ask(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG, TIFF, DICOM or NIfTI.")
    ],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="One or more.")],
    model: Annotated[str, typer.Option(help="A bundle, a checkpoint or nano.")] = "nano",
    runtime: Runtime = "auto",
    device: Device = "auto",
    memory_budget: MemoryBudget = None,
    frame: Annotated[
        int | None, typer.Option(min=0, help="Frame or slice, from 0.", show_default="the middle")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    prefix_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep here what the model makes of images, and answer more about them at once. "
            "It is patient data, for your eyes alone, of at most 2 GB.",
            show_default="nothing is kept",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer questions about one image."""
    import medmoe_edge

    with render.working("Answering"):
        engine = medmoe_edge.load(
            model,
            runtime=runtime,
            device=device,
            memory_budget=memory_budget,
            prefix_cache=prefix_cache,
        )
        answers = engine.ask_all(image, questions, max_new_tokens=max_new_tokens, frame=frame)
    if as_json:
        render.as_json({"answers": [answer.to_json() for answer in answers]})
    else:
        render.show_answers(answers)
    for notice in dict.fromkeys(answer.notice for answer in answers):
        render.show(notice, "yellow", stderr=True)
