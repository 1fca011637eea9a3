"""A trunk's passes over few tokens as CUDA graphs, one for each bucket of tokens and rows. Knows no heads, no pasts.

For a short request the host needs longer to ask for a pass, kernel by kernel, than a GPU needs to compute it; a graph
is asked for in one call. It reads and writes the same memory every time, so a batch is copied into the inputs of the
smallest bucket that it fits, and padded there: tokens behind the last row are a row of their own, which nobody reads,
and rows behind it are empty.

A bucket is recorded when it is first needed, which takes some tenths of a second, and stays; beyond a number of them
passes are asked for as without graphs. Whoever makes graphs has them proven against the trunk's plain pass.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from mtserve.backends import flat
from mtserve.backends.proof import Proof, difference
from mtserve.backends.serving import Served
from mtserve.backends.staging import memory
from mtserve.rows import Ints
from mtserve.trunk import WORD_TYPE_FAMILIES

logger = logging.getLogger(__name__)

MOST_TOKENS = 512  # of a pass that is recorded; larger ones keep a GPU busy by themselves
MOST_GRAPHS = 48
_FEWEST_TOKENS = 16
_ROWS = (4, 16, 64, 256)
_WARM_UPS = 2
_RECORDING = threading.Lock()  # PyTorch records one graph at a time in a process

Run = Callable[[], Tensor]
Record = Callable[[Run], tuple[Callable[[], Any], Tensor]]
"""Takes a pass over inputs that stay where they are, and gives the call that repeats it, and where its output lies."""


@dataclass(frozen=True)
class Bucket:
    """What a graph has place for.

    tokens   powers of two, and halves between them
    rows     one of them is that of the padding
    """

    tokens: int
    rows: int


def bucket(lengths: Sequence[int], *, most_tokens: int) -> Bucket | None:
    """The smallest that fresh rows of these lengths fit; None where they are too many."""
    total, rows = sum(lengths), next((rows for rows in _ROWS if len(lengths) < rows), None)
    if total > most_tokens or rows is None:
        return None
    size = max(_FEWEST_TOKENS, 1 << (total - 1).bit_length())
    return Bucket(size * 3 // 4 if total <= size * 3 // 4 and size > _FEWEST_TOKENS else size, rows)


@dataclass(frozen=True, eq=False)
class Numbered:
    """Rows that are kept apart by a mask made of their numbers, in any precision; the mask is part of the pass, so that
    a graph makes it of the numbers that lie there when it is repeated.

    rows   (tokens,) int32 on the device: which row a token is of
    """

    rows: Tensor

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool, window: int | None
    ) -> Tensor:
        at = torch.arange(len(self.rows), device=self.rows.device)
        away = at[:, None] - at
        seen = self.rows[:, None] == self.rows
        if causal:
            seen = seen & (away >= 0)
        if window is not None:
            seen = seen & (away.abs() < window)
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
        out = scaled_dot_product_attention(
            query[None], key[None], value[None], mask, scale=scale, enable_gqa=len(query) != len(key)
        )
        return out[0].transpose(0, 1)


class _Inputs:
    """Memory of a bucket that its graph reads.

    lines    (3, tokens) int64: ids, type ids, positions
    layout   of the rows, made of `where` alone: (rows + 1,) limits of rows, or (tokens,) numbers of rows, int32
    """

    def __init__(self, size: Bucket, served: Served, *, varlen: bool) -> None:
        self.size, self._first_position = size, served.first_position
        self.lines = torch.zeros(3, size.tokens, dtype=torch.int64, device=served.device)
        self._where = torch.zeros(size.rows + 1 if varlen else size.tokens, dtype=torch.int32, device=served.device)
        self._varlen = varlen

    @property
    def layout(self) -> flat.Layout:
        return flat.Varlen(self._where, self.size.tokens) if self._varlen else Numbered(self._where)

    def fill(self, lines: Tensor, lengths: Sequence[int]) -> None:
        """Copy rows that lie end to end, (3, n) on the host, into the bucket."""
        padded, where = (memory(of.shape, of.dtype, beside=of.device) for of in (self.lines, self._where))
        padded[:, : lines.shape[1]] = lines
        padded[:2, lines.shape[1] :] = 0
        padded[2, lines.shape[1] :] = self._first_position
        where.numpy()[:] = self._limits(lengths) if self._varlen else self._numbers(lengths)
        self.lines.copy_(padded, non_blocking=True)
        self._where.copy_(where, non_blocking=True)

    def _limits(self, lengths: Sequence[int]) -> Ints:
        """Where rows begin and end; then the row of the padding, and empty ones."""
        limits = np.full(self.size.rows + 1, self.size.tokens, np.int32)
        limits[0] = 0
        limits[1 : 1 + len(lengths)] = np.cumsum(lengths)
        return limits

    def _numbers(self, lengths: Sequence[int]) -> Ints:
        """Of each token's row; the padding has the number behind the last."""
        numbers = np.full(self.size.tokens, len(lengths), np.int32)
        numbers[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
        return numbers


class Recorder:
    """Records passes on a GPU, as graphs that share their memory: they must be repeated on one stream, and what one
    gives must be read before the next is repeated."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> tuple[Callable[[], Any], Tensor]:
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):  # libraries make their workspaces here, which cannot be recorded
            for _ in range(_WARM_UPS):
                run()
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )  # other threads may go on with their own work
        with _RECORDING, torch.cuda.stream(here), recording:  # a recording that fails leaves its stream in force
            hidden = run()
        return graph.replay, hidden


_READS = ("aten.is_nonzero", "aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select")


class _Silent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where a pass asks its device for a number, or for memory of the other side: a graph cannot record that,
    and a recording that fails leaves PyTorch's allocator thinking that it goes on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_mask = name.startswith("aten.index.") and any(of is not None and of.dtype == torch.bool for of in args[1])
        if by_mask or name.startswith(_READS):
            raise RuntimeError(f"the pass reads from its device: {name}")
        found = func(*args, **(kwargs or {}))
        if name.startswith(("aten._to_copy", "aten.copy_")):
            devices = {one.device.type for one in (*args, found) if isinstance(one, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"the pass copies between {' and '.join(sorted(devices))}: {name}")
        return found


class Graphs:
    """Graphs of a served trunk.

    record     how a pass becomes a graph
    recorded   the buckets, each with its inputs, the call that repeats it and its output; None where that failed
    """

    def __init__(self, served: Served, record: Record, *, varlen: bool, most_tokens: int = MOST_TOKENS) -> None:
        self.served, self.most_tokens = served, most_tokens
        self.recorded: dict[Bucket, tuple[_Inputs, Callable[[], Any], Tensor] | None] = {}
        self._record, self._varlen = record, varlen

    def __call__(self, lines: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """Last hidden states (tokens, hidden) of fresh rows that lie end to end, (3, tokens) ids, type ids and
        positions on the host. None where there is no graph for them."""
        size = bucket(lengths, most_tokens=self.most_tokens)
        if size is None:
            return None
        if size not in self.recorded:
            self._add(size, lines, lengths)
        made = self.recorded.get(size)
        if made is None:
            return None
        inputs, repeat, hidden = made
        inputs.fill(lines, lengths)
        repeat()
        return hidden[: lines.shape[1]].clone()  # the next graph to be repeated may write there

    def _add(self, size: Bucket, lines: Tensor, lengths: Sequence[int]) -> None:
        if len(self.recorded) >= MOST_GRAPHS:
            return
        try:
            self.recorded[size] = self._made(size, lines, lengths)
        except Exception as error:  # a recording fails in many ways, and none of them matters but for speed
            self.recorded[size] = None
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            logger.warning("passes of up to %d tokens have no CUDA graph: %s", size.tokens, said)

    def _made(self, size: Bucket, lines: Tensor, lengths: Sequence[int]) -> tuple[_Inputs, Callable[[], Any], Tensor]:
        inputs = _Inputs(size, self.served, varlen=self._varlen)
        inputs.fill(lines, lengths)

        def run() -> Tensor:
            ids, type_ids, positions = inputs.lines.unbind()
            return self.served.encode(ids, type_ids, positions, inputs.layout)

        with _Silent():  # type: ignore[no-untyped-call]
            run()
        repeat, hidden = self._record(run)
        return inputs, repeat, hidden

    def prove(self, proof: Proof) -> str | None:
        """What speaks against these graphs: that random rows get other states than from the plain pass, say."""
        wanted = proof.states(self.served.encode, self.served.layout)
        most, self.most_tokens = self.most_tokens, max(self.most_tokens, sum(proof.lengths))
        found = proof.states(self._encode, lambda lengths: flat.Block(tuple(lengths)))
        self.most_tokens = most
        off = difference(found, wanted)
        return None if off <= max(1e-4, 8 * torch.finfo(self.served.dtype).eps) else f"states differ by {off:.1e}"

    def _encode(self, ids: Tensor, type_ids: Tensor, positions: Tensor, layout: flat.Layout) -> Tensor:
        assert isinstance(layout, flat.Block)
        lines, lengths = torch.stack((ids, type_ids, positions)).cpu(), layout.lengths
        size = bucket(lengths, most_tokens=self.most_tokens)
        assert size is not None
        if size not in self.recorded:
            self.recorded[size] = self._made(size, lines, lengths)  # what it raises is why there are no graphs
        hidden = self(lines, lengths)
        assert hidden is not None
        return hidden


def graphs_of(served: Served, proof: Proof, *, record: Record | None = None) -> Graphs | None:
    """Graphs of a trunk on a GPU, if they can be recorded and give what its plain pass gives; or None, and the log says
    why. None without a word elsewhere.

    record   by default a GPU's
    """
    if record is None and served.device.type != "cuda":
        return None
    family = served.trunk.config.model_type
    reason: str | None = None
    if not served.flat:
        reason = "its rows are padded"
    elif family in WORD_TYPE_FAMILIES:
        reason = "its pass depends on what the type ids are"
    else:
        try:
            graphs = Graphs(
                served, record or Recorder(served.device), varlen=isinstance(served.layout([1]), flat.Varlen)
            )
            reason = graphs.prove(proof)
            if reason is None:
                return graphs
        except Exception as error:  # in many ways, as above
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    logger.warning("%s has no CUDA graphs: %s", family, reason)
    return None
