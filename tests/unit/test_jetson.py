"""Jetsons: what their files say, what works with it, and what is refused before any work."""

import json
from pathlib import Path

import pytest

from medmoe_edge.errors import ResourceError
from medmoe_edge.export.gpus import find_gpu
from medmoe_edge.export.jetson import (
    AOT_PLUGINS,
    IN_PLACE,
    JETPACK_OF,
    OLDEST_TENSORRT,
    SINCE,
    SUPPORT,
    Jetson,
    best_path,
    check_tensorrt,
    find_jetson,
    parse_version,
)

NVPMODEL = """
# a comment
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""


def jetson(
    root: Path,
    model: str = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    l4t: tuple[str, str] = ("36", "4.3"),
    jetpack: str | None = "6.2+b77",
    tensorrt: str | None = "10.3.0.30-1+cuda12.5",
    mode: int | None = 2,
) -> Jetson | None:
    """The files of a Jetson under a folder, as the system lays them; read."""
    packages = ["Package: bash\nStatus: install ok installed\nVersion: 5.1-6ubuntu1"]
    if jetpack:
        packages.append(
            f"Package: nvidia-jetpack\nStatus: install ok installed\nVersion: {jetpack}"
        )
    if tensorrt:
        number = tensorrt.split(".")[0]
        packages += [
            f"Package: libnvinfer{number}\nStatus: install ok installed\nVersion: {tensorrt}",
            "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.6.2.3-1",
        ]
    files = {
        "proc/device-tree/model": f"{model}\0",
        "etc/nv_tegra_release": f"# R{l4t[0]} (release), REVISION: {l4t[1]}, GCID: 1, BOARD: x",
        "var/lib/dpkg/status": "\n\n".join(packages) + "\n",
        "usr/local/cuda/version.json": json.dumps({"cuda": {"version": "12.6.68"}}),
        "etc/nvpmodel.conf": NVPMODEL,
    }
    if mode is not None:
        files["var/lib/nvpmodel/status"] = f"pmode:{mode:04} fmode:quiet"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return find_jetson(root, lambda: "asked")


def test_the_files_of_a_jetson_are_read(tmp_path: Path) -> None:
    found = jetson(tmp_path)
    assert found is not None
    assert (found.board, found.release, found.jetpack) == ("Orin Nano", "36.4.3", "6.2")
    assert (found.tensorrt, found.cuda, found.power_mode) == ("10.3.0.30", "12.6.68", "MAXN_SUPER")
    assert found.fastest_mode == 2  # on other boards it is 0
    assert str(found) == "JetPack 6.2, L4T 36.4.3, TensorRT 10.3.0.30, CUDA 12.6.68"


def test_what_no_file_says_is_asked_or_follows_from_the_release(tmp_path: Path) -> None:
    found = jetson(tmp_path, jetpack=None, tensorrt=None, mode=None)
    assert found is not None
    assert (found.jetpack, found.tensorrt, found.power_mode) == ("6.2", None, "asked")
    (tmp_path / "usr/local/cuda/version.json").write_text("{")
    (tmp_path / "etc/nv_tegra_release").write_text("gibberish")
    found = find_jetson(tmp_path, lambda: None)
    assert found is not None
    assert (found.release, found.jetpack, found.cuda) == (None, None, None)
    assert best_path(found) is None


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        *((("32", "7.2"), "4"), (("35", "4.1"), "5.0"), (("36", "3.0"), "6.0")),
        *((("36", "4.0"), "6.1"), (("36", "4.3"), "6.2"), (("36", "5.0"), "6.2.1")),
        *((("38", "2.1"), "7.0"), (("38", "4.0"), "7.1"), (("39", "2.0"), "7.2")),
    ],
)
def test_a_release_tells_its_jetpack(l4t: tuple[str, str], jetpack: str, tmp_path: Path) -> None:
    found = jetson_of(tmp_path, l4t)
    assert found.jetpack == jetpack
    assert list(JETPACK_OF) == sorted(JETPACK_OF)


def jetson_of(root: Path, l4t: tuple[str, str]) -> Jetson:
    found = jetson(root, l4t=l4t, jetpack=None)
    assert found is not None
    return found


def test_elsewhere_there_is_none(tmp_path: Path) -> None:
    assert find_jetson(tmp_path) is None
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5\0")
    assert find_jetson(tmp_path) is None


def of(board: str, jetpack: str | None, tensorrt: str | None = None) -> Jetson:
    return Jetson(f"NVIDIA Jetson {board} Developer Kit", None, None, jetpack, tensorrt)


@pytest.mark.parametrize(
    ("found", "target", "words"),
    [
        (of("AGX Xavier", "5.1"), None, "not supported"),
        (of("AGX Orin", "5.1.3"), None, "not supported"),
        (of("Orin Nano", "6.2"), "onnxruntime", "on the CPU"),
        (of("AGX Thor", "7.1", "10.13.3"), "tensorrt", "TensorRT 10.13.3 is there: the same."),
        (of("AGX Orin", "7.2"), "tensorrt", "the 10.x that it brings"),
        (of("Orin NX", "7.2.2", "10.14.1"), "tensorrt", "is there: attention in one operator."),
        (of("AGX Orin", "7.2.2"), "tensorrt", "can be installed as well"),
        (of("AGX Orin", "7.2.2", "11.4.1.3"), "tensorrt", "TensorRT 11.4.1.3 is there"),
        (of("AGX Thor", "7.3"), "tensorrt", "never run yet"),
    ],
)
def test_the_best_path(found: Jetson, target: str | None, words: str) -> None:
    path = best_path(found)
    assert path is not None
    assert path.row.target == target
    assert path.line.startswith(f"JetPack {found.jetpack}: ")
    assert words in path.line
    assert "\n" not in path.line
    assert path.commands
    if target == "tensorrt":
        gpu = "thor" if "Thor" in found.model else "orin"
        assert any(f"--gpu {gpu} " in command for command in path.commands)
        assert find_gpu(gpu, "tensorrt").sm == ("sm110" if gpu == "thor" else "sm87")


@pytest.mark.parametrize("version", ["8.6.2", "10.0.1", "10.2.0"])
def test_a_tensorrt_that_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(ResourceError, match=f"here is {version}") as found:
        check_tensorrt(version, None)
    assert "10.3" in found.value.remedy
    with pytest.raises(ResourceError) as found:
        check_tensorrt(version, of("Orin Nano", "6.2"))
    assert found.value.remedy.startswith("JetPack 6.2: on the CPU")


@pytest.mark.parametrize(
    ("version", "found"),
    [
        *(("11.4.1", of("Orin NX", "7.2.2")), ("11.4.1", of("AGX Orin", "7.2"))),
        *(("11.4.1", of("Orin Nano", "6.2")), ("11.4.0", of("AGX Orin", "7.2.2"))),
    ],
)
def test_a_tensorrt_that_the_jetpack_does_not_run_is_refused(version: str, found: Jetson) -> None:
    with pytest.raises(ResourceError, match=rf"TensorRT {version} is not for") as error:
        check_tensorrt(version, found)
    assert error.value.remedy.startswith(f"JetPack {found.jetpack}: ")


def test_tensorrt_of_the_matrix_is_taken() -> None:
    for found in (of("AGX Orin", "7.2.2"), of("AGX Thor", "7.2.2"), of("AGX Orin", None), None):
        check_tensorrt("11.4.1", found)
    for version, found in (("10.3.0", of("Orin Nano", "6.2")), ("10.16", of("AGX Orin", "7.2"))):
        check_tensorrt(version, found)
    assert parse_version("10.3.0.30-1+cuda12.5") == (10, 3, 0, 30)
    assert parse_version("none") == ()
    newest = max(SUPPORT, key=lambda row: row.since)
    assert newest.target == "tensorrt"
    assert min(SINCE) == OLDEST_TENSORRT
    assert {AOT_PLUGINS, IN_PLACE} < set(SINCE)
    assert [row.since for row in SUPPORT] == sorted(row.since for row in SUPPORT)
