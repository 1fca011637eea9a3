"""Stock Transformers task models around one trunk, behind the call that the write-ups make. Knows no data, no trainer.

Where a task model's trunk sits is its class's own `base_model_prefix`, so any family with stock classes works.
"""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mtserve.errors import CheckpointError, ConfigError, UnknownTaskError
from mtserve.manifest import check_task_name
from mtserve.model import module_name
from mtserve.resolve import resolve
from mtserve.trunk import is_causal, load_trunk, no_progress_bars
from training.stock.taskmodels import task_model

INDEX = "multitask.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class MultitaskModel(nn.Module):
    """One trunk (`encoder`) and a stock task model a task, whose trunk it is.

    In `state_dict` every shared tensor stands once, under the trunk's name. Rows of a sequence classifier over a causal
    trunk are pooled at the last token that is not `config.pad_token_id`; `forward` refuses rows where that is not the
    last real one, or not `config.cls_token_id` where the task's config names one.
    """

    accepts_loss_kwargs = False  # losses are means over the batch, to be divided by the accumulated batches

    def __init__(self, encoder: PreTrainedModel, taskmodels: Mapping[str, PreTrainedModel]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({module_name(name): task for name, task in taskmodels.items()})
        self.taskmodels_dict = dict(taskmodels)
        types = "token_type_ids" in inspect.signature(encoder.forward).parameters
        self._uses_types = types and getattr(encoder.config, "type_vocab_size", 0) > 1
        pooling = {name for name, task in taskmodels.items() if "SequenceClassification" in type(task).__name__}
        one_way = not getattr(encoder.config, "is_encoder_decoder", False) and pooling and is_causal(encoder)
        self._pools_last = pooling if one_way else set()
        hooks: Any = self  # torch leaves these untyped
        hooks.register_state_dict_post_hook(_drop_aliases)
        hooks.register_load_state_dict_post_hook(_forgive_aliases)

    @classmethod
    def create(
        cls,
        model_name: str,
        model_type_dict: Mapping[str, Any],
        model_config_dict: Mapping[str, PretrainedConfig],
        *,
        seed: int = 0,
    ) -> MultitaskModel:
        """A trunk from a folder or the hub, and a task model of each class (`AutoModelFor…` or a stock one) and config.

        The trunk follows the model's own config, whatever the tasks' configs say, but for the ids of special tokens
        that these agree on. Fresh weights follow from `seed` and the task's name. Raises ConfigError, ResolveError or
        CheckpointError.
        """
        if not model_type_dict or model_type_dict.keys() != model_config_dict.keys():
            found = f"{', '.join(model_type_dict) or 'none'}; {', '.join(model_config_dict) or 'none'}"
            raise ConfigError(f"model_type_dict and model_config_dict must have the same tasks, at least one: {found}")
        folder = resolve(model_name)
        with _seeded(f"{seed}"):
            encoder = load_trunk(str(folder))  # whole: which tensors it has does not depend on the tasks
        tasks = {}
        for name, config in model_config_dict.items():
            _check_name(name)
            with _seeded(f"{seed}/{name}"):
                tasks[name], _ = task_model(name, model_type_dict[name], folder, config=config, trunk=encoder)
        for attribute in _IDS:
            stated = getattr(encoder.config, attribute, None)
            values = [getattr(task.config, attribute, None) for task in tasks.values()]
            for task, value in zip(tasks.values(), values, strict=True):
                if value != stated and task.can_generate():  # it was made of the folder's config, not of the task's
                    setattr(task.generation_config, attribute, value)
            if values[0] is not None and all(value == values[0] for value in values):
                setattr(encoder.config, attribute, values[0])
        return cls(encoder, tasks)

    @property
    def config(self) -> PretrainedConfig:
        """The trunk's config."""
        return self.encoder.config

    def forward(
        self,
        task_name: str,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """The task model's own output for (rows, seq) ids, or (rows, choices, seq); its loss is the batch's mean.

        Type ids reach trunks with types only: GPT-2 would add word embeddings for them. Raises UnknownTaskError, or
        ConfigError for rows that would be pooled at a wrong token.
        """
        if task_name not in self.taskmodels_dict:
            raise UnknownTaskError(task_name, self.taskmodels_dict)
        if task_name in self._pools_last and input_ids is not None and attention_mask is not None:
            self._check_pooling(task_name, input_ids, attention_mask)
        types = {"token_type_ids": token_type_ids} if self._uses_types and token_type_ids is not None else {}
        task = self.taskmodels_dict[task_name]
        return task(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **types)

    def _check_pooling(self, name: str, ids: Tensor, mask: Tensor) -> None:
        config = self.taskmodels_dict[name].config
        if config.pad_token_id is None:
            raise ConfigError(f"task {name!r} pools the last token that is no padding; its config has no pad_token_id")
        at = torch.arange(ids.shape[1], device=ids.device)
        last = (at * mask).argmax(1)  # (rows,)
        end = ids.gather(1, last[:, None])[:, 0]
        for row in (last != (at * (ids != config.pad_token_id)).argmax(1)).nonzero().flatten().tolist():
            found = f"row {row} ends with token {end[row]}, and is pooled elsewhere"
            raise ConfigError(f"task {name!r}: {found}; pad_token_id {config.pad_token_id} must be no token of a text")
        wanted = getattr(config, "cls_token_id", None)
        for row in [] if wanted is None else (end != wanted).nonzero().flatten().tolist():
            found = f"row {row} ends with token {end[row]} instead of cls_token_id {wanted}, where it is pooled"
            raise ConfigError(f"task {name!r}: {found}; was it cut by truncation?")

    def check_sharing(self) -> None:
        """Raise CheckpointError, with the tensor's name, unless every task computes with the trunk's own tensors."""
        for name, task in self.taskmodels_dict.items():
            theirs = dict(getattr(task, task.base_model_prefix).named_parameters(remove_duplicate=False))
            for key, tensor in self.encoder.named_parameters(remove_duplicate=False):
                if key not in theirs or theirs[key].data_ptr() != tensor.data_ptr():
                    raise CheckpointError(f"task {name!r} does not share the trunk's {key}")
            for key, source in task.all_tied_weights_keys.items():
                if task.get_parameter(key).data_ptr() != task.get_parameter(source).data_ptr():
                    raise CheckpointError(f"task {name!r}: {key} is not tied to {source}")

    def resize_token_embeddings(self, size: int, *, seed: int = 0) -> None:
        """Give the trunk and every task's output matrix `size` rows; new ones follow from the old and `seed`.

        Parameters are replaced, so an optimizer is made afterwards.
        """
        with _seeded(f"{seed}"):
            for model in (self.encoder, *self.taskmodels_dict.values()):
                model.resize_token_embeddings(size)
        self.settle()

    def settle(self) -> None:
        """Before anything is written: all is shared, and all configs have the trunk's number of tokens, also after task
        models were resized one by one. Raises CheckpointError."""
        size = self.encoder.config.vocab_size = self.encoder.get_input_embeddings().weight.shape[0]
        for name, task in self.taskmodels_dict.items():
            if task.config.vocab_size != size:
                found = f"the config of task {name!r} has {task.config.vocab_size} tokens, the trunk {size}"
                raise CheckpointError(f"{found}; resize_token_embeddings of the multitask model resizes all")
        self.check_sharing()

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the trunk's activations again in the backward pass instead of keeping them; Trainer calls it."""
        self.encoder.activation_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The same under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def save(self, folder: str | Path) -> None:
        """Write the trunk once, as `AutoModel` loads it, and beside it each head. The folder must be new or empty."""
        home = Path(folder)
        if home.exists() and any(home.iterdir()):
            raise CheckpointError(f"{home} holds something; choose an empty folder")
        self.settle()
        with no_progress_bars():
            self.encoder.save_pretrained(home / "trunk")
        for name, task in self.taskmodels_dict.items():
            place = home / "heads" / name
            place.mkdir(parents=True)
            task.config.architectures = [type(task).__name__]
            task.config.save_pretrained(place)
            if task.can_generate():
                task.generation_config.save_pretrained(place)
            save_file(self.head_tensors(name), place / "model.safetensors", metadata={"format": "pt"})
        (home / INDEX).write_text(json.dumps({"tasks": list(self.taskmodels_dict)}), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> MultitaskModel:
        """What `save` wrote. Raises CheckpointError if a tensor is missing."""
        home = Path(folder)
        if not (home / INDEX).is_file():
            raise CheckpointError(f"{home} holds no {INDEX}, so it is no saved multitask model")
        encoder, tasks = load_trunk(str(home / "trunk")), {}
        for name in json.loads((home / INDEX).read_text(encoding="utf-8"))["tasks"]:
            _check_name(name)
            place = home / "heads" / name
            config = AutoConfig.from_pretrained(place, local_files_only=True)
            stock = getattr(transformers, (config.architectures or [""])[0], None)
            tasks[name], fresh = task_model(name, stock, place, config=config, trunk=encoder)
            if fresh:
                raise CheckpointError(f"{place}: {len(fresh)} tensors are missing, the first is {min(fresh)}")
        return cls(encoder, tasks)

    def head_tensors(self, name: str) -> dict[str, Tensor]:
        """A task's own tensors, each once, under the names of the stock model."""
        task, prefix = self.taskmodels_dict[name], module_name(name)
        aliases = {key.removeprefix(f"heads.{prefix}.") for key in _aliases(self)}
        state = task.state_dict().items()
        return {key: tensor.contiguous() for key, tensor in state if key not in aliases}


def _check_name(task: str) -> None:
    try:
        check_task_name(task)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _aliases(model: MultitaskModel) -> list[str]:
    """Names of tensors that stand under an earlier name too; the trunk's come first."""
    first: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in tensors if first.setdefault(id(tensor), name) != name]


def _drop_aliases(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(model, MultitaskModel)
    for name in _aliases(model):
        state.pop(prefix + name, None)


def _forgive_aliases(model: nn.Module, keys: Any) -> None:
    assert isinstance(model, MultitaskModel)
    aliases = set(_aliases(model))
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in aliases]


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Random numbers that follow from `text`; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(text.encode()))
        yield
