"""Arabic trunks: the real AraBERT vocabulary over a tiny random BERT, on every sentence of the hotel reviews."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from mtserve.backends.staging import padded
from mtserve.preparation import expand
from mtserve.rows import Row
from mtserve.tasks import KINDS
from mtserve.tasks.base import IGNORED
from mtserve.tasks.spans import word_spans
from mtserve.tasks.work import Work
from mtserve.text import Text
from tests.shared_data import DATA, needs_data
from training.readers import FORMATS, Files, Record
from training.runfile import find, read_config
from training.trunk import open_trunk

pytestmark = needs_data
KIND = KINDS["token_classification"]
ABSA = FORMATS["absa"]
FILE = Files((DATA / "arabic" / "absa_hotels" / "AR_Hotels_Train_SB1.xml",))
PAD, CLS, SEP = 17029, 17028, 17030
Limits = tuple[int, int]

# How many targets do not come back under a preparation, and how many of these come back shorter: a full stop at the end
# of a target (or at its start) that the preparation leaves out has no token to carry its tag.
LOST = {"": (0, 0), "arabert": (1, 0), "marbert": (0, 0), "qarib": (3, 2)}


def write_arabert(folder: Path) -> Path:
    """A random BERT with the AraBERT vocabulary, as the hub has such models: vocab.txt, no tokenizer.json."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=64_000, pad_token_id=PAD, **sizes)).save_pretrained(folder)
    shutil.copy(DATA / "tokenizers" / "arabert" / "vocab.txt", folder)
    # Its own config does not say so, and then BERT's default would take the hamza off every alef.
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "pad_token": "[PAD]"}))
    return folder


@pytest.fixture(scope="module")
def arabert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_arabert(tmp_path_factory.mktemp("trunk") / "bert-base-arabertv02")


@cache
def records(view: str) -> list[Record]:
    found = list(ABSA.read(FILE, ABSA.options(view=view)))
    return [record for record in found if isinstance(record, Record)]


def options(preparation: str) -> Any:
    length = read_config(find("arabic_hotels")).tasks["targets"].options["max_length"]
    return KIND.options(labels=("target",), max_length=length, preparation=expand([preparation] if preparation else []))


def covering(words: list[Limits], span: Limits) -> Limits:
    """The whole words that a span touches, from the first one's start to the last one's end."""
    inside = [word for word in words if word[0] < span[1] and word[1] > span[0]]
    return inside[0][0], inside[-1][1]


def given_back(text: Text, record: Record, chosen: Any) -> list[Limits]:
    """The spans that decoding makes of logits which say just what the training targets of this sentence say."""
    example = KIND.labelled(text=record.data["text"], spans=record.data["spans"])
    rows = KIND.rows(example, chosen, text)
    assert not any(row.cut for row in rows)
    work = Work("targets", KIND.unlabelled(example), KIND.parameters(), rows)
    targets = KIND.target(example, rows, chosen)
    work.logits = [np.eye(3, dtype=np.float32)[np.where(t == IGNORED, 0, t)] * 9 for t in targets]
    return [(span["start"], span["end"]) for span in KIND.decode(work, chosen, text)]


def test_the_data_are_whole() -> None:
    assert len(records("targets")) == 4802
    assert len(records("sentiment")) == 10_509
    spans = [(record, span) for record in records("targets") for span in record.data["spans"]]
    assert len(spans) == 9620
    assert not any(record.data["repairs"] for record in records("targets"))
    assert Counter(record.data["label"] for record in records("sentiment")) == {
        "positive": 6197,
        "negative": 3629,
        "neutral": 683,
    }


def test_the_vocabulary_and_its_pad_id_come_through(arabert: Path) -> None:
    trunk = open_trunk(str(arabert), arabert.parent)
    assert trunk.spec.pad_id == PAD
    assert trunk.text().vocab_size == 64_000
    pieces = (arabert / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert pieces[0] == "", "the trap: an empty first token, which must not shift the ids"
    row = trunk.text().rows("هذا فندق جميل جدا", limits=options("").limits)[0]
    assert row.ids.tolist() == [CLS, *(pieces.index(word) for word in ("هذا", "فندق", "جميل", "جدا")), SEP]


@pytest.mark.parametrize("pad", [PAD, None], ids=["config", "nowhere"])
def test_padding_changes_no_state(arabert: Path, tmp_path: Path, pad: int | None) -> None:
    """With the right pad id, and with BERT's default of 0 where a config names none: padding is masked."""
    folder = Path(shutil.copytree(arabert, tmp_path / "arabert"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("pad_token_id")
    (folder / "config.json").write_text(json.dumps(config if pad is None else {**config, "pad_token_id": pad}))
    trunk = open_trunk(str(folder), tmp_path)
    assert trunk.spec.pad_id == (pad or 0)
    text, limits = trunk.text(), options("").limits
    rows = [text.rows(record.data["text"], limits=limits)[0] for record in records("targets")[:12]]
    rows.sort(key=len)
    assert len(rows[0]) < len(rows[-1]) / 2

    def states(rows: list[Row]) -> torch.Tensor:
        ids, mask, types = padded(rows, pad_id=trunk.spec.pad_id)
        with torch.no_grad():
            found: torch.Tensor = trunk.model(input_ids=ids, attention_mask=mask, token_type_ids=types)[0]
        return found

    together, alone = states(rows), [states([row])[0] for row in rows]
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left[: len(right)], right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preparation", LOST, ids=lambda name: name or "none")
def test_every_target_comes_back_from_its_tags(arabert: Path, preparation: str) -> None:
    """7,818 targets are whole words and come back character for character; 1,802 begin or end inside a word (mostly
    after the prefixes and, with, to) and come back as the words that hold them. No sentence is cut."""
    text, chosen = open_trunk(str(arabert), arabert.parent).text(), options(preparation)
    seen: Counter[str] = Counter()
    for record in records("targets"):
        words, found = word_spans(record.data["text"]), given_back(text, record, chosen)
        wholes = []
        for span in record.data["spans"]:
            limits = (span["start"], span["end"])
            wholes.append(covering(words, limits))
            seen["whole words" if wholes[-1] == limits else "inside"] += 1
            seen["exact"] += wholes[-1] == limits and limits in found
        seen["back"] += sum(whole in found for whole in wholes)
        seen["changed"] += sum(span not in wholes for span in found)
    lost, changed = LOST[preparation]
    counts = {"whole words": 7818, "inside": 1802, "exact": 7818 - lost, "back": 9620 - lost, "changed": changed}
    assert seen == Counter(counts)


def test_opinions_without_a_target_ask_about_their_category(arabert: Path) -> None:
    """889 opinions name no words; like the others they are pairs, of which nothing is cut and the second is whole."""
    text = open_trunk(str(arabert), arabert.parent).text()
    limits = options("").limits
    nameless = [record.data for record in records("sentiment") if record.data["target"] is None]
    assert len(nameless) == 889
    assert {"service general", "rooms prices"} <= {one["text_pair"] for one in nameless}
    for record in records("sentiment"):
        (row,) = text.rows(record.data["text"], record.data["text_pair"], limits=limits)
        assert not row.cut
        second = row.offsets[(row.type_ids == 1) & ~row.special]
        about = record.data["text_pair"]
        assert about[second[:, 0].min() : second[:, 1].max()] == about.strip()
        if record.data["target"] is not None:
            assert record.data["text"][record.data["from"] : record.data["to"]] == about
