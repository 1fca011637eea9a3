"""SIGTERM without loss: what is under way is answered, what is new is told to go elsewhere, then the process ends.

Left to itself the server would close its socket at once, and a client that connects meanwhile would hang. So the signal
is held back until nothing is under way, or the grace time is over; until then new requests get 503, and `/readyz` says
so, from which balancers learn it. A second signal is not held back.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mtserve.errors import CapacityError

_POLL_S = 0.02


class Drain:
    """How many requests are under way in this process, and whether new ones are taken."""

    def __init__(self) -> None:
        self._open = 0  # changed by the event loop's thread alone
        self.begun = False

    def refuse(self) -> None:
        """Raise CapacityError if new requests are not taken."""
        if self.begun:
            raise CapacityError("the server is shutting down")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A request is under way inside."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def hold_back_sigterm(self, grace_s: float) -> None:
        """Let SIGTERM begin the drain, and reach the handler that there is at its end. Only the main thread may change
        handlers; in any other, where no server runs, nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGTERM)
        if not callable(before):
            return
        handler: Callable[[int, FrameType | None], Any] = before

        def begin(number: int, frame: FrameType | None) -> None:
            if self.begun:
                handler(number, frame)
                return
            self.begun = True
            threading.Thread(target=self._end, args=(handler, grace_s), daemon=True).start()

        signal.signal(signal.SIGTERM, begin)

    def _end(self, handler: Callable[[int, FrameType | None], Any], grace_s: float) -> None:
        end = time.monotonic() + grace_s
        while self._open and time.monotonic() < end:
            time.sleep(_POLL_S)
        handler(signal.SIGTERM, None)
