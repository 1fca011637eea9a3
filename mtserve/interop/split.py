"""One task of a checkpoint as a stock Transformers model in a folder. Knows no serving and no training.

What our kinds do outside the model is put into the model where a stock one can hold it: a score's range into the last
layer, a segment id that all tokens have into the positions, tokens at the end of every row into the tokenizer. What it
cannot hold is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError, ConfigError, UnknownTaskError
from mtserve.heads import PairHead, StockHead, stock_class
from mtserve.interop.assemble import output_layer, stretch
from mtserve.interop.tokenizers import write_tokenizer
from mtserve.manifest import TaskEntry
from mtserve.tasks.base import Options
from mtserve.tasks.decoding import GenerationParameters
from mtserve.tasks.generation import GenerationOptions
from mtserve.tasks.similarity import SimilarityOptions
from mtserve.text import Text
from mtserve.trunk import no_progress_bars
from mtserve.weights import load_model

_DECODING = ("min_new_tokens", "do_sample", "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences")
_SAMPLING = ("temperature", "top_p", "min_p")
_BEAMS = ("num_beams", "length_penalty", "early_stopping")


def split_head(checkpoint: Checkpoint, task: str, output: Path) -> list[str]:
    """Write a task as a model that `AutoModelFor…` and `pipeline` load, with its tokenizer, into an empty folder.

    Returns sentences on what differs from the task as mtserve answers it. Raises UnknownTaskError, ConfigError for a
    task without weights of its own, or CheckpointError.
    """
    entries = {entry.name: entry for entry in checkpoint.manifest.tasks}
    if task not in entries:
        raise UnknownTaskError(task, entries)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} holds something; choose an empty folder")
    options, text = entries[task].parsed_options, checkpoint.text()
    model = load_model(checkpoint)
    head = model.head(task)
    if not isinstance(head, StockHead):
        if isinstance(head, PairHead):
            raise ConfigError(f"task {task!r} has pooling pair, which no stock model of Transformers has")
        found = f"task {task!r} compares the trunk's states and has no weights"
        raise ConfigError(f"{found}; its stock model is the trunk alone, {checkpoint.folder / 'trunk'}")
    if isinstance(options, SimilarityOptions):
        stretch(output_layer(head), by=options.high - options.low, up=options.low)
    if isinstance(options, GenerationOptions) and options.type_id:
        _fold_type(model.trunk, options.type_id)
    stock, spec = head.stock, checkpoint.manifest.text
    config = stock.config
    config.tie_word_embeddings = model.trunk.config.tie_word_embeddings
    config.pad_token_id, config.eos_token_id = spec.pad_id, _end(options, text)
    auto, _ = stock_class(entries[task].handler.head(options), config)
    with torch.device("meta"):
        names = auto.from_config(config).state_dict().keys()  # a trunk may hold more than a family's task model has
    setattr(stock, stock.base_model_prefix, model.trunk)
    if isinstance(options, GenerationOptions):
        stock.generation_config = _generation(options, text)
    with no_progress_bars():
        stock.save_pretrained(output, state_dict={n: t for n, t in stock.state_dict().items() if n in names})
    types = getattr(config, "type_vocab_size", 0) > 1
    write_tokenizer(
        output,
        checkpoint.tokenizer_json,
        spec=spec,
        end=text.literal(options.append),
        template=not isinstance(options, GenerationOptions),
        max_length=options.max_length,
        inputs=["input_ids", *["token_type_ids"] * types, "attention_mask"],
    )
    chains = [chain.name for chain in checkpoint.manifest.chains if task in (chain.first, chain.then)]
    stays = [f"chain {name!r}, which uses the task, is no part of the model" for name in chains]
    return [*_differences(entries[task], options, checkpoint=checkpoint, stock=type(stock).__name__), *stays]


@torch.no_grad()
def _fold_type(trunk: PreTrainedModel, type_id: int) -> None:
    """Add to every position what the segment id of every token adds. Raises ConfigError."""
    if not hasattr(trunk, "wpe"):
        family = trunk.config.model_type
        raise ConfigError(f"type_id {type_id} cannot be told to a stock {family}; allowed: families such as gpt2")
    trunk.wpe.weight.add_(trunk.get_input_embeddings().weight[type_id])


def _end(options: Options, text: Text) -> int | None:
    """The token that ends a text, or a generation's answer."""
    after = options.parts[2] if isinstance(options, GenerationOptions) else ""
    return text.literal(after)[0] if after else text.spec.eos_id


def _generation(options: GenerationOptions, text: Text) -> GenerationConfig:
    """The task's own way to make answers, in force where a caller of `generate` says nothing else."""
    decoding = GenerationParameters().resolve(options.generation, limit=options.max_new_tokens)
    names = [*_DECODING, *(_SAMPLING if decoding.do_sample else ()), *(_BEAMS if decoding.num_beams > 1 else ())]
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=_end(options, text),
        pad_token_id=text.spec.pad_id,
        stop_strings=list(decoding.stop_strings) or None,
        **({"top_k": decoding.top_k or 0} if decoding.do_sample else {}),
        **{name: getattr(decoding, name) for name in names if getattr(decoding, name) is not None},
    )


def _differences(entry: TaskEntry, options: Options, *, checkpoint: Checkpoint, stock: str) -> Iterator[str]:
    """What a caller of the stock model has to do or to know."""
    spec = checkpoint.manifest.text
    steps = spec.preparation if options.preparation is None else options.preparation
    if steps:
        yield f"texts are prepared first by the steps {', '.join(steps)}; a stock tokenizer does not"
    if options.on_long == "window":
        yield "long texts are cut, not read in windows"
    if isinstance(options, GenerationOptions):
        before, between, after = options.parts
        yield f"a prompt is {before + '{source}' + between!r}, and {after or 'the end token'!r} ends the answer"
        if options.generation.stop_strings:
            yield "generate needs its argument tokenizer= to find stop strings"
    elif spec.pair_separator:
        yield f"the second text of a pair begins with {spec.pair_separator!r}, which the caller puts there"
    if isinstance(options, SimilarityOptions):
        yield f"scores are not clipped to [{options.low:g}, {options.high:g}]"
    if (temperature := getattr(options, "temperature", 1.0)) != 1:
        yield f"scores are those of the logits divided by {temperature:g}"
    if thresholds := getattr(options, "thresholds", None):
        yield f"labels hold from {', '.join(f'{limit:g}' for limit in thresholds)}"
    if entry.kind == "multiple_choice" and "MultipleChoice" not in stock:
        yield f"the family has no class for multiple choice: {stock} scores one choice, beside its question, at a time"
    yield "special tokens that stand in a caller's text are read as such, not as text"
