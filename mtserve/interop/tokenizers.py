"""Tokenizers as one JSON file: found beside a model, given special tokens, written as Transformers reads them.

Knows no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtserve.errors import CheckpointError, ConfigError
from mtserve.text import TextSpec, text_spec
from mtserve.trunk import gguf_file


def tokenizer_json(folder: Path) -> str:
    """The folder's `tokenizer.json`, or its older files or those of a GGUF file converted. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    packed = gguf_file(folder)
    home, form = (folder, {}) if packed is None else (packed.parent, {"gguf_file": packed.name})
    try:
        tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True, trust_remote_code=False, **form)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder} holds no tokenizer that can be loaded: {str(error).splitlines()[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder} has a tokenizer ({type(tokenizer).__name__}) without a tokenizer.json form")
    return str(tokenizer.backend_tokenizer.to_str())


def spec_beside(folder: Path, config: Any, tokenizer: str) -> TextSpec:
    """Pad and end ids from the model's config, else from the tokenizer's; padding is masked, so any id can serve.

    Stock models, though, read a row's last token that is no pad: a pad that ends text (SmolLM2 has one) gives way to a
    special token named pad, else to one for unknown or end of text that neither ends nor begins rows. Where there is
    none (GPT-2) the end token pads, as any other may be in a text.
    """
    ends = end_ids(config) or [_token_id(folder, tokenizer, "eos_token")]
    pad = getattr(config, "pad_token_id", None)
    pad = _token_id(folder, tokenizer, "pad_token") if pad is None else pad
    if pad is None or pad in ends:
        barred = {*ends, getattr(config, "bos_token_id", None)}
        free = [t for t in json.loads(tokenizer).get("added_tokens") or () if t["special"] and t["id"] not in barred]
        named = (int(t["id"]) for part in ("pad", "unk", "endoftext") for t in free if part in t["content"].lower())
        pad = next(named, ends[0] if pad is None else pad)
    return text_spec(tokenizer, pad_id=pad or 0, eos_id=ends[0])


def end_ids(config: Any) -> list[int | None]:
    """The ids that the model's config lets a text end with."""
    eos = getattr(config, "eos_token_id", None)
    return list(eos) if isinstance(eos, list) else [] if eos is None else [eos]


def _token_id(folder: Path, tokenizer: str, role: str) -> int | None:
    """The id of the token that `tokenizer_config.json` names for a role; None where it names none."""
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get(role) if path.is_file() else None
    content = named.get("content") if isinstance(named, dict) else named
    added = json.loads(tokenizer).get("added_tokens") or ()
    return next((int(token["id"]) for token in added if token["content"] == content), None)


def with_special_tokens(tokenizer: str, tokens: Mapping[str, int]) -> str:
    """The tokenizer with more special tokens, at ids that follow on its own. Raises ConfigError for one that it has."""
    raw = json.loads(tokenizer)
    vocab = raw["model"].get("vocab") or {}
    pieces = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]  # Unigram has scores beside them
    known = {*pieces, *(token["content"] for token in raw.get("added_tokens") or ())}
    if there := [token for token in tokens if token in known]:
        raise ConfigError(f"{there[0]} is a token of the tokenizer already; allowed: --special-tokens with those added")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"] = [
        *(raw.get("added_tokens") or ()),
        *({"id": i, "content": t, **plain} for t, i in tokens.items()),
    ]
    return json.dumps(raw, ensure_ascii=False)


def write_tokenizer(
    folder: Path,
    tokenizer: str,
    *,
    spec: TextSpec,
    end: Sequence[int],
    template: bool,
    max_length: int,
    inputs: Sequence[str],
) -> None:
    """Tokenizer files from which `AutoTokenizer` makes the rows that a task's texts have, cut on request only.

    end: tokens at the end of every row. template: whether the tokenizer's own special tokens stand around a text.
    inputs: names of what the model takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    names = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).convert_ids_to_tokens
    raw = {**json.loads(tokenizer), "padding": None, "truncation": None}
    if not template:
        raw["post_processor"] = None
    elif end:
        raw["post_processor"] = _ended(raw.get("post_processor"), list(end), names(list(end)))
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    roles = {"pad_token": spec.pad_id, "eos_token": spec.eos_id}
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_max_length=max_length,
        model_input_names=list(inputs),
        padding_side="right" if template else "left",
        clean_up_tokenization_spaces=False,
        **{role: names(token) for role, token in roles.items() if token is not None},
    ).save_pretrained(folder)


def _ended(template: dict[str, Any] | None, ids: list[int], tokens: list[str]) -> dict[str, Any]:
    """A post-processor that puts more tokens at the end of what another one makes."""
    name = " ".join(tokens)
    special = {name: {"id": name, "ids": ids, "tokens": tokens}}
    if template is not None and template["type"] == "TemplateProcessing":
        longer = {form: [*template[form], _piece(name, like=template[form][-1])] for form in ("single", "pair")}
        return {**template, **longer, "special_tokens": {**template["special_tokens"], **special}}
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    last = _piece(name, like=first)
    made = {
        "type": "TemplateProcessing",
        "single": [first, last],
        "pair": [first, second, last],
        "special_tokens": special,
    }
    return made if template is None else {"type": "Sequence", "processors": [template, made]}


def _piece(name: str, *, like: dict[str, Any]) -> dict[str, Any]:
    """A template's special token of the type of another piece."""
    (piece,) = like.values()
    return {"SpecialToken": {"id": name, "type_id": piece["type_id"]}}
