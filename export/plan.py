"""What becomes of every weight of the decoder: its format, its method, and the error it leaves.

    int8     W8A8: all matrices per output channel; calibrated: SmoothQuant's scales, then GPTQ
    int4     groups of 32, 64 or 128; the head per channel in int8; calibrated: GPTQ, or scales
             searched with what each input counts; data-free: rounded to nearest (a search by the
             weights' own error lost to it by far on SmolLM2)
    mixed    as int4 in groups of 32, each expert's format chosen by its sensitivity

Deltas of experts get GPTQ in 2 bits alone, on even grids, and rows of which it moves a group too
far are rounded by themselves: else no mark of them could tell a doubled scale from a right one. In
more bits their error is small beside that of the meta expert's weights.

Routers and coefficients stay fp32: they decide who runs.

Which format each matrix of a mixed export gets: by the noise that rounding it would add.

The loss of a matrix in a format is that noise relative to the residual stream: the squared relative
output error of some of its rows, times the power that its owner (attention, an expert, a dense
feed-forward) adds to the stream, over all that was added up to there. All of it follows from the
weights and the calibration's second moments. On nano, each matrix rounded alone, the measured
divergence of the answers was 0.6 to 3.1 times in proportion for eight matrices in ten; the first
attention's, the most sensitive by far, are the rest (6 times).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.recorded import DELTA, MOST_MOVED
from medmoe_edge.calibration.methods import (
    CHOICES,
    INT4,
    Candidate,
    allocate,
    quantise_gptq,
    search_migration,
)
from medmoe_edge.calibration.quantisers import (
    DELTA_GROUP,
    MOST_BITS,
    DeltaChoice,
    DeltaForm,
    Format,
    Quantised,
    delta_choices,
    output_error,
    relative_error,
    round_searched,
    round_to_nearest,
)
from medmoe_edge.calibration.statistics import InputStatistics, Statistics, input_of
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.config import GroupSize, Method, Precision
from medmoe_edge.errors import CheckpointError, DataError, InputError
from medmoe_edge.export.decoder import meta_name
from medmoe_edge.export.quantise import Quantiser
from medmoe_edge.export.weights import (
    Factors,
    FoldPoint,
    WeightSource,
    fold,
    fold_points,
    low_rank,
)

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


def _candidates(checkpoint: Checkpoint, statistics: Statistics) -> Iterator[Candidate[Format]]:
    source = WeightSource(checkpoint)
    for name, share, moments in _shares(source, statistics):
        rows, width = checkpoint.names[name].shape
        if moments is None:
            losses = {INT4: 0.0}
        else:
            sample = source.array(name)[:: max(rows // ROWS, 1)]
            fits = [form for form in CHOICES if width % (form.group or 1) == 0]
            losses = {form: share * _error(sample, form, moments) ** 2 for form in fits}
        yield Candidate(name, rows * width, width, losses)


def _shares(
    source: WeightSource, statistics: Statistics
) -> Iterator[tuple[str, float, Floats | None]]:
    """Every matrix, its owner's share of the stream's power, and the second moments it reads."""
    checkpoint, stream = source.checkpoint, 0.0
    for layer in range(checkpoint.config.decoder.layers):
        prefix = f"decoder.layers.{layer}."
        matrices = [name for name in checkpoint.names if name.startswith(prefix) and input_of(name)]
        powers = {
            _owner(name): _power(source, statistics, name)
            for name in matrices
            if name.removesuffix(".weight").rpartition(".")[2] in ADDS
        }
        # the feed-forward reads a stream to which attention has just been added
        attended = stream + powers[f"{prefix}attention"]
        stream += sum(powers.values())
        for name in matrices:
            total = attended if ".attention." in name else stream
            share = powers[_owner(name)] / total if total else 0.0
            yield name, share, _moments(statistics, name)


def _error(rows: Floats, form: Format, moments: Floats) -> float:
    return output_error(rows, round_searched(rows, form, np.diagonal(moments)), moments)


def _power(source: WeightSource, statistics: Statistics, name: str) -> float:
    """Mean square of what a matrix adds to the stream, over all tokens of its layer."""
    moments = _moments(statistics, name)
    if moments is None:
        return 0.0
    matrix = source.array(name)
    layer = name.partition(".attention.")[0].partition(".ffn.")[0]
    own = statistics.inputs[str(input_of(name))].tokens
    share = own / statistics.inputs[f"{layer}.attention.in"].tokens
    return share * float(np.vdot(matrix @ moments, matrix))


def _moments(statistics: Statistics, name: str) -> Floats | None:
    found = statistics.get(str(input_of(name)))
    if found is None:
        return None
    return np.diag(found.mean_square) if found.hessian is None else found.hessian


def _owner(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


MIGRATION_ROWS = 1024  # of each matrix, on which a strength is judged
TYPICAL = 3  # root mean squares: how far one token's channels reach, each token having its scale


def search_scales(checkpoint: Checkpoint, statistics: Statistics) -> dict[FoldPoint, Floats]:
    """The scale `[K]` of each fold point whose activations were seen."""
    source = WeightSource(checkpoint)
    scales = {}
    for point in fold_points(checkpoint.config):
        seen = [found for name in point.inputs if (found := statistics.get(name)) is not None]
        if seen:
            low, high, mean_square = _together(seen)
            typical = TYPICAL * np.sqrt(mean_square)
            low, high = np.maximum(low, -typical), np.minimum(high, typical)
            rows = [_some_rows(source.array(name)) for name in point.quantised]
            _, scales[point] = search_migration(low, high, mean_square, rows)
    return scales


def _together(seen: Iterable[InputStatistics]) -> tuple[Floats, Floats, Floats]:
    """Ranges over all inputs of a point, and the mean square, each weighing by its tokens."""
    inputs = list(seen)
    low = np.minimum.reduce([one.minimum for one in inputs])
    high = np.maximum.reduce([one.maximum for one in inputs])
    mean = np.average(
        [one.mean_square for one in inputs], axis=0, weights=[one.weight for one in inputs]
    )
    return low, high, mean.astype(np.float32)


def _some_rows(matrix: Floats) -> Floats:
    return matrix[
        :: max(len(matrix) // MIGRATION_ROWS, 1)
    ].copy()  # a view would keep all of it in memory


INT8 = Format(8)
HEAD = "decoder.head.weight"
GROUP: GroupSize = 32  # of the weights in int4, unless another is asked for
FEWEST = 2  # bits, in which a range that clips nothing leaves little but zeros
LEAST_BITS = min(form.bits_per_weight(form.group or GROUP) for form in CHOICES)


@dataclass
class Plan:
    """Chooses for one export; called by the pass `quantise_weights` with each weight's name.

    `method` "rtn" rounds to nearest without looking at any data, for comparison. `group` is int4's:
    larger ones run faster and take less memory, smaller ones are closer to the original. `formats`
    overrides the precision's format by weight; `deltas` is how routed experts are stored where they
    are what they add to the meta expert, and their matrices `NAME.delta`; `forms` overrides it by
    weight; `factors` are what folding multiplied the matrices with, so that statistics of the
    original model still fit. `matrices` collects what was done, for the manifest.
    """

    precision: Precision
    method: Method = "auto"
    statistics: Statistics | None = None
    group: GroupSize = GROUP
    formats: Mapping[str, Format] = field(default_factory=dict)
    deltas: DeltaForm | None = None
    forms: Mapping[str, DeltaForm] = field(default_factory=dict)
    factors: Mapping[str, Factors] = field(default_factory=dict)
    matrices: list[dict[str, Any]] = field(default_factory=list)
    _rows: int = 0  # of the last matrix, so far

    def __call__(self, name: str) -> tuple[Format, Quantiser] | None:
        """The format and quantiser of a weight; None for what stays as it is."""
        delta = DELTA in name
        whole = self.precision == "fp32" and not (delta and self.delta_form(name).bits)
        if whole or (not delta and input_of(name) is None):
            return None
        form = self.format_of(name)
        return form, partial(self._quantise, name, form)

    def importance(self, name: str) -> Floats | None:
        """Mean squares `[K]` of what a matrix reads, after folding; None where they are unknown."""
        return self._moments(name)[0]

    def format_of(self, name: str) -> Format:
        """How a matrix is stored."""
        if DELTA in name and (bits := self.delta_form(name).bits):
            return Format(bits, DELTA_GROUP)
        if self.precision == "int8" or name == HEAD:
            return INT8
        return self.formats.get(name, Format(4, self.group))

    def delta_form(self, name: str) -> DeltaForm:
        """How what is added to the meta expert is stored, by the name of a weight or its delta."""
        return self.forms.get(_weight_of(name), there(self.deltas))

    def _quantise(self, name: str, form: Format, rows: Floats) -> Quantised:
        second, hessian = self._moments(name)
        if DELTA in name:
            method, quantised = self.round_delta(name, rows, form, hessian)
        elif self.method == "auto" and hessian is not None:
            method, quantised = "gptq", _gptq(name, rows, hessian, form)
        elif self.method == "rtn" or _is_rounded(form, without_data=second is None):
            method, quantised = "rtn", round_to_nearest(rows, form)
        else:
            method = "searched" if second is None else "weighted"
            quantised = round_searched(rows, form, second)
        seen = hessian if hessian is not None else second
        uniform = np.ones(rows.shape[1], np.float32)
        error = output_error(rows, quantised, uniform if seen is None else seen)
        self._note(name, form, method, len(rows), error)
        return quantised

    def round_delta(
        self, name: str, rows: Floats, form: Format, hessian: Floats | None
    ) -> tuple[str, Quantised]:
        """How rows of a delta, or of a factor of one, are rounded, and what comes of it."""
        if self.method == "rtn" or _is_rounded(form, without_data=self.statistics is None):
            return "rtn", round_to_nearest(rows, form)
        if hessian is None or form.bits > FEWEST:
            return "searched", round_searched(rows, form)
        return "gptq", _gptq(name, rows, hessian, form, evenly=True)

    def _note(self, name: str, form: Format, method: str, rows: int, error: float) -> None:
        """Keep what was done; the blocks of a large matrix, which come in turn, as one."""
        if self.matrices and self.matrices[-1]["name"] == name:
            before = self.matrices.pop()["error"]
            total = rows + self._rows
            error = math.sqrt((rows * error**2 + self._rows * before**2) / total)
            rows = total
        self._rows = rows
        self.matrices.append(
            {
                "name": name,
                "bits": form.bits,
                "group": form.group,
                "method": method,
                "error": error,
            }
        )

    def _moments(self, name: str) -> tuple[Floats | None, Floats | None]:
        """E[x²] `[K]` and E[x xᵀ] `[K, K]` of what the matrix reads after folding, where known."""
        if name.endswith(f"{DELTA}.b"):  # reads what its other half made
            return None, None
        read = _weight_of(name)
        found = self.statistics.get(str(input_of(read))) if self.statistics else None
        if found is None:
            return None, None
        columns = self.factors.get(read, Factors()).columns
        if columns is None:
            return found.mean_square, found.hessian
        hessian = found.hessian
        if hessian is not None:
            hessian = hessian / columns[:, None] / columns
        return found.mean_square / columns**2, hessian


def _is_rounded(form: Format, *, without_data: bool) -> bool:
    """Whether rounding to nearest serves best: whole rows, and what no data tell of.

    A search without data looks at weights alone. It lost to rounding on SmolLM2, and on nano's
    experts that calibration did not see by up to ten times; of the lowest bits it wins.
    """
    return form.group is None or (without_data and form.bits > FEWEST)


def _weight_of(name: str) -> str:
    """The weight that a delta, or a factor of one, belongs to; any other name as it is."""
    stem, delta, _ = name.partition(DELTA)
    return f"{stem}.weight" if delta else name


def _sizes(rows: Floats, form: Format) -> Floats:
    """The norms of all groups, `[n, groups]`, none of them 0."""
    grouped = rows.reshape(len(rows), form.groups(rows.shape[1]), -1)
    return np.asarray(np.sqrt(np.square(grouped).sum(-1) + np.finfo(np.float32).tiny), np.float32)


def _gptq(
    name: str, rows: Floats, hessian: Floats, form: Format, *, evenly: bool = False
) -> Quantised:
    """GPTQ; rows of which it moves a norm farther than marks can tell are rounded by themselves."""
    try:
        made = quantise_gptq(rows, hessian, form, evenly=evenly)
    except ValueError as error:
        raise DataError(
            f"The statistics of what {name} reads are damaged.",
            "Make them again: medmoe-edge calibrate CHECKPOINT --data DATA -o STATS.",
        ) from error
    moved = np.abs(np.log2(_sizes(made.dequantise(), form) / _sizes(rows, form))).max(1)
    far = (moved > MOST_MOVED)[:, None]
    if not far.any():
        return made
    plain = round_searched(rows, form)
    integers = np.where(far, plain.integers, made.integers)
    return Quantised(form, integers, np.where(far, plain.scale, made.scale))


def check_precision(
    source: Checkpoint,
    precision: Precision,
    budget_bits: float | None,
    *,
    calibrated: bool,
    group: GroupSize | None = None,
) -> None:
    """Raise `CheckpointError` for matrices that do not divide into groups, where there are any.

    Raises `InputError` for a mixed precision without calibration, or of fewer bits than there are,
    and for a `group` that is asked of another precision than int4.
    """
    if group is not None and precision != "int4":
        raise InputError(
            f"{precision} has no group size to choose.", "Leave it out, or export with --int4."
        )
    if budget_bits is not None and precision != "mixed":
        raise InputError(
            f"{precision} has no bits to spend.", "Leave them out, or export with --mixed."
        )
    if precision not in ("int4", "mixed"):
        return
    _check_widths(source, group or GROUP)
    if precision == "mixed":
        if budget_bits is not None and not budget_bits >= LEAST_BITS:  # so that NaN is none
            raise InputError(
                f"{budget_bits:g} bits per weight are too few.", f"The least is {LEAST_BITS:g}."
            )
        if budget_bits is not None and budget_bits > MOST_BITS:
            raise InputError(
                f"{budget_bits:g} bits per weight are more than weights have.",
                f"The most that makes sense is {MOST_BITS:g}; --int8 stores 8 of all of them.",
            )
        if not calibrated or budget_bits is None:
            raise InputError(
                "Mixed precision is chosen by what calibration measured.",
                "Add --calibrate DATA or --stats FILE, and the bits per weight.",
            )


def _check_widths(source: Checkpoint, group: int) -> None:
    for name, tensor in source.names.items():
        if input_of(name) is not None and name != HEAD and tensor.shape[1] % group:
            raise CheckpointError(
                f"The rows of {name}, of {tensor.shape[1]} weights, do not divide into groups of "
                f"{group}.",
                "Export it with --int8." if group == GROUP else "Choose smaller groups, or --int8.",
            )


def check_deltas(
    source: Checkpoint,
    precision: Precision,
    form: DeltaForm,
    group: GroupSize,
    *,
    calibrated: bool,
) -> None:
    """Raise `CheckpointError` for experts that have no meta expert of their shapes to differ from.

    Raises `InputError` for a precision that chooses by itself, a rank that does not divide, and
    forms that are to be chosen without calibration or within too few bits.
    """
    moe = source.config.moe
    if moe is None or not moe.meta_expert or moe.merged:
        raise CheckpointError(
            "The model has no meta expert that experts could be told apart from.",
            "Leave --experts out.",
        )
    for name, tensor in source.names.items():
        if ".experts." not in name:
            continue
        meta = meta_name(name)
        if tensor.shape != source.names[meta].shape:
            raise CheckpointError(f"{name} has another shape than {meta}.", "Leave --experts out.")
    if precision == "mixed":
        raise InputError(
            "A mixed export chooses the bits of every expert.", "Leave --mixed or --experts out."
        )
    if precision == "int4" and form.rank and form.rank % group:
        raise InputError(
            f"A rank of {form.rank} does not divide into groups of {group}.",
            "Choose a multiple of them, or export with --int8.",
        )
    if form.budget is None:
        return
    if not calibrated:
        raise InputError(
            "Forms of deltas are chosen by what calibration measured.",
            "Add --calibrate DATA or --stats FILE, or give one form: delta:bits=4.",
        )
    least = [
        Candidate(name, math.prod(shape), shape[1], dict.fromkeys(choices, 0.0))
        for name in source.names
        if ".experts." in name and input_of(name) is not None
        for shape in [source.names[name].shape]
        for choices in [delta_choices(shape, _factors(precision, group))]
    ]
    allocate(least, form.budget)  # refuses too few bits at once, not after calibration


def _search_deltas(
    checkpoint: Checkpoint, statistics: Statistics, budget_bits: float, plan: Plan
) -> dict[str, DeltaForm]:
    """A form for what every matrix of a routed expert adds to the meta expert's.

    None is rounded worse than with the most bits that the budget holds for all: a relative error
    says how much of a product is lost, not what that does to answers. Of nano within 4.5 bits, its
    X-ray expert in 2 bits for the sake of others in 8 turned 3.5% of the answers, and all in 4 bits
    1.2%. Experts that calibration left without statistics have those bits.
    """
    source, candidates = WeightSource(checkpoint), []
    for name, share, moments in _shares(source, statistics):
        if ".experts." not in name:
            continue
        rows, width = shape = checkpoint.names[name].shape
        choices = delta_choices(shape, _factors(plan.precision, plan.group))
        held = [each for each in choices if each.bits_per_weight(width) <= budget_bits]
        # of a rank nobody knows whether it keeps what counts
        alike = max(held or choices[:1], key=lambda each: each.form.bits or 0)
        if moments is None:
            losses = {alike: 0.0}
        else:
            errors = _delta_errors(plan, source, name, moments, choices)
            losses = {
                choice: share * error**2
                for choice, error in errors.items()
                if error <= errors[alike]
            }
        candidates.append(Candidate(name, rows * width, width, losses))
    return {name: choice.form for name, choice in allocate(candidates, budget_bits).items()}


def _factors(precision: Precision, group: int) -> Format | None:
    """The format of the two matrices of a low rank: that of other matrices."""
    return {"fp32": None, "int8": INT8}.get(precision, Format(4, group))


def _delta_errors(
    plan: Plan, source: WeightSource, name: str, moments: Floats, choices: Sequence[DeltaChoice]
) -> dict[DeltaChoice, float]:
    """The relative output error of an expert's matrix `[N, K]` with its delta in each form."""
    expert, meta = source.array(name), source.array(meta_name(name))
    found = plan.statistics.get(str(input_of(name))) if plan.statistics else None
    hessian = found.hessian if found else None
    step, added = max(len(expert) // ROWS, 1), expert - meta
    largest = max((choice.form.rank or 0 for choice in choices), default=0)
    a, b = low_rank(added.T, largest, np.diagonal(moments))

    def rounded(rows: Floats, form: Format) -> Floats:
        return plan.round_delta(name, rows, form, hessian)[1].dequantise()

    return {
        choice: relative_error(
            expert[::step],
            meta[::step] + choice.rebuilt(added[::step], (a, b[:, ::step]), rounded),
            moments,
        )
        for choice in choices
    }


def _shared(scales: Mapping[FoldPoint, Floats]) -> dict[FoldPoint, Floats]:
    """The scales that an expert shares with the meta expert: none of a hidden layer of its own."""
    own = (".ffn.experts.", ".ffn.meta.")
    return {
        point: scale
        for point, scale in scales.items()
        if not any(part in name for name in point.producers for part in own)
    }


def make_plan(
    source: Checkpoint,
    precision: Precision,
    method: Method,
    statistics: Statistics | None,
    budget_bits: float | None,
    group: GroupSize | None = None,
    deltas: DeltaForm | None = None,
) -> Plan:
    """Search scales and formats, where the precision has any to choose and statistics are given."""
    plan = Plan(precision, method, statistics, group or GROUP, deltas=deltas)
    if statistics is not None and precision == "int8" and method == "auto":
        scales = search_scales(source, statistics)
        plan.factors = fold(_shared(scales) if deltas else scales)
    if deltas and deltas.budget is not None and statistics is not None:
        plan.forms = _search_deltas(source, statistics, deltas.budget, plan)
    if precision == "mixed" and statistics is not None and budget_bits is not None:
        plan.formats = search_formats(source, statistics, budget_bits)
    return plan
