"""The model process from the parent's side: started, and started again when it ends before the server does.

The socket that it listens at is in a private folder, with the metrics of all processes of the server; it goes with the
server. Knows no BentoML.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

MODEL_SOCKET, _HOME = "MTSERVE_MODEL_SOCKET", "MTSERVE_RUN_FOLDER"
_PAUSE_S, _LONGEST_PAUSE_S, _SOUND_S = 1.0, 30.0, 60.0
logger = logging.getLogger(__name__)


class Keeper:
    """Runs a command until `end`; one that ends sooner is started again, after a pause that doubles (1 to 30 seconds)
    while it ends within a minute. Its standard input is a pipe that ends with this process."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)
        self._ending = threading.Event()
        self.process = self._start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self) -> subprocess.Popen[bytes]:
        # a session of its own: an interrupt from the terminal is for the parent, which lets the workers end first
        return subprocess.Popen(self._argv, stdin=subprocess.PIPE, start_new_session=True)

    def _watch(self) -> None:
        pause = _PAUSE_S
        while True:
            began = time.monotonic()
            self.process.wait()
            self._close_input()
            if self._ending.is_set():
                return
            if time.monotonic() - began > _SOUND_S:
                pause = _PAUSE_S
            logger.error("the model process ended, and is started again in %g s", pause)
            if self._ending.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            self.process = self._start()

    def end(self, *, timeout_s: float = 10.0) -> None:
        """Let it end, and wait for that."""
        self._ending.set()
        self._close_input()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _close_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


def make_home() -> None:
    """In the parent: a folder for what the processes of this server share, told to all that it starts."""
    made = tempfile.mkdtemp(prefix="mtserve-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    os.environ[_HOME] = made
    (Path(made) / "metrics").mkdir()
    use_home()


def home() -> str | None:
    """That folder, where there is one."""
    return os.environ.get(_HOME)


def use_home() -> None:
    """In any of them, before metrics are made: keep them there. BentoML has one folder for all servers of a user, which
    each of them empties when it starts."""
    if _HOME in os.environ:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(Path(os.environ[_HOME]) / "metrics")


def keep_model() -> None:
    """In the parent: start the model process; it ends with the server, after the workers."""
    os.environ[MODEL_SOCKET] = str(Path(os.environ[_HOME]) / "model.sock")
    keeper = Keeper([sys.executable, "-m", "mtserve.serve.process", os.environ[MODEL_SOCKET]])
    atexit.register(keeper.end)  # before the folder goes
