"""One trunk with any number of heads, as one torch module. Knows no files, no text and no HTTP."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from mtserve.errors import CheckpointError
from mtserve.heads import Head, PoolingHead, StockHead, TrunkStates
from mtserve.tasks.base import HeadSpec

WORD_TYPE_FAMILIES = frozenset({"codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt"})
"""Families that look a type id up among the words, so that type 0 would add a word's embedding too."""


class Model(nn.Module):
    """One trunk and any number of heads over it."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict()
        self.specs: dict[str, HeadSpec] = {}
        accepted = inspect.signature(trunk.forward).parameters
        self._uses_types = "token_type_ids" in accepted and getattr(trunk.config, "type_vocab_size", 0) > 1
        self._adds_words = trunk.config.model_type in WORD_TYPE_FAMILIES

    def add(self, task: str, spec: HeadSpec, *, config: PretrainedConfig | None = None) -> Head:
        """Put a fresh head on the trunk, made by `config` where the head has one of its own.

        An output matrix that the family ties to its embeddings is the trunk's own.
        """
        made_by = config or self.trunk.config
        head: Head = PoolingHead(spec) if spec.architecture == "pooling" else StockHead(spec, made_by)
        if isinstance(head, StockHead) and self.trunk.config.tie_word_embeddings:
            head.tie(self.trunk)
        self.heads[module_name(task)] = head.train(self.training)
        self.specs[task] = spec
        return head

    def head(self, task: str) -> Head:
        return cast("Head", self.heads[module_name(task)])

    def states(
        self,
        ids: Tensor,
        mask: Tensor,
        type_ids: Tensor,
        *,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        attention: Tensor | None = None,
    ) -> TrunkStates:
        """One pass of the trunk over padded rows, all three (rows, seq) int64.

        Type id 0 adds nothing where types share the words' embeddings, and any other adds the embedding of that id.
        Tokens that go on from what `cache` holds need `positions` (rows, seq), and `attention`, which is added to the
        scores: (rows, 1, seq, kept and new tokens).
        """
        inputs: dict[str, Any] = {"attention_mask": mask if attention is None else attention}
        if self._adds_words and type_ids.any():
            words = self.trunk.get_input_embeddings()
            inputs["inputs_embeds"] = words(ids) + words(type_ids) * (type_ids > 0)[:, :, None]
        else:
            inputs["input_ids"] = ids
        if self._uses_types:
            inputs["token_type_ids"] = type_ids
        if cache is not None:
            inputs |= {"past_key_values": cache, "use_cache": True}
        elif hasattr(self.trunk.config, "use_cache"):
            inputs["use_cache"] = False
        if positions is not None:
            inputs["position_ids"] = positions
        output = self.trunk(**inputs)
        return TrunkStates(output.last_hidden_state, getattr(output, "pooler_output", None), mask)

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
    """A task's name as a module name: without dots, and never that of a method (a task may be called `train`)."""
    return "task:" + task.replace(".", "/")
