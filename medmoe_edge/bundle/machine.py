"""The machine that a proof holds on: its processor, what that computes with, and ONNX Runtime."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medmoe_edge.config import Config

CPU_INFO = Path("/proc/cpuinfo")
Arithmetic = Literal["exact", "saturating"]

# What ONNX Runtime's kernels for 8-bit and 4-bit weights choose by, best first: the flags in
# /proc/cpuinfo and their usual names.
X86_FLAGS = {
    "amx_int8": "AMX int8",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512bw": "AVX-512",
    "avx2": "AVX2",
}
ARM_FLAGS = {"i8mm": "i8mm", "asimddp": "dotprod"}
BASELINE = {"x86_64": "SSE2", "aarch64": "NEON"}  # what every such processor has
# ARM's processors give a number in the place of a name: Arm's Main ID Register, part numbers.
ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
}


@dataclass(frozen=True)
class Machine(Config):
    """Where a model was verified.

    `flags` are the instruction sets that 8-bit and 4-bit weights profit from, best first; empty
    where the system does not tell. `arithmetic` is how int8 products are added: "exact", or
    "saturating" in 16 bits (`runtimes.ort.runtime`).
    """

    cpu: str
    architecture: str
    flags: tuple[str, ...]
    onnxruntime: str
    arithmetic: Arithmetic

    @property
    def best(self) -> str:
        """The best of its instruction sets."""
        return self.flags[0] if self.flags else "unknown"

    def computes_like(self, other: "Machine") -> bool:
        """Whether a proof on the other one holds here: the same instruction set, arithmetic, and
        ONNX Runtime up to its patch version; of processors that do not tell, the same name.
        """
        alike = self.flags or self.cpu == other.cpu
        return bool(alike) and self._kind == other._kind

    @property
    def _kind(self) -> tuple[str, ...]:
        minor = ".".join(self.onnxruntime.split(".")[:2])
        return self.architecture, self.best, self.arithmetic, minor

    def __str__(self) -> str:
        return f"{self.cpu} ({self.best}, {self.arithmetic} int8), ONNX Runtime {self.onnxruntime}"


def cpu_name(info: Path = CPU_INFO) -> str:
    """What this machine's processor calls itself."""
    text = _text(info)
    if found := re.search(r"^model name\s*:(.*)$", text, re.MULTILINE):
        return found[1].strip()
    if found := re.search(r"^CPU part\s*:\s*(\w+)", text, re.MULTILINE):
        return ARM_PARTS.get(found[1].lower(), f"ARM part {found[1]}")
    return platform.processor() or platform.machine()


def cpu_flags(info: Path = CPU_INFO) -> tuple[str, ...]:
    """The instruction sets that int8 and int4 kernels use, best first; empty off Linux."""
    known = cpu_features_here(info)
    there = tuple(name for name, here in known.items() if here)
    if not known or (baseline := BASELINE.get(platform.machine())) is None:
        return there
    return (*there, baseline)


def cpu_features_here(info: Path = CPU_INFO) -> dict[str, bool]:
    """`cpu_features` of this machine."""
    return cpu_features(_text(info))


def cpu_features(info: str) -> dict[str, bool]:
    """From the text of /proc/cpuinfo: which of these instruction sets are there, best first.

    Empty where it does not tell.
    """
    found = re.search(r"^(flags|Features)\s*:(.*)$", info, re.MULTILINE)
    if found is None:
        return {}
    flags = set(found[2].split())
    names = ARM_FLAGS if found[1] == "Features" else X86_FLAGS
    return {name: flag in flags for flag, name in names.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
