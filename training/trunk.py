"""The trunk that a run starts from, with its tokenizer as one JSON file and its special ids. Trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError, ConfigError
from mtserve.interop.tokenizers import end_ids, spec_beside, tokenizer_json
from mtserve.manifest import MANIFEST
from mtserve.resolve import resolve
from mtserve.tasks.base import AnyKind, Options
from mtserve.text import Text, TextSpec
from mtserve.trunk import gguf_file, is_causal, load_trunk, max_length
from mtserve.weights import load_model


@dataclass(frozen=True)
class Trunk:
    """A loaded trunk with its tokenizer. `source` is what a checkpoint says of its origin: a hub id or folder name;
    `checkpoint` is the one that it is part of."""

    model: PreTrainedModel
    tokenizer_json: str
    spec: TextSpec
    source: str
    folder: Path
    checkpoint: Checkpoint | None = None

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

    Of a checkpoint it is the trunk that its heads have, with its tokenizer and its text preparation. A pad token that
    ends text is replaced in its config too, as stock models look there for the last token to read. Raises ResolveError,
    CheckpointError for weights or a tokenizer that cannot be used, ConfigError or SetupError.
    """
    folder = find_trunk(location, base)
    if (folder / MANIFEST).is_file():
        return _of_checkpoint(Checkpoint.open(folder), name=name, preparation=preparation)
    model = load_trunk(str(folder))
    tokenizer = tokenizer_json(folder)
    spec = spec_beside(folder, model.config, tokenizer).model_copy(update={"preparation": preparation})
    if getattr(model.config, "pad_token_id", None) in end_ids(model.config):
        model.config.pad_token_id = spec.pad_id
    words, entries = Text(tokenizer, spec).vocab_size, model.get_input_embeddings().weight.shape[0]
    if words > entries:
        raise CheckpointError(f"{folder}: the tokenizer has {words} tokens, the trunk embeds {entries}")
    local = Path(location).exists() or (base / location).exists()
    return Trunk(model, tokenizer, spec, name or (folder.name if local else location), folder)


def _of_checkpoint(checkpoint: Checkpoint, *, name: str | None, preparation: tuple[str, ...]) -> Trunk:
    spec = checkpoint.manifest.text
    if preparation not in ((), spec.preparation):
        found = f"{checkpoint.folder} prepares its texts by {', '.join(spec.preparation) or 'no step'}"
        raise ConfigError(f"preparation: {found}; allowed: that, or to leave it out")
    source = name or checkpoint.manifest.trunk.source
    folder = checkpoint.folder / "trunk"
    return Trunk(load_model(checkpoint).trunk, checkpoint.tokenizer_json, spec, source, folder, checkpoint)


def find_trunk(location: str, base: Path) -> Path:
    """The trunk's folder or GGUF file, fetched from the hub where it must be. Raises ResolveError."""
    near = base / location if (base / location).exists() else Path(location)
    return near if near.is_file() and gguf_file(near) else resolve(near if near.is_dir() else location)
