"""The integrator's guide and the files to deploy: what they start parses, what they say is so.

That every block of the guide works as typed is for `test_docs.py`.
"""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import trustme
from command_line import ROOT
from documents import blocks_of, check_command
from serving import StandIn, live, png

from medmoe_edge.bedside.listen.config import load_configuration
from medmoe_edge.bedside.serve.settings import Limits, read_tokens

PAGE = ROOT / "docs" / "guides" / "integrators-guide.md"
GUIDE = PAGE.read_text("utf-8")
DEPLOYMENT = (ROOT / "docs" / "guides" / "deployment.md").read_text("utf-8")
DEPLOY = ROOT / "docs" / "deploy"


BLOCKS = blocks_of(PAGE)


def lines_of(program: str) -> list[str]:
    """The command lines of a program, in bash blocks."""
    lines = [line for block in BLOCKS if block.language == "bash" for line in block.commands]
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


def test_a_token_and_tls_as_the_guide_has_them(folder: Path, engine: StandIn) -> None:
    (make,) = lines_of("(umask 077; openssl")
    (line,) = [line for line in lines_of("curl") if "token" in line]
    bash(make, folder)
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    tls = {"certificate": folder / "cert.pem", "key": folder / "key.pem"}
    with live(engine, token=read_tokens(folder / "token")["token"], **tls) as url:
        line = line.replace("https://localhost:8000", url)
        assert json.loads(bash(line, folder))["data"][0]["id"] == "nano"
        with pytest.raises(AssertionError, match="401"):
            bash(line.partition(" -H ")[0], folder)


def test_what_is_left_as_comments_is_a_configuration_too(tmp_path: Path) -> None:
    (text,) = [block.text for block in BLOCKS if block.title == "listen.toml"]
    uncommented = re.sub(r"^# ", "", text, flags=re.MULTILINE)
    (tmp_path / "listen.toml").write_text(uncommented)
    configuration = load_configuration(tmp_path / "listen.toml")
    assert (len(configuration.dicom), len(configuration.fhir)) == (1, 1)


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
    check_command(line, monkeypatch)
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
    check_command(shlex.join(["medmoe-edge", *json.loads(command)]), monkeypatch)
    assert "\nUSER 10001:10001\n" in text
    same = (DEPLOY / "Containerfile").read_text().partition("# The only folder")[2]
    assert text.endswith(same)  # they differ in where Python comes from


@pytest.mark.parametrize("name", ["Containerfile", "Containerfile.jetson"])
def test_what_a_container_runs_is_shell_and_its_extras_exist(name: str) -> None:
    """`.ci/containers` really runs it, where there is time and Debian's buildah."""
    text = (DEPLOY / name).read_text().replace("\\\n", "")
    lines = re.findall(r"^RUN (.*)", text, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        done = subprocess.run(["sh", "-n", "-c", line], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), line
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(declared["optional-dependencies"])


def test_the_files_that_are_to_be_deployed_are_there() -> None:
    for name in re.findall(r"docs/deploy/[\w.-]+", DEPLOYMENT):
        assert (ROOT / name).is_file()
