"""The preparation steps that rewrite words: Snowball stemming, Farasa segmentation. Their packages load on first use.

Every character of a rewritten word stands for the whole word, so labels of words stay where they are.
"""
# ruff: noqa: RUF001 - the affixes are Arabic

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from threading import Lock

from mtserve.errors import MissingExtraError, SetupError
from mtserve.preparation.mapped import Step
from mtserve.preparation.steps import LETTERS

_SEGMENTED = rf"\[(?:رابط|بريد|مستخدم)\]|[\[\]+]|[{LETTERS}]+"
_PREFIXES = frozenset(["ال", "و", "ف", "ب", "ك", "ل", "لل", "س"])
_SUFFIXES = frozenset(
    ["ه", "ها", "ك", "ي", "هما", "كما", "نا", "كم", "هم", "هن", "كن", "ا", "ان", "ين", "ون", "وا", "ات", "ت", "ن", "ة"]
)


def stem(language: str) -> Step:
    """Words become their stems. Raises ValueError for a language that the installed stemmer lacks; the step raises
    MissingExtraError where there is none."""
    try:
        known = import_module("snowballstemmer").algorithms()
    except ImportError:
        known = [language]
    if language not in known:
        raise ValueError(f"there is no stemmer for {language!r}; allowed: {', '.join(sorted(known))}")

    def load() -> tuple[str, Callable[[str], str]]:
        try:
            return _word(), import_module("snowballstemmer").stemmer(language).stemWord
        except ImportError as error:
            raise MissingExtraError("stemming", "stemming") from error

    return _rewritten(load)


def farasa() -> Step:
    """Words become their segments as AraBERT writes them; square brackets and + go, but for its tokens.

    The step raises MissingExtraError without farasapy, and SetupError without Farasa's program, which it never
    fetches: farasapy would do that over an unchecked connection.
    """

    def load() -> tuple[str, Callable[[str], str]]:
        try:
            segmenter = import_module("farasa.segmenter").FarasaSegmenter
        except ImportError as error:
            raise MissingExtraError("Farasa segmentation", "farasa") from error
        program = segmenter.bin_dir / "lib" / "FarasaSegmenterJar.jar"
        if not program.is_file():
            raise SetupError(f"Farasa segmentation needs Farasa's program, which farasapy looks for at {program}")
        cut = segmenter(interactive=True).segment
        signs = {"[": " ", "]": " ", "+": " "}
        return _SEGMENTED, lambda w: signs.get(w) or (w if w[0] == "[" else segments(cut(w).strip().split("+")))

    return _rewritten(load)


def segments(morphemes: list[str]) -> str:
    """A word's morphemes with spaces between, a + behind each prefix and before each suffix."""
    written: list[str] = []
    for morpheme in morphemes:
        inner = len(written) < len(morphemes) - 1
        prefix = inner and morpheme in _PREFIXES
        if morpheme == "ك":  # also a suffix: a prefix only where nothing but prefixes stands before it
            prefix = inner and (not written or written[-1].endswith("+"))
        suffix = len(morphemes) > 1 and not prefix and morpheme in _SUFFIXES
        written.append(f"{morpheme}+" if prefix else f"+{morpheme}" if suffix else morpheme)
    return " ".join(written)


def _rewritten(load: Callable[[], tuple[str, Callable[[str], str]]]) -> Step:
    """Words by a pattern and a function, which are loaded once; the function runs in one thread at a time, since
    stemmers and Farasa's process keep state, and its answers are remembered."""
    lock = Lock()

    @cache
    def ready() -> tuple[re.Pattern[str], Callable[[str], str]]:
        pattern, rewrite = load()

        @lru_cache(maxsize=1 << 16)
        def locked(word: str) -> str:
            with lock:
                return rewrite(word) or word

        return re.compile(pattern), locked

    def edits(text: str) -> list[tuple[int, int, str]]:
        pattern, rewrite = ready()
        found = ((*m.span(), rewrite(m[0])) for m in pattern.finditer(text))
        return [edit for edit in found if edit[2] != text[edit[0] : edit[1]]]

    return lambda p: p.edited(edits(p.text))


@cache
def _word() -> str:
    """Letters, digits, marks and joiners, as the words of token classification; single signs are none."""
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "M")
    return rf"[\w\u200c\u200d][\w\u200c\u200d{marks}]*"
