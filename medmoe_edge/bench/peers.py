"""Other ways to run the model, measured in turns with our bundle, each in its own process."""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from medmoe_edge.bench import measurement, worker
from medmoe_edge.bench.backends import Kind
from medmoe_edge.bench.measurement import Allowance, Measured, Shape
from medmoe_edge.bench.worker import Measurement, Worker
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import InputError, ResourceError, Told, shown_bytes
from medmoe_edge.runtimes.costs import decoder_parts, vision_weights

State = Literal["measured", "not installed", "not enough memory", "failed"]
ALLOWANCE = 60.0  # seconds in which the turns with a peer are repeated
BESIDE = 1.1  # of a model's weights: what it computes with takes some memory too
_TORCH = ("torch", "safetensors")
_EXPORT = "pip install 'medmoe-edge[export]'"
_OURS = "the same model, tokens and vision tower"
_BITSANDBYTES = (
    _OURS,
    "the decoder's matrices quantised, with embeddings, norms, routers and vision in fp32",
    "loaded through fp32, so the peak while loading is not bitsandbytes' own",
)
_LLAMA = (
    "qwen2moe, random weights: as many stored, and as many used for a token",
    "RMSNorm without biases, q, k and v with, whole heads rotate, gated SiLU in Phi's place too",
    "experts in every layer and narrower, and a gate on the one that every token passes",
    "no vision tower: it is in neither its times nor its memory",
    "a KV cache in fp16; embeddings and head in Q8_0",
    "tokens are given, none is chosen from the logits",
)


@dataclass(frozen=True)
class Peer:
    """Another way to run the model.

    Attributes:
        form: torch's dtype, bitsandbytes' or llama.cpp's format; a bundle has none.
        bytes: Of a weight while it loads.
        packages: Modules that must be there, which `install` brings.
        differences: What else differs from our bundle.
    """

    name: str
    title: str
    kind: Kind
    form: str
    bytes: float
    packages: tuple[str, ...]
    install: str
    differences: tuple[str, ...]

    @property
    def missing(self) -> bool:
        """Whether a package is not installed."""
        return any(importlib.util.find_spec(name) is None for name in self.packages)


PEERS = (
    *(
        Peer(f"torch-{short}", f"PyTorch eager {short}", "torch", form, size, _TORCH, _EXPORT, told)
        for short, form, size, told in (
            ("fp32", "float32", 4, (_OURS, "all in fp32")),
            ("bf16", "bfloat16", 2, (_OURS, "all in bf16 but the routers, which are fp32")),
        )
    ),
    *(
        Peer(
            *(f"bitsandbytes-{form}", f"bitsandbytes {form}", "bitsandbytes", form, 4),
            (*_TORCH, "bitsandbytes"),
            "pip install 'medmoe-edge[baselines]'",
            _BITSANDBYTES,
        )
        for form in ("int8", "nf4")
    ),
    Peer(
        *("onnxruntime-fp32", "ONNX Runtime fp32", "bundle", "", 4),
        (*_TORCH, "onnx", "onnx_ir", "onnxscript"),
        _EXPORT,
        (_OURS, "our own exporter's graphs, all in fp32"),
    ),
    *(
        Peer(
            *(f"llama.cpp-{form.replace('_', '-')}", f"llama.cpp {form.upper()}", "llama", form),
            size,
            ("gguf", "llama_cpp"),
            "pip install 'medmoe-edge[peers]'",
            _LLAMA,
        )
        for form, size in (("q8_0", 34 / 32), ("q4_0", 18 / 32))  # a block: its bytes, its weights
    ),
)


def find_peers(names: Sequence[str]) -> tuple[Peer, ...]:
    """The peers of these names; raises `InputError`, which lists all."""
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise InputError(f"There is no peer {name!r}.", f"Use some of: {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(names))


@dataclass(frozen=True)
class Comparison(Told):
    """A peer beside our bundle, in the same minutes; or why it was not measured."""

    peer: Peer
    state: State
    ours: Measured | None = None
    theirs: Measured | None = None
    why: str = ""
    remedy: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        """Times as fast as the peer, by part; and our memory over the peer's."""
        if self.ours is None or self.theirs is None:
            return {}
        found = {
            name: theirs.median / self.ours.seconds[name].median
            for name, theirs in self.theirs.seconds.items()
        }
        for name in ("resident", "peak", "loading"):
            ours, theirs = getattr(self.ours, name), getattr(self.theirs, name)
            if ours and theirs:
                found[name] = ours / theirs
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; seconds and bytes."""
        own = super().to_json()
        peer = own.pop("peer")
        own |= {"name": peer["name"], "differences": peer["differences"], "ratios": self.ratios}
        return own | {"why": self.why or None, "remedy": self.remedy or None}


class Materials:
    """The files that peers load, made when the first one needs them; a context removes them."""

    def __init__(self, bundle: Bundle, checkpoint: Path | None) -> None:
        self.bundle, self._given = bundle, checkpoint

    def __enter__(self) -> "Materials":
        self._folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @cached_property
    def checkpoint(self) -> Path:
        """The one given, or one of random weights: what they are has no bearing on speed."""
        if self._given is not None:
            return self._given
        out = Path(self._folder.name) / "checkpoint"
        tokenizer = self.bundle.path("tokenizer.json")
        _make(
            "checkpoint",
            config=self.bundle.config.to_json(),
            tokenizer=str(tokenizer),
            out=str(out),
        )
        return out

    def model(self, peer: Peer, folder: Path) -> Path:
        """What a peer loads; made, if it is its alone, in `folder`."""
        if peer.kind in ("torch", "bitsandbytes"):
            return self.checkpoint
        out = folder / peer.name
        if peer.kind == "llama":
            _make("gguf", config=self.bundle.config.to_json(), form=peer.form, out=str(out))
        else:
            _make("bundle", checkpoint=str(self.checkpoint), out=str(out))
        return out


def compare(peer: Peer, materials: Materials, shape: Shape, rounds: int) -> Comparison:
    """Measure a peer in turns with the bundle; that it cannot be measured is a result too.

    There are `rounds` turns, or fewer if they take long. Raises `ResourceError` where the bundle's
    own process ends.
    """
    if peer.missing:
        return Comparison(peer, "not installed", why="Not installed.", remedy=peer.install)
    if short := _too_large(peer, materials.bundle):
        remedy = "Close other programs, or measure a smaller model."
        return Comparison(peer, "not enough memory", why=short, remedy=remedy)
    ours, allowance = Measurement(materials.bundle, shape), Allowance(ALLOWANCE)
    with worker.Worker() as own, worker.Worker() as other, tempfile.TemporaryDirectory() as folder:
        try:
            model = materials.model(peer, Path(folder))
            theirs = Measurement(materials.bundle, shape, peer.kind, model, peer.form)
            ours.open(own)
            theirs.open(other)
            for _ in range(rounds):
                allowance.take("turn", partial(_turn, {own: ours, other: theirs}))
        except ResourceError as error:
            if own.ended:  # which is no fault of the peer
                raise
            return Comparison(peer, "failed", why=error.what, remedy=error.remedy)
    return Comparison(peer, "measured", ours.result(), theirs.result())


def _turn(measured: Mapping[Worker, Measurement]) -> None:
    for own, gathered in measured.items():
        gathered.turn(own)


def _too_large(peer: Peer, bundle: Bundle) -> str | None:
    weights = sum(part.weights for part in decoder_parts(bundle.config).values())
    if peer.kind != "llama":
        weights += vision_weights(bundle.config)
    needed, free = BESIDE * peer.bytes * weights, measurement.available()
    if needed < free:
        return None
    return f"It needs about {shown_bytes(needed)} of memory, and {shown_bytes(free)} are free."


def _make(what: str, **arguments: Any) -> None:
    """Write a model in a process of its own: that takes memory and packages that we do not have."""
    with worker.Worker() as maker:
        maker.ask(f"make_{what}", **arguments)
