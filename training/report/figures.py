"""Pictures for the model card as PNG bytes, equal for equal input. Knows no task and no file.

Labels are drawn as they stand (no mathematics in them), and one that the font lacks as a box, without a warning.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from training.report.evaluate import Scores

_LOSS = "train_loss_"
_COLUMNS = 4
_MOST_COUNTED = 30
_SHOWN = 24


def figures(log: Sequence[Mapping[str, float]], scores: Mapping[str, Scores]) -> dict[str, bytes]:
    """Every picture of a run by its file name: the training curves, and a confusion matrix a task that has one."""
    found = {"figures/curves.png": curves(log, {task: one.metric for task, one in scores.items()})} if log else {}
    for task, one in scores.items():
        if one.confusion is not None:
            found[f"figures/confusion-{task}.png"] = confusion(one.confusion, list(one.report))
    return found


def curves(log: Sequence[Mapping[str, float]], metrics: Mapping[str, str]) -> bytes:
    """A panel a task: its training loss over the steps, and the named metric of it where the log has
    `eval_<task>_<metric>`. Entries of `log` have a `step`."""
    tasks = sorted({key.removeprefix(_LOSS) for entry in log for key in entry if key.startswith(_LOSS)})
    rows = math.ceil(len(tasks) / _COLUMNS) or 1
    columns = math.ceil(len(tasks) / rows) or 1
    figure = Figure(figsize=(max(4.8, 3.4 * columns), 2.7 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for panel in list(panels)[len(tasks) :]:
        panel.remove()
    for task, panel in zip(tasks, figure.axes, strict=True):
        _line(panel, log, _LOSS + task, colour="tab:blue", label="training loss")
        panel.set_title(task, fontsize=10, parse_math=False)
        panel.set_xlabel("step")
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        panel.tick_params(labelbottom=True)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        panel.grid(alpha=0.3)
        if any(f"eval_{task}_{metrics.get(task)}" in entry for entry in log):
            other = panel.twinx()
            _line(other, log, f"eval_{task}_{metrics[task]}", colour="tab:orange", label=metrics[task])
    return _png(figure)


def _line(panel: Axes, log: Sequence[Mapping[str, float]], key: str, *, colour: str, label: str) -> None:
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    steps, values = zip(*points, strict=True)
    panel.plot(steps, values, color=colour, marker="o" if len(points) < 25 else "", markersize=3, linewidth=1.3)
    panel.set_ylabel(label, color=colour, parse_math=False)
    panel.tick_params(axis="y", labelcolor=colour)


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> bytes:
    """Counts [true][given]; the shade is the share of the true label's examples. Of many labels the shades alone."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [label if len(label) <= _SHOWN else label[: _SHOWN - 1] + "…" for label in labels]
    size = len(names)
    side = 2.4 + 0.36 * min(max(size, 3), 40)
    figure = Figure(figsize=(side + 0.6, side), dpi=110, layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = 9 if size <= 40 else 9 * 40 / size
    panel.set_xticks(range(size), names, rotation=90 if size > 3 else 0, fontsize=font, parse_math=False)
    panel.set_yticks(range(size), names, fontsize=font, parse_math=False)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    if size <= _MOST_COUNTED:
        for (row, column), count in np.ndenumerate(counts):
            shade = "white" if shares[row, column] > 0.55 else "black" if count else "0.75"
            panel.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, ax=panel, shrink=0.8, label="share of the true label")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    """Without the version and the date that would make equal pictures differ."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that the font lacks
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
