"""Two real processes (torchrun, gloo, loopback) train as one does with batches of twice the size, and end together."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mtserve
from mtserve.checkpoint import Checkpoint
from mtserve.errors import ConfigError
from tests.shared_data import ROOT
from tests.training.conftest import Run, rows, write_jsonl
from training.run import train
from training.runfile import read_config

TASKS = {"topic": "classification", "score": "similarity", "choice": "multiple_choice", "names": "token_classification"}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port"]
QUIET = ("resamples=0", "golden_rows=1", "training.batch_size=2", "training.warmup_share=0.25")
KILLED = """
import os, signal, sys
from training.__main__ import main
from training.trainer.deadline import Deadline
step_end, at = Deadline.on_step_end, int(os.environ["KILL_AT"])
def on_step_end(self, args, state, control, **given):
    if state.global_step == at and args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step_end(self, args, state, control, **given)
Deadline.on_step_end = on_step_end
sys.exit(main(sys.argv[1:]))
"""


def write(run_file: Run, trunk: Path) -> Path:
    """Tasks of 11, 9 and 12 examples, which two processes with batches of two cannot cut evenly; a trunk without
    dropout, whose masks are other ones in every process."""
    path = run_file(TASKS)
    for name, count in (("topic", 11), ("score", 9)):
        write_jsonl(path.parent / f"{name}.train.jsonl", rows(TASKS[name], count))
    folder = Path(shutil.copytree(trunk, path.parent / "trunk"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps({**config, **none}), encoding="utf-8")
    (path.parent / "killed.py").write_text(KILLED, encoding="utf-8")
    return path


def two(path: Path, *overrides: str, kill_at: int = 0) -> tuple[int, str]:
    """Exit code and stderr of a run file's command in two processes; all of them are gone afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    target = [str(path.parent / "killed.py")] if kill_at else ["-m", "training"]
    command = [sys.executable, *TORCHRUN, port, *target, str(path), *QUIET, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at), "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        out, err = child.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        child.terminate()  # a launcher ends its processes, each of which is a session of its own
        _, err = child.communicate(timeout=60)
        pytest.fail(f"processes wait for each other: {err[-2000:]}")
    assert "Traceback" not in err or kill_at, err
    assert out.count("macro_f1") == (0 if kill_at else 1), "the first process alone says what came out"
    return child.returncode, err


def log_of(folder: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = Checkpoint.open(folder).manifest.provenance["log"]
    return found


def close(one: Path, other: Path) -> None:
    """Rows of the log and all weights agree to 1e-5."""
    mine, theirs = log_of(one), log_of(other)
    assert len(mine) == len(theirs) > 3
    for row, twin in zip(mine, theirs, strict=True):
        assert row == pytest.approx(twin, rel=1e-5, abs=1e-5)
    for pattern in ("trunk/model-*.safetensors", *(f"heads/{task}/model-*.safetensors" for task in TASKS)):
        (first,), (second,) = one.glob(pattern), other.glob(pattern)
        tensors = load_file(second)
        for name, tensor in load_file(first).items():
            assert (tensor - tensors[name]).abs().max() < 1e-5, (pattern, name)


def test_two_processes_train_as_one_with_twice_the_batch(run_file: Run, trunk_folder: Callable[[str], Path]) -> None:
    """The same batches, evaluations and best step, though one of the processes dies on the way and both are resumed."""
    path = write(run_file, trunk_folder("bert"))
    folder = path.parent
    settings = (
        f"trunk={folder / 'trunk'}", "training.epochs=2", "training.gradient_accumulation=2", "training.eval_steps=3",
        "training.best=average", "training.logging_steps=2", "training.optimizer=sgd", "training.learning_rate=0.05",
    )  # fmt: skip
    config = read_config(path, [*QUIET, *settings, "training.batch_size=4", f"output={folder / 'one'}"])
    assert train(config, base=folder) is not None

    code, err = two(path, *settings, f"output={folder / 'two'}", kill_at=5)
    assert code != 0, err
    held = {file.name for file in (folder / "two.training" / "checkpoint-3").iterdir()}
    assert {"ledger-0.json", "ledger-1.json", "rng_state_0.pth", "rng_state_1.pth"} <= held
    assert not (folder / "two").exists()
    config = read_config(path, [*QUIET, *settings, f"output={folder / 'two'}", "resume=true"])
    with pytest.raises(ConfigError, match="states of another run; allowed: the config, data and processes"):
        train(config, base=folder)

    code, err = two(path, *settings, f"output={folder / 'two'}", "resume=true")
    assert code == 0, err
    close(folder / "two", folder / "one")
    sizes = {"topic": 11, "score": 9, "choice": 12, "names": 12}
    log = [row for row in log_of(folder / "two") if "loss" in row]
    assert {task: sum(row[f"train_examples_{task}"] for row in log) for task in sizes} == {
        task: 2 * size for task, size in sizes.items()
    }
    assert any("eval_average" in row for row in log_of(folder / "two"))
    ended = [Checkpoint.open(folder / name).manifest.provenance["training"] for name in ("one", "two")]
    assert ended[0]["best_step"] == ended[1]["best_step"]
    assert ended[0]["tokens"] == ended[1]["tokens"]
    assert not (folder / "two.training").exists()
    assert mtserve.load(folder / "two").predict("topic", ["the great town"])


@pytest.mark.slow
def test_a_budget_ends_both_processes_at_once(run_file: Run, trunk_folder: Callable[[str], Path]) -> None:
    path = write(run_file, trunk_folder("bert"))
    more = (
        "training.max_seconds=0.01",
        "training.epochs=1000",
        "training.arguments={ddp_timeout: 60, ddp_backend: gloo}",
    )
    code, err = two(path, *more, f"output={path.parent / 'out'}")
    assert code == 0, err
    checkpoint = Checkpoint.open(path.parent / "out")
    checkpoint.verify()
    ended = checkpoint.manifest.provenance["training"]
    assert (ended["steps"], ended["ended"]) == (1, "out of time")
    assert err.count("training stopped after 1 steps: out of time") == 1
