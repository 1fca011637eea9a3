"""Each scores one Parquet file in a process of its own and says how many seconds that took, without loading the model.

    python -m benchmarks.scoring.contestants REQUEST.json

REQUEST: contestant, input, output, tasks, model (a checkpoint), stock (folders of stock models by task), trunk,
profile, threads, batch. Prints one JSON line: seconds, rows.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

Request = dict[str, Any]


def engine(request: Request) -> Callable[[], int]:
    """The engine's own: texts in memory, windows one after another, nothing written."""
    from pyarrow import parquet

    from mtserve.offline import windows

    made = _engine(request)
    texts = parquet.read_table(request["input"])["text"].to_pylist()

    def run() -> int:
        for some in windows(texts, 2048):
            of = made.prepare_tasks(dict.fromkeys(request["tasks"]), some)
            made.run([work for works in of.values() for work in works])
        return len(texts)

    return run


def score(request: Request) -> Callable[[], int]:
    """`mtserve score`, Parquet in and out."""
    from mtserve.score.places import inputs
    from mtserve.score.plan import Settings, TaskSettings
    from mtserve.score.run import Here, Run

    made = _engine(request)
    settings = Settings(tasks={task: TaskSettings() for task in request["tasks"]})

    def run() -> int:
        places = inputs(request["input"])
        summary = Run(made.tasks, places, request["output"], settings).score(Here(made), restart=True)
        return int(summary.counts["rows"])

    return run


def pipeline(request: Request) -> Callable[[], int]:
    """A Transformers pipeline a task under `Dataset.map`, as its documentation shows."""
    import datasets
    import torch
    from transformers import AutoTokenizer, pipeline

    datasets.disable_progress_bars()
    datasets.disable_caching()
    torch.set_num_threads(request["threads"])
    made = {}
    for task, folder in request["stock"].items():
        if task in request["tasks"]:
            name = "token-classification" if request["kinds"][task] == "token_classification" else "text-classification"
            tokenizer = AutoTokenizer.from_pretrained(folder)
            dtype = torch.bfloat16 if request["profile"] == "bf16" else torch.float32
            made[task] = pipeline(name, model=folder, tokenizer=tokenizer, device="cpu", dtype=dtype)

    def answered(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            task: [json.dumps(one, default=float) for one in of(batch["text"], batch_size=request["batch"])]
            for task, of in made.items()
        }

    def run() -> int:
        rows = datasets.Dataset.from_parquet(request["input"], keep_in_memory=True)
        rows = rows.map(answered, batched=True, batch_size=1024)
        rows.to_parquet(request["output"])
        return len(rows)

    return run


def sentences(request: Request) -> Callable[[], int]:
    """sentence-transformers' encoder, sorted by length as it does, and a linear head a task in NumPy: one pass, for
    heads of a row's mean; what it computes are not these tasks' answers, but as much work."""
    import numpy as np
    import pyarrow as pa
    import torch
    from pyarrow import parquet
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(request["threads"])
    dtype = torch.bfloat16 if request["profile"] == "bf16" else torch.float32
    model = SentenceTransformer(request["trunk"], device="cpu", model_kwargs={"dtype": dtype})
    heads = {task: np.random.default_rng(0).normal(size=(384, 8)).astype(np.float32) for task in request["tasks"]}

    def run() -> int:
        table = parquet.read_table(request["input"])
        states = model.encode(table["text"].to_pylist(), batch_size=request["batch"], show_progress_bar=False)
        for task, head in heads.items():
            table = table.append_column(task, pa.array((np.asarray(states, np.float32) @ head).argmax(1)))
        parquet.write_table(table, request["output"])
        return int(table.num_rows)

    return run


def ctranslate(request: Request) -> Callable[[], int]:
    """CTranslate2's encoder, batches as it is fastest with (docs/benchmarks.md, "Encoding on a CPU"), and as above a
    linear head a task in NumPy."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet
    from tokenizers import Tokenizer

    from benchmarks.encoding.peers.ct2 import CTranslate2

    home = Path(request["output"]).parent / "trunk"
    if not home.exists():
        shutil.copytree(request["trunk"], home)
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    tokenizer.no_padding()
    model = CTranslate2(home, threads=request["threads"], precision="fp32")
    model.use({"tokens": 512, "streams": request["threads"]})
    heads = {task: np.random.default_rng(0).normal(size=(384, 8)).astype(np.float32) for task in request["tasks"]}

    def run() -> int:
        table = parquet.read_table(request["input"])
        rows = tokenizer.encode_batch(table["text"].to_pylist())
        states = model.encode([(np.array(one.ids), np.array(one.type_ids)) for one in rows])
        for task, head in heads.items():
            table = table.append_column(task, pa.array((states @ head).argmax(1)))
        parquet.write_table(table, request["output"])
        return int(table.num_rows)

    return run


def http(request: Request) -> Callable[[], int]:
    """Our own server, asked for all tasks of a text at once, 64 texts a request and four requests at a time."""
    from pyarrow import parquet
    from pyarrow import table as made

    from benchmarks.serving.servers import ours, running

    tasks = request["tasks"]
    server = ours(Path(request["model"]), request["profile"], MTSERVE_THREADS=str(request["threads"]))
    server = replace(server, asks=lambda task, text: ("/predict", {"inputs": [text], "tasks": tasks}))
    home = Path(request["output"]).parent
    asked = KEPT.enter_context(running(server, _free_port(), home, "a text"))

    def ask(texts: list[str]) -> list[Any]:
        status, answers = asked.ask("/predict", {"inputs": texts, "tasks": tasks})
        assert status == 200, status
        by_task: dict[str, list[Any]] = answers["outputs"]
        return [{task: json.dumps(of[at]) for task, of in by_task.items()} for at in range(len(texts))]

    def run() -> int:
        texts = parquet.read_table(request["input"])["text"].to_pylist()
        cuts = [texts[at : at + 64] for at in range(0, len(texts), 64)]
        with ThreadPoolExecutor(4) as pool:
            rows = [row for some in pool.map(ask, cuts) for row in some]
        parquet.write_table(
            made({"text": texts, **{task: [row[task] for row in rows] for task in tasks}}), request["output"]
        )
        return len(rows)

    return run


CONTESTANTS = {one.__name__: one for one in (engine, score, pipeline, sentences, ctranslate, http)}
KEPT = ExitStack()
"""Of what runs beside this process."""


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _engine(request: Request) -> Any:
    from mtserve.score.workers import engine_for
    from mtserve.settings import Settings

    return engine_for(request["model"], Settings(profile=request["profile"], threads=request["threads"]))


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run = CONTESTANTS[request["contestant"]](request)
    with KEPT:
        began = time.perf_counter()
        rows = run()
        sys.stdout.write(json.dumps({"seconds": time.perf_counter() - began, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
