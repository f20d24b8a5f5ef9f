"""The documentation: every block of code is run as typed or says why not, every link leads
somewhere, and what the reference lists is what there is.
"""

import dataclasses
import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import trustme
import yaml
from command_line import ROOT, Run
from dicom_files import saved
from documents import PAGES, SHOWN, Scratch, blocks_of, check_command, environment
from listen_process import study
from PIL import Image as Pillow
from serving import StandIn, app_over

from medmoe_edge import __version__, errors
from medmoe_edge.bedside.listen.receiving import transfer_syntaxes
from medmoe_edge.bedside.listen.selection import classes_with_pixels
from medmoe_edge.checkpoint.tensors import write_checkpoint
from medmoe_edge.cli.common import VERBS
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.initialise import random_tensors, train_tokenizer

MODALITIES = ("ct", "mri", "pathology", "xray")
FRONT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# nano at tiny size, to train it in a second
NANO, TINY = PRESETS["nano"], PRESETS["tiny"]
assert NANO.moe is not None
SMALL = dataclasses.replace(
    TINY,
    decoder=dataclasses.replace(TINY.decoder, vocab_size=NANO.decoder.vocab_size),
    moe=dataclasses.replace(NANO.moe, layers=(0, 2)),
)


def sturdy_checkpoint(folder: Path) -> None:
    """A tiny checkpoint whose answers bear rounding, as trained ones do.

    The head repeats the last token, whose embedding outweighs all that the layers add.
    """
    tokenizer = folder.with_suffix(".json")
    train_tokenizer([("Is there effusion?", "Yes")], 300, tokenizer)
    config = dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, vocab_size=320))
    tensors = dict(random_tensors(config, seed=1))
    for name in tensors:  # as those of `tiny_checkpoint`, so that its traced tower fits
        if name.startswith(("vision.", "projector.")) and "norm" not in name:
            tensors[name] = tensors[name] * 8
    tensors["decoder.embed.weight"] = tensors["decoder.embed.weight"] * 50
    tensors["decoder.head.weight"] = tensors["decoder.embed.weight"].clone()
    write_checkpoint(folder, config, tensors.items(), tokenizer_file=tokenizer)


@pytest.fixture(scope="module")
def presumed(
    tiny_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What the pages presume that the reader has, under the names that they use for it."""
    folder = tmp_path_factory.mktemp("presumed")
    shutil.copy(ROOT / "scan.png", folder)
    sturdy_checkpoint(folder / "CHECKPOINT")
    shutil.copytree(tiny_bundle(), folder / "BUNDLE")
    saved(folder, study(), "scan.dcm")
    with Pillow.open(folder / "scan.png") as scan:
        for name in ("scans", "images", "DATA"):
            (folder / name).mkdir()
            for turn, modality in enumerate(MODALITIES):
                (folder / name / modality).mkdir()
                small = scan.rotate(90 * turn).resize((48, 48))
                small.save(folder / name / modality / "1.png")
    (folder / "questions.txt").write_text("Is there effusion?\n")
    (folder / "images.csv").write_text("image,question\nscan.png,Is there effusion?\n")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    return folder


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if not block.reason}), ids=str
)
def test_the_blocks_of_a_page(
    page: str,
    presumed: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PRESETS, "nano", SMALL)
    shutil.copytree(presumed, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Scratch(tmp_path, run) as scratch:
        for block in blocks_of(ROOT / page):
            scratch.do(block)
    if scratch.missing:
        pytest.skip(f"all but the lines that need {', '.join(sorted(scratch.missing))}")


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        assert block.language in SHOWN | {"bash", "python"}, block
        if block.reason:
            assert len(block.reason.split()) >= 3, f"{block}: why is it not run?"
            assert block.language not in SHOWN, f"{block}: what is only shown needs no reason"


COMMANDS = [
    part.strip().removesuffix("&").strip()
    for block in BLOCKS
    if block.language == "bash"
    for line in block.commands
    for part in re.split(r" && | \|\|? | > ", line)
    if part.strip().startswith("medmoe-edge ")
]


def test_every_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(COMMANDS) > 50
    for line in dict.fromkeys(COMMANDS):  # also those of blocks that are not run
        check_command(line, monkeypatch)


def test_few_blocks_are_not_run() -> None:
    typed = [block for block in BLOCKS if block.language not in SHOWN]
    assert sum(not block.reason for block in typed) >= 2 / 3 * len(typed)


# --- links and lengths ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRONT)
def test_links_of_the_pages_outside_the_site_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in link or (ROOT / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_nothing_is_loaded_from_elsewhere() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text("utf-8")
        assert not re.search(r"(src=\"|!\[[^]]*\]\()https?:", text), page


# --- the reference is complete ----------------------------------------------------------------


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("hooks")


def test_the_command_line_is_generated_whole(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown(page("reference/command-line.md"))
    for verb in VERBS:
        assert f"## `medmoe-edge {verb}`" in text
    assert len(re.findall(r"^Example:$", text, re.MULTILINE)) >= len(VERBS)


def test_every_route_is_in_the_reference() -> None:
    paths = app_over(StandIn()).openapi()["paths"]
    named = set(re.findall(r"`(?:GET|POST) (/[\w/.{}]*)`", page("reference/http.md")))
    assert named == set(paths) | {"/", "/openapi.json"}


def test_every_status_of_an_error_is_in_the_reference() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.+) \|$", page("reference/http.md"), re.MULTILINE)
    listed = {(status, code) for status, text in rows for code in re.findall(r"`([a-z_]+)`", text)}
    texts = [path.read_text("utf-8") for path in (ROOT / "medmoe_edge").rglob("*.py")]
    raised = {
        found
        for text in texts
        if "Refusal(" in text
        for found in re.findall(r'\b([45]\d\d), "([a-z_]+)"', text)
    }
    assert len(raised) >= 15
    assert raised <= listed


def test_the_dicom_conformance_is_what_the_node_takes() -> None:
    text = page("reference/dicom-conformance.md")
    uids = set(re.findall(r"\| `(\d+\.[\d.]+)` \|", text.partition("## What it sends")[0]))
    assert uids == {*classes_with_pixels(), *transfer_syntaxes(), "1.2.840.10008.1.1"}


def test_every_exit_code_is_in_the_reference() -> None:
    raised = {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.MedMoEError)
    }
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page("reference/exit-codes.md"), 8)}
    assert raised | {0, 130, 143} <= listed


def test_every_table_of_benchmarks_has_its_command() -> None:
    text = page("benchmarks.md")
    assert "AVX-512 VNNI and without AMX" in text
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert re.search(r"`(medmoe-edge|bench|tests/stress_|serve)", section), section[:40]


@pytest.mark.parametrize("name", ["index.md", "extending.md", "plugin.md"])
def test_the_architecture_names_what_there_is(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", page(f"architecture/{name}"), flags=re.M | re.S)
    named = re.findall(r"`([\w/]+(?:/|\.(?:py|toml|md)))`", text)
    assert named
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "medmoe_edge" / path).exists(), path


def test_every_layer_is_drawn(hooks: ModuleType) -> None:
    picture = hooks.drawn(hooks.layers())
    names = [name for layer in hooks.layers() for name in layer]
    assert re.findall(r'font-weight="bold">(\w+)<', picture) == names
    packages = {path.parent.name for path in (ROOT / "medmoe_edge").glob("*/__init__.py")}
    assert packages <= set(names)
    assert packages <= set(hooks.SAYS)


# --- releases -----------------------------------------------------------------------------------


def test_version_changes_and_citation_tell_of_the_same_release() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    released = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert released[0] == (__version__, str(citation["date-released"]))


def test_the_workflows_are_yaml_and_check_what_they_build() -> None:
    workflows = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
    assert all(yaml.safe_load(text)["jobs"] for text in workflows.values())
    assert "twine check --strict" in workflows["release"]
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text()


# --- examples -----------------------------------------------------------------------------------


def test_ask_py(run: Run, presumed: Path, tmp_path: Path) -> None:
    with Scratch(tmp_path, run) as scratch:
        told = scratch.bash(f"python {ROOT / 'examples' / 'ask.py'} {presumed / 'scan.png'}")
    assert "Is there effusion?" in told
    assert "not a medical device" in told


def test_ask_sh(run: Run, presumed: Path, tmp_path: Path) -> None:
    with Scratch(tmp_path, run) as scratch:
        scratch.start(["serve"])
        url = f"http://localhost:{scratch.ports['8000']}"
        told = scratch.bash(f"bash {ROOT / 'examples' / 'ask.sh'} {presumed / 'scan.png'} {url}")
    answers = json.loads(told)["answers"]
    assert [answer["question"] for answer in answers] == [
        "Is there effusion?",
        "Which organ is shown?",
    ]


def test_ask_ipynb(presumed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    import nbformat

    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, environment()[name])
    notebook = nbformat.read(ROOT / "examples" / "ask.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    done = nbclient.NotebookClient(notebook, timeout=60).execute(cwd=str(presumed))
    told = json.dumps([cell.get("outputs") for cell in done.cells])
    assert "Is there effusion?" in told
    assert "image/png" in told
