"""The rest of what needs a GPU: decoding from a Llama-like trunk, a training in each precision, the GPU tests."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.gpu_check.encoder import Encoder
from benchmarks.gpu_check.lines import FAILED, Line, checked
from mtserve.backends.eager import EagerBackend
from mtserve.batching import Batch
from mtserve.model import Model
from mtserve.rows import Past, Row
from mtserve.tasks.base import HeadSpec

ROOT = Path(__file__).parent.parent.parent
TESTS = ("tests/test_gpu.py", "tests/test_graphs.py", "tests/test_engine_ahead.py")
TESTS_S = 150
SAY = "say"
GOING_ON = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


def decoding(of: Encoder) -> Iterator[Line]:
    """Tokens a second of greedy steps over kept keys and values, the choice made on the host; and that the logits of
    the last step are those of whole rows."""
    model = _decoder(of)
    for precision in ("bf16", "fp16", "fp32"):
        backend = EagerBackend(model, pad_id=0, profile=precision)
        for count in of.sizes.sequences:
            if of.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(of.device)
            of_words = replace(of.sizes, words=of.sizes.vocabulary)
            prompts = Encoder(of_words, of.device).rows([of.sizes.prompt + at for at in range(count)])
            _steps(backend, prompts, 2)
            rows = [replace(row, past=Past()) for row in prompts]
            found = np.stack(_logits(backend, rows))
            started = time.perf_counter()
            rows, found = _steps(backend, rows, of.sizes.new_tokens, found)
            seconds = time.perf_counter() - started
            rate = count * of.sizes.new_tokens / seconds
            yield Line("decoding", f"{count} at once", precision, "greedy", rate, "tokens/s")
            whole = np.stack(_logits(backend, [replace(row, past=None) for row in rows]))
            off = float(np.abs(found - whole).max() / np.abs(whole).max())
            outcome = checked(off, GOING_ON[precision]) if backend.keeps else FAILED
            yield Line(
                "agreement", f"{count} going on", precision, "against whole rows", off, "of the largest", None, outcome
            )
        yield Line("memory", "decoding", precision, f"{of.sizes.sequences[-1]} at once", of.peak(), "MiB at most")


def _decoder(of: Encoder) -> Model:
    torch.manual_seed(0)
    hidden, layers, heads, kv_heads, inner = of.sizes.decoder
    config = LlamaConfig(
        vocab_size=of.sizes.vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=inner, pad_token_id=0,
    )  # fmt: skip
    model = Model(LlamaModel(config).eval())
    model.add(SAY, HeadSpec(architecture="causal_lm", reads="last"))
    return model.eval().to(of.device)


def _logits(backend: EagerBackend, rows: Sequence[Row]) -> list[np.ndarray]:
    found = backend.run(Batch(tuple(rows), {SAY: tuple(range(len(rows)))}))[SAY]
    return [one[-1] for one in found]


def _steps(
    backend: EagerBackend, rows: Sequence[Row], count: int, found: np.ndarray | None = None
) -> tuple[list[Row], np.ndarray]:
    """So many tokens more for every row, and the logits behind the last."""
    if found is None:
        found = np.stack(_logits(backend, rows))
    for _ in range(count):
        rows = [row.extended([int(one.argmax())], past=row.past) for row, one in zip(rows, found, strict=True)]
        found = np.stack(_logits(backend, rows))
    return list(rows), found


def training(of: Encoder) -> Iterator[Line]:
    """One short run in each precision of a GPU, from data to sealed checkpoint, served again from what it wrote."""
    from training.run import train
    from training.runfile import read_config

    cases = {"fp16": ["training.fp16=true"], "bf16": ["training.bf16=true"], "tf32": ["training.arguments.tf32=true"]}
    if of.device.type != "cuda":
        cases = {"fp32": []}
    for precision, overrides in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            path = _run_file(Path(folder), of.sizes.training_steps)
            started = time.perf_counter()
            try:
                result = train(read_config(path, overrides), base=path.parent, command="gpu check")
                seconds = time.perf_counter() - started
                assert result is not None
                metrics = result.checkpoint.task("topic").metrics
                score = metrics["accuracy"]
                yield Line("training", f"accuracy {score:.2f}", precision, "start to seal", seconds, "s", None, "fine")
            except Exception as error:
                said = f"{type(error).__name__}: {error}".partition("\n")[0]
                yield Line("training", said[:80], precision, outcome=FAILED)
            finally:
                torch.set_float32_matmul_precision("highest")


def _run_file(folder: Path, steps: int) -> Path:
    from tests.tiny import TOKENIZER_JSON, trunk_of

    trunk_of("bert").save_pretrained(folder / "trunk")
    (folder / "trunk" / "tokenizer.json").write_text(TOKENIZER_JSON, encoding="utf-8")
    words = {"good": "great", "bad": "awful", "fine": "one"}
    for name, count in (("train", 48), ("eval", 12)):
        made = [
            {"text": f"the {words[label]} town {at}", "label": label} for at in range(count // 3) for label in words
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made), encoding="utf-8")
    config = {
        "trunk": str(folder / "trunk"),
        "output": str(folder / "out"),
        "tasks": {
            "topic": {
                "kind": "classification", "options": {"max_length": 32},
                "train": {"path": "train.jsonl"}, "eval": {"path": "eval.jsonl"},
            }
        },
        "training": {"max_steps": steps, "batch_size": 8, "learning_rate": 1e-3, "logging_steps": 4, "arguments": {}},
        "golden_rows": 2,
        "resamples": 20,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def tests(of: Encoder) -> Iterator[Line]:
    """The tests that need a GPU, by a process of their own; only collected where there is none."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    if of.device.type != "cuda":
        command += ["--collect-only"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TESTS_S)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    seconds = time.perf_counter() - started
    outcome = "fine" if done.returncode == 0 else FAILED
    yield Line("tests", said[-1].strip("= ")[:100] if said else "said nothing", "", "", seconds, "s", None, outcome)
    for line in said:
        if line.startswith(("FAILED", "ERROR")):
            yield Line("tests", line[:160], outcome=FAILED)
