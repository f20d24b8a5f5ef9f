"""For mkdocs: the command line's reference is made from the command line, and files of the project
that are pages too are included where a page says `<!-- include: FILE -->`.
"""

import html
import re
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from medmoe_edge import cli

ROOT = Path(__file__).parents[1]
COMMAND_LINE = "<!-- generated: the command line -->"
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
EXAMPLE = re.compile(r"^Example: (.+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page before it is converted."""
    if COMMAND_LINE in markdown:
        markdown = markdown.replace(COMMAND_LINE, command_line())
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


def included(path: Path) -> str:
    """A file's text, without the front matter of a model card."""
    return FRONT_MATTER.sub("", path.read_text("utf-8"))
