"""How near to linear are replicas that average their weights every K steps? Against servers that know nothing of each other.

N replicas, and N plain servers, of one thread each stand side by side; light clients, as many for the one as for the other and in
as many processes, make K steps now on the one, now on the other, after one that is not counted. A figure is of seconds, with
one average in it, and drift of the machine hits both alike; many pairs tell what a few cannot. N servers apart are what linear
means on a box: two processes share its memory, caches and power, whatever they say to each other. ``share``: tokens/s of the
replicas over those of the servers apart, the median over pairs with its 95 % interval, and the mean with its standard error.

    python -m benchmarks.linearity [--sync 8 32] [--minutes 20] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.modes import SPEEDUP, Model
from benchmarks.replica_speedup import Side, alternate, dealt, hierarchical, ratios
from benchmarks.report import emit, median_interval
from benchmarks.stage import quiet


def measure(replicas: int, sync: int, model: Model, sizes: dict[str, int], minutes: float) -> dict[str, Any]:
    """Pairs for so many minutes, two at least."""
    clients, common = sizes["clients"], {"threads": 1, "device": "cpu", "dtype": "float32"}
    recording = model.recording((sizes["rows"], sizes["length"]))
    with contextlib.ExitStack() as open_sides:

        def side(settings: dict[str, Any], clients: int, crowds: int = 1) -> Side:
            return open_sides.enter_context(Side(common | settings, recording, model.directory, sizes, clients, crowds=crowds))

        kinds = {
            "many": [side(hierarchical(replicas, str(sync)), clients, replicas)],
            "apart": [side({}, share) for share in dealt(clients, replicas)],
        }
        end = time.monotonic() + 60 * minutes
        seen = alternate(kinds, sync, lambda made: made < 2 or time.monotonic() < end, warm_up=sync)
    shares = ratios(seen["many"], seen["apart"])
    median, low, high = median_interval(shares)
    result = {
        "share": round(median, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "mean_share": round(statistics.mean(shares), 4),
        "standard_error": round(statistics.stdev(shares) / len(shares) ** 0.5, 4),
        "pairs": len(shares),
        "tokens_per_second": round(statistics.median(seen["many"]), 1),
        "apart_tokens_per_second": round(statistics.median(seen["apart"]), 1),
    }
    print(
        f"{replicas} replicas, an average every {sync} steps: {median:.4f} of {replicas} servers apart (95 % {low:.4f} to "
        f"{high:.4f}; mean {result['mean_share']:.4f} +- {result['standard_error']:.4f}; {len(shares)} pairs)",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--sync", type=int, nargs="+", default=[8, 32], help="steps from one average to the next")
    parser.add_argument("--minutes", type=float, default=20.0, help="for each K, without the start")
    parser.add_argument("--quick", action="store_true", help="small model, two pairs: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sizes = dict(SPEEDUP)
    if args.quick:
        sizes = {"clients": 2, "rows": 2, "length": 64, "hidden": 64, "blocks": 4}
        args.sync, args.minutes = [2], 0.0
    sizes["clients"] = max(sizes["clients"], args.replicas)
    quiet()
    with tempfile.TemporaryDirectory() as work:
        model = Model(Path(work), sizes["hidden"], sizes["blocks"], "float32")
        found = {str(sync): measure(args.replicas, sync, model, sizes, args.minutes) for sync in args.sync}
    emit({"replicas": args.replicas, "sizes": sizes, "by_sync": found}, as_json=args.json)


if __name__ == "__main__":
    main()
