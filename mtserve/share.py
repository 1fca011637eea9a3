"""A worker's share of the machine: its cores and threads, and whether it keeps freed memory. Knows no models."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass

from mtserve.backends import machine
from mtserve.errors import MissingExtraError
from mtserve.manifest import Speed
from mtserve.settings import Settings

SPINS = "10000"
KERNELS = "128"
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_few_kernels() -> None:
    """Before anything is computed in a process whose batches are large: let oneDNN, and PyTorch's layer over it, keep
    few of the kernels that they make for each shape, unless the environment says how many.

    Batches without padding have as many shapes as there are sums of lengths, so few come again, and the default of
    1,024 comes to 1.5 GiB in bf16 on a processor with AMX. Short requests do come again: a server keeps them.
    """
    for name in _CACHES:
        os.environ.setdefault(name, KERNELS)


def wait_briefly() -> None:
    """In the parent, before it starts what computes: let GNU OpenMP's threads give their core away soon while they wait
    for each other, unless the environment says how.

    By default they spin for milliseconds. Where anything else wants a core for a while, the thread that the others wait
    for is not running, and they keep it from running: each operation then takes a time slice of the scheduler.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


@dataclass
class Share:
    """Processes that share the cores (workers of a server, and servers: MTSERVE_PROCESSES) have an equal part of them
    each, so that together they never compute with more threads than there are cores. MTSERVE_THREADS overrides.

    cores     usable ones of this process
    threads   with which it computes; bundles are told when they are opened
    torch     whether any of its models computes in PyTorch
    """

    settings: Settings
    cores: int
    threads: int
    torch: bool = True

    @classmethod
    def of(cls, settings: Settings, *, workers: int, torch: bool = True) -> Share:
        """The share of one of so many workers; in force at once."""
        cores, processes = machine.usable_cores(), settings.processes * workers
        threads = machine.threads_for(cores, processes=processes, wanted=settings.threads)
        share = cls(settings, machine.threads_for(cores, processes=processes), threads, torch)
        share._use_threads()
        return share

    def settle(self, tuned: Sequence[Speed]) -> None:
        """Put in force what tuning found for the models of this process, but for what the settings say. What is loaded
        by now stays, so the collector of garbage, which would go through all of it every few thousand requests or rows,
        need not look at it."""
        if self.settings.threads is None and (best := [speed.threads for speed in tuned if speed.threads]):
            self.threads = min(self.threads, max(best))
            self._use_threads()
        keep = self.settings.keep_memory
        if keep is None:
            keep = all(speed.keep_memory is not False for speed in tuned)
        if keep:
            machine.keep_memory()
        gc.unfreeze()  # of a model that was there before
        gc.collect()
        gc.freeze()

    def _use_threads(self) -> None:
        if self.torch:
            try:
                from mtserve.backends import hardware
            except ImportError as error:
                raise MissingExtraError("running a torch checkpoint", "torch") from error
            hardware.use_threads(self.threads)
