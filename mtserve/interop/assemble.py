"""Stock task models over one trunk, made into a checkpoint. Knows neither where they come from nor their tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

import mtserve
from mtserve.backends.eager import EagerBackend
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine, Task
from mtserve.errors import CheckpointError, ConfigError, InputError
from mtserve.golden import golden_rows
from mtserve.heads import StockHead
from mtserve.manifest import check_kind, check_task_name
from mtserve.model import Model
from mtserve.sealing import seal
from mtserve.tasks import KINDS
from mtserve.tasks.base import Options
from mtserve.tasks.similarity import SimilarityOptions
from mtserve.tasks.validation import validate
from mtserve.text import Text, TextSpec
from mtserve.trunk import is_causal, max_length, no_progress_bars
from mtserve.weights import task_part, trunk_part


def task_options(name: str, kind: str, raw: Mapping[str, Any]) -> Options:
    """A task's options, its name and its kind checked too. Raises ConfigError."""
    try:
        options: Options = validate(KINDS[check_kind(kind)].options, raw, prefix="options.")
        check_task_name(name)
    except (InputError, ValueError) as error:
        raise ConfigError(f"task {name!r}: {error}") from error
    return options


def bare_trunk(config: PretrainedConfig) -> PreTrainedModel:
    """A trunk without memory, to ask for names and shapes."""
    with torch.device("meta"):
        return AutoModel.from_config(config)


def trunk_from(tensors: Mapping[str, Tensor], config: PretrainedConfig) -> PreTrainedModel:
    """A trunk over these very tensors, in fp32; a pooler that they lack is zero.

    Raises CheckpointError with the first tensor that the config asks for otherwise.
    """
    state, bare = dict(tensors), bare_trunk(config)
    wanted = bare.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state and name.startswith("pooler."):
            state[name] = torch.zeros(wanted[name].shape)
        elif name not in state or name not in wanted:
            fault = "too many" if name in state else "missing"
            raise CheckpointError(f"the trunk's tensor {name} is {fault} by the model's config; is it the right model?")
        elif state[name].shape != wanted[name].shape:
            shapes = f"{tuple(state[name].shape)} in the file, {tuple(wanted[name].shape)} by the model's config"
            raise CheckpointError(f"the trunk's tensor {name} is {shapes}; is it the right model?")
    with no_progress_bars():
        trunk = type(bare).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return trunk.eval()


def put_task(
    model: Model,
    name: str,
    *,
    kind: str,
    options: Options,
    tensors: Mapping[str, Tensor],
    stock: PreTrainedModel | None = None,
) -> Task:
    """Put a head on the model from the tensors that a stock task model has beside its trunk.

    stock: that model, if there is one whose class and config are to be followed. Raises ConfigError if the trunk cannot
    do what the kind and its options ask, CheckpointError if the tensors do not fit them, or differ from the trunk's own
    where the family ties them to it.
    """
    limit = max_length(model.trunk.config)
    if limit is not None and options.max_length > limit:
        raise ConfigError(f"task {name!r}: max_length {options.max_length} is over the trunk's {limit} positions")
    if KINDS[kind].causal and not is_causal(model.trunk):
        raise ConfigError(f"task {name!r}: {kind} needs a causal trunk; this {model.trunk.config.model_type} is none")
    head = model.add(name, KINDS[kind].head(options), config=None if stock is None else stock.config)
    if stock is not None and (not isinstance(head, StockHead) or type(head.stock) is not type(stock)):
        raise ConfigError(f"task {name!r} is a {type(stock).__name__}, which {kind} with these options does not use")
    tied = model.tied(name)
    for own, of_trunk in tied.items():
        if own in tensors and not torch.equal(tensors[own], model.trunk.get_parameter(of_trunk)):
            found = f"{own} differs from the trunk's {of_trunk}, to which the trunk's config ties it"
            raise CheckpointError(f"task {name!r}: {found}; with tie_word_embeddings false there it is the task's own")
    model.load_head(name, {own: tensor for own, tensor in tensors.items() if own not in tied}, tied)
    return Task(name, KINDS[kind], options)


def put_stock(model: Model, name: str, *, kind: str, options: Options, stock: PreTrainedModel) -> Task:
    """Put a stock task model's head on the model whose trunk it shares. Raises ConfigError if the kind needs another
    class, or if the options name other labels than the stock model's config (numbered ones name nothing)."""
    labels = list(KINDS[kind].head(options).labels)
    named = [stock.config.id2label[index] for index in range(stock.config.num_labels)]
    inside = stock.base_model_prefix + "."
    own = {key: tensor for key, tensor in stock.state_dict().items() if not key.startswith(inside)}
    if len(labels) > 1 and named != [f"LABEL_{index}" for index in range(len(named))] and named != labels:
        raise ConfigError(f"task {name!r} was trained on the labels {named}; the options have {labels}")
    return put_task(model, name, kind=kind, options=options, tensors=own, stock=stock)


def output_layer(head: nn.Module) -> nn.Linear:
    """The last linear layer of a stock head or task model, which makes its logits."""
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def stretch(layer: nn.Linear, *, by: float, up: float) -> None:
    """Make a layer's one output `by` times what it was, and `up` more. Raises ConfigError if no bias can hold that."""
    tensors = dict(layer.named_parameters())
    tensors["weight"].mul_(by)
    if "bias" in tensors:
        tensors["bias"].mul_(by).add_(up)
    elif up:
        raise ConfigError("scores that do not begin at 0 need an output with a bias; this one has none")


def to_shares(layer: nn.Linear, options: SimilarityOptions) -> None:
    """Make scores from low to high into what our head gives: shares of that range."""
    span = options.high - options.low
    stretch(layer, by=1 / span, up=-options.low / span)


def seal_tasks(
    folder: Path,
    model: Model,
    *,
    tasks: Sequence[Task],
    golden: Mapping[str, Sequence[Any]],
    tokenizer_json: str,
    text: TextSpec,
    source: str,
    card: str,
    provenance: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Seal the model's tasks, with golden rows of the inputs in `golden`. Raises CheckpointError or InputError."""
    engine = Engine(tasks, EagerBackend(model.eval(), pad_id=text.pad_id), Text(tokenizer_json, text))
    parts = []
    for task in tasks:
        rows = golden_rows(engine, task.name, [task.kind.parse(item) for item in golden.get(task.name, ())])
        parts.append(task_part(model, task.name, kind=task.kind.name, options=task.options, golden=rows))
    return seal(
        folder,
        trunk_part(model, source=source),
        tasks=parts,
        tokenizer_json=tokenizer_json,
        text=text,
        provenance=provenance or {},
        card=card,
        written_by=f"mtserve {mtserve.__version__}",
    )


def source_of(location: str) -> str:
    """What a checkpoint says of a model's origin: a hub id, or a folder's name."""
    path = Path(location).expanduser()
    return path.resolve().name if path.is_dir() else location


def check_known(tasks: Collection[str], given: Mapping[str, Iterable[str]]) -> None:
    """Raise ConfigError if what is given names a task that is not among those wanted."""
    for what, names in given.items():
        for name in names:
            if name not in tasks:
                raise ConfigError(f"{what} name the task {name!r}; allowed: {', '.join(tasks)}")


def samples(tasks: Sequence[Task], golden: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Golden inputs of every task: those that are given, else the kind's own sample."""
    made = {task.name: [task.kind.sample(task.options).model_dump(exclude_none=True)] for task in tasks}
    return {**made, **golden}


def import_card(title: str, source: str, tasks: Sequence[Task]) -> str:
    """A short model card."""
    rows = "".join(f"| {t.name} | {t.kind.name} | {', '.join(t.kind.label_names(t.options))} |\n" for t in tasks)
    note = "Nothing was trained or evaluated here: how good the tasks are is said where they were trained."
    return f"# {title}\n\nTrunk: {source}.\n\n| task | kind | labels |\n|---|---|---|\n{rows}\n{note}\n"
