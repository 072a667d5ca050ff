"""What the benchmark of the modes makes of its figures: gains, a plot, and advice to the operator."""

from __future__ import annotations

from typing import Any

__all__ = ["BASELINE", "advice", "gains", "plot"]

BASELINE = "serial"
#: A mode that is faster by less is not worth a choice.
_WORTH = 1.03

Table = dict[str, dict[str, dict[str, Any]]]  # mode -> number of clients -> row


def gains(table: Table) -> dict[str, dict[str, float]]:
    """Tokens/s of each mode over the baseline's, by the number of clients."""
    return {
        mode: {
            count: round(row["tokens_per_second"] / table[BASELINE][count]["tokens_per_second"], 3) for count, row in rows.items()
        }
        for mode, rows in table.items()
        if mode != BASELINE
    }


def _best(table: Table, count: str) -> str:
    """The fastest mode with so many clients; the first in the table of those that are as good."""
    rates = {mode: rows[count]["tokens_per_second"] for mode, rows in table.items() if count in rows}
    best = max(rates, key=lambda mode: rates[mode])
    return next(mode for mode, rate in rates.items() if rates[best] < _WORTH * rate)


def advice(results: dict[str, Table], speedups: dict[str, dict[str, dict[str, Any]]], box: str, gpus: int = 0) -> list[str]:
    """Which mode for which box, one sentence a line, from the measurements alone.

    ``results``: tables by batch shape, all modes on the same ``box``. ``speedups``: by ``sync``, then by the number of replicas,
    each of which had as many threads as the one replica it is compared with. ``gpus``: of the box, where they computed.
    """
    lines = []
    for shape, table in results.items():
        chosen: dict[str, list[str]] = {}
        for count in table[BASELINE]:
            chosen.setdefault(_best(table, count), []).append(count)
        gained = gains(table)
        parts = []
        for mode, counts in chosen.items():
            how = "" if mode == BASELINE else f", {max(gained[mode][count] for count in counts):.2f} times {BASELINE} at best"
            parts.append(f"{mode} with {_and(counts)} client(s){how}")
        lines.append(f"On {box}, batch {shape} a client: {'; '.join(parts)}.")
        lines += _on_this_box(table, shape, box, gpus)
    for replicas in sorted({count for by_count in speedups.values() for count in by_count}, key=int):
        by_sync = {sync: by_count[replicas] for sync, by_count in speedups.items() if replicas in by_count}
        lines.append(_with_more(replicas, by_sync, shared=0 < gpus < int(replicas)))
    return lines


def _on_this_box(table: Table, shape: str, box: str, gpus: int) -> list[str]:
    lines = []
    for mode in (mode for mode in table if mode.startswith("hierarchical") and table[mode]):
        against = {
            count: row["tokens_per_second"] / table["client-batching"][count]["tokens_per_second"]
            for count, row in table[mode].items()
        }
        count = max(against, key=lambda count: against[count])
        how = "A GPU for each replica" if table[mode][count]["replicas"] <= gpus else f"Dividing {box} among replicas"
        word = "gains" if against[count] >= _WORTH else "gains nothing"
        lines.append(
            f"{how} {word}: {mode} is at best {against[count]:.2f} times client-batching (batch {shape}, {count} client(s))."
        )
    return lines


def _with_more(replicas: str, by_sync: dict[str, dict[str, Any]], *, shared: bool) -> str:
    """What ``replicas`` replicas bring, each with a core or GPU of its own, or ``shared`` ones."""
    figures = ", ".join(f"{row['speedup']:.2f} with sync = {sync}" for sync, row in by_sync.items())
    means = "On shared GPUs" if shared else "With as many cores or GPUs again for each replica"
    line = f"{means}, {replicas} replicas are {figures} times as fast as one"
    if max(row["speedup"] for row in by_sync.values()) < _WORTH:
        return f"{line}: stay with one."
    exact = by_sync.get("step", {}).get("speedup")
    rare = max((row["speedup"] for sync, row in by_sync.items() if sync != "step"), default=None)
    if exact is not None and rare is not None:
        share = 1 - exact / rare
        if share < 0.05:
            line += "; meeting at every step costs next to nothing: keep sync = step, which is exact"
        else:
            line += f"; meeting at every step costs {share:.0%}: sync = step is exact, averaging wins that back"
    return f"{line}."


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def plot(results: dict[str, Table], path: str) -> None:
    """Tokens/s by the number of clients, one panel a batch shape, one line a mode."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "modes"  # the same figures give the same file
    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results), 3.6), squeeze=False)
    for panel, (shape, table) in zip(panels[0], results.items(), strict=True):
        for mode, rows in table.items():
            panel.plot(
                [int(count) for count in rows], [row["tokens_per_second"] for row in rows.values()], marker="o", label=mode
            )
        counts = [int(count) for count in table[BASELINE]]
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_ylim(bottom=0)
        panel.set_title(f"batch {shape.replace('x', ' × ')} a client")
        panel.set_xlabel("clients")
        panel.set_ylabel("tokens/s")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
