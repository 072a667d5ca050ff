"""What TensorBoard shows of a directory of event files."""

from __future__ import annotations

from pathlib import Path

__all__ = ["scalars"]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """By name: each step and its value, as float32 has it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
