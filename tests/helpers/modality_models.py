"""Tiny MedMoE checkpoints for tests: random, with a vocabulary of letters."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

from medmoe_edge.checkpoint.contrastive import write_modality_checkpoint
from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.models.contrastive import ModalityMoE
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.training.initialise import random_modality_model

TINY = MODALITY_PRESETS["modality-tiny"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def tiny_model(
    *, config: ModalityConfig = TINY, shared_expert: bool = False, seed: int = 3
) -> ModalityMoE:
    """Weights large enough to send images to different experts."""
    config = replace(config, shared_expert=shared_expert)
    made = random_modality_model(config, seed=0).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


def letters(path: Path) -> Path:
    """A `tokenizer.json` of word pieces that are single letters."""
    pieces = [*MARKS, *LETTERS, *(f"##{letter}" for letter in LETTERS), ",", "."]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.decoder = decoders.WordPiece()
    made.save(str(path))
    return path


def write_tiny(
    folder: Path, model: ModalityMoE | None = None, scores: dict[str, float] | None = None
) -> Path:
    """A checkpoint folder, as training writes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = letters(folder.parent / "letters.json")
    write_modality_checkpoint(folder, model or tiny_model(), tokenizer_file=words)
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores))
    return folder
