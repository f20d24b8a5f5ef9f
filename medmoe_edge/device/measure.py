"""This machine's speeds from microbenchmarks, and a prediction compared with a measurement.

The microbenchmarks are toy decoders: random weights of any size, written by our exporter and run by
our runtime, so that they pay what a real decoder pays. Each coefficient of `Speed` is what the
differences between them leave:

    step, dense, byte     one token: 1 layer, 3 layers, and a decoder too large for the caches
    moe                   one token: layers with experts
    operation, attention, value     128 and 512 rows of narrow layers, 128 of wide ones
    expert                128 rows of layers with experts, whose tokens choose all of them

A time is the shortest of many, taken in turns: what the machine does undisturbed.
"""

import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import onnx_ir as ir
from scipy.optimize import nnls

from medmoe_edge._types import there
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.calibration.statistics import input_of
from medmoe_edge.checkpoint.keys import decoder_parameters
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import Told
from medmoe_edge.export.builder import save_model, tensor_of
from medmoe_edge.export.decoder import DecoderBuilder, MoESpec
from medmoe_edge.export.passes.ort_cpu import fuse_qkv, lower_attention, lower_matmul, lower_moe
from medmoe_edge.export.quantise import insert_dequantise
from medmoe_edge.runtimes.costs import (
    NEW_TOKENS,
    TEXT_TOKENS,
    Asked,
    Precision,
    Speed,
    bits_per_weight,
    step_seconds,
    step_work,
)
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

HEAD = "decoder.head.weight"
GROUP = 32
VOCABULARY = 256
DEVIATION = 0.02
ROUNDS = 5  # of a comparison
SECONDS = 1.5  # of microbenchmarks per precision


@dataclass(frozen=True)
class Sizes:
    """How large the toy decoders are, and how long each probe has its turn.

    Attributes:
        narrow: Width of layers that lie in caches, yet wide enough for all threads.
        wide: Width of layers that do not.
        rows: Tokens of a prefill.
        more_rows: Tokens of a longer one.
        streamed: Bytes of weights that no cache holds: several times those of a PC.
        rest: Seconds before a turn; the threads of the last session spin a while, in its way.
        slot: Seconds at least of a turn.
    """

    narrow: int = 320
    wide: int = 1024
    rows: int = 128
    more_rows: int = 512
    streamed: int = 96 * 2**20
    rest: float = 0.03
    slot: float = 0.05


def measure_speeds(
    config: ModelConfig,
    precisions: Iterable[Precision],
    seconds: float = SECONDS,
    sizes: Sizes | None = None,
) -> dict[Precision, Speed]:
    """Measure this CPU.

    Args:
        config: The decoders are of its kind.
        precisions: What to measure.
        seconds: About how long each takes.
        sizes: Of the toy decoders.

    Returns:
        The speed at each precision.
    """
    speeds: dict[Precision, Speed] = {}
    for precision in precisions:
        kernels = kernels_of(precision)
        if kernels not in speeds:
            with Microbenchmarks(config, kernels, sizes) as bench:
                bench.run(seconds)
            speeds[kernels] = bench.speed()
        speeds[precision] = speeds[kernels]
    return speeds


def kernels_of(precision: Precision) -> Precision:
    """The precision whose kernels run another's weights: those of int4 serve a mixed model."""
    return "int4" if precision == "mixed" else precision


class Microbenchmarks:
    """The toy decoders of one precision, and the shortest time that each took; a context."""

    def __init__(
        self, config: ModelConfig, precision: Precision, sizes: Sizes | None = None
    ) -> None:
        self.precision: Precision = precision
        self.sizes = size = sizes or Sizes()
        self._stack = ExitStack()
        one, three = (resized(config, size.narrow, layers, experts=False) for layers in (1, 3))
        moe = resized(config, size.narrow, 3, experts=True)
        two = resized(config, size.wide, 2, experts=False)
        layers = max(int(2 * size.streamed / _work(two, 1, precision).bytes), 2)
        many = resized(config, size.wide, layers, experts=False)
        self.tokens = [(one, 1), (three, 1), (many, 1)]
        self.prefills = [(three, size.rows), (three, size.more_rows), (two, size.rows)]
        self.experts = [(moe, 1), (moe, size.rows)] if config.moe else []
        self.times: dict[tuple[ModelConfig, int], float] = {}

    def __enter__(self) -> Self:
        asked = [*self.tokens, *self.prefills, *self.experts]
        toys = {toy: self._open(toy) for toy in {toy for toy, _ in asked}}
        self._probes = {(toy, rows): _probe(toys[toy], rows) for toy, rows in asked}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, seconds: float) -> None:
        """Let every probe have its turn, again and again, at least once."""
        end = time.perf_counter() + seconds
        while True:
            for key, probe in self._probes.items():
                found = shortest(probe, self.sizes.slot, self.sizes.rest)
                self.times[key] = min(self.times.get(key, float("inf")), found)
            if time.perf_counter() > end:
                return

    def speed(self) -> Speed:
        """The coefficients that explain the times."""
        rows = [
            (1.0, toy.decoder.layers, _work(toy, count, self.precision).bytes)
            for toy, count in self.tokens
        ]
        step, dense, byte = solve(rows, [self.times[key] for key in self.tokens])
        rest = [self.times[key] - step - key[0].decoder.layers * dense for key in self.prefills]
        works = [_work(*key, self.precision) for key in self.prefills]
        costs = [(work.operations, work.attention, work.values) for work in works]
        operation, attention, value = solve(costs, rest)
        speed = Speed(byte, operation, attention, value, step, dense)
        for toy, count in self.experts:
            known = step_seconds(toy, self.precision, speed, count, 0)
            more = max(self.times[toy, count] - known, 0.0) / toy.decoder.layers
            moe = there(toy.moe)
            if count == 1:
                speed = replace(speed, moe=more)
            elif moe.num_experts > moe.top_k:
                speed = replace(speed, expert=more / (moe.num_experts - moe.top_k))
        return speed

    def _open(self, toy: ModelConfig) -> OrtRuntime:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        return toy_runtime(toy, self.precision, Path(folder))


def shortest(probe: Callable[[], None], slot: float, rest: float) -> float:
    """Seconds of the shortest run in a turn of `slot` seconds, one at least, after a rest."""
    time.sleep(rest)
    start, best = time.perf_counter(), float("inf")
    while True:
        before = time.perf_counter()
        probe()
        now = time.perf_counter()
        best = min(best, now - before)
        if now - start > slot:
            return best


def solve(rows: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[float, ...]:
    """The non-negative coefficients with the least relative error.

    Args:
        rows: What each time is made of, `[n, k]`.
        times: Seconds, `[n]`.

    Returns:
        Seconds per unit of each column, `[k]`.
    """
    scaled = np.asarray(rows, np.float64) / np.asarray(times, np.float64)[:, None]
    units = np.maximum(np.abs(scaled).max(0), np.finfo(np.float64).tiny)
    found, _ = nnls(scaled / units, np.ones(len(times)))
    return tuple((found / units).tolist())


class _Sum(NamedTuple):
    bytes: float
    operations: float
    attention: float
    values: float


def _work(config: ModelConfig, rows: int, precision: Precision) -> _Sum:
    """A step's work over all parts."""
    work = step_work(config, rows, 0)
    read = (n * bits_per_weight(kind, precision) / 8 for kind, n in work.weights.items())
    return _Sum(sum(read), sum(work.operations.values()), work.attention, work.values)


def _probe(runtime: OrtRuntime, rows: int) -> Callable[[], None]:
    cache = runtime.new_cache(rows)

    def run() -> None:
        cache.length = 0
        runtime.step(runtime.embed([0] * rows), cache)

    return run


@dataclass(frozen=True)
class Comparison(Told):
    """Seconds of prefill and of one token, as predicted and as measured undisturbed."""

    TOLD = ("ratios",)

    prompt_tokens: int
    predicted: Mapping[str, float]
    measured: Mapping[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Predicted over measured."""
        return {name: self.predicted[name] / seconds for name, seconds in self.measured.items()}


def compare(
    bundle: Bundle, *, seconds: float = 1.3, rounds: int = ROUNDS, sizes: Sizes | None = None
) -> tuple[Comparison, Speed]:
    """Run the bundle's decoder and the microbenchmarks in turns on the same prompt.

    Other work on the machine so hits both. The prediction never sees the model run.

    Args:
        bundle: A portable bundle.
        seconds: Of microbenchmarks in a round.
        rounds: How often each has its turn.
        sizes: Of the toy decoders.

    Returns:
        Prediction and measurement, and the speed that the prediction is made from.
    """
    config, asked = bundle.config, Asked.of_bundle(bundle)
    precision: Precision = bundle.manifest["quantisation"]["precision"]
    prompt, storage = asked.prompt, (asked.group, asked.deltas)
    runtime = OrtRuntime(bundle)
    cache = runtime.new_cache(prompt + NEW_TOKENS)
    side = config.vision.image_size
    generator = np.random.default_rng(0)
    image = runtime.encode_image(generator.standard_normal((1, 3, side, side), np.float32))
    ids = generator.integers(0, config.decoder.vocab_size, TEXT_TOKENS).tolist()
    embeds = np.concatenate((runtime.embed(ids), image))

    def prefill() -> None:
        cache.length = 0
        runtime.step(embeds, cache)

    def token() -> None:
        cache.length = prompt + NEW_TOKENS // 2
        runtime.step(runtime.embed(ids[:1]), cache)

    measured: dict[str, float] = {}
    with Microbenchmarks(config, kernels_of(precision), sizes) as bench:
        for _ in range(rounds):
            bench.run(seconds)
            for name, run, turns in (("prefill", prefill, 2), ("token", token, 1)):
                found = shortest(run, turns * bench.sizes.slot, bench.sizes.rest)
                measured[name] = min(measured.get(name, float("inf")), found)
    speed = bench.speed()
    predicted = {
        "prefill": step_seconds(config, precision, speed, prompt, 0, *storage),
        "token": step_seconds(config, precision, speed, 1, prompt + NEW_TOKENS // 2, *storage),
    }
    return Comparison(prompt, predicted, measured), speed


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
    return OrtRuntime(Bundle(folder, {"files": files, "name": "toy"}, config, ""), device="cpu")


def _quantise(model: ir.Model, precision: Precision) -> None:
    for name, value in list(model.graph.initializers.items()):
        if input_of(name) is None:
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
            # neighbours within the bound of `quantise.PAIR_BOUND`, as those of bundles are
            largest = 7 if kind == ir.DataType.INT4 else 63
            values = generator.integers(-largest, largest + 1, shape, np.int8)
        return ir.tensor(values.astype(kind.numpy()), dtype=kind, name=name)

    return ir.LazyTensor(tensor, kind, shape=ir.Shape(shape), name=name)
