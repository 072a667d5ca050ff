"""``python -m tests.soak [--minutes 60] [--seed N] [--work DIR]``: prints the figures, and fails where anything does not hold."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from tests.soak.site import Site
from tests.soak.soak import soak
from tests.soak.verdict import judge


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--work", default="", help="a directory that is not there yet, and is kept")
    args = parser.parse_args()
    print(f"{args.minutes:g} minutes, seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        site = Site(Path(args.work or Path(scratch) / "soak"), args.seed)
        if not site.disks["server"].is_small:
            print("no disk will be full: it has to be mounted, which needs root", flush=True)
        try:
            record = soak(site, args.minutes, args.seed, lambda line: print(line, flush=True))
        finally:
            site.close()
        problems, figures = judge(site, record)
    print(json.dumps(figures, indent=1))
    for problem in problems[:50]:
        print(f"does not hold: {problem}")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
