"""What a request's paging was like: who ran, what it cost, how well it was predicted."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.runtimes.paging.store import Counts, Expert

Tokens = npt.NDArray[np.int64]


def paging_report(
    budget: int,
    counts: Counts,
    tokens: Tokens,
    layers: Iterable[int],
    predicted: set[Expert] | None,
) -> dict[str, Any]:
    """The `paging` of an answer, plain JSON values.

    `tokens` `[M, E]` counts the tokens that each expert of the decoder's `layers` got. `experts`
    are those that ran, by layer; see `Counts` for hits, late, misses and stall. `prediction` is
    None where nothing was predicted.
    """
    ran = {(int(row), int(expert)) for row, expert in np.argwhere(tokens)}
    return {
        "budget": budget,
        "experts": {
            str(layer): [int(expert) for expert in np.flatnonzero(row)]
            for layer, row in zip(layers, tokens, strict=True)
        },
        "hits": counts.hits,
        "late": counts.late,
        "misses": counts.misses,
        "loads": counts.loads,
        "bytes_read": counts.bytes_read,
        "stall": counts.stall,
        "prediction": None if predicted is None else _quality(predicted, ran, tokens),
    }


def _quality(predicted: set[Expert], ran: set[Expert], tokens: Tokens) -> dict[str, float]:
    """How good it was to expect the experts `predicted`, and how good that is by chance.

    `precision` is the share of them that ran, and `chance` what as many drawn blindly would reach,
    which with four experts to a layer is a lot; `recall` the share of those that ran; `tokens` the
    share of routed tokens that they got, `tokens_chance` as above. `gain` is `tokens` over that.
    """
    right = len(predicted & ran)
    share = sum(int(tokens[expert]) for expert in predicted) / max(int(tokens.sum()), 1)
    chance = len(predicted) / tokens.size
    return {
        "precision": right / max(len(predicted), 1),
        "recall": right / max(len(ran), 1),
        "chance": len(ran) / tokens.size,
        "tokens": share,
        "tokens_chance": chance,
        "gain": share / chance if chance else 0.0,
    }
