"""Refusals are logged, a flood of them is not."""

from __future__ import annotations

from splitfl.transport.refusals import RefusalLog


def test_a_flood_from_one_address_leaves_five_lines_and_a_count() -> None:
    now, lines = [0.0], list[tuple[str, str, str]]()
    log = RefusalLog(lambda *line: lines.append(line), clock=lambda: now[0])
    for _ in range(50):
        log.refused("10.0.0.1", "10.0.0.1, key k", "not-authorized", "not listed")
    log.refused("10.0.0.2", "10.0.0.2", "not-authorized", "not listed")
    assert [who for who, _, _ in lines] == ["10.0.0.1, key k"] * 5 + ["10.0.0.2"]
    now[0] = 60.0
    log.refused("10.0.0.1", "10.0.0.1, key k", "not-authorized", "not listed")
    assert lines[-1] == ("10.0.0.1, key k", "not-authorized", "not listed (45 more refusals not shown)")


def test_memory_is_bounded() -> None:
    log = RefusalLog(lambda *line: None, addresses=100)
    for number in range(1000):
        log.refused(str(number), "", "", "")
    assert len(log._seen) == 100


def test_each_kind_is_counted_apart() -> None:
    lines = list[str]()
    log = RefusalLog(lambda who, code, text: lines.append(text), clock=lambda: 0.0)
    for _ in range(20):
        for kind in ("", "cut", "lost"):
            log.refused("key", "who", "code", kind or "told", kind=kind)
    assert [lines.count(text) for text in ("told", "cut", "lost")] == [5, 5, 5]
