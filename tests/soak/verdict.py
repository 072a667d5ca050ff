"""What must hold of a soak, each as a sentence where it does not; and the figures of it."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server_trunk.run_ledger import RunLedger
from splitfl.checkpoint import load_checkpoint, newest_checkpoint
from splitfl.errors import NotWritten
from splitfl.packed_state import unpack_state
from tests.soak.disks import Disk
from tests.soak.site import CLIENTS, Life, Site
from tests.soak.slope import Slope, slope
from tests.soak.soak import Record

__all__ = [
    "applied_once",
    "endings",
    "for_want_of_room",
    "grown",
    "growth",
    "is_busy",
    "judge",
    "ledger_of",
    "steps_in_order",
    "stuck",
    "too_much",
    "went_on",
]

#: Seconds for which a step may be open, and for which none may close though clients are there.
OPEN_AT_MOST, NONE_AT_MOST = 30.0, 45.0
#: Who ends well has written what it leaves at most so many seconds before.
WRITES_BEFORE = 30.0
#: Share of a process's life that is left out of what is said of its memory; the shortest life, seconds, that is judged by it.
_WARM_UP, _SHORTEST = 0.3, 240.0
#: How much more the second half of what is left may have than the first.
MOST_GROWTH = {"rss_mib": 8.0, "files": 8.0, "threads": 4.0, "heap_mib": 3.0}
#: Seconds in which the clients are back where a server begins.
_BACK = 10.0
#: Of a life of so many seconds the slope tells more: what may grow by how much an hour, if even the lower end of its interval
#: says so. A leak is what grows in the heap in use; resident memory also follows what an allocator keeps of what was freed.
_LONG = 1200.0
MOST_HOURLY = {"rss_mib": 32.0, "files": 4.0, "threads": 2.0, "heap_mib": 2.0}
#: The clients' process makes and forgets models in many threads, and its allocator is told to keep what is freed, up to so many
#: MiB: of it the heap in use is judged as closely, and resident memory by this.
_KEPT_FREE = 128.0
#: Events that nothing that befalls this run may lead to.
_NEVER = (
    "failed",
    "forward-failed",
    "backward-failed",
    "gradient-not-finite",
    "gradient-no-targets",
    "out-of-memory",
    "checkpoint-damaged",
    "log-gap",
)
#: How a run of a client that is a process of its own may end other than well: killed, or told one of these.
_SAID = (
    "nothing listens at",
    "has another key than the join string says",  # also where a relay takes a connection for a server that is not there
    "no session was opened",
    "accepts connections but stayed silent",
    "did not answer within",
    "nothing is left to go on with",
    "before which nothing of these ends was kept",
)


def growth(samples: Sequence[tuple[float, float]]) -> float | None:
    """Of (seconds, value): the mean of the second half of the time, after the warm-up, less that of the first; None where either
    has no samples.
    """
    first, last = samples[0][0], samples[-1][0]
    begin = first + _WARM_UP * (last - first)
    middle = (begin + last) / 2
    halves = (
        [value for at, value in samples if begin <= at < middle],
        [value for at, value in samples if at >= middle],
    )
    return statistics.fmean(halves[1]) - statistics.fmean(halves[0]) if all(halves) else None


def grown(series: Sequence[tuple[float, float]]) -> float | Slope | None:
    """By how much, as the length of a life has it be judged; None where it is too short."""
    seconds = series[-1][0] - series[0][0]
    if seconds < _SHORTEST:
        return None
    return slope(series) if seconds >= _LONG else growth(series)


def too_much(name: str, judged: Mapping[str, float | Slope]) -> list[str]:
    """What grew by more than it may, of what :func:`grown` says of a process."""
    kept = {"rss_mib": _KEPT_FREE} if name == "crowd" else {}
    problems = []
    for what, found in judged.items():
        if isinstance(found, Slope):
            if found.least > (MOST_HOURLY | kept)[what]:
                problems.append(f"{name}: {what} grows by {found.hourly:.1f} an hour ({found.least:.1f} to {found.most:.1f})")
        elif found > (MOST_GROWTH | kept)[what]:
            problems.append(f"{name}: {what} grew by {found:.1f}")
    return problems


def steps_in_order(lives: Sequence[Life], events: Iterable[dict[str, Any]]) -> list[str]:
    """Within a life of the server each step is the one after the one before, but for lines of the log that it says are missing; a
    later life begins no later than the one before it ended.
    """
    problems, before = [], -1
    for number, life in enumerate(lives):
        own = [event for event in events if life.begun <= event["time"] <= life.ended]
        steps = [event["step"] for event in own if event["event"] == "step"]
        if not steps:
            problems.append(f"life {number} of the server made no step")
            continue
        if not _follow(own):
            problems.append(f"the steps of life {number} of the server are not one after the other")
        if steps[0] > before + 1:
            problems.append(f"life {number} of the server began with step {steps[0]}, the one before ended with {before}")
        before = steps[-1]
    return problems


def _follow(events: Iterable[dict[str, Any]]) -> bool:
    """Whether the steps of one life do, but for as many as lines are missing between two of them."""
    before, missing = None, 0
    for event in events:
        if event["event"] == "log-gap":
            missing += event["lines"]
        elif event["event"] == "step":
            if before is not None and not 1 <= event["step"] - before <= 1 + missing:
                return False
            before, missing = event["step"], 0
    return True


def ledger_of(site: Site) -> list[tuple[int, dict[str, int]]]:
    """The run's, as its last checkpoint has it."""
    newest = newest_checkpoint(site.work / "server")
    assert newest is not None
    return RunLedger.from_state(unpack_state(load_checkpoint(newest)[2]["ledger"])).entries()


def judge(site: Site, record: Record) -> tuple[list[str], dict[str, Any]]:
    """What does not hold, and the figures."""
    events, diary = site.events(), site.diary()
    problems = record.left_over + site.broken
    alarming = [event for event in events if event["event"] in _NEVER and not for_want_of_room(event, site.disks["server"])]
    problems += [f"{event['event']}: {event}" for event in alarming]
    problems += [f"the server failed in a session: {event}" for event in events if "internal" in str(event.get("why"))]
    problems += [f"the server ended with {life.code}" for life in site.lives if not life.ended_well]
    problems += [f"a traceback in {file.name}" for file in (site.work / "said").glob("*.txt") if "Traceback" in file.read_text()]
    problems += steps_in_order(site.lives, events)
    problems += stuck(record.pauses, site.lives, events, diary)
    problems += went_on(record.faults, site.lives)
    problems += endings(site.endings, diary)
    entries = ledger_of(site)
    problems += applied_once(entries, events, diary)
    figures = _figures(site, record, events, diary, entries)
    for name, judged in figures["growth"].items():
        problems += too_much(name, judged)
    first, last = figures["held_out_loss"]
    if not last < first - 0.5:
        problems.append(f"the loss went from {first:.3f} to {last:.3f}")
    most = max((event["sessions"] for event in events if event["event"] == "status"), default=0)
    if most > 2 * CLIENTS:
        problems.append(f"{most} sessions at a time, of {CLIENTS} clients")
    return problems, figures


def for_want_of_room(event: dict[str, Any], disk: Disk) -> bool:
    """Whether this event of the server is what its disk leads to that was full then."""
    says_so = event["event"] == "log-gap" or (event["event"] == "failed" and event["error"].startswith(NotWritten.__name__))
    return says_so and disk.was_full(event["time"])


def stuck(
    pauses: Sequence[tuple[float, float]],
    lives: Sequence[Life],
    events: Sequence[dict[str, Any]],
    diary: Sequence[dict[str, Any]],
) -> list[str]:
    """Steps that were open for too long, and times in which none closed, up to the end of each life but the last, where clients
    have left; where the machine was paused nothing is said. Of a life whose last steps found no room in the log the clients'
    diary tells.
    """

    def paused(begin: float, end: float) -> bool:
        return any(begin < until and since < end for since, until in pauses)

    problems = []
    for number, life in enumerate(lives, 1):
        own = [event for event in events if event["event"] == "step" and life.begun <= event["time"] <= life.ended]
        for event in own:
            if event["seconds"] > OPEN_AT_MOST and not paused(event["time"] - event["seconds"], event["time"]):
                problems.append(f"step {event['step']} was open for {event['seconds']:.0f} s")
        times = [life.begun, *(event["time"] for event in own)]
        if life.no_room:
            times += [line["time"] for line in diary if line["what"] == "made" and life.begun <= line["time"] <= life.ended]
        if number < len(lives):
            times.append(life.ended)
        for begin, end in itertools.pairwise(sorted(times)):
            if end - begin > NONE_AT_MOST and not paused(begin, end):
                problems.append(f"no step closed for {end - begin:.0f} s")
    return problems


def went_on(faults: Sequence[dict[str, Any]], lives: Sequence[Life]) -> list[str]:
    """Lives of the server that did not end though its disk stayed full until they would."""
    problems = []
    for fault in faults:
        if fault["what"] == "disk full" and fault["until_end"]:
            (life,) = [life for life in lives if life.begun <= fault["time"] <= life.ended]
            if not life.no_room:
                problems.append(f"the server whose disk was full from {fault['at']:.0f} s on did not end for it")
    return problems


def endings(ended: Sequence[dict[str, Any]], diary: Sequence[dict[str, Any]]) -> list[str]:
    """Clients that ended as nothing that befell them explains."""
    problems = [f"{line['client']}: {line['what']}: {line['error']}" for line in diary if line["what"] in ("lost", "failed")]
    for line in diary:
        if line["what"] == "could not join" and not any(part in line["error"] for part in _SAID):
            problems.append(f"{line['client']} could not join: {line['error']}")
    for ending in ended:
        well = ending["no_room"] or ending["code"] in (0, -9)
        well = well or (ending["code"] == 2 and any(part in ending["said"] for part in _SAID))
        if not well or ending["traceback"]:
            problems.append(f"{ending['client']} ended with {ending['code']}: {ending['said']}")
        if ending["code"] == 0 and ending["full_for"] > WRITES_BEFORE:
            problems.append(f"{ending['client']} ended well with a disk that was full for {ending['full_for']:.0f} s")
    return problems


def applied_once(
    entries: Sequence[tuple[int, dict[str, int]]], events: Sequence[dict[str, Any]], diary: Sequence[dict[str, Any]]
) -> list[str]:
    """The ledger has each step once, as the log has it last, and of nobody more than it sent."""
    problems = []
    if [step for step, _ in entries] != list(range(len(entries))):
        problems.append("the ledger's steps are not one after the other")
    logged, gaps = _logged(events)
    sent = _sent(diary)
    known = {client for client, _ in sent}
    if sum(step not in logged for step, _ in entries) > gaps:
        problems.append("steps of the ledger are not in the log")
    for step, parts in entries:
        if step in logged:
            of_log: Counter[str] = Counter()
            for key, part in logged[step]["parts"].items():
                of_log[key.partition("/")[0]] += part["targets"]
            counted = {name: count for name, count in parts.items() if count}
            if {name: count for name, count in of_log.items() if count} != counted:
                problems.append(f"step {step}: the ledger has {parts}, the log {dict(of_log)}")
        for client, targets in parts.items():
            if client in known and targets > sent[client, step]:
                problems.append(f"step {step}: {targets} targets of {client}, which sent {sent[client, step]}")
    return problems


def _logged(events: Sequence[dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], int]:
    """Each step as the log has it last, and how many lines are missing. What a life of the server has made is undone by the first
    step of the next.
    """
    logged: dict[int, dict[str, Any]] = {}
    newest, gaps = -1, 0
    for event in events:
        if event["event"] == "log-gap":
            gaps += event["lines"]
        elif event["event"] == "step":
            for undone in range(event["step"], newest + 1):
                logged.pop(undone, None)
            newest = event["step"]
            logged[newest] = event
    return logged, gaps


def _sent(diary: Sequence[dict[str, Any]]) -> Counter[tuple[str, int]]:
    """Targets that each client has sent of each step, over all that it made of it."""
    sent: Counter[tuple[str, int]] = Counter()
    for line in diary:
        if line["what"] == "sends":
            sent[line["client"], line["step"]] += line["targets"]
    return sent


def _figures(
    site: Site,
    record: Record,
    events: Sequence[dict[str, Any]],
    diary: Sequence[dict[str, Any]],
    entries: Sequence[tuple[int, dict[str, int]]],
) -> dict[str, Any]:
    steps = [event for event in events if event["event"] == "step"]
    judged = [line["loss"] for line in diary if line["what"] == "judged"]
    (first,) = [line["loss"] for line in diary if line["what"] == "judged at first"]
    sent = _sent(diary)
    counted = sum(targets for step, parts in entries for client, targets in parts.items() if (client, step) in sent)
    found: dict[str, Any] = {
        "minutes": round(record.seconds / 60, 1),
        "minutes_paused": round(sum(end - begin for begin, end in record.pauses) / 60, 1),
        "steps": len(entries),
        "steps_made_again": len(steps) - len({event["step"] for event in steps}),
        "longest_step_seconds": max((event["seconds"] for event in steps), default=None),
        "sessions": sum(event["event"] == "joined" for event in events),
        "left": dict(Counter(_short(event["why"]) for event in events if event["event"] == "left")),
        "refused": dict(Counter(event["code"] for event in events if event["event"] == "refused")),
        "dropped_parts": sum(event["event"] == "dropped" for event in events),
        "faults": dict(Counter(fault["what"] for fault in record.faults)),
        "no_room": {
            "server": sum(life.no_room for life in site.lives),
            "clients": sum(ending["no_room"] for ending in site.endings),
            "lines of the log": sum(event["lines"] for event in events if event["event"] == "log-gap"),
        },
        "crowd": dict(Counter(line["what"] for line in diary)),
        "apart": dict(Counter(str(ending["code"]) for ending in site.endings)),
        "could_not_join": dict(Counter(line["error"] for line in diary if line["what"] == "could not join")),
        "share_of_sent_targets_counted": round(counted / max(1, sum(sent.values())), 4),
        "held_out_loss": [round(first, 4), round(statistics.fmean(judged[-12:]), 4) if judged else first],
        "growth": {},
        "memory": {},
    }
    pids = {life.pid: f"server, life {number}" for number, life in enumerate(site.lives)}
    pids |= {each["pid"]: "crowd" for each in record.samples if each["who"] == "crowd"}
    for pid, name in pids.items():
        own = [each for each in record.samples if each["pid"] == pid and each["rss_mib"]]  # one that has ended has no memory
        heap = site.heap(pid)
        if name == "crowd":
            own = [each for each in own if is_busy(each["time"], site.lives)]
            heap = [each for each in heap if is_busy(each[0], site.lives)]
        if not own:
            continue
        what = {key: [(each["at"], each[key]) for each in own] for key in ("rss_mib", "files", "threads")}
        if heap:
            what["heap_mib"] = heap
        found["memory"][name] = {
            key: [round(value, 1) for _, value in series[:: max(1, len(series) // 10)]] for key, series in what.items()
        } | {"cores": round((own[-1]["cpu_seconds"] - own[0]["cpu_seconds"]) / max(1.0, own[-1]["at"] - own[0]["at"]), 3)}
        found["growth"][name] = {key: said for key, series in what.items() if (said := grown(series)) is not None}
    return found


def is_busy(at: float, lives: Sequence[Life]) -> bool:
    """Whether clients have a server then, and had one for long enough to be back: without one they hold less."""
    return any(life.begun + _BACK <= at <= life.ended for life in lives)


def _short(why: str) -> str:
    return why.partition(":")[0][:40]
