"""R-Drop and mixout: what they add to a loss and to weights, that they are gone after training, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.utils.parametrize import cached, is_parametrized

import mtserve
from mtserve.errors import ConfigError
from mtserve.model import Model
from mtserve.tasks.token_loss import divergence
from tests import tiny
from tests.tasks.test_loss import IGNORED, kind_of, logits, loss, options_of, row
from tests.tiny import trunk_of
from tests.training.conftest import Run
from tests.training.test_settings import moved, trained
from training.run import train
from training.runfile import read_config
from training.trainer.learner import Learned, Learner, has_dropout
from training.trainer.mixout import mix, unmix
from training.trainer.weighing import loss_terms


def both_ways(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """The mean of both divergences of one distribution each, by torch."""
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    sums = [functional.kl_div(a, b, reduction="sum", log_target=True) for a, b in ((p, q), (q, p))]
    return (sums[0] + sums[1]) / 2


def apart(name: str, one: torch.Tensor, two: torch.Tensor, rows: Any, targets: Any, **options: Any) -> torch.Tensor:
    made = kind_of(name).options.model_validate({**options_of(name).model_dump(), **options})
    found: torch.Tensor = kind_of(name).disagreement(one, two, rows, targets, made)
    return found


def test_divergences_are_torchs() -> None:
    one, two = logits(5, 4), logits(10, 4)[5:] * 3
    wanted = torch.stack([both_ways(a, b) for a, b in zip(one, two, strict=True)])
    torch.testing.assert_close(divergence(one, two), wanted)
    bits = (torch.stack([torch.zeros_like(each), each], -1) for each in (one, two))  # a sigmoid is a softmax of two
    wanted = torch.stack([torch.stack([*map(both_ways, a, b)]).sum() for a, b in zip(*bits, strict=True)])
    torch.testing.assert_close(divergence(one, two, sigmoid=True), wanted)


def test_disagreement_by_kind() -> None:
    one, two = logits(4, 3), logits(8, 3)[4:]
    rows = [[row()]] * 4
    each = torch.stack([both_ways(a, b) for a, b in zip(one, two, strict=True)])
    torch.testing.assert_close(apart("classification", one, two, rows, [0, 1, 2, 0]), each.mean())
    several = apart("multi", one, two, rows, [np.zeros(3, np.float32)] * 4)
    torch.testing.assert_close(several, divergence(one, two, sigmoid=True).sum() / 12)
    targets = [np.array([IGNORED, 1, 0]), np.array([2, IGNORED])]
    one, two = logits(2, 4, 3), logits(4, 4, 3)[2:]
    wanted = sum(both_ways(one[at], two[at]) for at in ((0, 1), (0, 2), (1, 0))) / 3
    torch.testing.assert_close(apart("generation", one, two, [[row()]] * 2, targets), wanted)
    nested = [[target] for target in targets]
    torch.testing.assert_close(apart("token_classification", one, two, [[row()], [row(2)]], nested), wanted)
    nothing = [[np.full(3, IGNORED)], [np.full(2, IGNORED)]]
    assert apart("token_classification", one, two, [[row()], [row(2)]], nothing).item() == 0


def test_disagreement_over_choices_and_scores() -> None:
    rows = [[row(part=0), row(part=1)], [row(part=0), row(part=1), row(part=2)]]
    one, two = logits(5, 1), logits(10, 1)[5:]
    wanted = (both_ways(one[:2, 0], two[:2, 0]) + both_ways(one[2:, 0], two[2:, 0])) / 2
    torch.testing.assert_close(apart("multiple_choice", one, two, rows, [0, 2]), wanted)
    one, two = logits(2, 1), logits(4, 1)[2:]
    squares = (one - two).square().mean()
    torch.testing.assert_close(apart("similarity", one, two, [[row()]] * 2, [0.5, 1.0]), squares)
    # Both methods: a score and an embedding of each of three rows; cosines of the last two.
    three = [[row(part=0), row(part=1), row(part=2)]]
    one, two = logits(3, 5), logits(6, 5)[3:]
    turned = [functional.cosine_similarity(x[1, 1:], x[2, 1:], dim=0) for x in (one, two)]
    wanted = ((one[0, 0] - two[0, 0]).square() + (turned[0] - turned[1]).square()) / 2
    torch.testing.assert_close(apart("similarity", one, two, three, [0.5], method="both"), wanted)


@pytest.mark.parametrize("name", ["classification", "multi", "multiple_choice", "similarity"])
def test_equal_passes_agree(name: str) -> None:
    found = logits(4, 1 if name in ("multiple_choice", "similarity") else 3)
    rows = [[row(part=0), row(part=1)]] * 2 if name == "multiple_choice" else [[row()]] * 4
    assert apart(name, found, found, rows, [0] * len(rows)).item() == 0


def learner(r_drop: float) -> tuple[Learner, tuple[Any, ...]]:
    torch.manual_seed(1)
    kind, options = kind_of("classification"), options_of("classification")
    model = Model(trunk_of("bert"))
    model.add("topic", kind.head(options))
    terms = loss_terms(kind, options, targets=[], r_drop=r_drop)
    ids = torch.arange(4, 16).reshape(4, 3)
    batch = "topic", ids, torch.ones_like(ids), torch.zeros_like(ids), [[row()]] * 4, [0, 1, 2, 0]
    return Learner(model, {"topic": Learned(kind, options, terms)}), batch


def test_the_loss_of_two_passes() -> None:
    made, batch = learner(3.0)
    made.train()
    torch.manual_seed(5)
    found = made(*batch)["loss"]
    torch.manual_seed(5)
    one, two = (made._pass("topic", batch[1:4], *batch[4:])[0] for _ in range(2))
    assert not torch.equal(one, two), "each has dropout of its own"
    losses = [loss("classification", each, *batch[4:]) for each in (one, two)]
    wanted = (losses[0] + losses[1] + 3 * apart("classification", one, two, *batch[4:])) / 2
    torch.testing.assert_close(found, wanted)
    made.eval()
    assert torch.equal(made(*batch)["loss"], learner(0.0)[0].eval()(*batch)["loss"]), "one pass, without dropout"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_has_dropout_is_whether_two_passes_differ(family: str) -> None:
    trunk, ids = trunk_of(family).train(), torch.arange(4, 20).reshape(2, 8)
    same = torch.equal(trunk(input_ids=ids)[0], trunk(input_ids=ids)[0])
    assert has_dropout(trunk) is not same


FAMILIES = ("bert", "gpt2", "albert", "deberta-v2", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_matrices_lie_between_the_old_and_twice_the_new(family: str) -> None:
    trunk = trunk_of(family).eval()
    shape = {name: type(module) for name, module in trunk.named_modules()}
    old = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    mix(trunk, 0.5)
    layers = {name: m for name, m in trunk.named_modules() if is_parametrized(m, "weight")}
    assert layers
    for parameter in trunk.parameters():
        parameter.data += 1.0
    for name, layer in layers.items():
        before, now = old[f"{name}.weight"], layer.weight.detach()
        assert torch.equal(now, before + 1.0), "in evaluation mode the matrix itself"
        mixed = layer.train().weight.detach()
        moves = (mixed - before).round(decimals=3)
        assert set(moves.unique().tolist()) == {0.0, 2.0}, name
        assert 0.3 < (moves == 0).float().mean() < 0.7
    unmix(trunk)
    assert {name: type(module) for name, module in trunk.named_modules()} == shape
    assert trunk.state_dict().keys() == old.keys()
    assert all(torch.equal(tensor, old[name] + 1.0) for name, tensor in trunk.state_dict().items() if "weight" in name)


def test_a_pass_sees_a_matrix_once_and_frozen_ones_are_not_mixed() -> None:
    trunk = trunk_of("bert").train()
    first, second = (trunk.get_submodule(f"encoder.layer.{at}.attention.self.query") for at in (0, 1))
    first.weight.requires_grad = False
    mix(trunk, 0.5)
    assert not is_parametrized(first, "weight")
    second.parametrizations.weight.original.data += 1.0
    with cached():
        assert second.weight is second.weight
        kept = second.weight
    assert not torch.equal(second.weight, kept)
    second.weight.sum().backward()
    grad = second.parametrizations.weight.original.grad
    assert set(grad.unique().tolist()) == {0.0, 2.0}, "of what is not the old one"


def test_a_share_near_nothing_trains_as_without() -> None:
    plain = trained(dropout=False, optimizer="sgd")
    found, weights = trained(dropout=False, optimizer="sgd", mixout=1e-9)  # shares are drawn in parts of 256
    for name, tensor in plain[1].items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for row_, twin in zip(found.log, plain[0].log, strict=True):
        assert row_ == pytest.approx(twin, rel=1e-3)
    assert moved(trained(dropout=False, optimizer="sgd", mixout=0.3)[1], plain[1])


def test_a_run_with_both_seals_an_ordinary_checkpoint_and_resumes_to_the_bit(run_file: Run, tmp_path: Path) -> None:
    path = run_file({"topic": "classification", "names": "token_classification", "score": "similarity"})
    common = ["tasks.topic.r_drop=1.0", "tasks.score.r_drop=0.5", "training.mixout=0.2", "training.learning_rate=0.01"]
    common += ["training.save_steps=2", "training.epochs=2"]

    def run(output: Path, *more: str) -> dict[str, torch.Tensor]:
        assert train(read_config(path, [*common, f"output={output}", *more]), base=path.parent) is not None
        return {name: t.clone() for name, t in mtserve.load(output).backend.model.state_dict().items()}

    straight = run(tmp_path / "straight", "training.max_steps=3")
    assert not [name for name in straight if "parametrizations" in name or "before" in name]
    with pytest.MonkeyPatch.context() as patch:
        from training import run as module

        def stopped(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(module, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", "training.max_steps=3")
    again = run(tmp_path / "broken", "training.max_steps=3", "resume=true")
    assert not moved(again, straight)
    other = run(tmp_path / "other", "training.max_steps=3", "tasks.topic.r_drop=0", "tasks.score.r_drop=0")
    assert moved(other, straight)


def test_best_weights_of_a_mixed_run_are_the_matrices_themselves(run_file: Run, tmp_path: Path) -> None:
    path = run_file({"topic": "classification"})
    given = ["training.mixout=0.5", "training.best=average", "training.eval_steps=1", f"output={tmp_path / 'best'}"]
    result = train(read_config(path, [*given, "training.max_steps=3", "training.learning_rate=0.01"]), base=path.parent)
    assert result is not None
    assert all(math.isfinite(value) for entry in result.trained.log for value in entry.values())
    model = mtserve.load(tmp_path / "best").backend.model
    start = trunk_of("bert").state_dict()
    name = "encoder.layer.0.attention.self.query.weight"
    share = (model.state_dict()[f"trunk.{name}"] == start[name]).float().mean()
    assert share < 0.05, "no matrix is sealed with numbers put back"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.mixout=1.0"], "less than 1"),
        (["training.mixout=0.1", "training.lora={rank: 2}"], "lora leaves the trunk's weights; allowed: one without"),
        (["training.mixout=0.1", "training.gradient_checkpointing=true"], "gradient_checkpointing draws anew"),
        (["training.mixout=0.1", "training.freeze=[trunk]"], "BertModel has no linear layer that is trained"),
        (["training.mixout=0.1", "result=heads"], "training.mixout: with result: heads the trunk stays"),
        (["tasks.topic.r_drop=1", "result=heads"], "tasks.topic.r_drop: kept outputs have no dropout"),
        (["tasks.topic.r_drop=-1"], "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_said(overrides: list[str], message: str, run_file: Run) -> None:
    path = run_file({"topic": "classification"})
    with pytest.raises(ConfigError, match=message):
        train(read_config(path, overrides), base=path.parent)


def test_r_drop_on_a_trunk_without_dropout_is_refused(run_file: Run) -> None:
    path = run_file({"topic": "classification"}, family="llama")
    with pytest.raises(ConfigError, match=r"tasks.topic.r_drop: LlamaModel as it is configured has no dropout"):
        train(read_config(path, ["tasks.topic.r_drop=1"]), base=path.parent)


EVERY = {
    "classification": "bert",
    "token_classification": "bert",
    "similarity": "gpt2",
    "multiple_choice": "bert",
    "generation": "gpt2",
    "masked_lm": "bert",
}
WORDS = (
    "tasks.one={kind: masked_lm, options: {mask_token: '[UNK]', max_length: 32}, "
    "train: {path: served.train.jsonl}, eval: {path: served.eval.jsonl}}"
)


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_trains_with_it(kind: str, run_file: Run) -> None:
    """The first steps of a run whose rate is nothing: the loss is that without, and what passes disagree by."""
    masked = kind == "masked_lm"
    path = run_file({"served" if masked else "one": "classification" if masked else kind}, family=EVERY[kind])

    def first(r_drop: float) -> float:
        given = [f"tasks.one.r_drop={r_drop}", "training.learning_rate=1e-30", "overwrite=true"]
        result = train(read_config(path, [WORDS, *given] if masked else given), base=path.parent)
        assert result is not None
        return next(row["train_loss_one"] for row in result.trained.log if "train_loss_one" in row)

    little, some, more = first(1e-12), first(1.0), first(3.0)
    assert little > 0
    assert some > little
    assert more - little == pytest.approx(3 * (some - little), rel=1e-3), "half the factor times the disagreement"
