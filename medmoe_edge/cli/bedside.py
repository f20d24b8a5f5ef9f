"""The verbs of the bedside: `serve`, `listen` and `batch`."""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.cli.common import (
    AllowRepetition,
    AuditFile,
    Device,
    DropPages,
    Force,
    Json,
    MemoryBudget,
    ModelOption,
    NewTokens,
    Runtime,
    app,
    complete_models,
    file_option,
    paragraphs,
    tell,
    verb,
)
from medmoe_edge.errors import InputError, MedMoEError, needs, unreadable
from medmoe_edge.pipeline import check_output
from medmoe_edge.render import console as render

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medmoe_edge.bedside.batch.run import Answering, BatchReport, Recipe
    from medmoe_edge.bedside.listen.config import Configuration, Log
    from medmoe_edge.bedside.listen.desk import Desk
    from medmoe_edge.bedside.listen.report_sr import Locator


@verb("serve", "Deploy", "serve --port 8000")
def serve(
    host: Annotated[str, typer.Option(help="Others than this machine need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    model: ModelOption = "nano",
    runtime: Runtime = "auto",
    device: Device = "auto",
    memory_budget: MemoryBudget = None,
    drop_pages: DropPages = False,
    modality_model: Annotated[
        str, typer.Option(help="For classify and locate.", autocompletion=complete_models)
    ] = "modality-nano",
    token_file: Annotated[
        Path | None, file_option("Who has a token in it may ask: NAME TOKEN; chmod 600.")
    ] = None,
    tls_cert: Annotated[Path | None, file_option("PEM.")] = None,
    tls_key: Annotated[Path | None, file_option("PEM.")] = None,
    behind_proxy: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of a proxy that ends TLS and says who asks."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages from there may ask too; may be repeated."),
    ] = None,
    audit_log: AuditFile = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 8,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 64,
    max_megapixels: Annotated[int, typer.Option(min=1, max=100, help="Of a picture.")] = 100,
    max_questions: Annotated[int, typer.Option(min=1, help="In a request.")] = 16,
    max_new_tokens: NewTokens = 256,
    allow_repetition: AllowRepetition = False,
    max_seconds: Annotated[float, typer.Option(min=1, help="For a request's answer.")] = 60,
    as_json: Json = False,
) -> None:
    """Answer over HTTP, with a page, JSON and OpenAI's chat completions.

    On SIGTERM it answers what it has accepted, and ends.
    """
    with needs("serve"):
        from medmoe_edge.bedside.serve.server import ServiceModels, start
        from medmoe_edge.bedside.serve.settings import Limits, Settings, read_tokens

    _run_as_service()
    log = logging.getLogger("medmoe_edge.bedside.serve.guard")
    if log.isEnabledFor(logging.WARNING):  # the access log, unless --quiet
        log.setLevel(logging.INFO)
    limits = Limits(
        upload_bytes=max_megabytes * 10**6,
        pixels=max_megapixels * 10**6,
        questions=max_questions,
        new_tokens=max_new_tokens,
        seconds=max_seconds,
        waiting=queue,
    )
    tokens = {} if token_file is None else read_tokens(token_file)
    origins = tuple(cors_origin or ())
    settings = Settings(host, port, tokens, tls_cert, tls_key, limits, behind_proxy, origins)

    models = ServiceModels(
        *(model, runtime, device, memory_budget, drop_pages, allow_repetition),
        *(modality_model, audit_log),
    )

    def ready(url: str) -> None:
        tell({"url": url}, as_json, f"Listening on {url}; end with Ctrl+C.")
        sys.stdout.flush()
        render.show(NOTICE, "yellow", stderr=True)

    start(settings, models, ready)
    render.show("Stopped; all that was accepted is answered.", stderr=True)


def _run_as_service(file: "Log | None" = None) -> None:
    """Have lines of the log say when, and files be nobody else's, whatever the umask was.

    With a file the log goes there, and to further ones as it grows.
    """
    os.umask(0o077)
    if file is not None:
        try:
            rotated = _LogFile(
                file.file, maxBytes=file.max_mb * 10**6, backupCount=file.keep, encoding="utf-8"
            )
        except OSError as error:
            raise InputError(*unreadable("The log's file", error)) from error
        logging.getLogger("medmoe_edge").handlers = [rotated]
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    own = logging.getLogger("medmoe_edge").handlers
    for handler in own:
        handler.setFormatter(form)
    logging.getLogger("uvicorn").handlers = own  # what it says of requests that are none


class _LogFile(RotatingFileHandler):
    """Loses what it cannot write, and opens its file anew: the disk may have room again."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: no decision rests on the log."""
        with contextlib.suppress(OSError, ValueError):
            self.close()


LISTEN = """Receive DICOM images, answer configured questions about each series, send reports on.

It ends on SIGTERM or Ctrl-C, after the work at hand; what waits is done after the next start. Its
commands look at its queue while it runs, or while it does not.
"""
commands = typer.Typer(invoke_without_command=True)
app.add_typer(
    commands,
    name="listen",
    rich_help_panel="Deploy",
    help=paragraphs(LISTEN),
    epilog="Example: medmoe-edge listen --config listen.toml",
)
Config = Annotated[Path, typer.Option(metavar="FILE", help="Its configuration, TOML or JSON.")]
EXAMPLE = "Example: medmoe-edge listen {} --config listen.toml"
KEY = "The first letters of its key, as the log has it."


@commands.callback()
def listen(
    context: typer.Context,
    config: Annotated[Path | None, file_option("Its configuration, TOML or JSON.")] = None,
    runtime: Runtime = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    if context.invoked_subcommand is not None:
        if config is not None:
            raise InputError(
                "The configuration is an option of the command.",
                f"Write: listen {context.invoked_subcommand} --config FILE",
            )
        return
    if config is None:
        raise InputError("The node needs a configuration.", "Write: listen --config listen.toml")
    with needs("listen"):
        from medmoe_edge.bedside.listen.config import load_configuration
        from medmoe_edge.bedside.listen.node import Node
    from medmoe_edge.engine.engine import load

    configuration = load_configuration(config)
    _run_as_service(configuration.log)
    with render.working("Loading"):
        engine = load(
            configuration.model,
            runtime=runtime,
            device=device,
            memory_budget=configuration.memory_budget,
            drop_pages=configuration.drop_pages,
            allow_repetition=configuration.allow_repetition,
        )
        locator = _locator(configuration)
    log = logging.getLogger("medmoe_edge.bedside.listen")
    if log.isEnabledFor(logging.WARNING):  # what becomes of each object, unless --quiet
        log.setLevel(logging.INFO)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Node(configuration, engine, locator) as node:
        place = {"ae_title": configuration.ae_title, "host": configuration.host, "port": node.port}
        tell(place, as_json, "{ae_title} listens on {host}, port {port}.".format(**place))
        sys.stdout.flush()
        render.show(NOTICE, "yellow", stderr=True)
        node.watch(stop)


@contextlib.contextmanager
def _desk(config: Path) -> "Iterator[tuple[Desk, Configuration]]":
    """The queue of a configured node."""
    with needs("listen"):
        from medmoe_edge.bedside.listen.config import load_configuration
        from medmoe_edge.bedside.listen.desk import Desk
    configuration = load_configuration(config)
    with contextlib.closing(Desk(configuration.folder)) as desk:
        yield desk, configuration


@commands.command("status", epilog=EXAMPLE.format("status"))
def node_status(config: Config, as_json: Json = False) -> None:
    """Tell what waits, what was answered, what failed, what was not asked and why."""
    with _desk(config) as (desk, configuration):
        found = desk.status(configuration)
    if as_json:
        render.as_json(found)
        return
    from medmoe_edge.bedside.listen.selection import reasons

    counts = {"objects received": found["objects"]}
    counts |= {f"series {state}": count for state, count in found["series"].items()}
    counts["results"] = found["results"]
    counts |= {f"not asked: {why}": count for why, count in reasons(found["not_asked"])}
    counts |= {f"unsent to {name}": count for name, count in found["unsent"].items()}
    counts |= {f"set aside for {name}": count for name, count in found["set_aside"].items()}
    counts |= {f"not yet kept by {name}": count for name, count in found["uncommitted"].items()}
    wanted = {state: count for state, count in found["requests"].items() if count}
    counts |= {f"studies to fetch: {state}": count for state, count in wanted.items()}
    render.show_table("", ["", ""], [(name, f"{count:,}") for name, count in counts.items()])


@commands.command("show", epilog=EXAMPLE.format("show 3f2a91"))
def node_show(
    config: Config,
    series: Annotated[
        str | None,
        typer.Argument(metavar="SERIES", help=KEY, show_default="list the last ones"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell all about one series, or list the last hundred."""
    with _desk(config) as (desk, _):
        if series is not None:
            render.as_json(desk.show(series))
            return
        rows = desk.series()
    if as_json:
        render.as_json({"series": rows})
        return
    names = ["series", "state", "objects", "results", "attempts", "why"]
    table = [
        [str(row[name])[:16] if name == "series" else str(row[name]) for name in names]
        for row in rows
    ]
    render.show_table("", names, table)


@commands.command("retry", epilog=EXAMPLE.format("retry"))
def node_retry(
    config: Config,
    series: Annotated[list[str] | None, typer.Argument(metavar="SERIES", help=KEY)] = None,
    as_json: Json = False,
) -> None:
    """Have series that were given up answered again, and documents that were set aside sent again.

    Of the series named, or of all.
    """
    with _desk(config) as (desk, _):
        count, again, gone = desk.retry(series or ())
    told = {"tried_again": count, "sent_again": again, "gone": gone}
    line = f"{count:,} series wait again; {again:,} documents are sent again."
    _tell_again(told, as_json, line)


@commands.command("requeue", epilog=EXAMPLE.format("requeue 3f2a"))
def node_requeue(
    config: Config,
    series: Annotated[list[str], typer.Argument(metavar="SERIES", help=KEY)],
    destination: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As status names it.", show_default="all of them"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Have the documents of series sent again."""
    with _desk(config) as (desk, configuration):
        names = [each.shown for each in configuration.destinations]
        if destination is not None and destination not in names:
            raise InputError(
                "No destination has that name.", f"Configured: {', '.join(names) or 'none'}."
            )
        again, gone = desk.requeue(series, destination)
    line = f"{again:,} documents are to be sent again."
    _tell_again({"sent_again": again, "gone": gone}, as_json, line)


def _tell_again(told: dict[str, int], as_json: bool, line: str) -> None:
    """Of documents that are sent again, and those that cannot be."""
    tell(told, as_json, line)
    if told["gone"] and not as_json:
        gone = "were removed from the node's folder (keep_days): they cannot be sent."
        render.show(f"{told['gone']:,} {gone}", "yellow")


STUDY = re.compile(r"[0-9]+(\.[0-9]+)+")
FETCH_SECONDS = 600.0  # that --wait waits


@commands.command("ask", epilog=EXAMPLE.format("ask --study 1.2.3"))
def node_ask(
    config: Config,
    study: Annotated[str, typer.Option(metavar="UID", help="Its Study Instance UID.")],
    priors: Annotated[
        int, typer.Option(min=0, max=20, help="Earlier studies of the patient, too.")
    ] = 0,
    source: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="AE title or URL.", show_default="the first"),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is fetched.")] = False,
    as_json: Json = False,
) -> None:
    """Have the node fetch a study from a source, and answer it."""
    if not STUDY.fullmatch(study) or len(study) > 64:
        raise InputError("That is no Study Instance UID.", "It is of digits and dots.")
    with _desk(config) as (desk, configuration):
        name = configuration.source(source or "").shown
        number = desk.request(study, priors, name)
        state, why = desk.fetched(number)
        end = time.monotonic() + FETCH_SECONDS
        while wait and state == "waiting" and time.monotonic() < end:
            time.sleep(0.2)
            state, why = desk.fetched(number)
    if state == "failed":
        raise InputError(f"The study was not fetched: {why}.", "See the node's log.")
    told = {"request": number, "source": name, "state": state, "why": why}
    how = f"{state}, {why}" if why else state
    line = f"Request {number} to {name}: {how}. See: listen status, listen show."
    tell(told, as_json, line)


@commands.command("backup", epilog=EXAMPLE.format("backup -o b.tar"))
def node_backup(
    config: Config,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="A .tar file.")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the node's queue, images, documents and audit log to one file; it may be running."""
    check_output(output, force, config)
    with _desk(config) as (desk, configuration):
        own = None if output.resolve().suffix == ".tar" else configuration.folder
        check_output(output, force, own, configuration.audit_log)  # a node keeps no .tar
        count = desk.back_up(configuration.audit_log, output)
    line = f"{count:,} files: the backup is as confidential as they are."
    tell({"files": count}, as_json, line)


@commands.command("restore", epilog=EXAMPLE.format("restore b.tar"))
def node_restore(
    config: Config,
    backup: Annotated[Path, typer.Argument(metavar="FILE", help="What backup wrote.")],
    as_json: Json = False,
) -> None:
    """Bring a backup back into an empty folder; then start the node."""
    with needs("listen"):
        from medmoe_edge.bedside.listen.config import load_configuration
        from medmoe_edge.bedside.listen.desk import restore
        from medmoe_edge.bedside.listen.queue import Folder
    configuration = load_configuration(config)
    count = restore(backup, Folder(configuration.folder), configuration.audit_log)
    tell({"files": count}, as_json, f"{count:,} files are back: start the node.")


def _locator(configuration: "Configuration") -> "Locator | None":
    """What draws heat maps, if they are wanted and it can be had."""
    if "heat-map" not in configuration.documents:
        return None
    from medmoe_edge.contrastive.engine import load_modality

    try:
        return load_modality(configuration.heat_map_model)
    except MedMoEError as error:
        render.show(f"No heat maps: {error.what}", "yellow", stderr=True)
        return None


@verb("batch", "Deploy", "batch scans --questions questions.txt -o results.parquet")
def batch(
    inputs: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|CSV",
            help="All files of a folder, or a table: image, perhaps question.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The table to write: .parquet or .csv."
        ),
    ],
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One on a line.", show_default="those of the table"),
    ] = None,
    model: ModelOption = "nano",
    runtime: Runtime = "auto",
    device: Device = "auto",
    memory_budget: MemoryBudget = None,
    max_new_tokens: NewTokens = 32,
    allow_repetition: AllowRepetition = False,
    series: Annotated[
        Literal["middle", "key", "every", "all"] | None,
        typer.Option(
            metavar="SLICES",
            help="One answer for each DICOM series, about its middle slice, its key images, every "
            "tenth, or all with a vote.",
            show_default="every file by itself",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="On a Ray cluster: HOST:PORT, or local for processes of this machine.",
            show_default="in this process",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Engines on the cluster.", show_default="one a machine"),
    ] = None,
    audit_log: AuditFile = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Answer questions about all images of an archive, one row for each.

    Interrupted, the same command goes on where it ended. An image that cannot be read has a row
    that says so. On a cluster, paths must lead to the same files on every machine.
    """
    check_output(output, force)
    if workers and ray is None:
        raise InputError("Workers are of a cluster.", "Name one: --ray ADDRESS, or --ray local.")
    grouping = None
    if series is not None:
        with needs("listen"):
            from medmoe_edge.bedside.listen.config import Series
        grouping = Series(slices=series)
    from medmoe_edge.bedside.batch.run import Recipe, run_batch

    recipe = Recipe(model, runtime, device, memory_budget, max_new_tokens, allow_repetition)
    audit = None
    if audit_log is not None:
        with needs("serve"):
            from medmoe_edge.bedside.audit.log import AuditLog
        audit = AuditLog(audit_log)
    try:
        with render.working("Loading") as progress, _where(ray, recipe, workers) as answering:
            report = run_batch(
                *(inputs, output, questions),
                recipe=recipe,
                series=grouping,
                answering=answering,
                audit=audit,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        render.show("What is done is kept: the same command goes on.", stderr=True)
        raise
    tell(report, as_json, _show_batch)
    render.show(report.notice, "yellow", stderr=True)


def _where(
    ray: str | None, recipe: "Recipe", workers: int | None
) -> contextlib.AbstractContextManager["Answering"]:
    """Where the engines are."""
    if ray is None:
        from medmoe_edge.bedside.batch.run import Here

        return contextlib.nullcontext(Here(recipe))
    with needs("ray"):
        from medmoe_edge.bedside.batch.cluster import OnRay
    return OnRay(ray, recipe, workers)


def _show_batch(report: "BatchReport") -> None:
    rows = [("images", f"{report.images:,}")]
    if report.links:
        rows.append(("  links to the same files (named by --json)", f"{len(report.links):,}"))
    if report.series is not None:
        from medmoe_edge.bedside.listen.selection import reasons

        rows += [(f"  not asked: {why}", f"{n:,}") for why, n in reasons(report.left_out)]
        rows.append(("series", f"{report.series:,}"))
    rows += [
        ("  done by earlier runs", f"{report.resumed:,}"),
        *([("  changed since, asked again", f"{report.changed:,}")] if report.changed else []),
        ("rows", f"{report.rows:,}"),
        ("  without an answer", f"{report.errors:,}"),
        ("  with warnings", f"{report.warned:,}"),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    render.show_table("", ["", ""], rows)
    render.wrote("the answers", Path(report.output))
