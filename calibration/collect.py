"""One pass over the calibration samples, layer by layer: memory holds one layer, not the model.

A layer is done once its statistics are in the work folder, so a killed pass goes on at the first
layer that has none.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from medmoe_edge._types import Floats, Progress, no_progress, there
from medmoe_edge.atomic import atomic_file, writing
from medmoe_edge.calibration.coverage import Neighbours, Pair
from medmoe_edge.calibration.data import Sample
from medmoe_edge.calibration.routing import UNKNOWN, RoutingProfile
from medmoe_edge.calibration.statistics import (
    FORMAT,
    InputStatistics,
    StatisticsFiles,
    input_of,
    write_statistics,
)
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.errors import CheckpointError, InputError
from medmoe_edge.image.loading import preprocess
from medmoe_edge.image.pixels import Image
from medmoe_edge.models.decoder import MoE, causal_mask, make_norm, rotary_tables, route
from medmoe_edge.models.med_moe import DECODERS, TOWERS, pooled_features, projector

Module = TypeVar("Module", bound=nn.Module)

Load = Callable[[Sample], Image]
"""Gives a sample's picture."""


class Pictures:
    """The samples' pictures and their image tokens, each computed once for all passes.

    The tokens lie in a file that goes with the object, as large as one of the hidden states.
    """

    def __init__(self, load: Load = Sample.load) -> None:
        self.load = load
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        weakref.finalize(self, self._file.close)
        self._offsets: dict[object, int] = {}  # in the file, by picture

    def tokens(self, sample: Sample, see: Callable[[Image], Tensor]) -> Tensor:
        """The image tokens `[N, D]` of a sample's picture, which `see` computes the first time."""
        kept = self.kept(sample)
        if kept is not None:
            return torch.from_numpy(kept)
        tokens = see(self.load(sample))
        with contextlib.suppress(OSError):  # a full disk: they are computed again then
            end = len(self._offsets) * 4 * tokens.numel()
            self._file.seek(end)
            self._file.write(tokens.contiguous().numpy().tobytes())
            self._file.flush()
            self._offsets[sample.picture], self._shape = end, tokens.shape
        return tokens

    def kept(self, sample: Sample) -> Floats | None:
        """The image tokens `[N, D]` of a sample's picture, if they were computed before."""
        offset = self._offsets.get(sample.picture)
        if offset is None:
            return None
        self._file.seek(offset)
        content = bytearray(self._file.read(4 * self._shape.numel()))
        return np.frombuffer(content, np.float32).reshape(self._shape)


@dataclass(frozen=True)
class TokenSequence:
    """A sample as the model is asked it: ids before the image, ids of question and answer."""

    sample: Sample
    modality: str
    before: list[int]
    after: list[int]


class States:
    """Hidden states `[T, D]` of every sample, one after another in one file of fp32.

    Read and written rather than mapped: a full disk is then an error and not a bus fault, and
    what was read does not stay in memory.
    """

    def __init__(self, path: Path, lengths: Sequence[int], width: int) -> None:
        self.path, self.width = path, width
        self._starts = np.cumsum([0, *lengths])

    def __getitem__(self, index: int) -> Tensor:
        start, end = self._starts[index : index + 2]
        row = 4 * self.width  # bytes
        count = int(end - start) * self.width
        values = np.fromfile(self.path, np.float32, count, offset=int(start) * row)
        return torch.from_numpy(values).view(-1, self.width)

    def __setitem__(self, index: int, states: Tensor) -> None:
        self.path.touch()
        with self.path.open("r+b") as file:
            file.seek(int(self._starts[index]) * 4 * self.width)
            states.contiguous().numpy().tofile(file)


def tokenise(checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[TokenSequence]:
    """Samples in the form that training uses, cut off at the model's last position.

    The end token is left out: it is predicted, never read. Raises `CheckpointError` where the
    checkpoint has no tokenizer.
    """
    config = checkpoint.config
    tokenizer = checkpoint.tokenizer.tokenizer
    before = tokenizer.prefix_ids()
    room = config.decoder.max_positions - config.vision.image_tokens - len(before)
    return [
        TokenSequence(
            sample,
            sample.modality or UNKNOWN,
            before,
            [
                *tokenizer.question_ids(sample.question),
                *(tokenizer.answer_ids(sample.answer) if sample.answer else []),
            ][: max(room, 0)],
        )
        for sample in samples
    ]


def embed(
    checkpoint: Checkpoint,
    sequences: Sequence[TokenSequence],
    states: States,
    pictures: Pictures,
    progress: Callable[[int], None],
) -> None:
    """Write what enters the first decoder layer; vision tower and projector are loaded meanwhile.

    Of the embedding table, mapped from its shard, only the rows in use stay in memory.
    """
    config = checkpoint.config
    with torch.device("meta"):
        vision = TOWERS[config.vision.kind](config.vision)
        project = projector(config.vision, config.decoder.hidden_size)
    load_weights(vision, checkpoint, "vision.")
    load_weights(project, checkpoint, "projector.")

    def see(image: Image) -> Tensor:
        pixels = torch.from_numpy(preprocess(image, config.vision))
        features = pooled_features(vision(pixels), config.vision.pool)
        tokens: Tensor = project(features)[0]  # [N, D]
        return tokens

    table = checkpoint.tensor("decoder.embed.weight")
    check_finite(table, "decoder.embed.weight")
    for index, sequence in enumerate(sequences):
        progress(index)
        image = pictures.tokens(sequence.sample, see)
        before, after = (table[ids].float() for ids in (sequence.before, sequence.after))
        states[index] = torch.cat((before, image, after))


def load_weights(module: Module, checkpoint: Checkpoint, prefix: str) -> Module:
    """Fill a module built on "meta" with the parameters under `prefix`, in fp32.

    Raises `CheckpointError` naming a tensor that is not finite.
    """
    tensors = {}
    for name in module.state_dict():
        tensor = checkpoint.tensor(prefix + name)
        check_finite(tensor, prefix + name)
        tensors[name] = tensor.float()
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `CheckpointError` for a tensor with infinities or NaN."""
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):  # NaN passes on to both
        raise CheckpointError(
            f"The tensor {name} holds values that are NaN or infinite.",
            "Its training diverged: use an earlier checkpoint.",
        )


class LayerStream:
    """The decoder over some samples; raises `CheckpointError` for weights that are not finite."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[Sample],
        work: Path,
        pictures: Pictures,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.config, self.progress = checkpoint, checkpoint.config, progress
        self.work, self.pictures = work, pictures
        self.sequences = tokenise(checkpoint, samples)
        self.modalities = [sequence.modality for sequence in self.sequences]
        image_tokens = self.config.vision.image_tokens
        self._starts = [len(sequence.before) + image_tokens for sequence in self.sequences]
        lengths = [
            start + len(sequence.after)
            for start, sequence in zip(self._starts, self.sequences, strict=True)
        ]
        size = self.config.decoder.hidden_size
        self._states = [States(work / name, lengths, size) for name in ("even", "odd")]

    def load_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights."""
        with torch.device("meta"):
            layer = DECODERS[self.config.decoder.kind].layer_type(self.config, index)
        return load_weights(layer, self.checkpoint, f"decoder.layers.{index}.")

    def forward(self, layer: nn.Module, index: int) -> Iterator[Tensor]:
        """Run decoder layer `index` over all samples; yields feed-forward inputs `[T, D]` of each.

        The layer before must have been run.
        """
        self._embed()
        before, after = self._states[index % 2], self._states[1 - index % 2]
        total = self.config.decoder.layers * len(self.sequences)
        for sample in range(len(self.sequences)):
            self.progress("layers", index * len(self.sequences) + sample, total)
            x = before[sample][None]  # [1, T, D]
            positions = torch.arange(x.shape[1])[None]
            tables = rotary_tables(self.config.decoder, positions)
            x, inputs = layer(x, tables, causal_mask(x.shape[1], 0, x.device), None)
            after[sample] = x[0]
            yield inputs[0]

    def of_image(self, sample: int, states: Tensor) -> Tensor:
        """Of a sample's states `[T, D]` those of its image's tokens `[N, D]`."""
        end = self._starts[sample]
        return states[end - self.config.vision.image_tokens : end]

    def head_inputs(self) -> Iterator[Tensor]:
        """Normed states `[T, D]` of each sample's question and answer, after the last layer."""
        check_finite(self.checkpoint.tensor("decoder.head.weight"), "decoder.head.weight")
        decoder = self.config.decoder
        with torch.device("meta"):
            norm = make_norm(decoder)
        load_weights(norm, self.checkpoint, "decoder.norm.")
        states = self._states[decoder.layers % 2]
        for sample, start in enumerate(self._starts):
            yield norm(states[sample][start:])

    def _embed(self) -> None:
        """Make what enters layer 0, once: a file appears only when it is whole."""
        states = self._states[0]
        if states.path.exists():
            return
        whole, states.path = states.path, states.path.with_suffix(".partial")
        total = len(self.sequences)
        embed(
            self.checkpoint,
            self.sequences,
            states,
            self.pictures,
            lambda done: self.progress("images", done, total),
        )
        states.path = states.path.rename(whole)


RUN, READ = "run.json", "modalities.json"

HEAD = "decoder.head.in"


class Observer:
    """Gathers `statistics`, by name, of the inputs of a module's `nn.Linear` modules.

    `input_of(name of a weight)` names the input, or says None for one that is not observed; what
    several matrices share is taken once. While `weights` `[T]` is set, the tokens
    count as borrowed. Activations that are not finite raise `CheckpointError`.
    """

    def __init__(
        self, module: nn.Module, input_of: Callable[[str], str | None], *, hessians: bool
    ) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self.weights: Tensor | None = None
        self._hessians = hessians
        self._linears: dict[str, nn.Linear] = {}
        self._hooks: list[RemovableHandle] = []
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear) and (found := input_of(f"{name}.weight")) is not None:
                self._linears.setdefault(found, part)

    def __enter__(self) -> Self:
        self._hooks = [self._watch(name, linear) for name, linear in self._linears.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, linear: nn.Linear) -> RemovableHandle:
        return linear.register_forward_pre_hook(lambda _, inputs: self.update(name, inputs[0]))

    def update(self, name: str, x: Tensor) -> None:
        """Add activations `[..., K]` to the input of that name."""
        tokens = x.detach().flatten(0, -2).float().cpu()  # [T, K]
        if not len(tokens):
            return
        if not all(extreme.isfinite() for extreme in tokens.aminmax()):
            raise CheckpointError(
                f"The activations of {name} are NaN or infinite.",
                "The weights before it are damaged: use another checkpoint.",
            )
        if name not in self.statistics:
            self.statistics[name] = InputStatistics.empty(tokens.shape[1], hessian=self._hessians)
        weights = None if self.weights is None else self.weights.numpy()
        self.statistics[name].update(tokens.numpy(), weights)


@dataclass(frozen=True)
class Collected:
    """What one pass left in its work folder: files of statistics, and the routing."""

    files: tuple[Path, ...]
    routing: RoutingProfile


def read_modalities(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    work: Path,
    *,
    pictures: Pictures | None = None,
    progress: Progress = no_progress,
) -> dict[object, str]:
    """What the model's own router reads in pictures: the modality of each, by `Sample.picture`.

    As the engine does: the expert with the highest router logit, averaged over the image's tokens
    and all MoE layers. One layer is in memory at a time; the last answer is kept in `work`, so that
    an interrupted run does not ask again. Raises as `collect`.
    """
    moe = there(checkpoint.config.moe)
    kept = work / READ
    identity = {
        "checkpoint": checkpoint.sha256(),
        "samples": hashlib.sha256(repr(list(samples)).encode()).hexdigest(),
    }
    with torch.inference_mode(), writing(work):
        _prepare(work, json.dumps(identity))
        if not kept.exists():
            stream = LayerStream(checkpoint, samples, work, pictures or Pictures(), progress)
            logits = torch.zeros(len(samples), moe.router_rows)
            for index in range(max(checkpoint.config.moe_layers) + 1):
                layer = stream.load_layer(index)
                for row, inputs in enumerate(stream.forward(layer, index)):
                    if isinstance(layer.ffn, MoE):
                        logits[row] += layer.ffn.router_logits(stream.of_image(row, inputs)).mean(0)
            with atomic_file(kept) as file:
                file.write(json.dumps(logits.argmax(1).tolist()).encode())
        found = json.loads(kept.read_text(encoding="utf-8"))
    return {
        sample.picture: moe.modalities[expert]
        for sample, expert in zip(samples, found, strict=True)
    }


def collect(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    work: Path,
    *,
    hessians: bool,
    pictures: Pictures | None = None,
    borrow: Mapping[Pair, int] | None = None,
    progress: Progress = no_progress,
) -> Collected:
    """Run `samples` through the checkpoint in fp32 and gather the statistics of every input.

    With `borrow`, instead only those of the experts that it names, each from so many tokens which
    the router sent elsewhere (`Neighbours`). `progress` is called with `(step, done,
    total)`.

    A pass that was interrupted goes on; what `work` holds of another pass (other samples, another
    checkpoint) is deleted first. Raises `InputError` for a folder that holds anything else,
    `CheckpointError` for weights or activations that are not finite, and `ResourceError` where
    the disk does not take it.
    """
    borrow = borrow or {}
    identity = {
        "format": FORMAT,
        "checkpoint": checkpoint.sha256(),
        "samples": hashlib.sha256(repr(list(samples)).encode()).hexdigest(),
        "hessians": hessians,
        "borrow": sorted(borrow.items()),
    }
    with torch.inference_mode(), writing(work):
        _prepare(work, json.dumps(identity))
        stream = LayerStream(checkpoint, samples, work, pictures or Pictures(), progress)
        last = max((layer for layer, _ in borrow), default=checkpoint.config.decoder.layers - 1)
        files = [_layer(stream, index, borrow, hessians) for index in range(last + 1)]
        if not borrow:
            files.append(_head(stream, hessians))
        contents = StatisticsFiles(files).contents
    profiles = (RoutingProfile.from_json(content["routing"]) for content in contents)
    return Collected(tuple(files), reduce(RoutingProfile.stack, profiles))


def _prepare(work: Path, identity: str) -> None:
    """Make the folder, or empty it if it holds another pass."""
    run = work / RUN
    if run.is_file():
        if run.read_text(encoding="utf-8") == identity:
            return
        shutil.rmtree(work)
    elif work.exists() and any(work.iterdir()):
        raise InputError(f"{work} holds other things.", "Give an empty folder to work in.")
    work.mkdir(parents=True, exist_ok=True)
    run.write_text(identity, encoding="utf-8")


def _layer(stream: LayerStream, index: int, borrow: Mapping[Pair, int], hessians: bool) -> Path:
    """The file of one decoder layer's statistics, made now unless it is there."""
    file = stream.work / f"layer-{index:02}.safetensors"
    if file.exists():
        return file
    layer = stream.load_layer(index)
    observer = Observer(
        layer, lambda name: input_of(f"decoder.layers.{index}.{name}"), hessians=hessians
    )
    neighbours = [Neighbours(e, count) for (at, e), count in borrow.items() if at == index]
    with contextlib.nullcontext() if borrow else observer:
        profile = _run(stream, layer, index, neighbours)
    if isinstance(layer.ffn, MoE):
        with observer:
            for near in neighbours:
                observer.weights = near.weights
                layer.ffn.experts[near.expert](near.tokens)
    write_statistics(file, observer.statistics, {"routing": profile.to_json()})
    return file


def _run(
    stream: LayerStream, layer: nn.Module, index: int, neighbours: Sequence[Neighbours]
) -> RoutingProfile:
    """Run a layer over all samples; count what its router chose, and nearly chose."""
    moe = layer.ffn if isinstance(layer.ffn, MoE) and layer.ffn.merged is None else None
    profile = _profile(stream, [] if moe is None else [index])
    for modality, inputs in zip(stream.modalities, stream.forward(layer, index), strict=True):
        if moe is None:
            continue
        logits = moe.router_logits(inputs)  # [T, E]
        _, chosen = route(logits, moe.top_k, rows=moe.rows)  # [T, K]
        profile.record(index, modality, chosen.numpy())
        for near in neighbours:
            likely = logits.softmax(-1)
            near.offer(inputs, likely if moe.rows is None else likely[:, moe.rows], chosen)
    return profile


def _head(stream: LayerStream, hessians: bool) -> Path:
    """The file of the head's statistics."""
    file = stream.work / "head.safetensors"
    if not file.exists():
        observer = Observer(nn.Identity(), input_of, hessians=hessians)
        for states in stream.head_inputs():
            observer.update(HEAD, states)
        write_statistics(file, observer.statistics, {"routing": _profile(stream, []).to_json()})
    return file


def _profile(stream: LayerStream, layers: Sequence[int]) -> RoutingProfile:
    moe = stream.config.moe
    return RoutingProfile.empty(stream.modalities, layers, moe.num_experts if moe else 0)
