"""The lines of the one table, and how long something takes on a device. Knows no model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

FAILED = "FAILED"


@dataclass(frozen=True)
class Sizes:
    """How large everything is. `TINY` lets every path run on a CPU in seconds, where figures mean nothing."""

    shapes: tuple[tuple[int, int, int], ...] = (
        *((n, n, n) for n in (2048, 4096, 8192)), (16384, 768, 768), (16384, 768, 3072), (16384, 3072, 768),
    )  # fmt: skip
    encoder: tuple[int, int, int, int] = (768, 12, 12, 3072)  # hidden, layers, heads, inner: BERT-base
    words: int = 30_522
    lengths: tuple[int, ...] = (32, 128, 512)
    batch_tokens: int = 16_384
    batches: int = 4
    mixed_rows: int = 2_000
    requests: tuple[tuple[int, int], ...] = ((1, 16), (1, 128), (8, 16))  # rows, length
    calls: int = 50
    seconds: float = 1.5
    decoder: tuple[int, int, int, int, int] = (1024, 16, 16, 8, 2816)  # hidden, layers, heads, kv heads, inner
    vocabulary: int = 32_000
    prompt: int = 64
    new_tokens: int = 64
    sequences: tuple[int, ...] = (1, 8, 32)
    training_steps: int = 24


TINY = Sizes(
    shapes=((32, 32, 32),), encoder=(32, 2, 4, 48), words=100, lengths=(4, 8), batch_tokens=32, batches=2, mixed_rows=9,
    requests=((1, 16), (2, 3)), calls=2, seconds=0.0, decoder=(32, 2, 4, 2, 48), vocabulary=100, prompt=5, new_tokens=3,
    sequences=(1, 3), training_steps=2,
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One figure.

    share      of the best rate of matrix products that was measured in the same precision
    outcome    of a check: fine or FAILED
    """

    section: str
    what: str
    precision: str = ""
    form: str = ""
    figure: float | None = None
    unit: str = ""
    share: float | None = None
    outcome: str = ""

    def shown(self) -> dict[str, Any]:
        cells = {name: "" if value is None else value for name, value in asdict(self).items()}
        return cells | {"share": "" if self.share is None else f"{100 * self.share:.1f} %"}


def failed(section: str, error: BaseException) -> Line:
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    return Line(section, said[:100], outcome=FAILED)


def checked(found: float, most: float) -> str:
    return "fine" if math.isfinite(found) and found <= most else FAILED


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best(call: Callable[[], Any], device: torch.device, *, seconds: float, least: int = 3) -> float:
    """The shortest time of a call, among those that fit in so many seconds behind one that warms up."""
    return min(_times(call, device, seconds=seconds, least=least))


def median(call: Callable[[], Any], device: torch.device, *, calls: int) -> float:
    return statistics.median(_times(call, device, seconds=0.0, least=calls))


def _times(call: Callable[[], Any], device: torch.device, *, seconds: float, least: int) -> list[float]:
    call()
    wait(device)
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        started = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - started)
    return taken
