"""One trunk and its heads, as torch modules. Knows no files, no text and no HTTP.

A head is a stock Transformers task model with its trunk taken out: where the trunk stood, a module gives back the
states that the shared trunk computed. Heads of a checkpoint never share a config object with the trunk or with each
other, since Transformers writes into it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from mtserve.errors import CheckpointError
from mtserve.tasks.base import HeadSpec, Reads

_AUTO = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "causal_lm": "AutoModelForCausalLM",
}


@dataclass
class TrunkStates:
    """What the trunk computed for some rows.

    hidden    (rows, seq, hidden)   last hidden states
    pooled    (rows, hidden)        the trunk's own pooler output, where the family has a pooler
    mask      (rows, seq)           1 at real tokens, which stand at the left
    """

    hidden: Tensor
    pooled: Tensor | None
    mask: Tensor

    def select(self, rows: Tensor) -> TrunkStates:
        """The states of some rows, by index."""
        return TrunkStates(self.hidden[rows], None if self.pooled is None else self.pooled[rows], self.mask[rows])

    def gathered(self, reads: Reads) -> TrunkStates:
        """Only the positions that a head reads: (rows, 1, hidden) unless it reads all."""
        if reads == "all":
            return self
        if reads == "last":
            at = self.mask.sum(1) - 1
            hidden = self.hidden[torch.arange(len(at), device=at.device), at][:, None]
        else:
            hidden = self.hidden[:, :1]
        return TrunkStates(hidden, self.pooled, self.mask[:, :1])


class _TakenOut(nn.Module):
    """Stands where a stock task model had its trunk, and gives back states that were computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.states: TrunkStates | None = None

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        assert self.states is not None
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=cast("Any", self.states.hidden), pooler_output=cast("Any", self.states.pooled)
        )


class StockHead(nn.Module):
    """The rest of a stock task model whose trunk was taken out; fresh weights are the family's own initialisation."""

    def __init__(self, spec: HeadSpec, config: PretrainedConfig) -> None:
        super().__init__()
        auto, config = stock_class(spec, config)
        with torch.device("meta"):
            stock = auto.from_config(config)
        setattr(stock, stock.base_model_prefix, _TakenOut())
        stock.to_empty(device="cpu")
        stock.initialize_weights()
        self.stock: PreTrainedModel = stock
        self.per_token = spec.architecture in ("token_classification", "causal_lm")
        self.choice_axis = spec.architecture == "multiple_choice" and "MultipleChoice" in type(stock).__name__
        self.reads: Reads = spec.reads or self._found_reads(config)

    @property
    def config(self) -> PretrainedConfig:
        return self.stock.config

    def forward(self, states: TrunkStates) -> Tensor:
        """(rows, n_out), or (rows, seq, n_out) from a head of token outputs."""
        taken_out = cast("_TakenOut", getattr(self.stock, self.stock.base_model_prefix))
        mask = states.mask
        not_pad = torch.full_like(mask, 1 if self.config.pad_token_id == 0 else 0)
        taken_out.states = states
        try:
            if self.choice_axis:
                return cast("Tensor", self.stock(input_ids=not_pad[:, None], attention_mask=mask[:, None]).logits)
            return cast("Tensor", self.stock(input_ids=not_pad, attention_mask=mask).logits)
        finally:
            taken_out.states = None

    def tie(self, trunk: PreTrainedModel) -> None:
        """Make the trunk's tensors of those that the family declares as tied between head and trunk."""
        prefix = self.stock.base_model_prefix + "."
        for name, source in dict(self.stock._tied_weights_keys or {}).items():
            if source.startswith(prefix):
                owner, _, attribute = name.rpartition(".")
                tensor = trunk.get_parameter(source.removeprefix(prefix))
                setattr(self.stock.get_submodule(owner), attribute, tensor)

    def _found_reads(self, config: PretrainedConfig) -> Reads:
        """Which states the head depends on, found by differentiating its logits for random states."""
        generator = torch.Generator().manual_seed(0)
        size = hidden_size(config)
        hidden = torch.randn(2, 5, size, generator=generator, requires_grad=True)
        pooled = torch.randn(2, size, generator=generator, requires_grad=True)
        self.eval()
        self(TrunkStates(hidden, pooled, torch.ones(2, 5, dtype=torch.long))).float().square().sum().backward()
        self.zero_grad(set_to_none=True)
        if hidden.grad is None:
            return "pooled"
        used = hidden.grad.abs().sum((0, 2)) > 0  # (seq,)
        return {(0,): "first", (4,): "last"}.get(tuple(used.nonzero().flatten().tolist()), "all")  # type: ignore[return-value]


class PoolingHead(nn.Module):
    """A text's embedding: the mean of its tokens' states, or the state of its first or last token. No weights."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.pooling = spec.pooling or "mean"
        self.per_token = False
        self.reads: Reads = "all" if self.pooling == "mean" else self.pooling
        self.config = None

    def forward(self, states: TrunkStates) -> Tensor:
        """(rows, hidden)"""
        if self.pooling == "mean":
            mask = states.mask[:, :, None].to(states.hidden.dtype)
            return (states.hidden * mask).sum(1) / mask.sum(1)
        return states.gathered(self.reads).hidden[:, 0]


Head = StockHead | PoolingHead


class Model(nn.Module):
    """One trunk and any number of heads over it."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict()
        self.specs: dict[str, HeadSpec] = {}
        self._uses_types = "token_type_ids" in forward_names(trunk) and getattr(trunk.config, "type_vocab_size", 0) > 1

    def add(self, task: str, spec: HeadSpec) -> Head:
        """Put a fresh head on the trunk. An output matrix that the family ties to its embeddings is the trunk's own."""
        head: Head = PoolingHead(spec) if spec.architecture == "pooling" else StockHead(spec, self.trunk.config)
        if isinstance(head, StockHead) and self.trunk.config.tie_word_embeddings:
            head.tie(self.trunk)
        self.heads[module_name(task)] = head
        self.specs[task] = spec
        return head

    def head(self, task: str) -> Head:
        return cast("Head", self.heads[module_name(task)])

    def states(self, ids: Tensor, mask: Tensor, type_ids: Tensor) -> TrunkStates:
        """One pass of the trunk over padded rows, all three (rows, seq) int64."""
        types = {"token_type_ids": type_ids} if self._uses_types else {}
        output = self.trunk(input_ids=ids, attention_mask=mask, **types, **self._no_cache)
        return TrunkStates(output.last_hidden_state, getattr(output, "pooler_output", None), mask)

    @property
    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if hasattr(self.trunk.config, "use_cache") else {}

    def forward(self, task: str, ids: Tensor, mask: Tensor, type_ids: Tensor) -> Tensor:
        """Logits of one task for padded rows: (rows, n_out), or (rows, seq, n_out) from a head of token outputs."""
        head = self.head(task)
        states = self.states(ids, mask, type_ids)
        return cast("Tensor", head(states if head.per_token else states.gathered(head.reads)))

    def head_state(self, task: str) -> dict[str, Tensor]:
        """All tensors of a head, tied ones included, under the names of the stock model."""
        state = self.head(task).state_dict(keep_vars=True)
        return {name.removeprefix("stock."): tensor for name, tensor in state.items()}

    def tied(self, task: str) -> dict[str, str]:
        """Tensors of a head that are the trunk's own storage: name in the head -> name in the trunk."""
        owners = {tensor.data_ptr(): name for name, tensor in self.trunk.state_dict(keep_vars=True).items()}
        state = self.head_state(task).items()
        return {name: owners[t.data_ptr()] for name, t in state if t.numel() and t.data_ptr() in owners}

    def head_tensors(self, task: str) -> dict[str, Tensor]:
        """The head's own tensors, without those tied to the trunk."""
        tied = self.tied(task)
        return {name: t.detach().contiguous() for name, t in self.head_state(task).items() if name not in tied}

    @torch.no_grad()
    def load_head(self, task: str, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
        """Fill a head. Raises CheckpointError if names or shapes differ from what the head needs."""
        if self.tied(task) != dict(tied):
            raise CheckpointError(f"task {task!r}: tied tensors {dict(tied)} declared, {self.tied(task)} needed")
        wanted = {name: tensor for name, tensor in self.head_state(task).items() if name not in tied}
        for name in sorted(wanted.keys() ^ tensors.keys()):
            fault = "is missing from" if name in wanted else "does not belong into"
            raise CheckpointError(f"task {task!r}: tensor {name} {fault} the head's file")
        for name, tensor in wanted.items():
            if tensor.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)} found, {tuple(tensor.shape)} needed"
                raise CheckpointError(f"task {task!r}: tensor {name} has a wrong shape: {shapes}")
            tensor.copy_(tensors[name])


def module_name(task: str) -> str:
    """A task's name as a module name, which may hold no dot; reversible since task names have no '/'."""
    return task.replace(".", "/")


def stock_class(spec: HeadSpec, config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """The stock Auto class for a head, and a config of its own for it. Raises CheckpointError if the family has none.

    Multiple choice in a family without the class is one output of a sequence classifier, a row a choice.
    """
    config = copy.deepcopy(config)
    architecture: str = spec.architecture
    if architecture == "multiple_choice" and not _has(architecture, config):
        architecture = "sequence_classification"
    if not _has(architecture, config):
        family, kinds = config.model_type, ", ".join(a for a in _AUTO if _has(a, config))
        raise CheckpointError(f"{family} has no stock model for {architecture}; it has {kinds or 'none'}")
    if architecture != "causal_lm":
        config.id2label = dict(enumerate(spec.labels))
        config.label2id = {label: index for index, label in enumerate(spec.labels)}
        config.problem_type = spec.problem_type
    if config.pad_token_id is None:
        config.pad_token_id = 0  # causal families refuse several rows without; only real tokens reach a head
    return getattr(transformers, _AUTO[architecture]), config


def _has(architecture: str, config: PretrainedConfig) -> bool:
    return type(config) in getattr(transformers, _AUTO[architecture])._model_mapping


def hidden_size(config: PretrainedConfig) -> int:
    return int(config.hidden_size)


def forward_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of a module's `forward`."""
    import inspect

    return frozenset(inspect.signature(module.forward).parameters)


def max_length(config: PretrainedConfig) -> int | None:
    """Most tokens of a row that a trunk's positions allow; None where they set no limit.

    RoBERTa and its kin count positions from pad id + 1, and so have fewer than their table has entries.
    """
    size = getattr(config, "max_position_embeddings", None)
    offset = config.pad_token_id + 1 if config.model_type in OFFSET_FAMILIES else 0
    return None if size is None else int(size) - offset


OFFSET_FAMILIES = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text"}
)


def is_causal(trunk: PreTrainedModel) -> bool:
    """Whether no position sees a later one, found by changing the last of some tokens."""
    was_training = trunk.training
    trunk.eval()
    ids = torch.arange(4, 10)[None] % trunk.config.vocab_size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % trunk.config.vocab_size
    with torch.no_grad():
        before, after = (trunk(input_ids=i).last_hidden_state[0, :-1] for i in (ids, other))
    trunk.train(was_training)
    return torch.equal(before, after)


def load_trunk(folder: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A trunk from a folder that holds a Transformers model or task model, with its pooler where the family has one.

    Raises CheckpointError if the folder holds no usable config or no safetensors weights.
    """
    try:
        trunk, report = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a trunk: {error}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} trunk tensors are missing, the first is {missing[0]}")
    trunk.eval()
    return cast("PreTrainedModel", trunk)
