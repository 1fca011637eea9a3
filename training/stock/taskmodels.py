"""A stock task model whose trunk is another's: only its head is loaded. Knows no data and no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mtserve.errors import ConfigError
from mtserve.trunk import no_progress_bars


def stock_class(task: str, auto: Any, config: PretrainedConfig) -> Any:
    """The model class that an `AutoModelFor…` class means for a config; a model class means itself."""
    if isinstance(auto, type) and issubclass(auto, PreTrainedModel):
        return auto
    mapping = getattr(auto, "_model_mapping", {})
    if type(config) not in mapping:
        asked = getattr(auto, "__name__", auto)
        raise ConfigError(f"task {task!r}: {config.model_type} has no {asked}; allowed: a class that the family has")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


class _Headless(PreTrainedModel):  # type: ignore[misc]  # transformers is not followed
    """Mixed into a stock class while its head is loaded: the trunk is dropped before any memory is taken for it."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        inside = self.base_model_prefix + "."
        self.dropped = {n.removeprefix(inside): p.shape for n, p in self.named_parameters() if n.startswith(inside)}
        self.absent: set[str] = set()
        setattr(self, self.base_model_prefix, nn.Module())
        tied: dict[str, str] = self.all_tied_weights_keys
        for name in [name for name in tied if name.startswith(inside)]:
            del tied[name]
        self._keys_to_ignore_on_load_unexpected = {""}  # any: the file holds the trunk, and perhaps another head

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:  # noqa: FBT001, FBT002
        """Only note what the file lacks: tying waits for the trunk."""
        if missing_keys is not None:
            self.absent = set(missing_keys)
            missing_keys.difference_update(self.all_tied_weights_keys)


def task_model(
    task: str, auto: Any, folder: Path, *, config: PretrainedConfig, trunk: PreTrainedModel
) -> tuple[PreTrainedModel, set[str]]:
    """A task model over `trunk`, its head loaded, initialised and tied as `from_pretrained` does, and which of the
    head's tensors the folder lacks. It has a config of its own. Raises ConfigError if its trunk would be another.
    """
    stock = stock_class(task, auto, config)
    headless: Any = type(stock.__name__, (_Headless, stock), {"__module__": stock.__module__})
    with no_progress_bars():
        model = headless.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    dropped, absent = model.__dict__.pop("dropped"), model.__dict__.pop("absent")
    model.__class__ = stock
    found = {name: tensor.shape for name, tensor in trunk.named_parameters()}
    differing = [name for name, shape in dropped.items() if found.get(name) != shape]
    if differing or not dropped:
        fault = f"in {differing[0]}" if differing else f"there is none at {stock.base_model_prefix!r}"
        raise ConfigError(f"task {task!r}: the trunk of {stock.__name__} by its config is not the shared one: {fault}")
    setattr(model, stock.base_model_prefix, trunk)
    model.tie_weights(missing_keys=set(absent), recompute_mapping=False)
    return model, absent - model.all_tied_weights_keys.keys()
