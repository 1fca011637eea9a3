"""A model through a checkpoint: bit-equal in a fresh process, one trunk in memory and on disk, tied matrices once."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel

from mtserve.backends.eager import EagerBackend
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine, Task
from mtserve.errors import CheckpointError, ResolveError
from mtserve.golden import check_golden, golden_rows
from mtserve.inspection import compare, verify
from mtserve.loading import load
from mtserve.model import Model
from mtserve.sealing import seal
from mtserve.tasks import KINDS
from mtserve.text import Text, text_spec
from mtserve.weights import load_model, task_part, trunk_part
from tests.test_contract import items
from tests.tiny import EOS, FAMILIES, OPTIONS, PAD, TOKENIZER_JSON, VOCAB, Tiny, tiny, write_checkpoint

READ_AGAIN = """
import json, sys
import torch
torch.set_num_threads(1)
import mtserve
for line in sys.stdin:
    folder, asked = json.loads(line)
    engine = mtserve.load(folder)
    print(json.dumps([engine.predict(task, [item])[0] for task, item in asked]))
"""


def test_a_fresh_process_answers_bit_for_bit(tmp_path: Path) -> None:
    """Every kind on every family, all in one child process."""
    lines, ours = [], []
    for family in FAMILIES:
        small = tiny(family)
        write_checkpoint(tmp_path / family, small)
        asked = items(small)
        lines.append(json.dumps([str(tmp_path / family), asked]))
        ours.append([small.engine.predict(task, [item])[0] for task, item in asked])
    child = subprocess.run(
        [sys.executable, "-c", READ_AGAIN],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    theirs = [json.loads(line) for line in child.stdout.splitlines()]
    assert theirs == json.loads(json.dumps(ours))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_golden_rows_are_reproduced(name: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "x", tiny(name))
    reports = verify(checkpoint)
    assert all(report.reproduced and report.rows == 1 and report.difference == 0 for report in reports)


def test_another_trunk_does_not_reproduce_golden_rows(tmp_path: Path) -> None:
    small = tiny("bert", only=("topic", "names"))
    rows = golden_rows(small.engine, "topic", [small.tasks[0].kind.sample(small.tasks[0].options)])
    for parameter in small.model.trunk.parameters():
        parameter.data += 0.1
    assert not check_golden(small.engine, "topic", rows, tolerance=1e-4).reproduced


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_reproduce_nothing(value: float) -> None:
    small = tiny("bert", only=("topic",))
    rows = golden_rows(small.engine, "topic", [small.tasks[0].kind.sample(small.tasks[0].options)])
    next(small.model.head("topic").parameters()).data.fill_(value)
    assert not check_golden(small.engine, "topic", rows, tolerance=1e-4).reproduced


def test_compare_says_when_logits_are_no_numbers(tmp_path: Path) -> None:
    fine, broken = tiny("bert", only=("topic",)), tiny("bert", only=("topic",))
    next(broken.model.head("topic").parameters()).data.fill_(float("nan"))
    found = compare(write_checkpoint(tmp_path / "a", fine), write_checkpoint(tmp_path / "b", broken, golden=False))
    assert found["tasks"]["topic"]["largest_logit_difference"] is None


def test_a_head_is_loaded_with_its_own_config(tmp_path: Path) -> None:
    """Not with the trunk's: a head that was trained elsewhere may differ in its pooling, say."""
    small = tiny("modernbert", only=())
    trunk = small.model.trunk
    config = copy.deepcopy(trunk.config)
    config.classifier_pooling = "mean"
    options = KINDS["classification"].options.model_validate(OPTIONS["topic"][1])
    head = small.model.add("topic", KINDS["classification"].head(options), config=config)
    assert (trunk.config.classifier_pooling, head.reads) == ("cls", "all")
    part = task_part(small.model, "topic", kind="classification", options=options)
    checkpoint = seal(
        tmp_path / "x",
        trunk_part(small.model, source="random"),
        tasks=[part],
        tokenizer_json=TOKENIZER_JSON,
        text=small.spec,
        provenance={},
        card="",
        written_by="tests",
    )
    assert load_model(checkpoint).head("topic").reads == "all"


def test_a_profile_that_is_not_accepted_is_said_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "x", tiny("bert", only=("topic",))).folder
    raw = json.loads((folder / "mtserve.json").read_text())
    raw["profiles"] = {"bf16": {"tolerance": 0.01}}
    (folder / "mtserve.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="profile fp32 is not accepted by the checkpoint; accepted: bf16"):
        verify(Checkpoint.open(folder))


def distinct_bytes(model: Model) -> int:
    """Bytes of all tensors of a model, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def wide(family: str, tasks: dict[str, tuple[str, dict[str, Any]]]) -> Tiny:
    """A model whose trunk is wide enough for shares to mean something."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD}
    if family == "gpt2":
        sizes |= {
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 160,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
            "vocab_size": 4000,
        }
    else:
        sizes |= {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    model = Model(AutoModel.from_config(AutoConfig.for_model(family, **sizes)))
    named = []
    for name, (kind, raw) in tasks.items():
        options = KINDS[kind].options.model_validate(raw)
        model.add(name, KINDS[kind].head(options))
        named.append(Task(name, KINDS[kind], options))
    spec = text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS)
    text = Text(TOKENIZER_JSON, spec)
    return Tiny(model.eval(), Engine(named, EagerBackend(model, pad_id=PAD), text), text, spec)


ONE: dict[str, tuple[str, dict[str, Any]]] = {"topic": ("classification", {"labels": ["a", "b", "c"]})}
FIVE: dict[str, tuple[str, dict[str, Any]]] = {
    **ONE,
    "mood": ("classification", {"labels": ["a", "b"]}),
    "alike": ("similarity", {}),
    "choice": ("multiple_choice", {}),
    "names": ("token_classification", {"labels": ["person", "place"]}),
}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "forth": ("generation", {}),
    "back": ("generation", {"template": "one : {source}{target}"}),
    "style": ("classification", {"labels": ["a", "b"]}),
}


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("family", "one", "several"), [("bert", ONE, FIVE), ("gpt2", {"forth": CAUSAL["forth"]}, CAUSAL)]
)
def test_several_tasks_cost_hardly_more_than_one(family: str, one: Any, several: Any, tmp_path: Path) -> None:
    """At most 1.05 x the weights of one task, in memory before and after loading, and on disk."""
    single, multi = wide(family, one), wide(family, several)
    assert distinct_bytes(multi.model) <= 1.05 * distinct_bytes(single.model)
    a, b = (
        write_checkpoint(tmp_path / name, small, golden=False) for name, small in (("one", single), ("several", multi))
    )
    assert disk_bytes(b.folder) <= 1.05 * disk_bytes(a.folder)
    assert distinct_bytes(load_model(b)) <= 1.05 * distinct_bytes(load_model(a))
    assert distinct_bytes(load_model(b)) == distinct_bytes(multi.model)


def test_the_tied_output_matrix_is_referenced_and_not_stored(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "x", wide("gpt2", CAUSAL), golden=False)
    for task in ("forth", "back"):
        entry = checkpoint.task(task)
        assert entry.weights is None
        assert entry.tied == {"lm_head.weight": "wte.weight"}
    model = load_model(Checkpoint.open(tmp_path / "x"))
    matrices = [model.head_state(task)["lm_head.weight"] for task in ("forth", "back")]
    embedding = model.trunk.get_input_embeddings().weight
    assert {m.data_ptr() for m in matrices} == {embedding.data_ptr()}


def test_an_untied_output_matrix_is_the_heads_own(tmp_path: Path) -> None:
    small = tiny("llama", only=("forth",))
    assert small.model.tied("forth") == {}
    checkpoint = write_checkpoint(tmp_path / "x", small)
    assert checkpoint.task("forth").weights is not None
    assert verify(checkpoint)[0].difference == 0


def test_compare(tmp_path: Path) -> None:
    same = write_checkpoint(tmp_path / "a", tiny("bert", only=("topic", "names")))
    other = tiny("bert", only=("topic", "score"))
    for parameter in other.model.heads.parameters():
        parameter.data = -parameter.data
    found = compare(same, write_checkpoint(tmp_path / "b", other))
    assert found["same_trunk"]
    assert (found["only_here"], found["only_there"], found["other_kind"]) == (["names"], ["score"], [])
    assert found["tasks"]["topic"]["flips"] == 1
    equal = compare(same, same)["tasks"]
    assert all(task["flips"] == 0 and task["largest_logit_difference"] == 0 for task in equal.values())


def test_load_takes_a_folder_or_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="does not exist; a model is a folder or a hub id"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(tmp_path)
