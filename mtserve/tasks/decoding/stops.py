"""Where the text of an answer ends, and how much of it is certain while it grows. Knows no logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What decoders put where bytes are no character, or none yet."""


def until_stop(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    found = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


class Reader:
    """The text of an answer while its tokens come: joined, the pieces and `flush` are the answer's text.

    Held back is what later tokens may change: characters that are not whole yet, and the beginning of a stop string.
    That the text of more tokens otherwise begins with that of fewer is the decoder's part; where it does not (a
    byte-fallback decoder, between two characters of one run), nothing is said until it does again.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop_strings = tuple(stop_strings)
        self._ids: list[int] = []
        self._said = ""

    def feed(self, tokens: Sequence[int]) -> list[str]:
        """One piece, often an empty one, for each token."""
        pieces = []
        for token in tokens:
            self._ids.append(token)
            text, _ = until_stop(self._decode(self._ids), self._stop_strings)
            pieces.append(self._say(self._certain(text)))
        return pieces

    def flush(self) -> str:
        """What was held back, once the last token is fed."""
        text, _ = until_stop(self._decode(self._ids), self._stop_strings)
        return self._say(text) if text.startswith(self._said) else text[len(self._said) :]

    def _say(self, text: str) -> str:
        if not text.startswith(self._said):
            return ""
        piece, self._said = text[len(self._said) :], text
        return piece

    def _certain(self, text: str) -> str:
        text = text.rstrip(UNFINISHED)
        ends = (at for stop in self._stop_strings for at in range(1, len(stop)) if text.endswith(stop[:at]))
        return text[: len(text) - max(ends, default=0)]
