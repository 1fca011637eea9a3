"""The notebook's model in our words, with the features that it made: what its checkpoints are tested against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from tests.interop.tokenizers import byte_tokenizer

GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}
ROBERTA: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"max_position_embeddings": 162, "type_vocab_size": 1, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
}
LENGTH = 128


class NotebookModel(nn.Module):
    """Task models that were given the first one's trunk in place of their own."""

    def __init__(self, taskmodels: dict[str, Any]) -> None:
        super().__init__()
        first = next(iter(taskmodels.values()))
        self.encoder = getattr(first, first.base_model_prefix)
        for model in taskmodels.values():
            setattr(model, model.base_model_prefix, self.encoder)
        self.taskmodels_dict = nn.ModuleDict(taskmodels)

    def forward(self, task_name: str, **features: Tensor) -> Tensor:
        logits: Tensor = self.taskmodels_dict[task_name](**features).logits
        return logits


def gpt2_folder(folder: Path) -> Path:
    """What training began with: a config and a tokenizer."""
    tokenizer = byte_tokenizer(["<|endoftext|>"])
    end = {"bos_token_id": 0, "eos_token_id": 0}
    return _folder(folder, "gpt2", tokenizer, end={"eos_token": "<|endoftext|>"}, config={**GPT2, **end})


def roberta_folder(folder: Path) -> Path:
    tokenizer = byte_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "sep_token": "</s>", "cls_token": "<s>"}
    return _folder(folder, "roberta", tokenizer, end=roles, config=ROBERTA)


def _folder(folder: Path, family: str, tokenizer: Tokenizer, *, end: dict[str, str], config: dict[str, Any]) -> Path:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **end)
    made.save_pretrained(folder)
    AutoConfig.for_model(family, vocab_size=tokenizer.get_vocab_size(), **config).save_pretrained(folder)
    return folder


def shakespeare(folder: Path) -> tuple[NotebookModel, Any]:
    """GPT-2 that translates and tells three styles apart, with its tokenizer of four more tokens."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", cls_token="<cls>"
    )
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "cls")}
    torch.manual_seed(0)
    tasks = {
        "translate": AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **ids)),
        "classify": AutoModelForSequenceClassification.from_config(
            AutoConfig.from_pretrained(folder, num_labels=3, **ids)
        ),
    }
    for model in tasks.values():
        model.resize_token_embeddings(len(tokenizer))
    return spread(NotebookModel(tasks)), tokenizer


def understanding(folder: Path) -> tuple[NotebookModel, Any]:
    """RoBERTa with the notebook's first three tasks; the one that needs the pooler gives the trunk."""
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    tasks = {
        "commonsense_qa": AutoModelForMultipleChoice.from_config(config),
        "stsb": AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=1)),
        "rte": AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=2)),
    }
    return spread(NotebookModel(tasks)), AutoTokenizer.from_pretrained(folder)


def spread(model: NotebookModel) -> NotebookModel:
    """Weights that are further apart than fresh ones, so that inputs change outputs visibly."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model.eval()


def state(model: NotebookModel, *, copies: bool = True) -> dict[str, Tensor]:
    """All tensors under all their names, with the constants that Transformers 4.18 saved too."""
    found = {name: tensor.clone() if copies else tensor for name, tensor in model.state_dict().items()}
    for name in [name for name in found if name.endswith("attn.c_attn.weight")]:
        layer = name.removesuffix("c_attn.weight")
        found[layer + "bias"] = torch.ones(1, 1, 160, 160, dtype=torch.uint8).tril()
        found[layer + "masked_bias"] = torch.tensor(-1e4)
    for name in [name for name in found if name.endswith("embeddings.word_embeddings.weight")]:
        found[name.replace("word_embeddings.weight", "position_ids")] = torch.arange(162)[None]
    return found


def write(folder: Path, tensors: dict[str, Tensor], *, form: str) -> Path:
    """A checkpoint folder as `Trainer` wrote it: `bin`, `safetensors`, or one of the two in `shards`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"transformers_version": "4.18.0"}')
    names = sorted(tensors)
    whole, save = ("pytorch_model.bin", torch.save) if "bin" in form else ("model.safetensors", save_file)
    if "shards" not in form:
        save(tensors, folder / whole)
        return folder
    stem, ending = whole.split(".")
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{number:05}-of-00002.{ending}"
        save({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def features(tokenizer: Any, texts: list[str], pairs: list[str] | None = None) -> dict[str, Tensor]:
    return dict(tokenizer(texts, pairs, max_length=LENGTH, padding="max_length", truncation=True, return_tensors="pt"))
