"""Search for inputs that a decoder does not survive: ``python -m tests.fuzz [TARGET ...] --inputs N``.

Each target runs in a process of its own, one after the other, for its part of N inputs or of ``--seconds``; what it finds is
left beside the corpus, and the command fails. The last line is JSON: inputs, seconds, and memory above the start, by target.
``--grow`` then takes into the corpus what reaches code that it did not reach.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Most memory that a search may take above what the process has before it, MiB.
MOST_MEMORY = 200
#: Longer inputs only repeat what shorter ones do.
LONGEST = 4096


def _worker(name: str, flags: list[str]) -> None:
    """This process searches; it does not come back from it."""
    import logging
    import resource

    import atheris

    with atheris.instrument_imports(include=["splitfl", "server_trunk"]):
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.mutation import mutate_frame, mutate_pieces

    logging.disable(logging.CRITICAL)
    target = TARGETS[name]

    def change(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)

        def raw(some: bytes) -> bytes:
            return bytes(atheris.Mutate(some, max(len(some), min(most, 2 * len(some) + 16))))

        if target.form == "frame":
            return mutate_frame(data, draw, raw)[:most]
        if target.form == "pieces":
            return (data[: target.skip] + mutate_pieces(data[target.skip :], draw, raw))[:most]
        return raw(data)[:most]

    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"begun with {begun} MiB", file=sys.stderr, flush=True)
    options = {"custom_mutator": change} if target.form != "bytes" else {}
    atheris.Setup([sys.argv[0], *flags, f"-rss_limit_mb={begun + MOST_MEMORY}"], target.run, **options)
    atheris.Fuzz()


def _search(name: str, inputs: int, seconds: int, seed: int) -> dict[str, Any]:
    """One target, in a process of its own; what it found that is new to it stays in ``build/fuzz``."""
    from tests.fuzz.seeds import seeds
    from tests.fuzz.targets import CORPUS

    found = Path("build") / "fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as start:
        for number, seed_input in enumerate(seeds(name)):
            Path(start, f"seed-{number}").write_bytes(seed_input)
        flags = [f"-max_len={LONGEST}", f"-seed={seed}", "-print_final_stats=1", "-verbosity=0", "-timeout=20", "-len_control=20"]
        flags += [f"-runs={inputs}"] if inputs else []
        flags += [f"-max_total_time={seconds}"] if seconds else []
        flags += [f"-artifact_prefix={CORPUS / name}/", str(found), str(CORPUS / name), start]
        command = [sys.executable, "-m", "tests.fuzz", "--worker", name, *flags]
        began = time.monotonic()
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    said = done.stderr
    counted, peak, begun = (
        re.search(pattern, said)
        for pattern in (r"number_of_executed_units:\s*(\d+)", r"peak_rss_mb:\s*(\d+)", r"begun with (\d+) MiB")
    )
    if done.returncode or counted is None or peak is None or begun is None:
        sys.stderr.write(said[-6000:])
        raise SystemExit(f"{name}: found something, or could not run (exit code {done.returncode}); see {CORPUS / name}")
    return {
        "inputs": int(counted[1]),
        "seconds": round(time.monotonic() - began, 1),
        "memory_growth_mib": max(0, int(peak[1]) - int(begun[1])),
    }


def _grow(names: list[str]) -> None:
    """Take into the corpus what reaches further, the shortest inputs first."""
    from tests.fuzz.reach import chosen
    from tests.fuzz.seeds import seeds
    from tests.fuzz.targets import CORPUS, TARGETS, inputs_of

    for name in names:
        found = [path.read_bytes() for path in sorted((Path("build") / "fuzz" / name).glob("*")) if path.is_file()]
        bugs = {path.name: path.read_bytes() for path in (CORPUS / name).glob("crash-*")}  # mended, and not to come back
        kept = chosen(TARGETS[name].run, [*seeds(name), *inputs_of(name), *found])
        shutil.rmtree(CORPUS / name, ignore_errors=True)
        (CORPUS / name).mkdir(parents=True)
        for file, data in ({f"{number:03}": data for number, data in enumerate(kept)} | bugs).items():
            (CORPUS / name / file).write_bytes(data)
        print(f"{name}: {len(kept)} inputs, {sum(map(len, kept))} bytes", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2], sys.argv[3:])
        return
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--inputs", type=int, default=0, help="over all targets together")
    parser.add_argument("--seconds", type=int, default=0, help="over all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grow", action="store_true", help="take what was found into the corpus")
    args = parser.parse_args()
    names = args.targets or list(TARGETS)
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not (args.inputs or args.seconds or args.grow):
        parser.error(f"no target {unknown[0]}" if unknown else "say how long: --inputs or --seconds; or --grow")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {}
    if args.inputs or args.seconds:
        weights = sum(TARGETS[name].weight for name in names)
        for name in names:
            share = TARGETS[name].weight / weights
            result[name] = _search(
                name, round(args.inputs * share), max(1, round(args.seconds * share)) if args.seconds else 0, args.seed
            )
            print(name, result[name], flush=True)
    if args.grow:
        _grow(names)
    if result:
        total = {
            "inputs": sum(each["inputs"] for each in result.values()),
            "seconds": round(sum(each["seconds"] for each in result.values()), 1),
            "memory_growth_mib": max(each["memory_growth_mib"] for each in result.values()),
        }
        print(json.dumps(total | {"targets": result}))


if __name__ == "__main__":
    main()
