"""What a bundle saves beside its checkpoint: size of the environment, time until a server is ready, memory.

    python -m benchmarks.torch_free CHECKPOINT BUNDLE [--rounds 5] [--keep FOLDER]

Makes two environments with pip, `mtserve[serve,onnx]` and `mtserve[serve,torch]`, and starts in turn an empty BentoML
service, the bundle and the checkpoint, each on one worker: seconds from start until /readyz says yes, and the peak of
the process that holds the model (VmHWM). Servers listen on loopback, and are stopped by their process group.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EXTRAS = {"onnx": "serve,onnx", "torch": "serve,torch"}
EMPTY = """
import bentoml

@bentoml.service(workers=1)
class Empty:
    @bentoml.api
    def hello(self, name: str) -> str:
        return name
"""
_LONGEST_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="where the environments are made, and found again")
    parser.add_argument("--port", type=int, default=3951)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torch-free-") as aside:
        home = chosen.keep or Path(aside)
        sizes = {name: _environment(home / name, extras) for name, extras in EXTRAS.items()}
        (Path(aside) / "empty.py").write_text(EMPTY)
        contestants = {
            "empty BentoML": (home / "onnx", "empty:Empty", None),
            "bundle": (home / "onnx", None, chosen.bundle.resolve()),
            "checkpoint": (home / "torch", None, chosen.checkpoint.resolve()),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for _ in range(chosen.rounds):
            for name, (venv, target, model) in contestants.items():
                found[name].append(_started(venv, target, model, Path(aside), chosen.port))
    report = {
        "environment_mb": sizes,
        "share": sizes["onnx"] / sizes["torch"],
        "ready_s": {name: statistics.median(s for s, _ in each) for name, each in found.items()},
        "peak_mib": {name: statistics.median(mib for _, mib in each) for name, each in found.items()},
        "rounds": chosen.rounds,
    }
    report["beyond_empty_s"] = {n: s - report["ready_s"]["empty BentoML"] for n, s in report["ready_s"].items()}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


def _environment(venv: Path, extras: str) -> float:
    """Make an environment unless it is there; its size in MB."""
    if not (venv / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), f"{ROOT}[{extras}]"], check=True)
        (venv / "made").touch()
    used = {(s.st_dev, s.st_ino): s.st_blocks * 512 for s in (p.lstat() for p in venv.rglob("*"))}
    return sum(used.values()) / 1e6


def _started(venv: Path, target: str | None, model: Path | None, home: Path, port: int) -> tuple[float, float]:
    """Seconds until a server is ready, and MiB of its largest process."""
    env = {**os.environ, "BENTOML_HOME": str(home / "bento"), "HF_HUB_OFFLINE": "1", "BENTOML_DO_NOT_TRACK": "1"}
    command = [str(venv / "bin/mtserve"), "serve", str(model), "--port", str(port)]
    if target is not None:
        command = [str(venv / "bin/bentoml"), "serve", target, "--port", str(port), "--host", "127.0.0.1"]
    with _running(command, env, home) as server:
        began = time.perf_counter()
        while not _ready(port):
            if server.poll() is not None or time.perf_counter() - began > _LONGEST_S:
                raise RuntimeError(f"{command[1]} did not become ready: {(home / 'log').read_text()[-2000:]}")
            time.sleep(0.02)
        ready = time.perf_counter() - began
        if model is not None:
            _ask(port)
        return ready, max(_peaks(server.pid))


@contextmanager
def _running(command: Sequence[str], env: dict[str, str], home: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command], cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield server
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _ask(port: int) -> None:
    """One request of every task, of what GET /tasks gives as an example, so that the model has computed."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/tasks", timeout=10) as answer:
        listed: Any = json.load(answer)
    for task in listed["tasks"]:
        body = json.dumps({"inputs": _input(task["kind"])}).encode()
        url = f"http://127.0.0.1:{port}/tasks/{task['name']}"
        asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(asked, timeout=30).read()  # noqa: S310 - loopback


def _input(kind: str) -> Any:
    if kind == "similarity":
        return {"text": "A man is eating.", "text_pair": "Somebody eats."}
    if kind == "multiple_choice":
        return {"question": "What falls from clouds?", "choices": ["rain", "stones"]}
    return "My parcel never came, and nobody in Porto answers."


def _peaks(root: int) -> Iterator[float]:
    """VmHWM in MiB of a process and of all that it started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        with suppress(OSError, IndexError):
            yield int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
