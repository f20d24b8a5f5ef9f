"""The integrator's guide: what it tells to type works, and what it says of options is so."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
import typer
from command_line import ROOT, Run
from dicom_files import saved
from listen_process import StandIn as Asked
from listen_process import free_port, study, wait_for
from serving import StandIn, live, png
from test_batch import StandIn as BatchStandIn

from medmoe_edge import cli
from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.batch import asking as batch_asking
from medmoe_edge.bedside.listen.config import load_configuration
from medmoe_edge.bedside.listen.node import Node
from medmoe_edge.bedside.serve.settings import Limits, read_token
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.cli.errors import Commands

GUIDE = (ROOT / "docs" / "integrators-guide.md").read_text("utf-8")
DEPLOY = ROOT / "docs" / "deploy"
URL = "http://localhost:8000"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert found
    return found


def lines_of(program: str) -> list[str]:
    """The command lines of a program, in bash blocks."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [line for line in lines if line.startswith(f"{program} ")]
    assert found
    return found


def bash(line: str, folder: Path) -> str:
    """What a line prints; it must end well."""
    if shutil.which(line.split()[0].strip("(")) is None and not line.startswith("("):
        pytest.skip(f"needs {line.split()[0]}")
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scan.png").write_bytes(png())
    return tmp_path


@pytest.fixture
def engine() -> StandIn:
    engine = StandIn()
    engine.name = "nano"
    return engine


@pytest.mark.parametrize("line", lines_of("medmoe-edge"))
def test_every_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    group = typer.main.get_command(cli.app)
    assert isinstance(group, Commands)
    command = group.commands[shlex.split(line)[1]]
    for each in getattr(command, "commands", {"": command}).values():
        monkeypatch.setattr(each, "callback", lambda **given: calls.append(given))
    with pytest.raises(SystemExit) as stopped:
        group.main(shlex.split(line)[1:])
    assert (stopped.value.code, len(calls)) == (0, 1)


def test_every_line_of_bash_is_tried() -> None:
    tried = ("medmoe-edge ", "curl ", "(umask 077; openssl ", "echoscu ", "storescu ")
    assert all(line.startswith(tried) for block in blocks("bash") for line in block.splitlines())


@pytest.mark.parametrize("line", [line for line in lines_of("curl") if "token" not in line])
def test_the_lines_of_curl(line: str, folder: Path, engine: StandIn) -> None:
    with live(engine) as url:
        told = bash(line.replace("localhost:8000", url), folder)
    if "stream=true" in line:
        assert told.count("event: token") == 4
        assert told.endswith("event: done\ndata: {}\n\n")
    elif "png" in line and "locate" in line:
        assert (folder / "heart.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert NOTICE in told
        assert json.loads(told).keys() & {"answers", "scores"}


def test_a_token_and_tls_as_the_guide_has_them(folder: Path, engine: StandIn) -> None:
    (make,) = [line for block in blocks("bash") for line in block.splitlines() if "openssl" in line]
    (line,) = [line for line in lines_of("curl") if "token" in line]
    bash(make, folder)
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    tls = {"certificate": folder / "cert.pem", "key": folder / "key.pem"}
    with live(engine, token=read_token(folder / "token"), **tls) as url:
        line = line.replace("https://localhost:8000", url)
        assert json.loads(bash(line, folder))["data"][0]["id"] == "nano"
        with pytest.raises(AssertionError, match="401"):
            bash(line.partition(" -H ")[0], folder)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_programs(
    number: int, folder: Path, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with live(engine) as url:
        program = [sys.executable, "-c", blocks("python")[number].replace(URL, url)]
        done = subprocess.run(
            program, cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "No effusion is seen" in done.stdout
    assert engine.images == [(8, 8, 3)]


def test_the_node_and_its_peers(folder: Path) -> None:
    (text,) = blocks("toml")
    port = str(free_port())
    text = text.replace("11112", port).replace('folder = "node"', 'folder = "node"\nreserve_mb = 0')
    (folder / "listen.toml").write_text(text)
    saved(folder, study(), "scan.dcm")
    configuration = load_configuration(folder / "listen.toml")
    with Node(configuration, Asked()):
        for line in lines_of("echoscu") + lines_of("storescu"):
            bash(line.replace("11112", port), folder)
        reports = folder / "node" / "documents"
        wait_for(lambda: len(list(reports.glob("*/*.dcm"))) == len(configuration.documents))
        report = next(reports.glob("*/*.comprehensive-3d-sr.dcm"))
        assert "Is there effusion?" in bash(f"dsrdump {report}", folder)


def test_what_is_left_as_comments_is_a_configuration_too(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    uncommented = re.sub(r"^# ", "", text, flags=re.MULTILINE)
    (tmp_path / "listen.toml").write_text(uncommented)
    configuration = load_configuration(tmp_path / "listen.toml")
    assert (len(configuration.dicom), len(configuration.fhir)) == (1, 1)


def test_the_verbs_that_end(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(folder, study(), "scan.dcm")
    given = {"who": "me", "event": "ask", "model": {}, "question": "?", "answer": "No"}
    AuditLog(folder / "audit.jsonl").append(**given, input_sha256="0" * 64)  # type: ignore[arg-type]
    (folder / "scans").mkdir()
    shutil.copy(folder / "scan.png", folder / "scans")
    (folder / "questions.txt").write_text("Is there effusion?\n")
    monkeypatch.setattr(batch_asking, "load", lambda *_, **__: BatchStandIn())
    for line in lines_of("medmoe-edge audit") + lines_of("medmoe-edge batch"):
        if "--ray" not in line:
            result = run(*shlex.split(line)[1:])
            assert result.exit_code == 0, result.stderr
    assert (folder / "example.dcm").exists()
    assert (folder / "results.parquet").exists()


def test_the_limits_are_those_of_the_service() -> None:
    limits, prose = Limits(), " ".join(GUIDE.split())
    assert f"{limits.pixels // 10**6} megapixels (`--max-megapixels`)" in prose
    assert f"{limits.questions} questions (`--max-questions`)" in prose
    assert f"{limits.new_tokens} new tokens (`--max-new-tokens`)" in prose
    assert f"{limits.seconds:.0f} s for the answer (`--max-seconds`)" in prose
    assert (
        f"at most {limits.upload_seconds:.0f} s of upload; {limits.waiting} requests wait" in prose
    )


@pytest.mark.parametrize("name", ["serve", "listen"])
def test_the_units_start_what_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = (DEPLOY / f"medmoe-edge-{name}.service").read_text()
    (line,) = re.findall(r"^ExecStart=/opt/medmoe-edge/bin/(.*)", unit, re.MULTILINE)
    test_every_command_parses(line, monkeypatch)
    assert f"StateDirectory=medmoe-edge-{name}" in unit
    settings = re.findall(r"^(\w+)=", unit, re.MULTILINE)
    assert {"NoNewPrivileges", "ProtectSystem", "SystemCallFilter", "IPAddressDeny"} <= set(
        settings
    )


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    for unit in DEPLOY.glob("*.service"):  # the program itself is not installed here
        text = unit.read_text().replace(
            "/opt/medmoe-edge/bin/medmoe-edge", shutil.which("true") or ""
        )
        (tmp_path / unit.name).write_text(text)
    units = sorted(map(str, tmp_path.glob("*.service")))
    assert len(units) == 2
    command = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["Containerfile", "Containerfile.jetson"])
def test_the_containers_start_what_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DEPLOY / name).read_text()
    (command,) = re.findall(r"^CMD (.*)", text, re.MULTILINE)
    assert 'ENTRYPOINT ["medmoe-edge"]' in text
    test_every_command_parses(shlex.join(["medmoe-edge", *json.loads(command)]), monkeypatch)
    assert "\nUSER 10001:10001\n" in text
    same = (DEPLOY / "Containerfile").read_text().partition("# The only folder")[2]
    assert text.endswith(same)  # they differ in where Python comes from


def test_the_files_that_the_guide_names_are_there() -> None:
    for name in re.findall(r"docs/deploy/[\w.-]+", GUIDE):
        assert (ROOT / name).is_file()
