"""The only caller of the tokenizer: text to rows, truncation and windows. Knows no task and no model.

A text is prepared by the steps in force, the prepared text is encoded, and offsets count the caller's characters.
Works on `tokenizers.Tokenizer` alone. Truncation and padding baked into a tokenizer file are cleared, and cutting is
done here on encodings without special tokens, so that one tokenizer serves every length from many threads. Special
tokens inside a caller's text stay text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Literal

from pydantic import BaseModel, ConfigDict
from tokenizers import Encoding, Tokenizer

from mtserve.errors import CheckpointError, InputError
from mtserve.preparation import Preparation, Prepared, expand
from mtserve.rows import Row, make_row

OnLong = Literal["truncate", "error", "window"]

_WORTH_A_BATCH = 8
"""Texts from which on waking the tokenizer's threads is cheaper than encoding one by one."""


class TextSpec(BaseModel):
    """What the manifest says about text beside the tokenizer file; part of the trunk's fingerprint.

    `preparation` are steps, presets spelled out; a task's own list replaces them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pad_id: int = 0
    eos_id: int | None = None
    pair_separator: str | None = None
    preparation: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How long a row may be, special tokens included, what happens to longer texts, what windows share, how the text
    is prepared (None: by the checkpoint's own steps), and what stands at the end of every row, after the template."""

    max_length: int
    on_long: OnLong = "truncate"
    stride: int = 0
    preparation: tuple[str, ...] | None = None
    append: str = ""


@dataclass(frozen=True)
class _Encoded:
    """A text's tokens, with no template around them, and how their offsets lead to the caller's characters: first
    over the `before` characters of a separator, then over the preparation. Cutting changes an encoding in place, so
    one that is `shared` must not be cut."""

    tokens: Encoding
    prepared: Prepared
    before: int = 0
    shared: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def spans(self, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if self.before:
            offsets = [(max(start - self.before, 0), max(end - self.before, 0)) for start, end in offsets]
        return self.prepared.spans(offsets)


class Text:
    """A tokenizer with its spec. Safe to use from several threads: all that changes in it is which lists of
    preparation steps are made ready, under a lock.

    Raises CheckpointError for a tokenizer that cannot be read or an unknown preparation step, MissingExtraError or
    SetupError if a step needs what is not installed.
    """

    def __init__(self, tokenizer_json: str, spec: TextSpec) -> None:
        self._preparations = {spec.preparation: Preparation(spec.preparation)}
        self._making = Lock()
        try:
            tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the Rust parser raises bare Exception
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # not stored in the file
        self._tokenizer = tokenizer
        self._known: Mapping[str, Encoding] = {}
        self._made: dict[tuple[object, ...], list[Row]] | None = None
        self.spec = spec
        added = tokenizer.get_added_tokens_decoder().values()
        specials = sorted((re.escape(t.content) for t in added if t.special), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(specials) + ")" if specials else r"(?!)()")

    @classmethod
    def from_file(cls, path: Path, spec: TextSpec) -> Text:
        """Read a `tokenizer.json`. Raises CheckpointError if it is missing or cannot be read."""
        try:
            return cls(path.read_text(encoding="utf-8"), spec)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error

    def ahead(self, texts: Iterable[str] = (), preparation: Sequence[str] | None = None) -> Text:
        """The same, for one batch: these texts, prepared by the task's steps, are encoded now, each once, by all the
        tokenizer's own threads, and are not encoded again when rows are made of them; nor is a row made twice that
        several tasks ask for in the same form. What one knows already, the ones made of it know too."""
        prepared = dict.fromkeys(self._prepare(text, preparation).text for text in texts)
        new = [text for text in prepared if text not in self._known]
        made = copy.copy(self)
        if len(new) >= _WORTH_A_BATCH:
            encoded = self._tokenizer.encode_batch(new, add_special_tokens=False)
            made._known = {**self._known, **dict(zip(new, encoded, strict=True))}
        if made._made is None:
            made._made = {}
        return made

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def special_tokens(self, *, pair: bool) -> int:
        """How many tokens the template adds around one text, or around a pair."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def rows(
        self,
        text: str,
        pair: str | None = None,
        *,
        limits: Limits,
        cut_first: bool = False,
        part: int = 0,
    ) -> list[Row]:
        """Encode one text, or a pair, to one row, or to several windows of a long one.

        A row has at most `max_length` tokens, special tokens included. `truncate` cuts at the right, of a pair the
        longer text first (with `cut_first` the first text first); `window` keeps all tokens: of a pair the longer
        text (with `cut_first` the first) is cut into windows that overlap by `stride` tokens, and the other one is
        whole in each. Raises InputError if the text is longer under `error`, or has no tokens at all.
        """
        if self._made is None:
            return self._new_rows(text, pair, limits=limits, cut_first=cut_first, part=part)
        asked = text, pair, limits, cut_first, part
        if asked not in self._made:
            self._made[asked] = self._new_rows(text, pair, limits=limits, cut_first=cut_first, part=part)
        return list(self._made[asked])

    def _new_rows(self, text: str, pair: str | None, *, limits: Limits, cut_first: bool, part: int) -> list[Row]:
        first = self._encode(text, limits.preparation)
        second = None if pair is None else self._encode(pair, limits.preparation, before=self.spec.pair_separator or "")
        end = self.literal(limits.append)
        added = self.special_tokens(pair=second is not None) + len(end)
        budget = limits.max_length - added
        total = len(first) + (0 if second is None else len(second))
        if budget < (1 if second is None else 2):
            raise InputError(f"no room for the text: special tokens take {added} of {limits.max_length} tokens")
        if total + added == 0:
            raise InputError("the text is empty, and this model's tokenizer makes no tokens of it")
        if total <= budget:
            return [_ended(self._row(first, second, part=part), end)]
        if limits.on_long == "error":
            raise InputError(f"the text has {total} tokens; this task allows {budget} (max_length {limits.max_length})")
        if limits.on_long == "window":
            rows = self._windows(first, second, budget, stride=limits.stride, cut_first=cut_first, part=part)
            return [_ended(row, end) for row in rows]
        sizes = _fit(len(first), None if second is None else len(second), budget, cut_first=cut_first)
        first, second = self._own(first), None if second is None else self._own(second)
        first.tokens.truncate(sizes[0])
        if second is not None:
            second.tokens.truncate(sizes[1])
        return [_ended(self._row(first, second, part=part, cut=total - sum(sizes)), end)]

    def prompt(
        self,
        before: str,
        text: str,
        after: str,
        *,
        max_length: int,
        reserved: int = 0,
        preparation: Sequence[str] | None = None,
    ) -> Row:
        """A row of literal `before`, the caller's text, prepared, and literal `after`, with no template around it.

        Special tokens are recognised in the literal parts only. The caller's text is cut at its right end so that the
        row, with `reserved` tokens of an answer behind it, stays within `max_length`; the literals never are. Raises
        InputError if there is no room for a token of the text.
        """
        head, tail = self.literal(before), self.literal(after)
        encoded = self._own(self._encode(text, preparation))
        taken, body = len(head) + len(tail) + reserved, encoded.tokens
        budget = max_length - taken
        if budget < 1:
            raise InputError(
                f"no room for the text: the template and the answer take {taken} tokens; allowed: {max_length} in all"
            )
        cut = max(0, len(body) - budget)
        body.truncate(budget)
        ids = [*head, *body.ids, *tail]
        if not ids:
            raise InputError("the text is empty, and the template adds no tokens")
        offsets = [(0, 0)] * len(head) + encoded.spans(body.offsets) + [(0, 0)] * len(tail)
        special = [True] * len(head) + [False] * len(body) + [True] * len(tail)
        return replace(make_row(ids, [0] * len(ids), offsets, special), cut=cut)

    def literal(self, text: str) -> list[int]:
        """Token ids of text that the operator wrote: special tokens in it are recognised."""
        ids: list[int] = []
        for piece in self._special.split(text):
            if piece:
                known = self._tokenizer.token_to_id(piece) if self._special.fullmatch(piece) else None
                ids += self.plain(piece) if known is None else [known]
        return ids

    def plain(self, text: str) -> list[int]:
        """Token ids of a text as it stands, not prepared, with no template around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _prepare(self, text: str, preparation: Sequence[str] | None) -> Prepared:
        steps = self.spec.preparation if preparation is None else tuple(preparation)
        if steps not in self._preparations:
            with self._making:  # what a step needs, such as Farasa's process, is started once
                if steps not in self._preparations:
                    self._preparations[steps] = Preparation(steps)
        return self._preparations[steps](text)

    def _encode(self, text: str, preparation: Sequence[str] | None, *, before: str = "") -> _Encoded:
        """`before` is the separator that a tokenizer without a pair template needs before a second text."""
        prepared = self._prepare(text, preparation)
        whole = before + prepared.text
        if (known := self._known.get(whole)) is not None:
            return _Encoded(known, prepared, len(before), shared=True)
        return _Encoded(self._tokenizer.encode(whole, add_special_tokens=False), prepared, len(before))

    def _own(self, encoded: _Encoded) -> _Encoded:
        """The same, with an encoding that may be cut."""
        if not encoded.shared:
            return encoded
        again = self._tokenizer.encode(encoded.prepared.text, add_special_tokens=False)
        return replace(encoded, tokens=again, shared=False)

    def _row(
        self,
        first: _Encoded,
        second: _Encoded | None,
        *,
        part: int,
        cut: int = 0,
        window: int = 0,
        first_token: int = 0,
    ) -> Row:
        full = self._tokenizer.post_process(first.tokens, None if second is None else second.tokens)
        offsets = full.offsets
        for number, text in enumerate((first, second)):
            if text is not None and (text.before or text.prepared.starts is not None):
                own = [at for at, sequence in enumerate(full.sequence_ids) if sequence == number]
                for at, span in zip(own, text.spans([offsets[at] for at in own]), strict=True):
                    offsets[at] = span
        types = full.type_ids if self.spec.pair_separator is None else [0] * len(full.ids)  # no template gives any
        row = make_row(full.ids, types, offsets, full.special_tokens_mask)
        begins = next((at for at, sequence in enumerate(full.sequence_ids) if sequence == 1), 0)
        return replace(row, part=part, cut=cut, window=window, first=first_token, second=begins)

    def _windows(
        self, first: _Encoded, second: _Encoded | None, budget: int, *, stride: int, cut_first: bool, part: int
    ) -> list[Row]:
        long_first = second is None or cut_first or len(first) >= len(second)
        long, other = (first, second) if long_first or second is None else (second, first)
        long = self._own(long)
        size = budget - (0 if other is None else len(other))
        if size <= stride:
            found = f"the shorter text leaves room for {size} tokens of the longer one"
            raise InputError(f"{found} a window, which must be more than the stride of {stride}")
        long.tokens.truncate(size, stride=stride)
        rows = []
        for window, tokens in enumerate([long.tokens, *long.tokens.overflowing]):
            piece = replace(long, tokens=tokens)
            pair = (piece, other) if long_first or other is None else (other, piece)
            rows.append(self._row(*pair, part=part, window=window, first_token=window * (size - stride)))
        return rows


def _ended(row: Row, end: Sequence[int]) -> Row:
    """A row with special tokens at its end."""
    if not end:
        return row
    longer = row.extended(end)
    longer.special[len(row) :] = True
    return replace(row, ids=longer.ids, type_ids=longer.type_ids, offsets=longer.offsets, special=longer.special)


def _fit(first: int, second: int | None, budget: int, *, cut_first: bool) -> tuple[int, ...]:
    """How many tokens each text keeps when both together have at most `budget`."""
    if second is None:
        return (max(budget, 0),)
    if cut_first and second < budget:
        return min(first, budget - second), second
    shorter = min(first, second, budget // 2)  # the longer one is cut until both are equal, then both
    if first <= second:
        return shorter, min(second, budget - shorter)
    return min(first, budget - shorter), shorter


def text_spec(tokenizer_json: str, *, pad_id: int, eos_id: int | None, preparation: Sequence[str] = ()) -> TextSpec:
    """The spec for a trunk's tokenizer: a pair separator where the tokenizer's own template has none, and preparation
    steps with presets spelled out. Raises CheckpointError for an unknown step."""
    bare = Text(tokenizer_json, TextSpec(pad_id=pad_id, eos_id=eos_id))
    joined = bare.special_tokens(pair=True) <= bare.special_tokens(pair=False)
    separator = "\n" if joined else None
    return TextSpec(pad_id=pad_id, eos_id=eos_id, pair_separator=separator, preparation=expand(preparation))
