"""A GGUF file as the trunk of a run: the same dense trunk, its tokenizer, and a pad token that ends no text."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from mtserve.errors import CheckpointError, ResolveError, SetupError
from mtserve.interop.tokenizers import spec_beside
from mtserve.tasks.base import Options
from mtserve.trunk import load_trunk
from training.trunk import Trunk, open_trunk

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "the"]
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "unk_token_id": 0}  # as SmolLM2's file says
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(TOKENS), **sizes, **heads, **ENDS)
    model: PreTrainedModel = AutoModel.from_config(config)
    return model.eval()


@pytest.fixture(scope="module")
def path(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as llama.cpp's converter writes one, unpacked."""
    pytest.importorskip("gguf")
    found = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(found, llama)
    return found


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])  # 3: control
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(ENDS["bos_token_id"])
    writer.add_eos_token_id(ENDS["eos_token_id"])
    writer.add_unk_token_id(ENDS["unk_token_id"])
    writer.add_pad_token_id(ENDS["pad_token_id"])
    for name, tensor in model.state_dict().items():
        writer.add_tensor(tensor_name(name), rotated(name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_name(name: str) -> str:
    if name.startswith("layers."):
        _, layer, *middle, _ = name.split(".")
        return f"blk.{layer}.{NAMES['.'.join(middle)]}.weight"
    return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]


def rotated(name: str, weights: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    """Queries and keys in llama.cpp's order: the two halves of a head's rotary dimensions interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weights
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns).copy()


def states(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None]).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("where", ["file", "folder"])
def test_the_trunk_of_a_run(path: Path, llama: PreTrainedModel, where: str) -> None:
    """From the file, or from a folder that holds it alone; relative to the run file."""
    base, location = (path.parent, path.name) if where == "file" else (path.parent.parent, path.parent.name)
    trunk = open_trunk(location, base)
    assert {parameter.dtype for parameter in trunk.model.parameters()} == {torch.float32}
    assert torch.equal(states(trunk.model), states(llama))
    assert trunk.source == location
    ids = trunk.text().literal("the<|im_end|>")
    assert [TOKENS[i] for i in ids] == ["the", "<|im_end|>"]
    row = trunk.text().rows("the<|im_end|>", limits=Options().limits)[0]
    assert ENDS["eos_token_id"] not in row.ids, "in a caller's text it is text"
    assert len(row) == 1 + len("<|im_end|>")


def test_its_pad_token_ends_no_text(path: Path) -> None:
    trunk: Trunk = open_trunk(str(path), Path())
    assert (trunk.spec.eos_id, trunk.spec.pad_id) == (ENDS["eos_token_id"], ENDS["unk_token_id"])
    assert trunk.model.config.pad_token_id == trunk.spec.pad_id


def test_a_saved_trunk_is_an_ordinary_folder(path: Path, tmp_path: Path) -> None:
    trunk = open_trunk(str(path), Path())
    trunk.model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(states(load_trunk(str(tmp_path))), states(trunk.model))


def test_what_cannot_be_opened(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF?")
    with pytest.raises(CheckpointError, match=r"broken\.gguf cannot be loaded as a trunk"):
        open_trunk(str(broken), Path())
    with pytest.raises(ResolveError, match="is a file; a model is a folder"):
        open_trunk(__file__, Path())
    monkeypatch.setattr("mtserve.trunk.find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(SetupError, match="not installed: pip install gguf"):
        open_trunk(str(path), Path())


@pytest.mark.parametrize(
    ("ids", "special", "pad"),
    [
        ({"pad_token_id": 5, "eos_token_id": 2}, ["<s>", "<u>", "</s>"], 5),
        ({"pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}, ["<|endoftext|>", "<s>", "</s>"], 0),
        ({"pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 0}, ["<|endoftext|>", "<pad>", "</s>"], 1),
        ({"pad_token_id": 2, "eos_token_id": [2, 1], "bos_token_id": 0}, ["<unk>", "<pad>", "</s>", "<unk2>"], 3),
        ({"eos_token_id": 0, "bos_token_id": 0}, ["<|endoftext|>"], 0),
        ({}, ["<s>"], 0),
    ],
)
def test_which_token_pads(tmp_path: Path, ids: dict[str, Any], special: list[str], pad: int) -> None:
    made = {token: at for at, token in enumerate([*special, "a"])}
    added = [{"id": at, "content": token, "special": True, **FLAGS} for at, token in enumerate(special)]
    model = {"type": "WordLevel", "vocab": made, "unk_token": "a"}
    tokenizer = {"version": "1.0", "added_tokens": added, "model": model}
    config = type("Config", (), {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None, **ids})()
    assert spec_beside(tmp_path, config, json.dumps(tokenizer)).pad_id == pad


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
