"""Encoding on a CPU against peers and against the machine's limit.

    python -m benchmarks.encoding [--only SECTION,…] [--rounds N] [--rows N] [--json FILE] [--data FOLDER]
        [--peers PYTHON] [--infinity PYTHON] [--report docs/benchmarks.md]
    python -m benchmarks.encoding --from-json FILE… --report docs/benchmarks.md     (measures nothing)

Every contestant is a process of its own, loaded once, with the fastest of its settings on a part of the inputs; they
take turns in every round, the first of which warms up. Figures are medians over rounds with the least and the most,
ratios are medians of ratios within a round. Of several files a later one's sections replace an earlier one's. `make
bench` builds the peers' environments and runs everything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.encoding import against, alone
from benchmarks.encoding.contestants import ROOT, PeerError, Pythons, Stable
from benchmarks.encoding.limit import SMALL
from benchmarks.encoding.race import Run, Section, table_of
from benchmarks.encoding.subject import export, make_subject, open_text
from benchmarks.encoding.texts import few_texts, read_texts
from benchmarks.measuring import How, machine, say, show, timed
from mtserve.demo.run import packaged_trunk

COMMAND = "python -m benchmarks.encoding"
SECTIONS: dict[str, Callable[[Run], Section]] = {
    "no-padding": against.no_padding,
    "peers-a": against.peers_a,
    "peers-b": against.peers_b,
    "peers-texts": against.peers_texts,
    "short": against.short,
    "share": against.share,
    "few": against.few,
    "linear": against.linear,
    "tasks": alone.tasks,
    "overhead": alone.overhead,
    "tokenisation": alone.tokenisation,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", type=lambda raw: raw.split(","), default=[*SECTIONS], metavar="SECTION,…")
    made.add_argument("--trunk", type=Path, help="a BERT's folder; by default the demo's packaged encoder")
    made.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="of stsb, rte, commonsenseqa")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--rows", type=int, default=Run.rows, help="inputs of a set that are raced over; 0 for all")
    made.add_argument("--threads", type=int, default=How.threads)
    made.add_argument("--peers", help="the Python of the peers' environment (benchmarks/peers.txt)")
    made.add_argument("--infinity", help="the Python of infinity's (benchmarks/peers-infinity.txt)")
    made.add_argument("--json", type=Path, help="write the figures here, after every section")
    made.add_argument("--from-json", type=Path, nargs="+", metavar="FILE", help="report these figures; measure nothing")
    made.add_argument("--report", type=Path, help="a Markdown file whose marked part is written anew, plots beside it")
    made.add_argument("--quick", action="store_true", help="a few made-up texts once, to see that it runs")
    return made


def run_of(chosen: argparse.Namespace, stable: Stable, home: Path) -> Run:
    folder = make_subject(chosen.trunk or packaged_trunk(), home / "subject")
    try:
        export(folder, stable.pythons)
    except PeerError as error:
        say(f"no ONNX graphs: {error}")
    text = open_text(folder)
    if chosen.quick:
        return Run(
            How(rounds=1, pause_s=0, threads=chosen.threads), stable, folder, few_texts(text), text, tune=4, rate_s=0,
            calls=2, sizes=(100, 200, 300), budgets=(64, 128), shapes=SMALL, base=False,
        )  # fmt: skip
    texts = read_texts(chosen.data, text)
    how = How(rounds=chosen.rounds, threads=chosen.threads)
    return Run(how, stable, folder, texts, text, rows=chosen.rows or sys.maxsize)


def measure(chosen: argparse.Namespace) -> dict[str, Section]:
    """All chosen sections, written down after each."""
    found: dict[str, Section] = {}
    torch.set_num_threads(chosen.threads)
    pythons = Pythons(peers=chosen.peers, infinity=chosen.infinity)
    pause_s = 0 if chosen.quick else How.pause_s
    with (
        tempfile.TemporaryDirectory() as home,
        Stable(pythons, chosen.threads, pause_s, Path(home), inline=chosen.quick) as stable,
    ):
        run = run_of(chosen, stable, Path(home))
        say(", ".join(f"{name} {value}" for name, value in machine().items()))
        for name in chosen.only:
            before = os.getloadavg()[0]
            taken, section = timed(lambda name=name: _section(name, run))  # type: ignore[misc]
            section["machine"] = machine() | {"kernels": torch.backends.cpu.get_cpu_capability()}
            section["run"] = {
                "at": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": taken, "load before": before,
                "command": f"{COMMAND} --only {name} --rounds {run.how.rounds} --rows {chosen.rows}",
            }  # fmt: skip
            found[name] = section
            show(f"{name} ({taken:.0f} s)", table_of(section["lines"]))
            for key, why in section["failed"].items():
                say(f"{key} takes no part: {why}")
            if chosen.json is not None:
                chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _section(name: str, run: Run) -> Section:
    """A section; one that breaks off says why, and the others go on."""
    try:
        return SECTIONS[name](run)
    except PeerError as error:
        return {"lines": [], "about": {}, "failed": {name: str(error)}}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    chosen = made.parse_args(argv)
    if unknown := [name for name in chosen.only if name not in SECTIONS]:
        made.error(f"unknown section {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
    if chosen.from_json:
        found: dict[str, Any] = {}
        for path in chosen.from_json:
            found |= json.loads(path.read_text(encoding="utf-8"))
    else:
        found = measure(chosen)
    if chosen.report is not None:
        from benchmarks.encoding.report import write  # matplotlib is slow to load

        write(found, chosen.report)


if __name__ == "__main__":
    main()
