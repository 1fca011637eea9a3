"""Text preparation on real Arabic text: there and back for every sentence and every labelled span."""

from __future__ import annotations

from functools import cache
from itertools import groupby, pairwise

import pytest
from defusedxml import ElementTree
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mtserve.preparation import Preparation, expand
from mtserve.tasks.spans import Span, spans_to_tags, token_words, word_spans
from mtserve.text import Limits, Text, TextSpec
from tests.shared_data import DATA, needs_data

pytestmark = needs_data
LISTS = ["arabert", "marbert", "qarib", "stem:arabic", "nfkc,arabic_diacritics,tatweel,alef,ya,ta_marbuta,repeats:2"]


@cache
def sentences() -> tuple[tuple[str, tuple[Span, ...]], ...]:
    """Every sentence of both data sets with its labelled spans; a word of an entity in ANERcorp is a span."""
    found: list[tuple[str, tuple[Span, ...]]] = []
    root = ElementTree.parse(DATA / "arabic" / "absa_hotels" / "AR_Hotels_Train_SB1.xml").getroot()
    for sentence in root.iter("sentence"):
        named = [one for one in sentence.iter("Opinion") if one.get("target") != "NULL"]
        spans = {(int(one.get("from", 0)), int(one.get("to", 0)), "target") for one in named}
        found.append((sentence.findtext("text") or "", tuple(sorted(span for span in spans if span[0] < span[1]))))
    for part in ("train_data.txt", "dev_data.txt"):
        lines = (DATA / "arabic" / "anercorp" / part).read_text(encoding="utf-8").split("\n")
        for filled, block in groupby(map(str.split, lines), key=bool):
            if not filled:
                continue
            words = list(block)
            spans, at = set(), 0
            for word, *tags in words:
                if tags and tags[0] != "O":
                    spans.add((at, at + len(word), "entity"))
                at += len(word) + 1
            found.append((" ".join(word for word, *_ in words), tuple(sorted(spans))))
    return tuple(found)


@cache
def arabert() -> Text:
    """The AraBERT vocabulary as a tokenizer."""
    lines = (DATA / "tokenizers" / "arabert" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocab = {piece: at for at, piece in enumerate(lines) if piece}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return Text(made.to_str(), TextSpec(pad_id=vocab["[PAD]"]))


def test_the_data_are_whole() -> None:
    assert len(sentences()) == 8810
    assert sum(len(spans) for _, spans in sentences()) == 23235


@pytest.mark.parametrize("names", LISTS)
def test_spans_are_found_again_in_the_prepared_text(names: str) -> None:
    prepare = Preparation(expand(names.split(",")))
    for text, spans in sentences():
        prepared = prepare(text)
        size = len(prepared.text)
        starts = prepared.starts or range(size)
        ends = prepared.ends or range(1, size + 1)
        assert len(starts) == len(ends) == size
        assert all(0 <= start <= end <= len(text) for start, end in zip(starts, ends, strict=True))
        assert all(a <= b for side in (starts, ends) for a, b in pairwise(side))
        words = word_spans(text)
        for start, end, _ in spans:
            held = [w for w in words if w[0] < end and w[1] > start]
            own = [
                at
                for at in range(size)
                if starts[at] < end and ends[at] > start and starts[at] < ends[at] and not prepared.text[at].isspace()
            ]
            first, last = (starts[own[0]], ends[own[-1]]) if own else (end, end)
            missed = text[start:first] + text[last:end]
            assert all(not prepare(sign).text.strip() for sign in missed), (text[start:end], text[first:last])
            if not own:
                continue
            more = text[first : held[0][0]] + text[held[-1][1] : last]  # only signs in a row, of which some went
            assert not more.strip(text[held[0][0]]), (text[start:end], text[first:last])


@pytest.mark.parametrize("names", LISTS)
def test_every_word_of_a_span_has_a_token(names: str) -> None:
    steps = expand(names.split(","))
    prepare, limits = Preparation(steps), Limits(4096, preparation=steps)
    reached = 0
    for text, spans in sentences():
        if not spans:
            continue
        words = word_spans(text)
        tags = spans_to_tags(words, spans)
        (row,) = arabert().rows(text, limits=limits)
        owners = set(token_words(text, row.offsets, words)[~row.special].tolist())
        for index, ((start, end), tag) in enumerate(zip(words, tags, strict=True)):
            if tag != "O" and index not in owners:
                assert not any(c.isalnum() for c in text[start:end]) or not prepare(text[start:end]).text.strip(), (
                    text[start:end],
                    text,
                )
            reached += tag != "O" and index in owners
    assert reached > 25_000
