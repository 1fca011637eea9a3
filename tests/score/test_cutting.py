"""Parts and windows hold every row once, wherever a run goes on."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mtserve.score.cutting import Limits, parts
from mtserve.score.records import Record


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), max_size=40),
    rows=st.integers(1, 7),
    chars=st.integers(1, 60),
    again=st.integers(0, 40),
)
def test_parts_hold_every_row_once_wherever_they_go_on(sizes: list[int], rows: int, chars: int, again: int) -> None:
    limits = Limits(rows, chars, max(rows // 2, 1), max(chars // 2, 1))
    every = [Record(at, {"text": "x" * size}) for at, size in enumerate(sizes)]
    cut = list(parts(iter(every), 0, limits))
    assert [one for part in cut for one in part.records] == every
    assert [part.number for part in cut] == list(range(len(cut)))
    assert [part.last for part in cut] == [False] * (len(cut) - 1) + [True]
    for part in cut:
        assert len(part.records) <= rows
        assert [one.number for one in part.records] == list(range(part.start, part.start + len(part.records)))
        windows = list(part.windows(limits))
        assert [one for window in windows for one in window.records] == list(part.records)
        assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
    at = min(again, len(cut) - 1)
    start = cut[at].start
    assert list(parts(iter(every[start:]), 0, limits, number=at, start=start)) == cut[at:]
