"""One table of the run's settings: each setting's place in the file, its type, what it may be, one line of help.

The command line, the file's checker and the printed config are all made from it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["MIB", "MOST_INTEGER", "MOST_WINDOW", "SETTINGS", "SETTINGS_BY_KEY", "Setting"]

MIB = 1 << 20

#: What the protocol can say: the largest integer, and the largest window, bytes.
MOST_INTEGER, MOST_WINDOW = 2**53 - 1, 2**40

Check = Callable[[Any], str | None]


def _one_of(*allowed: str) -> Check:
    return lambda value: None if value in allowed else f"must be one of {', '.join(allowed)}"


def _at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"must be at least {low:g}"


def _between(low: float, high: float) -> Check:
    return lambda value: None if low <= value < high else f"must lie in [{low:g}, {high:g})"


# What a thread can be told to wait for is limited too.
_seconds = _between(0, 1e9)


def _is_port(text: str) -> bool:
    # isdigit() takes digits of every script, and int() not all of those.
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 65536


def _host_and_port(value: str) -> str | None:
    host, _, port = value.rpartition(":")
    return None if host and _is_port(port) else "is no HOST:PORT"


def _bare_host(value: str) -> str | None:
    return "is no name or address by itself" if any(mark in value for mark in " /@[]") or value.count(":") == 1 else None


def _port_or_address(value: str) -> str | None:
    return None if not value or _is_port(value) or _host_and_port(value) is None else "is neither a port nor HOST:PORT"


def _step_or_count(value: str) -> str | None:
    is_count = value.isascii() and value.isdigit() and len(value) < 16 and int(value) > 0
    return None if value == "step" or is_count else "must be step, or a number of steps"


def _anything(_: Any) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Setting:
    """One row: ``key`` is the dotted place in the TOML file; the flag is its last word with dashes, unless ``flag`` says else."""

    key: str
    kind: type
    help: str
    check: Check = _anything
    flag: str = ""

    @property
    def option(self) -> str:
        return "--" + (self.flag or self.key.rsplit(".", 1)[-1].replace("_", "-"))


SETTINGS: tuple[Setting, ...] = (
    Setting("revision", str, "hub revision (branch, tag or commit) of the model"),
    Setting("cut", str, "input blocks and output blocks that stay with each client, as a:b"),
    Setting("run", str, "name of the run; part of the join string"),
    Setting("out", str, "directory the run is kept in (default runs/RUN)"),
    Setting("seed", int, "seed of the LoRA initialisation, on both sides", _at_least(0)),
    Setting("clients", int, "step 0 opens when this many clients have enrolled", _at_least(1)),
    Setting(
        "mode",
        str,
        "sync: a step waits for all its clients; async: nobody waits for anybody; hierarchical: as sync, over several replicas",
        _one_of("sync", "async", "hierarchical"),
    ),
    Setting("replicas", int, "hierarchical: copies of the trunk, each in a process on this machine", _at_least(0)),
    Setting(
        "sync",
        str,
        "hierarchical: step sums the replicas' gradients at each step; K averages their weights after K steps of each's own",
        _step_or_count,
    ),
    Setting(
        "restarts",
        int,
        "several processes, of replicas or shards: how often all start again after one has died",
        _at_least(0),
        "max-restarts",
    ),
    Setting(
        "silence",
        float,
        "several processes: seconds without a sign of life after which one is taken for dead, and all start again (0: no limit)",
        _seconds,
        "max-silence",
    ),
    Setting("async_contributions", int, "async: finished parts of clients that make an optimizer step", _at_least(1)),
    Setting(
        "max_staleness",
        int,
        "async: most optimizer steps between a forward and the use of its gradient (0: no step while any client works)",
        _at_least(0),
    ),
    Setting(
        "on_loss",
        str,
        "when a client is lost amid a step: drop goes on without it, wait holds the step for its return",
        _one_of("drop", "wait"),
    ),
    Setting(
        "step_deadline",
        float,
        "seconds for which others wait for a client in a step before going on without it (0: no limit)",
        _seconds,
    ),
    Setting(
        "round_steps",
        int,
        "steps after which the clients' ends are averaged, which ends a round (0: each client keeps its own ends)",
        _at_least(0),
    ),
    Setting("trainables", str, "what of the trunk is trained: lora, full or none", _one_of("lora", "full", "none")),
    Setting(
        "adapters",
        str,
        "one LoRA adapter shared by all clients, or one for each client: shared, per-client",
        _one_of("shared", "per-client"),
    ),
    Setting("limits.max_rank", int, "largest rank a client may ask for its own adapter", _at_least(1)),
    Setting("limits.max_learning_rate", float, "largest learning rate a client may ask for its own adapter", _at_least(0)),
    Setting("lora.rank", int, "LoRA rank", _at_least(1), flag="lora-rank"),
    Setting("lora.alpha", float, "LoRA alpha", _at_least(0), flag="lora-alpha"),
    Setting("lora.dropout", float, "dropout before the LoRA matrices", _between(0, 1), flag="lora-dropout"),
    Setting("lora.targets", str, "all-linear, or module names joined by commas (q_proj,v_proj)", flag="lora-targets"),
    Setting("optimizer.learning_rate", float, "learning rate of the trunk", _at_least(0), flag="lr"),
    Setting("optimizer.weight_decay", float, "AdamW's weight decay (matrices only)", _at_least(0)),
    Setting("optimizer.beta1", float, "AdamW's beta 1", _between(0, 1)),
    Setting("optimizer.beta2", float, "AdamW's beta 2", _between(0, 1)),
    Setting("optimizer.eps", float, "AdamW's epsilon", _at_least(0)),
    Setting("optimizer.schedule", str, "learning rate schedule", _one_of("constant", "linear", "cosine")),
    Setting("optimizer.warmup_steps", int, "steps of linear warm-up", _at_least(0)),
    Setting("optimizer.steps", int, "optimizer steps of the whole run (0: until the clients have no more data)", _at_least(0)),
    Setting("optimizer.clip", float, "largest gradient norm of the trunk (0: no clipping)", _at_least(0)),
    Setting(
        "optimizer.clipping",
        str,
        "by which gradient norm: separate (the trunk's), or joint (of trunk and ends together, as in one process; one client)",
        _one_of("separate", "joint"),
    ),
    Setting("device", str, "cuda, cuda:N, mps, cpu, or auto"),
    Setting("dtype", str, "weights and wire: float32, bfloat16", _one_of("float32", "bfloat16", "float64")),
    Setting(
        "attn",
        str,
        "attention implementation, as transformers names it: sdpa, eager, flash_attention_2 (default: the model's own)",
    ),
    Setting(
        "shard",
        str,
        "how one trunk is spread: none, tensor (parallel within each block), fsdp (blocks gathered as they run), "
        "layers (some blocks a GPU, one process)",
        _one_of("none", "tensor", "fsdp", "layers"),
    ),
    Setting("shard_size", int, "ranks (tensor, fsdp) or GPUs (layers) that one trunk is spread over", _at_least(1)),
    Setting(
        "quantize",
        str,
        "weights of the frozen trunk in fewer bits, with LoRA on top: none, 8bit, 4bit",
        _one_of("none", "8bit", "4bit"),
    ),
    Setting("threads", int, "CPU threads of the trunk (0: torch's own choice)", _at_least(0)),
    Setting("trust_remote_code", bool, "run model code that comes with the checkpoint"),
    Setting("bind", str, "HOST:PORT of the control endpoint (host * for all, port 0 for any free one)", _host_and_port),
    Setting("host", str, "name or address at which clients reach this server (default: what is bound, or its name)", _bare_host),
    Setting("data_port", int, "port of the data endpoint, on the same host (0: any free one)", _between(0, 65536)),
    Setting("advertise", str, "HOST:PORT at which clients reach the data endpoint, where that differs from what is bound"),
    Setting("identity", str, "the server's secret key file (made on first use)"),
    Setting("authorized_clients", str, "file with one client key a line"),
    Setting(
        "bulk",
        str,
        "data connections: sealed (records behind a ticket), or curve: the same inside ZeroMQ CURVE, which refuses even injected "
        "junk and costs several times the CPU",
        _one_of("sealed", "curve"),
    ),
    Setting("window", int, "bytes a client may have in flight towards the server", _between(MIB, MOST_WINDOW + 1)),
    Setting(
        "policy",
        str,
        "which forwards run together: client-batching, or serial (one client after the other)",
        _one_of("client-batching", "serial"),
    ),
    Setting("batch_tokens", int, "most tokens of one trunk batch", _at_least(1)),
    Setting("batch_wait", float, "seconds a batch that is not full waits for clients still to come", _seconds),
    Setting(
        "layout",
        str,
        "rows of a trunk batch: packed behind one another, padded, or auto: packed where padding wastes more than that costs",
        _one_of("auto", "padded", "packed"),
    ),
    Setting("lanes", int, "pieces of a batch that run side by side on a CPU (0: one a thread, at most 4)", _at_least(0)),
    Setting(
        "graphs",
        str,
        "keep each graph for its backward, recompute it, or auto: keep as many as graph_tokens allow",
        _one_of("auto", "keep", "recompute"),
    ),
    Setting("graph_tokens", int, "tokens whose graphs are kept at a time over all clients (0: no limit)", _at_least(0)),
    Setting("client_tokens", int, "most tokens whose graph the trunk keeps for one client", _at_least(1)),
    Setting(
        "cache_tokens",
        int,
        "most tokens whose keys and values the trunk keeps for clients that generate (0: none, they generate without)",
        _at_least(0),
    ),
    Setting("client_cache_tokens", int, "of these, most for one client", _at_least(1)),
    Setting("checkpoint_every", int, "steps between checkpoints (0: only at the end)", _at_least(0)),
    Setting("checkpoint_keep", int, "how many checkpoints are kept", _at_least(1)),
    Setting("until_done", bool, "end when clients have trained and all have left, or are lost and not waited for"),
    Setting("status_every", float, "seconds between status lines in the log (0: none)", _seconds),
    Setting("metrics", str, "HOST:PORT, or a port of loopback, that serves live numbers to Prometheus", _port_or_address),
)

#: The model is an argument of the command line, not a flag.
SETTINGS_BY_KEY = {setting.key: setting for setting in SETTINGS} | {
    "model": Setting("model", str, "directory or hub id of the model")
}
