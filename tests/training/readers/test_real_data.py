"""Every shared data file is read whole, with the counts of its README and no more faults than are known."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from mtserve.text import Text, TextSpec
from tests.shared_data import DATA, needs_data
from tests.training.readers.helpers import both, good
from training.trunk import tokenizer_json

pytestmark = needs_data
HOTELS = {"path": "arabic/absa_hotels/AR_Hotels_Train_SB1.xml", "format": "absa"}


def shakespeare(suffix: str, split: str, **options: Any) -> dict[str, Any]:
    sides = {"source": "modern", "target": "original", "suffix": suffix}
    path = "shakespeare" if suffix else "shakespeare/raw"
    return {"path": path, "format": "parallel", "split": split, "options": {**sides, **options}}


@pytest.mark.parametrize(
    ("suffix", "split", "pairs", "equal"),
    [
        ("", "train", 18395, 1148),
        ("", "valid", 1218, 61),
        (".nltktok", "train", 18395, 1158),
        (".nltktok", "valid", 1218, 63),
    ],
)
def test_shakespeare(suffix: str, split: str, pairs: int, equal: int) -> None:
    assert len(good(DATA, **shakespeare(suffix, split))) == pairs
    styles = good(DATA, **shakespeare(suffix, split, view="style"))
    assert Counter(r["label"] for r in styles) == {"modern": pairs, "original": pairs}
    unequal = good(DATA, **shakespeare(suffix, split, view="style", drop_equal=True))
    assert len(unequal) == 2 * (pairs - equal)
    assert Counter(kind for r in unequal for kind in r.get("repairs", ())) == {"equal_pair": equal}


def test_stsb_and_rte_and_commonsenseqa() -> None:
    for split, rows in (("train", 5749), ("dev", 1500)):
        found = good(DATA, path=f"stsb/sts-{split}.csv", format="stsb")
        assert len(found) == rows
        assert all(0 <= r["score"] <= 5 and r["text"] and r["text_pair"] for r in found)
    rte = good(DATA, path="rte/train.tsv", format="glue_tsv")
    assert Counter(r["label"] for r in rte) == {"entailment": 1249, "not_entailment": 1241}
    assert all(r["sentence1"] and r["sentence2"] for r in rte)
    questions = good(DATA, path="commonsenseqa/train_rand_split.jsonl", format="commonsenseqa")
    assert len(questions) == 9741
    assert all(len(r["choices"]) == 5 and 0 <= r["answer"] < 5 for r in questions)


def test_hotels() -> None:
    opinions = good(DATA, **HOTELS)
    assert len(opinions) == 10509
    named = [r for r in opinions if r["target"] is not None]
    assert len(named) == 9620
    assert all(r["text"][r["from"] : r["to"]] == r["target"] == r["text_pair"] for r in named)
    assert Counter(r["label"] for r in opinions) == {"positive": 6197, "negative": 3629, "neutral": 683}
    sentences = good(DATA, **HOTELS, options={"view": "targets", "categories": True})
    assert len(sentences) == 4802
    assert len({r["review"] for r in sentences}) == 1839
    spans = {(r["sentence"], s["start"], s["end"]) for r in sentences for s in r["spans"]}
    assert spans == {(r["sentence"], r["from"], r["to"]) for r in named}
    assert not any(r["repairs"] for r in sentences)


@pytest.mark.parametrize(
    ("split", "sentences", "repairs"), [("train", 3299, {"orphan": 10}), ("dev", 707, {"orphan": 4, "stray": 1})]
)
def test_anercorp(split: str, sentences: int, repairs: dict[str, int]) -> None:
    source: dict[str, Any] = {"path": f"arabic/anercorp/{split}_data.txt", "format": "conll"}
    repaired = good(DATA, **source, options={"repair": True})
    assert len(repaired) == sentences
    assert Counter(kind for r in repaired for kind in r["repairs"]) == repairs
    strict, refused = both(DATA, **source)
    assert len(refused) == sum(bool(r["repairs"]) for r in repaired)
    assert len(strict) + len(refused) == sentences
    stray = [(bad.where, bad.message) for bad in refused if bad.message.startswith("stray")]
    assert [where for where, _ in stray] == (["dev_data.txt:18122"] if split == "dev" else [])


def test_the_vocabulary_of_gpt2_makes_a_tokenizer(tmp_path: Path) -> None:
    """Older tokenizer files, without a tokenizer.json; AraBERT's are in test_arabic.py."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(DATA / "tokenizers" / "gpt2" / name, tmp_path / name)
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    made = Text(tokenizer_json(tmp_path), TextSpec())
    assert made.vocab_size == 50_257
    assert made.decode(made.plain("Wherefore art thou Romeo?")) == "Wherefore art thou Romeo?"
