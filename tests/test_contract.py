"""Every kind on every family: heads equal the stock task models, mixed batches answer as single calls do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch.utils._pytree import tree_leaves

from mtserve.backends.staging import padded
from mtserve.heads import stock_class
from mtserve.tasks import KINDS
from mtserve.trunk import inputs_of
from mtserve.weights import load_model
from tests.tiny import FAMILIES, GENERATION, OPTIONS, PAD, Tiny, tiny, write_checkpoint

CAUSAL = {"gpt2", "llama"}


def expected_tasks(family: str) -> set[str]:
    return {*OPTIONS, *(GENERATION if family in CAUSAL else ())}


def test_every_kind_is_tried_here() -> None:
    assert {kind for kind, _ in (OPTIONS | GENERATION).values()} == set(KINDS)


def test_every_kind_answers_its_sample(family: str) -> None:
    small = tiny(family)
    assert set(small.engine.tasks) == expected_tasks(family)
    for task in small.tasks:
        prediction = small.engine.predict(task.name, [task.kind.sample(task.options)])[0]
        TypeAdapter(task.kind.prediction).validate_python(prediction)


def stock_logits(small: Tiny, task: str, rows: Any) -> Any:
    """Logits of the whole stock task model with the same weights, on right-padded rows."""
    spec = small.model.specs[task]
    auto, config = stock_class(spec, small.model.trunk.config)
    config.pad_token_id = PAD
    stock = auto.from_config(config).eval()
    trunk = getattr(stock, stock.base_model_prefix)
    missing, unexpected = trunk.load_state_dict(small.model.trunk.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("pooler.") for name in unexpected)  # token heads are built without the pooler
    own = small.model.head_tensors(task)
    state = stock.state_dict()
    assert own.keys() <= state.keys()
    stock.load_state_dict({**state, **own})
    if spec.architecture == "causal_lm":
        stock.lm_head.weight = cast("Any", small.model.head(task)).stock.lm_head.weight
    ids, mask, types = padded(rows, pad_id=PAD)
    inputs = {**inputs_of(small.model.trunk, ids, types), "attention_mask": mask}
    inputs.pop("use_cache", None)
    if "MultipleChoice" in type(stock).__name__:
        inputs = {name: tensor[:, None] for name, tensor in inputs.items()}
    with torch.no_grad():
        return stock(**inputs).logits


def test_logits_equal_the_stock_task_model(family: str) -> None:
    small = tiny(family)
    texts = ["the parcel arrived two days late", "good", "what do you open when it starts to rain ?"]
    rows = [row for text in texts for row in small.text.rows(text, limits=small.tasks[0].options.limits)]
    tried = set()
    for task in small.tasks:
        if small.model.specs[task.name].architecture == "pooling":
            continue
        tried.add(task.kind.name)
        with torch.no_grad():
            ours = small.model(task.name, *padded(rows, pad_id=PAD))
        theirs = stock_logits(small, task.name, rows)
        if ours.dim() == 2 and family in CAUSAL:
            # the stock classifier scores every position and picks one; ours picks first, and sums in another order
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        elif ours.dim() == 2:
            assert torch.equal(ours, theirs), task.name
        else:
            for at, row in enumerate(rows):
                assert torch.equal(ours[at, : len(row)], theirs[at, : len(row)]), task.name
    assert tried == {task.kind.name for task in small.tasks}


def check_shared(model: Any, tasks: list[str]) -> None:
    """Only the trunk holds trunk weights: what is tied is the same storage, and the heads' own tensors are few."""
    trunk = {t.untyped_storage().data_ptr() for t in model.trunk.state_dict(keep_vars=True).values()}
    for task in tasks:
        state = model.head_state(task)
        shared = {name for name, tensor in state.items() if tensor.untyped_storage().data_ptr() in trunk}
        assert shared == model.tied(task).keys()
        if model.specs[task].architecture != "causal_lm":
            assert not shared
            assert sum(t.numel() for t in state.values()) < 3000
    embedding = model.trunk.get_input_embeddings().weight
    copies = [p for p in model.parameters() if p.shape == embedding.shape and p is not embedding]
    assert len(copies) == (len(GENERATION) if "forth" in tasks and not model.tied("forth") else 0)


def test_all_heads_share_one_trunk_before_saving_and_after_loading(family: str, tmp_path: Path) -> None:
    small = tiny(family)
    tasks = [task.name for task in small.tasks]
    check_shared(small.model, tasks)
    check_shared(load_model(write_checkpoint(tmp_path / family, small, golden=False)), tasks)


def test_tied_output_matrix_is_the_embedding() -> None:
    small = tiny("gpt2")
    for task in GENERATION:
        assert small.model.tied(task) == {"lm_head.weight": "wte.weight"}


def items(small: Tiny) -> list[tuple[str, Any]]:
    """A few inputs of every task, of different lengths; some texts are asked of several tasks."""
    texts = ["good", "the parcel arrived two days late , but the support team was kind .", "a man is feeding his dog"]
    found: list[tuple[str, Any]] = []
    for task in small.tasks:
        kind = task.kind.name
        if kind == "similarity":
            found += [(task.name, {"text": t, "text_pair": texts[at - 1]}) for at, t in enumerate(texts)]
        elif kind == "multiple_choice":
            found += [
                (task.name, {"question": texts[0], "choices": ["a book", "an umbrella in the rain"]}),
                (task.name, {"question": texts[1], "choices": ["one", "red", "green", "blue north south"]}),
            ]
        else:
            found += [(task.name, text) for text in texts]
    return found


def assert_close(left: Any, right: Any, tolerance: float) -> None:
    """Two JSON-like predictions, equal but for floats within a tolerance."""
    leaves = list(zip(tree_leaves(left), tree_leaves(right), strict=True))
    for a, b in leaves:
        if isinstance(a, float):
            assert a == pytest.approx(b, abs=tolerance)
        else:
            assert a == b


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_mixed_batches_answer_as_single_calls(name: str) -> None:
    small = tiny(name)
    asked = items(small)
    alone = [small.engine.predict(task, [item])[0] for task, item in asked]

    @settings(max_examples=40)
    @given(order=st.permutations(range(len(asked))), budget=st.integers(1, 600))
    def check(order: list[int], budget: int) -> None:
        small.engine.max_batch_tokens = budget
        works = [small.engine.prepare_all(asked[at][0], [asked[at][1]])[0] for at in order]
        for at, prediction in zip(order, small.engine.run(works), strict=True):
            assert_close(prediction, alone[at], 1e-5)

    check()


def test_padding_and_order_do_not_change_logits(family: str) -> None:
    """The same over all families, on the logits themselves."""
    small = tiny(family)
    asked = items(small)
    works = [small.engine.prepare_all(task, [item])[0] for task, item in asked]
    small.engine.step(works)
    for work, (task, item) in zip(works, asked, strict=True):
        alone = small.engine.prepare_all(task, [item])[0]
        small.engine.step([alone])
        for ours, theirs in zip(work.logits, alone.logits, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def test_equal_rows_are_encoded_once(small: Tiny) -> None:
    text = "the support team was kind"
    works = [small.engine.prepare_all(task, [text])[0] for task in ("topic", "tags", "names")]
    works += small.engine.prepare_all("cosine", [{"text": text, "text_pair": "a book"}])
    small.engine.run(works)
    assert small.engine.counters.rows == 2
    assert small.engine.counters.trunk_passes == 1


def test_a_pair_is_not_the_text_with_a_separator(small: Tiny) -> None:
    pair = small.engine.prepare_all("topic", [{"text": "a book", "text_pair": "one"}])[0].rows[0]
    joined = small.engine.prepare_all("topic", ["a book [SEP] one"])[0].rows[0]
    assert pair.key != joined.key


def test_a_head_added_to_a_model_in_evaluation_mode_drops_nothing() -> None:
    small = tiny("bert", only=("topic",))
    head = small.model.add("train", KINDS["token_classification"].head(small_options()))
    assert not any(module.training for module in head.modules())
    assert small.model.head("train") is head  # a task may be called like a method


def small_options() -> Any:
    return KINDS["token_classification"].options.model_validate(OPTIONS["names"][1])


def test_rows_differ_by_type_ids_alone() -> None:
    from mtserve.rows import make_row

    a = make_row([1, 5, 2], [0, 0, 0], [(0, 0)] * 3, [True, False, True])
    b = make_row([1, 5, 2], [0, 1, 1], [(0, 0)] * 3, [True, False, True])
    assert a.key != b.key


def test_families_are_those_that_the_docs_name() -> None:
    wanted = "albert bert deberta-v2 distilbert electra gpt2 llama modernbert mpnet roberta xlm-roberta"
    assert sorted(FAMILIES) == wanted.split()


def test_sample_is_a_valid_request_item() -> None:
    for name, (kind, raw) in (OPTIONS | GENERATION).items():
        handler = KINDS[kind]
        options = handler.options.model_validate(raw)
        sample = handler.sample(options)
        item = cast("Any", sample).model_dump(mode="json", exclude_none=True)
        assert handler.parse(item) == sample, name
