"""The BERT tower against transformers' `BertModel`, and its word features against a loop."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig as TheirConfig
from transformers import BertModel

from medmoe_edge.checkpoint.contrastive import bert_name
from medmoe_edge.config_contrastive import BertConfig
from medmoe_edge.models.contrastive import NO_WORD, BertTower
from medmoe_edge.presets import MODALITY_PRESETS

TINY = MODALITY_PRESETS["modality-tiny"].text


def theirs(config: BertConfig) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = BertModel(
        TheirConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_positions,
            layer_norm_eps=config.norm_eps,
        )
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def texts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, word indices and what is seen: a mark, words of one to three pieces, a mark, padding."""
    ids = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(1))
    words = torch.tensor(
        [
            [NO_WORD, 0, 1, 1, 1, 2, 2, NO_WORD],
            [NO_WORD, 0, NO_WORD, NO_WORD, NO_WORD, NO_WORD, NO_WORD, NO_WORD],
            [NO_WORD, NO_WORD, *[NO_WORD] * 6],
        ]
    )
    lengths = torch.tensor([8, 3, 2])
    return ids, words, torch.arange(8) < lengths[:, None]


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, hidden_size=24, heads=4, layers=6, vocab_size=70, norm_eps=1e-3)],
    ids=["four layers", "six layers"],
)
def test_every_hidden_state(config: BertConfig, tmp_path: Path) -> None:
    reference = theirs(config)
    reference.save_pretrained(tmp_path)  # type: ignore[operator]
    ours, weights = BertTower(config), load_file(tmp_path / "model.safetensors")
    ours.load_state_dict({name: weights[bert_name(name)] for name in ours.state_dict()})
    ids, _, seen = texts()
    expected = reference(ids, attention_mask=seen.long(), output_hidden_states=True).hidden_states
    states = ours.hidden_states(ids, seen)
    assert len(states) == config.layers + 1
    for state, wanted in zip(states, expected, strict=True):
        torch.testing.assert_close(state[seen], wanted[seen], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_word_pieces_of_the_last_four_layers_are_summed_into_words() -> None:
    torch.manual_seed(0)
    tower = BertTower(replace(TINY, layers=5))
    ids, words, seen = texts()
    features = tower(ids, words, seen)
    last_four = sum(tower.hidden_states(ids, seen)[2:])
    assert isinstance(last_four, torch.Tensor)
    pieces = last_four[0]
    by_hand = torch.stack([pieces[1], pieces[2] + pieces[3] + pieces[4], pieces[5] + pieces[6]])
    assert features.mask.tolist()[0] == [True] * 3 + [False] * 5
    torch.testing.assert_close(features.words[0, :3], by_hand)
    torch.testing.assert_close(features.pooled[0], by_hand.mean(0))
    torch.testing.assert_close(features.pooled[1], last_four[1, 1])
    assert features.words[~features.mask].count_nonzero() == 0
    assert not features.mask[2].any()
    assert features.pooled[2].count_nonzero() == 0  # no word: zeros, not NaN


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    tower = BertTower(TINY)
    ids, words, seen = texts()
    alone = tower(ids[1:2, :3], words[1:2, :3], seen[1:2, :3])
    together = tower(ids, words, seen)
    torch.testing.assert_close(together.pooled[1:2], alone.pooled, atol=1e-5, rtol=1e-5)
