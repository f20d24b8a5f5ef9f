"""SmoothQuant's scales for every fold point, searched on the statistics of a calibration."""

from collections.abc import Iterable

import numpy as np

from medmoe_edge.calibration.smooth import search_migration
from medmoe_edge.calibration.statistics import SiteStatistics, Statistics
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.export.folding import FoldPoint, fold_points
from medmoe_edge.export.weights import Floats, WeightSource

ROWS = 1024  # of each matrix, on which a strength is judged
TYPICAL = 3  # root mean squares: how far one token's channels reach, each token having its scale


def search_scales(checkpoint: Checkpoint, statistics: Statistics) -> dict[FoldPoint, Floats]:
    """The scale `[K]` of each fold point whose activations were seen."""
    source = WeightSource(checkpoint)
    scales = {}
    for point in fold_points(checkpoint.config):
        seen = [found for site in point.sites if (found := statistics.get(site)) is not None]
        if seen:
            low, high, mean_square = _together(seen)
            typical = TYPICAL * np.sqrt(mean_square)
            low, high = np.maximum(low, -typical), np.minimum(high, typical)
            rows = [_some_rows(source.array(name)) for name in point.quantised]
            _, scales[point] = search_migration(low, high, mean_square, rows)
    return scales


def _together(seen: Iterable[SiteStatistics]) -> tuple[Floats, Floats, Floats]:
    """Ranges over all sites of a point, and the mean square, each site weighing by its tokens."""
    sites = list(seen)
    low = np.minimum.reduce([site.minimum for site in sites])
    high = np.maximum.reduce([site.maximum for site in sites])
    mean = np.average(
        [site.mean_square for site in sites], axis=0, weights=[s.weight for s in sites]
    )
    return low, high, mean.astype(np.float32)


def _some_rows(matrix: Floats) -> Floats:
    return matrix[:: max(len(matrix) // ROWS, 1)].copy()  # a view would keep all of it in memory
