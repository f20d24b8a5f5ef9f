"""For mkdocs: the command line's reference is made from the command line, the picture of the layers
from their contract in `pyproject.toml`, the list of SOUP from `lock.txt`, and files of the project
that are pages too are included where a page says `<!-- include: FILE -->`.
"""

import html
import re
import tomllib
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.cli import get_docs_for_click

from medmoe_edge import cli
from medmoe_edge.export.jetson import OLDEST_TENSORRT, SINCE, SUPPORT

ROOT = Path(__file__).parents[1]
COMMAND_LINE = "<!-- generated: the command line -->"
JETSONS = "<!-- generated: jetsons -->"
SOUP = "<!-- generated: soup -->"
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
EXAMPLE = re.compile(r"^Example: (.+)$", re.MULTILINE)

LAYERS = "pictures/layers.svg"
SAYS = {
    "cli": "verbs: parse, call, print",
    "render": "tables and JSON for people",
    "bedside": "serve, listen, batch, audit",
    "bench": "speed and memory",
    "device": "doctor, plan",
    "families": "one interface to both families of models",
    "pipeline": "calibrate, export, verify in one",
    "training": "phases, recipes",
    "archive": "an index of embeddings",
    "evaluation": "verify, eval, gates, report",
    "contrastive": "MedMoE at work",
    "engine": "ask: image to answer",
    "runtimes": "what runs a model: ort, torch, tensorrt, paging, slots",
    "export": "checkpoint to graphs; targets; passes",
    "calibration": "statistics, quantisers",
    "kernels": "Triton, TensorRT's plugin",
    "presets": "configurations by name",
    "checkpoint": "the official folder",
    "models": "the models in PyTorch",
    "embedded": "inside",
    "bundle": "manifest",
    "data": "questions",
    "image": "files to RGB",
    "prompt": "tokenizer",
    "config": "frozen dataclasses, strict JSON",
    "errors": "one tree",
}
AT_THE_TOP = ("calibration", "export", "runtimes")  # folders of the project
WIDTH, HEIGHT, GAP, EDGE = 760, 34, 6, 14  # pixels


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with all files: adds the picture of the layers."""
    files.append(File.generated(config, LAYERS, content=drawn(layers())))
    return files


def layers() -> list[list[str]]:
    """The packages by layer, the highest first, as import-linter checks them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (contract,) = (each for each in contracts if each["type"] == "layers")
    return [re.findall(r"\w+", layer) for layer in contract["layers"]]


def drawn(rows: list[list[str]]) -> str:
    """A box for each package, a row for each layer, as SVG."""
    height = len(rows) * (HEIGHT + GAP) + 50
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>',
        '<text x="14" y="24" font-size="12" fill="#555">Each imports only from layers below, and '
        "nothing from its own layer. Green: folders at the top of the project.</text>",
    ]
    for number, names in enumerate(rows):
        top, width = 38 + number * (HEIGHT + GAP), (WIDTH - 2 * EDGE + GAP) / len(names) - GAP
        for place, name in enumerate(names):
            left = EDGE + place * (width + GAP)
            fill, line = ("#e3f4f1", "#00897b") if name in AT_THE_TOP else ("#e8f0fe", "#4a78c8")
            lines += [
                f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{HEIGHT}" rx="5" '
                f'fill="{fill}" stroke="{line}"/>',
                f'<text x="{left + 10:.0f}" y="{top + 22}"><tspan font-weight="bold">{name}</tspan>'
                f'<tspan dx="8" font-size="11" fill="#555">{SAYS.get(name, "")}</tspan></text>',
            ]
    return "\n".join([*lines, "</svg>"])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page before it is converted."""
    if COMMAND_LINE in markdown:
        markdown = markdown.replace(COMMAND_LINE, command_line())
    if JETSONS in markdown:
        markdown = markdown.replace(JETSONS, jetsons())
    if SOUP in markdown:
        markdown = markdown.replace(SOUP, soup())
    return INCLUDE.sub(lambda found: included(ROOT / found[1]), markdown)


def command_line() -> str:
    """Every verb with its arguments, options and example, a heading for each."""
    group = typer.main.get_command(cli.app)
    context = typer.Context(group, info_name="medmoe-edge")
    text = get_docs_for_click(obj=group, ctx=context, indent=1, name="medmoe-edge")
    text = html.unescape(text).replace("<", "&lt;")
    # the usage is no command to type, and the example is one
    text = text.replace("```console\n$ ", "```text\n")
    return EXAMPLE.sub(r"Example:\n\n```bash\n\1\n```", text)


def jetsons() -> str:
    """The matrix of JetPacks, what to type for each, and what each TensorRT brought."""
    head = [
        "JetPack",
        "boards",
        "Python",
        "CUDA",
        "TensorRT",
        "SM",
        "target",
        "precisions",
        "graph",
    ]
    rows = [head, ["---"] * len(head)]
    typed = []
    for row in SUPPORT:
        rows.append(
            [
                *(row.jetpacks, ", ".join(row.boards), row.python, row.cuda, row.tensorrt),
                row.compute_capability,
                *(f"`{row.target}`" if row.target else "none", row.precisions, row.form),
            ]
        )
        lines = "\n".join(row.commands)
        typed.append(f"### JetPack {row.jetpacks}\n\n{row.why}\n\n```text\n{lines}\n```")
    since = [["TensorRT", "brought", "the graph"], ["---"] * 3]
    since += [[".".join(map(str, version)), *told] for version, told in SINCE.items()]
    tables = ["\n".join(f"| {' | '.join(cells)} |" for cells in table) for table in (rows, since)]
    oldest = ".".join(map(str, OLDEST_TENSORRT))
    return "\n\n".join(
        [
            *("## The matrix", tables[0], "## What to type", *typed),
            *("## The graph for each TensorRT", tables[1]),
            f"The `tensorrt` target needs {oldest} or later.",
        ]
    )


def soup() -> str:
    """Every package of lock.txt: its release, what of the project asks for it, and where."""
    lines = re.sub(r"\\\n\s*", " ", (ROOT / "lock.txt").read_text("utf-8")).splitlines()
    asked = asked_for()
    rows = [["package", "release", "asked for by", "only where", "files"], ["---"] * 5]
    for line in lines:
        if not line or line.startswith("#"):
            continue
        requirement, *hashes = line.split(" --hash=")
        found = Requirement(requirement)
        name, release = found.name, str(found.specifier).removeprefix("==")
        by = ", ".join(asked.get(canonicalize_name(name), ["other packages"]))
        link = f"[{name}](https://pypi.org/project/{name}/{release}/)"
        where = f"`{found.marker}`" if found.marker else ""
        rows.append([link, release, by, where, str(len(hashes))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def asked_for() -> dict[str, list[str]]:
    """By package: the base install, and the extras that name it themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found: dict[str, list[str]] = {}
    groups = {"the base": project["dependencies"], **project["optional-dependencies"]}
    for title, requirements in groups.items():
        for requirement in map(Requirement, requirements):
            if requirement.name != project["name"]:
                found.setdefault(canonicalize_name(requirement.name), []).append(title)
    return found


def included(path: Path) -> str:
    """A file's text, without the front matter of a model card."""
    return FRONT_MATTER.sub("", path.read_text("utf-8"))
