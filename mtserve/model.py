"""One trunk with any number of heads, as one torch module. Knows no files, no text and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mtserve.errors import CheckpointError
from mtserve.heads import Head, PairHead, PoolingHead, StockHead, TrunkStates
from mtserve.tasks.base import HeadSpec
from mtserve.tasks.work import named
from mtserve.trunk import inputs_of


class Model(nn.Module):
    """One trunk and any number of heads over it."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict()
        self.specs: dict[str, HeadSpec] = {}

    def add(self, task: str, spec: HeadSpec, *, config: PretrainedConfig | None = None) -> Head:
        """Put a fresh head on the trunk, made by `config` where the head has one of its own.

        An output matrix that the family ties to its embeddings is the trunk's own.
        """
        head = _make(spec, config or self.trunk.config)
        if isinstance(head, StockHead) and self.trunk.config.tie_word_embeddings:
            head.tie(self.trunk)
        self.heads[module_name(task)] = head.train(self.training)
        self.specs[task] = spec
        return head

    def remove(self, task: str) -> None:
        """Take a head off the trunk."""
        del self.heads[module_name(task)], self.specs[task]

    def head(self, task: str) -> Head:
        return cast("Head", self.heads[module_name(task)])

    def states(self, ids: Tensor, mask: Tensor, type_ids: Tensor) -> TrunkStates:
        """One pass of the trunk over padded rows, all three (rows, seq) int64."""
        output = self.trunk(attention_mask=mask, **inputs_of(self.trunk, ids, type_ids))
        return TrunkStates(output.last_hidden_state, getattr(output, "pooler_output", None), mask)

    def forward(self, task: str, ids: Tensor, mask: Tensor, type_ids: Tensor, texts: Tensor | None = None) -> Tensor:
        """Logits of one task for padded rows: (rows, n_out), or (rows, seq, n_out) from a head of token outputs.
        `texts` (rows, seq) is to which text each token belongs (rows.texts_of), for heads of pairs."""
        head = self.head(task)
        states = self.states(ids, mask, type_ids)
        states.texts = texts
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
        name_shown = named(task)
        if self.tied(task) != dict(tied):
            raise CheckpointError(f"task {name_shown!r}: tied tensors {dict(tied)} declared, {self.tied(task)} needed")
        wanted = {name: tensor for name, tensor in self.head_state(task).items() if name not in tied}
        for name in sorted(wanted.keys() ^ tensors.keys()):
            fault = "is missing from" if name in wanted else "does not belong into"
            raise CheckpointError(f"task {name_shown!r}: tensor {name} {fault} the head's file")
        for name, tensor in wanted.items():
            if tensor.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)} found, {tuple(tensor.shape)} needed"
                raise CheckpointError(f"task {name_shown!r}: tensor {name} has a wrong shape: {shapes}")
            tensor.copy_(tensors[name])


def _make(spec: HeadSpec, config: PretrainedConfig) -> Head:
    if spec.architecture == "pooling":
        return PoolingHead(spec)
    return PairHead(spec, config) if spec.architecture == "pair" else StockHead(spec, config)


def module_name(task: str) -> str:
    """A task's name as a module name: without dots, and never that of a method (a task may be called `train`)."""
    return "task:" + task.replace(".", "/")
