"""The row: one trunk sequence, everything that the trunk sees of it and what decoding needs. Knows no tokenizer.

Invariants: all arrays of a row have its length; `ids` and `type_ids` are int32 and never change after the row is
made; positions count from 0 (a backend adds its family's offset), so they follow from the length and are not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Row:
    """One trunk sequence of an example.

    ids         (seq,)     token ids, special tokens included
    type_ids    (seq,)     segment ids
    offsets     (seq, 2)   characters [start, end) of each token in its own text; (0, 0) at special tokens
    special     (seq,)     True at tokens that the template added
    cut         tokens of the caller's text that are in no row of the example
    part        which of the example's sequences this is: a choice, or one text of a pair encoded apart
    window      which window of that sequence, from 0
    first       position of the row's first own token in the uncut token sequence (windows overlap)
    """

    ids: Ints
    type_ids: Ints
    offsets: Ints
    special: Bools
    cut: int = 0
    part: int = 0
    window: int = 0
    first: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def key(self) -> tuple[bytes, bytes]:
        """Equal for two rows just when the trunk sees the same: ids and type ids (positions follow from them)."""
        return self.ids.tobytes(), self.type_ids.tobytes()

    @property
    def own_tokens(self) -> int:
        """Tokens of the caller's text in this row."""
        return int(len(self.special) - self.special.sum())

    def extended(self, token: int) -> Row:
        """This row with one more token of text at its end: the next step of a generation."""
        return Row(
            ids=np.append(self.ids, np.int32(token)),
            type_ids=np.append(self.type_ids, self.type_ids[-1:]),
            offsets=np.concatenate([self.offsets, np.zeros((1, 2), np.int32)]),
            special=np.append(self.special, False),
            cut=self.cut,
            part=self.part,
        )


def make_row(ids: Any, type_ids: Any, offsets: Any, special: Any) -> Row:
    """A row from sequences of any kind, as int32 and bool arrays."""
    return Row(
        ids=np.asarray(ids, np.int32),
        type_ids=np.asarray(type_ids, np.int32),
        offsets=np.asarray(offsets, np.int32).reshape(-1, 2),
        special=np.asarray(special, np.bool_),
    )
