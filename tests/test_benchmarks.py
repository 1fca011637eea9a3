"""The benchmarks run, and what they find equal is equal; their times mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import generation, interleaving
from benchmarks.encoding import __main__ as encoding
from benchmarks.encoding import report, texts
from benchmarks.encoding.contestants import Contestant, Pythons, Stable
from benchmarks.encoding.limit import operations
from benchmarks.encoding.peers.batching import Setting, cut, padding
from benchmarks.subject import open_subject, step_bytes
from mtserve.text import Text, text_spec
from tests.shared_data import DATA, needs_data
from tests.tiny import GENERATION, TOKENIZER_JSON, VOCAB, tiny, trunk_of, write_checkpoint


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


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Figures of every section of the benchmark of encoding, on a tiny trunk without peers, and the report of them."""
    home = tmp_path_factory.mktemp("encoding")
    trunk_of("bert").save_pretrained(home / "trunk")
    (home / "trunk" / "tokenizer.json").write_text(TOKENIZER_JSON, encoding="utf-8")
    (home / "doc.md").write_text("# Before\n", encoding="utf-8")
    argv = ["--quick", "--threads", "1", "--trunk", str(home / "trunk")]
    encoding.main([*argv, "--json", str(home / "f.json"), "--report", str(home / "doc.md")])
    return json.loads((home / "f.json").read_text(encoding="utf-8")), home


@pytest.mark.slow
def test_every_section_of_encoding_runs_and_ours_agrees_with_each_row_alone(
    encoded: tuple[dict[str, Any], Path],
) -> None:
    found, _ = encoded
    assert [*found] == [*encoding.SECTIONS]
    for name, section in found.items():
        assert section["lines"], (name, section["failed"])
        exact = [line for line in section["lines"] if line.get("precision") == "fp32"]
        assert all(line["lowest cosine"] > 1 - 1e-5 for line in exact)
    assert "make bench" in found["peers-a"]["failed"]["OpenVINO bf16"]  # one that is not there is told, not left out


@pytest.mark.slow
def test_the_report_is_written_between_its_marks_from_figures_alone(encoded: tuple[dict[str, Any], Path]) -> None:
    found, home = encoded
    before = (home / "doc.md").read_text(encoding="utf-8")
    assert before.startswith(f"# Before\n\n{report.BEGIN}\n")
    assert all(f"### {title}\n" in before for title in report.TITLES.values())
    (home / "doc.md").write_text(before + "after\n", encoding="utf-8")
    newer = {"tokenisation": {**found["tokenisation"], "lines": [{"texts": 17}]}}
    (home / "g.json").write_text(json.dumps(newer), encoding="utf-8")
    files = [str(home / "f.json"), str(home / "g.json")]
    encoding.main(["--from-json", *files, "--report", str(home / "doc.md")])
    after = (home / "doc.md").read_text(encoding="utf-8")
    assert after.endswith(f"{report.END}\nafter\n")
    assert "| texts |\n| --- |\n| 17 |" in after
    assert after.count(report.BEGIN) == 1
    assert all((home / "figures" / f"encoding-{name}.png").exists() for name in ("peers-a", "linear", "memory"))


def test_batches_hold_so_many_rows_or_so_many_padded_tokens() -> None:
    lengths = [2, 8, 3, 8, 1]
    assert cut(lengths, Setting(order="given", rows=2)) == [[0, 1], [2, 3], [4]]
    assert cut(lengths, Setting(tokens=16)) == [[1, 3], [2, 0, 4]]
    assert cut(lengths, Setting(tokens=4)) == [[1], [3], [2], [0, 4]]
    assert padding(lengths, Setting(order="given", rows=2)) == (16 + 16 + 1) / 22


def test_operations_are_those_that_torch_counts() -> None:
    trunk = trunk_of("bert")
    trunk.pooler = None
    trunk.set_attn_implementation("eager")  # the counter does not know the fused one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(input_ids=torch.arange(13)[None] % VOCAB)
        trunk(input_ids=torch.arange(5)[None] % VOCAB)
    assert operations(trunk.config.to_dict(), [13, 5]) == counter.get_total_flops()


def test_a_contestant_that_cannot_run_says_why(tmp_path: Path) -> None:
    entries = [Contestant("none", "fp32", "no_such_engine"), Contestant("away", "fp32", "ort", "peers")]
    with Stable(Pythons(), 1, 0, tmp_path) as stable:
        found = stable.lined_up(entries, tmp_path, {}, tune_on="all")
    assert "No module named" in found.failed["none fp32"]
    assert "no environment 'peers'" in found.failed["away fp32"]


@needs_data
def test_the_sets_are_the_dev_rows_of_three_tasks() -> None:
    text = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=0, eos_id=None))
    found = texts.read_texts(DATA, text)
    assert found.records == {"stsb": 1500, "rte": 249, "commonsenseqa": 975}  # 2,490 and 9,741 records, a tenth of each
    assert len(found.pairs) == 1500 + 249 + 5 * 975
    assert len(found.singles) == 2 * 1500 + 2 * 249 + 6 * 975
    assert found.singles == texts.read_texts(DATA, text).singles
