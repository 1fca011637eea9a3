"""How a process uses its share of this machine. Knows no models and no framework.

Cores and threads: a process uses the cores that it may use, divided by the processes that share them, so that several
workers do not take each other's time. Usable are the physical cores among those of the process's affinity, at most as
many as its control group has time for.

Memory: glibc gives large blocks back to the system when they are freed, so every pass over some thousand tokens faults
its activations in again. `keep_memory` has it keep them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT = 2**30  # bytes at the top of the heap that are not given back
_STEP = 64 * 2**20  # by which the heap grows
_LARGEST = 32 * 2**20  # the largest threshold that glibc takes; larger blocks are still mapped each for itself


def usable_cores() -> int:
    """Physical cores of this process's affinity, within the time that its control group has; at least 1."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in allowed})
    return max(1, min([cores, *map(int, cgroup_limits())]))


def _siblings(cpu: int) -> str:
    """The logical CPUs of a CPU's core; its own number where the system does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def cgroup_limits(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """CPUs' worth of time that the control groups of this process allow, of both versions, at every level."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / "cpu" if controllers else mount
        for level in (path, *map(str, Path(path).parents)):
            folder = root / level.lstrip("/")
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            try:
                quota, period = " ".join((folder / name).read_text() for name in names).split()
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def threads_for(cores: int, *, processes: int, wanted: int | None = None) -> int:
    """Threads of a process among so many on these cores; `wanted` as it is, with a warning if it is more than there
    are."""
    if wanted is None:
        return max(1, cores // processes)
    if wanted * processes > cores:
        many = f"{wanted} threads" if processes == 1 else f"{processes} processes of {wanted} threads each"
        logger.warning("%s on %d usable cores: they will take each other's time", many, cores)
    return wanted


def keep_memory() -> bool:
    """Have freed memory kept for the next pass; whether that was possible. It holds for the life of the process, and
    does nothing where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _STEP))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)


def trim_memory() -> bool:
    """Give back what is freed, kept or not; whether that was possible (glibc)."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
