"""Words and tags in columns, a sentence ended by an empty line, as the CoNLL shared tasks have them.

Tags leave as strict IOB2 (Tjong Kim Sang and De Meulder, 2003), whatever the scheme of the file. Knows no label names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from training.readers.lines import Line, read_lines
from training.readers.record import BadRecord, Files, Record, Records
from training.section import Section

_PREFIXES = {"iob1": "BI", "iob2": "BI", "bioes": "BIES", "bilou": "BILU"}
_DOCUMENT = "-DOCSTART-"
_FAULTS = {
    "stray": "is no tag of the scheme",
    "orphan": "goes on where no entity is open",
    "joined": "goes on with another label than the open entity's",
}
"""What can be wrong with a tag."""


class ConllOptions(Section):
    """Columns from 0, or from -1 for the last. `repair` mends tags that break the scheme, else they are refused."""

    token: int = 0
    tag: int = -1
    scheme: Literal["iob1", "iob2", "bioes", "bilou"] = "iob2"
    repair: bool = False
    comments: str | None = Field(default=None, min_length=1)


def read_conll(files: Files, options: ConllOptions) -> Records:
    """Records of words, tags, document (how many -DOCSTART- lines came before) and, under `repair`, repairs.

    A sentence is one record, named by its first line, or one bad record, named by its first fault.
    """
    for document, sentence in _sentences(files, options.comments):
        cells = [_cells(line, options) for line in sentence]
        faulty = [BadRecord(line.where, c) for line, c in zip(sentence, cells, strict=True) if isinstance(c, str)]
        pairs = [pair for pair in cells if not isinstance(pair, str)]
        tags, findings = to_iob2([tag for _, tag in pairs], options.scheme)
        if not faulty and not options.repair:
            faulty = [BadRecord(sentence[at].where, _refusal(pairs[at][1], kind)) for at, kind in findings]
        if faulty:
            more = f" (and {len(faulty) - 1} more in this sentence)" if len(faulty) > 1 else ""
            yield BadRecord(faulty[0].where, faulty[0].message + more)
            continue
        data: dict[str, Any] = {"words": [word for word, _ in pairs], "tags": tags, "document": document}
        yield Record(sentence[0].where, {**data, "repairs": [kind for _, kind in findings]})


def to_iob2(tags: Sequence[str], scheme: str) -> tuple[list[str], list[tuple[int, str]]]:
    """The tags in strict IOB2, and positions and types of those that had to be mended: a stray one is O now, an orphan
    or joined one begins an entity.

    In IOB1, where only an entity right after one of its own label begins with B, the last two are no faults.
    """
    mended: list[str] = []
    findings: list[tuple[int, str]] = []
    open_label: str | None = None
    for at, tag in enumerate(tags):
        prefix, _, label = tag.partition("-")
        inside = len(prefix) == 1 and prefix in _PREFIXES[scheme] and label != ""
        if not inside:
            if tag != "O":
                findings.append((at, "stray"))
            mended.append("O")
            open_label = None
            continue
        goes_on = prefix in "IEL"
        if goes_on and label != open_label and scheme != "iob1":
            findings.append((at, "joined" if open_label else "orphan"))
        mended.append(f"{'I' if goes_on and label == open_label else 'B'}-{label}")
        open_label = label if prefix in "BI" else None
    return mended, findings


def _refusal(tag: str, kind: str) -> str:
    return f"{kind} tag: {tag!r} {_FAULTS[kind]} (repair: true would mend it)"


def _sentences(files: Files, comments: str | None) -> Iterator[tuple[int, list[Line]]]:
    document, sentence = 0, list[Line]()
    for line in read_lines(files.path, files.encoding):
        begins = line.text.startswith(_DOCUMENT)
        if comments and line.text.startswith(comments):
            continue
        if line.fault or (not begins and line.text.strip(" \t")):
            sentence.append(line)
            continue
        if sentence:
            yield document, sentence
            sentence = []
        document += begins
    if sentence:
        yield document, sentence


def _cells(line: Line, options: ConllOptions) -> tuple[str, str] | str:
    """The word and tag of a line, or what is wrong with it."""
    if line.fault:
        return line.fault
    cells = re.split(r"[ \t]+", line.text.rstrip(" \t"))
    places = [at + len(cells) if at < 0 else at for at in (options.token, options.tag)]
    if places[0] == places[1] or not all(0 <= place < len(cells) for place in places):
        return f"no columns {options.token} and {options.tag} for word and tag; found {len(cells)}: {line.text!r:.60}"
    word, tag = (cells[place] for place in places)
    return (word, tag) if word.strip() else f"an empty word: {line.text!r:.60}"
