"""Plain text, a sentence a line and an empty line between documents: sentences, and pairs of them. Knows no tokens."""

from __future__ import annotations

import random

from pydantic import Field

from mtserve.errors import ConfigError
from training.readers.lines import read_lines
from training.readers.record import BadRecord, Files, NoOptions, Record, Records
from training.section import Section


class PairOptions(Section):
    """`seed` decides which pairs are random ones, and with what; with `document_lines` every so many sentences are a
    document, whatever the empty lines say."""

    seed: int = Field(default=0, ge=0)
    document_lines: int | None = Field(default=None, ge=2)


def read_documents(files: Files, options: NoOptions) -> Records:
    """Records of text and the number of its document, from 1."""
    document, between = 0, True
    for line in read_lines(files.path, files.encoding):
        if line.fault:
            yield BadRecord(line.where, line.fault)
            continue
        if not line.text.strip():
            between = True
            continue
        document, between = document + between, False
        yield Record(line.where, {"text": line.text, "document": document})


def read_sentence_pairs(files: Files, options: PairOptions) -> Records:
    """Pairs for next sentence prediction (Devlin et al., 2019): each sentence but the last of its document with the one
    that follows (label `next`), or, in half of the pairs, with one of another document (label `random`).

    Records of text, text_pair, label and the number of the text's document. The sentences are held in memory. Raises
    ConfigError for a file of one document.
    """
    kept: list[Record] = []
    torn: set[int] = set()  # sentences after which a line is missing
    for record in read_documents(files, NoOptions()):
        if isinstance(record, BadRecord):
            torn.add(len(kept) - 1)
            yield record
        else:
            kept.append(record)
    numbers = [record.data["document"] for record in kept]
    if options.document_lines is not None:
        numbers = [1 + at // options.document_lines for at in range(len(kept))]
    if kept and numbers[0] == numbers[-1]:
        raise ConfigError(
            f"{files.path.name} needs several documents, with empty lines between them, or document_lines; found one"
        )
    limits = {number: at for at, number in reversed(list(enumerate(numbers)))}  # where each document begins
    begins = [at for at in range(len(kept) - 1) if numbers[at] == numbers[at + 1] and at not in torn]
    chance = random.Random(options.seed)  # noqa: S311
    replaced = set(chance.sample(begins, len(begins) // 2))
    for at in begins:
        other, label = at + 1, "next"
        if at in replaced:
            first, end = limits[numbers[at]], limits.get(numbers[at] + 1, len(kept))
            other, label = chance.randrange(len(kept) - (end - first)), "random"
            other += (end - first) * (other >= first)
        texts = {"text": kept[at].data["text"], "text_pair": kept[other].data["text"]}
        yield Record(kept[at].where, {**texts, "label": label, "document": numbers[at]})
