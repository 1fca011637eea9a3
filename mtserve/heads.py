"""Heads: stock Transformers task models with their trunk taken out. Knows no files and no text.

Where the trunk stood, a module gives back the states that the shared trunk computed, so the stock `forward` becomes
the head. Heads never share a config object with the trunk or with each other, since Transformers writes into it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from mtserve.errors import CheckpointError
from mtserve.rows import Ints, Row, spans, texts_of
from mtserve.tasks.base import HeadSpec, Reads
from mtserve.trunk import hidden_size

_AUTO = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
}


@dataclass
class TrunkStates:
    """What the trunk computed for some rows.

    hidden    (rows, seq, hidden)   last hidden states
    pooled    (rows, hidden)        the trunk's own pooler output, where the family has a pooler
    mask      (rows, seq)           1 at real tokens, which stand at the left
    texts     (rows, seq)           to which text of a pair each token belongs (rows.texts_of); for heads of pairs
    """

    hidden: Tensor
    pooled: Tensor | None
    mask: Tensor
    texts: Tensor | None = None

    def to(self, dtype: torch.dtype) -> TrunkStates:
        """The same in a precision."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return TrunkStates(self.hidden.to(dtype), pooled, self.mask, self.texts)

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


@dataclass
class FlatStates:
    """What the trunk computed for some rows, token by token.

    hidden    (tokens, hidden)      last hidden states
    starts    (rows,)               where each row's first token is among them; the others follow it
    counts    (rows,)               tokens of each row
    pooled    (rows, hidden)        the trunk's own pooler output, where the family has a pooler and it was computed
    """

    hidden: Tensor
    starts: Ints
    counts: Ints
    pooled: Tensor | None = None

    def read(self, head: Head, rows: Ints, answers: Ints, of: Sequence[Row]) -> TrunkStates:
        """What a head needs of some rows, by index: of its one position a row, (rows, 1, hidden); of each of the last
        `answers` positions where it answers for those, (sum of answers, 1, hidden); of every token where it answers
        for each, (sum of counts, 1, hidden); else of the whole rows, padded at the right. `of` are the
        rows themselves."""
        starts, counts = self.starts[rows], self.counts[rows]
        if head.reads == "last" and head.per_token:
            return self._alone(spans(starts + counts - answers, answers))
        if head.reads == "all" and head.per_token:
            return self._alone(spans(starts, counts))
        if head.reads == "all":
            states = self._padded(starts, counts)
            if isinstance(head, PairHead):
                states.texts = self._index(texts_of(of))
            return states
        states = self._alone(starts + counts - 1 if head.reads == "last" else starts)
        states.pooled = None if self.pooled is None else self.pooled[self._index(rows)]
        return states

    def _index(self, at: Ints) -> Tensor:
        """On the states' device, which on a GPU nothing waits for."""
        index = torch.from_numpy(at.astype(np.int64))
        if self.hidden.is_cuda:
            index = index.pin_memory()
        return index.to(self.hidden.device, non_blocking=True)

    def _alone(self, at: Ints) -> TrunkStates:
        """Single tokens, each as a row of its own."""
        hidden = self.hidden.index_select(0, self._index(at))[:, None]
        return TrunkStates(hidden, None, torch.ones(len(at), 1, dtype=torch.long, device=hidden.device))

    def _padded(self, starts: Ints, counts: Ints) -> TrunkStates:
        longest, first = int(counts.max()), int(starts[0])
        if (counts == longest).all() and (np.diff(starts) == longest).all():  # a single row, say: nothing to pad
            hidden = self.hidden[first : first + longest * len(starts)].view(len(starts), longest, -1)
            return TrunkStates(hidden, None, hidden.new_ones(hidden.shape[:2], dtype=torch.long))
        steps = np.arange(longest)
        mask = steps < counts[:, None]  # (rows, seq)
        at = np.where(mask, starts[:, None] + steps, starts[:, None])
        hidden = self.hidden.index_select(0, self._index(at.ravel())).view(*mask.shape, -1)
        return TrunkStates(hidden, None, self._index(mask.astype(np.int32)))


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
        self.per_token = spec.architecture in ("token_classification", "causal_lm", "masked_lm")
        self.ties_inside = spec.architecture == "masked_lm"  # never sealed: a file of tensors holds none twice
        self.choice_axis = spec.architecture == "multiple_choice" and "MultipleChoice" in type(stock).__name__
        self.reads: Reads = spec.reads if spec.reads and self.per_token else self._found_reads(config)
        if spec.reads not in (None, self.reads):
            family, found = config.model_type, f"{self.reads!r}"
            raise CheckpointError(
                f"a head of {family} for {spec.architecture} reads {found}, not {spec.reads!r} as asked"
            )

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
            of_trunk = source.startswith(prefix)
            if of_trunk or self.ties_inside:
                owner, _, attribute = name.rpartition(".")
                tensor = (trunk if of_trunk else self.stock).get_parameter(source.removeprefix(prefix))
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
        positions = used.nonzero().flatten().tolist()
        return "first" if positions == [0] else "last" if positions == [4] else "all"


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
            return _mean(states.hidden, states.mask > 0)
        return states.gathered(self.reads).hidden[:, 0]


class PairHead(nn.Module):
    """A linear layer over what two texts that were encoded together are to each other.

    Of both as a whole: their tokens' mean states u and v, |u - v| and u * v (Conneau et al., 2017, whose texts were
    encoded apart). Of their parts: each token x beside y, what it is most like in the other text (Parikh et al., 2016:
    align, compare, aggregate), as the means of x * y and |x - y|, and the mean and the least of their cosines. Special
    tokens count for neither. Of a text alone all that has to do with another one is zero.

    States of families that only continue texts have outliers of some tens (SmolLM2's reach 45, at a root mean square
    of 1.9; MiniLM's 5 at 0.4), whose products no rate can learn from. There each state is brought to a root mean square
    of 1/3 first.

    With pooling `mean` each row's embedding, the mean state of all its tokens, stands behind its outputs.
    """

    def __init__(self, spec: HeadSpec, config: PretrainedConfig) -> None:
        super().__init__()
        self.levels = _has("causal_lm", config) and not _has("masked_lm", config)
        own, of_trunk = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout_prob"))
        self.dropout = nn.Dropout(next((share for share in (own, of_trunk) if share is not None), 0.1))
        self.output = nn.Linear(8 * hidden_size(config) + 4, len(spec.labels))
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)
        self.embeds = spec.pooling == "mean"
        self.per_token = False
        self.reads: Reads = "all"
        self.config = None

    def forward(self, states: TrunkStates) -> Tensor:
        """(rows, n_out), or (rows, n_out + hidden) with embeddings."""
        assert states.texts is not None
        hidden, first, second = states.hidden, states.texts == 1, states.texts == 2
        unit = nn.functional.normalize(hidden, dim=-1)
        if self.levels:
            hidden = unit * (hidden.shape[-1] ** 0.5 / 3)
        u, v = _mean(hidden, first), _mean(hidden, second)
        cosines = unit @ unit.transpose(1, 2)  # (rows, seq, seq)
        parts = [*_aligned(hidden, cosines, second, first), *_aligned(hidden, cosines, first, second)]
        found = self.output(self.dropout(torch.cat([u, v, (u - v).abs(), u * v, *parts], -1).to(hidden.dtype)))
        if self.embeds:
            return torch.cat([found, _mean(states.hidden, states.mask > 0).to(found.dtype)], -1)
        return cast("Tensor", found)


def _aligned(hidden: Tensor, cosines: Tensor, ours: Tensor, theirs: Tensor) -> Iterator[Tensor]:
    """(rows, hidden) twice and (rows, 1) twice: how our tokens are to what is most like them in theirs; zero where a
    row has none of either. That is a mean of their states, weighed by the softmax of twenty times the cosine: nearly
    the one that is most like, but no jump where two are. Cosines differ little, so they are told tenfold."""
    shares = (20 * cosines).masked_fill(~theirs[:, None], -1e4).softmax(-1)  # (rows, seq, seq)
    other, best = shares @ hidden, (shares * cosines).sum(-1)
    both = ours & theirs.any(1, keepdim=True)
    yield _mean(hidden * other, both)
    yield _mean((hidden - other).abs(), both)
    yield 10 * _mean(best[:, :, None], both)
    yield 10 * best.masked_fill(~both, 2).amin(1, keepdim=True).masked_fill(~both.any(1, keepdim=True), 0)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(rows, hidden): the mean over the masked positions of each row, zero where there is none."""
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


Head = StockHead | PoolingHead | PairHead


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
    if architecture not in ("causal_lm", "masked_lm"):
        config.id2label = dict(enumerate(spec.labels))
        config.label2id = {label: index for index, label in enumerate(spec.labels)}
        config.problem_type = spec.problem_type
    if config.pad_token_id is None:
        config.pad_token_id = 0  # causal families refuse several rows without; only real tokens reach a head
    return getattr(transformers, _AUTO[architecture]), config


def _has(architecture: str, config: PretrainedConfig) -> bool:
    return type(config) in getattr(transformers, _AUTO[architecture])._model_mapping
