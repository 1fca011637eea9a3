"""What this machine offers to a profile of PyTorch's, and with how many threads PyTorch computes. Knows no models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mtserve.backends import int8
from mtserve.errors import ConfigError
from mtserve.profiles import Device, Hardware

_CPU_FLAGS = {
    "_is_amx_tile_supported": ("amx_bf16", "amx_int8"),
    "_is_avx512_bf16_supported": ("avx512_bf16",),
    "_is_vnni_supported": ("avx512_vnni",),
}


def device(wanted: str = "auto") -> Device:
    """`cpu` or `cuda`; of `auto` the GPU where there is one. Raises ConfigError for a GPU that PyTorch does not see."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda; found {wanted!r}")
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError(f"device cuda was asked for, but PyTorch {torch.__version__} sees no GPU")
    return "cuda" if there and wanted != "cpu" else "cpu"


def hardware(on: Device) -> Hardware:
    """The device with those of its capabilities that this PyTorch can use."""
    if on == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return Hardware(on, frozenset({f"sm_{major}{minor}", *(["bf16"] if major >= 8 else [])}))
    flags: set[str] = set()
    for name, meant in _CPU_FLAGS.items():
        probe: Callable[[], bool] | None = getattr(torch.cpu, name, None)
        if probe is not None and probe():
            flags.update(meant)
    if int8.obstacle() is not None:
        flags -= {"amx_int8", "avx512_vnni"}
    return Hardware(on, frozenset(flags))


def use_threads(count: int) -> None:
    """Let this process compute with so many threads."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
