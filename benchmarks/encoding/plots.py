"""Figures of the benchmark as PNG files, from its lines. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.encoding.lineup import OURS
from benchmarks.measuring import Lines

_COLOURS = {"fp32": "#4c72b0", "bf16": "#dd8452", "int8": "#55a868", "int8+bf16": "#8fbf6f"}
_OF_OURS = "black"


def draw(found: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write a file for each section that has a figure: section -> file name."""
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, title in _RACES.items():
        if name in found:
            figure = _race(found[name], title)
            made[name] = _save(figure, folder / f"encoding-{name}.png")
    if "linear" in found:
        made["linear"] = _save(_linear(found["linear"]["lines"]), folder / "encoding-linear.png")
        made["memory"] = _save(_memory(found["linear"]["lines"]), folder / "encoding-memory.png")
    return made


_RACES = {
    "no-padding": "Set A: with and without padding",
    "peers-a": "Set A from token ids",
    "peers-b": "Set B from token ids",
    "peers-texts": "Set B from texts",
    "short": "One row of 16 tokens",
}


def _race(section: dict[str, Any], title: str) -> Figure:
    """Real tokens a second of each contestant as a bar, least to most as a line; its limit as a tick."""
    tokens = section["about"]["tokens"]
    lines = sorted(section["lines"], key=lambda line: (line["precision"], line["tokens/s"]))
    figure = Figure(figsize=(8, 0.8 + 0.32 * len(lines)), layout="constrained")
    axes: Axes = figure.subplots()
    for at, line in enumerate(lines):
        seconds, precision = line["seconds"], line["precision"]
        mine = line["contestant"] == OURS
        axes.barh(at, line["tokens/s"], color=_COLOURS[precision], edgecolor=_OF_OURS if mine else "none", linewidth=2)
        axes.plot([tokens / seconds["max"], tokens / seconds["min"]], [at, at], color="#333333", linewidth=1)
        if line["share of limit"]:
            limit = line["tokens/s"] / line["share of limit"]["median"]
            axes.plot([limit, limit], [at - 0.4, at + 0.4], color="#c44e52", linewidth=2)
    axes.set_yticks(range(len(lines)), [f"{line['contestant']} {line['precision']}" for line in lines])
    axes.set_xlabel("real tokens a second; line: all rounds")
    axes.set_title(title)
    handles = [
        Line2D([], [], color="#c44e52", linewidth=2, label="limit"),
        Line2D([], [], marker="s", linestyle="", markerfacecolor="none", markeredgecolor=_OF_OURS, label="ours"),
    ]
    axes.legend(handles=handles, loc="lower right")
    return figure


def _linear(lines: Lines) -> Figure:
    """Seconds by tokens, both logarithmic, with the straight line of each precision's cost at its largest size."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Axes = figure.subplots()
    for name, of in _series([line for line in lines if line["budget"] == "default"]).items():
        tokens = [line["tokens"] for line in of]
        (drawn,) = axes.plot(tokens, [line["seconds"]["median"] for line in of], marker="o", label=name)
        last = of[-1]["seconds"]["median"] / tokens[-1]
        axes.plot(tokens, [last * count for count in tokens], linestyle=":", color=drawn.get_color())
    axes.set(xscale="log", yscale="log", xlabel="real tokens", ylabel="seconds", title="Cost by tokens; dotted: linear")
    axes.legend()
    return figure


def _memory(lines: Lines) -> Figure:
    """MiB above what was resident before, by tokens at one budget, and by budget at one number of tokens."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    parts: Sequence[tuple[Axes, Lines, str]] = (
        (left, [line for line in lines if line["budget"] == "default"], "tokens"),
        (right, [line for line in lines if line["budget"] != "default"], "budget"),
    )
    for axes, some, key in parts:
        for name, of in _series(some).items():
            axes.plot([line[key] for line in of], [line["MiB above"] for line in of], marker="o", label=name)
        axes.set(xscale="log", xlabel="real tokens" if key == "tokens" else "token budget of a batch")
        axes.legend()
    left.set_ylabel("MiB above, without the embeddings")
    left.set_ylim(bottom=0)
    return figure


def _series(lines: Lines) -> dict[str, Lines]:
    found: dict[str, Lines] = {}
    for line in lines:
        found.setdefault(line["contestant"], []).append(line)
    return found


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=110)
    return path.name
