"""What a viewer shows of stored values: 0..255, grey or RGB.

The order of PS3.4 N.2: stored values -> modality (table or rescale) -> values of interest (table or
window) -> presentation (shape, MONOCHROME1). Padding (PS3.3 C.7.5.1.1.2) takes part in no range and
is shown black. Without a window or a table, 8-bit values are shown as they are, a CT its soft
tissue, and everything else its 1st to 99th percentile.

pydicom's `apply_windowing` is used for the three functions. Its other transforms are not: its
tables trust their descriptors, its rescale and window raise where an attribute is empty or odd, and
none of them knows padding.

Values of at most 16 bits are shown through one table of all of them, which is made once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_windowing

from medmoe_edge.errors import ImageError
from medmoe_edge.image.dicom_pixels import Layout, Stored, Values
from medmoe_edge.image.dicom_tables import Header, Say, Table, read_palette, read_table
from medmoe_edge.image.pixels import Pixels, Window, finite

SOFT_TISSUE: Window = (40.0, 400.0)  # centre and width in HU
WIDEST = 2**16  # values that a table of all of them covers
MOST_SAMPLED = 2**22  # values whose percentiles are taken
PIECE = 2**22  # values that are shown at once
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class Modality:
    """Stored values to the values that a device measured: a table, or slope and intercept."""

    table: Table | None = None
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def is_identity(self) -> bool:
        return self.table is None and (self.slope, self.intercept) == (1, 0)

    def apply(self, values: Values) -> Floats:
        if self.table is not None:
            return self.table.apply(finite(values))
        return finite(values) * self.slope + self.intercept

    def range(self, domain: tuple[float, float]) -> tuple[float, float]:
        """The least and greatest value that can come out."""
        if self.table is not None:
            return 0.0, float(2**self.table.bits - 1)
        ends = [end * self.slope + self.intercept for end in domain]
        return min(ends), max(ends)


def read_modality(header: Header, stored: Stored, say: Say) -> Modality:
    """The modality transformation (PS3.3 C.11.1); what is absent or odd changes nothing."""
    for item in header.items("ModalityLUTSequence"):
        table = read_table(item, stored.domain, say)
        if table is not None:
            return Modality(table)
    slope, intercept = header.number("RescaleSlope"), header.number("RescaleIntercept")
    if (slope is None and intercept) or (intercept is None and slope not in (None, 0, 1)):
        say("rescale", "The file states one half of a rescale: the other changes nothing.")
    if slope == 0:
        say("rescale", "The file states a rescale slope of 0: its values are shown as stored.")
        return Modality()
    return Modality(None, 1.0 if slope is None else slope, intercept or 0.0)


def padding_of(header: Header, stored: Stored, values: Values) -> Mask | None:
    """Which stored values are padding (PS3.3 C.7.5.1.1.2), as NaN is; None, if there is none."""
    kind = {"f": {4: "Float", 8: "DoubleFloat"}.get(values.dtype.itemsize, "")}.get(
        values.dtype.kind, ""
    )
    first = header.number(f"{kind}PixelPaddingValue" if kind else "PixelPaddingValue")
    nowhere = np.isnan(values) if kind else None
    if first is None:
        return nowhere if nowhere is not None and nowhere.any() else None
    last = header.number(f"{kind}PixelPaddingRangeLimit" if kind else "PixelPaddingRangeLimit")
    low, high = sorted(
        _as_stored(value, stored) if not kind else value
        for value in (first, first if last is None else last)
    )
    padding = (values >= low) & (values <= high)
    return padding if nowhere is None else padding | nowhere


def _as_stored(value: float, stored: Stored) -> float:
    """A padding value with the sign of the stored ones, whatever its own representation is."""
    low, high = stored.domain
    if value > high and low <= value - 2**16:
        return value - 2**16
    if value < low and value + 2**16 <= high:
        return value + 2**16
    return value


def show(
    stored: Stored, header: Header, layout: Layout, name: str, say: Say
) -> tuple[Pixels, Window | None]:
    """Show the stored values of a frame, whose own functional groups the header includes.

    Returns uint8 values [H, W] or [H, W, 3], and the window that made them. Raises `ImageError`
    where a palette cannot be read.
    """
    if stored.colour == "rgb":
        return scaled(stored.values, stored.bits), None
    if stored.colour == "palette":
        return _show_palette(stored, header, name, say), None
    if header.value("RedPaletteColorLookupTableDescriptor") is not None:
        say("palette", "The file has a table of colours beside its grey values: it is not applied.")
    if header.text("PresentationIntentType") == "FOR PROCESSING":
        say(
            "for_processing",
            "These are a detector's raw values, which no viewer shows as they are.",
        )
    modality = read_modality(header, stored, say)
    rendering = _Rendering(stored, header, modality, is_inverted(header, layout), say)
    values = stored.values
    shown = np.empty(values.shape, np.uint8)
    if stored.is_whole:
        low, high = int(values.min()), int(values.max())
        every = np.arange(low, high + 1)
        curve = rendering.curve(every, lambda: _counts(values, low, high))
        table = rendering.draw(every, curve)
        for rows in _in_pieces(values):
            shown[rows] = table[np.subtract(values[rows], low, dtype=np.int32)]
        return shown, curve.window
    sample = values.ravel()[:: values.size // MOST_SAMPLED + 1]
    curve = rendering.curve(sample, lambda: np.ones(sample.shape, np.intp))
    for rows in _in_pieces(values):
        shown[rows] = rendering.draw(values[rows], curve)
    return shown, curve.window


def _in_pieces(values: Values) -> Iterator[slice]:
    """Rows of about `PIECE` values, so that intermediate results stay small."""
    rows = max(1, PIECE // values.shape[1])
    return (slice(row, row + rows) for row in range(0, values.shape[0], rows))


def _counts(values: Values, low: int, high: int) -> Counts:
    """How many pixels have each value from `low` to `high`."""
    counts = np.zeros(high - low + 1, np.intp)
    for rows in _in_pieces(values):
        places = np.subtract(values[rows], low, dtype=np.int32)
        counts += np.bincount(places.ravel(), minlength=len(counts))
    return counts


def is_inverted(header: Header, layout: Layout) -> bool:
    """Whether the least value is white: a presentation shape says so, or else MONOCHROME1.

    The two contradict each other in some files; viewers follow the shape (PS3.3 C.11.6.1.2).
    """
    shape = header.text("PresentationLUTShape")
    if shape in ("IDENTITY", "INVERSE"):
        return shape == "INVERSE"
    return layout.photometric == "MONOCHROME1"


def _show_palette(stored: Stored, header: Header, name: str, say: Say) -> Pixels:
    tables = read_palette(header, stored.domain, name, say)
    if not stored.is_whole:
        raise ImageError(f"{name} has an unsupported colour table.", "Save it as RGB or PNG.")
    channels = [scaled(table.entries, table.bits) for table in tables]
    shown = np.empty((*stored.values.shape, 3), np.uint8)
    for i, (table, channel) in enumerate(zip(tables, channels, strict=True)):
        places = stored.values.astype(np.int32) - table.first
        shown[..., i] = channel[np.clip(places, 0, len(channel) - 1)]
    return shown


@dataclasses.dataclass(frozen=True)
class _Curve:
    """What shows values of interest, the window that it is, and whether padding is masked."""

    show: Callable[[Floats], Pixels]
    window: Window | None = None
    masked: bool = False


@dataclasses.dataclass(frozen=True)
class _Rendering:
    """All that turns the values of one frame into grey."""

    stored: Stored
    header: Header
    modality: Modality
    inverted: bool
    say: Say

    def draw(self, values: Values, curve: _Curve) -> Pixels:
        """Grey of stored values."""
        shown = curve.show(self.modality.apply(values))
        if self.inverted:
            shown = 255 - shown
        padding = padding_of(self.header, self.stored, values) if curve.masked else None
        if padding is not None:
            shown = np.where(padding, np.uint8(0), shown)
        return self._presented(shown)

    def curve(self, values: Values, count: Callable[[], Counts]) -> _Curve:
        """How values of interest are shown: `values` are those that the frame has stored.

        `count` tells how many pixels have each of them.
        """
        padding = padding_of(self.header, self.stored, values)
        if padding is not None and padding.all():
            self.say("padding", "The file calls all of its pixels padding: they are shown.")
            padding = None
        curve = self._of_interest()
        if curve is None:
            self.say(
                "no_window", "The file states no window: shown from dark to bright by its values."
            )
            counts = count() if padding is None else np.where(padding, 0, count())
            curve = _between_percentiles(self.modality.apply(values), counts)
        return dataclasses.replace(curve, masked=padding is not None)

    def _of_interest(self) -> _Curve | None:
        """What the header says of it; None, if it takes the values themselves to know."""
        domain = self.modality.range(self.stored.domain)
        for item in self.header.items("VOILUTSequence"):
            table = read_table(item, domain, self.say)
            if table is not None:
                return _Curve(functools.partial(_looked_up, table=table))
        found = file_window(self.header)
        if found is not None:
            window, function = found
            return _Curve(functools.partial(windowed, window=window, function=function), window)
        if self.modality.is_identity and self.stored.bits <= 8:  # already made for a screen
            low, bits = self.stored.domain[0], self.stored.bits
            return _Curve(lambda values: scaled(values - low, bits))
        if self.header.text("Modality") == "CT" and domain[0] < 0 < domain[1]:
            self.say("no_window", "The file states no window: shown in that of soft tissue.")
            return _Curve(functools.partial(windowed, window=SOFT_TISSUE), SOFT_TISSUE)
        return None

    def _presented(self, shown: Pixels) -> Pixels:
        """Through the presentation table, if the file has one (PS3.3 C.11.4)."""
        for item in self.header.items("PresentationLUTSequence"):
            table = read_table(item, (0, 255), self.say)
            if table is not None:
                places = table.first + shown * ((len(table.entries) - 1) / 255)
                return scaled(table.apply(places), table.bits)
        return shown


def file_window(header: Header) -> tuple[Window, str] | None:
    """The first usable window of a header and its function (PS3.3 C.11.2.1.2)."""
    function = header.text("VOILUTFunction")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        function = "LINEAR"
    centres, widths = header.each("WindowCenter"), header.each("WindowWidth")
    for centre, width in zip(centres, widths, strict=False):
        if centre is None or width is None:
            continue
        if width >= 1:
            return (centre, width), function
        if width > 0:  # LINEAR has none so narrow
            return (centre, width), "LINEAR_EXACT" if function == "LINEAR" else function
    return None


def _looked_up(values: Floats, table: Table) -> Pixels:
    return scaled(table.apply(values), table.bits)


def windowed(values: Floats, window: Window, function: str = "LINEAR") -> Pixels:
    """Values in a window, as 0..255."""
    # pydicom's output range is that of these attributes: here 0..255.
    attributes = Dataset()
    attributes.PhotometricInterpretation = "MONOCHROME2"
    attributes.BitsStored = 8
    attributes.PixelRepresentation = 0
    attributes.VOILUTFunction = function
    attributes.WindowCenter, attributes.WindowWidth = window
    with np.errstate(over="ignore"):
        shown: Floats = apply_windowing(values, attributes)
    return np.rint(np.clip(shown, 0, 255)).astype(np.uint8)


def _between_percentiles(values: Floats, counts: Counts) -> _Curve:
    """From the 1st to the 99th percentile of values that so many pixels have."""
    low, high = _percentiles(values, counts)

    def show(values: Floats) -> Pixels:
        shares = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
        return np.rint(shares * 255).astype(np.uint8)

    return _Curve(show, ((low + high) / 2, high - low))


def _percentiles(values: Floats, counts: Counts) -> tuple[float, float]:
    """As `numpy.percentile`; the ends, where the two are equal: a few bright dots on black."""
    order = np.argsort(values, kind="stable")
    values, ranks = values[order], np.cumsum(counts[order])
    last = int(ranks[-1]) - 1

    def at(rank: float) -> float:
        below, above = (
            float(values[np.searchsorted(ranks, place, "right")])
            for place in (int(rank), min(int(rank) + 1, last))
        )
        return below + (above - below) * (rank - int(rank))

    low, high = at(0.01 * last), at(0.99 * last)
    return (at(0), at(last)) if low == high else (low, high)


def scaled(values: npt.NDArray[np.generic], bits: int) -> Pixels:
    """Values of so many bits, their whole range on 0..255."""
    if bits == 8 and values.dtype == np.uint8:
        return np.asarray(values, np.uint8)
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2 and values.size > WIDEST:
        every = scaled(np.arange(1 << 8 * values.dtype.itemsize, dtype=np.float64), bits)
        return np.asarray(every[values])
    shown: Floats = np.clip(finite(values) * (255 / (2**bits - 1)), 0, 255)
    return np.rint(shown).astype(np.uint8)
