"""Where activations are observed: a site is the input that one or several matrices share.

decoder.layers.N.attention.in       of q, k and v          (after the norm)
decoder.layers.N.attention.mixed    of out
decoder.layers.N.ffn.in, .hidden    of gate and up, or fc1; of down, or fc2 (a dense layer)
decoder.layers.N.ffn.experts.E.in   the same of one expert, which sees only its own tokens,
decoder.layers.N.ffn.meta.in        and of the meta expert, which sees all; `.hidden` likewise
decoder.head.in                     of the head
"""

import re

_SITES = {
    **dict.fromkeys(("q", "k", "v", "gate", "up", "fc1"), "in"),
    **dict.fromkeys(("down", "fc2"), "hidden"),
    "out": "mixed",
}
_EXPERT = re.compile(r"decoder\.layers\.(\d+)\.ffn\.experts\.(\d+)\.")


def site_of(weight: str) -> str | None:
    """The site whose activations a decoder matrix multiplies; None for routers and the rest."""
    owner, _, matrix = weight.removesuffix(".weight").rpartition(".")
    if weight == "decoder.head.weight":
        return "decoder.head.in"
    if not owner.startswith("decoder.layers.") or matrix not in _SITES:
        return None
    return f"{owner}.{_SITES[matrix]}"


def expert_of(name: str) -> tuple[int, int] | None:
    """Decoder layer and index of the routed expert that a weight or site belongs to."""
    match = _EXPERT.match(name)
    return (int(match[1]), int(match[2])) if match else None
