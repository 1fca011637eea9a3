"""`make gpu-check` runs every path without a GPU too; its figures mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check.lines import FAILED, Line


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_path_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / "found.json"
    assert gpu_check.main(["--cpu-dry-run", "--json", str(into)]) == 0, capsys.readouterr().out
    found = json.loads(into.read_text(encoding="utf-8"))
    assert [*found["seconds"]] == [*gpu_check.SECTIONS]
    lines = found["lines"]
    assert {line["section"] for line in lines} == {
        *("matrix rate", "agreement", "latency", "speed", "memory", "decoding", "training", "tests"),
        *("onnx", "onnx agreement"),
    }
    assert not any(line["outcome"] == FAILED for line in lines)
    assert {line["precision"] for line in lines if line["section"] == "matrix rate"} == {"bf16", "fp16", "fp32", "tf32"}
    printed = capsys.readouterr().out
    assert printed.count("GPU check") == 1
    assert all(line["what"] in printed for line in lines)


def test_a_section_that_fails_is_a_line_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        yield Line("rates", "before")
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setitem(gpu_check.SECTIONS, "rates", broken)
    into = tmp_path / "found.json"
    assert gpu_check.main(["--cpu-dry-run", "--json", str(into), "--only", "rates,latency"]) == 1
    lines = json.loads(into.read_text(encoding="utf-8"))["lines"]
    assert [line["what"] for line in lines[:2]] == ["before", "RuntimeError: no kernel image is available"]
    assert lines[1]["outcome"] == FAILED
    assert {line["section"] for line in lines[2:]} == {"latency"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("There is no GPU that PyTorch")
    assert done.stderr.count("\n") == 1
