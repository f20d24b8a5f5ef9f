"""Jetsons: what software one has, which TensorRT goes with it, and what to type there.

A Jetson's TensorRT comes with its JetPack, and knows what its version knows; the plugin and the
graph that this package builds need `OLDEST_TENSORRT`. The tables are facts from NVIDIA's pages,
read in November 2026; none of their GPU rows has run on a Jetson yet.

    JetPack and Jetson Linux   developer.nvidia.com/embedded/jetpack-archive
    TensorRT on JetPack        docs.nvidia.com/deeplearning/tensorrt/11.4.1: migration guide for
                               Jetson, support matrix, release notes
"""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medmoe_edge.errors import ResourceError

Version = tuple[int, ...]
Board = Literal["AGX Orin", "Orin NX", "Orin Nano", "Thor"]

OLDEST_TENSORRT: Version = (10, 3)
AOT_PLUGINS: Version = (10, 9)  # compiled ahead of time from Python, without which no MoE plugin
# What a version of TensorRT brought that the `tensorrt` target needs or could use.
SINCE: dict[Version, str] = {
    (10, 3): "opsets to 20; strongly typed networks; no AOT plugins",
    (10, 9): "plugins compiled ahead of time from Python (aot_impl)",
    (10, 13): "opsets to 24",
    (10, 14): "the operator Attention",
    (10, 15): "the operator RotaryEmbedding (10.15.1)",
    (10, 16): "a layer for experts of its own (newest GPUs first)",
    (11, 0): "operators of the parser's own (TRT_Attention, TRT_KVCacheUpdate, TRT_MoE)",
}

L4T = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
POWER_MODE = re.compile(r"NV Power Mode: *(\S+)")
POWER_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)\s*>")
JETPACK_OF: dict[Version, str] = {  # the first Jetson Linux of each JetPack
    (35, 1): "5.0",
    (36, 2): "6.0",
    (36, 4): "6.1",
    (36, 4, 3): "6.2",
    (36, 4, 4): "6.2.1",
    (38, 2): "7.0",
    (38, 4): "7.1",
    (39,): "7.2",
}


@dataclass(frozen=True)
class Jetson:
    """A Jetson and its software, as its files tell; None where they do not.

    `release` is that of Jetson Linux (36.4.3), `tensorrt` and `cuda` are those that the system has.
    `fastest_mode` is the number of the power mode without limits, which differs between boards.
    """

    model: str
    release: str | None
    power_mode: str | None
    jetpack: str | None = None
    tensorrt: str | None = None
    cuda: str | None = None
    fastest_mode: int | None = None

    @property
    def board(self) -> Board | None:
        """Which module it is; None of a name that is not known."""
        names: tuple[Board, ...] = ("AGX Orin", "Orin NX", "Orin Nano", "Thor")
        return next((name for name in names if name in self.model), None)

    def __str__(self) -> str:
        software = [f"JetPack {self.jetpack or 'unknown'}", f"L4T {self.release or 'unknown'}"]
        software += [f"TensorRT {self.tensorrt}"] if self.tensorrt else []
        software += [f"CUDA {self.cuda}"] if self.cuda else []
        return ", ".join(software)


class Support(NamedTuple):
    """A row of the matrix: JetPacks `since` a version, on some boards."""

    since: Version
    jetpacks: str
    boards: tuple[Board, ...]
    python: str
    cuda: str
    tensorrt: str
    compute_capability: str
    target: Literal["onnxruntime", "tensorrt"] | None
    precisions: str
    form: str
    why: str
    commands: tuple[str, ...]


_ORIN: tuple[Board, ...] = ("AGX Orin", "Orin NX", "Orin Nano")
_ALL: tuple[Board, ...] = (*_ORIN, "Thor")
_CPU = "int8, int4, mixed, fp32 on the CPU"
_CPU_FORM = "the portable bundle"
_VENV = (
    "python3 -m venv ~/medmoe && ~/medmoe/bin/pip install 'medmoe-edge[images]'",
    '~/medmoe/bin/medmoe-edge ask scan.png "Is there effusion?" --model portable',
)
_UPGRADE = (
    "On AGX Orin and Thor, JetPack 7.2.2 takes TensorRT 11.4.1, with which the GPU can be used."
)
# The newest row that fits counts.
SUPPORT: tuple[Support, ...] = (
    Support(
        *((0,), "5 and older", (*_ORIN,), "3.8", "11.4", "8.x", "8.7", None, "none", "none"),
        "Its system is too old for the packages that asking needs.",
        ("Flash JetPack 6.2 or 7.2: developer.nvidia.com/embedded/jetpack",),
    ),
    Support(
        *((6,), "6.0 to 6.2", _ORIN, "3.10", "12.2 to 12.6", "8.6 (6.0), 10.3", "8.7"),
        *("onnxruntime", _CPU, _CPU_FORM),
        "Its TensorRT is older than 11 and stays so, its Python older than 3.11: a newer Python is "
        f"brought by uv. {_UPGRADE}",
        (
            "pip install uv && uv venv --python 3.12 ~/medmoe",
            "uv pip install --python ~/medmoe/bin/python 'medmoe-edge[images]'",
            '~/medmoe/bin/medmoe-edge ask scan.png "Is there effusion?" --model portable',
        ),
    ),
    Support(
        *((7, 0), "7.0, 7.1", ("Thor",), "3.12", "13.0", "10.13", "11.0"),
        *("onnxruntime", _CPU, _CPU_FORM),
        f"TensorRT 11.0 to 11.3 run on no JetPack. {_UPGRADE}",
        _VENV,
    ),
    Support(
        *((7, 2), "7.2, 7.2.1", _ALL, "3.12", "13.2", "10.x", "8.7, 11.0"),
        *("onnxruntime", _CPU, _CPU_FORM),
        f"TensorRT 11.0 to 11.3 run on no JetPack. {_UPGRADE}",
        _VENV,
    ),
    Support(
        *((7, 2, 2), "7.2.2 and later", ("AGX Orin", "Thor"), "3.12", "13.2"),
        *("11.4.1, installed from the SBSA package", "8.7, 11.0", "tensorrt"),
        "int8, int4, mixed weights; fp16 or bf16 activations",
        "opset 24 with TensorScatter, experts as an AOT plugin",
        "Install TensorRT 11.4.1 (Linux SBSA package) first: JetPack brings 10.x.",
        (
            "python3 -m venv --system-site-packages ~/medmoe",
            "~/medmoe/bin/pip install 'medmoe-edge[images,tensorrt]'",
            "~/medmoe/bin/medmoe-edge export portable --target tensorrt --gpu GPU -o engines",
            '~/medmoe/bin/medmoe-edge ask scan.png "Is there effusion?" --model engines',
        ),
    ),
)


class BestPath(NamedTuple):
    """What works best on a Jetson: the row of the matrix, in one `line`, and what to type."""

    row: Support
    line: str
    commands: tuple[str, ...]


def best_path(jetson: Jetson) -> BestPath | None:
    """What works on a Jetson with the software it has; None where its JetPack is not known."""
    if jetson.jetpack is None:
        return None
    version = parse_version(jetson.jetpack)
    fitting = [
        row
        for row in SUPPORT
        if version >= row.since and (jetson.board is None or jetson.board in row.boards)
    ]
    row = max(fitting or SUPPORT[:1], key=lambda each: each.since)
    gpu = "thor" if jetson.board == "Thor" else "orin"
    commands = tuple(command.replace("--gpu GPU", f"--gpu {gpu}") for command in row.commands)
    if row.target is None:
        line = f"JetPack {jetson.jetpack}: not supported. {row.why}"
    elif row.target == "onnxruntime":
        line = f"JetPack {jetson.jetpack}: on the CPU with ONNX Runtime. {row.why}"
    else:
        line = f"JetPack {jetson.jetpack}: on the GPU with TensorRT (never run yet). {row.why}"
        if jetson.tensorrt and parse_version(jetson.tensorrt) >= OLDEST_TENSORRT:
            line = line.replace(row.why, f"TensorRT {jetson.tensorrt} is there.")
    return BestPath(row, line, commands)


def check_tensorrt(version: str, jetson: Jetson | None) -> None:
    """Raise `ResourceError` for a TensorRT that cannot build the graph, before anything is done.

    Besides for its version: on a Jetson on which NVIDIA supports none that could.
    """
    path = best_path(jetson) if jetson else None
    if parse_version(version) >= OLDEST_TENSORRT:
        if jetson and path and path.row.target != "tensorrt":
            raise ResourceError(
                f"TensorRT {version} is not for {jetson.model} with JetPack {jetson.jetpack}.",
                path.line,
            )
        return
    oldest = ".".join(map(str, OLDEST_TENSORRT))
    later = (since for since in SINCE if parse_version(version)[:2] < since <= OLDEST_TENSORRT)
    raise ResourceError(
        f"The graph and its plugin need TensorRT {oldest}, and here is {version}, which has not: "
        f"{'; '.join(SINCE[since] for since in later)}.",
        path.line
        if path
        else f"Install TensorRT {oldest}, or stay on the CPU with the portable bundle.",
    )


def parse_version(text: str) -> Version:
    """The leading numbers of a version: `10.3.0.30-1+cuda12.5` gives (10, 3, 0, 30)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def find_jetson(
    root: Path = Path("/"), ask: Callable[[], str | None] | None = None
) -> Jetson | None:
    """Read the files of a Jetson under `root`; None elsewhere.

    Args:
        root: Where the file system begins.
        ask: Asks for the power mode where no file tells; None: `nvpmodel -q`.
    """
    model = _text(root / "proc/device-tree/model")
    release = _text(root / "etc/nv_tegra_release")
    if release is None and (model is None or "Jetson" not in model):
        return None
    found = L4T.search(release or "")
    l4t = f"{found[1]}.{found[2]}" if found else None
    packages = _packages(root / "var/lib/dpkg/status")
    jetpack = packages.get("nvidia-jetpack") or packages.get("nvidia-jetpack-runtime")
    return Jetson(
        model=(model or "Jetson").rstrip("\0\n "),
        release=l4t,
        power_mode=_power_mode(root) or (ask or ask_power_mode)(),
        jetpack=jetpack or _jetpack_of(l4t),
        tensorrt=packages.get("libnvinfer"),
        cuda=_cuda(root),
        fastest_mode=_fastest_mode(root),
    )


def ask_power_mode() -> str | None:
    """What `nvpmodel -q` says: MAXN, 15W, ...; None where it cannot be asked."""
    try:
        asked = subprocess.run(
            ["nvpmodel", "-q"], capture_output=True, text=True, timeout=2, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = POWER_MODE.search(asked.stdout)
    return found[1] if found else None


def _power_mode(root: Path) -> str | None:
    """From the number that the service keeps and the names in its configuration."""
    kept = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    return _power_modes(root).get(int(kept[1])) if kept else None


def _fastest_mode(root: Path) -> int | None:
    """MAXN_SUPER where the board has it, else MAXN."""
    numbers = {name: number for number, name in _power_modes(root).items()}
    return numbers.get("MAXN_SUPER", numbers.get("MAXN"))


def _power_modes(root: Path) -> dict[int, str]:
    found = POWER_MODEL.findall(_text(root / "etc/nvpmodel.conf") or "")
    return {int(number): name for number, name in found}


def _jetpack_of(l4t: str | None) -> str | None:
    """The JetPack of a Jetson Linux, by the table; newer ones are of the newest that is known."""
    if l4t is None:
        return None
    known = [first for first in JETPACK_OF if first <= parse_version(l4t)]
    return JETPACK_OF[max(known)] if known else "4"


def _packages(status: Path) -> dict[str, str]:
    """Versions of some installed Debian packages; of TensorRT's library whatever its number."""
    found: dict[str, str] = {}
    text = _text(status) or ""
    for block in text.split("\n\n"):
        name = re.search(r"^Package: (nvidia-jetpack(?:-runtime)?|libnvinfer)\d*$", block, re.M)
        version = re.search(r"^Version: (?:\d+:)?(\d[\d.]*)", block, re.M)
        if name and version and "ok installed" in block:
            found[name[1]] = version[1]
    return found


def _cuda(root: Path) -> str | None:
    try:
        data: Any = json.loads(_text(root / "usr/local/cuda/version.json") or "")
        return str(data["cuda"]["version"])
    except (ValueError, LookupError, TypeError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
