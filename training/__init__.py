"""Training of multitask checkpoints. The names here are the Python API; a run file needs none of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.stock.multitask import MultitaskModel
    from training.trainer.multitask import MultitaskTrainer
    from training.trainer.reporting import ReportingTrainer, ReportsMetrics

__all__ = ["MultitaskModel", "MultitaskTrainer", "ReportingTrainer", "ReportsMetrics"]

_HOMES = {
    "MultitaskModel": "stock.multitask",
    "MultitaskTrainer": "trainer.multitask",
    "ReportingTrainer": "trainer.reporting",
    "ReportsMetrics": "trainer.reporting",
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: torch and transformers take seconds, and the command line says mistakes first."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"training.{_HOMES[name]}"), name)
