"""Contestants: an engine in a precision, in a process of its own, and the rounds in which they take turns.

Knows how to talk to `peers/child.py`, and no engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.encoding.peers.batching import Floats
from benchmarks.encoding.peers.child import Child

ROOT = Path(__file__).resolve().parents[2]


class PeerError(Exception):
    """A contestant that cannot take part, with the reason."""


@dataclass(frozen=True)
class Contestant:
    """What runs where, and how it may be asked.

    engine     a module of `peers`
    venv       whose Python runs it: `ours`, or a key of `Pythons`
    settings   candidates; the fastest on a part of the inputs is used
    """

    name: str
    precision: str
    engine: str
    venv: str = "ours"
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Sequence[Mapping[str, Any]] = ({},)

    @property
    def key(self) -> str:
        return f"{self.name} {self.precision}"


@dataclass(frozen=True)
class Pythons:
    """The Python of each environment; without one its contestants are reported as missing."""

    peers: str | None = None
    infinity: str | None = None
    ours: str = sys.executable

    def of(self, venv: str) -> str:
        """Raises PeerError."""
        found: str | None = getattr(self, venv)
        if found is None or not Path(found).exists():
            raise PeerError(f"no environment {venv!r} ({found or 'none was given'}); `make bench` builds it")
        return str(Path(found).absolute())  # not resolved: an environment's Python is a link


class Runner(Protocol):
    """What takes requests as `peers/child.py` lists them."""

    def ask(self, do: str, **request: Any) -> dict[str, Any]: ...


class Process:
    """A contestant that runs: calls are answered in order."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def end(self) -> None:
        self._process.kill()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Raises PeerError if it failed, or has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise PeerError(f"its process ended; it said last: {said[-1] if said else 'nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise PeerError(answer["failed"])
        return answer


class Inline:
    """A contestant in this very process, for a quick look."""

    def __init__(self) -> None:
        self._child = Child()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Raises PeerError."""
        answer = self._child.answer(do, **request)
        if "failed" in answer:
            raise PeerError(answer["failed"])
        return answer


@dataclass
class Stable:
    """Contestants that have been started, each once with a folder; they wait until they are asked, and end together.

    inline   ours and the plain trunk run in this process
    """

    pythons: Pythons
    threads: int
    pause_s: float
    logs: Path
    inline: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)
    _loaded: dict[tuple[str, Path], tuple[Runner, dict[str, str]] | PeerError] = field(default_factory=dict)

    def __enter__(self) -> Stable:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def another(self) -> Stable:
        """An empty one like this."""
        return Stable(self.pythons, self.threads, self.pause_s, self.logs, self.inline)

    def fetch(self, one: Contestant, folder: Path) -> tuple[Runner, dict[str, str]]:
        """It with the folder's model, and its versions. Raises PeerError, always if it did once."""
        key = one.key, folder
        if key not in self._loaded:
            try:
                self._loaded[key] = self._load(one, folder)
            except PeerError as error:
                self._loaded[key] = error
        found = self._loaded[key]
        if isinstance(found, PeerError):
            raise found
        return found

    def _load(self, one: Contestant, folder: Path) -> tuple[Runner, dict[str, str]]:
        runner: Runner = Inline() if self.inline and one.venv == "ours" else self._start(one)
        options = dict(one.options)
        try:
            answer = runner.ask("load", engine=one.engine, folder=str(folder), threads=self.threads, options=options)
        except PeerError:
            if isinstance(runner, Process):
                runner.end()
            raise
        return runner, answer["versions"]

    def _start(self, one: Contestant) -> Process:
        argv = [self.pythons.of(one.venv), "-m", "benchmarks.encoding.peers.child"]
        quiet = {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        counts = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(self.threads))
        log = self.logs / f"{one.key.replace(' ', '-')}.log"
        said = self._stack.enter_context(log.open("w", encoding="utf-8"))
        process = self._stack.enter_context(
            subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT,
                env={**os.environ, **quiet, **counts},
            )
        )  # fmt: skip
        runner = Process(process, log)
        self._stack.callback(runner.end)
        return runner

    def lined_up(
        self, contestants: Sequence[Contestant], folder: Path, inputs: Mapping[str, Path], *, tune_on: str
    ) -> Field:
        """All that can take part, with the inputs, each at its fastest setting for those named `tune_on`."""
        found = Field()
        for one in contestants:
            try:
                runner, versions = self.fetch(one, folder)
                for name, path in inputs.items():
                    runner.ask("inputs", name=name, path=str(path))
                time.sleep(self.pause_s)
                seconds = runner.ask("tune", name=tune_on, settings=list(one.settings))["seconds"]
            except PeerError as error:
                found.failed[one.key] = str(error)
                continue
            found.running[one.key] = runner
            found.versions |= versions
            found.tried[one.key] = [{**s, "seconds": t} for s, t in zip(one.settings, seconds, strict=True)]
            found.settings[one.key] = one.settings[seconds.index(min(seconds))]
        return found


@dataclass
class Field:
    """Those that came to the start, with what they run and the setting that each was fastest with; and who did not."""

    running: dict[str, Runner] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    tried: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def embeddings(runner: Runner, into: Path) -> Floats:
    """What its last call made, (inputs, hidden)."""
    runner.ask("save", path=str(into))
    found: Floats = np.load(into)
    return found


def cosines(made: Floats, truth: Floats) -> Floats:
    """(rows,) cosine of each row with the one at the same place."""
    norms = np.linalg.norm(made, axis=1) * np.linalg.norm(truth, axis=1)
    found: Floats = (made * truth).sum(1) / norms
    return found
