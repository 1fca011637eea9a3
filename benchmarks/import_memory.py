"""Memory and time of importing a notebook's checkpoint, and the speed of a generation from what comes out.

    python -m benchmarks.import_memory [--size gpt2-large|tiny] [--bin]

Writes random weights as the notebook's training did (every trunk tensor under three names) into a temporary folder,
imports them in a process of its own, loads the checkpoint in another, and prints what the operating system says of the
processes' memory, over the bytes of the trunk's weights. The resident set counts pages of mapped files too.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024},
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160},
}
VOCAB, ADDED = 50257, 4
PROMPT = "I do not know where he has gone."


def write_base(folder: Path, size: str) -> None:
    """A config, and a tokenizer of bytes with the size of GPT-2's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = letters + [f"<unused{number}>" for number in range(VOCAB - len(letters))]
    tokenizer = Tokenizer(models.BPE({token: at for at, token in enumerate(vocab)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    AutoConfig.for_model("gpt2", vocab_size=VOCAB, **SIZES[size]).save_pretrained(folder)


def write_notebook(base: Path, folder: Path, *, form: str) -> None:
    """The trunk and, in two tasks, the trunk again; a pickle keeps what they share once, safetensors do not."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(base)
    config.vocab_size = VOCAB + ADDED
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModel.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    trunk = {name: torch.empty(shape).normal_(std=0.02, generator=generator) for name, shape in shapes.items()}
    places = ("encoder.", "taskmodels_dict.translate.transformer.", "taskmodels_dict.classify.transformer.")
    parts = [{place + name: tensor for name, tensor in trunk.items()} for place in places]
    score = {"taskmodels_dict.classify.score.weight": torch.zeros(3, config.n_embd)}
    parts.append({"taskmodels_dict.translate.lm_head.weight": trunk["wte.weight"], **score})
    folder.mkdir()
    if form == "bin":
        torch.save({name: tensor for part in parts for name, tensor in part.items()}, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number, part in enumerate(parts, 1):  # in shards, as one file would need all copies in memory at once
        shard = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child_import(base: str, folder: str, output: str) -> dict[str, float]:
    import torch

    from mtserve.interop.notebook import import_notebook

    torch.set_num_threads(2)
    before, began = peak_bytes(), time.perf_counter()
    import_notebook(
        Path(folder),
        Path(output),
        model=base,
        kinds={"translate": "generation", "classify": "classification"},
        options={"classify": {"labels": ["modern", "original", "translate"]}},
        golden={},
        allow_pickle=True,
    )
    return {"before": before, "peak": peak_bytes(), "seconds": time.perf_counter() - began}


def child_load(output: str) -> dict[str, float]:
    import torch

    from mtserve.loading import load

    torch.set_num_threads(2)
    before, began = peak_bytes(), time.perf_counter()
    engine = load(output)
    engine.predict("classify", [PROMPT])
    loaded = time.perf_counter() - began
    engine.predict("translate", [PROMPT], {"max_new_tokens": 2})
    began = time.perf_counter()
    engine.predict("translate", [PROMPT], {"max_new_tokens": 32, "min_new_tokens": 32})
    seconds = time.perf_counter() - began
    return {"before": before, "peak": peak_bytes(), "seconds": loaded, "tokens": 32 / seconds}


def in_child(function: str, *arguments: Path) -> dict[str, Any]:
    code = f"import json, sys; from benchmarks.import_memory import {function}; "
    code += f"print(json.dumps({function}(*sys.argv[1:])))"
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="gpt2-large")
    parser.add_argument("--bin", action="store_true", help="pytorch_model.bin instead of model.safetensors")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="import-") as home:
        base, folder, output = (Path(home) / name for name in ("base", "notebook", "checkpoint"))
        write_base(base, chosen.size)
        write_notebook(base, folder, form="bin" if chosen.bin else "safetensors")
        written = sum(path.stat().st_size for path in folder.iterdir())
        imported = in_child("child_import", base, folder, output)
        loaded = in_child("child_load", output)
        weights = next((output / "trunk").glob("model-*.safetensors")).stat().st_size
        sys.stdout.write(f"trunk {weights / 1e9:.2f} GB, in files of {written / 1e9:.2f} GB\n")
        for name, found in (("import", imported), ("load", loaded)):
            sizes = f"peak {found['peak'] / 1e9:.2f} GB = {found['peak'] / weights:.2f} x the weights"
            bare = f"{(found['peak'] - found['before']) / weights:.2f} x without the libraries"
            sys.stdout.write(f"{name}: {found['seconds']:.1f} s, {sizes} ({bare})\n")
        sys.stdout.write(f"generation: {loaded['tokens']:.1f} tokens/s, one greedy answer of 32 tokens, fp32\n")


if __name__ == "__main__":
    main()
