"""Weighted sums of losses and reported values, for each phase, task and name, and the log entries made of them.

Knows no trainer, no process but its own (sums of others are handed in) and no tensor library.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from mtserve.errors import ConfigError

Phase = Literal["train", "eval"]
Cell = list[float]
"""[sum of weight * value, sum of weights, number of values]; examples and tokens are sums alone."""
Sums = dict[str, dict[str, Cell]]
"""task ("" for values of no task) -> name -> cell. JSON-ready; floats come back from JSON as they were."""
Gather = Callable[[Sums], list[Sums]]

RESERVED = frozenset(
    {"loss", "epoch", "step", "learning_rate", "grad_norm", "num_input_tokens_seen", "total_flos", "runtime"}
    | {"samples_per_second", "steps_per_second", "tokens_per_second", "model_preparation_time", "jit_compilation_time"}
    | {"share", "examples", "tokens"}
)
"""Names that log entries already have a meaning for; names that start like a phase are taken too."""
_PHASES = ("train_", "eval_", "test_")
_HELD_BACK = 4096  # values kept as they came, perhaps on an accelerator, before they are read


class Ledger:
    """What happened since the last log entry, and over the whole training.

    A value counts in the batch that is open when it comes (`batch`), by that batch's weight. Outside of one it is left
    out: then nobody trains or evaluates (inference), or activations are computed a second time for the backward pass.
    A batch of weight 0, which a process has that found no examples left, leaves no values.
    """

    def __init__(self) -> None:
        self._sums: dict[Phase, Sums] = {"train": {}, "eval": {}}
        self._late: dict[Phase, list[tuple[str, str, float, Any]]] = {"train": [], "eval": []}
        self._whole: Sums = {}
        self._open: tuple[Phase, str | None, float] | None = None

    @contextmanager
    def batch(self, phase: Phase, task: str | None = None, weight: float = 1.0) -> Iterator[None]:
        """Within it, reports count for this phase and task, by this weight; the innermost of several holds."""
        outer, self._open = self._open, (phase, task, weight)
        try:
            yield
        finally:
            self._open = outer

    def report(self, /, **values: Any) -> None:
        """Count values of the open batch: tensors of any shape, arrays and numbers, each by its mean, NaN included.

        Several reports of one name in a batch are averaged. Raises ConfigError for a name that is no identifier or has
        a meaning in log entries already, and for a value that is none of these.
        """
        if self._open is None:
            return
        phase, task, weight = self._open
        for name, value in values.items():
            if not name.isidentifier() or name in RESERVED or name.startswith(_PHASES):
                allowed = (
                    f"identifiers that do not start with {', '.join(_PHASES)}, but for {', '.join(sorted(RESERVED))}"
                )
                raise ConfigError(f"report_metrics cannot take the name {name!r}; allowed: {allowed}")
            self._add(phase, task, name, weight, mean_of(name, value))

    def add_loss(
        self, task: str, value: Any, *, weight: float, examples: Any, tokens: Any, phase: Phase = "train"
    ) -> None:
        """Count a task's own mean loss of a batch (a scalar) by the batch's weight, and what the batch held."""
        self._add(phase, task, "loss", weight, mean_of("loss", value))
        for name, count in (("examples", examples), ("tokens", tokens)):
            self._add(phase, task, name, 1.0, mean_of(name, count))

    def add_part(self, part: Any, *, window: int) -> None:
        """Count what a micro-batch, one of `window` in its step, has added to the step's combined loss."""
        self._add("train", None, "loss", 1 / window, mean_of("loss", part) * window)

    def row(self, gather: Gather | None = None, *, tasks: Collection[str] = ()) -> dict[str, float]:
        """The entries of a log row of training, over all since the last one: `loss`, each reported `<name>`, and for
        each task `train_loss_<task>`, `train_share_<task>`, `train_examples_<task>`, `train_tokens_<task>` and reported
        `train_<name>_<task>`. Tasks named in `tasks` that had no batch have a share of 0 and no loss."""
        return _entries(self._take("train", gather), {*tasks, *self._whole}, lambda task, name: _train(task, name, ""))

    def summary(self, gather: Gather | None = None, *, tasks: Collection[str] = ()) -> dict[str, float]:
        """The entries of `row` over the whole training, values of no task as `train_<name>`."""
        self._take("train", gather)
        return _entries(self._whole, {*tasks, *self._whole}, lambda task, name: _train(task, name, "train_"))

    def evaluation(self, prefix: str, gather: Gather | None = None) -> dict[str, float]:
        """The entries of an evaluation: `<prefix>_<name>`, of a task `<prefix>_<task>_<name>` unless the prefix already
        ends with the task."""

        def key(task: str, name: str) -> str:
            return f"{prefix}_{name}" if not task or f"_{prefix}".endswith(f"_{task}") else f"{prefix}_{task}_{name}"

        return _entries(self._take("eval", gather), (), key)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Each task's examples and tokens over the whole training, up to the last row or summary."""
        return {t: {n: int(c[n][0]) for n in ("examples", "tokens") if n in c} for t, c in self._whole.items() if t}

    def clear(self, phase: Phase) -> None:
        """Forget what is not logged yet; for training also all before it."""
        self._sums[phase], self._late[phase] = {}, []
        if phase == "train":
            self._whole = {}

    def state_dict(self) -> dict[str, Sums]:
        """JSON-ready: `window`, what this process has not logged yet, and `whole`, the same in all processes."""
        self._settle("train")
        return copy.deepcopy({"window": self._sums["train"], "whole": self._whole})

    def load_state_dict(self, state: Mapping[str, Sums]) -> None:
        self.clear("train")
        self._sums["train"], self._whole = merge([state["window"]]), merge([state["whole"]])

    def _add(self, phase: Phase, task: str | None, name: str, weight: float, value: Any) -> None:
        if weight != 0:
            self._late[phase].append((task or "", name, weight, value))
            if len(self._late[phase]) >= _HELD_BACK:
                self._settle(phase)

    def _settle(self, phase: Phase) -> None:
        """Read the values held back; on an accelerator this waits for them. Sums stay in the order of the values."""
        for task, name, weight, value in self._late[phase]:
            cell = self._sums[phase].setdefault(task, {}).setdefault(name, [0.0, 0.0, 0])
            cell[:] = [cell[0] + weight * float(value), cell[1] + weight, cell[2] + 1]
        self._late[phase] = []

    def _take(self, phase: Phase, gather: Gather | None) -> Sums:
        self._settle(phase)
        mine, self._sums[phase] = self._sums[phase], {}
        taken = merge([mine] if gather is None else gather(mine))
        if phase == "train":
            self._whole = merge([self._whole, taken])
        return taken


def merge(parts: Iterable[Sums]) -> Sums:
    """Sums of several processes or times added up, so that their means are means over all values, by weight."""
    total: Sums = {}
    for part in parts:
        for task, cells in part.items():
            for name, cell in cells.items():
                held = total.setdefault(task, {}).setdefault(name, [0.0, 0.0, 0])
                held[:] = [mine + other for mine, other in zip(held, cell, strict=True)]
    return total


def mean_of(name: str, value: Any) -> Any:
    """The mean of a value: of a tensor a detached scalar where the tensor is, else a float; NaN of nothing."""
    if hasattr(value, "detach") and not value.is_complex():
        held = value.detach()
        return (held.float() if held.device.type == "mps" else held.double()).mean()
    if isinstance(value, bool | int | float | np.generic | np.ndarray) and np.asarray(value).dtype.kind in "biuf":
        return float(np.asarray(value).mean(dtype=np.float64)) if np.size(value) else math.nan
    found = f"{value!r:.60} of type {type(value).__name__}"
    raise ConfigError(f"report_metrics cannot take {name}={found}; allowed: real tensors, arrays, int, float, bool")


def _train(task: str, name: str, phase: str) -> str:
    return f"train_{name}_{task}" if task else f"{phase}{name}"


def _entries(sums: Sums, known: Collection[str], key: Callable[[str, str], str]) -> dict[str, float]:
    """Means, shares and counts under their keys, the combined loss and what belongs to no task first."""
    tasks = sorted({*known, *sums} - {""})
    weight = sum(cells["loss"][1] for task, cells in sums.items() if task and "loss" in cells)
    found = [("", name, cell[0] / cell[1]) for name, cell in sums.get("", {}).items()]
    for task in tasks:
        cells = dict(sums.get(task, {}))
        counts = {name: int(cells.pop(name, [0])[0]) for name in ("examples", "tokens")}
        found += [(task, name, cell[0] / cell[1]) for name, cell in cells.items()]
        if task in known or "loss" in cells:
            share = cells["loss"][1] / weight if "loss" in cells else 0.0
            found += [(task, "share", share), *((task, name, counts[name]) for name in counts)]
    entries: dict[str, float] = {}
    for task, name, value in found:
        if key(task, name) in entries:
            raise ConfigError(f"two values of this log entry would be called {key(task, name)!r}; rename one of them")
        entries[key(task, name)] = value
    return entries
