"""Low-rank adaptation of a trunk (LoRA: Hu et al., 2021), by peft: small matrices beside the trunk's own are trained
and, at the end, added into them. What is sealed is an ordinary trunk; nothing of peft is in it.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from pydantic import Field, field_validator
from torch import nn

from mtserve.errors import ConfigError
from training.section import Section

if TYPE_CHECKING:
    from peft import LoraModel


class Lora(Section):
    """What is trained in place of the trunk's weights: rank × (inputs + outputs) numbers for each matrix adapted.

    targets   the last parts of the names of linear layers, as `query`; all linear layers of the trunk by default
    """

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1, description="The update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Of the inputs of the small matrices.")
    targets: tuple[str, ...] = ()

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_several(cls, names: object) -> object:
        return [names] if isinstance(names, str) else names


def add_adapters(trunk: nn.Module, lora: Lora) -> LoraModel:
    """Put adapters, which change nothing yet, into the trunk; of its parameters they alone are trained from here on.

    Raises ConfigError where peft is not installed, for a target that names no linear layer, and where there is none.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ConfigError("training.lora: needs peft; install it with: pip install 'mtserve[train]'") from error
    linear = _linear_layers(trunk)
    if not linear:
        raise ConfigError(f"training.lora: {type(trunk).__name__} has no linear layer to adapt")
    ends = {name.rpartition(".")[2] for name in linear}
    wrong = [target for target in lora.targets if not any(_names(target, name) for name in linear)]
    if wrong:
        raise ConfigError(f"training.lora.targets: {wrong[0]!r} is no linear layer; allowed: {', '.join(sorted(ends))}")
    chosen = [name for name in linear if not lora.targets or any(_names(target, name) for target in lora.targets)]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=chosen)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # GPT-2's; peft sets it right
        return LoraModel(trunk, config, "default")


def merge_adapters(adapters: LoraModel) -> None:
    """Add what was trained into the trunk's own matrices, and take the adapters out of it. In place."""
    trunk = adapters.model
    adapters.merge_and_unload()
    for parameter in trunk.parameters():
        parameter.requires_grad = True


def _linear_layers(trunk: nn.Module) -> list[str]:
    """Names of the matrices that peft can adapt: linear layers, and GPT-2's, which keeps them transposed."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)
