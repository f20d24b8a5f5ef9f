"""The cost of a prompt against its length, as a picture."""

import secrets
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from medmoe_edge.bench.result import Bench
from medmoe_edge.bench.timing import Spread
from medmoe_edge.errors import InputError, ResourceError

FORMATS = (".png", ".svg", ".pdf")
BLUE = "#0072b2"  # of Okabe and Ito's colours


def check_format(file: Path) -> None:
    """Raise `InputError` unless the name says what kind of picture is wanted."""
    if file.suffix.lower() not in FORMATS:
        raise InputError(f"{file} names no picture format.", f"Use one of: {', '.join(FORMATS)}.")


def write_plot(bench: Bench, file: Path) -> None:
    """Seconds of a prefill, and of each of its tokens, by length; medians in their quartiles.

    The file appears whole or not at all. Raises `ResourceError` where it cannot be written.
    """
    check_format(file)
    lengths = [length.tokens for length in bench.lengths]
    whole = [length.seconds for length in bench.lengths]
    each = [_scaled(length.seconds, 1e3 / length.tokens) for length in bench.lengths]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    with mpl.rc_context({"text.parse_math": False}):  # a name with dollars is a name
        for axes, spreads, unit in zip(
            figure.subplots(1, 2), (whole, each), ("prefill, s", "per token, ms"), strict=True
        ):
            axes.plot(lengths, [spread.median for spread in spreads], "o-", color=BLUE)
            low, high = zip(*((spread.low, spread.high) for spread in spreads), strict=True)
            axes.fill_between(lengths, low, high, color=BLUE, alpha=0.2)
            axes.set(xlabel="prompt, tokens", ylabel=unit, xlim=(0, None), ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
        machine = f"{bench.machine.cpu}, {bench.machine.threads} threads"
        figure.suptitle(f"{bench.model} ({bench.precision}) on {machine}")
        part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
        try:
            figure.savefig(part, format=file.suffix[1:].lower())
            part.replace(file)
        except OSError as error:
            raise ResourceError(
                f"{file} cannot be written ({error.strerror}).", "Check its folder and disk."
            ) from error
        finally:
            part.unlink(missing_ok=True)


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(factor * spread.median, factor * spread.low, factor * spread.high, spread.count)
