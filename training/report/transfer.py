"""What tasks gain or lose by sharing a trunk, as text. Knows no model, and measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Protocol

from training.report.tables import Line, markdown

MARKS = "<!-- transfer -->", "<!-- end of transfer -->"
"""What stands around the section in a card."""
_AGAINST = -0.1  # cosines nearer to zero are no more than the noise of 64 examples
_Cosines = Mapping[tuple[str, str], float]
_Sizes = Mapping[str, float]


class Compared(Protocol):
    """A task with and without the others (training.transfer.Transfer)."""

    @property
    def metric(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def alone(self) -> Sequence[float]: ...
    @property
    def mean(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    @property
    def difference(self) -> float: ...
    @property
    def limits(self) -> tuple[float, float]: ...
    @property
    def p(self) -> float: ...
    @property
    def verdict(self) -> str: ...


def table(found: Mapping[str, Compared]) -> list[Line]:
    """A line a task under a header."""
    lines: list[Line] = [("task", "split", "metric", "shared", "95% interval", "alone", "difference", "95%", "p", "")]
    for name, one in found.items():
        interval, limits = (f"{low:.3f} to {high:.3f}" for low, high in (one.interval, one.limits))
        p, alone = f"{one.p:.3f}", f"{fmean(one.alone):.3f}"
        difference = f"{one.difference:+.3f}"
        lines.append(
            (name, one.split, one.metric, f"{one.mean:.3f}", interval, alone, difference, limits, p, one.verdict)
        )
    return lines


def section(
    found: Mapping[str, Compared], cosines: _Cosines, sizes: _Sizes, *, seeds: Sequence[int], resamples: int
) -> str:
    """The part of a card: what each task gained or lost, which way the gradients point, and how to group the tasks."""
    several = f"Means over seeds {', '.join(map(str, seeds))}." if len(seeds) > 1 else f"Seed {seeds[0]}."
    said = (
        f"Each task in the run of all (`shared`) and in a run of its own (`alone`) with the same settings and as many "
        f"of its examples. {several} Intervals and p are of a paired bootstrap over examples ({resamples} resamples); "
        f"they do not hold what other seeds would change."
    )
    gradients = cosine_table(cosines, sizes)
    return "\n\n".join(["## Transfer", said, markdown(table(found)), *gradients, grouping(found, cosines)])


def grouping(found: Mapping[str, Compared], cosines: _Cosines) -> str:
    """A suggestion in a sentence or two: tasks that lost leave the trunk; two of those whose gradients agree may share
    another. A start for the next run, no finding: groups have to be trained to know (Standley et al., 2020)."""
    stay = [name for name, one in found.items() if one.verdict != "lost"]
    leave = [name for name in found if name not in stay]
    groups, rest = [stay] if stay else [], list(leave)
    while rest:
        first, *others = rest
        with_it = [other for other in others if cosines.get((first, other), cosines.get((other, first), 0.0)) > 0]
        groups.append([first, *with_it])
        rest = [other for other in others if other not in with_it]
    against = [
        f"{a} and {b}" for a, b in combinations(found, 2) if cosines.get((a, b), cosines.get((b, a), 0.0)) < _AGAINST
    ]
    shown = "; ".join(" + ".join(group) for group in groups)
    said = f"Suggested grouping: {shown}." if leave else f"Suggested grouping: {shown} on one trunk; none lost."
    return said + (f" Gradients of {', '.join(against)} point against each other." if against else "")


def cosine_table(cosines: _Cosines, sizes: _Sizes) -> Iterator[str]:
    """Markdown of a symmetric table of tasks, and a column of sizes; nothing where nothing was measured."""
    if not cosines:
        return
    tasks = [a for a, b in cosines if a == b]
    yield (
        "Gradient cosines: in which direction tasks pull the trunk, as the cosine of their mean gradients over 64 "
        "training examples, averaged over moments of the training. On the diagonal that between two halves of one "
        "task's examples, which shows how much of a low value is noise; below zero tasks pull against each other."
    )
    both = {**cosines, **{(b, a): value for (a, b), value in cosines.items()}}
    lines: list[Line] = [("task", *tasks), *((a, *(f"{both[a, b]:.2f}" for b in tasks)) for a in tasks)]
    if sizes:
        lines = [(*line, more) for line, more in zip(lines, ("size", *(f"{sizes[a]:.3g}" for a in tasks)), strict=True)]
    yield markdown(lines)
    if sizes:
        yield (
            "Sizes are norms of these mean gradients, before `weight` and clipping. Clipping takes every batch down to "
            "`training.max_grad_norm`, so that sizes above it count alike; below it a task with much smaller gradients "
            "than others moves the trunk little, and its `weight` raises it."
        )
