"""The sections in which contestants race: with and without padding, peers, shares of the limit, cost and memory.

Each is a function of the run that gives a section; knows no file of figures.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.encoding.contestants import Contestant, PeerError, Runner
from benchmarks.encoding.lineup import BUDGET, FIFO, from_ids, from_texts, ours, plain
from benchmarks.encoding.peers.batching import Setting, padding
from benchmarks.encoding.race import Race, Run, Section, spread
from benchmarks.encoding.subject import base_trunk, config_of, make_subject
from benchmarks.measuring import Lines
from mtserve.rows import Row

SHORT = 16


def no_padding(run: Run) -> Section:
    """Ours against the stock trunk in batches as they come and in sorted ones of the same budget; bf16 against fp32."""
    contestants = [
        *ours("fp32", "bf16"),
        plain("torch, FIFO of 8", "fp32", FIFO),
        plain("torch, sorted", "fp32", BUDGET),
    ]
    ratios = {name: padding([len(row) for row in run.pairs], Setting(**s)) for name, s in _ORDERS.items()}
    about = {"set": "A", "unit": "rows as their tasks encode them", "order": "shuffled", "padding": ratios}
    return Race(run, contestants, run.pairs, run.pairs, limits=("fp32", "bf16"), about=about).hold()


_ORDERS: dict[str, dict[str, Any]] = {"FIFO batches of 8": FIFO, "sorted, 4096 tokens": BUDGET}


def peers_a(run: Run) -> Section:
    """Every engine that takes ids, on set A."""
    about = {"set": "A", "unit": "rows as their tasks encode them", "order": "shuffled"}
    return _from_ids(run, run.pairs, about)


def peers_b(run: Run) -> Section:
    """Every engine that takes ids, on set B."""
    about = {"set": "B", "unit": "single sentences", "order": "shuffled"}
    return _from_ids(run, run.rows_of(run.singles), about)


def _from_ids(run: Run, rows: Sequence[Row], about: dict[str, Any], *, calls: int = 1) -> Section:
    calibration = run.file("calibration", run.texts.pairs[-300:])
    contestants = from_ids(calibration, threads=run.how.threads, alone=len(rows) == 1)
    about["calibration of OpenVINO"] = "300 rows of set A, the last of its shuffled order"
    return Race(run, contestants, rows, rows, about=about, calls=calls).hold()


def peers_texts(run: Run) -> Section:
    """Every engine that takes texts, on set B."""
    about = {"set": "B", "unit": "single sentences, as texts", "order": "shuffled"}
    return Race(run, from_texts(), run.singles, run.rows_of(run.singles), about=about).hold()


def short(run: Run) -> Section:
    """One row of 16 tokens at a time, every engine that takes ids."""
    about = {"set": "A", "unit": f"one row of {SHORT} tokens, requests one after another", "order": "one row"}
    return _from_ids(run, _short_rows(run, 1), about, calls=run.calls)


def share(run: Run) -> Section:
    """Share of the limit on set A: the subject, and BERT-base shapes with random weights."""
    about = {"set": "A", "unit": "rows as their tasks encode them", "order": "shuffled"}
    precisions = ("fp32", "bf16")
    found = Race(run, ours(*precisions), run.pairs, run.pairs, limits=precisions, about=about).hold()
    found["lines"] = [{"model": "subject", **line} for line in found["lines"]]
    if run.base:
        home = run.folder.parent
        if not (home / "base").exists():
            make_subject(base_trunk(run.folder, home / "random"), home / "base")
        rows = run.pairs[: run.base_rows]
        base = Race(run, ours(*precisions), rows, rows, limits=precisions, folder=home / "base", about=about).hold()
        found["lines"] += [{"model": "BERT-base shapes", **line} for line in base["lines"]]
        found["about"]["inputs of BERT-base"] = len(rows)
        found["failed"] |= {f"BERT-base {key}": why for key, why in base["failed"].items()}
    return found


def few(run: Run) -> Section:
    """Share of the limit in batches of 1 to 8 short rows."""
    found: Section = {"lines": []}
    for count in (1, 2, 4, 8):
        rows = _short_rows(run, count)
        about = {"set": "A", "unit": f"batches of rows of {SHORT} tokens", "order": "the same rows again"}
        one = Race(run, ours("fp32", "bf16", "int8"), rows, rows, calls=run.calls, about=about).hold()
        found = {**one, "lines": found["lines"] + [{"rows": len(rows), **line} for line in one["lines"]]}
    return found


def linear(run: Run) -> Section:
    """Cost by tokens, and memory by tokens and by token budget."""
    rows, usual = run.texts.pairs, int(statistics.median(run.sizes))
    inputs = {size: _cycled(rows, size) for size in run.sizes}
    files = {str(size): run.file(f"size{size}", some) for size, some in inputs.items()}
    entries = ours("fp32", "bf16")
    found = run.stable.lined_up(entries, run.folder, files, tune_on=str(usual))
    lines: Lines = []
    for size, one in itertools.product(run.sizes, entries):
        if one.key in found.running:
            line = _line(run, one, files[str(size)], inputs[size])
            if size <= 10 * usual:  # larger ones take minutes, and have been timed once
                seconds = _seconds(run, found.running[one.key], str(size))
                line |= {"times": len(seconds), **_costs(seconds, line["tokens"])}
            lines.append({"contestant": one.key, "budget": "default", **line})
    for budget, one in itertools.product(run.budgets, entries):
        if one.key in found.running:
            line = _line(run, replace(one, settings=({"tokens": budget},)), files[str(usual)], inputs[usual])
            lines.append({"contestant": one.key, "budget": budget, **line})
    about = {"set": "A, again and again", "unit": "rows", "order": "shuffled", "seed": 0, "rounds": run.how.rounds}
    return {"lines": lines, "about": about, "versions": found.versions, "failed": found.failed}


def _line(run: Run, one: Contestant, file: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """One call in a process of its own: its cost, and the MiB that it adds to what is resident after a call with one
    row, less the embeddings that it hands back."""
    with run.stable.another() as own:
        found = own.lined_up([one], run.folder, {"one": run.file("one", rows[:1]), "all": file}, tune_on="one")
        if one.key in found.failed:
            raise PeerError(found.failed[one.key])
        answer = found.running[one.key].ask("run", name="all", calls=1)
    tokens, handed_back = sum(map(len, rows)), 4 * config_of(run.folder)["hidden_size"] * len(rows) / 2**20
    line = {"tokens": tokens, "rows": len(rows), "times": 1, **_costs(answer["seconds"], tokens)}
    return {**line, "MiB above": answer["grown_mib"] - handed_back}


def _costs(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    return {"seconds": spread(seconds), "us/token": spread([1e6 * one / tokens for one in seconds])}


def _seconds(run: Run, runner: Runner, name: str) -> list[float]:
    """Of one call in each round, after one that warms up."""
    found: list[float] = []
    for _ in range(run.how.rounds + 1):
        time.sleep(run.how.pause_s)
        found += runner.ask("run", name=name, calls=1)["seconds"]
    return found[1:]


def _cycled(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Rows, from the beginning again where they end, of about so many tokens in all."""
    found: list[Row] = []
    for row in itertools.cycle(rows):
        if tokens <= 0:
            break
        found.append(row)
        tokens -= len(row)
    return found


def _short_rows(run: Run, count: int) -> list[Row]:
    """So many rows of 16 tokens, of those that have them (of the shortest length where none has)."""
    exact = [row for row in run.texts.pairs if len(row) == SHORT]
    return (exact or sorted(run.texts.pairs, key=len))[:count]
