"""Text preparation that training and serving share, as a list of named steps in the manifest. Knows no tokenizer.

A step is a name, or a name and an argument after a colon ("repeats:2"). A checkpoint that names a step which this
version does not have is refused, so that text is never encoded in another way than the trunk was trained on.
"""
# ruff: noqa: RUF001 - the letters are Arabic

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mtserve.errors import CheckpointError
from mtserve.preparation import steps, words
from mtserve.preparation.mapped import Prepared, Step, chained

__all__ = ["PRESETS", "STEPS", "Preparation", "Prepared", "check_steps", "expand"]

STEPS: Mapping[str, tuple[str, Callable[[str], Step]]] = {
    "nfc": ("Unicode NFC.", lambda _: steps.unicode_form("NFC")),
    "nfkc": ("Unicode NFKC.", lambda _: steps.unicode_form("NFKC")),
    "lowercase": ("Lower case.", lambda _: steps.lowercase),
    "html_entities": ("HTML character references become their characters.", lambda _: steps.html_entities),
    "html_tags": ("HTML tags become spaces.", lambda _: steps.html_tags),
    "tashkeel": ("The eight Arabic vowel signs, U+064B to U+0652, go.", lambda _: steps.deleted("\u064b-\u0652")),
    "arabic_diacritics": ("All Arabic diacritics, Quranic marks too, go.", lambda _: steps.deleted(steps.DIACRITICS)),
    "tatweel": ("Tatweel (kashida), U+0640, goes.", lambda _: steps.deleted("\u0640")),
    "alef": ("أ إ آ ٱ become ا.", lambda _: steps.translated("أإآٱ", "اااا")),
    "ya": ("Alef maksura ى becomes ي.", lambda _: steps.translated("ى", "ي")),
    "ta_marbuta": ("Ta marbuta ة becomes ه.", lambda _: steps.translated("ة", "ه")),
    "arabic_digits": ("٠ to ٩ become 0 to 9.", lambda _: steps.translated("٠١٢٣٤٥٦٧٨٩", "0123456789")),
    "persian_digits": ("۰ to ۹ become 0 to 9.", lambda _: steps.translated("۰۱۲۳۴۵۶۷۸۹", "0123456789")),
    "urls:TOKEN": ("Web addresses become TOKEN.", lambda token: steps.replaced(steps.URLS, token)),
    "emails:TOKEN": ("E-mail addresses become TOKEN.", lambda token: steps.replaced(steps.EMAILS, token, "@")),
    "users:TOKEN": ("User names (@name) become TOKEN.", lambda token: steps.replaced(r"(?<![\w@])@\w+", token, "@")),
    "hashtags:TOKEN": ("Hashtags become TOKEN.", lambda token: steps.replaced(r"(?<![\w#])#\w+", token, "#")),
    "digits:TOKEN": ("Numbers in digits become TOKEN.", lambda token: steps.replaced(steps.DIGITS, token)),
    "repeats:N": ("More than N equal characters in a row become N; digits stay.", steps.repeats),
    "spaces": ("Runs of white space become one space; none at the ends.", lambda _: steps.spaces),
    "stem:LANGUAGE": ("Words become their Snowball stems (extra: stemming).", words.stem),
    "farasa": ("Words become Farasa's segments as AraBERT writes them (extra: farasa).", lambda _: words.farasa()),
    "arabert_links": ("Links, e-mails, users become [رابط], [بريد], [مستخدم].", lambda _: steps.arabert_links()),
    "arabert_characters": ("/ becomes -; what AraBERT does not know, a space.", lambda _: steps.arabert_characters),
    "arabert_spaces": ("Spaces around signs, between Arabic words and digits.", lambda _: steps.arabert_spaces),
    "qarib_characters": ("Emoji stand alone; other signs become spaces.", lambda _: steps.qarib_characters),
}
"""Steps as they are written, with what they do and what makes one of its argument; an empty TOKEN leaves a space."""

_ARABERT = (
    *("html_entities", "tashkeel", "tatweel", "arabert_links", "html_tags", "arabic_digits", "repeats:2"),
    *("arabert_characters", "arabert_spaces", "spaces"),
)
PRESETS: Mapping[str, tuple[str, ...]] = {
    # ArabertPreprocessor of arabert 1.0.1: bert-base-arabertv02 and its peers; bert-base-arabertv2, segmented
    "arabert": _ARABERT,
    "arabertv2": (*_ARABERT, "farasa", "spaces"),
    # Abdul-Mageed et al., 2021: diacritics go; URLs, user names and hashtags become words
    "marbert": ("arabic_diacritics", "urls:URL", "users:USER", "hashtags:HASHTAG", "spaces"),
    # Abdelali et al., 2021, prepare_vocab.py; diacritics, which there become spaces inside words, go
    "qarib": ("lowercase", "arabic_diacritics", "qarib_characters", "spaces"),
}


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Steps with every preset spelled out: a preset may change in a later version, a manifest must not.

    Raises CheckpointError for what is neither a step nor a preset.
    """
    found = tuple(step for name in names for step in PRESETS.get(name, (name,)))
    check_steps(found)
    return found


def check_steps(names: Sequence[str]) -> None:
    """Raise CheckpointError for the first step that this version cannot do; what a step needs may be missing."""
    for name in names:
        _step(name)


def _step(name: str) -> Step:
    word, colon, argument = name.partition(":")
    form = next((form for form in STEPS if form.partition(":")[:2] == (word, colon)), None)
    if form is None:
        known = f"known: {', '.join(STEPS)}; presets of a run file: {', '.join(PRESETS)}"
        raise CheckpointError(f"text preparation step {name!r} is unknown to this version ({known})")
    try:
        return STEPS[form][1](argument)
    except ValueError as error:
        raise CheckpointError(f"text preparation step {name!r}: {error}") from error


class Preparation:
    """A list of steps, ready for use from several threads; without steps it costs nothing.

    Raises CheckpointError for an unknown step, MissingExtraError or SetupError if one needs what is not installed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._step = chained(_step(name) for name in names)
        self("")  # loads what the steps need

    def __call__(self, text: str) -> Prepared:
        return self._step(Prepared(text))
