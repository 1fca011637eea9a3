"""mtserve: one encoder, every task. An inference and serving toolkit for trained multitask checkpoints."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from mtserve.engine import Engine
from mtserve.errors import (
    CheckpointError,
    InputError,
    MtserveError,
    UnknownTaskError,
)
from mtserve.loading import load
from mtserve.tasks import KINDS

try:
    __version__ = version("mtserve")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "KINDS",
    "CheckpointError",
    "Engine",
    "InputError",
    "MtserveError",
    "UnknownTaskError",
    "__version__",
    "load",
]
