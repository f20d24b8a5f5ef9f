"""First steps that must not end in a wall: each was one."""

import csv
import errno
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from command_line import ROOT, Run, raising, start, two_lines
from PIL import Image as Pillow
from typer.testing import CliRunner

from medmoe_edge import cli
from medmoe_edge.atomic import atomic_file
from medmoe_edge.cli import bedside, common
from medmoe_edge.errors import did_you_mean, shown_bytes

Make = Callable[..., Path]


# --- init ---------------------------------------------------------------------------------------


def test_what_init_writes_can_be_exported_and_asked(run: Run, scan: Path) -> None:
    assert run("init", "tiny", "made").exit_code == 0
    assert run("export", "made", "--int8", "-o", "bundle").exit_code == 0
    found = run("ask", str(scan), "Is there effusion?", "--model", "bundle", "--json")
    warnings = json.loads(found.stdout)["answers"][0]["warnings"]
    told = {each["code"]: each["message"] for each in warnings}
    assert told.keys() - {"repetition"} == {"stand_in_tokenizer", "no_contrast"}  # noise may repeat
    assert "stand-in" in told["stand_in_tokenizer"]


def test_a_stand_in_tokenizer_reads_any_text(tmp_path: Path) -> None:
    from medmoe_edge.prompt import Tokenizer
    from medmoe_edge.training.initialise import stand_in_tokenizer

    for end in (0, 7, 50256):
        stand_in_tokenizer(end).save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
        tokenizer.check_vocabulary(256 if end < 256 else end + 1)
        text = "Größe 5 µm? \U0001f9e0 肺"
        assert tokenizer.decode(tokenizer.answer_ids(text)) == text
        assert tokenizer.backend.token_to_id("<|endoftext|>") == end


def test_what_init_writes_of_a_modality_moe_can_be_exported(run: Run, scan: Path) -> None:
    assert run("init", "modality-tiny", "made").exit_code == 0
    assert run("export", "made", "--fp32", "-o", "bundle").exit_code == 0
    found = run("classify", str(scan), "--labels", "lung,heart", "--model", "bundle", "--json")
    assert set(json.loads(found.stdout)["scores"]) == {"lung", "heart"}


# --- what costs nothing comes first -------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["export", "--mixed", "1.2"], "1.2 bits per weight are too few"),
        (["export", "--mixed", "nan", "--calibrate", "builtin"], "nan bits per weight are too few"),
        (["export", "--mixed", "40", "--calibrate", "builtin"], "more than weights have"),
        (["ask", "scan.png", "Is it?", "--memory-budget", "1kB"], "too small for this model"),
        (["ask", "scan.png", "Is it?", "--memory-budget", "lots"], "lots"),
        (["calibrate", "modality-nano", "--data", "builtin", "-o", "s"], "needs no calibration"),
        (["batch", ".", "-o", "table.xlsx", "--questions", "q"], "not named as a table"),
        (["ask", "-", "Is it?"], "is empty"),
    ],
)
@pytest.mark.usefixtures("scan")
def test_what_cannot_be_is_refused_at_once(run: Run, line: list[str], what: str) -> None:
    started = time.perf_counter()
    result = run(*line)
    assert what in " ".join(two_lines(result))
    assert result.exit_code == 2
    assert time.perf_counter() - started < 10  # a second, on a machine that is not shared


def test_no_model_is_loaded_for_a_missing_picture(run: Run, loaded: list[tuple[str, str]]) -> None:
    assert run("ask", "gone.png", "Is it?").exit_code == 2
    assert loaded == []


# --- files --------------------------------------------------------------------------------------

MISSING = [
    ["ask", "gone", "Is it?"],
    ["classify", "gone", "--labels", "a,b"],
    ["locate", "gone", "lung", "-o", "out.png"],
    ["eval", "--data", "gone"],
    ["eval", "--predictions", "gone", "--references", "gone"],
    ["export", "--stats", "gone"],
    ["data", "slake", "gone", "out"],
    ["batch", "gone", "-o", "out.csv"],
    ["listen", "--config", "gone"],
    ["serve", "--token-file", "gone"],
    ["serve", "--tls-cert", "gone", "--tls-key", "gone"],
    ["audit", "verify", "gone"],
    ["audit", "deidentify", "gone", "-o", "out.dcm"],
    ["audit", "deidentify", "scan.png", "-o", "out.dcm", "--secret", "gone"],
]


@pytest.mark.parametrize("line", MISSING, ids=" ".join)
@pytest.mark.usefixtures("scan")
def test_a_missing_file_is_called_missing(run: Run, line: list[str]) -> None:
    result = run(*line)
    what, _ = two_lines(result)
    assert result.exit_code == 2
    assert re.search(r"gone'? does not exist\.$", what), what


@pytest.mark.parametrize(
    "line",
    [["inspect", "gone"], ["verify", "gone"], ["bench", "gone"], ["export", "gone"]],
    ids=" ".join,
)
def test_a_missing_model_is_called_missing(run: Run, line: list[str]) -> None:
    assert two_lines(run(*line))[0].startswith("There is no model folder 'gone'")


@pytest.mark.parametrize("suffix", ["webp", "bmp", "gif"])
def test_more_kinds_of_pictures(
    run: Run, loaded: list[tuple[str, str]], tmp_path: Path, suffix: str
) -> None:
    Pillow.new("RGB", (8, 8), "red").save(tmp_path / f"scan.{suffix}")
    assert run("ask", f"scan.{suffix}", "Is it?").exit_code == 0


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """As `write` reports it: without a name."""
    with pytest.raises(OSError, match="No space") as caught, atomic_file(tmp_path / "out.png"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("line", [["--version"], ["inspect", "nano", "--json"]], ids=" ".join)
def test_a_full_output_is_two_lines(line: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = start(*line, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert result.returncode == 5
    assert "no space left on device" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("line", "code"),
    [(["ask", str(ROOT / "scan.png"), "Is it?"], 0), (["-v", "inspect", "none"], 3)],
)
def test_what_cannot_be_told_on_stderr_changes_nothing(line: list[str], code: int) -> None:
    with Path("/dev/full").open("w") as full:
        result = start(*line, stdout=subprocess.PIPE, stderr=full, capture_output=False)
    assert result.returncode == code


def test_a_log_that_cannot_be_written_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("medmoe_edge")
    monkeypatch.setattr(logger, "handlers", [])
    common.log_to_stderr("WARNING")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SimpleNamespace(write=raising(BrokenPipeError())))
        logger.warning("lost")
    logger.warning("told")
    if Path("/dev/full").exists():
        path = tmp_path / "log"
        path.symlink_to("/dev/full")
        file = bedside._LogFile(path, maxBytes=1000, backupCount=1)
        monkeypatch.setattr(logger, "handlers", [file])
        logger.warning("lost")
        path.unlink()  # now there is room
        logger.warning("kept")
        file.close()
        assert path.read_text() == "kept\n"
    assert capsys.readouterr().err == "told\n"


@pytest.mark.parametrize("size", ["0", "99999999999", "\N{SUPERSCRIPT TWO}"])
def test_a_terminal_of_an_impossible_size_shows_everything(size: str) -> None:
    odd = dict.fromkeys(("COLUMNS", "LINES", "TERMINAL_WIDTH"), size)
    result = start("ask", "no.png", "Is it?", environment={**os.environ, **odd})
    assert result.stderr == "'no.png' does not exist.\nCheck the path.\n"
    result = start("audit", "-h", environment={**os.environ, **odd})
    assert "medmoe-edge audit verify" in result.stdout, result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stderr_changes_no_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": full}
        line = ("ask", "no.png", "Is it?", "--json")
        result = start(*line, capture_output=False, **options)
    assert result.returncode == 2
    assert json.loads(result.stdout)["error"]["code"] == "bad_image"


@pytest.mark.skipif(os.name != "posix", reason="a folder in use is not deleted")
def test_a_current_folder_that_was_deleted_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n"
    code += "from medmoe_edge.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", "nano"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("The current folder cannot be used (No such file")


def test_a_picture_from_standard_input(
    loaded: list[tuple[str, str]], scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(cli.app, ["ask", "-", "Is it?"], input=scan.read_bytes())
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == "Is it?"


def test_batch_writes_csv(run: Run, tiny_bundle: Make, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    Pillow.new("L", (8, 8), 9).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    (tmp_path / "q.txt").write_text("Is it, there?\nWhere?\n")
    command = ["batch", "scans", "--questions", "q.txt", "--model", str(tiny_bundle())]
    assert run(*command, "-o", "r.csv").exit_code == 0
    with (tmp_path / "r.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["question"]) for row in rows] == [
        *(("a.png", "Is it, there?"), ("a.png", "Where?")),
        *(("b.png", "Is it, there?"), ("b.png", "Where?")),
    ]
    assert json.loads(rows[0]["experts"])
    assert rows[0]["warnings"].startswith("no_contrast: ")
    assert (rows[0]["error"], rows[2]["answer"]) == ("", "")
    assert rows[0]["verification"] == "not measured"
    assert "not an image" in rows[2]["error"]


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB")),
        *((999_999, "1.0 MB"), (21_600_000, "21.6 MB"), (1_500_000_000, "1.50 GB")),
    ],
)
def test_units_fit(count: float, shown: str) -> None:
    assert shown_bytes(count) == shown


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("Nano", ("nano", "modality-nano"), "nano"),
        ("modality", ("nano", "modality-nano"), "modality-nano"),
        ("nanno", ("nano", "modality-nano"), "nano"),
        ("rtx4090", ("rtx-4060", "rtx-4090"), "rtx-4090"),
        ("orin nx", ("orin-nano-8g", "orin-nx-16g"), "orin-nx-16g"),
        ("onnx", ("auto", "onnxruntime", "torch"), "onnxruntime"),
        ("zebra", ("auto", "onnxruntime"), ""),
    ],
)
def test_the_nearest_name(word: str, known: tuple[str, ...], near: str) -> None:
    assert did_you_mean(word, known) == (f"Did you mean {near!r}? " if near else "")


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        (["quantize", "nano"], "export"),
        (["predict", "scan.png"], "ask"),
        (["benchmark"], "bench"),
        (["info", "nano"], "inspect"),
        (["finetune"], "train"),
        (["anonymize", "a.dcm"], "audit"),
        (["verfy"], "verify"),
        (["export", "--quantise"], "--int8"),
        (["export", "--out", "x"], "--output"),
        (["eval", "--dataset", "x"], "--data"),
        (["ask", "a", "b", "--backend", "torch"], "--runtime"),
        (["ask", "a", "b", "--max-tokens", "3"], "--max-new-tokens"),
        (["ask", "a", "b", "--runtime", "onnx"], "onnxruntime"),
        (["init", "phi2", "x"], "med-moe-phi2-2.7b"),
        (["plan", "--device", "jetson orin nano"], None),
        (["export", "--target", "tensorrt-rtx", "--gpu", "4090"], "rtx-4090"),
    ],
)
def test_what_was_meant(run: Run, line: list[str], meant: str | None) -> None:
    result = run(*line)
    said = " ".join(two_lines(result))
    assert (f"Did you mean {meant!r}?" in said) is (meant is not None), said


def test_every_proposal_exists() -> None:
    from medmoe_edge.cli.common import OPTIONS, VERBS

    group: Any = typer.main.get_command(cli.app)
    options = {
        name for verb in group.commands.values() for one in verb.params for name in one.opts
    } | {name for one in group.params for name in one.opts}
    assert set(OPTIONS) <= options
    words = [word for synonyms in VERBS.values() for word in synonyms.split()]
    assert len(set(words)) == len(words)  # each means one verb
    assert not set(group.commands) & (set(words) - set(VERBS))


# --- programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "exit_code"),
    [
        (["ask", "gone.png", "Is it?"], "bad_image", 2),
        (["ask", "--nonsense"], "bad_usage", 2),
        (["eval", "--data", "gone.jsonl"], "bad_data", 2),
        (["inspect", "gone"], "bad_model", 3),
        (["plan", "--device", "nothing"], "bad_input", 2),
    ],
)
def test_a_failure_is_one_json_object(run: Run, line: list[str], code: str, exit_code: int) -> None:
    result = run(*line, "--json")
    assert result.exit_code == exit_code
    (only,) = result.stdout.splitlines()
    error = json.loads(only)["error"]
    assert set(error) == {"code", "message", "remedy"}
    assert error["code"] == code
    assert result.stderr.splitlines() == [error["message"], error["remedy"]]


def test_a_failed_check_is_one_json_object_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_text("torn")
    result = run("audit", "verify", "audit.jsonl", "--json")
    assert result.exit_code == 4
    told = json.loads(result.stdout)
    assert (told["intact"], told["error"]["code"]) == (False, "verification_failed")


def test_exit_codes_are_in_the_help(run: Run) -> None:
    said = " ".join(run("--help").stdout.split())
    for part in ("0 done", "2 bad usage", "3 bad model", "4 a gate", "5 memory", "130", "143"):
        assert part in said


def test_help_fits_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer, none is cut off, and no word of an option is broken."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    group: Any = typer.main.get_command(cli.app)
    verbs = {(name,): command for name, command in group.commands.items()}
    for (name,), command in list(verbs.items()):
        inner = getattr(command, "commands", {})
        verbs |= {(name, each): verb for each, verb in inner.items()}
    for name, command in verbs.items():
        shown = run(*name, "--help").stdout
        lines = shown.splitlines()
        assert max(map(len, lines)) <= 80, name
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown, name
        for parameter in getattr(command, "params", ()):
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert not option.startswith("--") or option in shown, (name, option)
        for line, following in itertools.pairwise(lines):
            if not (line.startswith(" ") and line.strip() and following.strip()):
                continue  # in a box, or the end of a paragraph
            width = len(line.strip()) + 1 + len(following.split()[0])
            assert width > 78, (name, line)  # it was broken where it had to be


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("ask scan.png Is --model na", {"nano"}),
        ("verify mod", {"modality-nano"}),
        ("init med-moe-p", {"med-moe-phi2-2.7b"}),
        ("plan --device orin-n", {"orin-nano-8g", "orin-nx-16g"}),
        ("plan med-moe-s", {"med-moe-stablelm-1.6b"}),
        ("export --gpu rtx-40", {"rtx-4060", "rtx-4090"}),
        ("export --calibrate bui", {"builtin"}),
    ],
)
def test_completion_knows_names(tmp_path: Path, words: str, found: set[str]) -> None:
    environment = os.environ | {
        "_CLI.PY_COMPLETE": "complete_bash",
        "COMP_WORDS": f"cli.py {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    result = start("", environment=environment, cwd=tmp_path)
    assert found <= set(result.stdout.split()), result.stderr


# --- ends ---------------------------------------------------------------------------------------


MAIN = (sys.executable, "-c", "from medmoe_edge.cli import main; main()")


def with_modules_of(folder: Path) -> dict[str, str]:
    """An environment in which a folder's modules stand before those that are installed."""
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def main_with_modules_of(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command line that has ended, in that environment."""
    return subprocess.run(
        [*MAIN, *arguments],
        env=with_modules_of(folder),
        capture_output=True,
        text=True,
        check=False,
    )


def ended(
    folder: Path, importing: str, number: str, told: str = "", *, hang_up: signal.Handlers
) -> tuple[int, str, str]:
    """How a command line ends that gets a signal while it imports a package, which says when.

    `hang_up` is what SIGHUP does to begin with: the tests themselves may run under nohup.
    """
    (folder / "typer.py").write_text(f"print('now', flush=True)\n{importing}")
    with subprocess.Popen(
        MAIN,
        env=with_modules_of(folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(getattr(signal, number))
        stdout, stderr = process.communicate(told, timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [("SIGINT", 130, "Interrupted.\n"), ("SIGTERM", 143, ""), ("SIGHUP", 143, "")],
)
def test_an_end_while_importing_is_clean(tmp_path: Path, number: str, code: int, said: str) -> None:
    slow = "import time\ntime.sleep(60)\n"
    found, _, stderr = ended(tmp_path, slow, number, hang_up=signal.SIG_DFL)
    assert (found, stderr) == (code, said)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_lost_terminal_ends_nothing_that_nohup_started(tmp_path: Path) -> None:
    asks = "print(input())\nraise SystemExit"
    code, told, _ = ended(tmp_path, asks, "SIGHUP", "still here\n", hang_up=signal.SIG_IGN)
    assert (code, told) == (0, "still here\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_that_a_library_swallows_is_an_interrupt(tmp_path: Path) -> None:
    """As an extension does that turns whatever happens while it is imported into its own error."""
    swallowing = (
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException as error:\n    raise ImportError('numpy failed') from error\n"
    )
    (tmp_path / "numpy.py").write_text(swallowing)
    result = main_with_modules_of(tmp_path, "ask", "scan.png", "Is it?")
    assert (result.returncode, result.stderr) == (130, "Interrupted.\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [("SIGINT", 130, "Interrupted.\n"), ("SIGTERM", 143, "")],
)
def test_an_end_while_native_code_imports_is_not_lost(
    tmp_path: Path, number: str, code: int, said: str
) -> None:
    """PyTorch's extension imports NumPy, and goes on without it whatever happens there."""
    pytest.importorskip("torch")
    (tmp_path / "numpy.py").write_text(
        "import os, pathlib, signal\n"
        "if not (once := pathlib.Path(__file__).with_suffix('.once')).exists():\n"
        f"    once.touch()\n    os.kill(os.getpid(), signal.{number})\n"
        "raise ModuleNotFoundError('numpy')\n"
    )
    (tmp_path / "typer.py").write_text("import torch\nprint('lost')\n")
    result = main_with_modules_of(tmp_path)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert result.stderr.endswith(said)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("number", "code", "said"), [("SIGINT", 130, "Interrupted.\n"), ("SIGTERM", 143, "")]
)
def test_an_end_within_pytorchs_own_modules_does_not_abort(
    tmp_path: Path, number: str, code: int, said: str
) -> None:
    """As pybind11 ends the process at an exception that its set-up does not expect."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import torch.native\nprint('went on')\n")
    (tmp_path / "torch" / "native.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{number})\n"
        "except BaseException:\n    os.abort()\n"
    )
    (tmp_path / "typer.py").write_text("import torch\n")
    result = main_with_modules_of(tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", said)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_in_a_callback_of_the_import_system_is_not_lost(tmp_path: Path) -> None:
    """importlib drops a module's lock by a weak reference, whose callback swallows all."""
    script = (
        "import os, signal, sys\n"
        "from medmoe_edge import cli\n"
        "signal.signal(signal.SIGINT, cli.interruption)\n"
        "def at(frame, event, *_):\n"
        "    if frame.f_code.co_qualname == '_get_module_lock.<locals>.cb':\n"
        "        sys.setprofile(None)\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.setprofile(at)\n"
        "try:\n    import this\n    print('lost')\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "interrupted", result.stderr


# --- inspect ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 32.0), ("int8", 8.5), ("int4", 4.9)])
def test_inspect_says_bits_target_and_runtime(
    run: Run, tiny_bundle: Make, precision: str, bits: float
) -> None:
    """By hand: rows of 64 weights in 8 bits with a scale of 32 bits are 8.5; groups of 32 in 4 bits
    with one of 16 are 4.5, but for the head, a tenth of all weights, which is as in int8.
    """
    found = json.loads(run("inspect", str(tiny_bundle(precision)), "--json").stdout)
    assert found["bits_per_weight"] == pytest.approx(bits, abs=0.05)
    assert found["runtime"] == "ONNX Runtime, on any CPU"
    assert found["target"]["name"] == "onnxruntime"
    shown = run("inspect", str(tiny_bundle(precision))).stdout
    assert re.search(r"target +onnxruntime *\n", shown)
    assert re.search(rf"bits per weight +{found['bits_per_weight']:.2f}", shown)


def test_inspect_of_a_checkpoint(run: Run, tiny_checkpoint: Make) -> None:
    found = json.loads(run("inspect", str(tiny_checkpoint()), "--json").stdout)
    assert 16 <= found["bits_per_weight"] < 16.1  # bf16, and a router in fp32
    assert found["runtime"].startswith("PyTorch")
