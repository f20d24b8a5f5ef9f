"""A model run one decoder layer at a time over all calibration samples, in fp32.

The samples' hidden states lie in two files: layer n reads `n % 2` and writes the other. What a
layer reads is not touched before the next layer runs, so a layer may be run again at any time
until then.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from medmoe_edge.calibration.samples import Sample
from medmoe_edge.calibration.states import (
    States,
    check_finite,
    embed,
    load_weights,
    tokenise,
)
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.models.attention import causal_mask, rotary_tables
from medmoe_edge.models.med_moe import DECODERS

Progress = Callable[[str, int, int], None]


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
            norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
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
