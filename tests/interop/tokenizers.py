"""Tokenizers of causal models: nothing stands around a text."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.tiny import CORPUS, TOKENIZER_JSON


def byte_tokenizer(specials: list[str]) -> Tokenizer:
    """Byte-level pairs as GPT-2 and RoBERTa have them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    made.train_from_iterator([CORPUS], trainer)
    return made


def _bare() -> str:
    raw = json.loads(TOKENIZER_JSON)
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    raw["post_processor"] |= {"single": [first], "pair": [first, second]}
    return json.dumps(raw)


BARE_JSON = _bare()
"""The tiny models' tokenizer without its template."""
