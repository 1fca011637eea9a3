"""SemEval's aspect-based sentiment XML, the 2014 and the 2016 schema. Knows no languages and no label names.

2014 (Pontiki et al., 2014): `sentences/sentence/aspectTerms/aspectTerm`, words with a polarity; `aspectCategories` are
not read. 2016 (Pontiki et al., 2016): `Reviews/Review/sentences/sentence/Opinions/Opinion`, with a category as well,
and the target `NULL` where no words are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.sax import SAXParseException
from xml.sax.handler import ContentHandler

from defusedxml.common import DefusedXmlException
from defusedxml.sax import make_parser
from typing_extensions import override

from mtserve.errors import ConfigError
from mtserve.tasks.spans import word_spans
from training.readers.record import BadRecord, Files, Record, Records
from training.section import Section


class AbsaOptions(Section):
    """One example an opinion, or the targets as spans: with `categories`, a span's label is its category's entity, with
    `whole_words` a span that begins or ends inside a word is widened to the word."""

    view: Literal["sentiment", "targets"] = "sentiment"
    categories: bool = False
    whole_words: bool = False


@dataclass
class _Sentence:
    """`opinions` are the attributes of each, with the line of its start tag."""

    line: int
    review: str | None
    id: str | None
    text: str = ""
    opinions: list[tuple[int, Mapping[str, str]]] = field(default_factory=list)

    @property
    def columns(self) -> dict[str, Any]:
        return {"text": self.text, "review": self.review or self.id, "sentence": self.id}


def read_absa(files: Files, options: AbsaOptions) -> Records:
    """Records as the view says, in the file's order, all with the columns review and sentence.

    sentiment   text, text_pair, label (the polarity), target, category, from, to: one an opinion, repeated ones kept.
                text_pair is the target's words, or the category in lower-case words where the target is `NULL`.
    targets     text, spans (distinct, by start, not overlapping: the longest is kept), repairs (`overlap` for each
                span left out, `widened` for each widened one): one a sentence, those without opinions included.

    A target that is not what its text holds from `from` to `to` (in characters) is a bad record. Raises ConfigError for
    XML that is not well-formed, declares a document type or entities, or has another root.
    """
    view = _sentiment if options.view == "sentiment" else _targets
    for sentence in _sentences(files.path):
        if isinstance(sentence, BadRecord):
            yield sentence
        else:
            yield from view(sentence, files.path.name, options)


def _sentiment(sentence: _Sentence, name: str, options: AbsaOptions) -> Records:
    for line, attributes in sentence.opinions:
        where, category = f"{name}:{line}", attributes.get("category")
        try:
            target, start, end = _target(sentence, attributes)
            about = target or " ".join((category or "").lower().replace("#", " ").replace("_", " ").split())
            if not about:
                raise ValueError("an opinion needs a target or a category")
        except ValueError as error:
            yield BadRecord(where, f"sentence {sentence.id}: {error}")
            continue
        data = {**sentence.columns, "text_pair": about, "label": attributes.get("polarity")}
        yield Record(where, {**data, "target": target, "category": category, "from": start, "to": end})


def _targets(sentence: _Sentence, name: str, options: AbsaOptions) -> Records:
    spans: dict[tuple[int, int], str] = {}
    for line, attributes in sentence.opinions:
        try:
            target, start, end = _target(sentence, attributes)
            label = attributes.get("category", "").partition("#")[0] if options.categories else "target"
            if target is not None and not label:
                raise ValueError(f"target {target!r} has no category")
        except ValueError as error:
            yield BadRecord(f"{name}:{line}", f"sentence {sentence.id}: {error}")
            return
        if target is not None:
            spans.setdefault((start, end), label)
    found = set(spans)
    if options.whole_words:
        words = word_spans(sentence.text)
        spans = {_covering(words, span): label for span, label in reversed(spans.items())}
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        if all(end <= s or start >= e for s, e in kept):
            kept.append((start, end))
    made = [{"start": start, "end": end, "label": spans[start, end]} for start, end in sorted(kept)]
    repairs = ["overlap"] * (len(found) - len(kept)) + ["widened"] * len(set(kept) - found)
    yield Record(f"{name}:{sentence.line}", {**sentence.columns, "spans": made, "repairs": repairs})


def _covering(words: list[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int]:
    """From the start of the first word that a span touches to the end of the last."""
    inside = [word for word in words if word[0] < span[1] and word[1] > span[0]]
    return (inside[0][0], inside[-1][1]) if inside else span


def _target(sentence: _Sentence, attributes: Mapping[str, str]) -> tuple[str | None, int, int]:
    """The words of an opinion's target, None for `NULL`, and where they begin and end. Raises ValueError."""
    target = attributes.get("target", attributes.get("term", "NULL"))
    if target in ("", "NULL"):
        return None, 0, 0
    try:
        start, end = (int(attributes.get(limit, "")) for limit in ("from", "to"))
    except ValueError:
        raise ValueError(f"target {target!r} needs numbers in from and to") from None
    if not 0 <= start < end or sentence.text[start:end] != target:
        raise ValueError(
            f"target {target!r} is not at {start} to {end}; found {sentence.text[max(start, 0) : max(end, 0)]!r}"
        )
    return target, start, end


def _sentences(path: Path) -> Iterator[_Sentence | BadRecord]:
    """Sentences as they end, so that memory holds a few of them, and opinions that stand outside of any."""
    parser = make_parser()
    parser.forbid_dtd = True
    handler = _Handler(path.name, parser)
    parser.setContentHandler(handler)
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 16):
                parser.feed(chunk)
                yield from handler.taken()
        parser.feed(b"", isFinal=True)
    except DefusedXmlException as error:
        found = f"a document type or entities are refused in XML; found {type(error).__name__}"
        raise ConfigError(f"{path.name}:{parser.getLineNumber()}: {found}") from error
    except SAXParseException as error:
        raise ConfigError(f"{path.name}:{error.getLineNumber()}: broken XML: {error.getMessage()}") from error
    except (LookupError, ValueError) as error:  # of the encoding that the file declares
        raise ConfigError(f"{path.name} cannot be read: {error}") from error


class _Handler(ContentHandler):
    """Makes sentences of the parser's events."""

    def __init__(self, name: str, parser: Any) -> None:
        super().__init__()
        self.name, self.parser = name, parser
        self.found: list[_Sentence | BadRecord] = []
        self.open: list[str] = []
        self.review: str | None = None
        self.sentence = _Sentence(0, None, None)

    def taken(self) -> list[_Sentence | BadRecord]:
        """What was found since the last call."""
        found, self.found = self.found, []
        return found

    @override
    def startElement(self, name: str, attrs: Any) -> None:
        line: int = self.parser.getLineNumber()
        if not self.open and name not in ("sentences", "Reviews"):
            found = f"the root element is {name!r}; allowed: sentences (2014), Reviews (2016)"
            raise ConfigError(f"{self.name}:{line}: {found}")
        if name == "Review":
            self.review = attrs.get("rid")
        elif name == "sentence":
            self.sentence = _Sentence(line, self.review, attrs.get("id"))
        elif name in ("aspectTerm", "Opinion"):
            if "sentence" in self.open:
                self.sentence.opinions.append((line, dict(attrs)))
            else:
                self.found.append(BadRecord(f"{self.name}:{line}", "an opinion of a whole review, not of a sentence"))
        self.open.append(name)

    @override
    def characters(self, content: str) -> None:
        if self.open[-2:] == ["sentence", "text"]:
            self.sentence.text += content

    @override
    def endElement(self, name: str) -> None:
        self.open.pop()
        if name == "sentence":
            self.found.append(self.sentence)
