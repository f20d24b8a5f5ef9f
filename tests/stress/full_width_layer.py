"""Builds the engine of one StableLM-2-1.6B layer with experts, of random weights; prints a JSON.

    python tests/stress/full_width_layer.py int4 sm89 FOLDER

A process of its own, so that its peak memory is the build's. What is `left` of it afterwards, in
bytes, is what the next engine of a decoder would have less.
"""

import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medmoe_edge.bundle.bundle import Target
from medmoe_edge.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from medmoe_edge.export.builder import save_model
from medmoe_edge.export.gpus import find_gpu
from medmoe_edge.export.quantise import INTEGERS, no_values
from medmoe_edge.export.stored import specify
from medmoe_edge.export.targets import decoder_profiles, lower
from medmoe_edge.export.tensorrt_builder import build_engine

GROUP = 32
CONFIG = ModelConfig(
    VisionConfig("clip", 336, 1024, (0.0,) * 3, (1.0,) * 3, layers=24, heads=16, patch_size=14),
    DecoderConfig("stablelm", 2048, 1, 32, 5632, vocab_size=512, rotary_fraction=0.25),
    MoEConfig((0,), top_k=1),
)


class RandomWeights:
    """Weights of that layer, made as they are read."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def names_under(self, prefix: str) -> list[str]:
        raise AssertionError("only a dense layer is asked for its names")

    def tensor(self, name: str) -> ir.TensorProtocol:
        shape = shape_of(name)
        if self.quantised(name) is not None:
            return ir.LazyTensor(no_values, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
        return ir.tensor(random(name, shape), name=name)

    def quantised(self, name: str) -> tuple[ir.TensorProtocol, ir.TensorProtocol] | None:
        if not name.endswith(".weight") or "norm" in name or "router" in name:
            return None
        shape = shape_of(name)
        kind, dtype = INTEGERS[self.bits]
        half = 2 ** (self.bits - 1)
        scales = [shape[0] // GROUP, shape[1]] if self.bits == 4 else [shape[1]]

        def integers() -> ir.TensorProtocol:
            drawn = generator(name).integers(-half, half, shape, np.int8)
            return ir.tensor(drawn.astype(dtype, copy=False), name=name)

        scale = np.abs(random(name, scales)) + np.float32(1e-3)
        stored = scale.astype(np.float16) if self.bits == 4 else scale
        return (
            ir.LazyTensor(integers, kind, shape=ir.Shape(shape), name=name),
            ir.tensor(stored, name=f"{name}.scale"),
        )


def shape_of(name: str) -> list[int]:
    """As MatMul reads it, `[in, out]`."""
    decoder = CONFIG.decoder
    size, hidden = decoder.hidden_size, decoder.intermediate_size
    part, kind = name.split(".")[-2:]
    out = {"gate": hidden, "up": hidden, "router": 4, "head": decoder.vocab_size}.get(part, size)
    if kind == "bias" or "norm" in part:
        return [out]
    return [hidden if part == "down" else size, out]


def generator(name: str) -> np.random.Generator:
    """One for each weight: TensorRT stores equal ones once."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def random(name: str, shape: list[int]) -> npt.NDArray[np.float32]:
    return generator(name).normal(0, 0.01, shape).astype(np.float32)


def held() -> int:
    """Bytes of this process beside mapped files; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def main(precision: str, gpu: str, folder: Path) -> None:
    target = Target("tensorrt-rtx", "fp16", gpu, "any", 1024, 1024)
    model = specify(CONFIG, RandomWeights(int(precision[-1])))
    lower(model, CONFIG, target)
    save_model(model, folder, "decoder")
    before = held()
    built = build_engine(
        folder / "decoder.onnx",
        folder / "decoder.engine",
        library="tensorrt-rtx",
        gpu=find_gpu(gpu, "tensorrt-rtx"),
        profiles=decoder_profiles(CONFIG, target, {}),
        cache=folder / "cache",
    )
    weights = (folder / "decoder.data").stat().st_size
    print(
        json.dumps(
            {
                "weights": weights,
                "engine": built.bytes,
                "seconds": built.seconds,
                "peak_memory": built.peak_memory,
                "left": held() - before,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
