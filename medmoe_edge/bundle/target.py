"""What a bundle's graphs run on: ONNX Runtime's providers, or an engine built for one GPU."""

from dataclasses import dataclass
from typing import Literal

from medmoe_edge.config import Config
from medmoe_edge.errors import ConfigError

TargetName = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
DType = Literal["fp32", "fp16", "bf16"]
DEFAULT: TargetName = "onnxruntime"


@dataclass(frozen=True)
class Target(Config):
    """The manifest's `target`; a bundle without one is for ONNX Runtime on a CPU.

    `dtype` is that of activations. Engines serve one `gpu` (a compute capability, sm89) and the
    `library_version` that built them; their cache holds `capacity` positions, and one prefill step
    at most `prefill` of them. Of a `paged` target the experts lie in a file of their own, and are
    brought into slots of the GPU's memory as they are needed.
    """

    name: TargetName = DEFAULT
    dtype: DType = "fp32"
    gpu: str = ""
    library_version: str = ""
    capacity: int = 0
    prefill: int = 0
    paged: bool = False

    def __post_init__(self) -> None:
        if self.is_engine and not (self.gpu and 0 < self.prefill <= self.capacity):
            raise ConfigError(
                f"The target {self.name} names no GPU, or a prefill of {self.prefill} in "
                f"{self.capacity} positions.",
                "Export the bundle again.",
            )

    @property
    def is_engine(self) -> bool:
        """Whether the bundle holds engines in the place of graphs."""
        return self.name.startswith("tensorrt")

    def __str__(self) -> str:
        parts = (self.name, self.gpu, self.dtype, "paged" if self.paged else "")
        return " ".join(part for part in parts if part)
