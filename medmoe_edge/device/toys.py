"""Toy decoders: random weights of any size in the exporter's own graphs, for microbenchmarks."""

import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.calibration.sites import site_of
from medmoe_edge.checkpoint.keys import decoder_parameters
from medmoe_edge.config import ModelConfig
from medmoe_edge.device.costs import Precision
from medmoe_edge.export.builder import tensor_of
from medmoe_edge.export.decoder import DecoderBuilder
from medmoe_edge.export.dequantise import insert_dequantise
from medmoe_edge.export.external_data import save_model
from medmoe_edge.export.moe_op import MoESpec
from medmoe_edge.export.passes.ort_attention import lower_attention
from medmoe_edge.export.passes.ort_matmul import lower_matmul
from medmoe_edge.export.passes.ort_moe import lower_moe
from medmoe_edge.export.passes.ort_qkv import fuse_qkv
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

HEAD = "decoder.head.weight"
GROUP = 32
VOCABULARY = 256
DEVIATION = 0.02


class RandomParameters:
    """A decoder's parameters, noise: what they are has no bearing on how long they take."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = decoder_parameters(config)

    def names_under(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)]

    def tensor(self, name: str) -> ir.TensorProtocol:
        """One parameter, matrices as MatMul reads them, `[in, out]`."""
        shape = self.shapes[name][::-1]
        return _lazy(name, ir.DataType.FLOAT, shape)


def resized(config: ModelConfig, width: int, layers: int, experts: bool) -> ModelConfig:
    """A decoder of the same kind, with or without experts in all its layers, `width` wide or the
    next width that its heads and groups of weights divide.
    """
    decoder, moe = config.decoder, config.moe
    unit = int(np.lcm(decoder.head_size, GROUP))
    size = max(width // unit, 1) * unit
    middle = max(size * decoder.intermediate_size // decoder.hidden_size // GROUP, 1) * GROUP
    return replace(
        config,
        decoder=replace(
            decoder,
            hidden_size=size,
            heads=size // decoder.head_size,
            intermediate_size=middle,
            layers=layers,
            vocab_size=VOCABULARY,
        ),
        moe=replace(moe, layers=tuple(range(layers))) if moe and experts else None,
    )


def toy_runtime(config: ModelConfig, precision: Precision, folder: Path) -> OrtRuntime:
    """Write the decoder that `config` describes into an empty `folder`, and open it."""
    model = DecoderBuilder(config, RandomParameters(config)).model()
    if precision != "fp32":
        _quantise(model, precision)
    if config.moe is not None:
        lower_moe(model, MoESpec.of(config))
    lower_attention(model)
    fuse_qkv(model)
    lower_matmul(model)
    save_model(model, folder, "decoder")
    np.save(folder / "embedding.npy", np.zeros((1, config.decoder.hidden_size), np.float16))
    shutil.copyfile(folder / "decoder.onnx", folder / "vision.onnx")  # looked into, never run
    files = dict.fromkeys(path.name for path in folder.iterdir())
    return OrtRuntime(Bundle(folder, {"files": files}, config, ""), device="cpu")


def _quantise(model: ir.Model, precision: Precision) -> None:
    for name, value in list(model.graph.initializers.items()):
        if site_of(name) is None:
            continue
        rows, columns = tensor_of(value).shape.numpy()
        per_channel = precision == "int8" or name == HEAD
        integers = ir.DataType.INT8 if per_channel else ir.DataType.INT4
        scale = ir.DataType.FLOAT if per_channel else ir.DataType.FLOAT16
        insert_dequantise(
            model.graph,
            value,
            _lazy(name, integers, (rows, columns)),
            _lazy(f"{name}.scale", scale, (columns,) if per_channel else (rows // GROUP, columns)),
        )


def _lazy(name: str, kind: ir.DataType, shape: tuple[int, ...]) -> ir.LazyTensor:
    """Noise of its own: ONNX Runtime keeps equal tensors once, which caches would then hold."""

    def tensor() -> ir.TensorProtocol:
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        if kind in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            values = (generator.random(shape, np.float32) + 0.5) * np.float32(DEVIATION)
        else:
            largest = 7 if kind == ir.DataType.INT4 else 127
            values = generator.integers(-largest, largest + 1, shape, np.int8)
        return ir.tensor(values.astype(kind.numpy()), dtype=kind, name=name)

    return ir.LazyTensor(tensor, kind, shape=ir.Shape(shape), name=name)
