"""How fast something grows: a leak of a few MiB an hour under what comes and goes by tens."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Slope", "slope"]

#: Share of the time that is left out: the last three quarters are judged. Equal stretches of it, of which each gives one mean:
#: what neighbouring samples have in common does not count as many times as they were taken.
_WARM_UP, _STRETCHES = 0.25, 16


class Slope(NamedTuple):
    """An hour's growth, and the ends of its interval of 95 %."""

    hourly: float
    least: float
    most: float


def slope(samples: Sequence[tuple[float, float]]) -> Slope:
    """Of (seconds, value), by the median of all pairs' slopes (Theil; Sen, "Estimates of the regression coefficient based on
    Kendall's tau", 1968, whose interval it is too): a client more or less at either end does not decide it.
    """
    first, last = samples[0][0], samples[-1][0]
    begin = first + _WARM_UP * (last - first)
    stretches: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for at, value in samples:
        if at >= begin:
            stretches[min(int(_STRETCHES * (at - begin) / (last - begin)), _STRETCHES - 1)].append((at, value))
    points = [tuple(statistics.fmean(each) for each in zip(*stretch, strict=True)) for _, stretch in sorted(stretches.items())]
    slopes = sorted(3600 * (after[1] - before[1]) / (after[0] - before[0]) for before, after in itertools.combinations(points, 2))
    count = len(points)
    reach = 1.96 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    least, most = (len(slopes) - reach) / 2, (len(slopes) + reach) / 2
    return Slope(statistics.median(slopes), slopes[max(0, math.floor(least))], slopes[min(len(slopes) - 1, math.ceil(most))])
