"""Masked language modelling as a task of training: it adapts a trunk to plain text, and no checkpoint serves it.

The next-sentence prediction that BERT trains beside it is `classification` of pairs. Knows no files of text.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from mtserve.errors import ConfigError
from mtserve.rows import Row
from mtserve.tasks import KINDS
from mtserve.tasks.base import (
    IGNORED,
    PLAIN,
    AnyKind,
    Example,
    HeadSpec,
    Kind,
    LossTerms,
    Options,
    Parameters,
)
from mtserve.tasks.measures import Metrics, Outcomes
from mtserve.tasks.token_loss import token_divergence, token_loss
from mtserve.tasks.work import Work
from mtserve.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from mtserve.model import Model

_KNOWN_MASKS = ("[MASK]", "<mask>")


class MaskedLMOptions(Options):
    mask_share: float = Field(default=0.15, gt=0, lt=1, description="Share of a row's own tokens that are predicted.")
    mask_token: str | None = Field(default=None, description="By default [MASK] or <mask>, as the tokenizer has it.")


class MaskedLMExample(Example):
    text: str


class MaskedToken(TypedDict):
    """One predicted token: its id, the best guess, and the loss -log p of the true one, in nats."""

    token: int
    guess: int
    loss: float


class MaskedLM(Kind[MaskedLMOptions, Parameters, MaskedLMExample, MaskedLMExample]):
    """Predicts hidden tokens of a text (Devlin et al., 2019): 15 % of them, of which 80 % are shown as the mask token,
    10 % as a random token and 10 % as they are. Training hides others in each epoch, evaluation always the same."""

    name = "masked_lm"
    options = MaskedLMOptions
    parameters = Parameters
    example = MaskedLMExample
    labelled = MaskedLMExample
    prediction = list[MaskedToken]
    metric = "masked_accuracy"
    loss_terms = frozenset({"label_smoothing", "r_drop"})

    def features(self, example: MaskedLMExample, options: MaskedLMOptions, text: Text) -> tuple[list[Row], Any]:
        """Rows with nothing hidden, and what `corrupt` needs to hide tokens of them."""
        how = {"mask": _mask_id(options, text), "tokens": text.vocab_size, "share": options.mask_share}
        return text.rows(example.text, limits=options.limits), how

    def corrupt(self, rows: list[Row], target: Any, rng: np.random.Generator) -> tuple[list[Row], list[Any]]:
        """Rows with hidden tokens, and a (len,) target a row: the true token where one is hidden or to be confirmed.

        `mask_share` of a row's own tokens, rounded, at least one; never a special token.
        """
        hidden = [_hide(row, target, rng) for row in rows]
        return [row for row, _ in hidden], [true for _, true in hidden]

    def rows(self, example: MaskedLMExample, options: MaskedLMOptions, text: Text) -> list[Row]:
        return self._evaluated(example, options, text)[0]

    def _evaluated(self, example: MaskedLMExample, options: MaskedLMOptions, text: Text) -> tuple[list[Row], list[Any]]:
        """Rows and targets that follow from the tokens alone."""
        rows, how = self.features(example, options, text)
        seed = zlib.crc32(b"".join(row.ids.tobytes() for row in rows))
        return self.corrupt(rows, how, np.random.default_rng(seed))

    def head(self, options: MaskedLMOptions) -> HeadSpec:
        return HeadSpec(architecture="masked_lm", reads="all")

    def target(self, example: MaskedLMExample, rows: Sequence[Row], options: MaskedLMOptions) -> Any:
        raise TypeError("the targets of masked tokens are made with their rows: call features() and corrupt()")

    def loss(
        self,
        logits: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: MaskedLMOptions,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Cross entropy, mean over predicted tokens."""
        return token_loss(logits, [target for of_example in targets for target in of_example], terms)

    def disagreement(
        self,
        logits: Tensor,
        other: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: MaskedLMOptions,
    ) -> Tensor:
        return token_divergence(logits, other, [target for of_example in targets for target in of_example])

    def decode(self, work: Work, options: MaskedLMOptions, text: Text) -> list[MaskedToken]:
        assert isinstance(work.example, MaskedLMExample)
        found: list[MaskedToken] = []
        _, targets = self._evaluated(work.example, options, text)
        for logits, target in zip(work.logits, targets, strict=True):
            at = np.flatnonzero(target != IGNORED)
            scores = logits[at].astype(np.float64)  # (masked, vocabulary)
            top = scores.max(1, keepdims=True)
            losses = (np.log(np.exp(scores - top).sum(1)) + top[:, 0]) - scores[np.arange(len(at)), target[at]]
            for token, guess, loss in zip(target[at], scores.argmax(1), losses, strict=True):
                found.append(MaskedToken(token=int(token), guess=int(guess), loss=float(loss)))
        return found

    def outcomes(
        self,
        predictions: Sequence[list[MaskedToken]],
        examples: Sequence[MaskedLMExample],
        options: MaskedLMOptions,
    ) -> Outcomes:
        """(examples, 3) predicted tokens, those guessed right, and the sum of their losses."""
        sums = [(len(p), sum(o["guess"] == o["token"] for o in p), sum(o["loss"] for o in p)) for p in predictions]
        return (np.array(sums),)

    def score(self, outcomes: Outcomes, options: MaskedLMOptions) -> Metrics:
        """Share of predicted tokens that are guessed right, and their mean loss in nats; no number without a token."""
        tokens, right, loss = outcomes[0].sum(0, dtype=float)
        with np.errstate(invalid="ignore"):
            return {"masked_accuracy": float(right / tokens), "loss": float(loss / tokens)}

    def baseline(self, examples: Sequence[MaskedLMExample], options: MaskedLMOptions) -> list[MaskedToken]:
        return []  # examples hold no tokens to count; `constants` does

    def constants(
        self,
        predictions: Sequence[list[MaskedToken]],
        examples: Sequence[MaskedLMExample],
        features: Sequence[tuple[list[Row], Any]],
        options: MaskedLMOptions,
    ) -> list[list[MaskedToken]]:
        """For each prediction the constant one that the training features suggest: the most frequent token, at the
        tokens' shares in training (each counted once more, so that one that training lacks has a share)."""
        counts = Counter(int(t) for rows, _ in features for row in rows for t in row.ids[~row.special])
        all_counts = counts.total() + features[0][1]["tokens"]
        guess = counts.most_common(1)[0][0]
        return [
            [
                MaskedToken(
                    token=one["token"], guess=guess, loss=float(np.log(all_counts / (counts[one["token"]] + 1)))
                )
                for one in prediction
            ]
            for prediction in predictions
        ]

    def sample(self, options: MaskedLMOptions) -> MaskedLMExample:
        return MaskedLMExample(text="The parcel arrived two days late, but the support team was kind.")


def _mask_id(options: MaskedLMOptions, text: Text) -> int:
    """The id of the mask token: a special token, so that its literal form differs from the same text of a caller."""
    tried = _KNOWN_MASKS if options.mask_token is None else (options.mask_token,)
    for token in tried:
        ids = text.literal(token)
        if len(ids) == 1 and ids != text.plain(token):
            return ids[0]
    found = f"this trunk's tokenizer has no special token {' or '.join(tried)}"
    raise ConfigError(f"masked_lm: {found}; name its mask token in the option mask_token")


def _hide(row: Row, how: Mapping[str, Any], rng: np.random.Generator) -> tuple[Row, Any]:
    own = np.flatnonzero(~row.special)
    target = np.full(len(row), IGNORED, np.int64)
    if not len(own):
        return row, target
    chosen = rng.choice(own, max(round(how["share"] * len(own)), 1), replace=False)
    draw = rng.random(len(chosen))
    target[chosen] = row.ids[chosen]
    ids = row.ids.copy()
    ids[chosen[draw < 0.8]] = how["mask"]
    random = chosen[draw >= 0.9]
    ids[random] = rng.integers(how["tokens"], size=len(random))
    return replace(row, ids=ids), target


PRETRAINED: Mapping[str, str] = {"masked_lm": "AutoModelForMaskedLM", "causal_lm": "AutoModelForCausalLM"}
"""Heads that a trunk was pretrained with, and the stock class that has both."""


def load_head(model: Model, task: str, folder: Path) -> bool:
    """Fill a head of `PRETRAINED` with the one that `folder` holds beside the trunk it was pretrained with.

    Outputs of tokens that the run added stay fresh. False, and all of the head does, where the folder holds a bare
    trunk. Raises OSError for an unusable folder.
    """
    import torch
    import transformers

    from mtserve.trunk import no_progress_bars

    with no_progress_bars():
        stock, report = getattr(transformers, PRETRAINED[model.specs[task].architecture]).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    own = model.head_tensors(task)
    if own.keys() & set(report["missing_keys"]):
        return False
    state = stock.state_dict()
    found = {name: torch.cat([state[name], fresh[len(state[name]) :]]) for name, fresh in own.items()}
    model.load_head(task, found, model.tied(task))
    return True


TRAINING_KINDS: Mapping[str, AnyKind] = {**KINDS, "masked_lm": MaskedLM()}
"""Kinds that a run file may name; `masked_lm` is trained, and left out of the checkpoint."""
