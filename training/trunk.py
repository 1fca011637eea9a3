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
from mtserve.trunk import is_causal, load_trunk, max_length


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
    """Load a trunk from a folder (relative to `base`, else to the working directory) or the hub.

    Raises ResolveError, or CheckpointError for weights or a tokenizer that cannot be used.
    """
    folder = find_trunk(location, base)
    model = load_trunk(str(folder))
    tokenizer = tokenizer_json(folder)
    spec = _spec(folder, model.config, tokenizer).model_copy(update={"preparation": preparation})
    words, entries = Text(tokenizer, spec).vocab_size, model.get_input_embeddings().weight.shape[0]
    if words > entries:
        raise CheckpointError(f"{folder}: the tokenizer has {words} tokens, the trunk embeds {entries}")
    local = Path(location).is_dir() or (base / location).is_dir()
    return Trunk(model, tokenizer, spec, name or (folder.name if local else location), folder)


def find_trunk(location: str, base: Path) -> Path:
    """The trunk's folder, fetched from the hub where it must be. Raises ResolveError."""
    return resolve(base / location if (base / location).is_dir() else location)


def tokenizer_json(folder: Path) -> str:
    """The folder's `tokenizer.json`, or its older tokenizer files converted. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder} holds no tokenizer that can be loaded: {str(error).splitlines()[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder} has a tokenizer ({type(tokenizer).__name__}) without a tokenizer.json form")
    return str(tokenizer.backend_tokenizer.to_str())


def _spec(folder: Path, config: Any, tokenizer: str) -> TextSpec:
    """Pad and end ids from the model's config, else from the tokenizer's; padding is masked, so any id can serve."""
    eos = getattr(config, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list) else eos
    eos = _token_id(folder, tokenizer, "eos_token") if eos is None else eos
    pad = getattr(config, "pad_token_id", None)
    pad = _token_id(folder, tokenizer, "pad_token") if pad is None else pad
    return text_spec(tokenizer, pad_id=next((i for i in (pad, eos) if i is not None), 0), eos_id=eos)


def _token_id(folder: Path, tokenizer: str, role: str) -> int | None:
    """The id of the token that `tokenizer_config.json` names for a role; None where it names none."""
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get(role) if path.is_file() else None
    content = named.get("content") if isinstance(named, dict) else named
    added = json.loads(tokenizer).get("added_tokens") or ()
    return next((int(token["id"]) for token in added if token["content"] == content), None)
