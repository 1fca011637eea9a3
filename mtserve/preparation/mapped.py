"""A text in preparation: its characters, and for each one the caller's characters it stands for. Knows no step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

Edit = tuple[int, int, str]
"""(start, end, new): what the characters [start, end) become; start == end inserts, an empty `new` deletes."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared text; character i of it stands for the caller's characters [starts[i], ends[i]).

    Both are None while every character stands for itself. Ranges lie inside the caller's text, and neither starts nor
    ends ever decrease. All characters of a replacement stand for all that was replaced; an inserted one stands for an
    empty range; of what is deleted all but spaces belongs to the neighbour in the same word (the one before, at a
    word's beginning the one after), so that a word's range holds its diacritics.
    """

    text: str
    starts: Sequence[int] | None = None
    ends: Sequence[int] | None = None

    def same_length(self, text: str) -> Prepared:
        """This with other characters in the same places."""
        return replace(self, text=text)

    def edited(self, edits: Iterable[Edit]) -> Prepared:
        """This with edits made, which are in order and do not overlap."""
        edits = list(edits)
        if not edits:
            return self
        old, size = self.text, len(self.text)
        starts: Sequence[int] = range(size) if self.starts is None else self.starts
        ends: Sequence[int] = range(1, size + 1) if self.ends is None else self.ends
        pieces: list[str] = []
        lefts: list[int] = []
        rights: list[int] = []
        at, early = 0, None
        for start, end, new in [*edits, (size, size, "")]:
            if at < start:
                pieces.append(old[at:start])
                lefts.extend(starts[at:start])
                rights.extend(ends[at:start])
                if early is not None and not old[at].isspace():
                    lefts[at - start] = early
                early = None
            if new:
                left = starts[start] if start < size else ends[-1]
                right = ends[end - 1] if start < end else max(left, ends[start - 1] if start else 0)
                pieces.append(new)
                lefts.extend([left if early is None else early] * len(new))
                rights.extend([right] * len(new))
                early = None
            elif start < end and not old[start:end].isspace():
                if pieces and not pieces[-1][-1].isspace():
                    rights[-1] = ends[end - 1]
                elif early is None:
                    early = starts[start]
            at = end
        return Prepared("".join(pieces), lefts, rights)

    def apart(self, places: Iterable[int]) -> Prepared:
        """This with a space at each of these places that has none beside it and is no end of the text."""
        old, inside = self.text, range(1, len(self.text))
        wanted = (p for p in sorted(set(places)) if p in inside and not old[p - 1].isspace() and not old[p].isspace())
        return self.edited([(place, place, " ") for place in wanted])

    def spans(self, offsets: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The caller's characters of tokens, from [start, end) of each in the prepared text; (0, 0) of empty ones."""
        if self.starts is None or self.ends is None:
            return list(offsets)
        starts, ends = self.starts, self.ends
        return [(starts[start], ends[end - 1]) if start < end else (0, 0) for start, end in offsets]


Step = Callable[[Prepared], Prepared]
"""Returns its argument where there is nothing to do."""


def chained(steps: Iterable[Step]) -> Step:
    """Steps one after another, as one."""
    in_order = tuple(steps)
    return lambda prepared: reduce(lambda p, step: step(p), in_order, prepared)
