"""The benchmarks of generation run, and what they find equal is equal; their times mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generation, interleaving
from benchmarks.subject import open_subject, step_bytes
from tests.tiny import GENERATION, tiny, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("b") / "c", tiny("llama", tasks=GENERATION), golden=False).folder


def run(main: Any, *argv: str, into: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        main([*argv, "--quick", "--json", str(into)])
    finally:
        torch.set_num_threads(threads)
    found: dict[str, Any] = json.loads(into.read_text(encoding="utf-8"))
    assert found.pop("machine")["threads"] == 1
    return found


def test_every_section_runs_and_what_must_be_equal_is(checkpoint: Path, tmp_path: Path) -> None:
    found = run(generation.main, str(checkpoint), "--task", "back", into=tmp_path / "f.json")
    assert [*found] == [*generation.SECTIONS]
    contestants = [(line["requests"], line["contestant"]) for line in found["throughput"]]
    assert len(set(contestants)) == len(contestants) == 8
    assert {line["equal tokens"] for line in found["throughput"]} == {1}
    assert {line["equal answers"] for line in found["lookup"]} == {1}
    assert [line["lookup tokens"] for line in found["lookup"]] == [0, 4, 8] * 2
    assert [line["prompt tokens"] for line in found["first-token"]] == [4, 9]
    (choice,) = found["choice"]
    assert choice["largest difference of scores"] < 1e-5
    saved = (choice["choices"] - 1) * choice["question tokens"]
    assert choice["tokens, for each"] - choice["tokens, once"] >= saved


def test_a_step_reads_all_weights_but_those_that_it_looks_up(checkpoint: Path) -> None:
    subject = open_subject(str(checkpoint))
    stock = subject.stock()
    words = stock.get_input_embeddings().weight
    count = sum(parameter.numel() for parameter in stock.parameters())
    assert stock.get_output_embeddings().weight is not words  # so one of two matrices of this size is read
    assert step_bytes(stock) == 4 * (count - words.numel())
    stock.lm_head.weight = words
    assert step_bytes(stock) == 4 * (count - words.numel())


def test_equal_share_counts_places() -> None:
    assert generation.equal_share([(1, 2, 3), (4, 5, 6)], [(1, 0, 3), (4, 5, 6)]) == 5 / 6


def test_a_classification_does_not_wait_for_generations_to_end(checkpoint: Path, tmp_path: Path) -> None:
    found = run(interleaving.main, str(checkpoint), "--generations", "3", into=tmp_path / "f.json")["interleaving"]
    assert [line["of them"] for line in found] == ["p50", "p95", "max"]
    assert found[0]["arrivals"] == 3
    assert 0 <= found[0]["steps waited for"] <= 2  # passes are so short here that a thread's switch can last for some
