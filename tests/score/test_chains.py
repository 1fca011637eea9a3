"""Chains in files: the answers of an engine bit for bit, nested and flat, over parts and workers, and what fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtserve import surgery
from mtserve.chains import Rerank, Spans
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.errors import ConfigError, InputError
from mtserve.score.cutting import Limits
from mtserve.score.plan import Settings as Plan
from mtserve.score.plan import TaskSettings
from mtserve.score.run import Here, Run
from mtserve.score.workers import Processes, engine_for
from mtserve.settings import Settings
from tests.score.test_run import lines, plain, table, write
from tests.serve.conftest import sealed
from tests.serve.test_chains import DECODER, ENCODER, TEXTS
from tests.test_cli import run as command

ROWS = [{"id": n, "text": text} for n, text in enumerate(TEXTS * 4)]
SMALL = Limits(part_rows=5, window_rows=3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made = sealed(tmp_path_factory.mktemp("scored") / "bert", "bert", tasks=ENCODER)
    made = surgery.add_chain(made, Spans(name="opinions", first="names", then="topic"))
    return surgery.add_chain(made, Spans(name="brief", first="names", then="short"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made = sealed(tmp_path_factory.mktemp("scored") / "gpt2", "gpt2", tasks=DECODER)
    return surgery.add_chain(made, Rerank(name="best", first="forth", then="style", label="old", candidates=3))


def make(engine: Engine, source: Path, output: Path, *names: str, limits: Limits | None = None, **more: Any) -> Run:
    from mtserve.score import places

    tasks = {name: more.pop(name, TaskSettings()) for name in names}
    settings = Plan(tasks=tasks, **more)
    files = places.inputs(str(source))
    return Run(engine.tasks, files, str(output), settings, chains=engine.chains, limits=limits)


@pytest.mark.parametrize(("which", "chain"), [("encoder", "opinions"), ("decoder", "best")])
def test_files_have_what_an_engine_answers(
    which: str, chain: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    engine = engine_for(str(request.getfixturevalue(which).folder), Settings(threads=1))
    wanted = engine.predict(chain, [row["text"] for row in ROWS])
    assert [one[chain] for one in engine.score((row["text"] for row in ROWS), [chain])] == wanted
    assert any(wanted)
    source = write(tmp_path / "in.jsonl", ROWS)
    for ending in ("jsonl", "parquet"):
        output = tmp_path / f"nested.{ending}"
        make(engine, source, output, chain, form="nested").score(Here(engine))
        found = lines(output) if ending == "jsonl" else table(output)
        assert [plain(row[chain], []) for row in found] == wanted, ending
    make(engine, source, tmp_path / "flat.parquet", chain, all_scores=True).score(Here(engine))
    column = {"opinions": "spans", "best": "text"}[chain]
    for row, answer in zip(table(tmp_path / "flat.parquet"), wanted, strict=True):
        assert plain(row[f"{chain}_scores"], []) == answer
        cell = row[f"{chain}_{column}"]
        assert (plain(cell, []) == answer) if chain == "opinions" else (cell == answer[0]["generated_text"])


def test_a_run_that_goes_on_writes_the_same_bytes(encoder: Checkpoint, tmp_path: Path) -> None:
    engine = engine_for(str(encoder.folder), Settings(threads=1))
    source, names = write(tmp_path / "in.jsonl", ROWS), ("opinions", "topic", "names")
    summary = make(engine, source, tmp_path / "one.jsonl", *names, limits=SMALL).score(Here(engine))
    assert (summary.counts["rows"], summary.counts["errors"]) == (len(ROWS), 0)

    broken = make(engine, source, tmp_path / "on.jsonl", *names, limits=SMALL)

    def stop(summary: Any) -> None:
        if summary.counts["rows"] > SMALL.part_rows:
            raise KeyboardInterrupt

    broken.say = stop
    with pytest.raises(KeyboardInterrupt):
        broken.score(Here(engine))
    again = make(engine, source, tmp_path / "on.jsonl", *names, limits=SMALL).score(Here(engine))
    assert again.reused >= SMALL.part_rows
    assert (tmp_path / "on.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow  # two processes that import torch
def test_workers_write_the_same_bytes(encoder: Checkpoint, tmp_path: Path) -> None:
    engine = engine_for(str(encoder.folder), Settings(threads=1))
    source, names = write(tmp_path / "in.jsonl", ROWS), ("opinions", "topic", "names")
    make(engine, source, tmp_path / "one.jsonl", *names, limits=SMALL).score(Here(engine))
    two = make(engine, source, tmp_path / "two.jsonl", *names, limits=SMALL)
    two.score(Processes(str(encoder.folder), Settings(threads=1), 2))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_row_that_the_second_task_refuses_fails_alone(encoder: Checkpoint, tmp_path: Path) -> None:
    engine = engine_for(str(encoder.folder), Settings(threads=1))
    source = write(tmp_path / "in.jsonl", [*ROWS[:2], {"id": 2, "text": f"{TEXTS[0]} " * 2}, {"id": 3}])
    summary = make(engine, source, tmp_path / "out.jsonl", "brief", "opinions").score(Here(engine))
    found = lines(tmp_path / "out.jsonl")
    assert summary.counts["errors"] == 2
    assert [row["brief"] is None for row in found] == [False, False, True, True]
    assert found[2]["opinions"]
    assert found[2]["error"]["message"].startswith("task 'brief': the text has")
    assert found[3]["opinions"] is None


def test_metrics_are_those_of_tasks_and_a_truth_of_a_chain_is_refused(encoder: Checkpoint, tmp_path: Path) -> None:
    engine = engine_for(str(encoder.folder), Settings(threads=1))
    source = write(tmp_path / "in.jsonl", [{**row, "label": "good"} for row in ROWS])
    summary = make(engine, source, tmp_path / "out.jsonl", "opinions", "topic", metrics=True).score(Here(engine))
    assert list(summary.metrics) == ["topic"]
    with pytest.raises(ConfigError, match="chain 'opinions' is not measured and has no spans"):
        make(engine, source, tmp_path / "x.jsonl", "opinions", opinions=TaskSettings(columns={"spans": "label"}))
    with pytest.raises(InputError, match=r"parameters\.other: not allowed here; allowed: names, topic"):
        make(engine, source, tmp_path / "x.jsonl", "opinions", opinions=TaskSettings(parameters={"other": {}}))


def test_the_command_takes_a_chain(encoder: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    done = command(
        "score", encoder.folder, source, tmp_path / "out.csv", "--task", "opinions",
        "--parameters", '{"topic": {"top_k": 1}}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header = (tmp_path / "out.csv").read_text().splitlines()[0]
    assert header == "id,text,opinions_spans,error_code,error_message,error_row,error_file"
    unknown = command("score", encoder.folder, source, tmp_path / "no.jsonl", "--task", "gone")
    assert unknown.returncode == 2
    assert "this model has brief, names, opinions, short, topic" in unknown.stderr
