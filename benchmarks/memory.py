"""Does a side hold only its own part of a model? Peak resident memory and bytes read: client, server, one of two ranks that
share the server's part (by tensor parallelism and by FSDP2, over gloo), full model.

    python -m benchmarks.memory [--quick] [--json]

It makes a Llama checkpoint of more than 500 MB in a temporary directory (16 blocks, bf16, several shards). A fresh
process for each part imports everything, notes its resident memory, loads the part, reads every held tensor once from
end to end, and reports the peak above that; of two ranks the larger. ``ratio`` is (peak - 40 MB) / held bytes; MB is
10**6 bytes; the bar is 1.15 for client and server.

Bytes read are the sum of both ways of reading: read calls (rchar in /proc/self/io), and the pages of the weight files
that are mapped into the process and resident at the end. The files are dropped from the page cache before each run,
where the system has a call for it, lest pages another process read be mapped along.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ALLOWANCE = 40_000_000
BAR = 1.15
SHARDED = ("tensor", "fsdp")
PARTS = ("client", "server", *SHARDED, "full")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a checkpoint of 160 MB, without the full model")
    parser.add_argument("--json", action="store_true", help="end with the result as one line of JSON")
    parser.add_argument("--measure", nargs=2, metavar=("PART", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    with tempfile.TemporaryDirectory(prefix="splitfl-memory-") as name:
        size = make_checkpoint(Path(name), quick=options.quick)
        print(f"checkpoint: {size / 1e6:.0f} MB in {len(list(Path(name).glob('*.safetensors')))} shards, cut 1:1")
        parts = PARTS[:-1] if options.quick else PARTS
        result: dict[str, Any] = {part: in_fresh_processes(part, name) for part in parts}
    print(f"{'':8}{'held MB':>10}{'peak MB':>10}{'read MB':>10}{'ratio':>8}")
    for part in parts:
        row = result[part]
        held, peak = row["held_bytes"] / 1e6, row["peak_bytes"] / 1e6
        read = "" if row["read_bytes"] is None else f"{row['read_bytes'] / 1e6:.1f}"
        print(f"{part:8}{held:10.1f}{peak:10.1f}{read:>10}{row['ratio']:8.3f}")
    passed = all(result[part]["ratio"] <= BAR for part in ("client", "server"))
    print(f"bar {BAR}: {'held' if passed else 'MISSED'}")
    result["checkpoint_bytes"] = size
    result["machine"] = {"platform": platform.platform(), "python": platform.python_version(), **versions()}
    if options.json:
        print(json.dumps(result))
    return 0 if passed else 1


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "safetensors")}


def make_checkpoint(directory: Path, *, quick: bool) -> int:
    """A Llama of 16 blocks in bf16 with its embedding and head; returns its size in bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = 512 if quick else 1024
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=16,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="60MB")
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def in_fresh_processes(part: str, directory: str) -> dict[str, Any]:
    """Runs ``measure`` in a process of its own, or two, so that nothing another part loaded is counted; of two, what the larger
    one found.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", part, directory]
    if part in SHARDED:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.memory", "--")
        command = [sys.executable, *torchrun, *command[3:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return max(found, key=lambda rank: float(rank["peak_bytes"]))


def measure(part: str, directory: str) -> dict[str, Any]:
    """Loads one part and reads it whole; bytes held, peak resident bytes above the imports, bytes read. A rank among others where
    torchrun has started it.
    """
    import torch
    import transformers
    from transformers.models.llama import modeling_llama

    from server_trunk.sharding.group import ShardGroup
    from splitfl.parts.loading import load_ends, load_trunk
    from splitfl.shards import local_of

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    assert modeling_llama.LlamaForCausalLM
    group = ShardGroup(part, 2, torch.device("cpu")) if part in SHARDED else None
    drop_from_page_cache(directory)
    before, read_before = resident_bytes(), read_calls_bytes()
    reset_peak()
    if part == "client":
        model = load_ends(directory, (1, 1))
    elif part == "server":
        model = load_trunk(directory, (1, 1))
    elif group is not None:
        model = load_trunk(directory, (1, 1), sharding=group.sharding)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    parameters = [local_of(parameter) for parameter in model.parameters()]
    with torch.no_grad():
        total = sum(float(row.sum()) for parameter in parameters for row in parameter.reshape(-1).split(1 << 16))
    assert total == total, "weights are not numbers"
    peak = peak_bytes() - before
    held = sum(parameter.nbytes for parameter in parameters)
    return {
        "ratio": (peak - ALLOWANCE) / held,
        "held_bytes": held,
        "peak_bytes": peak,
        # A rank has let go of the files by now, and nobody says what of them it had mapped.
        "read_bytes": None if group else read_calls_bytes() - read_before + mapped_bytes(directory),
    }


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such thing."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def resident_bytes() -> int:
    """Resident memory of this process now."""
    found = _status("VmRSS")
    if found is None:
        import psutil

        found = int(psutil.Process().memory_info().rss)
    return found


def reset_peak() -> None:
    """Makes the kernel forget the peak of the imports, where it can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The largest resident memory since ``reset_peak``, or since the start where there is no resetting it."""
    found = _status("VmHWM")
    if found is None:
        import psutil

        info = psutil.Process().memory_info()
        found = int(getattr(info, "peak_wset", info.rss))
    return found


def read_calls_bytes() -> int:
    """Bytes this process got from read calls, 0 where the system does not say."""
    try:
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    except OSError:
        return 0
    return 0


def mapped_bytes(directory: str) -> int:
    """Bytes of the shards in ``directory`` that are mapped and resident now, 0 where the system does not say."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    total, inside = 0, False
    for line in lines:
        if "-" in line.split(" ", 1)[0] and not line.startswith("VmFlags"):
            inside = str(Path(directory).resolve()) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def drop_from_page_cache(directory: str) -> None:
    """Asks the system to forget the shards, so that nothing mapped is resident because somebody else read it."""
    import os

    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    for file in Path(directory).glob("*.safetensors"):
        with file.open("rb") as opened:
            advise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
