"""The benchmark's part of a Markdown file: tables and plots between two marks, made of figures alone.

What stands outside the marks is kept; where there are none, the part goes to the end. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.encoding.lineup import OURS
from benchmarks.encoding.plots import draw
from benchmarks.encoding.race import Section
from benchmarks.measuring import Lines

BEGIN = "<!-- written by `python -m benchmarks.encoding --report`: do not edit up to the end mark -->"
END = "<!-- end of what `python -m benchmarks.encoding` wrote -->"
FIGURES = "figures"
ALIKE = 1e-4
"""Lowest cosines that differ by less are called equal."""

TITLES = {
    "no-padding": "Set A, with and without padding",
    "peers-a": "Set A from token ids, against peers",
    "peers-b": "Set B from token ids, against peers",
    "peers-texts": "Set B from texts, against peers",
    "short": "One short request",
    "share": "Share of the machine's limit",
    "few": "Share of the limit in batches of 1 to 8 short rows",
    "linear": "Cost and memory by tokens",
    "tasks": "Several tasks",
    "overhead": "Overhead of the engine",
    "tokenisation": "Share of tokenisation",
}
DOES = {
    "ONNX Runtime": "a graph without Python between the layers, in which attention is one operator a layer",
    "OpenVINO": "a graph without Python between the layers, bias and GELU inside a product's kernel, and attention "
    "as one generated kernel a layer (as its compiled graph shows)",
    "OpenVINO int8": "that, and ranges of activations that were calibrated beforehand, so that none is looked up",
    "CTranslate2": "no Python between the layers",
}
"""What a peer does that may explain its speed."""

HOW = (
    "Every contestant is a process of its own (threads: {threads}); they take turns in each round, the first of "
    "which does not count. Figures are medians over rounds, in brackets the least and the most; ratios are medians of "
    "ratios within a round. Each peer runs with the fastest of several settings, found on a part of the same inputs. "
    "Set A: the dev rows of STS-B and those carved out of RTE and CommonsenseQA (10 %, seed 0), as their tasks encode "
    "them; set B: all their sentences alone; both shuffled with seed 0. The limit: the machine's best rate of matrix "
    "products in that precision over several shapes, measured in the same rounds, over the operations of the model for "
    "real tokens. Cosines are to the stock trunk in fp32 on each row alone."
)


def write(found: Mapping[str, Section], path: Path) -> None:
    """Write the part anew, and its plots into a folder beside the file."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    head, begun, rest = before.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if bool(begun) != bool(ended):
        raise ValueError(f"{path} has one of the two marks; allowed: both, or none")
    if not begun:
        head = head.rstrip("\n") + "\n\n" if head else ""
    part = "\n\n".join(_parts(found, draw(dict(found), path.parent / FIGURES)))
    path.write_text(f"{head}{BEGIN}\n\n{part}\n\n{END}{tail or chr(10)}", encoding="utf-8")


def _parts(found: Mapping[str, Section], plots: Mapping[str, str]) -> list[str]:
    sections = {name: found[name] for name in TITLES if name in found}
    machine = next(iter(sections.values()))["machine"] if sections else {"threads": "some"}
    made = ["## Encoding on a CPU", HOW.format(threads=machine["threads"]), _versions(sections)]
    for name, section in sections.items():
        made += [f"### {TITLES[name]}", _about(section), _table(section["lines"])]
        made += _limits(section)
        made += _faster(section["lines"])
        made += [f"{key} took no part: {why}." for key, why in section["failed"].items()]
        made += [f"![{TITLES[name]}]({FIGURES}/{plots[name]})"] if name in plots else []
        made += [f"![Memory]({FIGURES}/{plots['memory']})"] if name == "linear" and "memory" in plots else []
    return made


def _versions(sections: Mapping[str, Section]) -> str:
    """Machines and versions, each once; sections may be of several runs."""
    machines = {", ".join(f"{n} {v}" for n, v in section["machine"].items()): None for section in sections.values()}
    versions = {f"{n} {v}": None for section in sections.values() for n, v in section.get("versions", {}).items()}
    return f"Machine: {'; '.join(machines)}. Versions: {', '.join(versions)}."


def _about(section: Section) -> str:
    """The command, when it ran, and on what."""
    run, about = section["run"], dict(section["about"])
    ratios = about.pop("padding", {})
    facts = ", ".join(f"{name}: {value}" for name, value in about.items())
    padded = "".join(f" Tokens with padding over real ones: {name} {ratio:.3f}." for name, ratio in ratios.items())
    return f"`{run['command']}` ({run['at']}, load before it {run['load before']:.1f}). {facts}.{padded}"


def _table(lines: Lines) -> str:
    if not lines:
        return "No figures."
    names = [name for name in lines[0] if any(line.get(name) is not None for line in lines)]
    rows = [names, ["---"] * len(names), *([_cell(line.get(name)) for name in names] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        low, high = _number(value["min"]), _number(value["max"])
        return _number(value["median"]) + (f" ({low} to {high})" if low != high else "")
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Three digits, four near 1, as cosines are."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4f}" if 0.9 <= value <= 1 else f"{value:.3g}"


def _limits(section: Section) -> list[str]:
    found = section.get("limits", {})
    said = [
        f"{name} {_cell({k: one[k] for k in ('median', 'min', 'max')})} ({one['best']})" for name, one in found.items()
    ]
    return [f"Limit, 10⁹ operations a second: {'; '.join(said)}."] if said else []


def _faster(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who is faster than ours of the same precision, by how much, at which agreement, and what it does."""
    mine = {line["precision"]: line for line in lines if line.get("contestant") == OURS and "lowest cosine" in line}
    said = []
    for line in lines:
        speed = line.get("speed over ours")
        if not speed or line["contestant"] == OURS or speed["median"] <= 1:
            continue
        off = line["lowest cosine"] - mine[line["precision"].partition("+")[0]]["lowest cosine"]
        agreement = "equal" if abs(off) < ALIKE else "better" if off > 0 else "worse"
        name, precision = line["contestant"], line["precision"]
        does = DOES.get(f"{name} {precision.partition('+')[0]}") or DOES.get(name)
        said.append(
            f"- {name} {precision}: {speed['median']:.2f} times as fast ({speed['min']:.2f} to {speed['max']:.2f}), "
            f"agreement {agreement} ({line['lowest cosine']:.4f})" + (f"; it has {does}" if does else "")
        )
    if not any(line.get("speed over ours") and line["contestant"] != OURS for line in lines):
        return []
    return ["Faster than ours of the same precision:\n\n" + "\n".join(said)] if said else [
        "None is faster than ours of the same precision."
    ]  # fmt: skip
