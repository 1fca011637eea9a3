"""Stock task models over one frozen trunk, each in a folder of its own, merged into one checkpoint. Trains nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError, ConfigError
from mtserve.interop.assemble import (
    check_known,
    import_card,
    output_layer,
    put_stock,
    samples,
    seal_tasks,
    source_of,
    task_options,
    to_shares,
    trunk_from,
)
from mtserve.interop.tokenizers import spec_beside, tokenizer_json
from mtserve.model import Model
from mtserve.resolve import resolve
from mtserve.tasks.base import Options
from mtserve.tasks.similarity import SimilarityOptions
from mtserve.tasks.spans import tag_names
from mtserve.tasks.token_classification import TokenClassificationOptions
from mtserve.trunk import no_progress_bars

_KINDS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForMultipleChoice": "multiple_choice",
    "ForCausalLM": "generation",
    "LMHeadModel": "generation",
}


@dataclass(frozen=True)
class _Stock:
    """A task as it was found."""

    name: str
    folder: Path
    config: PretrainedConfig
    architecture: str

    @classmethod
    def of(cls, name: str, location: str) -> _Stock:
        folder = resolve(location)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} has no config that Transformers knows: {error}") from error
        return cls(name, folder, config, (config.architectures or ["none"])[0])

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.config.id2label[index] for index in range(self.config.num_labels))

    def kind(self) -> str:
        """What its architecture is, where that says it. Raises ConfigError."""
        kind = next((kind for ending, kind in _KINDS.items() if self.architecture.endswith(ending)), None)
        if kind is None:
            found = f"{self.folder} has the architecture {self.architecture}"
            raise ConfigError(f"{found}, which is no task of a known kind; allowed: *{', *'.join(_KINDS)}")
        one = self.config.num_labels == 1 or self.config.problem_type == "regression"
        return "similarity" if kind == "classification" and one else kind

    def load(self) -> PreTrainedModel:
        """The whole model, in fp32. Raises CheckpointError."""
        form: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        try:
            with no_progress_bars():
                stock = getattr(transformers, self.architecture)
                model, report = stock.from_pretrained(self.folder, local_files_only=True, **form)
        except (AttributeError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder} cannot be loaded as {self.architecture}: {error}") from error
        if report["missing_keys"]:
            raise CheckpointError(f"{self.folder} lacks the tensor {min(report['missing_keys'])}")
        return model.eval()


def import_models(
    output: Path,
    folders: Mapping[str, str],
    *,
    kinds: Mapping[str, str],
    options: Mapping[str, Mapping[str, Any]],
    golden: Mapping[str, Sequence[Any]],
) -> Checkpoint:
    """Merge task models (task -> folder or hub id) whose trunks and tokenizers are equal, and seal them.

    kinds: only those that an architecture does not say. options: a task's; labels come from its config. golden: inputs
    by task; the kind's sample where there are none. Raises ConfigError, ResolveError, or CheckpointError with the first
    tensor in which a trunk differs from that of the first task.
    """
    check_known(folders, {"kinds": kinds, "options": options, "golden inputs": golden})
    found = [_Stock.of(name, location) for name, location in folders.items()]
    if not found:
        raise ConfigError("no task is given; name one at least: --task NAME=FOLDER")
    first = found[0]
    for stock in found[1:]:
        if _plain(tokenizer_json(stock.folder)) != _plain(tokenizer_json(first.folder)):
            raise CheckpointError(f"the tokenizers of {first.folder} and {stock.folder} differ; rows would be others")
    kind_of = {stock.name: kinds.get(stock.name) or stock.kind() for stock in found}
    wholes = [stock.load() for stock in found]
    config = copy.deepcopy(first.config)
    config.update({"id2label": None, "label2id": None, "problem_type": None, "num_labels": 2})
    made = Model(trunk_from(_common(found, wholes), config))
    tasks = []
    for stock, whole in zip(found, wholes, strict=True):
        _check_states(stock, whole.base_model, made.trunk)
        kind = kind_of[stock.name]
        chosen = task_options(stock.name, kind, {**_said(stock, kind), **options.get(stock.name, {})})
        _fit_outputs(stock.name, whole, chosen)
        tasks.append(put_stock(made, stock.name, kind=kind, options=chosen, stock=whole))
    tokenizer = tokenizer_json(first.folder)
    return seal_tasks(
        output,
        made,
        tasks=tasks,
        golden=samples(tasks, golden),
        tokenizer_json=tokenizer,
        text=spec_beside(first.folder, made.trunk.config, tokenizer),
        source=source_of(folders[first.name]),
        card=import_card("Task models merged on their common trunk", source_of(folders[first.name]), tasks),
        provenance={"import": {"imported_from": "models", "models": {n: source_of(f) for n, f in folders.items()}}},
    )


def _common(found: Sequence[_Stock], wholes: Sequence[PreTrainedModel]) -> dict[str, Tensor]:
    """The tensors of the trunk that all have; a pooler, for which not all have a use, may come from a later one.

    Raises CheckpointError with the first tensor that differs.
    """
    common: dict[str, Tensor] = {}
    owners: dict[str, _Stock] = {}
    for stock, whole in zip(found, wholes, strict=True):
        theirs = whole.base_model.state_dict()
        for name in sorted(theirs.keys() | common.keys()):
            pooler = name.startswith("pooler.")
            if name not in common and (pooler or stock is found[0]):
                common[name], owners[name] = theirs[name], stock
            elif not (pooler and name not in theirs) and not _equal(common.get(name), theirs.get(name)):
                why = " (a pooler is part of the trunk, and must have been frozen with it)" if pooler else ""
                raise CheckpointError(
                    f"the trunks of {owners.get(name, found[0]).folder} and {stock.folder} differ in {name}{why}"
                )
    return common


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


@torch.no_grad()
def _check_states(stock: _Stock, theirs: PreTrainedModel, ours: PreTrainedModel) -> None:
    """Raise CheckpointError if a task's config makes something else of the trunk's tensors."""
    ids = torch.arange(8, 16)[None]  # (rows, seq)
    if not torch.allclose(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, atol=1e-5):
        raise CheckpointError(f"the config of {stock.folder} makes another trunk of the same tensors")


def _said(stock: _Stock, kind: str) -> dict[str, Any]:
    """Options that a task's config states."""
    if kind == "classification":
        multi = stock.config.problem_type == "multi_label_classification"
        return {"labels": stock.labels, "multi_label": multi}
    if kind == "token_classification":
        return {"labels": tuple(dict.fromkeys(tag[2:] for tag in stock.labels if tag != "O"))}
    return {}


@torch.no_grad()
def _fit_outputs(task: str, model: PreTrainedModel, options: Options) -> None:
    """Make a stock model's outputs those of our kind: tags in its order, scores on [0, 1]. Raises ConfigError."""
    if isinstance(options, TokenClassificationOptions):
        found = [model.config.id2label[index] for index in range(model.config.num_labels)]
        tags = tag_names(options.labels)
        if sorted(tags) != sorted(found):
            wanted = "IOB2, which is O, and B-x and I-x of every label x"
            raise ConfigError(f"the outputs of task {task!r} are {', '.join(found)}; allowed: {wanted}")
        for tensor in output_layer(model).parameters():
            tensor.copy_(tensor[[found.index(tag) for tag in tags]])
        model.config.id2label = dict(enumerate(tags))
    if isinstance(options, SimilarityOptions):
        if not {"low", "high"} & options.model_fields_set:
            said = "its scores have a range that its config does not say; say it"
            raise ConfigError(f'task {task!r}: {said}: --options {task}=\'{{"low": 0, "high": 5}}\'')
        to_shares(output_layer(model), options)


def _plain(tokenizer: str) -> Any:
    """A tokenizer without the truncation and padding that may be baked into its file."""
    return {**json.loads(tokenizer), "padding": None, "truncation": None}
