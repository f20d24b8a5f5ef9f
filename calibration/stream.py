"""A model run one decoder layer at a time over all calibration samples, in fp32.

The samples' hidden states lie in two files: layer n reads `n % 2` and writes the other. What a
layer reads is not touched before the next layer runs, so a layer may be run again at any time
until then.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from medmoe_edge._types import Progress
from medmoe_edge.calibration.routing import UNKNOWN
from medmoe_edge.calibration.samples import Sample
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.errors import CheckpointError
from medmoe_edge.image.loading import preprocess
from medmoe_edge.models.decoder import causal_mask, make_norm, rotary_tables
from medmoe_edge.models.med_moe import DECODERS, TOWERS, projector

Module = TypeVar("Module", bound=nn.Module)


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
    progress: Callable[[int], None],
) -> None:
    """Write what enters the first decoder layer; vision tower and projector are loaded meanwhile.

    Of the embedding table, mapped from its shard, only the rows in use stay in memory.
    """
    config = checkpoint.config
    with torch.device("meta"):
        vision, project = TOWERS[config.vision.kind](config.vision), projector(config)
    load_weights(vision, checkpoint, "vision.")
    load_weights(project, checkpoint, "projector.")
    table = checkpoint.tensor("decoder.embed.weight")
    check_finite(table, "decoder.embed.weight")
    for index, sequence in enumerate(sequences):
        progress(index)
        pixels = torch.from_numpy(preprocess(sequence.sample.load(), config.vision))
        image = project(vision(pixels))[0]  # [N, D]
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
            f"The tensor {name} holds values that are infinite or no numbers.",
            "Its training diverged: use an earlier checkpoint.",
        )


class LayerStream:
    """The decoder over some samples; raises `CheckpointError` for weights that are not finite."""

    def __init__(
        self, checkpoint: Checkpoint, samples: Sequence[Sample], work: Path, progress: Progress
    ) -> None:
        self.checkpoint, self.config, self.progress = checkpoint, checkpoint.config, progress
        self.work = work
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
            lambda done: self.progress("images", done, total),
        )
        states.path = states.path.rename(whole)
