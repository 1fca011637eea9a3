"""Checkpoints of the notebook "Multi-task Training with Hugging Face Transformers and NLP", brought in. Trains nothing.

Its model is saved as one module whose config says nothing: `encoder.*` is the trunk, and `taskmodels_dict.<task>.*` are
stock task models, each with the same trunk once more. What the notebook did to texts is recorded in the tasks' options:
special tokens that it added, its templates, its lengths, and the segment id 1 that it gave all tokens of a translation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mtserve.checkpoint import Checkpoint, sha256_file
from mtserve.errors import CheckpointError, ConfigError
from mtserve.interop.assemble import (
    bare_trunk,
    check_known,
    import_card,
    output_layer,
    put_task,
    samples,
    seal_tasks,
    source_of,
    task_options,
    to_shares,
    trunk_from,
)
from mtserve.interop.tensors import Stored
from mtserve.interop.tokenizers import spec_beside, tokenizer_json, with_special_tokens
from mtserve.model import Model
from mtserve.resolve import resolve
from mtserve.tasks.similarity import SimilarityOptions
from mtserve.text import Text, TextSpec, text_spec

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<cls>")
"""What the notebook adds to a tokenizer, in this order; without a classifier it needs no last one."""

_BUFFER = re.compile(r"(\.attn\.(masked_)?bias|(^|\.)position_ids|\.inv_freq)$")
"""Constants that older versions of Transformers saved beside the weights."""


@dataclass(frozen=True)
class _Layout:
    """Where the file has what: names in the trunk, and of each task names in its head, to names in the file."""

    trunk: Mapping[str, str]
    heads: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class _Tokens:
    """The tokenizer as the notebook had it: `added` are the special tokens that it got."""

    json: str
    spec: TextSpec
    added: tuple[str, ...]


def import_notebook(
    folder: Path,
    output: Path,
    *,
    model: str,
    kinds: Mapping[str, str],
    options: Mapping[str, Mapping[str, Any]],
    golden: Mapping[str, Sequence[Any]],
    special_tokens: Sequence[str] | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Seal the tasks in `kinds` (name -> kind) of a notebook's checkpoint; its other tasks are left out.

    model: folder or hub id of the model that training began with, for its config and tokenizer. options: a task's
    (labels, and what differs from the notebook's own). golden: inputs by task; the kind's sample where there are none.
    Raises ConfigError, ResolveError, or CheckpointError with the first tensor that is missing or differs from its copy.
    """
    check_known(kinds, {"options": options, "golden inputs": golden})
    home = resolve(model)
    config, names = _config(home)
    stored = Stored(folder, allow_pickle=allow_pickle)
    layout = _layout(stored, prefix=names.base_model_prefix)
    for task in kinds:
        if task not in layout.heads:
            raise ConfigError(f"{folder} holds no task {task!r}; it has {', '.join(layout.heads) or 'none'}")
    tokens = _tokens(home, config, rows=_embedded(stored, layout, names), special_tokens=special_tokens)
    read = stored.read(layout.trunk.values())
    made = Model(trunk_from({name: read[at] for name, at in layout.trunk.items()}, config))
    tasks = []
    for task, kind in kinds.items():
        chosen = task_options(task, kind, {**_habits(kind, tokens.added), **options.get(task, {})})
        tensors = stored.read(layout.heads[task].values())
        own = {name: tensors[at].float() for name, at in layout.heads[task].items()}
        tasks.append(put_task(made, task, kind=kind, options=chosen, tensors=own))
        if isinstance(chosen, SimilarityOptions):
            to_shares(output_layer(made.head(task)), chosen)
        if made.head(task).reads == "pooled" and not any(name.startswith("pooler.") for name in layout.trunk):
            raise CheckpointError(f"task {task!r} reads the trunk's pooler, which {folder} does not hold")
    source = source_of(model)
    provenance = {
        "imported_from": "notebook",
        "model": source,
        "files": {path.name: sha256_file(path) for path in stored.files},
        "special_tokens": list(tokens.added),
        "left_out": [task for task in layout.heads if task not in kinds],
    }
    return seal_tasks(
        output,
        made,
        tasks=tasks,
        golden=samples(tasks, golden),
        tokenizer_json=tokens.json,
        text=tokens.spec,
        source=source,
        card=import_card("A notebook's multitask model", source, tasks),
        provenance={"import": provenance},
    )


def _habits(kind: str, added: Sequence[str]) -> dict[str, Any]:
    """Options under which a task sees what the notebook's features showed it."""
    habits: dict[str, Any] = {"max_length": 128}
    if kind == "similarity":
        habits |= {"low": 0, "high": 5}  # STS-B
    if added and kind == "generation":
        bos, eos, *_ = added
        habits |= {"template": f"{{source}}{bos}{{target}}{eos}", "type_id": 1}
    elif len(added) > 3:
        habits |= {"append": added[3]}
    return habits


def _config(home: Path) -> tuple[PretrainedConfig, PreTrainedModel]:
    """The config of the model that training began with, and its trunk without memory, to ask for names."""
    try:
        config = AutoConfig.from_pretrained(home, local_files_only=True, trust_remote_code=False)
        return config, bare_trunk(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{home} is no model that Transformers knows: {str(error).splitlines()[0]}") from error


def _layout(stored: Stored, *, prefix: str) -> _Layout:
    """Sort the file's tensors out, and compare each copy of a trunk's tensor with the first one."""
    trunk: dict[str, str] = {}
    heads: dict[str, dict[str, str]] = {}
    for key in stored.names:  # the encoder's come first
        part, _, inside = key.partition(".")
        task, _, name = inside.partition(".")
        if part == "taskmodels_dict" and name:
            head = heads.setdefault(task, {})
        elif part != "encoder":
            raise CheckpointError(
                f"{key} is no tensor of the notebook's model; those are encoder.* and taskmodels_dict.*"
            )
        if _BUFFER.search(key):
            continue
        if part == "encoder":
            trunk[inside] = key
        elif not name.startswith(prefix + "."):
            head[name] = key
        elif not stored.same(first := trunk.setdefault(name.removeprefix(prefix + "."), key), key):
            raise CheckpointError(f"{key} differs from {first}: the tasks were not trained on one trunk")
    return _Layout(trunk, heads)


def _embedded(stored: Stored, layout: _Layout, names: PreTrainedModel) -> int:
    """How many tokens the trunk embeds."""
    words = names.get_input_embeddings()
    name = next(name for name, module in names.named_modules() if module is words) + ".weight"
    if name not in layout.trunk:
        raise CheckpointError(f"the file has no encoder.{name}: it is not of the family of {names.config.model_type}")
    at = layout.trunk[name]
    return int(stored.read([at])[at].shape[0])


def _tokens(home: Path, config: PretrainedConfig, *, rows: int, special_tokens: Sequence[str] | None) -> _Tokens:
    """The tokenizer, with the special tokens that account for the embedding's rows; their ids go into the config."""
    tokenizer = tokenizer_json(home)
    words = Text(tokenizer, TextSpec()).vocab_size
    if special_tokens is None and rows == config.vocab_size:
        return _Tokens(tokenizer, spec_beside(home, config, tokenizer), ())
    more = rows - words
    added = tuple(special_tokens or (SPECIAL_TOKENS[:more] if more in (3, 4) else ()))
    if not 3 <= len(added) == more:
        found = f"the trunk embeds {rows} tokens, the tokenizer beside {home} has {words}, and {len(added)} are added"
        raise ConfigError(f"{found}; name the {more} that training added, by --special-tokens BOS,EOS,PAD[,CLS…]")
    ids = {token: words + at for at, token in enumerate(added)}
    bos, eos, pad, *_ = ids.values()
    config.update({"vocab_size": rows, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})
    longer = with_special_tokens(tokenizer, ids)
    return _Tokens(longer, text_spec(longer, pad_id=pad, eos_id=eos), added)
