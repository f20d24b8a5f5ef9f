"""A long prompt in parts is the prompt."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge._types import Floats
from medmoe_edge.runtimes.base import Step, in_parts


@given(length=st.integers(1, 60), at_once=st.integers(1, 70))
def test_parts_are_few_and_even_and_joined(length: int, at_once: int) -> None:
    embeds = np.arange(length, dtype=np.float32)[:, None]
    seen: list[Floats] = []

    def run(part: Floats) -> Step:
        seen.append(part)
        return Step(part[-1], part[:, :, None])

    step = in_parts(embeds, at_once, run)
    np.testing.assert_array_equal(np.concatenate(seen), embeds)
    lengths = [len(part) for part in seen]
    assert max(lengths) <= at_once
    assert max(lengths) - min(lengths) <= 1
    assert len(seen) == -(-length // at_once)
    np.testing.assert_array_equal(step.logits, embeds[-1])
    np.testing.assert_array_equal(step.router_logits, embeds[:, :, None])
