"""Text preparation: what each step does, that it never loses its way back, and parity with AraBERT's own package."""

from __future__ import annotations

import html
import json
import re
import sys
import threading
import types
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from mtserve.checkpoint import Checkpoint
from mtserve.cli import app
from mtserve.errors import CheckpointError, InputError, MissingExtraError, SetupError
from mtserve.inspection import describe
from mtserve.preparation import PRESETS, STEPS, Preparation, Prepared, check_steps, expand
from mtserve.preparation.words import _word, segments
from mtserve.tasks import KINDS
from mtserve.tasks.spans import word_spans
from mtserve.text import Limits
from tests.tiny import OPTIONS, tiny, write_checkpoint

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "preparation" / "arabert.json").read_text(encoding="utf-8"))
ARGUMENTS = {"urls": "[رابط]", "emails": "", "users": "USER", "hashtags": "", "digits": "0", "repeats": "2"}
PLAIN_STEPS = [
    name.partition(":")[0] + (":" + ARGUMENTS[name.partition(":")[0]] if ":" in name else "")
    for name in STEPS
    if not name.startswith(("stem", "farasa"))
]
SIGNS = """
كِتَابٌ رااااائع مـــدرسة إلى ٣٫٥ ۴ ﷺ ﻻ هٰذا İ 각 ﾊﾞ ـ ً 😀 !!!! … . / [ ] _ < > <i> <br/> &amp; &lt;b&gt; &#1593;
http://a.bc/x?y=1 www.x a@b.com @علي #وسم_1 good 12كتاب3x
"""
PIECES = [*SIGNS.split(), "<br />", "e\u0301", "\u0301", "\u0344", "\u200f", "\ufe0f", "\t", "\n ", "  ", ""]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).flatmap(
    lambda pieces: st.sampled_from(["", " "]).map(lambda between: between.join(pieces))
)


def ranges(prepared: Prepared) -> list[tuple[int, int]]:
    if prepared.starts is None or prepared.ends is None:
        return [(at, at + 1) for at in range(len(prepared.text))]
    return list(zip(prepared.starts, prepared.ends, strict=True))


def check_ranges(text: str, prepared: Prepared) -> None:
    found = ranges(prepared)
    assert len(found) == len(prepared.text)
    assert all(0 <= start <= end <= len(text) for start, end in found)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(found))


def shown(text: str, steps: Sequence[str]) -> list[tuple[str, str]]:
    """Each prepared character with the caller's characters that it stands for."""
    prepared = Preparation(steps)(text)
    return [(c, text[start:end]) for c, (start, end) in zip(prepared.text, ranges(prepared), strict=True)]


@given(text=texts, steps=st.lists(st.sampled_from(PLAIN_STEPS), max_size=6))
def test_every_character_has_a_place_in_the_callers_text(text: str, steps: list[str]) -> None:
    check_ranges(text, Preparation(steps)(text))


@given(
    pieces=st.lists(st.sampled_from([piece for piece in PIECES if piece not in {"<", ">"}])),
    steps=st.lists(st.sampled_from(PLAIN_STEPS), max_size=4)
    | st.sampled_from(["arabert", "marbert", "qarib"]).map(lambda preset: list(expand([preset]))),
)
def test_a_word_that_no_step_touches_stays_where_it_is(pieces: list[str], steps: list[str]) -> None:
    text = "qzq " + " qzq ".join(pieces) + " qzq"
    prepared = Preparation(steps)(text)
    found = ranges(prepared)
    at = [m.start() for m in re.finditer("qzq", prepared.text)]
    assert [[found[place + letter] for letter in range(3)] for place in at] == [
        [(m.start() + letter, m.start() + letter + 1) for letter in range(3)] for m in re.finditer("qzq", text)
    ]


@given(text=st.text())
def test_no_steps_cost_nothing(text: str) -> None:
    prepared = Preparation(())(text)
    assert prepared.text is text
    assert prepared.starts is prepared.ends is None


@given(text=texts, form=st.sampled_from(["NFC", "NFKC"]))
def test_unicode_forms_are_those_of_the_whole_text(text: str, form: str) -> None:
    assert Preparation([form.lower()])(text).text == unicodedata.normalize(form, text)


@given(text=texts | st.text(alphabet="&#x1;amplt< "))
def test_references_and_case_are_those_of_the_whole_text(text: str) -> None:
    assert Preparation(["html_entities"])(text).text == html.unescape(text)
    assert Preparation(["spaces"])(text).text == " ".join(text.split())


@pytest.mark.parametrize(
    ("steps", "text", "expected"),
    [
        (["tashkeel"], "كِتٌ", [("ك", "كِ"), ("ت", "تٌ")]),
        (["tashkeel"], " ًكت", [(" ", " "), ("ك", "ًك"), ("ت", "ت")]),
        (["arabic_diacritics"], "هٰذ", [("ه", "هٰ"), ("ذ", "ذ")]),
        (["tatweel"], "مـــد", [("م", "مـــ"), ("د", "د")]),
        (["alef", "ya", "ta_marbuta"], "أىة", [("ا", "أ"), ("ي", "ى"), ("ه", "ة")]),
        (["arabic_digits", "persian_digits"], "٣۴", [("3", "٣"), ("4", "۴")]),
        (["repeats:2"], "aaaab 1111", [("a", "a"), ("a", "aaa"), *((c, c) for c in "b 1111")]),
        (["nfc"], "e\u0301x", [("é", "e\u0301"), ("x", "x")]),
        (["nfkc"], "ﻻ", [("ل", "ﻻ"), ("ا", "ﻻ")]),
        (["lowercase"], "AİB", [("a", "A"), ("i", "İ"), ("\u0307", "İ"), ("b", "B")]),
        (["spaces"], "  a \n b ", [("a", "a"), (" ", " \n "), ("b", "b")]),
        (["html_entities"], "a&amp;b", [("a", "a"), ("&", "&amp;"), ("b", "b")]),
        (["html_tags"], "a<br />b", [("a", "a"), (" ", "<br />"), ("b", "b")]),
        (["users:U"], "a @x.", [("a", "a"), (" ", " "), ("U", "@x"), (" ", ""), (".", ".")]),
        (["emails:"], "a x@y.z", [("a", "a"), (" ", " "), (" ", "x@y.z")]),
        (["digits:#"], "a 1.5", [("a", "a"), (" ", " "), ("#", "1.5")]),
        (["hashtags:H"], "#ab c", [("H", "#ab"), (" ", " "), ("c", "c")]),
        (["stem:english"], "two books", [*((c, c) for c in "two "), *((c, "books") for c in "book")]),
        (["arabert_spaces"], "كتاب1", [*((c, c) for c in "كتاب"), (" ", ""), ("1", "1")]),
        (["qarib_characters"], "a😀!", [("a", "a"), (" ", ""), ("😀", "😀"), (" ", ""), (" ", "!")]),
    ],
)
def test_what_a_step_does_and_stands_for(steps: list[str], text: str, expected: list[tuple[str, str]]) -> None:
    assert shown(text, steps) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("انظر https://a.bc/d?e=1.", "انظر URL ."), ("(www.a.bc)", "( URL )"), ("http://ex.com، نعم", "URL ، نعم")],
)
def test_web_addresses_end_before_the_punctuation_of_the_sentence(text: str, expected: str) -> None:
    assert Preparation(["urls:URL"])(text).text == expected


def test_arabert_is_what_its_own_package_makes() -> None:
    assert len(FIXTURE["rows"]) >= 25
    for preset, column in (("arabert", "v02"), ("qarib", "qarib")):
        prepare = Preparation(expand([preset]))
        for row in FIXTURE["rows"]:
            prepared = prepare(row["text"])
            assert prepared.text == row[column], (preset, row["text"])
            check_ranges(row["text"], prepared)


def test_marbert_keeps_all_but_diacritics_links_and_names() -> None:
    text = "شُكْرًا @ali على https://t.co/x #فندق_جميل!! 😍"
    assert Preparation(expand(["marbert"]))(text).text == "شكرا USER على URL HASHTAG !! 😍"


def fake_farasa(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Farasa as farasapy has it, with the fixture's words for a model; not safe from two threads at once."""

    class FarasaSegmenter:
        bin_dir = folder

        def __init__(self, *, interactive: bool) -> None:
            assert interactive
            self.busy = False

        def segment(self, text: str) -> str:
            assert not self.busy
            self.busy = True
            found = str(FIXTURE["segments"].get(text, text))
            self.busy = False
            return found + "\n"

    module = types.ModuleType("farasa.segmenter")
    module.FarasaSegmenter = FarasaSegmenter
    monkeypatch.setitem(sys.modules, "farasa", types.ModuleType("farasa"))
    monkeypatch.setitem(sys.modules, "farasa.segmenter", module)


def test_farasa_segments_are_written_as_arabert_writes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_farasa(monkeypatch, tmp_path)
    with pytest.raises(SetupError, match="needs Farasa's program"):
        Preparation(["farasa"])
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "FarasaSegmenterJar.jar").touch()
    prepare = Preparation(expand(["arabertv2"]))
    for row in FIXTURE["rows"]:
        prepared = prepare(row["text"])
        assert prepared.text == row["v2"], row["text"]
        check_ranges(row["text"], prepared)
    assert shown("لا ومن", ["farasa"])[3:] == [(c, "ومن") for c in "و+ من"]


@pytest.mark.parametrize(
    ("morphemes", "expected"),
    [
        ("ك+كتاب", "ك+ كتاب"),
        ("و+ك+ال+بيت", "و+ ك+ ال+ بيت"),
        ("كتاب+ك", "كتاب +ك"),
        ("بيت+ك+م", "بيت +ك م"),
        ("ه", "ه"),
    ],
)
def test_kaf_is_a_prefix_or_a_suffix_by_its_place(morphemes: str, expected: str) -> None:
    assert segments(morphemes.split("+")) == expected


def test_what_is_not_installed_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, step, extra in (
        ("snowballstemmer", "stem:arabic", "stemming"),
        ("farasa.segmenter", "farasa", "farasa"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        check_steps([step])  # a manifest can be read without it
        with pytest.raises(MissingExtraError, match=rf"mtserve\[{extra}\]"):
            Preparation([step])


def test_a_stemmer_works_from_many_threads() -> None:
    words = [
        a + b + c
        for a in ("", "ال", "و", "وال")
        for b in ("كتاب", "مدرس", "بيت", "طالب")
        for c in ("", "ات", "هم", "ون")
    ]
    prepare = Preparation(["stem:arabic"])
    alone = [Preparation(["stem:arabic"])(word).text for word in words]
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append([prepare(word).text for word in words])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 8
    assert len(set(alone)) < len(words) / 2


@given(text=texts)
def test_stems_are_of_the_words_of_token_classification(text: str) -> None:
    ours = [m.span() for m in re.finditer(_word(), text)]
    signs = [span for span in word_spans(text) if not re.match(r"[\w\u200c\u200d]", text[span[0]])]
    assert sorted(ours + signs) == word_spans(text) or any(unicodedata.category(c)[0] == "M" for c in text)
    check_ranges(text, Preparation(["stem:arabic"])(text))


def test_presets_are_spelled_out_and_unknown_steps_are_refused() -> None:
    assert expand(["nfc", "marbert"]) == ("nfc", *PRESETS["marbert"])
    for preset in PRESETS:
        assert not set(expand([preset])) & set(PRESETS)
        with pytest.raises(CheckpointError, match=f"'{preset}' is unknown"):
            check_steps([preset])
    for wrong in ("stem", "nfc:x", "repeats", "repeats:0", "repeats:two", "stem:klingon", "upper"):
        with pytest.raises(CheckpointError, match=f"step '{wrong}'"):
            expand([wrong])
    assert all(about.endswith(".") for about, _ in STEPS.values())


def test_a_tasks_own_preparation_is_checked_and_spelled_out() -> None:
    options = KINDS["classification"].options
    chosen = options.model_validate({"labels": ["a", "b"], "preparation": ["marbert"]})
    assert chosen.limits == Limits(128, "truncate", 16, PRESETS["marbert"])
    assert options.model_validate({"labels": ["a", "b"], "preparation": []}).limits.preparation == ()
    with pytest.raises(ValidationError, match="'shout' is unknown to this version"):
        options.model_validate({"labels": ["a", "b"], "preparation": ["shout"]})


def test_inspect_says_what_is_in_force_and_who_shares_no_passes(tmp_path: Path) -> None:
    own = {
        "loud": (
            "classification",
            {"labels": ["good", "bad"], "max_length": 48, "preparation": ["lowercase", "repeats:2"]},
        )
    }
    checkpoint = write_checkpoint(tmp_path, tiny("bert", tasks={"topic": OPTIONS["topic"], **own}))
    topic, loud = describe(Checkpoint.open(checkpoint.folder))["tasks"]
    assert (topic["preparation"], topic["shares_passes"]) == ([], True)
    assert (loud["preparation"], loud["shares_passes"]) == (["lowercase", "repeats:2"], False)
    printed = CliRunner().invoke(app, ["inspect", str(checkpoint.folder), "--verify"])
    assert printed.exit_code == 0
    assert printed.output.count("preparation: ") == 1
    assert "preparation: lowercase, repeats:2 (its own: it shares no passes with the other tasks)" in printed.output


def test_tasks_with_the_same_preparation_share_rows_and_others_do_not() -> None:
    own = ("classification", {"labels": ["good", "bad"], "max_length": 48, "preparation": ["repeats:2"]})
    small = tiny("bert", tasks={"topic": OPTIONS["topic"], "loud": own, "loud2": own})
    topic, loud, loud2 = (small.engine.prepare_all(task, ["gooood book"])[0].rows[0].key for task in small.engine.tasks)
    assert loud == loud2 != topic


def test_a_text_of_which_nothing_stays_is_an_empty_text() -> None:
    small = tiny("bert", only=("topic",))
    for text in ("ًٌٍ", "", "ـ"):
        rows = small.text.rows(text, limits=Limits(20, preparation=("tashkeel", "tatweel")))
        assert [row.key for row in rows] == [small.text.rows("", limits=Limits(20))[0].key]
    with pytest.raises(InputError, match="adds no tokens"):
        small.text.prompt("", "ً", "", max_length=9, preparation=("tashkeel",))
