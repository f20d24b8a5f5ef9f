"""A long prompt in several steps."""

import math
from collections.abc import Callable

import numpy as np

from medmoe_edge.runtimes.base import Floats, Step


def in_parts(embeds: Floats, at_once: int, run: Callable[[Floats], Step]) -> Step:
    """`run` on `[S, D]` embeddings in as few parts of at most `at_once` tokens as will do.

    The parts are as long as each other, give or take one; what they yield is joined to one step.
    """
    steps = [run(part) for part in np.array_split(embeds, math.ceil(len(embeds) / at_once))]
    return Step(steps[-1].logits, np.concatenate([step.router_logits for step in steps]))
