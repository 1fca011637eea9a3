"""Tokens that a run adds to its trunk: next free ids, embeddings like the others, ends and pads by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mtserve.text import Text
from tests.tiny import CLS
from training.config import RunConfig
from training.special_tokens import PRESETS, add_special_tokens
from training.trunk import open_trunk


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_added_tokens(trunk_folder: Callable[[str], Path], family: str) -> None:
    before = open_trunk(str(trunk_folder(family)), Path())
    old = before.model.get_input_embeddings().weight.detach().clone()
    with_them = add_special_tokens(before, PRESETS["notebook"], seed=3)
    new = with_them.model.get_input_embeddings().weight.detach()
    text, words = with_them.text(), len(old)
    ids = [text.literal(token)[0] for token in ("<bos>", "<eos>", "<pad>", "<cls>")]
    assert ids == [words, words + 1, words + 2, words + 3]
    assert new.shape[0] == with_them.model.config.vocab_size == words + 4
    assert torch.equal(new[:words], old)
    assert (text.spec.eos_id, text.spec.pad_id) == (ids[1], ids[2])
    assert (with_them.model.config.eos_token_id, with_them.model.config.pad_token_id) == (ids[1], ids[2])
    assert all(one not in text.plain("<bos>") for one in ids), "in a caller's text they are text"
    again = add_special_tokens(open_trunk(str(trunk_folder(family)), Path()), PRESETS["notebook"], seed=3)
    assert torch.equal(again.model.get_input_embeddings().weight, new)
    other = add_special_tokens(open_trunk(str(trunk_folder(family)), Path()), PRESETS["notebook"], seed=4)
    assert not torch.equal(other.model.get_input_embeddings().weight, new)


def test_a_token_that_is_there_stays(trunk_folder: Callable[[str], Path]) -> None:
    trunk = open_trunk(str(trunk_folder("gpt2")), Path())
    size = trunk.model.config.vocab_size
    found = add_special_tokens(trunk, {"cls": "[CLS]"}, seed=0)
    assert found.model.config.vocab_size == size
    assert Text(found.tokenizer_json, found.spec).literal("[CLS]") == [CLS]
    assert found.spec == trunk.spec


def test_presets_and_roles_are_named() -> None:
    source = {"path": "x.jsonl"}
    raw = {"trunk": "t", "output": "o", "tasks": {"a": {"kind": "generation", "train": source, "eval": source}}}
    made = RunConfig.model_validate({**raw, "special_tokens": "notebook"})
    assert made.special_tokens == dict(PRESETS["notebook"])
    for wrong, why in (("other", "no preset; allowed: notebook"), ({"mask": "<mask>"}, "'bos', 'eos', 'pad' or 'cls'")):
        with pytest.raises(ValidationError, match=why):
            RunConfig.model_validate({**raw, "special_tokens": wrong})
