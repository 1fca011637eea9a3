"""Every kind on every family, exported: the same logits and the same answers as the checkpoint gives."""

from __future__ import annotations

import numpy as np
import pytest

from mtserve.engine import Engine
from mtserve.export import fusing, graphs
from mtserve.rows import Floats
from tests.export.bundles import pair
from tests.test_contract import CAUSAL, assert_close, expected_tasks, items
from tests.tiny import FAMILIES, Tiny, tiny

pytestmark = pytest.mark.xdist_group("bundles")  # one process makes each bundle once

QUICK = {"bert", "gpt2"}
"""One with a cache and one without: an export takes ten seconds and more, so the others are for `make test-slow`."""
FUSED = {
    "albert": {"Attention": 1, "SkipLayerNormalization": 4},  # one layer, called twice
    "bert": {"Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1, "SkipLayerNormalization": 4},
    "deberta-v2": {"BiasGelu": 2, "SkipLayerNormalization": 4},
    "distilbert": {"Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1, "SkipLayerNormalization": 4},
    "electra": {"Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1, "SkipLayerNormalization": 4},
    "modernbert": {"Gelu": 2, "SkipLayerNormalization": 4},
    "mpnet": {"BiasGelu": 2, "SkipLayerNormalization": 5},
    "roberta": {"Attention": 2, "BiasGelu": 2, "SkipLayerNormalization": 4},
    "xlm-roberta": {"Attention": 2, "BiasGelu": 2, "SkipLayerNormalization": 4},
}


def logits(engine: Engine, small: Tiny) -> list[Floats]:
    """Of all items of all tasks, in one step: rows of many lengths in batches of mixed tasks."""
    works = [engine.prepare_all(task, [item])[0] for task, item in items(small)]
    engine.step(works)
    return [array for work in works for array in work.logits]


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)]
)
def test_a_bundle_answers_as_its_checkpoint(family: str) -> None:
    both = pair(family)
    engine, small = both.engine(), both.small
    assert set(engine.tasks) == expected_tasks(family)
    assert engine.backend.keeps == (family in CAUSAL)
    for found, wanted in zip(logits(engine, small), logits(small.engine, small), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
    asked = items(small)
    alone = [engine.predict(task, [item])[0] for task, item in asked]
    for (task, item), found in zip(asked, alone, strict=True):
        assert_close(found, small.engine.predict(task, [item])[0], 1e-4)
    works = [engine.prepare_all(task, [item])[0] for task, item in reversed(asked)]
    for found, wanted in zip(engine.run(works), reversed(alone), strict=True):
        assert_close(found, wanted, 1e-5)  # in any company as alone
    measured = both.bundle.manifest.profiles["onnx-fp32"]
    assert measured.flips == 0
    assert {*measured.tasks} == expected_tasks(family)
    assert all(one.difference is not None and one.difference <= 1e-4 for one in measured.tasks.values())


@pytest.mark.parametrize("name", sorted(FUSED))
def test_operators_that_are_fused(name: str) -> None:
    trunk = tiny(name, only=("topic",)).model.trunk
    plain = graphs.fusible_trunk_graph(trunk, pooled=False)
    made, counts = fusing.fused(plain, trunk.config)
    assert {operator: counts.get(operator, 0) for operator in FUSED[name]} == FUSED[name]
    assert made.inputs == plain.inputs
