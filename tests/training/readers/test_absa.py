"""SemEval XML of both schemas, in both views, and XML that is damaged or hostile."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mtserve.errors import ConfigError
from tests.training.readers.helpers import FIXTURES, both, faults, good
from training.data.source import Source, read

SENTENCE = '<sentence id="s"><text>Good tea.</text><Opinions>{}</Opinions></sentence>'


def absa(name: str, **options: Any) -> dict[str, Any]:
    return {"path": name, "format": "absa", "options": options}


def test_opinions_of_2016() -> None:
    found = good(FIXTURES, **absa("absa_2016.xml"))
    assert [(r["sentence"], r["text_pair"], r["label"], r["target"]) for r in found] == [
        ("7:0", "bar staff", "positive", "bar staff"),
        ("7:0", "bar", "positive", "bar"),
        ("7:0", "soup", "negative", "soup"),
        ("7:0", "soup", "negative", "soup"),
        ("7:0", "food drinks style options", "neutral", None),
        ("9:0", "town", "negative", "town"),
        ("9:0", "hotel general", None, None),
    ]
    assert found[0]["text"] == "The café & the bar staff were kind, the soup cold."
    assert all(r["text"][r["from"] : r["to"]] == (r["target"] or "") for r in found)
    assert [r["review"] for r in found] == ["7"] * 5 + ["9"] * 2
    assert both(FIXTURES, **absa("absa_2016.xml"))[0][2].where == "absa_2016.xml:10"


def test_targets_of_2016() -> None:
    """The longest of overlapping targets is kept; sentences without opinions have no spans."""
    found = good(FIXTURES, **absa("absa_2016.xml", view="targets", categories=True))
    assert [(r["sentence"], [tuple(span.values()) for span in r["spans"]], r["repairs"]) for r in found] == [
        ("7:0", [(15, 24, "SERVICE"), (40, 44, "FOOD_DRINKS")], ["overlap"]),
        ("7:1", [], []),
        ("9:0", [(9, 13, "LOCATION")], []),
    ]
    plain = good(FIXTURES, **absa("absa_2016.xml", view="targets"))
    assert {span["label"] for record in plain for span in record["spans"]} == {"target"}


def test_the_schema_of_2014() -> None:
    found = good(FIXTURES, **absa("absa_2014.xml"))
    assert [(r["text_pair"], r["label"], r["review"]) for r in found] == [
        ("keyboard", "negative", "31"),
        ("screen", "positive", "31"),
    ]
    targets = good(FIXTURES, **absa("absa_2014.xml", view="targets"))
    assert [[(s["start"], s["end"]) for s in r["spans"]] for r in targets] == [[(4, 12), (29, 35)], []]
    bad = faults(FIXTURES, **absa("absa_2014.xml", view="targets", categories=True))
    assert bad == [("absa_2014.xml:6", "sentence 31: target 'keyboard' has no category")]


@pytest.mark.parametrize(
    ("opinion", "message"),
    [
        ('<Opinion target="tea" from="4" to="8"/>', "target 'tea' is not at 4 to 8; found ' tea'"),
        ('<Opinion target="tea" from="-4" to="8"/>', "target 'tea' is not at -4 to 8; found 'Good tea'"),
        ('<Opinion target="tea." from="5" to="99"/>', None),
        ('<Opinion target="tea" from="5"/>', "target 'tea' needs numbers in from and to"),
        ('<Opinion target="NULL" from="0" to="0"/>', "an opinion needs a target or a category"),
    ],
)
def test_faults_of_an_opinion(tmp_path: Path, opinion: str, message: str | None) -> None:
    """A fault costs the opinion in one view, the sentence in the other."""
    right = '\n<Opinion target="Good" polarity="positive" from="0" to="4"/>'
    (tmp_path / "d.xml").write_text(f"<sentences>\n{SENTENCE.format(opinion + right)}</sentences>")
    records, bad = both(tmp_path, **absa("d.xml"))
    assert [r.where for r in records][-1:] == ["d.xml:3"]
    expected = [] if message is None else [("d.xml:2", f"sentence s: {message}")]
    assert [(b.where, b.message) for b in bad] == expected
    if message is not None and "category" not in message:
        assert [len(part) for part in both(tmp_path, **absa("d.xml", view="targets"))] == [0, 1]


def test_opinions_of_whole_reviews_are_not_read(tmp_path: Path) -> None:
    text = f'<Reviews><Review rid="1"><sentences>{SENTENCE.format("")}</sentences>\n<Opinions>'
    (tmp_path / "d.xml").write_text(text + '<Opinion category="A#B" polarity="x"/></Opinions></Review></Reviews>')
    assert faults(tmp_path, **absa("d.xml")) == [("d.xml:2", "an opinion of a whole review, not of a sentence")]


LAUGHS = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{LAUGHS}<sentences>&c;</sentences>", "d.xml:1: a document type or entities are refused in XML"),
        (
            '<!DOCTYPE a SYSTEM "http://localhost/a.dtd"><sentences/>',
            "d.xml:1: a document type or entities are refused",
        ),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><sentences>&b;</sentences>', "are refused in XML"),
        ("<!DOCTYPE a [<!ELEMENT a ANY>]><sentences/>", "found DTDForbidden"),
        (f"<sentences>\n{SENTENCE.format('')}", "d.xml:2: broken XML: no element found"),
        ("<sentences>&b;</sentences>", "d.xml:1: broken XML: undefined entity"),
        ("", "d.xml:1: broken XML: no element found"),
        ("<rss/>", "d.xml:1: the root element is 'rss'; allowed: sentences"),
        ('<?xml version="1.0" encoding="klingon"?><sentences/>', "d.xml"),
        ('<?xml version="1.0" encoding="shift_jis"?><sentences/>', "d.xml"),
        ("\0", "d.xml:1: broken XML"),
    ],
)
def test_damaged_and_hostile_xml(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "d.xml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        both(tmp_path, **absa("d.xml"))


def test_encodings_that_the_file_declares(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-16", "windows-1256"):
        sentence = '<sentence id="1"><text>چای خوب</text></sentence>'
        content = f'<?xml version="1.0" encoding="{encoding}"?>\r\n<sentences>{sentence}</sentences>'
        (tmp_path / "d.xml").write_bytes(content.encode(encoding, "replace"))
        found = good(tmp_path, **absa("d.xml", view="targets"))
        assert found[0]["text"] == "چای خوب".encode(encoding, "replace").decode(encoding)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    sentence = SENTENCE.format('<Opinion target="tea" polarity="x" from="5" to="8"/>' * 20)
    (tmp_path / "d.xml").write_text(f"<sentences>{sentence * 5000}</sentences>")  # 6 MB
    tracemalloc.start()
    count = sum(1 for _ in read(Source(**absa("d.xml")), tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000
    assert peak < 2_000_000


def test_targets_inside_words_are_widened_on_request(tmp_path: Path) -> None:
    opinions = "".join(
        f'<Opinion target="{t}" category="A#B" polarity="positive" from="{a}" to="{b}"/>'
        for t, a, b in (("hotel", 3, 8), ("room", 9, 13), ("el", 6, 8), ("bar", 18, 21))
    )
    text = "thehotel room, thebar!"
    (tmp_path / "d.xml").write_text(
        f'<Reviews><Review rid="1"><sentences><sentence id="1:0"><text>{text}</text>'
        f"<Opinions>{opinions}</Opinions></sentence></sentences></Review></Reviews>"
    )
    (record,) = good(tmp_path, **absa("d.xml", view="targets", whole_words=True))
    assert [text[s["start"] : s["end"]] for s in record["spans"]] == ["thehotel", "room", "thebar"]
    assert sorted(record["repairs"]) == ["overlap", "widened", "widened"]
    (record,) = good(tmp_path, **absa("d.xml", view="targets"))
    assert [text[s["start"] : s["end"]] for s in record["spans"]] == ["hotel", "room", "bar"]
