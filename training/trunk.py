"""The trunk that a run starts from, with its tokenizer as one JSON file and its special ids. Trains nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mtserve.errors import CheckpointError, ConfigError
from mtserve.resolve import resolve
from mtserve.tasks.base import AnyKind, Options
from mtserve.text import Text, TextSpec, text_spec
from mtserve.trunk import gguf_file, is_causal, load_trunk, max_length


@dataclass(frozen=True)
class Trunk:
    """A loaded trunk with its tokenizer. `source` is what a checkpoint says of its origin: a hub id or folder name."""

    model: PreTrainedModel
    tokenizer_json: str
    spec: TextSpec
    source: str
    folder: Path

    def text(self) -> Text:
        return Text(self.tokenizer_json, self.spec)

    def check(self, task: str, kind: AnyKind, options: Options) -> None:
        """Raise ConfigError if a task cannot work on this trunk."""
        limit = max_length(self.model.config)
        if limit is not None and options.max_length > limit:
            found = f"{options.max_length} is more than this trunk's positions allow"
            raise ConfigError(f"tasks.{task}.options.max_length: {found}; allowed: at most {limit}")
        if kind.causal and not is_causal(self.model):
            family = self.model.config.model_type
            raise ConfigError(f"tasks.{task}.kind: {kind.name} needs a causal trunk; {family} here is bidirectional")


def open_trunk(location: str, base: Path, *, name: str | None = None, preparation: tuple[str, ...] = ()) -> Trunk:
    """Load a trunk from a folder or GGUF file (relative to `base`, else to the working directory) or the hub.

    A pad token that ends text is replaced in its config too, as stock models look there for the last token to read.
    Raises ResolveError, CheckpointError for weights or a tokenizer that cannot be used, or SetupError.
    """
    folder = find_trunk(location, base)
    model = load_trunk(str(folder))
    tokenizer = tokenizer_json(folder)
    spec = _spec(folder, model.config, tokenizer).model_copy(update={"preparation": preparation})
    if getattr(model.config, "pad_token_id", None) in _ends(model.config):
        model.config.pad_token_id = spec.pad_id
    words, entries = Text(tokenizer, spec).vocab_size, model.get_input_embeddings().weight.shape[0]
    if words > entries:
        raise CheckpointError(f"{folder}: the tokenizer has {words} tokens, the trunk embeds {entries}")
    local = Path(location).exists() or (base / location).exists()
    return Trunk(model, tokenizer, spec, name or (folder.name if local else location), folder)


def find_trunk(location: str, base: Path) -> Path:
    """The trunk's folder or GGUF file, fetched from the hub where it must be. Raises ResolveError."""
    near = base / location if (base / location).exists() else Path(location)
    return near if near.is_file() and gguf_file(near) else resolve(near if near.is_dir() else location)


def tokenizer_json(folder: Path) -> str:
    """The folder's `tokenizer.json`, or its older files or those of a GGUF file converted. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

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


def _spec(folder: Path, config: Any, tokenizer: str) -> TextSpec:
    """Pad and end ids from the model's config, else from the tokenizer's; padding is masked, so any id can serve.

    Stock models, though, read a row's last token that is no pad: a pad that ends text (SmolLM2 has one) gives way to a
    special token named pad, else to one for unknown or end of text that neither ends nor begins rows. Where there is
    none (GPT-2) the end token pads, as any other may be in a text.
    """
    ends = _ends(config) or [_token_id(folder, tokenizer, "eos_token")]
    pad = getattr(config, "pad_token_id", None)
    pad = _token_id(folder, tokenizer, "pad_token") if pad is None else pad
    if pad is None or pad in ends:
        barred = {*ends, getattr(config, "bos_token_id", None)}
        free = [t for t in json.loads(tokenizer).get("added_tokens") or () if t["special"] and t["id"] not in barred]
        named = (int(t["id"]) for part in ("pad", "unk", "endoftext") for t in free if part in t["content"].lower())
        pad = next(named, ends[0] if pad is None else pad)
    return text_spec(tokenizer, pad_id=pad or 0, eos_id=ends[0])


def _ends(config: Any) -> list[int | None]:
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
