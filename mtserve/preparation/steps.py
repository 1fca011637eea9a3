"""The preparation steps that are patterns. Knows no preset."""
# ruff: noqa: RUF001 - the patterns are Arabic

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator
from typing import Literal

from mtserve.preparation.mapped import Edit, Prepared, Step, chained

LETTERS = "\u0621-\u063a\u0641-\u064a"
DIACRITICS = "\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"
URLS = r"(?i:https?://|\bwww\.)[^\s<>\"'«»،؛؟]*[^\s<>\"'«»،؛؟.,:;!?()\[\]]"
EMAILS = r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
DIGITS = r"\d+(?:[.,٫٬]\d+)*"
_ENTITY = re.compile(r"&(?:#\d+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)")
_SPACES = re.compile(r"\s{2,}|[^\S ]|^ | $")
_EMOJI = "\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\u2600-\u26ff\u2700-\u27bf"
_LINK, _MAIL, _USER = "[رابط]", "[بريد]", "[مستخدم]"
# Pattern, token, what every match holds; a later one takes what an earlier one left of a link. Look-behinds make them
# linear without changing what they match.
_ARABERT_LINKS = (
    (r"(https?://.)?(www\.)?[-a-zA-Z0-9@:%._+~#=]{2,256}\.[a-z]{2,6}\b[-a-zA-Z0-9@:%_+.~#?&/=]*", _LINK, "."),
    (r"https?://[-a-zA-Z0-9_./~?=%&]+", _LINK, "http"),
    (r"www[-a-zA-Z0-9_?=%&/.~]+", _LINK, "www"),
    (r"(?<![a-zA-Z])[a-zA-Z]+\.com", _LINK, ".com"),
    (r"http\S*", _LINK, "http"),
    (r"www\S*", _LINK, "www"),
    (r"://", _LINK, "://"),
    (r"(?<![\w-])[\w-]+@(?:[\w-]+\.)+[\w-]+", _MAIL, "@"),
    (r"(?<!\S)\S+@\S+", _MAIL, "@"),
    (r"@\w+", _USER, "@"),
)
_ARABERT_LACKS = re.compile(
    rf"[^{LETTERS}\u0640\u064b-\u066c\u0671-\u0674\u06da\u0b4da-zA-Z0-9\s"
    r"!\"#$%'()*+,.:;<=>?@\[\\\]^_`{|}~·٪،؟؛“”‘’«»–—…-]"
)
_SIGN = re.compile(rf"[^0-9a-zA-Z\s\[\]{LETTERS}]")
_DIGIT = re.compile(r"\d")
_BESIDE_DIGITS = (
    re.compile(rf"(?<!\d)(\d+)[{LETTERS}]+"),
    re.compile(rf"(?<![{LETTERS}])([{LETTERS}]+)\d+"),
)


def translated(old: str, new: str) -> Step:
    """Letters become others, one for one."""
    table, found = str.maketrans(old, new), re.compile(f"[{old}]")
    return lambda p: p.same_length(p.text.translate(table)) if found.search(p.text) else p


def deleted(characters: str) -> Step:
    found = re.compile(f"[{characters}]+")
    return lambda p: p.edited([(*m.span(), "") for m in found.finditer(p.text)])


def replaced(pattern: str, token: str, needs: str = "") -> Step:
    """What matches becomes a token with spaces around it, or one space if the token is empty.

    `needs` is a string that every match holds: a text without it is not searched.
    """
    found = re.compile(pattern)

    def edits(text: str) -> Iterator[Edit]:
        for m in found.finditer(text):
            if token and m.start() and not text[m.start() - 1].isspace():
                yield m.start(), m.start(), " "
            yield *m.span(), token or " "
            if token and m.end() < len(text) and not text[m.end()].isspace():
                yield m.end(), m.end(), " "

    return lambda p: p.edited(edits(p.text)) if needs in p.text else p


def repeats(most: str) -> Step:
    """More than so many equal characters in a row become so many; digits stay. Raises ValueError."""
    if not re.fullmatch("[1-9][0-9]{0,3}", most):
        raise ValueError(f"{most!r} is not a number from 1 to 9999")
    keep, found = int(most), re.compile(rf"(\D)\1{{{most},}}", re.DOTALL)
    return lambda p: p.edited([(m.start() + keep, m.end(), "") for m in found.finditer(p.text)])


def spaces(p: Prepared) -> Prepared:
    """Every run of white space becomes one space; none at the ends."""
    if " ".join(p.text.split()) == p.text:
        return p
    ends = {0, len(p.text)}
    return p.edited([(*m.span(), "" if ends & set(m.span()) else " ") for m in _SPACES.finditer(p.text)])


def lowercase(p: Prepared) -> Prepared:
    low = p.text.lower()
    if len(low) == len(p.text):
        return p if low == p.text else p.same_length(low)
    return p.edited([(at, at + 1, c.lower()) for at, c in enumerate(p.text) if c != c.lower()])


def html_entities(p: Prepared) -> Prepared:
    """Character references as HTML 5 reads them."""
    found = ((*m.span(), html.unescape(m[0])) for m in _ENTITY.finditer(p.text))
    return p.edited([edit for edit in found if edit[2] != p.text[edit[0] : edit[1]]]) if "&" in p.text else p


def html_tags(p: Prepared) -> Prepared:
    """Line breaks, then all else in angle brackets, become a space."""
    for pattern in ("<br />", "</?[^>]+>") if "<" in p.text else ():
        last = p.text.rfind(">") + 1  # an opening bracket without a closing one after it is not tried: linear time
        p = p.edited([(*m.span(), " ") for m in re.compile(pattern).finditer(p.text, 0, last)])
    return p


def unicode_form(form: Literal["NFC", "NFKC"]) -> Step:
    """A Unicode normalization form (UAX #15); characters that compose or reorder stand for all of them together."""

    def parts(text: str) -> Iterator[Edit]:
        """A part begins where a starter composes with nothing before it, and can be normalized on its own."""
        start = 0
        for at in range(1, len(text) + 1):
            alone = unicodedata.normalize(form, text[at : at + 1])
            if not alone or not unicodedata.combining(alone[0]):
                new, longer = (unicodedata.normalize(form, text[start:end]) for end in (at, at + 1))
                if longer == new + alone:
                    if new != text[start:at]:
                        yield start, at, new
                    start = at

    return lambda p: p if unicodedata.is_normalized(form, p.text) else p.edited(parts(p.text))


def arabert_links() -> Step:
    """URLs, e-mail addresses and user names become AraBERT's tokens, as its own preprocessor finds them."""
    return chained([replaced(*link) for link in _ARABERT_LINKS])


def arabert_characters(p: Prepared) -> Prepared:
    return p.same_length(_ARABERT_LACKS.sub(" ", p.text.replace("/", "-")))


def arabert_spaces(p: Prepared) -> Prepared:
    p = p.apart(place for m in _SIGN.finditer(p.text) for place in m.span())
    for found in _BESIDE_DIGITS if _DIGIT.search(p.text) else ():
        p = p.apart(place for m in found.finditer(p.text) for place in (*m.span(), m.end(1)))
    return p


def qarib_characters(p: Prepared) -> Prepared:
    """As `prepare_vocab.py` of QARiB: emoji stand alone; of the rest only letters, digits and spaces stay."""
    p = p.apart(place for m in re.finditer(f"[{_EMOJI}]", p.text) for place in m.span())
    return p.same_length(re.sub(rf"[^\w\s{_EMOJI}]|_", " ", p.text))
