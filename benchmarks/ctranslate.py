"""CTranslate2 as a contestant of `benchmarks.generation`: a process of its own, since it needs another transformers.

    python -m venv CT2
    CT2/bin/pip install ctranslate2==4.8.5 transformers==4.57.6 sentencepiece torch==2.13.0
    python -m benchmarks.generation CHECKPOINT-OR-TRUNK --ctranslate2-python CT2/bin/python

This file is both sides. Run by that other Python it converts a folder and then generates, one JSON line in and one out;
imported, it writes the folder and talks to such a process. Knows nothing of mtserve.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

PRECISIONS = ("float32", "int8")


def write_folder(folder: Path, stock: Any, tokenizer_json: str, *, end: int) -> None:
    """A stock model as an older Transformers loads it: rotary angles and precision under the names that it knows.

    end: the token that ends texts; it also stands for those that begin them or are unknown, which no prompt here has.
    """
    stock.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rotary angles of type {rope['rope_type']} are not brought over to an older Transformers")
    config |= {"torch_dtype": config.pop("dtype", "float32"), "eos_token_id": end}
    config |= {name: value for name, value in rope.items() if name != "rope_type"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    word = Tokenizer.from_str(tokenizer_json).id_to_token(end)
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), word)
    raw = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw), encoding="utf-8")


class Peer:
    """The other side: calls are answered in order."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises RuntimeError if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the CTranslate2 process ended; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def generate(self, precision: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[Any]]:
        """Seconds as the other side measured them, and the tokens made for each prompt."""
        answer = self.ask(do="generate", precision=precision, prompts=prompts, new_tokens=new_tokens)
        return answer["seconds"], answer["ids"]


@contextmanager
def peer(python: str, folder: Path, *, threads: int) -> Iterator[tuple[Peer, dict[str, str]]]:
    """A process with the folder's model in every precision, and the versions that it runs."""
    argv = [python, "-I", str(Path(__file__).resolve())]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        other = Peer(process)
        versions = other.ask(do="load", folder=str(folder), threads=threads)
        yield other, versions


def _load(folder: Path, *, threads: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert and load a folder: models by precision, and versions."""
    import ctranslate2
    import transformers
    from ctranslate2.converters import TransformersConverter

    models = {}
    for precision in PRECISIONS:
        output = str(folder / precision)
        TransformersConverter(str(folder)).convert(output, quantization=precision)
        models[precision] = ctranslate2.Generator(
            output, device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )
    return models, {"ctranslate2": ctranslate2.__version__, "its transformers": transformers.__version__}


def _generate(model: Any, prompts: list[list[str | None]], new_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    results = model.generate_batch(
        prompts, max_batch_size=0, beam_size=1, sampling_topk=1, include_prompt_in_result=False,
        min_length=new_tokens, max_length=new_tokens,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - started, "ids": [result.sequences_ids[0] for result in results]}


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            folder = Path(request["folder"])
            models, answer = _load(folder, threads=request["threads"])
            word = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token  # by words it knows tokens
        else:
            prompts = [[word(token) for token in prompt] for prompt in request["prompts"]]
            answer = _generate(models[request["precision"]], prompts, request["new_tokens"])
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
