"""Tiny random trunks with tasks of every kind: what most tests run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

from mtserve.backends.eager import EagerBackend
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine, Task
from mtserve.golden import golden_rows
from mtserve.model import Model
from mtserve.sealing import seal
from mtserve.tasks import KINDS
from mtserve.text import Text, TextSpec, text_spec
from mtserve.trunk import is_causal
from mtserve.weights import task_part, trunk_part

PAD, CLS, SEP, UNK, EOS = 0, 1, 2, 3, 4
CORPUS = (
    "the parcel arrived two days late , but the support team was kind . a man is feeding his dog ; someone gives food "
    "to a pet what do you open when it starts to rain ? an umbrella a tin of soup a book ana silva moved from porto to "
    "oslo in may i do not know where he has gone great awful good bad fine north south river town red green blue one"
)


def _tokenizer() -> str:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,;:?!'-[]é")
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[EOS]", *sorted({w for w in CORPUS.split() if len(w) > 1})]
    pieces += letters + [f"##{letter}" for letter in letters]
    vocab = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[EOS]"])
    special = [("[CLS]", CLS), ("[SEP]", SEP)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return str(made.to_str())


TOKENIZER_JSON = _tokenizer()
VOCAB = Tokenizer.from_str(TOKENIZER_JSON).get_vocab_size()
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "pad_token_id": PAD,
}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "pooler_hidden_size": 32,
    "type_vocab_size": 0,
}
_ENDS = {"bos_token_id": CLS, "eos_token_id": EOS}
FAMILIES: dict[str, dict[str, Any]] = {
    "albert": {**_COMMON, "embedding_size": 16},
    "bert": _COMMON,
    "deberta-v2": {**_COMMON, **_DEBERTA},
    "distilbert": {
        **{"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        **{"max_position_embeddings": 96, "pad_token_id": PAD},
    },
    "electra": {**_COMMON, "embedding_size": 16},
    "gpt2": {
        **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "pad_token_id": PAD},
        **_ENDS,
    },
    "llama": {**_COMMON, **_ENDS, "num_key_value_heads": 2},
    "modernbert": {
        **_COMMON,
        **_ENDS,
        **{"cls_token_id": CLS, "sep_token_id": SEP, "global_attn_every_n_layers": 2, "local_attention": 8},
    },
    "mpnet": _COMMON,
    "roberta": _COMMON,
    "xlm-roberta": _COMMON,
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "topic": ("classification", {"labels": ["good", "bad", "fine"], "max_length": 48}),
    "tags": ("classification", {"labels": ["red", "green"], "multi_label": True, "max_length": 48}),
    "score": ("similarity", {"low": 0, "high": 5, "max_length": 48}),
    "cosine": ("similarity", {"method": "cosine", "max_length": 48}),
    "choice": ("multiple_choice", {"max_length": 48}),
    "names": ("token_classification", {"labels": ["person", "place"], "max_length": 48}),
}
GENERATION: dict[str, tuple[str, dict[str, Any]]] = {
    "forth": ("generation", {"template": "{source} [SEP]{target}", "max_new_tokens": 5, "max_length": 48}),
    "back": ("generation", {"template": "one : {source} [SEP]{target}", "max_new_tokens": 7, "max_length": 48}),
}


def trunk_of(family: str, *, seed: int = 0) -> Any:
    """A random trunk. Weights are spread more widely than a fresh model's, so that inputs change outputs visibly."""
    torch.manual_seed(seed)
    trunk = AutoModel.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    for name, parameter in trunk.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" not in name else 1.0)
    return trunk


@dataclass
class Tiny:
    """A tiny model with its engine."""

    model: Model
    engine: Engine
    text: Text
    spec: TextSpec

    @property
    def tasks(self) -> list[Task]:
        return list(self.engine.tasks.values())


def tiny(
    family: str,
    *,
    only: tuple[str, ...] | None = None,
    tasks: dict[str, tuple[str, dict[str, Any]]] | None = None,
) -> Tiny:
    """A random model of a family with these tasks; by default with every task of `OPTIONS`, and of `GENERATION` where
    the trunk is causal."""
    model = Model(trunk_of(family))
    spec = text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS)
    wanted = tasks or {**OPTIONS, **(GENERATION if is_causal(model.trunk) else {})}
    made = []
    for name, (kind, raw) in wanted.items():
        if only is None or name in only:
            options = KINDS[kind].options.model_validate(raw)
            model.add(name, KINDS[kind].head(options))
            made.append(Task(name, KINDS[kind], options))
    model.eval()
    text = Text(TOKENIZER_JSON, spec)
    return Tiny(model, Engine(made, EagerBackend(model, pad_id=PAD), text), text, spec)


def write_checkpoint(folder: Path, small: Tiny, *, golden: bool = True, tasks: set[str] | None = None) -> Checkpoint:
    parts = []
    for task in small.tasks:
        if tasks is None or task.name in tasks:
            sample = task.kind.sample(task.options)
            rows = golden_rows(small.engine, task.name, [sample]) if golden else []
            truth = [sample.model_dump(mode="json", exclude_none=True)]
            parts.append(
                task_part(
                    small.model, task.name, kind=task.kind.name, options=task.options, golden=rows, calibration=truth
                )
            )
    return seal(
        folder,
        trunk_part(small.model, source="random"),
        tasks=parts,
        tokenizer_json=TOKENIZER_JSON,
        text=small.spec,
        provenance={"note": "test"},
        card="# test\n",
        written_by="tests",
    )
