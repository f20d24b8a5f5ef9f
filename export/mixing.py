"""Which format each matrix of a mixed export gets: by the noise that rounding it would add.

The loss of a matrix in a format is that noise relative to the residual stream: the squared relative
output error of some of its rows, times the power that its owner (attention, an expert, a dense
feed-forward) adds to the stream, over all that was added up to there. All of it follows from the
weights and the calibration's second moments. On nano, each matrix rounded alone, the measured
divergence of the answers was 0.6 to 3.1 times in proportion for eight matrices in ten; the first
attention's, the most sensitive by far, are the rest (6 times).
"""

from collections.abc import Iterator

import numpy as np

from medmoe_edge.calibration.formats import Floats, Format
from medmoe_edge.calibration.mixed import CHOICES, INT4, Candidate, allocate
from medmoe_edge.calibration.rounding import output_error, round_searched
from medmoe_edge.calibration.sites import site_of
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.export.weights import WeightSource

ROWS = 256  # of a matrix, on which its error in every format is measured
ADDS = ("out", "down", "fc2")  # the matrices that write to the residual stream


def search_formats(
    checkpoint: Checkpoint, statistics: Statistics, budget_bits: float
) -> dict[str, Format]:
    """A format for every matrix but the head, `budget_bits` per weight on average.

    Experts that calibration left without statistics take part in the plain int4 format. Raises
    `InputError` for a budget below what the cheapest formats take.
    """
    return allocate(list(_candidates(checkpoint, statistics)), budget_bits)


def _candidates(checkpoint: Checkpoint, statistics: Statistics) -> Iterator[Candidate]:
    source = WeightSource(checkpoint)
    stream = 0.0
    for layer in range(checkpoint.config.decoder.layers):
        prefix = f"decoder.layers.{layer}."
        matrices = [name for name in checkpoint.names if name.startswith(prefix) and site_of(name)]
        powers = {
            _owner(name): _power(source, statistics, name) for name in matrices if _adds(name)
        }
        # the feed-forward reads a stream to which attention has just been added
        attended = stream + powers[f"{prefix}attention"]
        stream += sum(powers.values())
        for name in matrices:
            rows, width = checkpoint.names[name].shape
            moments = _moments(statistics, name)
            if moments is None:
                losses = {INT4: 0.0}
            else:
                sample = source.array(name)[:: max(rows // ROWS, 1)]
                total = attended if ".attention." in name else stream
                share = powers[_owner(name)] / total if total else 0.0
                fits = [form for form in CHOICES if width % (form.group or 1) == 0]
                losses = {form: share * _error(sample, form, moments) ** 2 for form in fits}
            yield Candidate(name, rows * width, width, losses)


def _error(rows: Floats, form: Format, moments: Floats) -> float:
    return output_error(rows, round_searched(rows, form, np.diagonal(moments)), moments)


def _power(source: WeightSource, statistics: Statistics, name: str) -> float:
    """Mean square of what a matrix adds to the stream, over all tokens of its layer."""
    moments = _moments(statistics, name)
    if moments is None:
        return 0.0
    matrix = source.array(name)
    layer = name.partition(".attention.")[0].partition(".ffn.")[0]
    own = statistics.sites[str(site_of(name))].tokens
    share = own / statistics.sites[f"{layer}.attention.in"].tokens
    return share * float(np.vdot(matrix @ moments, matrix))


def _moments(statistics: Statistics, name: str) -> Floats | None:
    found = statistics.get(str(site_of(name)))
    if found is None:
        return None
    return np.diag(found.mean_square) if found.hessian is None else found.hessian


def _owner(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def _adds(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in ADDS
