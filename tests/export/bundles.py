"""Tiny checkpoints and the bundles that they become, exported once in a process."""

from __future__ import annotations

import shutil
import tempfile
from atexit import register
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mtserve.backends.onnx import OnnxBackend
from mtserve.bundle import Dtype
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.export.bundling import Report, export
from mtserve.loading import load_checkpoint
from tests.labelled import write_labelled
from tests.tiny import Tiny, tiny

ENCODER = ("topic", "names", "cosine")
DECODER = ("forth", "back", "topic")


@dataclass
class Pair:
    """A model, the checkpoint that was sealed of it, and the bundle that was exported."""

    small: Tiny
    checkpoint: Checkpoint
    report: Report

    @property
    def bundle(self) -> Checkpoint:
        assert self.report.bundle is not None, self.report
        return self.report.bundle

    def engine(self) -> Engine:
        return load_checkpoint(self.bundle)


@cache
def home() -> Path:
    made = Path(tempfile.mkdtemp(prefix="bundles-"))
    register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def pair(family: str, *, only: tuple[str, ...] | None = None, dtype: Dtype = "fp32", max_flips: float = 0.005) -> Pair:
    """All tasks that the family can have, or those named."""
    folder = Path(tempfile.mkdtemp(dir=home(), prefix=family))
    small = tiny(family, only=only)
    checkpoint = write_labelled(folder / "checkpoint", small)
    return Pair(small, checkpoint, export(checkpoint, folder / "bundle", dtype=dtype, max_flips=max_flips))


def backend(engine: Engine) -> OnnxBackend:
    assert isinstance(engine.backend, OnnxBackend)
    return engine.backend
