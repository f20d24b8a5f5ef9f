"""Jetsons: what software one has, which TensorRT goes with it, and what to type there.

A Jetson's TensorRT comes with its JetPack, and knows what its version knows: graphs are written in
the operators of its parser (`passes/tensorrt_parser.py`), from `OLDEST_TENSORRT` on. The tables are
facts from NVIDIA's pages, read in November 2026; none of their GPU rows has run on a Jetson yet.

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
IN_PLACE: Version = (10, 15)  # the operator TensorScatter: a cache that is written in place
# What a version of TensorRT brought, and how the `tensorrt` target's graph is then written.
SINCE: dict[Version, tuple[str, str]] = {
    (10, 3): (
        "opsets to 20; strongly typed networks; no AOT plugins",
        "all experts on every token, attention by MatMul and Softmax, a cache that is copied; "
        "4 bits become 8 when an engine is built",
    ),
    (10, 9): (
        "plugins compiled ahead of time from Python (aot_impl); opset 21, blocks of 4 bits",
        "chosen experts only, by the plugin; 4 bits stay",
    ),
    (10, 13): ("opsets to 24; engines written as they are built", "the same"),
    (10, 14): ("the operator Attention", "attention in one operator"),
    (10, 15): (
        "the operators RotaryEmbedding and TensorScatter",
        "rotation in one operator; a cache written in place",
    ),
    (10, 16): ("a layer for experts of its own (newest GPUs first)", "the same; not used"),
    (11, 0): (
        "operators of the parser's own (TRT_Attention, TRT_KVCacheUpdate, TRT_MoE)",
        "the same; not used",
    ),
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
_GPU = "int8, int4 weights; fp16 or bf16 activations"
_GPU_FORM = "as its TensorRT's parser takes it, see below"
_ENGINE = (
    "python3 -m venv --system-site-packages ~/medmoe",
    "~/medmoe/bin/pip install 'medmoe-edge[images,tensorrt]'",
    "~/medmoe/bin/medmoe-edge prove",
    "~/medmoe/bin/medmoe-edge export portable --target tensorrt --gpu GPU -o engines",
    '~/medmoe/bin/medmoe-edge ask scan.png "Is there effusion?" --model engines',
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
        "Its TensorRT comes for Python 3.10 only, which is older than this package takes: a newer "
        "Python is brought by uv, and has no TensorRT. JetPack 7.2 has both: flash it to use the "
        "GPU.",
        (
            "pip install uv && uv venv --python 3.12 ~/medmoe",
            "uv pip install --python ~/medmoe/bin/python 'medmoe-edge[images]'",
            '~/medmoe/bin/medmoe-edge ask scan.png "Is there effusion?" --model portable',
        ),
    ),
    Support(
        *((7, 0), "7.0, 7.1", ("Thor",), "3.12", "13.0", "10.13", "11.0"),
        *("tensorrt", _GPU, _GPU_FORM),
        "TensorRT 11 runs on no such JetPack; 10.13, which it brings, is what is used.",
        _ENGINE,
    ),
    Support(
        *((7, 2), "7.2, 7.2.1", _ALL, "3.12", "13.2", "10.x", "8.7, 11.0"),
        *("tensorrt", _GPU, _GPU_FORM),
        "TensorRT 11.0 to 11.3 run on no JetPack; the 10.x that it brings is what is used.",
        _ENGINE,
    ),
    Support(
        *((7, 2, 2), "7.2.2 and later", _ALL, "3.12", "13.2"),
        *("10.x; 11.4.1 from the SBSA package on AGX Orin, Thor", "8.7, 11.0", "tensorrt"),
        *(_GPU, _GPU_FORM),
        "On AGX Orin and Thor TensorRT 11.4.1 (Linux SBSA package) can be installed as well.",
        _ENGINE,
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
            line = line.replace(row.why, f"TensorRT {jetson.tensorrt} is there: {_form(jetson)}.")
    return BestPath(row, line, commands)


def _form(jetson: Jetson) -> str:
    """How the graph is written for the TensorRT that is there."""
    number = parse_version(jetson.tensorrt or "")
    return SINCE[max(since for since in SINCE if since <= number)][1]


def check_tensorrt(version: str, jetson: Jetson | None) -> None:
    """Raise `ResourceError` for a TensorRT that builds no graph of ours, before anything is done.

    Besides for its version: on a Jetson for one that NVIDIA does not make for its JetPack.
    """
    path, number = best_path(jetson) if jetson else None, parse_version(version)
    if number < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        raise ResourceError(
            f"Graphs are made for TensorRT {oldest} and later, and here is {version}.",
            path.line
            if path
            else f"Install TensorRT {oldest}, or stay on the CPU with the portable bundle.",
        )
    if jetson and path and not _runs_on(number, jetson):
        raise ResourceError(
            f"TensorRT {version} is not for {jetson.model} with JetPack {jetson.jetpack}.",
            path.line,
        )


def _runs_on(tensorrt: Version, jetson: Jetson) -> bool:
    """TensorRT 11: from 11.4.1 on, with JetPack 7.2.2, on AGX Orin and Thor. 10: everywhere."""
    if tensorrt < (11,):
        return True
    jetpack = parse_version(jetson.jetpack or "")
    boards = (None, "AGX Orin", "Thor")
    return tensorrt >= (11, 4, 1) and jetpack >= (7, 2, 2) and jetson.board in boards


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
    model = text_of(root / "proc/device-tree/model")
    release = text_of(root / "etc/nv_tegra_release")
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
    kept = re.search(r"pmode:(\d+)", text_of(root / "var/lib/nvpmodel/status") or "")
    return _power_modes(root).get(int(kept[1])) if kept else None


def _fastest_mode(root: Path) -> int | None:
    """MAXN_SUPER where the board has it, else MAXN."""
    numbers = {name: number for number, name in _power_modes(root).items()}
    return numbers.get("MAXN_SUPER", numbers.get("MAXN"))


def _power_modes(root: Path) -> dict[int, str]:
    found = POWER_MODEL.findall(text_of(root / "etc/nvpmodel.conf") or "")
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
    text = text_of(status) or ""
    for block in text.split("\n\n"):
        name = re.search(r"^Package: (nvidia-jetpack(?:-runtime)?|libnvinfer)\d*$", block, re.M)
        version = re.search(r"^Version: (?:\d+:)?(\d[\d.]*)", block, re.M)
        if name and version and "ok installed" in block:
            found[name[1]] = version[1]
    return found


def _cuda(root: Path) -> str | None:
    try:
        data: Any = json.loads(text_of(root / "usr/local/cuda/version.json") or "")
        return str(data["cuda"]["version"])
    except (ValueError, LookupError, TypeError):
        return None


def text_of(path: Path) -> str | None:
    """The text of a system's file; None where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
