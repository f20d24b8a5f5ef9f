"""The verbs of the audit: prove that a log is whole, and take the patient out of an example."""

from pathlib import Path
from typing import Annotated

import typer

from medmoe_edge.cli.common import Force, Json, app, check_output
from medmoe_edge.cli.errors import needs
from medmoe_edge.errors import VerificationError
from medmoe_edge.render import console as render

audit = typer.Typer(no_args_is_help=True)
app.add_typer(
    audit,
    name="audit",
    rich_help_panel="Deploy",
    help="Verify an audit log; take the patient out of a DICOM file.",
    epilog="Example: medmoe-edge audit verify audit.jsonl",
)
EXAMPLE = "Example: medmoe-edge audit {}"


@audit.command("verify", epilog=EXAMPLE.format("verify audit.jsonl"))
def verify(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="An audit log.")],
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="A recorded head, to see that no end was cut off."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell whether every line of an audit log is as it was written."""
    from medmoe_edge.bedside.audit.chain import verify_log

    report = verify_log(log, head)
    if as_json:
        render.as_json(report.to_json())
    else:
        render.show(report.why, "green" if report.intact else "bold red")
        render.show(f"{report.entries:,} entries, head {report.head}")
    if not report.intact:
        raise VerificationError(
            f"The audit log is not intact ({report.fault}).",
            "The next entry cuts an unfinished line off."
            if report.fault == "torn"
            else "Keep it as it is, and find out who could write it.",
        )


@audit.command("deidentify", epilog=EXAMPLE.format("deidentify scan.dcm -o example.dcm"))
def deidentify(
    source: Annotated[Path, typer.Argument(metavar="DICOM", help="A DICOM file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    allow_burned_in: Annotated[
        bool, typer.Option("--allow-burned-in", help="Also where the picture shows text.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a DICOM file without what identifies its patient (PS3.15, Basic Profile)."""
    check_output(output, force)
    with needs("listen"):
        from medmoe_edge.bedside.audit import deidentify as audit_deidentify
    audit_deidentify.deidentify(source, output, allow_burned_in=allow_burned_in)
    render.wrote("the example", output)
