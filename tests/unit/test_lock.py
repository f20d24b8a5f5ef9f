"""The lock holds one hashed release of all that the package, its tests and torch need."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medmoe_edge._version import OLDEST_ONNXRUNTIME

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "lock.txt").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = [
    {"sys_platform": system, "platform_machine": machine, "os_name": os_name}
    for system, machine, os_name in (
        ("linux", "x86_64", "posix"),
        ("linux", "aarch64", "posix"),
        ("darwin", "arm64", "posix"),
        ("win32", "AMD64", "nt"),
    )
]
ENVIRONMENTS = [
    {**platform, "python_version": python, "python_full_version": f"{python}.0"}
    for platform in PLATFORMS
    for python in PYTHONS
]
CUDA = ("cuda-", "nvidia-", "triton")  # what only PyPI's build of torch asks for

Environment = dict[str, str]


def entries(text: str = LOCK) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of the lock with its hashes."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    parts = [line.split(" --hash=") for line in lines if line and not line.startswith("#")]
    return [(Requirement(line), hashes) for line, *hashes in parts]


def applies(requirement: Requirement, environment: Environment) -> bool:
    marker: Marker | None = requirement.marker
    return marker is None or marker.evaluate({**environment, "extra": ""})


def locked(environment: Environment) -> dict[str, str]:
    """Package -> version, in one environment."""
    return {
        canonicalize_name(entry.name): str(entry.specifier).removeprefix("==")
        for entry, _ in entries()
        if applies(entry, environment)
    }


def direct(extra: str) -> set[str]:
    """What an extra asks for beside the base, through the extras that it names."""
    lines = {*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]}
    for line in list(lines):
        if (own := Requirement(line)).name == PROJECT["name"]:
            lines.remove(line)
            lines.update(*map(direct, own.extras))
    return lines


def missing(wanted: set[str], environment: Environment) -> list[str]:
    """Requirements that the lock does not satisfy there."""
    versions = locked(environment)
    return [
        line
        for line in wanted
        if applies(required := Requirement(line), environment)
        and not required.specifier.contains(
            versions.get(canonicalize_name(required.name), "0.dev0"), prereleases=True
        )
    ]


def test_every_entry_is_one_release_with_its_hashes() -> None:
    for entry, hashes in entries():
        assert re.fullmatch(r"==[^*,]+", str(entry.specifier)), entry
        assert entry.url is None
        assert hashes, entry
        for known in hashes:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", known.strip()), entry


def test_no_index_is_written_down() -> None:
    assert not re.search(r"://|^\s*-", LOCK.replace("    --hash=", ""), re.MULTILINE)


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: "-".join(e.values()))
def test_a_package_is_locked_once_wherever_it_is_installed(environment: Environment) -> None:
    names = [canonicalize_name(entry.name) for entry, _ in entries() if applies(entry, environment)]
    assert len(names) == len(set(names))
    assert missing(direct("dev"), environment) == [
        line for line in direct("dev") if Requirement(line).name == "torch"
    ]


def test_what_is_locked_needs_nothing_that_is_not() -> None:
    """By the metadata of what is installed here, in the locked version."""
    environment = {key: str(value) for key, value in _here().items()}
    asked: dict[str, list[str]] = defaultdict(list)
    for name in [*locked(environment), "torch"]:
        try:
            lines = set(requires(name) or ())
        except PackageNotFoundError:
            continue
        for line in missing(lines, environment):
            if not Requirement(line).name.startswith(("torch", *CUDA)):
                asked[name].append(line)
    assert asked == {}


def _here() -> Environment:
    from packaging.markers import default_environment

    return {key: str(value) for key, value in default_environment().items()}


def test_the_oldest_onnx_runtime_is_that_of_the_project() -> None:
    (required,) = (
        Requirement(line) for line in PROJECT["dependencies"] if line.startswith("onnxruntime")
    )
    assert str(required.specifier) == ">=" + ".".join(map(str, OLDEST_ONNXRUNTIME))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("absent-1.0-cp27-none-win32.whl", b"locked", "No matching distribution found"),
        ("absent-1.0-py3-none-any.whl", b"another", "DO NOT MATCH THE HASHES"),
    ],
    ids=["no file for this platform", "another file"],
)
def test_what_pip_says_of_a_lock_it_cannot_satisfy_is_explained(
    tmp_path: Path, file: str, content: bytes, said: str
) -> None:
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [shutil.which("pip") or ""]
    if not pip[0]:
        pytest.skip("needs pip")
    (tmp_path / file).write_bytes(content)
    lock = tmp_path / "lock.txt"
    lock.write_text(f"absent==1.0 --hash=sha256:{sha256(b'locked').hexdigest()}")
    offline = ["--isolated", "--no-index", "--find-links", str(tmp_path), "--no-deps"]
    done = subprocess.run(
        [*pip, "download", *offline, "--requirement", str(lock), "--dest", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert said in " ".join((ROOT / "CONTRIBUTING.md").read_text("utf-8").split())
    assert "[CONTRIBUTING.md](CONTRIBUTING.md)" in (ROOT / "README.md").read_text("utf-8")


def test_everybody_installs_the_lock() -> None:
    """The second command of the README, CI and the containers."""
    for path in (
        "README.md",
        ".ci/run",
        "docs/deploy/Containerfile",
        "docs/deploy/Containerfile.jetson",
    ):
        assert "lock.txt" in (ROOT / path).read_text("utf-8"), path


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8").partition("## Two commands")[2]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    for command in re.findall(r"```\n(.*)\n```", readme)[:2]:
        assert f"- run: {command}\n" in workflow
