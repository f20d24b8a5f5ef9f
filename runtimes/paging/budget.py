"""A memory budget as it is written: `1500MB`, `2GiB`, or `50%` of all routed experts."""

import math
import re

from medmoe_edge.errors import InputError

UNITS: dict[str, int] = {
    **{unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb"))},
    **{unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib"), 1)},
}
FORM = re.compile(r"(\d+(?:\.\d+)?) ?(%|[a-z]+)", re.ASCII | re.IGNORECASE)


def budget_bytes(text: str, experts: int) -> int:
    """The budget in bytes, for a model whose routed experts take `experts` bytes in memory.

    Raises `InputError` for what is no budget.
    """
    found = FORM.fullmatch(text.strip())
    unit = found[2].lower() if found else ""
    if found is None or (unit != "%" and unit not in UNITS):
        raise InputError(
            f"{text!r} is no memory budget.",
            "Write bytes, as 1500MB or 2GiB, or a share of all experts, as 50%.",
        )
    whole = experts / 100 if unit == "%" else UNITS[unit]
    return math.floor(float(found[1]) * whole)
