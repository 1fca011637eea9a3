"""How a worker that cannot start ends the whole server, instead of being started again and again.

`bentoml serve` is a parent that restarts its worker whenever that ends. The parent calls `supervise` before it starts
one; a worker whose model cannot be loaded calls `give_up`. Knows no BentoML.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from mtserve.errors import SetupError

EXIT_CODE = 2
_SUPERVISOR = "MTSERVE_SUPERVISOR"


def supervise() -> bool:
    """Make this process end with exit code 2 when a worker gives up, if it is the command `bentoml serve`: whether."""
    if sys.argv[1:2] != ["serve"]:
        return False
    signal.signal(signal.SIGUSR1, _stop)
    os.environ[_SUPERVISOR] = str(os.getpid())  # workers inherit it
    return True


def _stop(number: int, frame: FrameType | None) -> None:
    atexit.register(os._exit, EXIT_CODE)  # the arbiter would end with 0
    os.kill(os.getpid(), signal.SIGTERM)


def refuse(error: SetupError) -> NoReturn:
    """End this process with the error's sentence. In the parent, before any worker."""
    sys.stderr.write(f"mtserve: {error}\n")
    raise SystemExit(EXIT_CODE) from error


def give_up(error: SetupError) -> None:
    """In a worker: say why, end the parent, and this process without further ado. Returns where no parent listens."""
    if os.environ.get(_SUPERVISOR) == str(os.getppid()):
        sys.stderr.write(f"mtserve: {error}\n")
        sys.stderr.flush()
        os.kill(os.getppid(), signal.SIGUSR1)
        os._exit(EXIT_CODE)
