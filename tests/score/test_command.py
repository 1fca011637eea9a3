"""`mtserve score` by hand: flags, exit codes, pipes, what is printed; and the page on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from mtserve.cli import app
from mtserve.errors import ConfigError
from mtserve.score.plan import Settings
from mtserve.score.progress import Progress
from mtserve.score.run import Summary
from mtserve.tasks import KINDS
from tests.score.test_run import lines, write
from tests.shared_data import ROOT
from tests.tiny import tiny, write_checkpoint

TASKS = {
    "intent": ("classification", {"labels": ["billing", "delivery"], "max_length": 48}),
    "sentiment": ("classification", {"labels": ["negative", "positive"], "max_length": 48}),
    "rte": ("classification", {"labels": ["entailment", "not"], "max_length": 48}),
}
PAGE = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")
ROWS: list[dict[str, Any]] = [
    {"id": n, "body": text, "label": "billing"} for n, text in enumerate(("good", "bad", "fine"))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("model")
    write_checkpoint(home / "demo-checkpoint", tiny("bert", tasks=TASKS))
    return home / "demo-checkpoint"


def call(*args: object) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["score", *map(str, args)])
    if isinstance(found.exception, Exception) and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


def test_the_command_and_its_summary(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    more = ("--text", "body", "--keep", "label", "--id", "id", "--task", "intent", "--task", "sentiment")
    code, said, _ = call(model, source, tmp_path / "out.parquet", *more, "--metrics", "--json")
    told = json.loads(said)
    assert (code, told["rows"], told["errors"], told["labelled"]) == (0, 3, 0, 3)
    assert set(told["metrics"]) == {"intent"}
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert [*frame.columns[:4]] == ["id", "label", "intent_label", "intent_score"]
    code, said, _ = call(model, source, tmp_path / "out.csv", "--text", "body", "--task", "intent")
    assert (code, re.findall(r"rows +(\d+)", said)) == (0, ["3"])


def test_some_rows_failed_is_1(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*ROWS, {"id": 3, "body": None}])
    options = ("--text", "body", "--task", "intent", "--parameters", '{"top_k": 1}')
    assert call(model, source, tmp_path / "out.jsonl", *options)[0] == 1
    found = lines(tmp_path / "out.jsonl")
    assert [len(row["intent"] or ()) for row in found] == [1, 1, 1, 0]
    code, _, said = call(model, source, tmp_path / "other.jsonl", *options, "--max-errors", 0)
    assert code == 1
    assert "1 rows failed; at most 0 may (--max-errors); the same command goes on" in said


def test_settings_in_a_file_and_flags_over_them(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"title": "good", "review": "bad", "n": 1}])
    (yaml,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    shown = yaml.replace("topic", "intent").replace("review_id", "n").replace("metrics: true", "metrics: false")
    (tmp_path / "settings.yaml").write_text(shown)
    call(model, source, tmp_path / "out.jsonl", "--settings", tmp_path / "settings.yaml", "--form", "nested")
    (row,) = lines(tmp_path / "out.jsonl")
    assert [*row] == ["n", "sentiment", "intent", "error"]
    (tmp_path / "wrong.yaml").write_text("colums: {text: review}\n")
    with pytest.raises(ConfigError, match="colums: Extra inputs are not permitted"):
        call(model, source, tmp_path / "x.jsonl", "--settings", tmp_path / "wrong.yaml")


def test_pipes(model: Path) -> None:
    argv = [sys.executable, "-m", "mtserve", "score", str(model), "-", "-", "--task", "intent"]
    given = '{"text": "good"}\n"bad"\nnothing\n'
    run = subprocess.run(argv, input=given, capture_output=True, text=True, check=False, cwd=ROOT)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [row.get("text") for row in found] == ["good", "bad", None]
    assert [row["error"] is None for row in found] == [True, True, False]
    assert run.returncode == 1
    assert "rows         3" in run.stderr


def test_progress_in_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(sys.stderr)
    progress.EVERY_S = 0.0
    summary = Summary(total=200)
    summary.add({"rows": 50, "tokens": 600, "errors": 1})
    progress.told(summary)
    assert re.fullmatch(
        r"50 of 200 rows, [\d,]+ rows/s, [\d,]+ tokens/s, 1 errors, \d+ s left\n", capsys.readouterr().err
    )


def test_the_page_names_every_flag_setting_and_kind() -> None:
    shown = CliRunner().invoke(app, ["score", "--help"], env={"COLUMNS": "200"}).stdout
    flags = set(re.findall(r"(--[a-z-]+)", shown)) - {"--help", "--no-metrics", "--json", "--parameters", "--task"}
    for flag in flags - {"--quotes", "--words", "--question", "--text-pair", "--no-all-scores"}:
        assert f"`{flag}" in PAGE or f" {flag} " in PAGE, flag
    assert all(name in PAGE for name in Settings.model_fields if name not in ("all_scores", "max_errors"))
    assert all(f"| {kind.name.replace('_', ' ')} |" in PAGE for kind in KINDS.values())


def test_the_pages_python(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(model.parent)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert len(capsys.readouterr().out.splitlines()) == 2
    intents = [one[0]["label"] for one in names["engine"].predict("intent", names["frame"].text.tolist())]
    assert names["rows"]["intent"] == intents
    assert set(names["frame"].sentiment) <= {"negative", "positive"}
