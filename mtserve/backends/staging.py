"""Numbers on their way to a device and back while it computes. Knows no models.

On a GPU all of a backend's work goes to one stream of its own, and what is copied to or from it lies in pinned memory,
so that the host waits for nothing but the answers. PyTorch's allocator of pinned memory keeps a block until the copies
that were enqueued with it are done, so a block may be let go at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtserve.rows import Floats, Ints, Row

Integers = npt.NDArray[np.signedinteger[Any]]


def memory(shape: Sequence[int], dtype: torch.dtype, *, beside: torch.device) -> Tensor:
    """Memory on the host with nothing in it yet, pinned where it stands beside a GPU."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=beside.type == "cuda")


def staged(lines: Sequence[Sequence[Ints]], *, device: torch.device) -> Tensor:
    """Arrays end to end, those of each line in a line: (lines, sum of lengths) int64 on the host, pinned for a GPU."""
    total = sum(map(len, lines[0]))
    host = memory((len(lines), total), torch.int64, beside=device)
    for line, arrays in zip(host.numpy(), lines, strict=True):
        np.concatenate(arrays, out=line)
    return host


def padded(
    rows: Sequence[Row], *, pad_id: int, known: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows without their first `known` tokens: ids, mask and type ids, each (rows, seq) int64, padded at the right."""
    first = known or [0] * len(rows)
    sizes = [len(row) - start for row, start in zip(rows, first, strict=True)]
    shape = (len(rows), max(sizes))
    ids, mask, type_ids = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for at, (row, start, size) in enumerate(zip(rows, first, sizes, strict=True)):
        ids[at, :size], mask[at, :size], type_ids[at, :size] = row.ids[start:], 1, row.type_ids[start:]
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(type_ids)


def moved(array: Integers, device: torch.device) -> Tensor:
    """An index as int64 on a device, which the host does not wait for."""
    return sent(torch.from_numpy(array.astype(np.int64)), device)


def sent(host: Tensor, device: torch.device) -> Tensor:
    """What lies on the host, on a device; for a GPU through pinned memory, unless it lies there."""
    if device.type == "cuda" and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class Lane:
    """Where a backend's work on a device is enqueued: a stream of its own on a GPU; elsewhere it is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is enqueued inside goes behind all that was on the lane and on the caller's stream before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def fetched(self, tensor: Tensor) -> Tensor:
        """The same on the host, where it may be read once a later mark was waited for."""
        if self._stream is None:
            return tensor
        return memory(tensor.shape, tensor.dtype, beside=self.device).copy_(tensor, non_blocking=True)

    def read(self, host: Tensor) -> Floats:
        """What was fetched, in memory that may be kept: pinned memory is short."""
        found: Floats = host.numpy()
        return found if self._stream is None else found.copy()

    def mark(self) -> Callable[[], None]:
        """A call that waits for all that was enqueued before. It raises what went wrong with that on a GPU."""
        if self._stream is None:
            return _nothing
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.synchronize


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _nothing() -> None:
    pass
